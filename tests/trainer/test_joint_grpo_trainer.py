import copy
from dataclasses import replace

import pytest
import torch
from formula_world import (
    FULL_MS,
    SPACE,
    ColumnRecorder,
    best_reward,
    is_answered,
    latency_of,
    make_args,
    make_collector,
    make_controller,
    make_dataset,
    make_trainer,
    reward_of,
)

from joint_controller.data import Sample
from joint_controller.executor import ExecutorRequest
from joint_controller.latency import RecordedLatencies
from joint_controller.outcomes import OutcomeStore, RecordedOutcomes
from joint_controller.rewards import DEFAULT_REWARDS, ORIGINAL_REWARDS
from joint_controller.trainer import resolve_latency_budgets
from joint_controller.trainer.draws import draw_budget


def first_rows(trainer, num_rows: int) -> list[dict]:
    return [trainer.train_dataset[row // trainer.num_generations] for row in range(num_rows)]


def request_of(row: dict, tier_index: int) -> ExecutorRequest:
    return ExecutorRequest.of(Sample(row), SPACE.setting((tier_index, 0, 0)))


def values_of(trainer, batch) -> torch.Tensor:
    """Of each row, the position of each knob's value among the values of the knob."""
    table = trainer.model.table
    return table.setting_values[table.positions[batch["first"], batch["second"]]]


def logged(trainer, metric: str) -> list[float]:
    return [entry[metric] for entry in trainer.state.log_history if metric in entry]


@pytest.mark.slow
def test_learns_the_best_setting_for_each_question_and_budget(tmp_path):
    trainer = make_trainer(
        tmp_path,
        num_rows=256,
        num_eval_rows=64,
        max_steps=400,
        eval_steps=100,
        save_steps=100,
        logging_steps=100,
        per_device_train_batch_size=64,
        num_iterations=2,
        eval_on_start=True,
    )
    trainer.train()

    rows = trainer.eval_dataset.remove_columns("image")
    budgets = [draw_budget(3, 0, row["sample_id"], 0.35 * FULL_MS, FULL_MS) for row in rows]
    types = [row["question"].split()[0] for row in rows]
    best = sum(map(best_reward, types, budgets)) / len(rows)
    untrained, *_ = logged(trainer, "eval_reward")
    learnt = trainer.evaluate()["eval_reward"]
    assert learnt == max(logged(trainer, "eval_reward"))  # the best controller was loaded at the end
    assert learnt > untrained + 0.2
    assert learnt > 0.95 * best
    for setting in SPACE:
        static = sum(reward_of(kind, setting, budget) for kind, budget in zip(types, budgets, strict=True)) / len(rows)
        assert learnt > static + 0.05


def test_scores_decisions_as_the_softmax_of_both_stages_does(tmp_path):
    trainer = make_trainer(tmp_path, temperature=0.5)
    torch.manual_seed(5)
    for parameter in trainer.model.parameters():
        parameter.data.normal_(std=0.3)
    batch = trainer._generate_and_score_completions(first_rows(trainer, 16))
    logps, entropies, _ = trainer._get_per_token_logps_and_entropies(
        trainer.model, None, None, logits_to_keep=3, compute_entropy=True
    )

    question, budget, vision = (batch[name] for name in ("question_features", "latency_budget_ms", "vision_features"))
    for row in range(16):
        tier, top_k, num_blocks = values_of(trainer, batch)[row].tolist()
        one = slice(row, row + 1)
        tier_probs = (trainer.model.stage1(question[one], budget[one], None)[0] / 0.5).softmax(-1)
        stage2 = trainer.model.stage2(vision[one], question[one], budget[one], torch.tensor([[tier]]), None)
        joint = (stage2[0] / 0.5).softmax(-1).reshape(3, 3)  # top_k, num_blocks
        top_k_probs, num_blocks_probs = joint.sum(1), joint[top_k] / joint[top_k].sum()
        probs = torch.stack([tier_probs[tier], top_k_probs[top_k], num_blocks_probs[num_blocks]])
        torch.testing.assert_close(logps[row], probs.log(), rtol=1e-4, atol=1e-5)
        expected = torch.stack([-(p * p.log()).sum() for p in (tier_probs, top_k_probs, num_blocks_probs)])
        torch.testing.assert_close(entropies[row], expected, rtol=1e-4, atol=1e-5)


def test_stage_2_sees_the_image_at_the_tier_taken(tmp_path):
    trainer = make_trainer(tmp_path)
    rows = first_rows(trainer, 16)
    batch = trainer._generate_and_score_completions(copy.deepcopy(rows))
    assert len(values_of(trainer, batch)[:, 0].unique()) > 1
    for row, (tier_index, *_) in enumerate(values_of(trainer, batch).tolist()):
        expected = trainer.outcomes.executor.vision_features([request_of(rows[row], tier_index)])[0]
        torch.testing.assert_close(batch["vision_features"][row], expected)


def test_completions_are_the_action_tokens_of_the_setting(tmp_path):
    recorder = ColumnRecorder()
    trainer = make_trainer(tmp_path, reward_funcs=[recorder], reward_weights=[1.0])
    batch = trainer._generate_and_score_completions(first_rows(trainer, 16))
    (columns,) = recorder.batches
    assert columns["completions"] == [str(setting) for setting in columns["setting"]]
    assert trainer.processing_class.batch_decode(batch["completion_ids"]) == columns["completions"]
    assert [list(SPACE.indices(one)) for one in columns["setting"]] == values_of(trainer, batch).tolist()
    assert columns["latency_ms"] == pytest.approx([latency_of(setting) for setting in columns["setting"]])
    questions = [row["question"].split()[0] for row in first_rows(trainer, 16)]
    assert columns["accuracy"] == [
        float(is_answered(q, s)) for q, s in zip(questions, columns["setting"], strict=True)
    ]


def test_a_group_shares_one_budget_which_is_drawn_anew_each_epoch(tmp_path):
    recorder = ColumnRecorder()
    trainer = make_trainer(
        tmp_path,
        num_rows=4,
        reward_funcs=[recorder],
        reward_weights=[1.0],
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
        max_steps=4,
    )  # two epochs of two steps of two groups
    trainer.train()
    seen = []
    for batch in recorder.batches:
        for group in (slice(0, 8), slice(8, 16)):
            assert len(set(batch["sample_id"][group])) == 1
            assert len(set(batch["latency_budget_ms"][group])) == 1
            assert len(set(batch["setting"][group])) > 1
            seen.append((batch["sample_id"][group][0], batch["latency_budget_ms"][group][0]))
    expected = {
        (f"train/{row:04d}", draw_budget(3, epoch, f"train/{row:04d}", 0.35 * FULL_MS, FULL_MS))
        for row in range(4)
        for epoch in range(2)
    }
    assert set(seen) == expected


def test_evaluation_takes_the_likeliest_setting_and_repeats_itself(tmp_path):
    recorder = ColumnRecorder()
    trainer = make_trainer(tmp_path, reward_funcs=[recorder], reward_weights=[1.0])
    torch.manual_seed(5)
    for parameter in trainer.model.parameters():
        parameter.data.normal_(std=0.3)
    first, second = trainer.evaluate(), trainer.evaluate()
    assert recorder.batches[0] == recorder.batches[1]
    assert len(recorder.batches[0]["sample_id"]) == len(set(recorder.batches[0]["sample_id"])) == 16
    timings = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    assert all(first[name] == second[name] for name in first if name.startswith("eval_") and name not in timings)

    executor, columns = trainer.outcomes.executor, recorder.batches[0]
    rows = {row["sample_id"]: row for row in trainer.eval_dataset}
    for sample_id, budget_ms, setting in zip(
        columns["sample_id"], columns["latency_budget_ms"], columns["setting"], strict=True
    ):
        question = executor.question_features([rows[sample_id]["question"]])
        budget = torch.tensor([budget_ms])
        tier_index = trainer.model.stage1(question, budget, None).argmax(-1)
        vision = executor.vision_features([request_of(rows[sample_id], tier_index.item())])
        stage2 = trainer.model.stage2(vision, question, budget, tier_index[:, None], None)
        assert SPACE.indices(setting) == (tier_index.item(), *divmod(stage2.argmax(-1).item(), 3))


@pytest.mark.parametrize("rewards", [DEFAULT_REWARDS, ORIGINAL_REWARDS], ids=["default", "original"])
def test_logs_rewards_by_name_and_what_they_are_made_of(tmp_path, rewards):
    given = (
        {} if rewards is DEFAULT_REWARDS else {"reward_funcs": list(rewards), "reward_weights": list(rewards.values())}
    )
    trainer = make_trainer(tmp_path, logging_steps=1, max_steps=4, **given)
    trainer.train()
    for prefix in ("", "eval_"):
        entry = next(entry for entry in trainer.state.log_history if f"{prefix}reward" in entry)
        weighted = sum(
            weight * entry[f"{prefix}rewards/{function.__name__}/mean"] for function, weight in rewards.items()
        )
        assert entry[f"{prefix}reward"] == pytest.approx(weighted, abs=1e-5)
        if rewards is ORIGINAL_REWARDS:
            assert entry[f"{prefix}accuracy"] == entry[f"{prefix}rewards/accuracy_reward/mean"]
        assert 5 <= entry[f"{prefix}latency_ms"] <= 30
        assert 0 <= entry[f"{prefix}budget_violation_rate"] <= 1
        for knob, values in SPACE.values.items():
            assert sum(entry[f"{prefix}knobs/{knob}={value}"] for value in values) == pytest.approx(1)


def test_evaluation_means_are_over_rows_though_the_last_batch_is_smaller(tmp_path):
    recorder = ColumnRecorder()
    trainer = make_trainer(tmp_path, num_eval_rows=19, reward_funcs=[recorder], reward_weights=[1.0])
    torch.manual_seed(8)
    for parameter in trainer.model.parameters():
        parameter.data.normal_(std=0.5)
    metrics = trainer.evaluate()
    assert [len(batch["accuracy"]) for batch in recorder.batches] == [16, 3]
    for metric, column in (
        ("eval_accuracy", "accuracy"),
        ("eval_reward", "accuracy"),
        ("eval_latency_ms", "latency_ms"),
    ):
        values = [value for batch in recorder.batches for value in batch[column]]
        assert metrics[metric] == pytest.approx(sum(values) / 19, abs=1e-5)


def test_kl_is_to_the_controller_as_it_was_given(tmp_path):
    controller = make_controller()
    torch.manual_seed(5)
    for parameter in controller.parameters():
        parameter.data.normal_(std=0.3)
    initial = copy.deepcopy(controller.state_dict())
    trainer = make_trainer(tmp_path, controller, beta=0.05, logging_steps=1, max_steps=4)
    trainer.train()
    kl = logged(trainer, "kl")
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert kl[-1] > 1e-5
    assert all(torch.equal(initial[name], value) for name, value in trainer.ref_model.state_dict().items())
    assert any(not torch.equal(initial[name], value) for name, value in trainer.model.state_dict().items())


def test_a_stage_1_learning_rate_of_zero_freezes_stage_1_alone(tmp_path):
    trainer = make_trainer(tmp_path, stage1_lr_ratio=0.0)
    initial = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    for name, value in trainer.model.state_dict().items():
        if name.startswith("stage1."):
            assert torch.equal(value, initial[name])
    assert any(
        not torch.equal(value, initial[name])
        for name, value in trainer.model.state_dict().items()
        if name.startswith("stage2.")
    )


def test_stage_1_learns_at_its_own_rate(tmp_path):
    trainer = make_trainer(tmp_path, stage1_lr_ratio=0.25, learning_rate=0.004, weight_decay=0.1)
    rates = {}
    decays = {}
    for group in trainer.create_optimizer().param_groups:
        for parameter in group["params"]:
            rates[parameter] = group["lr"]
            decays[parameter] = group["weight_decay"]
    assert len(rates) == len(list(trainer.model.parameters()))
    for name, parameter in trainer.model.named_parameters():
        assert rates[parameter] == pytest.approx(0.001 if name.startswith("stage1.") else 0.004)
        assert decays[parameter] == (0.0 if name.endswith("bias") or ".norm." in name else 0.1)


def test_starts_stage_1_from_a_checkpoint(tmp_path):
    pretrained = make_controller(seed=9)
    pretrained.save_pretrained(tmp_path / "stage1")
    controller = make_controller(seed=0)
    stage2 = copy.deepcopy(controller.stage2.state_dict())
    trainer = make_trainer(tmp_path / "run", controller, stage1_checkpoint=str(tmp_path / "stage1"))
    for name, value in trainer.model.stage1.state_dict().items():
        assert torch.equal(value, pretrained.stage1.state_dict()[name])
    for name, value in trainer.model.stage2.state_dict().items():
        assert torch.equal(value, stage2[name])


def test_log_completions_writes_questions_settings_and_answers(tmp_path):
    import pandas

    trainer = make_trainer(tmp_path, log_completions=True, max_steps=4)
    trainer.train()
    table = pandas.read_parquet(tmp_path / "completions" / "completions_00004.parquet")
    assert {"prompt", "completion", "answer", "accuracy", "latency_ms", "efficiency_reward", "advantage"} <= set(table)
    assert table["completion"].str.fullmatch(r"tier=\w+ top_k=\d num_blocks=\d").all()
    assert table["prompt"].str.contains("question? (", regex=False).all()


def test_an_image_is_decoded_only_when_it_is_looked_at(tmp_path):
    row = {"sample_id": "a", "image": {"bytes": b"not an image", "path": None}, "question": "b"}
    sample = Sample(row)
    assert sample["question"] == "b"
    with pytest.raises(ValueError, match="sample 'a', column 'image': the image cannot be decoded"):
        sample["image"]
    with pytest.raises(KeyError):
        sample["answers"]


def test_fractions_refer_to_the_full_setting(tmp_path):
    args = make_args(tmp_path, latency_budget_min_fraction=0.4, latency_budget_max_fraction=0.9)
    trainer = make_trainer(tmp_path)
    budgets = resolve_latency_budgets(args, make_collector(), trainer.latency_estimator, make_dataset(100))
    assert (budgets.minimum_ms, budgets.maximum_ms) == pytest.approx((0.4 * FULL_MS, 0.9 * FULL_MS))
    assert (budgets.full_setting_ms, budgets.cheapest_setting_ms) == pytest.approx((FULL_MS, 5.0))


@pytest.mark.parametrize(
    ("controller_kwargs", "kwargs", "message"),
    [
        ({"question_size": 8}, {}, "`question_size` is 8, but the executor's features are 16 wide"),
        ({"knob_space": SPACE.restrict({"top_k": [1, 2]}).to_dict()}, {}, "build both with one knob space"),
        ({"latency_budget_min_ms": 12.0}, {}, "the controller encodes budgets of 12.000 to 30.000 ms"),
        (
            {},
            {"latency_budget_min_fraction": 0.1},
            r"so no setting can meet it: raise `latency_budget_min_ms` to 5\.0",
        ),
    ],
)
def test_a_run_that_cannot_work_is_refused_before_it_starts(tmp_path, controller_kwargs, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, make_controller(**controller_kwargs), **kwargs)


def record_everything(path) -> RecordedOutcomes:
    """Every outcome of the formula world with its latency, and the executor for nothing but features."""
    collector = make_collector()
    samples = [*make_dataset(32), *make_dataset(16, "validation")]
    settings = list(SPACE)
    outcomes = collector.collect([sample for sample in samples for _ in settings], settings * len(samples))
    store = OutcomeStore(path, "recorded", SPACE)
    store.add([replace(outcome, latency_ms=latency_of(outcome.setting)) for outcome in outcomes])
    return RecordedOutcomes(store, SPACE, features=collector.executor)


def test_recorded_outcomes_train_the_controller_that_the_executor_would_have(tmp_path):
    executed = make_trainer(tmp_path / "executed")
    executed.train()
    recorded = make_trainer(
        tmp_path / "recorded",
        outcomes=record_everything(tmp_path / "store"),
        latency_estimator=RecordedLatencies(),
    )
    recorded.train()
    assert logged(recorded, "eval_reward") == pytest.approx(logged(executed, "eval_reward"))
    for name, value in executed.model.state_dict().items():
        torch.testing.assert_close(recorded.model.state_dict()[name], value)


def test_a_controller_that_sees_the_budget_alone_needs_no_features(tmp_path):
    outcomes = record_everything(None)
    outcomes.features = None
    with pytest.raises(ValueError, match="nothing gives features of questions and images"):
        make_trainer(tmp_path, outcomes=outcomes)
    controller = make_controller(stage1_inputs="budget", stage2_inputs="budget")
    trainer = make_trainer(tmp_path, controller=controller, outcomes=outcomes, max_steps=4)
    trainer.train()
    assert len(logged(trainer, "eval_reward")) == 1


def test_checkpoints_and_the_output_folder_hold_the_latencies_and_the_card_is_the_packages(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-8"):
        assert (folder / "latency_estimator" / "formula.txt").is_file()
    trainer.create_model_card(model_name="any", tags=["any"])
    card = (tmp_path / "README.md").read_text()
    assert "| `num_blocks` | 4, 6, 8 | stage 2 |" in card and "text-generation" not in card
    trainer.model_card = "# Mine"
    trainer.create_model_card()
    assert (tmp_path / "README.md").read_text() == "# Mine"


def test_budgets_that_are_resolved_already_are_taken_as_they_are(tmp_path):
    trainer = make_trainer(tmp_path)
    outcomes = make_collector()
    again = type(trainer)(
        model=make_controller(),
        outcomes=outcomes,
        latency_estimator=trainer.latency_estimator,
        args=make_args(tmp_path),
        train_dataset=make_dataset(32),
        eval_dataset=make_dataset(16, "validation"),
        latency_budgets=trainer.latency_budgets,
    )
    assert again.latency_budgets is trainer.latency_budgets and outcomes.num_executed == 0


def test_a_completion_is_as_long_as_there_are_knobs(tmp_path):
    assert make_trainer(tmp_path).max_completion_length == 3
    with pytest.raises(ValueError, match="`max_completion_length` is 16, but the controller decides on 3 knobs"):
        make_trainer(tmp_path, max_completion_length=16)


def test_a_data_set_that_lacks_a_column_or_repeats_an_id_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    arguments = {
        "model": make_controller(),
        "outcomes": make_collector(),
        "latency_estimator": trainer.latency_estimator,
        "args": make_args(tmp_path),
    }
    dataset = make_dataset(8)
    with pytest.raises(ValueError, match="`train_dataset` has no column 'question'"):
        type(trainer)(**arguments, train_dataset=dataset.remove_columns("question"))
    with pytest.raises(ValueError, match="`eval_dataset` repeats values of `sample_id`"):
        repeated = dataset.remove_columns("sample_id").add_column("sample_id", ["same"] * 8)
        type(trainer)(**arguments, train_dataset=dataset, eval_dataset=repeated)
