"""What answering imports, and what it does not wait for."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["latency", "pipeline"])
@pytest.mark.slow
def test_nothing_that_draws_is_imported(module):
    code = f"import sys, joint_controller.{module}; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
