"""Every baseline against plain loops over all settings."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from made_up_outcomes import SETTINGS, SPACE, MadeUpForecast, make_samples, record

from joint_controller.evaluation.baselines import (
    BestStaticPolicy,
    CeilingPolicy,
    FitsPolicy,
    KnownOutcomes,
    LookUpPolicy,
    PredictedLatencies,
    QuestionTypePolicy,
    RandomPolicy,
    StaticPolicy,
    TrainingOutcomes,
    best_allowed,
)
from joint_controller.evaluation.sweep import BASELINES, NEED_FORECAST, baseline_policies
from joint_controller.latency import Guardrail, RecordedLatencies
from joint_controller.rewards import DEFAULT_REWARDS, total_reward


BUDGETS = (9.0, 14.0, 20.0, 27.0, 40.0)
NUM_TRAIN, NUM_TEST = 150, 40


@pytest.fixture(scope="module")
def train():
    return make_samples(NUM_TRAIN, 0)


@pytest.fixture(scope="module")
def test():
    samples = make_samples(NUM_TEST, 1)
    samples[3]["question_type"] = "never seen"
    samples[4]["upper_ms"] = np.full(6, math.inf)  # nothing fits
    return samples


def outcomes_of(samples, **kwargs):
    arrays = {name: np.array([sample[name] for sample in samples]) for name in ("accuracy", "latency_ms", "upper_ms")}
    values = {**arrays, "question_types": [sample["question_type"] for sample in samples], **kwargs}
    return TrainingOutcomes(settings=SETTINGS, **values)


@pytest.fixture(scope="module")
def training(train):
    return outcomes_of(train)


def best_by_hand(train, allowed, column="accuracy"):
    """The position among those allowed with the best mean; of equal ones the fastest on average."""

    def key(position):
        mean = sum(sample[column][position] for sample in train) / len(train)
        return (-round(mean, 9), sum(sample["latency_ms"][position] for sample in train) / NUM_TRAIN)

    return min(allowed, key=key)


def kept_by_hand(train, budget):
    return [
        position
        for position in range(6)
        if sum(sample["latency_ms"][position] > budget for sample in train) / len(train) <= 0.01
    ]


@pytest.mark.parametrize("budget", BUDGETS)
def test_static_is_the_best_setting_that_keeps_the_budget(train, test, training, budget):
    expected = SETTINGS[best_by_hand(train, kept_by_hand(train, budget))]
    assert BestStaticPolicy(training).choose(test, budget) == [expected] * NUM_TEST


@pytest.mark.parametrize("budget", BUDGETS)
def test_static_by_reward_takes_the_best_reward_of_the_budget(train, test, budget):
    def reward_of(budget_ms):
        return np.array([sample["accuracy"] - sample["latency_ms"] / budget_ms for sample in train])

    training = outcomes_of(train, reward_of=reward_of)
    rewarded = [{**sample, "reward": row} for sample, row in zip(train, reward_of(budget), strict=True)]
    expected = SETTINGS[best_by_hand(rewarded, kept_by_hand(train, budget), "reward")]
    policy = BestStaticPolicy(training, by_reward=True)
    assert policy.name == "static by reward" and policy.choose(test, budget) == [expected] * NUM_TEST


@pytest.mark.parametrize("budget", BUDGETS)
def test_fits_is_the_best_setting_that_fits_the_request(train, test, training, budget):
    chosen = FitsPolicy(training, MadeUpForecast()).choose(test, budget)
    for sample, setting in zip(test, chosen, strict=True):
        allowed = [position for position in range(6) if sample["upper_ms"][position] <= budget] or [0]
        assert setting == SETTINGS[best_by_hand(train, allowed)]


@pytest.mark.parametrize("budget", BUDGETS)
def test_per_question_type_looks_at_training_samples_of_the_type(train, test, training, budget):
    chosen = QuestionTypePolicy(training, MadeUpForecast()).choose(test, budget)
    for sample, setting in zip(test, chosen, strict=True):
        alike = [one for one in train if one["question_type"] == sample["question_type"]] or train
        allowed = [position for position in range(6) if sample["upper_ms"][position] <= budget] or [0]

        def key(position, alike=alike):
            mean = sum(one["accuracy"][position] for one in alike) / len(alike)
            return (-round(mean, 9), sum(one["latency_ms"][position] for one in train) / NUM_TRAIN)

        assert setting == SETTINGS[min(allowed, key=key)]
    # A type that was not seen is judged by all samples.
    assert chosen[3] == FitsPolicy(training, MadeUpForecast()).choose(test, budget)[3]


@pytest.mark.parametrize("budget", BUDGETS)
def test_look_up_takes_the_best_setting_of_the_bin(train, test, training, budget):
    sizes = sorted(sample["upper_ms"][-1] for sample in train)
    edges = [np.quantile(sizes, share) for share in (0.2, 0.4, 0.6, 0.8)]

    def bin_of(sample):
        return sum(sample["upper_ms"][-1] > edge for edge in edges)

    chosen = LookUpPolicy(training, MadeUpForecast()).choose(test, budget)
    static = best_by_hand(train, kept_by_hand(train, budget))
    seen = set()
    for sample, setting in zip(test, chosen, strict=True):
        alike = [one for one in train if bin_of(one) == bin_of(sample)]
        assert len(alike) == NUM_TRAIN / 5
        kept = kept_by_hand(alike, budget)
        seen.add(bool(kept))
        assert setting == SETTINGS[best_by_hand(alike, kept) if kept else static]


def test_look_up_is_static_in_bins_of_few_samples(train, test):
    few = train[:90]  # 18 a bin
    training = outcomes_of(few)
    for budget in BUDGETS:
        assert LookUpPolicy(training, MadeUpForecast()).choose(test, budget) == BestStaticPolicy(training).choose(
            test, budget
        )


def test_sizes_of_training_samples_and_of_requests_are_of_one_kind(train, test, training):
    with pytest.raises(ValueError, match="would be measured differently"):
        LookUpPolicy(training, MadeUpForecast(is_upper=False))
    # Where nothing is predicted, what samples took at the full setting puts them into bins.
    known = [{**sample, "upper_ms": sample["latency_ms"]} for sample in test]
    policy = LookUpPolicy(outcomes_of(train, upper_ms=None), MadeUpForecast(is_upper=False))
    expected = np.quantile([sample["latency_ms"][-1] for sample in train], [0.2, 0.4, 0.6, 0.8])
    assert policy.edges == pytest.approx(expected) and len(policy.choose(known, 20.0)) == NUM_TEST


def test_random_settings_depend_on_seed_and_sample_alone(test):
    policy = RandomPolicy(SPACE, seed=3)
    chosen = policy.choose(test, 10.0)
    assert chosen == policy.choose(test, 40.0)
    assert chosen[5:9] == policy.choose(test[5:9], 10.0)
    assert chosen != RandomPolicy(SPACE, seed=4).choose(test, 10.0)
    many = policy.choose([{"sample_id": str(number)} for number in range(6000)], 10.0)
    shares = [many.count(setting) / 6000 for setting in SETTINGS]
    assert min(shares) > 0.14 and max(shares) < 0.19


def test_a_budget_that_no_setting_keeps_is_refused(training):
    with pytest.raises(ValueError, match=r"no setting fits a budget of 1.000 ms: .* 1% are allowed"):
        training.best_static(1.0)
    with pytest.raises(ValueError, match="no setting fits a budget of 2.000 ms"):
        baseline_policies(training, SPACE, [40.0, 2.0], ["full"])


def test_one_violation_in_a_hundred_is_kept_and_two_are_not():
    latency_ms = np.full((200, 6), 10.0)
    latency_ms[:2, 1] = latency_ms[:3, 2] = 11.0
    training = TrainingOutcomes(SETTINGS, np.zeros((200, 6)), latency_ms, None, ["unknown"] * 200)
    assert training.keeps(10.0).tolist() == [True, True, False, True, True, True]


def test_of_equally_good_settings_the_faster_is_taken():
    thirds = np.array([0.1 + 0.2, 0.3, 0.3, 0.2])
    assert best_allowed(thirds, np.array([3.0, 2.0, 2.5, 1.0]), np.ones(4, dtype=bool)) == 1
    allowed = np.array([[True, False, True, True], [False, False, False, True]])
    assert best_allowed(thirds, np.array([3.0, 2.0, 2.5, 1.0]), allowed).tolist() == [2, 3]


def test_shapes_that_do_not_fit_and_no_samples_are_refused():
    with pytest.raises(ValueError, match="there are no training samples"):
        TrainingOutcomes(SETTINGS, np.zeros((0, 6)), np.zeros((0, 6)), None, [])
    with pytest.raises(ValueError, match=r"`upper_ms` has the shape \(2, 5\): \(2, 6\) is one value"):
        TrainingOutcomes(SETTINGS, np.zeros((2, 6)), np.zeros((2, 6)), np.zeros((2, 5)), ["a", "b"])
    training = TrainingOutcomes(SETTINGS, np.zeros((1, 6)), np.zeros((1, 6)), None, ["a"])
    with pytest.raises(ValueError, match="without rewards"):
        training.best_static(1.0, by_reward=True)


def test_the_ceiling_is_the_best_that_keeps_the_budget(test):
    policy = CeilingPolicy(KnownOutcomes(record(test), RecordedLatencies()))
    for budget in (5.0, 12.0, 20.0, 40.0):
        for sample, setting in zip(test, policy.choose(test, budget), strict=True):
            kept = [position for position in range(6) if sample["latency_ms"][position] <= budget]
            best = max((sample["accuracy"][position] for position in kept), default=None)
            kept = [position for position in kept if sample["accuracy"][position] == best] or range(6)
            assert setting == SETTINGS[min(kept, key=lambda position, sample=sample: sample["latency_ms"][position])]
    # Nothing keeps the budget: the fastest.
    assert set(policy.choose(test, 1.0)) == {SPACE.cheapest}


def test_training_outcomes_are_those_of_all_settings(train):
    training = TrainingOutcomes.collect(record(train), RecordedLatencies(), train, forecast=MadeUpForecast())
    for name in ("accuracy", "latency_ms", "upper_ms"):
        assert getattr(training, name) == pytest.approx(np.array([sample[name] for sample in train]))
    assert training.question_types == [sample["question_type"] for sample in train]
    rewards = training.reward_of(20.0)
    for row in (0, 17):
        for column, setting in enumerate(SETTINGS):
            columns = {
                "accuracy": [train[row]["accuracy"][column]],
                "latency_ms": [train[row]["latency_ms"][column]],
                "latency_budget_ms": [20.0],
                "normalized_knobs": [SPACE.normalized(setting)],
            }
            assert rewards[row, column] == pytest.approx(total_reward(DEFAULT_REWARDS, columns).item())


def test_where_nothing_predicts_what_is_known_tells_what_fits(train, test):
    outcomes = record([*train, *test])
    known = KnownOutcomes(outcomes, RecordedLatencies())
    training = TrainingOutcomes.collect(outcomes, RecordedLatencies(), train, forecast=known)
    assert training.upper_ms is None
    policies = baseline_policies(training, SPACE, [20.0], forecast=known)
    assert [policy.name for policy in policies] == [name for name in BASELINES if name != "ceiling"]
    assert {"fits", "look-up", "per question type"} == set(NEED_FORECAST)
    for policy in policies:
        if policy.name in ("fits", "per question type"):
            for sample, setting in zip(test, policy.choose(test, 20.0), strict=True):
                assert sample["latency_ms"][SPACE.index(setting)] <= 20.0


def test_baselines_are_had_by_name(training):
    forecast, known = MadeUpForecast(), KnownOutcomes(record([]), RecordedLatencies())
    policies = baseline_policies(training, SPACE, [20.0], BASELINES, forecast, known)
    assert tuple(policy.name for policy in policies) == BASELINES
    without = baseline_policies(training, SPACE, [20.0])
    assert [policy.name for policy in without] == ["full", "static", "static by reward", "random"]
    assert StaticPolicy(SPACE.full, "full").choose([{}, {}], 1.0) == [SPACE.full] * 2
    with pytest.raises(ValueError, match="there is no policy 'fit': choose from 'full', 'static'"):
        baseline_policies(training, SPACE, [20.0], ["fit"])
    with pytest.raises(ValueError, match="policy 'look-up' has to know what requests will take"):
        baseline_policies(training, SPACE, [20.0], ["look-up"])
    with pytest.raises(ValueError, match="policy 'ceiling' has to know the outcomes"):
        baseline_policies(training, SPACE, [20.0], ["ceiling"])


def test_what_is_predicted_of_a_sample_is_asked_for_once(test):
    class Counting:
        quantile, upper_ratio = 0.95, 2.0
        executor = SimpleNamespace(knob_space=SPACE)
        asked = []

        def typical_ms(self, requests):
            self.asked += [request.sample_id for request in requests]
            return torch.tensor([[float(request.sample_id.split("/")[-1])] * 6 for request in requests]) / 2

    forecast = PredictedLatencies(Counting())
    some = [{**sample, "style": "vqa2"} for sample in test]
    assert forecast.is_upper and forecast.latency_ms(some[:3])[:, 5].tolist() == [0.0, 1.0, 2.0]
    assert forecast.latency_ms(some[4:0:-1])[:, 0].tolist() == [4.0, 3.0, 2.0, 1.0]
    assert forecast.latency_ms([]).shape == (0, 6)
    assert Counting.asked == [sample["sample_id"] for sample in (*test[:3], test[4], test[3])]


def test_a_guardrail_without_a_quantile_predicts_nothing():
    guardrail = Guardrail.__new__(Guardrail)
    guardrail.quantile = None
    with pytest.raises(ValueError, match="promises no quantile"):
        PredictedLatencies(guardrail)
