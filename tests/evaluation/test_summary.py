import json
import math
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from made_up_outcomes import SPACE, make_samples
from rich.console import Console

from joint_controller.evaluation.request_table import Choices, build_request_table, with_measurements
from joint_controller.evaluation.summary import (
    SUMMARY_FEATURES,
    bootstrap_interval,
    format_headline_markdown,
    format_summary_markdown,
    format_summary_table,
    latency_at_accuracy,
    mean_over_budgets,
    rows_of,
    summarize,
    write_summary,
)


BUDGETS = (10.0, 20.0)
NUM_RESAMPLES = 300


def make_table(samples, runs, seed=0):
    """A table in which each run, a policy and its seed, chooses at random."""
    generator = np.random.default_rng(seed)
    size = len(samples)
    choices = [
        Choices(policy, training_seed, budget / 20, budget, generator.integers(6, size=size), generator.random(size))
        for budget in BUDGETS
        for policy, training_seed in runs
    ]
    accuracy, latency_ms = (np.array([sample[name] for sample in samples]) for name in ("accuracy", "latency_ms"))
    return build_request_table(SPACE, samples, choices, accuracy, latency_ms)


@pytest.fixture(scope="module")
def table():
    return make_table(make_samples(60, 0), [("controller", 1), ("controller", 2), ("static", -1), ("random", -1)])


@pytest.fixture(scope="module")
def summary(table):
    return summarize(table, num_resamples=NUM_RESAMPLES, seed=7)


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def resamples_by_hand(images):
    """How often each image is drawn, by the same draws."""
    generator = np.random.default_rng(7)
    for row in generator.integers(len(images), size=(NUM_RESAMPLES, len(images))):
        yield [images[number] for number in row]


def test_rows_are_means_over_requests(table, summary):
    assert summary.features == SUMMARY_FEATURES
    keys = [(row["dataset"], row["latency_budget_ms"], row["policy"]) for row in summary]
    assert keys == [
        (dataset, budget, policy)
        for dataset in ("all", "shapes", "signs")
        for budget in BUDGETS
        for policy in ("controller", "static", "random")
    ]
    for row in summary:
        requests = [
            one
            for one in table
            if one["policy"] == row["policy"]
            and one["latency_budget_ms"] == row["latency_budget_ms"]
            and row["dataset"] in ("all", one["dataset"])
        ]
        late = [
            one["latency_ms"] - row["latency_budget_ms"]
            for one in requests
            if one["latency_ms"] > row["latency_budget_ms"]
        ]
        assert row["num_samples"] == (60 if row["dataset"] == "all" else 30)
        assert row["num_images"] == 15
        assert row["num_seeds"] == (2 if row["policy"] == "controller" else 1)
        assert row["budget_fraction"] == row["latency_budget_ms"] / 20
        for name in ("accuracy", "latency_ms", "reward"):
            assert row[name] == pytest.approx(mean(one[name] for one in requests))
        for share in (50, 95, 99):
            expected = np.percentile([one["latency_ms"] for one in requests], share)
            assert row[f"latency_p{share}_ms"] == pytest.approx(expected)
        assert row["violations"] == len(late) / len(requests)
        assert row["mean_overshoot_ms"] == pytest.approx(mean(late) if late else 0.0)
        settings = [one["setting"] for one in requests]
        most = max(map(settings.count, settings))
        assert row["most_common_share"] == most / len(settings)
        assert row["most_common_setting"] == min(one for one in settings if settings.count(one) == most)
        for name in ("measured_ms", "measured_p95_ms", "measured_violations", "controller_ms"):
            assert row[name] is None
    expected = mean(row["reward"] for row in rows_of(summary, policies=["random"]))
    assert mean_over_budgets(summary, "reward", "random") == pytest.approx(expected)


def test_intervals_and_paired_differences_equal_a_loop_over_resamples(table, summary):
    """All questions and seeds of an image are drawn together, and all policies see the same draws."""
    requests = [row for row in table if row["latency_budget_ms"] == 10.0]
    images = list(dict.fromkeys(row["image_id"] for row in requests))
    # The draws number the images in the order of their codes, which is that of the table.
    found = {"controller": [], "static": []}
    of = {
        (policy, image): [row for row in requests if row["policy"] == policy and row["image_id"] == image]
        for policy in found
        for image in images
    }
    for drawn in resamples_by_hand(images):
        for policy, values in found.items():
            rows = [row for image in drawn for row in of[policy, image]]
            values.append((mean(row["accuracy"] for row in rows), mean(row["latency_ms"] for row in rows)))
    [row] = [one for one in rows_of(summary, policies=["controller"]) if one["latency_budget_ms"] == 10.0]
    ours, static = (np.array(found[policy]) for policy in ("controller", "static"))
    expected = {
        "accuracy": ours[:, 0],
        "accuracy_difference": ours[:, 0] - static[:, 0],
        "latency_saved": 1 - ours[:, 1] / static[:, 1],
    }
    for name, values in expected.items():
        low, high = np.quantile(values, [0.025, 0.975])
        assert row[f"{name}_low"] == pytest.approx(low) and row[f"{name}_high"] == pytest.approx(high), name
        assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]


def hand_made(rows):
    """A table of (policy, image, accuracy, latency) under one budget of 10 ms."""
    policies = list(dict.fromkeys(row[0] for row in rows))
    images = list(dict.fromkeys(row[1] for row in rows))
    samples = [{"sample_id": f"a/{image}", "image": image.encode()} for image in images]
    accuracy, latency_ms = (np.full((len(images), 6), math.nan) for _ in range(2))
    choices = []
    for number, policy in enumerate(policies):
        for _, image, score, ms in (row for row in rows if row[0] == policy):
            accuracy[images.index(image), number] = score
            latency_ms[images.index(image), number] = ms
        choices.append(Choices(policy, -1, 0.5, 10.0, np.full(len(images), number), np.zeros(len(images))))
    return build_request_table(SPACE, samples, choices, accuracy, latency_ms)


def test_a_difference_that_is_the_same_on_every_image_has_no_width():
    """Accuracies differ by image, 0, 0.2, ..., 0.8, but the policy is always 0.1 better and takes three quarters as long."""
    rows = [("static", str(image), image / 5, 8.0 + image) for image in range(5)]
    rows += [("ours", str(image), image / 5 + 0.1, 6.0 + 0.75 * image) for image in range(5)]
    static, ours = summarize(hand_made(rows)).select([0, 1])
    assert (static["policy"], ours["policy"]) == ("static", "ours")
    assert ours["accuracy"] == pytest.approx(0.5) and static["accuracy"] == pytest.approx(0.4)
    assert ours["accuracy_high"] - ours["accuracy_low"] > 0.3
    for end in ("", "_low", "_high"):
        assert ours[f"accuracy_difference{end}"] == pytest.approx(0.1)
        assert ours[f"latency_saved{end}"] == pytest.approx(0.25)
        assert static[f"accuracy_difference{end}"] == 0.0 == static[f"latency_saved{end}"]
    # Images 3 and 4 take 11 and 12 ms.
    assert static["violations"] == 0.4 and static["mean_overshoot_ms"] == pytest.approx(1.5)
    assert ours["violations"] == 0.0 == ours["mean_overshoot_ms"]
    assert ours["static_latency_at_equal_accuracy_ms"] is None  # static has 0.4 only
    assert static["static_latency_at_equal_accuracy_ms"] == pytest.approx(10.0)


def test_an_interval_is_that_of_the_normal_distribution_where_there_are_many_images():
    generator = np.random.default_rng(0)
    values = generator.random(4000)
    low, high = bootstrap_interval(values, range(4000))
    half_width = 1.96 * values.std() / math.sqrt(4000)
    assert low == pytest.approx(values.mean() - half_width, abs=0.1 * half_width)
    assert high == pytest.approx(values.mean() + half_width, abs=0.1 * half_width)
    # Four equal values of a group are worth one.
    wide = bootstrap_interval(np.repeat(values[:1000], 4), np.repeat(np.arange(1000), 4))
    alone = bootstrap_interval(values[:1000], range(1000))
    assert wide == pytest.approx(alone)
    with pytest.raises(ValueError, match="there are 0 values and 0 groups"):
        bootstrap_interval([], [])


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (0.3, 10.0),  # the fastest point suffices
        (0.5, 10.0),
        (0.55, 15.0),  # half way between (10, 0.5) and (20, 0.6)
        (0.6, 20.0),
        (0.75, 35.0),  # (30, 0.55) is no better than a faster one: straight from (20, 0.6) to (40, 0.8)
        (0.8, 40.0),
        (0.81, None),
    ],
)
def test_latency_at_an_accuracy_is_that_of_the_frontier(wanted, expected):
    latency_ms, accuracy = [40.0, 10.0, 30.0, 20.0, 10.0], [0.8, 0.5, 0.55, 0.6, 0.4]
    found = latency_at_accuracy(latency_ms, accuracy, wanted)
    assert found == (None if expected is None else pytest.approx(expected))


def test_no_points_reach_nothing():
    assert latency_at_accuracy([], [], 0.1) is None


def test_latency_at_equal_accuracy_is_read_off_the_static_curve(summary):
    static = rows_of(summary, policies=["static"])
    curve = [row["latency_ms"] for row in static], [row["accuracy"] for row in static]
    for row in rows_of(summary):
        expected = latency_at_accuracy(*curve, row["accuracy"])
        assert row["static_latency_at_equal_accuracy_ms"] == (None if expected is None else pytest.approx(expected))


def test_what_was_measured_is_summarised_apart(table):
    is_ours = [policy == "controller" for policy in table["policy"]]
    measured_ms = [float(number % 30) if ours else None for number, ours in enumerate(is_ours)]
    summary = summarize(with_measurements(table, measured_ms, [0.5 if ours else None for ours in is_ours]))
    ours, static, _ = summary.select(range(3))
    taken = [
        ms
        for ms, budget in zip(measured_ms, table["latency_budget_ms"], strict=True)
        if ms is not None and budget == 10
    ]
    assert ours["measured_ms"] == pytest.approx(mean(taken)) and ours["controller_ms"] == 0.5
    assert ours["measured_p95_ms"] == pytest.approx(np.percentile(taken, 95))
    assert ours["measured_violations"] == mean(ms > 10.0 for ms in taken)
    assert static["measured_ms"] is None and static["controller_ms"] is None


def test_another_baseline_or_none(table, summary):
    other = summarize(table, "random", num_resamples=10)
    for row, by_static in zip(rows_of(other), rows_of(summary), strict=True):
        assert row["static_latency_at_equal_accuracy_ms"] == by_static["static_latency_at_equal_accuracy_ms"]
        assert (row["accuracy_difference"] == 0.0) == (row["policy"] == "random")
    none = summarize(table, None, num_resamples=10)
    assert set(none["accuracy_difference"]) == set(none["latency_saved_low"]) == {None}
    without = summarize(table.filter(lambda row: row["policy"] == "random"), None, num_resamples=10)
    assert set(without["static_latency_at_equal_accuracy_ms"]) == {None}


def test_a_policy_need_not_have_every_budget(table):
    part = table.filter(lambda row: row["policy"] == "static" or row["latency_budget_ms"] == 20.0)
    rows = rows_of(summarize(part, num_resamples=10))
    keys = {(row["policy"], row["latency_budget_ms"]) for row in rows}
    assert keys == {("static", 10.0), ("controller", 20.0), ("static", 20.0), ("random", 20.0)} and len(rows) == 4
    assert all(math.isfinite(row["accuracy_difference"]) for row in rows)


def test_policies_that_cannot_be_compared_are_refused(table):
    with pytest.raises(ValueError, match="there are 59 of 60 samples for policy 'controller' .seed 1. at 10.000 ms"):
        summarize(table.select(range(1, len(table))))
    twice = Dataset.from_list([*table.to_list(), table[0]], features=table.features)
    with pytest.raises(
        ValueError, match=f"sample '{table[0]['sample_id']}' occurs twice for policy 'controller' .seed 1"
    ):
        summarize(twice)
    with pytest.raises(ValueError, match="`baseline` is 'full', which is not among the policies"):
        summarize(table, "full")
    with pytest.raises(ValueError, match="`num_resamples` is 0"):
        summarize(table, num_resamples=0)
    with pytest.raises(ValueError, match="has no rows"):
        summarize(table.select([]))
    with pytest.raises(ValueError, match="there is no column `setting`"):
        summarize(table.remove_columns("setting"))


def test_files_hold_every_row(summary, tmp_path):
    write_summary(summary, tmp_path)
    assert (
        Dataset.from_parquet(str(tmp_path / "sweep.parquet"), cache_dir=str(tmp_path / "c")).to_list()
        == summary.to_list()
    )
    content = json.loads((tmp_path / "sweep.json").read_text())
    assert list(content) == ["schema_version", "baseline", "budgets", "rows"]
    assert (content["schema_version"], content["baseline"]) == (1, "static")
    assert content["budgets"] == [{"budget_fraction": budget / 20, "latency_budget_ms": budget} for budget in BUDGETS]
    assert content["rows"] == summary.to_list()


def test_tables_for_readers(summary):
    markdown = format_summary_markdown(summary).splitlines()
    assert len(markdown) == 2 + 6 and {line.count("|") for line in markdown} == {11}
    assert len(format_summary_markdown(summary, ["static"], "signs").splitlines()) == 2 + 2
    headline = format_headline_markdown(summary).splitlines()
    assert len(headline) == 2 + 2 and {line.count("|") for line in headline} == {9}
    with pytest.raises(ValueError, match="no policy 'tuned'"):
        format_headline_markdown(summary, "tuned")
    table = format_summary_table(summary, "title", ["controller", "static"])
    assert table.row_count == 4
    row = rows_of(summary, policies=["controller"])[0]
    half_width = (row["accuracy_high"] - row["accuracy_low"]) / 2
    assert f"0.50 = 10.0 ms  controller  {row['accuracy']:.3f} ± {half_width:.3f}" in shown(table)


def shown(table):
    with Path(os.devnull).open("w") as nowhere:
        console = Console(width=80, record=True, file=nowhere)
        console.print(table)
    return console.export_text()


def test_the_longest_names_and_numbers_are_shown_in_80_columns():
    names = ("static", "controller, no mask", "per question type")
    rows = [
        (name, str(image), 1.0, ms) for name, ms in zip(names, (10.0, 300.0, 2.0), strict=True) for image in range(3)
    ]
    text = shown(format_summary_table(summarize(hand_made(rows), num_resamples=5), "title"))
    assert "…" not in text and "violations" in text
    assert re.search(r"controller, no mask  1.000 ± 0.000  300.0 ms +-2900% +100.0%", text)
    assert re.search(r"per question type    1.000 ± 0.000    2.0 ms +80% +0.0%", text)


def test_the_headline_compares_accuracy_and_latency_at_equal_accuracy():
    rows = [("static", str(image), 0.5, 8.0) for image in range(5)]
    rows += [("controller", str(image), 0.5, 6.0) for image in range(5)]
    headline = format_headline_markdown(summarize(hand_made(rows), num_resamples=10))
    assert headline.splitlines()[-1] == "| 10.0 | 0.50 | 0.500 | 0.500 | +0.0 | 6.0 | 8.0 | 25.0% |"


@pytest.mark.slow
def test_it_is_fast():
    """Ten policies, five budgets, 5,000 samples and three seeds in seconds: here a tenth of the samples in a tenth of that."""
    samples = make_samples(500, 0)
    runs = [(name, seed) for name in ("static", *"abcdefghi") for seed in range(3)]
    table = make_table(samples, runs)
    started = time.perf_counter()
    summarize(table)
    assert time.perf_counter() - started < 3.0
