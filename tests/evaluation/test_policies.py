import numpy as np
import pytest
import torch
from molmo_knobs import molmo_setting, molmo_space
from PIL import Image

from joint_controller import (
    JointControllerConfig,
    JointControllerModel,
    LatencyEstimatorConfig,
    LatencyEstimatorModel,
)
from joint_controller.controller import SettingFit
from joint_controller.evaluation.policies import ControllerPolicy
from joint_controller.evaluation.scoring import score_answer
from joint_controller.evaluation.summary import rows_of, summarize
from joint_controller.evaluation.sweep import sweep_budgets
from joint_controller.executor import ExecutorRequest
from joint_controller.latency import Guardrail
from joint_controller.molmo.executor import MolmoExecutor
from joint_controller.outcomes import OutcomeCollector, OutcomeStore


SPACE = molmo_space({"low": (1, 3), "high": (9, 9)}, top_k=(1, 4), num_blocks=(2, 4))
QUESTIONS = ["what color is the star?", "is the circle left of the star?", "what shape is red?"]


@pytest.fixture(scope="module")
def executor(tiny_molmo, tiny_processor):
    return MolmoExecutor(tiny_molmo, tiny_processor, knob_space=SPACE, max_new_tokens=3)


@pytest.fixture(scope="module")
def samples(executor):
    """Questions about noise; the reference is what the full setting answers, so that cheaper settings lose accuracy."""
    generator = np.random.default_rng(0)
    rows = [
        {
            "sample_id": f"noise/{index}",
            "image": Image.fromarray(generator.integers(0, 255, (64, 64, 3), dtype=np.uint8)),
            "question": QUESTIONS[index % 3],
            "answers": ["?"],
            "style": "vqa2",
            "metric": "vqa_accuracy",
        }
        for index in range(12)
    ]
    collector = OutcomeCollector(
        executor, OutcomeStore(None, executor.fingerprint, SPACE), lambda metric, answer, references: 0.0
    )
    for row, outcome in zip(rows, collector.collect(rows, [SPACE.full] * 12), strict=True):
        row["answers"] = [outcome.answer]
    return rows


@pytest.fixture
def collector(executor):
    return OutcomeCollector(executor, OutcomeStore(None, executor.fingerprint, SPACE), score_answer)


@pytest.fixture(scope="module")
def latency_estimator():
    """1 ms a view, 1 ms a block, 1 ms a block and expert."""
    model = LatencyEstimatorModel(
        LatencyEstimatorConfig(
            executor_type="molmo",
            fitted_knobs={name: list(v) for name, v in SPACE.values.items()},
            latency_scope="model",
            upper_quantiles={"model": {"0.95": 1.5}},
        )
    )
    for stage, feature in (("vision", 1), ("llm_prefill", 1), ("decode", 2)):
        coefficients, units = (torch.zeros_like(values) for values in model.stage_parameters(stage))
        coefficients[feature] = 1.0
        units[:, :-1] = 1.0  # steps of no height: the factor is 1
        model.set_stage_parameters(stage, coefficients, units)
    return model


@pytest.fixture
def controller(executor):
    return make_controller(executor)


def make_controller(executor, **kwargs):
    """One that wants tier "high", top_k 1 and 4 blocks, then 2 blocks."""
    model = JointControllerModel(
        JointControllerConfig(
            knob_space=SPACE.to_dict(),
            question_size=executor.question_size,
            vision_size=executor.vision_size,
            latency_budget_min_ms=5,
            latency_budget_max_ms=50,
            heads="independent",
            **kwargs,
        )
    )
    # One layer for each knob.
    [tier] = model.stage1.head.linears
    top_k, num_blocks = model.stage2.head.linears
    for head, wanted in ((tier, 1), (top_k, 0), (num_blocks, 1)):
        head.bias.data[wanted] = 1.0
    top_k.bias.data[0] = 2.0
    return model


def test_controller_policy_takes_the_argmax_of_both_stages(executor, controller, samples):
    assert set(ControllerPolicy(controller, executor).choose(samples, 20.0)) == {molmo_setting("high", 1, 4)}


def test_guardrail_keeps_a_controller_within_what_fits(
    executor, controller, collector, latency_estimator, samples, monkeypatch
):
    """The wanted setting is (high, 1, 4): 10 + 4 + 4 (3 - 1) = 22 ms with three output tokens, half as much again at p95."""
    guarded = ControllerPolicy(controller, executor, "guarded", Guardrail(latency_estimator, executor, 0.95))
    calls = []
    predict = Guardrail.typical_ms
    monkeypatch.setattr(Guardrail, "typical_ms", lambda self, rows: calls.extend(rows) or predict(self, rows))
    expected = {
        33.0: molmo_setting("high", 1, 4),
        32.9: molmo_setting("high", 1, 2),  # 10 + 2 + 2 * 2 = 16
        24.0: molmo_setting("high", 1, 2),
        23.9: molmo_setting("low", 1, 4),  # 2 + 4 + 4 * 2 = 14
        20.9: molmo_setting("low", 1, 2),  # 2 + 2 + 2 * 2 = 8
        11.9: molmo_setting("low", 1, 2),  # nothing fits
    }
    for budget, setting in expected.items():
        assert set(guarded.choose(samples, budget)) == {setting}
    assert len(calls) == len(samples)  # once, whatever the budgets
    policies = [ControllerPolicy(controller, executor), guarded]
    table = sweep_budgets(policies, collector, latency_estimator, samples, [20.9], full_setting_ms=20.9)
    rows = rows_of(summarize(table, None, num_resamples=2))
    assert [row["policy"] for row in rows] == ["controller", "guarded"]
    assert rows[0]["violations"] > 0 == rows[1]["violations"]


@torch.no_grad()
def test_a_controller_that_sees_slack_is_told_of_it_and_of_typical_budgets(executor, latency_estimator, samples):
    """Checked against scores of both stages from inputs that are worked out here."""
    torch.manual_seed(0)
    model = make_controller(executor, sees_slack=True)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.5)
    guardrail = Guardrail(latency_estimator, executor, 0.95)
    policy = ControllerPolicy(model, executor, "sees slack", guardrail)
    chosen = set()
    for budget in (12.0, 20.0, 33.0, 50.0):
        found = policy.choose(samples, budget)
        for sample, setting in zip(samples, found, strict=True):
            request = ExecutorRequest.of(sample, SPACE.cheapest)
            latency_ms = guardrail.typical_ms([request])
            fits = latency_ms <= budget / 1.5
            fits[0, 0] |= not fits.any()
            fit = SettingFit(fits, (1 - 1.5 * latency_ms / budget).clamp(-1, 1), fits.any(1))
            question, typical_ms = executor.question_features([sample["question"]]), torch.tensor([budget / 1.5])
            first = model.score_stage1(question, typical_ms, fit).argmax(-1)
            seen = executor.vision_features([request.at(SPACE.settings[model.table.positions[first.item(), 0]])])
            second = model.score_stage2(seen, question, typical_ms, first, fit).argmax(-1)
            assert setting == SPACE.settings[model.table.positions[first, second].item()]
        chosen |= set(found)
    assert len(chosen) > 1
    with pytest.raises(ValueError, match="made to see what fits a request"):
        ControllerPolicy(model, executor).choose(samples, 20.0)
