"""
What the controller may take, measured by its benchmark. Run on a machine with a CUDA device that nothing else uses:
`pytest -m gpu`.
"""

import json

import pytest
import torch

from joint_controller.cli import main


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def run_bench(folder, *flags):
    path = folder / "controller.json"
    assert main(["bench", "controller", *flags, "--json", str(path)]) == 0
    results = json.loads(path.read_text())
    return results, results["ms"]["request controller"]["both stages"]


def test_both_stages_on_a_gpu(tmp_path):
    _, both_stages_ms = run_bench(tmp_path)
    assert both_stages_ms <= 0.2


def test_both_stages_on_a_cpu_are_a_hundredth_of_the_full_setting(tmp_path):
    results, both_stages_ms = run_bench(tmp_path, "--device", "cpu")
    assert both_stages_ms <= 0.01 * results["full_setting_ms"]
