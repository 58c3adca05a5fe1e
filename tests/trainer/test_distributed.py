"""Two processes train one controller."""

import json
import os
import subprocess
import sys

import pytest
import torch
from formula_world import SPACE, ColumnRecorder, fits_of, make_controller, make_guardrail, make_trainer
from safetensors.torch import load_file


# One launch for all tests: most of its time is two processes that import what they need.
PROGRAM = """
import hashlib, json, os, sys
from accelerate import PartialState
from formula_world import ColumnRecorder, make_collector, make_controller, make_dataset, make_guardrail, make_trainer
from joint_controller.scripts.train import precompute_outcomes
from safetensors.torch import save_file
from test_distributed import RUN, RUN_EXACT


def precompute(folder):
    outcomes = make_collector(folder + "/outcomes")
    precompute_outcomes(outcomes, make_dataset(7))
    return {"num_executed": outcomes.num_executed, "num_outcomes": len(outcomes.store)}


def sampled(folder):
    recorder = ColumnRecorder()
    trainer = make_trainer(
        folder, outcomes=make_collector(folder + "/outcomes"), per_device_train_batch_size=12, reward_funcs=[recorder],
        **RUN,
    )
    trainer.train()
    bits = b"".join(value.numpy().tobytes() for value in trainer.model.state_dict().values())
    return {
        "sample_ids": [batch["sample_id"] for batch in recorder.batches],
        "budgets": [batch["latency_budget_ms"] for batch in recorder.batches],
        "settings": [batch["completions"] for batch in recorder.batches],
        "digest": hashlib.sha256(bits).hexdigest(),
        "num_executed": trainer.outcomes.num_executed,
        "num_outcomes": len(trainer.outcomes.store),
        "best": trainer.state.best_metric,
    }


def exact(folder):
    trainer = make_trainer(
        folder, make_controller(sees_slack=True), make_collector(folder + "/outcomes"), guardrail=make_guardrail(),
        per_device_train_batch_size=8, **RUN_EXACT,
    )
    trainer.train()
    save_file(trainer.model.state_dict(), f"{folder}/process_{trainer.accelerator.process_index}.safetensors")
    return {
        "answered": [[sample_id, str(setting)] for sample_id, setting in trainer.outcomes.executor.answered],
        "num_outcomes": len(trainer.outcomes.store),
        "rewards": [entry["reward"] for entry in trainer.state.log_history if "reward" in entry],
        "best": trainer.state.best_metric,
    }


index = PartialState(cpu=True).process_index
for part in (precompute, sampled, exact):
    folder = f"{sys.argv[1]}/{part.__name__}"
    os.makedirs(folder, exist_ok=True)
    result = part(folder)
    with open(f"{folder}/process_{index}.json", "w") as file:
        json.dump(result, file)
"""
# Two processes of 12 rows: groups of 8 are cut where one process's rows end and the other's begin.
RUN = {"num_rows": 24, "reward_weights": [1.0]}
# Three steps an epoch, of 16 rows together.
RUN_EXACT = {"loss": "expected", "num_rows": 48, "max_steps": 8, "eval_steps": 4, "save_steps": 4, "logging_steps": 1}


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """A folder, where each of two processes has left `process_<index>.json` in the folder of each part of the program."""
    folder = tmp_path_factory.mktemp("launched")
    program = folder / "program.py"
    program.write_text(PROGRAM)
    ended = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", program, folder],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stderr
    return folder


def results_of(folder):
    return [json.loads((folder / f"process_{index}.json").read_text()) for index in range(2)]


@pytest.mark.slow
def test_two_processes_answer_their_shares_ahead_and_know_those_of_the_other(launched):
    results = results_of(launched / "precompute")
    assert [result["num_executed"] for result in results] == [4 * len(SPACE), 3 * len(SPACE)]
    assert [result["num_outcomes"] for result in results] == [7 * len(SPACE)] * 2


@pytest.mark.slow
def test_two_processes_share_groups_budgets_and_outcomes(launched, tmp_path):
    first, second = results_of(launched / "sampled")
    assert first["digest"] == second["digest"]
    assert first["best"] == second["best"]
    assert first["num_executed"] and second["num_executed"]
    assert first["num_executed"] + second["num_executed"] == first["num_outcomes"] == second["num_outcomes"]

    columns = ("sample_ids", "budgets", "settings")
    joined = [
        tuple(first[column][batch] + second[column][batch] for column in columns)
        for batch in range(len(first["sample_ids"]))
    ]
    training = [batch for batch in joined if len(batch[0]) == 24]
    assert len(training) == 8
    for sample_ids, budgets, settings in training:
        for start in range(0, 24, 8):
            group = slice(start, start + 8)
            assert len(set(sample_ids[group])) == 1
            assert len(set(budgets[group])) == 1
            assert len(set(settings[group])) > 1

    # Decisions do not depend on the number of processes: one process with all the rows begins with the same ones.
    recorder = ColumnRecorder()
    alone = make_trainer(tmp_path / "alone", per_device_train_batch_size=24, reward_funcs=[recorder], **RUN)
    alone.train()
    begin = recorder.batches[0]
    assert training[0] == (begin["sample_id"], begin["latency_budget_ms"], begin["completions"])


@pytest.mark.slow
def test_two_processes_train_on_all_outcomes_as_one_with_twice_the_batch(launched, tmp_path):
    first, second = results_of(launched / "exact")
    answered = [tuple(pair) for result in (first, second) for pair in result["answered"]]
    assert len(answered) == len(set(answered)) == first["num_outcomes"] == second["num_outcomes"]
    assert first["answered"] and second["answered"]
    alone = make_trainer(
        tmp_path / "alone",
        make_controller(sees_slack=True),
        guardrail=make_guardrail(),
        per_device_train_batch_size=16,
        **RUN_EXACT,
    )
    alone.train()
    assert {pair for pair in answered if pair[0].startswith("train")} == {
        (sample_id, str(setting))
        for sample_id, setting in alone.outcomes.executor.answered
        if sample_id.startswith("train")
    }
    types = {row["sample_id"]: row["question"].split()[0] for row in alone.train_dataset}
    # The full setting is looked at first on some samples, which fractions of budgets refer to.
    probed = str(SPACE.full)
    assert all(
        setting == probed or setting in map(str, fits_of(types[sample_id], alone.latency_budgets.maximum_ms))
        for sample_id, setting in answered
        if sample_id in types
    )
    states = [load_file(launched / "exact" / f"process_{index}.safetensors") for index in range(2)]
    for name, value in alone.model.state_dict().items():
        if name in states[0]:
            assert torch.equal(states[0][name], states[1][name])
            torch.testing.assert_close(states[0][name], value, atol=1e-4, rtol=1e-3)
    rewards = [entry["reward"] for entry in alone.state.log_history if "reward" in entry]
    assert len(rewards) == 8 and first["rewards"] == pytest.approx(rewards, abs=1e-3)
    assert first["best"] == second["best"] == pytest.approx(alone.state.best_metric, abs=1e-4)
