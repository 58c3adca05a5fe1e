"""Two processes train one controller."""

import json
import os
import subprocess
import sys

import pytest
from formula_world import SPACE, ColumnRecorder, make_trainer


# Two processes of 12 rows: groups of 8 are cut where one process's rows end and the other's begin.
PROGRAM = """
import hashlib, json, sys
from formula_world import ColumnRecorder, make_collector, make_trainer

folder = sys.argv[1]
recorder = ColumnRecorder()
trainer = make_trainer(
    folder, outcomes=make_collector(folder + "/outcomes"), num_rows=24, per_device_train_batch_size=12,
    reward_funcs=[recorder], reward_weights=[1.0],
)
trainer.train()
bits = b"".join(value.numpy().tobytes() for value in trainer.model.state_dict().values())
result = {
    "sample_ids": [batch["sample_id"] for batch in recorder.batches],
    "budgets": [batch["latency_budget_ms"] for batch in recorder.batches],
    "settings": [batch["completions"] for batch in recorder.batches],
    "digest": hashlib.sha256(bits).hexdigest(),
    "num_executed": trainer.outcomes.num_executed,
    "num_outcomes": len(trainer.outcomes.store),
    "best": trainer.state.best_metric,
}
with open(f"{folder}/process_{trainer.accelerator.process_index}.json", "w") as file:
    json.dump(result, file)
"""


def launch_two(text, tmp_path):
    """Runs a program in two processes, each of which writes `process_<index>.json` to the folder that it is given."""
    program = tmp_path / "program.py"
    program.write_text(text)
    launched = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", program, tmp_path],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert launched.returncode == 0, launched.stderr
    return [json.loads((tmp_path / f"process_{index}.json").read_text()) for index in range(2)]


PRECOMPUTE = """
import json, sys
from accelerate import PartialState
from formula_world import make_collector, make_dataset
from joint_controller.scripts.train import precompute_outcomes

state = PartialState(cpu=True)
outcomes = make_collector(sys.argv[1] + "/outcomes")
precompute_outcomes(outcomes, make_dataset(7))
result = {"num_executed": outcomes.num_executed, "num_outcomes": len(outcomes.store)}
with open(f"{sys.argv[1]}/process_{state.process_index}.json", "w") as file:
    json.dump(result, file)
"""


@pytest.mark.slow
def test_two_processes_answer_their_shares_ahead_and_know_those_of_the_other(tmp_path):
    results = launch_two(PRECOMPUTE, tmp_path)
    assert [result["num_executed"] for result in results] == [4 * len(SPACE), 3 * len(SPACE)]
    assert [result["num_outcomes"] for result in results] == [7 * len(SPACE)] * 2


@pytest.mark.slow
def test_two_processes_share_groups_budgets_and_outcomes(tmp_path):
    first, second = launch_two(PROGRAM, tmp_path)
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
    alone = make_trainer(
        tmp_path / "alone", num_rows=24, per_device_train_batch_size=24, reward_funcs=[recorder], reward_weights=[1.0]
    )
    alone.train()
    begin = recorder.batches[0]
    assert training[0] == (begin["sample_id"], begin["latency_budget_ms"], begin["completions"])
