"""Training on a stream: the samples of a table in the same order, exact resumes, several processes."""

import json
import os
import subprocess
import sys

import pytest
from datasets import Image
from formula_world import ColumnRecorder, FormulaLatency, make_args, make_collector, make_controller, make_dataset
from formula_world import make_trainer as make_table_trainer
from test_resuming import StopAt, assert_same_controller

from joint_controller.data import SkippedRows, stream_vqa_datasets
from joint_controller.trainer import JointGRPOTrainer


NUM_ROWS = 13
# A rollout takes two samples: six rollouts of two steps an epoch, and one sample is left over.
RUN = {"max_steps": 20, "eval_steps": 4, "save_steps": 4, "steps_per_generation": 2, "per_device_train_batch_size": 8}


def write_files(folder, num_rows: int = NUM_ROWS):
    folder.mkdir(exist_ok=True, parents=True)
    rows = make_dataset(num_rows)
    for part in range(3):
        rows.shard(3, part, contiguous=True).to_parquet(folder / f"train-{part:05d}-of-00003.parquet")
    return folder


def make_trainer(output_dir, stream, outcomes=None, **kwargs):
    trainer_kwargs = {name: kwargs.pop(name) for name in ("reward_funcs", "callbacks") if name in kwargs}
    return JointGRPOTrainer(
        model=make_controller(),
        outcomes=make_collector() if outcomes is None else outcomes,
        latency_estimator=FormulaLatency(),
        args=make_args(output_dir, **{**RUN, **kwargs}),
        train_dataset=stream,
        eval_dataset=make_dataset(16, "validation"),
        **trainer_kwargs,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("stream") / "data")


def test_a_stream_trains_as_its_table_does(tmp_path, folder):
    recorders = ColumnRecorder(), ColumnRecorder()
    table = make_table_trainer(
        tmp_path / "table",
        num_rows=NUM_ROWS,
        shuffle_dataset=False,
        reward_funcs=[recorders[0]],
        reward_weights=[1.0],
        **RUN,
    )
    stream = make_trainer(
        tmp_path / "stream",
        stream_vqa_datasets([str(folder)]),
        shuffle_dataset=False,
        reward_funcs=[recorders[1]],
        reward_weights=[1.0],
    )
    for trainer in (table, stream):
        trainer.train()
    trained = [[batch for batch in recorder.batches if len(set(batch["sample_id"])) < 8] for recorder in recorders]
    assert len(trained[0]) == 10
    # The same groups, budgets and first decisions. TRL's order within a rollout is drawn by torch's generator, which loaders
    # of tables and of streams use differently, and so later weights and decisions.
    for column in ("sample_id", "latency_budget_ms"):
        assert [batch[column] for batch in trained[0]] == [batch[column] for batch in trained[1]]
    assert trained[0][0] == trained[1][0]
    assert trained[1][0]["sample_id"] == ["train/0000"] * 8 + ["train/0001"] * 8
    # The second epoch has the same samples under other budgets.
    assert trained[1][6]["sample_id"] == trained[1][0]["sample_id"]
    assert trained[1][6]["latency_budget_ms"] != trained[1][0]["latency_budget_ms"]


def test_each_epoch_is_shuffled_anew_and_has_each_sample_once(tmp_path, folder):
    recorder = ColumnRecorder()
    trainer = make_trainer(
        tmp_path, stream_vqa_datasets([str(folder)]), reward_funcs=[recorder], reward_weights=[1.0], eval_strategy="no",
        load_best_model_at_end=False,
    )  # fmt: skip
    trainer.train()
    order = [sample_id for batch in recorder.batches for sample_id in batch["sample_id"][::8]]
    epochs = order[:12], order[12:20]
    assert len(set(epochs[0])) == 12 and len(set(epochs[1])) == 8
    assert epochs[0][:8] != epochs[1] and list(epochs[0]) != sorted(epochs[0])


# Rollouts begin at even steps; the first epoch ends at step 12.
@pytest.mark.parametrize("stop_at", [6, 12, 18])
@pytest.mark.slow
def test_resuming_equals_never_having_stopped(tmp_path, folder, stop_at):
    uninterrupted = make_trainer(tmp_path / "whole", stream_vqa_datasets([str(folder)]))
    uninterrupted.train()
    stopped = make_trainer(
        tmp_path / "run",
        stream_vqa_datasets([str(folder)]),
        make_collector(tmp_path / "o"),
        callbacks=[StopAt(stop_at)],
    )
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = make_trainer(tmp_path / "run", stream_vqa_datasets([str(folder)]), make_collector(tmp_path / "o"))
    resumed.train(resume_from_checkpoint=True)
    assert_same_controller(resumed.model, uninterrupted.model)
    assert resumed.state.best_metric == uninterrupted.state.best_metric
    ended = make_trainer(tmp_path / "run", stream_vqa_datasets([str(folder)]), make_collector(tmp_path / "o"))
    ended.train(resume_from_checkpoint=True)
    assert ended.outcomes.num_executed == 0
    assert_same_controller(ended.model, uninterrupted.model)


def test_bad_rows_are_met_on_the_way(tmp_path):
    folder = write_files(tmp_path / "data")
    file = folder / "train-00001-of-00003.parquet"
    from datasets import Dataset

    rows = Dataset.from_parquet(str(file)).cast_column("image", Image(decode=False)).to_list()
    rows[2]["image"]["bytes"] = rows[2]["image"]["bytes"][:20]
    Dataset.from_list(rows, features=make_dataset(1).features).to_parquet(file)

    skipped = SkippedRows(tmp_path / "skipped_rows.jsonl")
    recorder = ColumnRecorder()
    make_trainer(
        tmp_path / "skip", stream_vqa_datasets([str(folder)], skipped_rows=skipped), reward_funcs=[recorder],
        reward_weights=[1.0],
    ).train()  # fmt: skip
    seen = {sample_id for batch in recorder.batches for sample_id in batch["sample_id"] if "train" in sample_id}
    assert seen == {f"train/{row:04d}" for row in range(NUM_ROWS)} - {"train/0007"}
    [line] = (tmp_path / "skipped_rows.jsonl").read_text().splitlines()
    assert json.loads(line) | {"cause": ""} == {
        "dataset": str(folder),
        "split": "train",
        "row": 7,
        "sample_id": "train/0007",
        "column": "image",
        "cause": "",
    }
    with pytest.raises(ValueError, match="row 7 .sample 'train/0007'. of 'train', column 'image'.*skip_bad_rows"):
        make_trainer(tmp_path / "error", stream_vqa_datasets([str(folder)])).train()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_steps": -1}, "set `max_steps`"),
        ({"save_strategy": "epoch", "load_best_model_at_end": False}, "`save_strategy` is 'epoch'"),
        ({"per_device_train_batch_size": 64}, "fewer rows than one rollout takes"),
    ],
)
def test_what_a_stream_cannot_do_is_refused(tmp_path, folder, change, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, stream_vqa_datasets([str(folder)]), **change).train()


PROGRAM = """
import hashlib, json, sys
from pathlib import Path
from formula_world import ColumnRecorder, make_collector
from joint_controller.data import stream_vqa_datasets
from test_streaming import make_trainer

folder, data = sys.argv[1:]
recorder = ColumnRecorder()
trainer = make_trainer(
    folder, stream_vqa_datasets([data]), make_collector(folder + "/outcomes"), reward_funcs=[recorder],
    reward_weights=[1.0], per_device_train_batch_size=4,
)
trainer.train()
bits = b"".join(value.numpy().tobytes() for value in trainer.model.state_dict().values())
result = {
    "batches": [[batch["sample_id"], batch["latency_budget_ms"], batch["completions"]] for batch in recorder.batches],
    "digest": hashlib.sha256(bits).hexdigest(),
}
Path(f"{folder}/process_{trainer.accelerator.process_index}.json").write_text(json.dumps(result))
"""


@pytest.mark.slow
def test_two_processes_share_the_groups_of_a_stream(tmp_path, folder):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    launched = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
            *(program, tmp_path, folder),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert launched.returncode == 0, launched.stderr
    first, second = (json.loads((tmp_path / f"process_{index}.json").read_text()) for index in range(2))
    assert first["digest"] == second["digest"]
    recorder = ColumnRecorder()
    alone = make_trainer(
        tmp_path / "alone", stream_vqa_datasets([str(folder)]), reward_funcs=[recorder], reward_weights=[1.0]
    )
    alone.train()
    # The rows of both are those of one process with all of them; decisions are the same until weights differ by rounding.
    rollouts = [
        [left + right for left, right in zip(one, other, strict=True)]
        for one, other in zip(first["batches"], second["batches"], strict=True)
        if len(one[0]) == 8
    ]
    expected = [
        [batch["sample_id"], batch["latency_budget_ms"], batch["completions"]]
        for batch in recorder.batches
        if len(set(batch["sample_id"])) == 2
    ]
    assert len(expected) == 10
    assert rollouts[0] == expected[0]
    assert [rollout[:2] for rollout in rollouts if len(set(rollout[0])) == 2] == [batch[:2] for batch in expected]
