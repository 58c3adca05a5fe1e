import math

import pytest

from joint_controller.knobs import Knob, KnobSpace
from joint_controller.outcomes import Outcome
from joint_controller.rewards import (
    DEFAULT_REWARDS,
    REWARD_FUNCTIONS,
    accuracy_reward,
    budget_violation_reward,
    complexity_reward,
    efficiency_reward,
    latency_reward,
    resolve_rewards,
    reward_columns,
    reward_names,
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

    def total(latency_ms):
        columns = {
            "accuracy": [accuracy],
            "latency_ms": [latency_ms],
            "latency_budget_ms": [budget_ms],
            "normalized_knobs": [knobs],
        }
        return total_reward(DEFAULT_REWARDS, columns)

    r = latency_ms / budget_ms
    expected = accuracy - 0.5 / (1 + math.exp(-10 * (r - 1))) - 10 * (r - 1) ** 2 - 0.05 * (1.75 / 3)
    assert total(latency_ms) == pytest.approx([expected])
    r = 0.4
    expected = accuracy - 0.5 / (1 + math.exp(-10 * (r - 1))) + 0.1 * (1 - r) - 0.05 * (1.75 / 3)
    assert total(r * budget_ms) == pytest.approx([expected])


def test_total_reward_weighs_what_functions_give_for_the_columns_of_requests():
    space = KnobSpace([Knob("tier", ("low", "high"), stage=1), Knob("depth", (1, 2, 3), stage=2)])
    samples = [{"sample_id": "a", "question": "b", "image": None}, {"sample_id": "c", "question": "d", "image": None}]
    outcomes = [
        Outcome("a", space.full, "red", 1.0, {"text_tokens": 3}, 2),
        Outcome("c", space.setting((0, 1)), "blue", 0.0, {"text_tokens": 3}, 2),
    ]
    columns = reward_columns(space, samples, outcomes, [12.0, 30.0], [20.0, 25.0])
    assert columns == {
        "sample_id": ["a", "c"],
        "question": ["b", "d"],
        "accuracy": [1.0, 0.0],
        "latency_ms": [12.0, 30.0],
        "latency_budget_ms": [20.0, 25.0],
        "normalized_knobs": [(1.0, 1.0), (0.0, 0.5)],
        "answer": ["red", "blue"],
        "setting": [space.full, space.setting((0, 1))],
    }
    rewards = resolve_rewards(["efficiency_reward", "test_rewards.short_answer"], [2.0, 0.5])
    expected = [2 * efficiency_reward(**columns)[row] - 0.5 * len(columns["answer"][row]) for row in range(2)]
    assert total_reward(rewards, columns) == pytest.approx(expected)


def short_answer(answer, **kwargs):
    """A reward function that reads a column which none of the package's own does."""
    return [-float(len(one)) for one in answer]


def test_functions_and_weights_are_one_table_that_configurations_can_keep():
    assert resolve_rewards() == DEFAULT_REWARDS
    # Five numbers are the weights of the five functions, in their order.
    five = resolve_rewards(None, [2.0, 0.0, 1.0, 3.0, 0.5])
    assert list(five) == list(REWARD_FUNCTIONS.values()) and list(five.values()) == [2.0, 0.0, 1.0, 3.0, 0.5]
    rewards = resolve_rewards(["test_rewards.short_answer", "latency_reward"])
    assert list(rewards.values()) == [1.0, 0.5]
    kept = reward_names(rewards)
    assert kept == {"test_rewards.short_answer": 1.0, "latency_reward": 0.5}
    assert resolve_rewards(list(kept), list(kept.values())) == rewards


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        ([], None, "`reward_funcs` is empty"),
        (["acuracy_reward"], None, "there is no reward function 'acuracy_reward': choose from accuracy_reward, "),
        (["no_such_package.rewards.mine"], None, "cannot be imported .No module named 'no_such_package'"),
        (["test_rewards.absent"], None, "'test_rewards.absent' is not a function of 'test_rewards'"),
        (["latency_reward", "latency_reward"], None, "names a function twice"),
        (None, [1.0], "`reward_weights` has 1 values: give one for each of accuracy_reward"),
        (None, [1.0, math.nan, 1.0, 1.0, 1.0], "all must be finite numbers"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused(names, weights, message):
    with pytest.raises(ValueError, match=message):
        resolve_rewards(names, weights)


def test_functions_take_and_ignore_the_other_columns_that_trl_passes():
    extra = {"prompts": ["a"], "completions": ["b"], "question": ["c"], "trainer_state": None}
    assert accuracy_reward(accuracy=[0.3], **extra) == [0.3]


def test_a_budget_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="must be above 0 ms"):
        latency_reward([10.0], [0.0])
