"""Estimators that are adapted to machines whose true cost is another formula."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from synthetic_profile import LENGTHS, cpu_times, gpu_times, make_synthetic_profile

from joint_controller import LatencyEstimatorModel
from joint_controller.latency.fit_report import format_recalibration_rows, plot_recalibration
from joint_controller.latency.fitting import fit_latency_estimator, measured_parts, predicted_parts, profile_columns
from joint_controller.latency.held_out import errors
from joint_controller.latency.recalibration import fit_recalibration, recalibrate, recalibration_errors


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base():
    return fit_latency_estimator(make_synthetic_profile(gpu_times, num_inputs=8), num_folds=2)


def other_gpu_times(setting, num_views, num_tokens):
    """The same executor on a GPU with less bandwidth and other launch times."""
    vision, prefill, decode = gpu_times(setting, num_views, num_tokens)
    return 1.8 * vision + 0.5, 1.4 * prefill, 2.2 * decode


def test_estimator_of_a_captured_executor_knows_how_prompts_are_padded(base):
    model, report = base
    assert model.config.prefill_lengths == LENGTHS
    # Noise of 1 %: 0.8 % on average. The physical terms alone miss where bytes give way to arithmetic.
    assert report["prefill"]["mape"] < 0.02 < report["prefill"]["mape_physical"] and report["prefill"]["r2"] > 0.99
    assert report["decode"]["mape"] < 0.012


@pytest.mark.parametrize("times", [cpu_times, other_gpu_times])
def test_25_measurements_adapt_an_estimator_to_another_machine(base, times):
    lengths = {"prefill_lengths": LENGTHS} if times is other_gpu_times else {}
    profile = make_synthetic_profile(times, noise=0.02, num_inputs=8, seed=3, **lengths)
    report = recalibration_errors(base[0], profile, sizes=(10, 25), draws=3)
    for part in ("prefill", "decode", "total"):
        found = report["by_size"]["25"][part]
        assert found["mape"] < 0.03 and found["mape"] <= found["largest_mape"] < 0.05
        assert found["mape_without"] > 0.3 and report["without"][part]["mape"] > 0.3
        assert report["by_size"]["10"][part]["mape"] < 0.08
    headings, *rows = format_recalibration_rows(report)
    assert headings == ("measurements", *(f"MAPE, {part}" for part in ("preparation", "prefill", "decode", "total")))
    assert [row[0] for row in rows] == ["none", "10", "25"]
    assert rows[2][2].startswith(f"{report['by_size']['25']['prefill']['mape']:.1%} (")


@pytest.mark.slow
def test_recalibrated_estimator_is_whole(base, tmp_path):
    profile = make_synthetic_profile(cpu_times, noise=0.02, num_inputs=6, seed=3).shuffle(seed=1).select(range(60))
    model, held_out = fit_recalibration(base[0], profile)
    assert model.config.device_name == "cpu_times" and model.config.prefill_lengths is None
    assert model.config.recalibrated_from["device_name"] == "gpu_times"
    assert (
        model.config.held_out["prefill"]["mape"] < 0.06 and len(held_out.rows) == model.config.held_out["num_held_out"]
    )
    model.save_pretrained(tmp_path)
    loaded = LatencyEstimatorModel.from_pretrained(tmp_path)
    columns = profile_columns(profile)
    everything = list(range(len(profile)))
    predicted = predicted_parts(loaded, columns, everything)
    measured = measured_parts(columns, loaded)
    assert errors(measured["total"], predicted["total"])["mape"] < 0.03
    # The upper quantile, fitted to what was held out, covers what it was fitted with, too.
    below = measured["total"] <= predicted["total"] * loaded.quantile_factor(0.95)
    assert below.double().mean() > 0.9


def test_a_base_of_whole_requests_is_adapted_to_measurements_of_the_model(base):
    profile = make_synthetic_profile(cpu_times, num_inputs=3, latency_scope="model")
    adapted = recalibrate(base[0], profile)
    alone = recalibrate(base[0].in_scope("model"), profile)
    assert adapted.latency_scope == "model"
    assert all(map(torch.equal, adapted.parameters(), alone.parameters()))


def test_a_split_shares_neither_setting_nor_input(base, monkeypatch):
    profile = make_synthetic_profile(cpu_times, num_inputs=6)
    seen = []
    monkeypatch.setattr(
        "joint_controller.latency.recalibration.recalibrate",
        lambda model, table, rows: seen.append(set(rows)) or recalibrate(model, table, rows),
    )
    tested = []
    monkeypatch.setattr(
        "joint_controller.latency.recalibration.predicted_parts",
        lambda model, columns, rows: tested.append(set(rows)) or predicted_parts(model, columns, rows),
    )
    recalibration_errors(base[0], profile, sizes=(10,), draws=3)
    assert [len(rows) for rows in seen] == [10] * 3
    for given, others in zip(seen, tested[1:], strict=True):  # the first is the whole profile, without recalibration
        for key in (["tier", "top_k", "num_blocks"], ["sample_id"]):
            values = list(zip(*(profile[column] for column in key), strict=True))
            assert {values[row] for row in given}.isdisjoint({values[row] for row in others})


def test_too_few_measurements_to_test_on_are_reported_as_none(base):
    profile = make_synthetic_profile(cpu_times, num_inputs=3).select(range(0, 225, 8))
    report = recalibration_errors(base[0], profile, sizes=(5, 100), draws=2)
    assert report["by_size"]["100"]["total"] == {"mape": None, "largest_mape": None, "mape_without": None}
    assert report["by_size"]["5"]["total"]["mape"] is not None
    assert format_recalibration_rows(report)[3] == ("100", "-", "-", "-", "-")


def test_picture_is_drawn(base, tmp_path):
    profile = make_synthetic_profile(cpu_times, num_inputs=4)
    picture = plot_recalibration(recalibration_errors(base[0], profile, sizes=(10, 20), draws=2), tmp_path / "new")
    assert np.asarray(Image.open(picture).convert("L")).std() > 10


def test_what_cannot_be_adapted_is_refused(base):
    profile = make_synthetic_profile(cpu_times, num_inputs=2)
    of_another_family = copy.deepcopy(base[0])
    of_another_family.config.executor_type = "other"
    with pytest.raises(ValueError, match="model type 'other' there, 'molmo' here"):
        recalibrate(of_another_family, profile)
    other = copy.deepcopy(base[0])
    other.config.executor_shape["projector_intermediate_size"] = 999
    with pytest.raises(ValueError, match="projector_intermediate_size 999 there, 1024 here"):
        recalibrate(other, profile)
    with pytest.raises(ValueError, match="these latencies are of the model alone, not of whole requests"):
        recalibrate(base[0].in_scope("model"), profile)
    with pytest.raises(ValueError, match="too few to recalibrate"):
        recalibrate(base[0], profile, rows=[0])
    with pytest.raises(ValueError, match=r"sizes \[1\] hold a number below 2"):
        recalibration_errors(base[0], profile, sizes=[1])
