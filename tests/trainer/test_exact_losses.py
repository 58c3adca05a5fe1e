"""Training on all settings at once, in a world whose best settings are known; and GRPO among settings that fit."""

import itertools
import time

import numpy as np
import pytest
import torch
from datasets import Image, IterableDataset
from formula_world import (
    FULL_MS,
    HIDDEN_SIZE,
    SPACE,
    ColumnRecorder,
    FormulaExecutor,
    FormulaLatency,
    best_reward,
    fits_of,
    is_answered,
    latency_of,
    make_args,
    make_collector,
    make_controller,
    make_dataset,
    make_guardrail,
    make_trainer,
    predicted_ms,
    reward_of,
)
from molmo_knobs import molmo_space

from joint_controller import JointControllerConfig, JointControllerModel, JointGRPOTrainer
from joint_controller.data import read_samples
from joint_controller.data.samples import Sample
from joint_controller.executor import ExecutorRequest
from joint_controller.latency import FitCache, RecordedLatencies
from joint_controller.outcomes import Outcome, OutcomeStore, RecordedOutcomes
from joint_controller.rewards import (
    DEFAULT_REWARDS,
    ORIGINAL_REWARDS,
    accuracy_reward,
    reward_columns,
    total_reward,
)
from joint_controller.trainer import LatencyBudgetRange
from joint_controller.trainer.draws import draw_budget
from joint_controller.trainer.feature_cache import CachedFeatures
from joint_controller.trainer.losses import EXACT_LOSSES
from joint_controller.trainer.outcome_table import OutcomeTable, possible_settings


# Given, so that no sample is answered to find them out.
BUDGETS = LatencyBudgetRange(0.35 * FULL_MS, FULL_MS, FULL_MS, 5.0)
TRAIN_ALONE = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}


def type_of(row) -> str:
    return row["question"].split()[0]


def answered_by(trainer) -> list:
    return trainer.outcomes.executor.answered


@pytest.mark.parametrize("quantile", [0.0, 0.95], ids=["all settings", "guardrail"])
@pytest.mark.parametrize("loss", EXACT_LOSSES)
@pytest.mark.slow
def test_learns_the_best_setting_for_each_question_and_budget(tmp_path, loss, quantile):
    trainer = make_trainer(
        tmp_path,
        make_controller(sees_slack=quantile > 0),
        num_rows=128,
        num_eval_rows=64,
        loss=loss,
        max_steps=300,
        eval_steps=100,
        save_steps=100,
        logging_steps=100,
        per_device_train_batch_size=64,
        learning_rate=5e-3,
        latency_budgets=BUDGETS,
        guardrail=make_guardrail(quantile) if quantile else None,
    )
    trainer.train()
    answered = answered_by(trainer)
    assert len(answered) == len(set(answered)) == trainer.outcomes.num_executed == len(trainer.outcomes.store)
    types = {row["sample_id"]: type_of(row) for row in [*trainer.train_dataset, *trainer.eval_dataset]}
    if quantile:
        # Nothing was answered that can never be chosen.
        assert all(setting in fits_of(types[sample_id], FULL_MS, quantile) for sample_id, setting in answered)

    learnt = trainer.evaluate()["eval_reward"]
    budgets = [draw_budget(3, 0, row["sample_id"], 0.35 * FULL_MS, FULL_MS) for row in trainer.eval_dataset]
    types = [type_of(row) for row in trainer.eval_dataset]
    left = {
        budget: fits_of(kind, budget, quantile) if quantile else list(SPACE)
        for kind, budget in zip(types, budgets, strict=True)
    }
    best = np.mean([best_reward(*one) for one in zip(types, budgets, left.values(), strict=True)])
    assert sorted(budget for budget, _ in trainer.evaluation_decisions) == sorted(budgets)
    assert all(setting in left[budget] for budget, setting in trainer.evaluation_decisions)
    assert learnt > 0.95 * best
    for setting in SPACE:
        static = np.mean([reward_of(kind, setting, budget) for kind, budget in zip(types, budgets, strict=True)])
        assert learnt > static + 0.05


@pytest.mark.parametrize("has_guardrail", [False, True])
@pytest.mark.parametrize("loss", EXACT_LOSSES)
def test_logs_the_loss_and_expectations_over_what_may_be_chosen(tmp_path, loss, has_guardrail):
    """All by hand: a new controller takes in each stage each choice that is left with equal probability, or the first one."""
    trainer = make_trainer(
        tmp_path,
        make_controller(sees_slack=has_guardrail),
        num_rows=16,
        loss=loss,
        max_steps=1,
        logging_steps=1,
        latency_budgets=BUDGETS,
        guardrail=make_guardrail() if has_guardrail else None,
        **TRAIN_ALONE,
    )
    trainer.train()
    entry = trainer.state.log_history[0]
    columns = {name: [] for name in ("reward", "accuracy", "latency_ms", "budget_violation_rate", "entropy")}
    losses, errors = [], []
    for row in trainer.train_dataset:
        kind, budget = type_of(row), draw_budget(3, 0, row["sample_id"], BUDGETS.minimum_ms, BUDGETS.maximum_ms)
        left = fits_of(kind, budget) if has_guardrail else list(SPACE)
        tiers = [setting["tier"] for setting in left]
        probs = {setting: 1 / len(set(tiers)) / tiers.count(setting["tier"]) for setting in left}
        rewards = {setting: reward_of(kind, setting, budget) for setting in left}
        best = max(left, key=lambda setting, of=rewards: (of[setting], -latency_of(setting)))
        expected_reward = sum(p * rewards[setting] for setting, p in probs.items())
        entropy = -sum(p * np.log(p) for p in probs.values())
        losses.append(-np.log(probs[best]) if loss == "supervised" else -(expected_reward + 0.01 * entropy))
        # Of each tier the first setting that is left.
        firsts = {setting["tier"]: setting for setting in reversed(left)}
        of_stage1 = np.mean([rewards[setting] ** 2 for setting in firsts.values()])
        errors.append(of_stage1 + np.mean([reward**2 for reward in rewards.values()]))
        if loss == "regression":
            probs = {left[0]: 1.0}
        columns["reward"].append(sum(p * rewards[setting] for setting, p in probs.items()))
        columns["accuracy"].append(sum(p * is_answered(kind, setting) for setting, p in probs.items()))
        columns["latency_ms"].append(sum(p * latency_of(setting) for setting, p in probs.items()))
        is_over = sum(p * (latency_of(setting) > budget) for setting, p in probs.items())
        columns["budget_violation_rate"].append(is_over)
        columns["entropy"].append(-sum(p * np.log(p) for p in probs.values()))
    expected = {name: np.mean(values) for name, values in columns.items()}
    expected["loss"] = np.mean(errors if loss == "regression" else losses)
    assert {name: entry[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_each_epoch_has_each_sample_once_under_a_new_budget(tmp_path, monkeypatch):
    seen = []
    rewards = OutcomeTable.rewards

    def spy(self, rows, latency_budget_ms, functions):
        seen.append(
            [(self.samples[row]["sample_id"], ms) for row, ms in zip(rows, latency_budget_ms.tolist(), strict=True)]
        )
        return rewards(self, rows, latency_budget_ms, functions)

    monkeypatch.setattr(OutcomeTable, "rewards", spy)
    trainer = make_trainer(
        tmp_path, num_rows=24, loss="expected", per_device_train_batch_size=8, max_steps=6, latency_budgets=BUDGETS,
        **TRAIN_ALONE,
    )  # fmt: skip
    trainer.train()
    assert [len(batch) for batch in seen] == [8] * 6
    for epoch, batches in enumerate((seen[:3], seen[3:])):
        expected = {
            sample_id: draw_budget(3, epoch, sample_id, BUDGETS.minimum_ms, BUDGETS.maximum_ms)
            for sample_id in trainer.train_dataset["sample_id"]
        }
        assert dict(itertools.chain(*batches)) == pytest.approx(expected)
    order = [[sample_id for sample_id, _ in itertools.chain(*batches)] for batches in (seen[:3], seen[3:])]
    assert order[0] != order[1] and order[0] != sorted(order[0])


def test_accumulated_steps_are_those_of_the_whole_batch(tmp_path):
    run = {
        "loss": "expected",
        "max_steps": 4,
        "latency_budgets": BUDGETS,
        "guardrail": make_guardrail(),
        **TRAIN_ALONE,
    }
    whole, parts = (
        make_trainer(tmp_path / name, make_controller(sees_slack=True), num_rows=32, **run, **sizes)
        for name, sizes in (
            ("whole", {"per_device_train_batch_size": 16}),
            ("parts", {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}),
        )
    )
    for trainer in (whole, parts):
        trainer.train()
    assert_close_controllers(whole.model, parts.model)
    assert not torch.equal(whole.model.stage1.head.linears[0].bias, make_controller().stage1.head.linears[0].bias)


def assert_close_controllers(first, second):
    for (name, value), other in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("quantile", [0.95, 0.99])
def test_grpo_samples_only_settings_that_fit(tmp_path, quantile):
    """At the higher quantile, some budgets fit nothing: the cheapest setting is taken then."""
    recorder = ColumnRecorder()
    trainer = make_trainer(
        tmp_path,
        make_controller(sees_slack=True),
        guardrail=make_guardrail(quantile),
        latency_budgets=BUDGETS,
        reward_funcs=[recorder],
        reward_weights=[1.0],
        num_iterations=2,
        beta=0.01,
    )
    trainer.train()
    types = {row["sample_id"]: type_of(row) for row in [*trainer.train_dataset, *trainer.eval_dataset]}
    taken, fits_nothing = set(), 0
    for batch in recorder.batches:
        for sample_id, budget, setting in zip(
            batch["sample_id"], batch["latency_budget_ms"], batch["setting"], strict=True
        ):
            assert setting in fits_of(types[sample_id], budget, quantile)
            fits_nothing += predicted_ms(types[sample_id], SPACE.cheapest, quantile) > budget
            taken.add(setting)
    assert len(taken) > 3 and (fits_nothing > 0) == (quantile == 0.99)
    assert all(np.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)


def test_with_a_guardrail_decisions_are_scored_as_they_were_sampled(tmp_path):
    """Log-probabilities of the settings that were taken, among those that fit, by the two softmaxes."""
    trainer = make_trainer(
        tmp_path, make_controller(sees_slack=True), guardrail=make_guardrail(), latency_budgets=BUDGETS
    )
    torch.manual_seed(5)
    for parameter in trainer.model.parameters():
        parameter.data.normal_(std=0.3)
    rows = [trainer.train_dataset[row // 8] for row in range(16)]
    batch = trainer._generate_and_score_completions(rows)
    logps, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, None, None, logits_to_keep=3)
    table = trainer.model.table
    for row in range(16):
        budget = draw_budget(3, 0, rows[row]["sample_id"], BUDGETS.minimum_ms, BUDGETS.maximum_ms)
        left = fits_of(type_of(rows[row]), budget)
        fits = torch.tensor([setting in left for setting in SPACE])
        assert torch.equal(batch["fits"][row], fits)
        slack = [1 - predicted_ms(type_of(rows[row]), setting) / budget for setting in SPACE]
        torch.testing.assert_close(batch["slack"][row], torch.tensor(slack).clamp(-1, 1))
        assert batch["latency_budget_ms"][row].item() == pytest.approx(budget / 1.25)
        one, first, second = slice(row, row + 1), batch["first"][row], batch["second"][row]
        question, typical = batch["question_features"][one], batch["latency_budget_ms"][one]
        scores = trainer.model.stage1(question, typical, batch["slack"][one])[0]
        stage1 = scores.where(fits[table.positions].any(1), -torch.inf).log_softmax(-1)
        seen = batch["slack"][one][:, table.positions[first]]
        values = table.values[0][first][None]
        scores = trainer.model.stage2(batch["vision_features"][one], question, typical, values, seen)[0]
        stage2 = scores.where(fits[table.positions[first]], -torch.inf).log_softmax(-1)
        assert logps[row].sum().item() == pytest.approx((stage1[first] + stage2[second]).item(), abs=1e-4)


def long_answer(answer, **kwargs):
    """Reads what no function of the package does: "yes" is longer than "no"."""
    return [float(len(one)) for one in answer]


def table_of(samples, collector, fits=None, highest_ms=None):
    controller = make_controller()
    return OutcomeTable(collector, FormulaLatency(), samples, controller, collector.executor, fits, highest_ms)


@pytest.mark.parametrize(
    "rewards",
    [DEFAULT_REWARDS, ORIGINAL_REWARDS, {long_answer: 0.3, **ORIGINAL_REWARDS}],
    ids=["default", "original", "with one of its own"],
)
@pytest.mark.parametrize("has_guardrail", [False, True])
def test_rewards_of_the_table_are_total_rewards_row_by_row(rewards, has_guardrail):
    samples, collector = read_samples(make_dataset(8)), make_collector()
    fits, highest_ms = (FitCache(make_guardrail()), 20.0) if has_guardrail else (None, None)
    table = table_of(samples, collector, fits, highest_ms)
    rows, budgets = [5, 1, 1, 6], torch.tensor([8.0, 12.0, 20.0, 17.0])
    found = table.rewards(rows, budgets, rewards)
    assert found.shape == (4, len(SPACE))
    num_never = 0
    for number, (row, budget) in enumerate(zip(rows, budgets.tolist(), strict=True)):
        for position, setting in enumerate(SPACE):
            if has_guardrail and setting not in fits_of(type_of(samples[row]), 20.0):
                assert found[number, position] == -torch.inf
                assert table.latency_ms[row, position] == torch.inf and table.accuracy[row, position] == 0
                num_never += 1
                continue
            [outcome] = make_collector().collect([samples[row]], [setting])
            columns = reward_columns(SPACE, [samples[row]], [outcome], [latency_of(setting)], [budget])
            assert found[number, position].item() == pytest.approx(
                total_reward(rewards, columns).item(), rel=1e-6, abs=1e-6
            )
    assert (num_never > 0) == has_guardrail
    assert len(collector.executor.answered) == len(set(collector.executor.answered))


def test_the_table_has_what_the_controller_sees_for_each_choice_of_stage_1():
    samples, collector = read_samples(make_dataset(6)), make_collector()
    table = table_of(samples, collector)
    executor, controller = FormulaExecutor(), make_controller()
    assert torch.equal(table.question_features, executor.question_features([one["question"] for one in samples]))
    assert table.vision_features.shape == (6, 3, HIDDEN_SIZE)
    for choice, (tier,) in enumerate(controller.table.values[0].tolist()):
        requests = [ExecutorRequest.of(sample, SPACE.setting((tier, 0, 0))) for sample in samples]
        torch.testing.assert_close(table.vision_features[:, choice], executor.vision_features(requests))


def test_possible_settings_are_those_that_fit_the_highest_budget_and_the_cheapest():
    samples = read_samples(make_dataset(8))
    fits = FitCache(make_guardrail())
    rows, columns = possible_settings(SPACE, samples, fits, 20.0)
    expected = [
        (row, position)
        for row, sample in enumerate(samples)
        for position, setting in enumerate(SPACE)
        if setting in fits_of(type_of(sample), 20.0) or setting == SPACE.cheapest
    ]
    assert list(zip(rows, columns, strict=True)) == expected
    everything = list(itertools.product(range(8), range(len(SPACE))))
    for given in ((), (fits, None), (FitCache(make_guardrail(None)), 20.0)):
        assert list(zip(*possible_settings(SPACE, samples, *given), strict=True)) == everything


def test_settings_that_cannot_be_run_are_not_answered_though_nothing_is_promised(tmp_path):
    """Prompts that are longer than the executor takes, at settings that need more tokens."""
    guardrail = make_guardrail(None)
    count_inputs = guardrail.executor.count_inputs

    def count_more(request, settings):
        counts = count_inputs(request, settings)
        return {**counts, "vision_tokens": [200 if one["tier"] == "high" else 16 for one in settings]}

    guardrail.executor.count_inputs = count_more
    trainer = make_trainer(
        tmp_path,
        make_controller(sees_slack=True),
        num_rows=16,
        loss="expected",
        guardrail=guardrail,
        latency_budgets=BUDGETS,
        max_steps=4,
    )
    trainer.train()
    assert {setting["tier"] for _, setting in answered_by(trainer)} == {"low", "medium"}
    assert all(np.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)


@pytest.mark.parametrize("has_guardrail", [False, True])
def test_learns_from_a_reward_function_that_reads_answers(tmp_path, has_guardrail):
    """Long answers are wanted, whenever they come: "yes", where the setting suffices."""
    trainer = make_trainer(
        tmp_path,
        make_controller(sees_slack=has_guardrail),
        loss="expected",
        reward_funcs=[long_answer],
        reward_weights=[1.0],
        max_steps=200,
        num_rows=64,
        latency_budgets=BUDGETS,
        guardrail=make_guardrail() if has_guardrail else None,
        eval_steps=200,
        save_steps=200,
        learning_rate=5e-3,
    )
    trainer.train()
    best = []
    for row in trainer.eval_dataset:
        budget = draw_budget(3, 0, row["sample_id"], BUDGETS.minimum_ms, BUDGETS.maximum_ms)
        left = fits_of(type_of(row), budget) if has_guardrail else SPACE
        best.append(3.0 if any(is_answered(type_of(row), setting) for setting in left) else 2.0)
    assert trainer.evaluate()["eval_reward"] == pytest.approx(np.mean(best))


@pytest.mark.parametrize("is_of_this_package", [True, False])
def test_shrinkage_moves_rewards_to_the_mean_of_the_samples_that_have_the_setting(is_of_this_package):
    """Also where a setting that fits no budget was not answered; what is logged is the accuracy as it was."""

    def doubled(accuracy, **kwargs):
        return [2.0 * value for value in accuracy]

    samples = read_samples(make_dataset(12))
    given = (
        make_collector(),
        FormulaLatency(),
        samples,
        make_controller(),
        FormulaExecutor(),
        FitCache(make_guardrail()),
    )
    table = OutcomeTable(*given, highest_budget_ms=0.6 * FULL_MS, shrinkage=0.25)
    rewards = {accuracy_reward: 2.0} if is_of_this_package else {doubled: 1.0}
    found = table.rewards([0, 1, 5], torch.full((3,), FULL_MS), rewards)
    for column, setting in enumerate(SPACE):
        answered = [
            float(is_answered(type_of(sample), setting)) if table.latency_ms[row, column].isfinite() else None
            for row, sample in enumerate(samples)
        ]
        known = [value for value in answered if value is not None]
        for place, row in enumerate([0, 1, 5]):
            if answered[row] is None:
                assert found[place, column] == -torch.inf
            else:
                mean = sum(known) / len(known)
                assert found[place, column] == pytest.approx(2 * (0.75 * answered[row] + 0.25 * mean), rel=1e-5)
                assert table.accuracy[row, column] == answered[row]


def test_an_image_is_looked_at_once_whatever_is_asked_about_it():
    class Counting:
        question_size = vision_size = 2
        asked = []

        def vision_features(self, requests):
            self.asked += [(request.sample_id, request.setting["tier"]) for request in requests]
            return torch.tensor([[float(request.sample_id[-1]), 1.0] for request in requests])

    rows = [dict(row) for row in make_dataset(3).cast_column("image", Image(decode=False))]
    rows[2]["image"] = rows[0]["image"]
    samples = [Sample(row) for row in rows]
    features, cheapest, full = CachedFeatures(Counting(), SPACE), SPACE.cheapest, SPACE.full
    requests = [ExecutorRequest.of(sample, setting) for setting in (cheapest, full) for sample in samples]
    found = features.vision_features(requests)
    assert found[:, 0].tolist() == [0.0, 1.0, 0.0] * 2 and torch.equal(features.vision_features(requests), found)
    tiers = (cheapest["tier"], full["tier"])
    assert Counting.asked == [(f"train/000{row}", tier) for tier in tiers for row in (0, 1)]


def test_a_reward_that_is_not_finite_is_refused(tmp_path):
    def no_answer(answer, **kwargs):
        return [float("nan") if one == "no" else 1.0 for one in answer]

    trainer = make_trainer(
        tmp_path, loss="expected", reward_funcs=[no_answer], reward_weights=[1.0], num_rows=16, latency_budgets=BUDGETS
    )
    with pytest.raises(
        ValueError, match="sum of no_answer is not finite for a request: let each return finite numbers"
    ):
        trainer.train()


def test_trains_in_bfloat16_and_on_batches_that_are_not_full(tmp_path):
    """13 samples in batches of 8: an epoch has two steps, the second of five samples."""
    trainer = make_trainer(
        tmp_path, make_controller(sees_slack=True), num_rows=13, per_device_train_batch_size=8, loss="expected", bf16=True,
        max_steps=4, latency_budgets=BUDGETS, guardrail=make_guardrail(),
    )  # fmt: skip
    trainer.train()
    assert trainer.state.epoch == 2.0 and len(trainer.get_train_dataloader()) == 2
    assert all(np.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_outcomes_that_are_known_are_not_computed_again(tmp_path):
    run = {"loss": "expected", "num_rows": 16, "max_steps": 4, "latency_budgets": BUDGETS}
    first = make_trainer(tmp_path / "a", outcomes=make_collector(tmp_path / "outcomes"), **run)
    first.train()
    again = make_trainer(tmp_path / "b", outcomes=make_collector(tmp_path / "outcomes"), **run)
    again.train()
    assert first.outcomes.num_executed >= 16 * len(SPACE) and again.outcomes.num_executed == 0


def test_a_controller_that_sees_the_budget_alone_needs_no_features(tmp_path):
    samples = [*make_dataset(16), *make_dataset(16, "validation")]
    store = OutcomeStore(None, "recorded", SPACE)
    collected = make_collector().collect([one for one in samples for _ in SPACE], list(SPACE) * len(samples))
    store.add(collected)
    trainer = make_trainer(
        tmp_path,
        make_controller(stage1_inputs="budget", stage2_inputs="budget"),
        outcomes=RecordedOutcomes(store, SPACE),
        num_rows=16,
        loss="expected",
        max_steps=4,
    )
    trainer.train()
    assert trainer.state.global_step == 4


@pytest.mark.parametrize("frozen", ["stage1", "neither"])
def test_a_frozen_stage_1_stays_as_it_is(tmp_path, frozen):
    run = {"loss": "expected", "num_rows": 16, "max_steps": 4, "latency_budgets": BUDGETS, **TRAIN_ALONE}
    trainer = make_trainer(tmp_path, stage1_lr_ratio=0.0 if frozen == "stage1" else 1.0, **run)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    changed = {
        name.split(".")[0]
        for name, value in trainer.model.state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert changed == {"stage2"} | ({"stage1"} if frozen == "neither" else set())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"loss": "reinforce"}, "`loss` is 'reinforce': choose from 'grpo', 'expected', 'supervised', 'regression'"),
        ({"loss": "expected", "beta": 0.1}, "`beta` is 0.1, but only the loss 'grpo' is held near a reference"),
        ({"loss": "regression", "beta": 0.1}, "leave it at 0"),
        ({"loss": "expected", "shrinkage": 1.5}, "`shrinkage` is 1.5: give a number from 0 to 1"),
        ({"loss": "grpo", "shrinkage": 0.3}, "`shrinkage` needs the outcomes of all training samples"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_args(tmp_path, **kwargs)


def test_the_entropy_bonus_is_by_loss_unless_it_is_given(tmp_path):
    losses = ("grpo", "expected", "supervised", "regression")
    assert [make_args(tmp_path, loss=loss).entropy_coef for loss in losses] == [0.1, 0.01, 0.0, 0.0]
    assert [make_args(tmp_path, loss=loss, entropy_coef=0.3).entropy_coef for loss in losses] == [0.3] * 4
    # Nothing is rolled out, so that any step can be saved.
    assert make_args(tmp_path, loss="expected", num_iterations=3, eval_steps=1, save_steps=1).save_steps == 1


def test_a_stream_is_refused_where_all_samples_are_needed(tmp_path):
    stream = IterableDataset.from_generator(lambda: iter([]), features=make_dataset(1).features)
    with pytest.raises(ValueError, match="`loss` is 'expected', which looks at all training samples before it begins"):
        JointGRPOTrainer(
            make_controller(), make_collector(), FormulaLatency(), make_args(tmp_path, loss="expected"), stream
        )


def test_a_controller_that_sees_slack_needs_a_guardrail(tmp_path):
    with pytest.raises(ValueError, match="but nothing predicts it: give `guardrail`, or make the controller"):
        make_trainer(tmp_path, make_controller(sees_slack=True))
    # The other way round there is nothing to be said: what fits is masked, but not seen.
    make_trainer(tmp_path, make_controller(sees_slack=False), guardrail=make_guardrail())


@pytest.mark.slow
def test_a_thousand_and_a_half_steps_take_half_a_minute_where_outcomes_are_known(tmp_path):
    """75 settings and features of the embedded executor's width, in one thread. Outcomes are read and features seen, too."""
    tiers = {"low": (1, 1), "medium": (4, 4), "high": (9, 9)}
    space = molmo_space(tiers, top_k=(1, 2, 3, 4, 6), num_blocks=(2, 3, 4, 5, 6))
    assert len(space) == 75
    dataset, width = make_dataset(512), 192
    generator = np.random.default_rng(0)
    store = OutcomeStore(None, "recorded", space)
    store.add(
        [
            Outcome(sample_id, setting, "yes", float(generator.integers(2)), {}, 2, 5 + 25 * position / 74)
            for sample_id in dataset["sample_id"]
            for position, setting in enumerate(space)
        ]
    )

    class Features:
        question_size = vision_size = width

        def question_features(self, questions):
            return torch.randn(len(questions), width)

        def vision_features(self, requests):
            return torch.randn(len(requests), width)

    controller = JointControllerModel(
        JointControllerConfig(
            knob_space=space.to_dict(), question_size=width, vision_size=width, latency_budget_min_ms=5,
            latency_budget_max_ms=40,
        )
    )  # fmt: skip
    trainer = JointGRPOTrainer(
        controller,
        RecordedOutcomes(store, space, Features()),
        RecordedLatencies(),
        make_args(
            tmp_path, loss="expected", max_steps=1500, per_device_train_batch_size=128, logging_steps=50, **TRAIN_ALONE
        ),
        dataset,
    )
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    assert trainer.state.global_step == 1500
    assert seconds < 30
