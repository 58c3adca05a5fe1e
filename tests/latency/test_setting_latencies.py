"""Latencies of one request at all settings, against those that the estimator predicts setting by setting."""

import random

import pytest
import torch

from joint_controller import LatencyEstimatorConfig, LatencyEstimatorModel
from joint_controller.latency import setting_latencies
from joint_controller.latency.setting_latencies import SettingLatencies
from joint_controller.molmo.knob_space import build_knob_space


SPACE = build_knob_space({"low": (1, 2), "medium": (3, 5), "high": (6, 9)}, top_k=(1, 2, 4), num_blocks=(2, 3, 4))
NAMES = ("image_pixels", "num_views", "vision_tokens", "text_tokens")
ANSWERS = (1, 7)


def make_estimator(scope="request", prefill_lengths=None):
    config = LatencyEstimatorConfig(
        executor_type="molmo",
        fitted_knobs={name: list(values) for name, values in SPACE.values.items()},
        executor_shape={"text_config.num_experts": 8},
        prefill_lengths=prefill_lengths,
    )
    model, generator = LatencyEstimatorModel(config), torch.Generator().manual_seed(1)
    for stage in model.costs.stages:
        parameters = [
            torch.rand(parameter.shape, generator=generator) / 100 for parameter in model.stage_parameters(stage)
        ]
        model.set_stage_parameters(stage, *parameters)
    return model.in_scope(scope)


def make_counts(generator):
    """Those of a tier alike, as a Molmo's are, or all unlike."""
    settings = {setting["tier"]: None for setting in SPACE} if generator.random() < 0.8 else dict.fromkeys(SPACE)
    text_tokens, image_pixels = generator.randrange(3, 40), generator.randrange(1, 10**6)
    rows = {one: (image_pixels, generator.randrange(2, 14), 37 * generator.randrange(1, 30)) for one in settings}
    return [(*rows[setting if setting in rows else setting["tier"]], text_tokens) for setting in SPACE]


@pytest.mark.parametrize("most_known", [4096, 5], ids=["all are kept", "few are kept"])
@pytest.mark.parametrize("prefill_lengths", [None, [64, 256, 700]])
@pytest.mark.parametrize("scope", ["request", "model"])
def test_latencies_are_those_that_the_estimator_predicts(scope, prefill_lengths, most_known, monkeypatch):
    monkeypatch.setattr(setting_latencies, "MOST_KNOWN", most_known)
    estimator = make_estimator(scope, prefill_lengths)
    names = [name for name in NAMES if name in estimator.costs.count_names or name == "image_pixels"]
    latencies = SettingLatencies(estimator, SPACE.settings, NAMES, ANSWERS)
    generator = random.Random(0)
    for _ in range(40):
        counts = make_counts(generator)
        columns = dict(zip(NAMES, map(list, zip(*counts, strict=True)), strict=True))
        for output_tokens, found in zip(ANSWERS, latencies.predict(counts), strict=True):
            expected = estimator.predict_latency_ms(
                SPACE.settings, {name: columns[name] for name in names}, [output_tokens]
            )
            assert list(found) == pytest.approx(expected.tolist(), rel=1e-6)


def test_only_what_is_new_of_a_request_is_worked_out(monkeypatch):
    estimator = make_estimator()
    latencies = SettingLatencies(estimator, SPACE.settings, NAMES, ANSWERS)
    worked_out, terms = [], estimator.costs.terms
    monkeypatch.setattr(
        estimator.costs, "terms", lambda stage, columns: worked_out.append(stage) or terms(stage, columns)
    )
    row = (4096, 3, 111)
    latencies.predict([(*row, 20)] * len(SPACE))
    assert sorted(worked_out) == sorted(estimator.costs.stages)
    worked_out.clear()
    latencies.predict([(123_456, *row[1:], 20)] * len(SPACE))  # an image of another size
    assert worked_out == []
    latencies.predict([(*row, 21)] * len(SPACE))  # a longer question
    assert set(worked_out) == {"overhead", "controller", "llm_prefill", "decode"}
