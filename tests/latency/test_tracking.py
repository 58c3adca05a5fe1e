"""The tracker on sequences of ratios that are made up."""

import logging

import numpy as np
import pytest

from joint_controller.latency.tracking import LatencyTracker


UPPER_RATIO = 1.15


def follow(ratios, tracker=None):
    """Adds ratios one after the other. Gives the tracker, its factors and upper ratios before each, and which lie above."""
    tracker = tracker or LatencyTracker(0.95, UPPER_RATIO)
    factors, uppers = [], []
    for ratio in ratios:
        factors.append(tracker.factor)
        uppers.append(tracker.upper_ratio)
        tracker.add(ratio)
    return tracker, np.array(factors), np.array(uppers), np.array(ratios) > uppers


def noise(num, deviation=0.05, seed=0):
    return np.exp(np.random.default_rng(seed).normal(0, deviation, num))


def test_before_any_request_predictions_are_the_estimators():
    tracker = LatencyTracker(0.95, UPPER_RATIO)
    assert (tracker.factor, tracker.upper_ratio) == (1.0, UPPER_RATIO)
    assert (tracker.drift.num_requests, tracker.drift.median_ratio, tracker.drift.share_over_budget) == (0, None, None)


@pytest.mark.parametrize(
    "ratios",
    [
        noise(500),
        1.7 * noise(500),
        2.4 * noise(500, 0.1),
        noise(500) * np.where(np.random.default_rng(1).random(500) < 0.3, 1.7, 1.05),
        noise(500) * np.repeat(np.random.default_rng(2).choice([1.0, 1.6], 20), 25),
        np.concatenate([noise(200), 1.7 * noise(150), noise(150)]),
        0.85 * noise(500),
    ],
    ids=["quiet", "busy", "very busy", "now and then", "in turns", "for a while", "faster"],
)
def test_few_requests_lie_above_their_upper_quantile_counted_from_a_cold_start(ratios):
    _, factors, uppers, is_above = follow(ratios)
    assert is_above.mean() < 0.08
    assert 0.9 < np.median(ratios / factors) < 1.1
    # It is no promise of the moon: what is promised is near what is kept.
    assert np.median(uppers) < 1.35 * np.quantile(ratios, 0.95)


def test_it_comes_back_when_the_machine_is_quiet_again():
    tracker, *_ = follow(1.7 * noise(100))
    assert 1.6 < tracker.factor < 1.8 and tracker.upper_ratio > 1.7
    tracker, factors, uppers, _ = follow(noise(100, seed=5), tracker)
    assert factors[10:].max() < 1.1 and uppers[-1] < 1.25


def test_one_outlier_hardly_moves_it():
    tracker, *_ = follow(noise(50))
    before = tracker.factor, tracker.upper_ratio
    tracker.add(30.0)
    assert abs(tracker.factor - before[0]) < 0.06 and tracker.upper_ratio < 1.1 * before[1]
    assert tracker.drift.median_ratio < 1.1


def test_corrections_are_bounded():
    assert follow([100.0] * 60)[0].factor == 4.0
    assert follow([0.01] * 60)[0].factor == 0.5
    assert follow([100.0] * 1000)[0].upper_ratio < 10


def test_without_adapting_it_only_compares():
    tracker, *_ = follow(1.7 * noise(100), LatencyTracker(0.95, UPPER_RATIO, adapt=False))
    assert (tracker.factor, tracker.upper_ratio) == (1.0, UPPER_RATIO)
    assert tracker.drift.median_ratio == pytest.approx(1.7, rel=0.02)


def test_without_a_quantile_typical_latencies_are_corrected():
    tracker = LatencyTracker(None, None)
    for ratio in 1.7 * noise(50):
        tracker.add(ratio)
    assert 1.5 < tracker.factor < 1.9 and tracker.upper_ratio is None


def test_the_share_over_budget_is_of_those_that_were_to_keep_it():
    tracker = LatencyTracker(0.95, UPPER_RATIO)
    for is_over in (False, None, True, False, None, False):
        tracker.add(1.0, is_over)
    assert tracker.drift.share_over_budget == 0.25 and tracker.drift.num_requests == 6


def test_a_warning_tells_once_that_requests_take_longer(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("joint_controller"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    tracker, *_ = follow(noise(50))
    assert not caplog.records
    follow(1.6 * noise(50), tracker)
    follow(noise(50), tracker)
    follow(1.6 * noise(50), tracker)
    [record] = caplog.records
    assert "times what was predicted" in record.message and "check_latency" in record.message
