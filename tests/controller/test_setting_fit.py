"""What fits a budget, and how much of it is left, worked out by hand."""

import math

import pytest
import torch

from joint_controller.controller import RequestFit, SettingFit


LATENCY_MS = torch.tensor([[4.0, 8.0, 12.0, 40.0], [6.0, 9.0, math.inf, 3.0], [11.0, 12.0, math.inf, 30.0]])


def test_what_fits_takes_no_more_than_the_budget_and_the_cheapest_is_left_where_nothing_does():
    fit = SettingFit.of(LATENCY_MS, torch.tensor([12.0, 6.0, 10.0]))
    assert fit.fits.tolist() == [
        [True, True, True, False],  # the third takes exactly the budget
        [True, False, False, True],
        [True, False, False, False],
    ]
    assert fit.fits_budget.tolist() == [True, True, False]


def test_slack_is_the_share_of_the_budget_that_is_left():
    fit = SettingFit.of(LATENCY_MS, torch.tensor([10.0, 6.0, 10.0]))
    expected = torch.tensor(
        [
            [0.6, 0.2, -0.2, -1.0],  # 40 of 10 ms: not -3
            [0.0, -0.5, -1.0, 0.5],
            [-0.1, -0.2, -1.0, -1.0],
        ]
    )
    torch.testing.assert_close(fit.slack, expected)
    assert LATENCY_MS[0, 3] == 40.0, "the latencies were changed"
    # A setting that takes nothing leaves all.
    assert SettingFit.of(torch.zeros(1, 2), 5.0).slack.tolist() == [[1.0, 1.0]]


def test_one_number_is_the_budget_of_all():
    one, many = SettingFit.of(LATENCY_MS, 9.0), SettingFit.of(LATENCY_MS, torch.full((3,), 9.0))
    for name in ("fits", "slack", "fits_budget"):
        assert torch.equal(getattr(one, name), getattr(many, name))


def test_without_a_mask_only_what_cannot_be_run_is_out():
    fit = SettingFit.of(LATENCY_MS, torch.tensor([12.0, 6.0, 10.0]), is_masked=False)
    assert torch.equal(fit.fits, LATENCY_MS.isfinite())
    assert fit.fits_budget.tolist() == [True, True, False]
    torch.testing.assert_close(fit.slack, SettingFit.of(LATENCY_MS, torch.tensor([12.0, 6.0, 10.0])).slack)
    nothing_runs = SettingFit.of(torch.full((1, 3), math.inf), 10.0, is_masked=False)
    assert nothing_runs.fits.tolist() == [[True, False, False]] and not nothing_runs.fits_budget


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_moves_to_a_device(device):
    moved = SettingFit.of(LATENCY_MS, 9.0).to(torch.device(device))
    assert {tensor.device.type for tensor in (moved.fits, moved.slack, moved.fits_budget)} == {device}


@pytest.mark.parametrize("is_masked", [True, False])
@pytest.mark.parametrize("budget_ms", [0.5, 9.0, 11.0, 12.0, 1000.0])
def test_that_of_one_request_is_that_of_many(is_masked, budget_ms):
    nothing_runs = torch.full((1, 4), math.inf)
    for latency_ms in [*LATENCY_MS.split(1), nothing_runs, torch.zeros(1, 4)]:
        one = RequestFit.of(latency_ms[0].tolist(), budget_ms, is_masked)
        many = SettingFit.of(latency_ms, budget_ms, is_masked).of_one()
        assert (one.fits, one.fits_budget) == (many.fits, many.fits_budget)
        assert one.slack == pytest.approx(many.slack, rel=1e-6)
