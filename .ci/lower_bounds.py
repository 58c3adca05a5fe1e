"""
Prints the oldest versions that setup.cfg allows as a constraints file for pip: each requirement at its lower bound.

torch is left out: CI installs 2.13 before either set, as a CPU build where there is one, and does not test its lower
bound.
"""

import re
from configparser import ConfigParser
from pathlib import Path


config = ConfigParser()
config.read(Path(__file__).parents[1] / "setup.cfg")
requirements = config["options"]["install_requires"] + config["options.extras_require"]["test"]
for requirement in requirements.split():
    # A requirement of any other form stops the script; skipped, it would go untested.
    name, lower = re.fullmatch(r"([\w-]+)>=([\d.]+),<[\d.]+", requirement).groups()
    if name != "torch":
        print(f"{name}=={lower}")
