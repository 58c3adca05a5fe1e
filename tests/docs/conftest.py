import sys
from pathlib import Path


# The world of formulas is the trainer's.
sys.path.append(str(Path(__file__).parents[1] / "trainer"))
