"""What the executor's benchmark concludes from tokens, scores and times, against worked examples and a simulated machine."""

import math
import random

import pytest
import torch

from joint_controller import KnobSetting
from joint_controller.benchmarks.executor_checks import (
    Comparison,
    compare_neighbours,
    format_agreement,
    format_grid,
    format_memory,
    median_interval,
)
from joint_controller.molmo.knob_space import build_knob_space


def printed(table, capsys):
    from rich.console import Console

    Console(width=200).print(table)
    return capsys.readouterr().out


def test_answers_differ_by_a_near_tie_or_by_more():
    scores = torch.tensor([[0.0, 8.0, 7.75, 7.0], [4.0, 0.0, 1.0, 2.0]])
    comparison = Comparison(step=2**-6)  # 2 steps of 8 are 0.25
    comparison.add([1, 0], [1, 0], scores)
    comparison.add([1], [1], scores[:1])
    comparison.add([2, 3], [1, 0], scores)  # a near tie; what comes behind it does not count
    comparison.add([3, 0], [1, 0], scores)
    assert comparison.summary() == {
        "same_tokens": 0.5,
        "same_or_near_tie": 0.75,
        "beyond_near_tie": 1,
        "largest_gap": 8.0,
        "gaps_where_different": [2.0, 8.0],
    }
    comparison.add_difference(scores + torch.tensor([[0.3, 0.0, 0.0, 0.4], [0.0, 0.0, 0.0, 0.0]]), scores)
    summary = comparison.summary()
    assert summary["relative_difference_of_logits_max"] == pytest.approx(0.5 / scores[0].norm().item(), rel=1e-4)
    assert summary["share_within_2e-2"] == 0.5


def test_the_interval_of_a_median_is_that_of_the_sign_test():
    # Ranks from tables of the sign test at 99 %.
    for number, ranks in ((8, (1, 8)), (11, (1, 11)), (12, (2, 11)), (20, (4, 17)), (30, (8, 23))):
        values = list(range(1, number + 1))
        random.Random(number).shuffle(values)
        assert median_interval(values) == ranks
    assert median_interval([1.0] * 7) == (-math.inf, math.inf)


SPACE = build_knob_space({"low": (1, 1), "medium": (2, 4), "high": (5, 9)}, top_k=(1, 2, 4), num_blocks=(2, 3, 4))


def wandering_clock(true_ms, noise, seed=0):
    """Times on a machine whose clock wanders by 30 percent within seconds, with some noise of each measurement."""
    draw = random.Random(seed)
    now_ms = 0.0

    def time_ms(setting):
        nonlocal now_ms
        speed = 1 + 0.3 * math.sin(now_ms / 900) * math.sin(now_ms / 5100)
        ms = true_ms(setting) * speed * draw.lognormvariate(0, noise)
        now_ms += ms
        return ms

    return time_ms


def true_ms(setting):
    views = {"low": 2, "medium": 5, "high": 10}[setting["tier"]]
    return 2 * views + setting["num_blocks"] * (1 + 0.01 * setting["top_k"])


def test_a_higher_value_that_is_faster_is_found_on_a_machine_whose_clock_wanders(capsys):
    fault = KnobSetting({**SPACE.full, "top_k": 4})

    def with_fault(setting):
        return true_ms(setting) * (0.95 if setting == fault else 1)

    results = compare_neighbours(SPACE, wandering_clock(with_fault, noise=0.02), repeats=8)
    assert results["settings"] == 27 and [knob["neighbours"] for knob in results["knobs"].values()] == [18, 18, 18]
    # It stands behind the next lower value of top_k; more blocks or crops cost more than it saves.
    lower = KnobSetting({**fault, "top_k": 2})
    assert [pair.split(":")[0] for pair in results["below_0.98"]] == [f"{lower} -> {fault}"]
    assert 0.94 < results["smallest_ratio"] == results["knobs"]["top_k"]["smallest_ratio"] < 0.97
    assert [knob["below"] for knob in results["knobs"].values()] == [0, 1, 0]
    assert results["full_ms"] / with_fault(SPACE.full) == pytest.approx(1, abs=0.35)
    # Pairs that are far apart are not measured more often than at first.
    assert 2 * 8 * 54 < results["measurements"] < 2 * 16 * 54
    assert "top_k" in printed(format_grid(results), capsys)


def test_no_fault_is_found_where_there_is_none_and_noise_is_larger_than_the_tolerance():
    results = compare_neighbours(SPACE, wandering_clock(true_ms, noise=0.03), repeats=8)
    assert results["below_0.98"] == []


def test_a_space_of_one_setting_has_no_neighbours(capsys):
    space = build_knob_space({"low": (1, 3)}, top_k=(4,), num_blocks=(12,))
    results = compare_neighbours(space, lambda setting: 5.0, repeats=8)
    assert results["cheapest_ms"] == results["full_ms"] == 5.0
    assert results["knobs"] == {} and results["smallest_ratio"] is None
    assert "5.0 ms" in printed(format_grid(results), capsys)


def test_tables_show_each_way_and_leave_out_what_was_not_compared(capsys):
    same = Comparison(2**-7)
    same.add([1], [1], torch.zeros(1, 2))
    different = Comparison(2**-7)
    different.add([1], [0], torch.tensor([[8.0, 4.0]]))
    different.add_difference(torch.tensor([[3.0]]), torch.tensor([[4.0]]))
    results = {"requests": 1, "precision": "bfloat16", **different.summary()}
    results |= {f"batched_{what}": value for what, value in same.summary().items()}
    results |= {f"stock_{what}": value for what, value in different.summary().items()}
    out = printed(format_agreement(results), capsys)
    cells = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:5]]
        for line in out.splitlines()
        if "│" in line
    }
    assert cells["same tokens"] == ["0.00%", "100.00%", "0.00%"]
    assert cells["largest gap where different (steps)"] == ["64.00", "0.00", "64.00"]
    assert cells["maximum"] == ["0.25", "", "0.25"]
    out = printed(format_memory({"requests": 2000, "host_mb": 1234.0, "growth_host_mb": -0.5}), capsys)
    assert "2,000 requests" in out and "1,234" in out and "-0.5" in out and "GPU" not in out
