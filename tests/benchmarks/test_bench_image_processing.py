"""The benchmark of image processing, with few and small images."""

import json

import pytest

from joint_controller.benchmarks import image_processing
from joint_controller.benchmarks.image_processing import Case
from joint_controller.cli import main


def test_both_ways_are_timed_and_give_the_same_pixels(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(image_processing, "MOLMOE_CASES", (Case(30, 40, 2),))
    monkeypatch.setattr(image_processing, "EMBEDDED_CASES", (Case(90, 60, 6), Case(20, 20, 1)))
    path = tmp_path / "image_processing.json"
    assert main(["bench", "image-processing", "--device", "cpu", "--repeats", "2", "--json", str(path)]) == 0
    results = json.loads(path.read_text())
    assert results["num_threads"] == 1
    assert [(row["executor"], row["num_views"]) for row in results["images"]] == [
        ("MolmoE-1B", 3),
        ("embedded", 7),
        ("embedded", 2),
    ]
    for row in results["images"]:
        assert row["ratio"] == pytest.approx(row["interpolate"]["median_ms"] / row["processor"]["median_ms"])
        assert row["interpolate"]["largest_difference"] == 0 < row["processor"]["largest_difference"] < 1e-5
        assert "device" not in row
    out = capsys.readouterr().out
    assert "MolmoE-1B, 30x40" in out and "on the GPU" not in out


def test_impossible_numbers_are_refused(capsys):
    assert main(["bench", "image-processing", "--repeats", "0"]) == 2
    assert "`repeats` is 0: give 1 or more" in capsys.readouterr().err
