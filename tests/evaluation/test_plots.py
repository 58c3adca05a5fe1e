import dataclasses

import numpy as np
import pytest
from PIL import Image

from joint_controller.evaluation.plots import plot_sweep
from joint_controller.evaluation.sweep import SweepRow


COLORS = {"controller": (0x00, 0x72, 0xB2), "best static": (0xD5, 0x5E, 0x00), "full": (0x76, 0x76, 0x76)}


def make_rows(policies=tuple(COLORS)) -> list[SweepRow]:
    return [
        SweepRow(
            policy=policy,
            latency_budget_ms=budget,
            budget_fraction=budget / 30.0,
            reward=0.5,
            accuracy=0.7 + 0.05 * step + 0.02 * number,
            latency_ms=0.8 * budget if policy != "full" else 30.0,
            budget_violation_rate=0.0 if policy != "full" else 1.0,
            most_common_setting="tier=low depth=4",
            most_common_share=0.5,
            num_samples=16,
        )
        for step, budget in enumerate((10.0, 20.0, 30.0))
        for number, policy in enumerate(policies)
    ]


def count_pixels(picture: np.ndarray, color) -> int:
    return int((picture == np.array(color)).all(axis=-1).sum())


def test_each_policy_has_a_line_on_a_white_background(tmp_path):
    picture = np.asarray(Image.open(plot_sweep(make_rows(), tmp_path / "picture.png")).convert("RGB"))
    for corner in (picture[0, 0], picture[0, -1], picture[-1, 0], picture[-1, -1]):
        assert corner.tolist() == [255, 255, 255]
    for policy, color in COLORS.items():
        assert count_pixels(picture, color) > 100, policy


def test_markers_of_budgets_that_are_exceeded_are_hollow(tmp_path):
    kept = make_rows(("controller",))
    exceeded = [dataclasses.replace(row, budget_violation_rate=0.5) for row in kept]
    pictures = [Image.open(plot_sweep(rows, tmp_path / "picture.png")).convert("RGB") for rows in (kept, exceeded)]
    filled, hollow = (count_pixels(np.asarray(picture), COLORS["controller"]) for picture in pictures)
    assert hollow < filled - 100


def test_any_number_of_policies_can_be_drawn(tmp_path):
    file = plot_sweep(make_rows([f"policy {number}" for number in range(8)]), tmp_path / "picture.png")
    assert file.stat().st_size < 200_000


def test_a_sweep_without_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the sweep has no rows"):
        plot_sweep([], tmp_path / "picture.png")
