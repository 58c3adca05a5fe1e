"""Errors of an estimator: by hand, by brute force, on formulas."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from synthetic_profile import cpu_times, gpu_times, make_synthetic_profile

from joint_controller.latency import make_profile
from joint_controller.latency.fit_report import format_error_rows, plot_fit
from joint_controller.latency.fitting import (
    calibrate_quantiles,
    cross_validate,
    fit_coefficients,
    fit_latency_estimator,
    fit_units,
    predict_held_out,
)
from joint_controller.latency.held_out import HeldOut, conformal_quantile, coverage, errors, report_errors
from joint_controller.latency.modeling_latency_estimator import learned_factor
from joint_controller.latency.profile_table import MACHINE_COLUMNS
from joint_controller.molmo.knob_space import build_knob_space


pytestmark = pytest.mark.slow


def test_errors_by_hand():
    found = errors(torch.tensor([10.0, 20.0, math.nan, 40.0]), torch.tensor([11.0, 18.0, 5.0, 40.0]))
    assert found["mae_ms"] == pytest.approx(1.0) and found["num"] == 3
    assert found["mape"] == pytest.approx((0.1 + 0.1 + 0) / 3)
    assert found["p95_error_ms"] == pytest.approx(np.percentile([1, 2, 0], 95))
    assert found["p95_error"] == pytest.approx(0.1)
    # Sum of squares about the mean 70/3: 1400/3.
    assert found["r2"] == pytest.approx(1 - 5 / (1400 / 3))
    assert errors(torch.tensor([math.nan]), torch.tensor([1.0])) == dict.fromkeys(found) | {"num": 0}
    assert errors(torch.tensor([3.0, 3.0]), torch.tensor([2.0, 4.0]))["r2"] is None


def test_conformal_quantile_is_the_order_statistic_that_covers():
    ratios = torch.tensor([*range(1, 20), math.nan], dtype=torch.float64)  # n = 19
    assert conformal_quantile(ratios, 0.95) == 19 and conformal_quantile(ratios, 0.9) == 18
    assert conformal_quantile(ratios[:3], 0.95) == 3  # too few: the largest
    generator = torch.Generator().manual_seed(0)
    below = []
    for _ in range(2000):
        sample = torch.randn(60, generator=generator).exp()
        below.append((sample[59] <= conformal_quantile(sample[:59], 0.9)).double())
    assert torch.stack(below).mean().item() == pytest.approx(54 / 60, abs=0.02)


def make_held_out(num=400, seed=0, repeats=3):
    generator = torch.Generator().manual_seed(seed)
    rows = [
        {"tier": tier, "top_k": 1 + index % 4, "num_blocks": 4 + index % 3, "sample_id": f"{index}"}
        for index, tier in enumerate(["high", "low"] * (num // 2))
    ]
    space = build_knob_space({"low": (1, 3), "medium": (4, 8), "high": (9, 15)}, range(1, 5), range(4, 7))
    known = ("num_views", "vision_tokens", "text_tokens", "image_pixels", "output_tokens")
    known += ("overhead_ms", "controller_ms", "image_processing_ms", "vision_ms", "llm_prefill_ms")
    known = dict.fromkeys(known, 1)
    known |= dict.fromkeys(MACHINE_COLUMNS, "unknown") | {"executor_type": "molmo", "latency_scope": "request"}
    known |= {"knob_space": json.dumps(space.to_dict())}
    rows = [row | known | {"repeats_disagree": index < 5} for index, row in enumerate(rows)]
    chosen = torch.randperm(num, generator=generator)[: num // 2].tolist()
    predicted = {
        part: 10 + 90 * torch.rand(num // 2, generator=generator).double()
        for part in ("preparation", "prefill", "decode")
    }
    predicted["total"] = predicted["preparation"] + predicted["prefill"] + 3 * predicted["decode"]
    noise = {part: torch.exp(0.1 * torch.randn(num // 2, generator=generator)) for part in predicted}
    measured = {part: predicted[part] * noise[part] for part in predicted}
    singles = torch.exp(0.1 * torch.randn(num // 2, repeats, generator=generator).double())
    folds = [index % 4 for index in range(num // 2)]
    physical = {part: 1.1 * values for part, values in predicted.items()}
    ratios = {"request": singles, "model": singles}
    return HeldOut(chosen, folds, measured, predicted, physical, (), ratios, make_profile(rows))


def test_coverage_of_the_upper_quantile_is_what_it_promises():
    covered = [coverage(make_held_out(seed=seed)) for seed in range(10)]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.012)
    held_out = make_held_out()
    assert report_errors(held_out)["total"]["p95_coverage"] == coverage(held_out)
    assert coverage(replace(held_out, folds=[0] * len(held_out.folds))) is None


def test_quantiles_are_of_single_requests_not_of_their_medians():
    profile = make_synthetic_profile(cpu_times, num_inputs=4, noise=0.05)
    held_out = cross_validate(profile, num_folds=2, num_units=2)
    for scope, part in (("request", "total"), ("model", None)):
        ratios = held_out.single_ratios[scope]
        assert ratios.shape == (len(profile), 5)
        predicted = held_out.predicted_ms["total"]
        if part is None:
            predicted = predicted - held_out.predicted_ms["preparation"]
        expected = torch.tensor([profile[f"{scope}_ms"][row] for row in held_out.rows]) / predicted[:, None]
        torch.testing.assert_close(ratios, expected)
    quantiles = calibrate_quantiles(held_out)
    assert quantiles["request"]["0.95"] == conformal_quantile(held_out.single_ratios["request"].flatten(), 0.95)
    # One in twenty of single times, which are noisier than sums of medians of stages, lies above.
    assert (held_out.single_ratios["model"] <= quantiles["model"]["0.95"]).double().mean() == pytest.approx(
        0.95, abs=0.005
    )
    # Where single times are unknown, a measurement is one; where some are missing, they do not count.
    unknown = profile.map(
        lambda row, index: {"request_ms": None if index % 2 else row["request_ms"][:2]}, with_indices=True
    )
    ratios = predict_held_out(unknown, [([0], list(range(len(profile))))], [fitted_on(profile)])
    found = ratios.single_ratios["request"]
    assert found.shape == (len(profile), 2) and found[1::2, 1].isnan().all() and not found[::2].isnan().any()
    torch.testing.assert_close(found[1::2, 0], (ratios.measured_ms["total"] / ratios.predicted_ms["total"])[1::2])


def fitted_on(profile):
    return fit_latency_estimator(profile, num_folds=2, num_units=1)[0]


def test_a_stage_has_a_learned_factor_where_that_predicts_better():
    # Kernels that change within the prefill, against overhead and controller, which are what the formulas say.
    profile = make_synthetic_profile(gpu_times, num_inputs=6)
    held_out = cross_validate(profile, num_folds=2, num_units=8)
    assert "llm_prefill" in held_out.learned_stages and len(held_out.learned_stages) < 6
    report = report_errors(held_out)
    for part in ("preparation", "prefill", "decode"):
        assert report[part]["mape"] <= report[part]["mape_physical"] + 1e-3
    assert report["prefill"]["mape"] < 0.9 * report["prefill"]["mape_physical"]
    model, _ = fit_latency_estimator(profile, num_units=8, held_out=held_out)
    for stage in model.costs.stages:
        steps = model.stage_parameters(stage)[1][:, -1]
        assert (steps > 0).any() == (stage in held_out.learned_stages)


def test_a_profile_of_the_model_knows_quantiles_of_the_model():
    profile = make_synthetic_profile(gpu_times, num_inputs=3, latency_scope="model")
    model = fitted_on(profile)
    assert list(model.config.upper_quantiles) == ["model"] and list(model.config.held_out)[0] == "prefill"


def test_report_by_knob_is_the_error_of_the_rows_with_that_value():
    held_out = make_held_out()
    report = report_errors(held_out)
    assert list(report["by_knob"]["tier"]) == ["low", "high"]  # cheapest first
    assert list(report["by_knob"]["top_k"]) == ["1", "2", "3", "4"]
    rows = [index for index, row in enumerate(held_out.rows) if held_out.profile[row]["num_blocks"] == 5]
    relative = (held_out.predicted_ms["decode"] / held_out.measured_ms["decode"] - 1).abs()
    found = report["by_knob"]["num_blocks"]["5"]["decode"]
    assert found["mape"] == pytest.approx(relative[rows].mean().item()) and found["num"] == len(rows)
    assert sum(value["prefill"]["num"] for value in report["by_knob"]["top_k"].values()) == report["num_held_out"]
    assert report["prefill"]["mape_physical"] > report["prefill"]["mape"]
    assert (report["num_measurements"], report["num_disagreeing"]) == (400, 5)
    rows = format_error_rows(report)
    assert [row[0] for row in rows[:4]] == ["preparation_ms", "prefill_ms", "decode_ms_per_token", "all together"]
    assert rows[1][2] == f"{report['prefill']['mape']:.1%}" and rows[1][5] == "-"
    assert rows[3][5] == f"{report['total']['p95_coverage']:.1%}"


def test_pictures_are_drawn(tmp_path):
    pictures = plot_fit(make_held_out(), tmp_path / "new")
    assert [picture.name for picture in pictures] == ["predicted.png", "error_by_knob.png"]
    for picture in pictures:
        assert np.asarray(Image.open(picture).convert("L")).std() > 10


def kinked_stage(num, noise, seed):
    """What a GPU's prefill looks like: the larger of bytes and arithmetic, and a step where another kernel is chosen."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.exp(5.5 + 2.1 * torch.rand(num, generator=generator)).double()
    top_k = torch.randint(4, 9, (num,), generator=generator).double()
    blocks = torch.randint(12, 17, (num,), generator=generator).double()
    read, worked = 0.27 * (1 - (1 - top_k / 64) ** tokens), tokens * (6e-5 + 8e-5 * top_k) + 1e-8 * tokens**2
    true_ms = 0.3 + blocks * (0.05 + torch.maximum(read, worked) + 0.05 * (tokens > 1024))
    tokens_blocks = tokens * blocks
    features = [torch.ones_like(tokens), blocks, blocks * (1 - (1 - top_k / 64) ** tokens), tokens_blocks]
    features = torch.stack([*features, tokens_blocks * top_k, tokens * tokens_blocks], dim=-1)
    inputs = torch.stack([tokens, top_k, blocks, tokens * top_k], dim=-1)
    return features, inputs, true_ms, true_ms * torch.exp(noise * torch.randn(num, generator=generator))


@pytest.mark.parametrize("num", [40, 300])
def test_learned_factor_learns_kinks_and_steps(num):
    features, inputs, _, measured_ms = kinked_stage(num, 0.01, seed=1)
    new_features, new_inputs, new_ms, _ = kinked_stage(500, 0.0, seed=2)

    def error(units):
        factor = learned_factor(units, inputs.unbind(1))
        coefficients = fit_coefficients(features * factor[:, None], measured_ms)
        assert (coefficients >= 0).all()
        predicted = new_features @ coefficients * learned_factor(units, new_inputs.unbind(1))
        return ((predicted - new_ms).abs() / new_ms).mean().item()

    units = fit_units(features, inputs, measured_ms, num_units=16)
    assert units.shape == (16, 5) and (units >= 0).all()
    physical = error(torch.zeros_like(units))
    assert error(units) < (0.35 if num == 300 else 0.8) * physical


def test_learned_factor_by_hand():
    units = torch.tensor([[0.5, 0.0, 0.2], [0.1, 0.3, 0.5]], dtype=torch.float64)
    inputs = torch.tensor([4.0, 1.0], dtype=torch.float64), torch.tensor([0.0, 2.0], dtype=torch.float64)
    expected = [1 + 0.2 * 2**8 / (1 + 2**8) + 0.5 * 0.4**8 / (1 + 0.4**8)]
    expected.append(1 + 0.2 * 0.5**8 / (1 + 0.5**8) + 0.5 * 0.7**8 / (1 + 0.7**8))
    torch.testing.assert_close(learned_factor(units, inputs), torch.tensor(expected, dtype=torch.float64))
