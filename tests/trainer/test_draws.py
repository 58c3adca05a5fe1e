"""Draws: functions of seed, epoch and sample; budgets uniform over the range, noise that samples from a softmax."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from joint_controller.trainer.draws import draw_action_noise, draw_budget


@pytest.mark.slow
def test_another_process_draws_the_same():
    program = "from joint_controller.trainer.draws import draw_budget; print(draw_budget(3, 1, 'scenes/train/000012', 5.0, 25.0))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(run.stdout) == draw_budget(3, 1, "scenes/train/000012", 5.0, 25.0)


def test_seed_epoch_and_sample_each_change_the_draw():
    draws = {
        draw_budget(seed, epoch, sample_id, 5.0, 25.0)
        for seed in range(3)
        for epoch in range(3)
        for sample_id in ("a/train/000000", "a/train/000001", "a/test/000000")
    }
    assert len(draws) == 27


def test_draws_are_uniform_over_the_range():
    draws = np.array([draw_budget(0, 0, f"scenes/train/{row:06d}", 10.0, 30.0) for row in range(5000)])
    assert draws.min() >= 10.0 and draws.max() <= 30.0
    # Kolmogorov–Smirnov: the largest distance to the uniform distribution, critical value 1.63 / sqrt(n) at 1 %.
    ranks = np.arange(1, 5001) / 5000
    assert np.abs(np.sort((draws - 10.0) / 20.0) - ranks).max() < 1.63 / 5000**0.5


def test_next_epoch_is_independent_of_this_one():
    first, second = ([draw_budget(0, epoch, str(row), 0.5, 1.0) for row in range(5000)] for epoch in (0, 1))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05


def test_range_of_one_value_gives_it():
    assert draw_budget(0, 0, "a", 7.5, 7.5) == 7.5


@pytest.mark.parametrize(
    ("minimum_ms", "maximum_ms"), [(0.0, 5.0), (-1.0, 5.0), (6.0, 5.0), (5.0, float("nan")), (5.0, float("inf"))]
)
def test_impossible_ranges_are_refused(minimum_ms, maximum_ms):
    with pytest.raises(ValueError, match="budget range"):
        draw_budget(0, 0, "a", minimum_ms, maximum_ms)


def test_action_noise_samples_from_the_softmax():
    logits = torch.tensor([2.0, 0.0, -1.0])
    noise = draw_action_noise(seed=1, epoch=0, sample_id="a", num_generations=20_000, num_logits=3)
    shares = (logits + noise).argmax(-1).bincount(minlength=3) / 20_000
    torch.testing.assert_close(shares, logits.softmax(-1), atol=0.015, rtol=0)
    again = draw_action_noise(seed=1, epoch=0, sample_id="a", num_generations=20_000, num_logits=3)
    assert torch.equal(noise, again)
    assert not torch.equal(noise, draw_action_noise(1, 1, "a", 20_000, 3))
