"""
What reading and preprocessing may keep in memory, measured by the benchmark over 5,000 rows. Takes minutes, so it runs with the
other targets, on a machine with a CUDA device: `pytest -m gpu`.
"""

import json

import pytest
import torch

from joint_controller.cli import main


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="runs where other targets are measured"),
    pytest.mark.timeout(900),
]


def test_memory_stops_growing_and_both_ways_give_the_same_views(tmp_path):
    path = tmp_path / "data.json"
    assert main(["bench", "data", "--json", str(path)]) == 0
    results = json.loads(path.read_text())
    assert results["memory"]["growth_mb"] <= 64
    # In normalised pixels: both round in float32, in another order.
    assert results["largest_pixel_difference"] <= 1e-5
    stages = results["stages"]
    assert stages["preprocess"]["median_ms"] < stages["preprocess, plain way"]["median_ms"]
