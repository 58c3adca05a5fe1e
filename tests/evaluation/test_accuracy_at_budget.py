from pathlib import Path

import evaluate
import numpy as np
import pytest

from joint_controller.evaluation import accuracy_at_budget as accuracy_at_budget_package
from joint_controller.evaluation.summary import bootstrap_interval


ANSWERS = {
    "predictions": ["two", "red", "no", "4"],
    "references": [["2", "2", "two", "3"], ["Red."], ["yes"], ["4"]],
    "latencies_ms": [10.0, 20.0, 5.0, 20.5],
}


@pytest.fixture
def metric(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return evaluate.load(str(Path(accuracy_at_budget_package.__file__).parent))


def test_late_answers_count_nothing(metric):
    """Scores are 0.75, 1, 0 and 1; the last comes too late, the second just in time."""
    result = metric.compute(**ANSWERS, latency_budget_ms=20.0)
    assert result["accuracy"] == pytest.approx(2.75 / 4)
    assert result["accuracy_at_budget"] == pytest.approx(1.75 / 4)
    assert result["violations"] == 0.25
    for name, scores in (("accuracy", [0.75, 1, 0, 1]), ("accuracy_at_budget", [0.75, 1, 0, 0])):
        expected = bootstrap_interval(scores, range(4))
        assert (result[f"{name}_low"], result[f"{name}_high"]) == pytest.approx(expected)
    assert set(result) == {
        *("accuracy_at_budget", "accuracy_at_budget_low", "accuracy_at_budget_high"),
        *("accuracy", "accuracy_low", "accuracy_high", "violations"),
    }


def test_batches_are_added_up(metric):
    for row in range(4):
        metric.add_batch(**{name: values[row : row + 1] for name, values in ANSWERS.items()})
    result = metric.compute(latency_budget_ms=20.0)
    assert result == metric.compute(**ANSWERS, latency_budget_ms=20.0)


def test_answers_of_a_group_are_drawn_together(metric):
    groups = ["one", "one", "other", "other"]
    result = metric.compute(**ANSWERS, latency_budget_ms=20.0, groups=groups, seed=5)
    expected = bootstrap_interval([0.75, 1, 0, 0], groups, seed=5)
    assert (result["accuracy_at_budget_low"], result["accuracy_at_budget_high"]) == pytest.approx(expected)
    assert expected == pytest.approx((0.0, 0.875))  # both times the other, or the one


def test_another_metric_scores(metric):
    counts = {"predictions": ["There are two.", "five"], "references": [["2"], ["6"]], "latencies_ms": [1.0, 1.0]}
    assert metric.compute(**counts, latency_budget_ms=9.0, metric="exact_count")["accuracy_at_budget"] == 0.5
    assert metric.compute(**counts, latency_budget_ms=9.0)["accuracy_at_budget"] == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "`latency_budget_ms` is missing"),
        ({"latency_budget_ms": 0.0}, "`latency_budget_ms` is 0.0: give a finite number above 0"),
        ({"latency_budget_ms": float("nan")}, "`latency_budget_ms` is nan"),
        ({"latency_budget_ms": 20.0, "groups": ["a"]}, "`groups` has 1 values for 4 answers"),
        ({"latency_budget_ms": 20.0, "metric": "bleu"}, "there is no metric 'bleu'"),
        (
            {"latency_budget_ms": 20.0, "latencies_ms": [1.0, -2.0, 3.0, 4.0]},
            "`latencies_ms` holds -2.0 in place 1: give what each answer took",
        ),
        ({"latency_budget_ms": 20.0, "latencies_ms": [1.0, 2.0, np.nan, 4.0]}, "`latencies_ms` holds nan in place 2"),
    ],
)
def test_what_cannot_be_scored_is_refused(metric, options, message):
    with pytest.raises(ValueError, match=message):
        metric.compute(**{**ANSWERS, **options})
