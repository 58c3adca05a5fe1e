import math

import pytest

from joint_controller.knobs import Knob, KnobSpace
from joint_controller.outcomes import Outcome
from joint_controller.rewards import (
    DEFAULT_REWARDS,
    ORIGINAL_REWARDS,
    REWARD_FUNCTIONS,
    accuracy_in_time_reward,
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


def test_accuracy_in_time_counts_what_comes_within_the_budget_or_exactly_at_it():
    latency_ms, budget_ms = [10.0, 20.0, 20.001, 500.0], [20.0] * 4
    terms = accuracy_in_time_reward([0.3, 1.0, 1.0, 0.7], latency_ms, budget_ms, answer=["a"] * 4)
    assert terms == [0.3, 1.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="must be above 0 ms"):
        accuracy_in_time_reward([1.0], [10.0], [-1.0])


def test_accuracy_within_budget_is_the_documented_formula():
    columns = {
        "accuracy": [0.6, 0.6, 1.0],
        "latency_ms": [5.0, 27.0, 20.0],
        "latency_budget_ms": [20.0] * 3,
        "normalized_knobs": [(0.5, 1.0)] * 3,
    }
    assert total_reward(DEFAULT_REWARDS, columns) == pytest.approx([0.6 + 0.01 * 0.75, 0.0, 1.0])
    assert resolve_rewards(objective="accuracy_within_budget") == resolve_rewards() == DEFAULT_REWARDS
    rewards = resolve_rewards(time_price=0.2)
    assert total_reward(rewards, columns) == pytest.approx([0.6 + 0.2 * 0.75, 0.0, 1.0])
    assert total_reward(resolve_rewards(time_price=0), columns) == pytest.approx([0.6, 0.0, 1.0])
    # The table of the package is not changed by a price.
    assert list(DEFAULT_REWARDS.values()) == [1.0, 0.01]


def test_the_original_total_reward_is_the_documented_formula():
    accuracy, latency_ms, budget_ms, knobs = 0.6, 27.0, 20.0, (0.5, 1.0, 0.25)

    def total(latency_ms):
        columns = {
            "accuracy": [accuracy],
            "latency_ms": [latency_ms],
            "latency_budget_ms": [budget_ms],
            "normalized_knobs": [knobs],
        }
        return total_reward(ORIGINAL_REWARDS, columns)

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
    assert resolve_rewards(objective="original") == ORIGINAL_REWARDS
    assert set(REWARD_FUNCTIONS.values()) == {*DEFAULT_REWARDS, *ORIGINAL_REWARDS}
    # Numbers are the weights of the functions of an objective, in their order.
    five = resolve_rewards(None, [2.0, 0.0, 1.0, 3.0, 0.5], objective="original")
    assert list(five) == list(ORIGINAL_REWARDS) and list(five.values()) == [2.0, 0.0, 1.0, 3.0, 0.5]
    assert list(resolve_rewards(None, [2.0, 0.5]).items()) == [
        (accuracy_in_time_reward, 2.0),
        (efficiency_reward, 0.5),
    ]
    # Functions that are named weigh what they did in the research code.
    assert list(resolve_rewards(["efficiency_reward", "accuracy_in_time_reward"]).values()) == [0.1, 1.0]
    rewards = resolve_rewards(["test_rewards.short_answer", "latency_reward"])
    assert list(rewards.values()) == [1.0, 0.5]
    kept = reward_names(rewards)
    assert kept == {"test_rewards.short_answer": 1.0, "latency_reward": 0.5}
    assert resolve_rewards(list(kept), list(kept.values())) == rewards


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        ([], None, "`reward_funcs` is empty"),
        (
            ["acuracy_reward"],
            None,
            "there is no reward function 'acuracy_reward': choose from accuracy_in_time_reward, ",
        ),
        (["no_such_package.rewards.mine"], None, "cannot be imported .No module named 'no_such_package'"),
        (["test_rewards.absent"], None, "'test_rewards.absent' is not a function of 'test_rewards'"),
        (["latency_reward", "latency_reward"], None, "names a function twice"),
        (None, [1.0], "`reward_weights` has 1 values: give one for each of accuracy_in_time_reward"),
        (None, [1.0, math.nan], "all must be finite numbers"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused(names, weights, message):
    with pytest.raises(ValueError, match=message):
        resolve_rewards(names, weights)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"objective": "speed"}, "there is no objective 'speed': choose from 'accuracy_within_budget', 'original'"),
        (
            {"objective": "original", "time_price": 0.1},
            "`time_price` is of the objective 'accuracy_within_budget', but",
        ),
        ({"time_price": -0.1}, "`time_price` is -0.1: give a finite number of 0 or more"),
        ({"time_price": math.nan}, "`time_price` is nan"),
        ({"time_price": math.inf}, "`time_price` is inf"),
        (
            {"names": ["latency_reward"], "objective": "original"},
            "`reward_funcs` is an objective of its own: give it, or",
        ),
        ({"names": ["latency_reward"], "time_price": 0.1}, "but not both"),
    ],
)
def test_an_objective_that_makes_no_sense_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        resolve_rewards(**kwargs)


def test_functions_take_and_ignore_the_other_columns_that_trl_passes():
    extra = {"prompts": ["a"], "completions": ["b"], "question": ["c"], "trainer_state": None}
    assert accuracy_reward(accuracy=[0.3], **extra) == [0.3]


def test_a_budget_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="must be above 0 ms"):
        latency_reward([10.0], [0.0])
