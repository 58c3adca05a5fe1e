import math

import pytest

from joint_controller.rewards import (
    DEFAULT_REWARD_WEIGHTS,
    REWARD_FUNCTIONS,
    accuracy_reward,
    budget_violation_reward,
    complexity_reward,
    efficiency_reward,
    latency_reward,
    total_reward,
)


def test_latency_reward_is_a_sigmoid_of_the_relative_excess():
    # r = 1, 1.1 and 0.5
    terms = latency_reward([20.0, 22.0, 10.0], [20.0, 20.0, 20.0])
    assert terms == pytest.approx([-0.5, -1 / (1 + math.exp(-1)), -1 / (1 + math.exp(5))])


def test_budget_violation_reward_is_zero_inside_the_budget_and_quadratic_outside():
    assert budget_violation_reward([19.9, 20.0, 30.0, 40.0], [20.0] * 4) == pytest.approx([0.0, 0.0, -0.25, -1.0])


def test_efficiency_reward_is_the_unspent_share_and_never_negative():
    assert efficiency_reward([5.0, 20.0, 30.0], [20.0] * 3) == pytest.approx([0.75, 0.0, 0.0])


def test_complexity_reward_is_minus_the_mean_of_the_knobs():
    assert complexity_reward([(0.0, 0.0, 0.0), (1.0, 0.5, 0.0), (1.0, 1.0, 1.0)]) == pytest.approx([0.0, -0.5, -1.0])


def test_total_reward_is_the_documented_formula():
    accuracy, latency_ms, budget_ms, knobs = 0.6, 27.0, 20.0, (0.5, 1.0, 0.25)
    r = latency_ms / budget_ms
    expected = accuracy - 0.5 / (1 + math.exp(-10 * (r - 1))) - 10 * (r - 1) ** 2 - 0.05 * (1.75 / 3)
    assert total_reward([accuracy], [latency_ms], [budget_ms], [knobs]) == pytest.approx([expected])
    r = 0.4
    expected = accuracy - 0.5 / (1 + math.exp(-10 * (r - 1))) + 0.1 * (1 - r) - 0.05 * (1.75 / 3)
    assert total_reward([accuracy], [r * budget_ms], [budget_ms], [knobs]) == pytest.approx([expected])


def test_total_reward_weighs_the_same_functions_that_the_trainer_uses():
    columns = {
        "accuracy": [1.0, 0.0],
        "latency_ms": [12.0, 30.0],
        "latency_budget_ms": [20.0, 25.0],
        "normalized_knobs": [(0.0, 0.5, 1.0), (1.0, 1.0, 1.0)],
    }
    weights = [2.0, 0.0, 1.0, 3.0, 0.5]
    expected = [
        sum(
            weight * function(**columns)[row]
            for weight, function in zip(weights, REWARD_FUNCTIONS.values(), strict=True)
        )
        for row in range(2)
    ]
    assert total_reward(**columns, reward_weights=weights) == pytest.approx(expected)


def test_functions_take_and_ignore_the_other_columns_that_trl_passes():
    extra = {"prompts": ["a"], "completions": ["b"], "question": ["c"], "trainer_state": None}
    assert accuracy_reward(accuracy=[0.3], **extra) == [0.3]
    assert len(DEFAULT_REWARD_WEIGHTS) == len(REWARD_FUNCTIONS)


def test_a_budget_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="must be above 0 ms"):
        latency_reward([10.0], [0.0])


def test_a_missing_weight_is_refused():
    with pytest.raises(ValueError, match="give one for each of accuracy_reward"):
        total_reward([1.0], [10.0], [20.0], [(0, 0, 0)], reward_weights=[1.0])
