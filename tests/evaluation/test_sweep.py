import math
import re

import numpy as np
import pytest
from made_up_outcomes import SETTINGS, SPACE, MadeUpForecast, make_samples, record

from joint_controller.evaluation.baselines import RandomPolicy, StaticPolicy
from joint_controller.evaluation.sweep import sweep_budgets
from joint_controller.knobs import KnobSetting
from joint_controller.latency import RecordedLatencies
from joint_controller.outcomes import collect_shares
from joint_controller.rewards import accuracy_reward, efficiency_reward


class Chosen:
    """Chooses what is given for each budget."""

    def __init__(self, name, of_budget):
        self.name = name
        self.of_budget = of_budget

    def choose(self, samples, latency_budget_ms):
        return self.of_budget(samples, latency_budget_ms)


class CountedOutcomes:
    """Outcomes that were recorded, and what they were asked for."""

    def __init__(self, samples):
        self.record = record(samples)
        self.knob_space = SPACE
        self.asked = []

    def collect(self, samples, settings, progress=False):
        self.asked += [(sample["sample_id"], setting) for sample, setting in zip(samples, settings, strict=True)]
        return self.record.collect(samples, settings)


@pytest.fixture(scope="module")
def samples():
    return make_samples(9, 0)


def test_rows_come_budget_by_budget_with_the_outcomes_of_what_was_chosen(samples):
    by_budget = Chosen("by budget", lambda some, budget: [SETTINGS[int(budget) % 6]] * len(some))
    policies = [by_budget, RandomPolicy(SPACE, seed=3), StaticPolicy(SPACE.full, "full")]
    rewards = {accuracy_reward: 2.0, efficiency_reward: 0.5}
    table = sweep_budgets(
        policies, record(samples), RecordedLatencies(), samples, [10.0, 20.0], 25.0, rewards, [7, -1, -1]
    )
    assert len(table) == 2 * 3 * 9
    rows = iter(table)
    for budget in (10.0, 20.0):
        for policy, seed in zip(policies, (7, -1, -1), strict=True):
            for sample, setting in zip(samples, policy.choose(samples, budget), strict=True):
                row, position = next(rows), SPACE.index(setting)
                assert (row["policy"], row["seed"], row["latency_budget_ms"]) == (policy.name, seed, budget)
                assert row["budget_fraction"] == budget / 25.0
                assert (row["sample_id"], row["setting"]) == (sample["sample_id"], str(setting))
                accuracy, latency_ms = sample["accuracy"][position], sample["latency_ms"][position]
                assert (row["accuracy"], row["latency_ms"]) == (accuracy, latency_ms)
                expected = 2.0 * accuracy + 0.5 * max(0.0, 1 - latency_ms / budget)
                assert row["reward"] == pytest.approx(expected)
                assert row["upper_latency_ms"] is None


def test_upper_latencies_are_those_of_a_forecast_that_has_them(samples):
    policies = [RandomPolicy(SPACE)]
    arguments = (policies, record(samples), RecordedLatencies(), samples, [10.0], 25.0)
    table = sweep_budgets(*arguments, forecast=MadeUpForecast())
    for row, sample in zip(table, samples, strict=True):
        [position] = [number for number, setting in enumerate(SETTINGS) if str(setting) == row["setting"]]
        assert row["upper_latency_ms"] == sample["upper_ms"][position]
    known = sweep_budgets(*arguments, forecast=MadeUpForecast(is_upper=False))
    assert set(known["upper_latency_ms"]) == {None}


def test_each_pair_of_sample_and_setting_is_asked_for_once(samples):
    of_budget = Chosen("of budget", lambda some, budget: [SPACE.full if budget < 15 else SPACE.cheapest] * len(some))
    outcomes = CountedOutcomes(samples)
    policies = [StaticPolicy(SPACE.full, "full"), of_budget]
    sweep_budgets(policies, outcomes, RecordedLatencies(), samples, [10.0, 20.0], 25.0)
    assert len(outcomes.asked) == len(set(outcomes.asked)) == 2 * len(samples)


def test_what_cannot_be_compared_is_refused(samples):
    full = StaticPolicy(SPACE.full, "full")

    def sweep(policies=(full,), some=samples, budgets=(10.0,), **kwargs):
        return sweep_budgets(policies, record(samples), RecordedLatencies(), some, budgets, 25.0, **kwargs)

    for name, arguments in {
        "policies": {"policies": []},
        "samples": {"some": []},
        "budgets_ms": {"budgets": []},
    }.items():
        with pytest.raises(ValueError, match=f"`{name}` is empty"):
            sweep(**arguments)
    with pytest.raises(ValueError, match="two policies are named 'full' and have the seed -1"):
        sweep([full, StaticPolicy(SPACE.cheapest, "full")])
    assert len(sweep([full, StaticPolicy(SPACE.cheapest, "full")], seeds=[1, 2])) == 2 * len(samples)
    with pytest.raises(ValueError, match="`seeds` has 1 values for 2 policies"):
        sweep([full, StaticPolicy(SPACE.cheapest, "cheap")], seeds=[1])
    with pytest.raises(ValueError, match="policy 'short' chose 1 settings for 9 samples"):
        sweep([Chosen("short", lambda some, budget: [SPACE.full])])
    outside = KnobSetting(size="huge", depth=1)
    with pytest.raises(ValueError, match=re.escape(f"setting '{outside}' is outside the knob space")):
        sweep([StaticPolicy(outside, "outside")])


def test_one_process_alone_answers_all(samples):
    outcomes = CountedOutcomes(samples)
    assert len(collect_shares(outcomes, samples, [SPACE.full] * len(samples))) == len(samples) == len(outcomes.asked)
    arguments = ([RandomPolicy(SPACE)], record(samples), RecordedLatencies(), samples, [10.0], 25.0)
    assert sweep_budgets(*arguments, together=True).to_list() == sweep_budgets(*arguments).to_list()
    assert math.isfinite(np.mean(sweep_budgets(*arguments)["reward"][:]))
