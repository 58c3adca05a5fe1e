import itertools

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
from joint_controller.evaluation.policies import BestStaticPolicy, ControllerPolicy, RandomPolicy, StaticPolicy
from joint_controller.evaluation.scoring import score_answer
from joint_controller.evaluation.sweep import (
    StaticSettings,
    format_sweep_markdown,
    format_sweep_table,
    mean_over_budgets,
    sweep_budgets,
    sweep_to_dataset,
)
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
    return JointControllerModel(
        JointControllerConfig(
            knob_space=SPACE.to_dict(),
            question_size=executor.question_size,
            vision_size=executor.vision_size,
            latency_budget_min_ms=5,
            latency_budget_max_ms=50,
        )
    )


def latency_by_hand(outcome):
    views = {"low": 2, "high": 10}[outcome.setting["tier"]]
    blocks, top_k = outcome.setting["num_blocks"], outcome.setting["top_k"]
    return views + blocks + blocks * top_k * (outcome.output_tokens - 1)


def reward_by_hand(outcome, budget):
    ratio = latency_by_hand(outcome) / budget
    reward = outcome.accuracy - 0.5 / (1 + np.exp(-10 * (ratio - 1))) - 10 * max(0, ratio - 1) ** 2
    if ratio <= 1:
        reward += 0.1 * (1 - ratio)
    return reward - 0.05 * np.mean([outcome.setting[knob] == SPACE.full[knob] for knob in SPACE.names])


def test_rows_equal_sums_by_hand(collector, latency_estimator, samples, executor, controller):
    policies = [
        ControllerPolicy(controller, executor),
        StaticPolicy(SPACE.full, "full"),
        RandomPolicy(SPACE, seed=3),
    ]
    rows = sweep_budgets(policies, collector, latency_estimator, samples, [20.0, 40.0], full_setting_ms=40.0)
    assert [(row.policy, row.latency_budget_ms) for row in rows] == list(
        itertools.product(["controller", "full", "random"], [20.0])
    ) + list(itertools.product(["controller", "full", "random"], [40.0]))
    for row, policy in zip(rows, policies * 2, strict=True):
        settings = policy.choose(samples, row.latency_budget_ms)
        outcomes = collector.collect(samples, settings)
        assert row.accuracy == pytest.approx(np.mean([outcome.accuracy for outcome in outcomes]))
        assert row.latency_ms == pytest.approx(np.mean([latency_by_hand(outcome) for outcome in outcomes]))
        assert row.budget_violation_rate == np.mean(
            [latency_by_hand(outcome) > row.latency_budget_ms for outcome in outcomes]
        )
        expected = np.mean([reward_by_hand(outcome, row.latency_budget_ms) for outcome in outcomes])
        assert row.reward == pytest.approx(expected, abs=1e-6)
    full = [row for row in rows if row.policy == "full"]
    assert [row.accuracy for row in full] == [1.0, 1.0]
    assert full[0].most_common_setting == str(SPACE.full) and full[0].most_common_share == 1.0
    assert mean_over_budgets(rows, "full") == pytest.approx((full[0].reward + full[1].reward) / 2)
    # Random settings are the same under every budget, and not all alike.
    assert policies[2].choose(samples, 20.0) == policies[2].choose(samples, 40.0)
    assert len(set(policies[2].choose(samples, 20.0))) > 1


def test_nothing_runs_twice(collector, latency_estimator, samples):
    of_budget = BestStaticPolicy(lambda budget: SPACE.full if budget < 30 else SPACE.cheapest)
    policies = [StaticPolicy(SPACE.full, "one"), of_budget]
    sweep_budgets(policies, collector, latency_estimator, samples, [20.0, 40.0], full_setting_ms=40.0)
    assert collector.num_executed == 2 * len(samples)


def test_best_static_setting_equals_brute_force(collector, latency_estimator, samples):
    static_settings = StaticSettings(collector, latency_estimator, samples)
    for budget in (10.0, 14.0, 22.0, 30.0, 60.0):
        best, best_reward = None, -np.inf
        for setting in SPACE:
            outcomes = collector.collect(samples, [setting] * len(samples))
            too_slow = np.mean([latency_by_hand(outcome) > budget for outcome in outcomes])
            reward = np.mean([reward_by_hand(outcome, budget) for outcome in outcomes])
            if too_slow <= 0.05 and reward > best_reward:
                best, best_reward = setting, reward
        assert static_settings.best(budget) == best
    with pytest.raises(ValueError, match="no setting fits a budget of 1.000 ms"):
        static_settings.best(1.0)


def test_controller_policy_takes_the_argmax_of_both_stages(executor, controller, samples):
    # Biases decide: tier 1, top_k 0, num_blocks 1.
    controller.stage1.heads[0].bias.data[1] = 1.0
    controller.stage2.heads[0].bias.data[0] = 1.0
    controller.stage2.heads[1].bias.data[1] = 1.0
    assert set(ControllerPolicy(controller, executor).choose(samples, 20.0)) == {molmo_setting("high", 1, 4)}


def test_guardrail_keeps_a_controller_within_what_fits(
    executor, controller, collector, latency_estimator, samples, monkeypatch
):
    """The wanted setting is (high, 1, 4): 10 + 4 + 4 (3 - 1) = 22 ms with three output tokens, half as much again at p95."""
    controller.stage1.heads[0].bias.data[1] = 1.0
    controller.stage2.heads[0].bias.data[0] = 1.0
    controller.stage2.heads[1].bias.data[1] = 1.0
    guarded = ControllerPolicy(controller, executor, "guarded", Guardrail(latency_estimator, executor, 0.95))
    calls = []
    predict = Guardrail.predict_latency_ms
    monkeypatch.setattr(Guardrail, "predict_latency_ms", lambda self, rows: calls.extend(rows) or predict(self, rows))
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
    rows = sweep_budgets(policies, collector, latency_estimator, samples, [20.9], full_setting_ms=20.9)
    assert [row.policy for row in rows] == ["controller", "guarded"]
    assert rows[0].budget_violation_rate > 0 == rows[1].budget_violation_rate


def test_tables_hold_every_row(collector, latency_estimator, samples):
    rows = sweep_budgets(
        [StaticPolicy(SPACE.full, "full"), StaticPolicy(SPACE.cheapest, "cheapest")],
        collector,
        latency_estimator,
        samples,
        [20.0, 40.0],
        full_setting_ms=40.0,
    )
    assert sweep_to_dataset(rows)["policy"][:] == ["full", "cheapest"] * 2
    assert format_sweep_markdown(rows).count("\n") == 1 + len(rows)
    assert format_sweep_table(rows, "title").row_count == len(rows)
