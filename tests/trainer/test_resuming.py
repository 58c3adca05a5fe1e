"""A run that is killed and resumed ends as if it had never been interrupted."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from formula_world import make_collector, make_controller, make_guardrail, make_trainer
from transformers import TrainerCallback

from joint_controller import JointControllerModel
from joint_controller.trainer import last_complete_checkpoint


# Three epochs of eight optimiser steps; the checkpoints fall into the middle and on the end of epochs.
RUN = {
    "num_rows": 16,
    "max_steps": 24,
    "eval_steps": 4,
    "save_steps": 4,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 4,
    "num_iterations": 2,
    "learning_rate": 5e-3,
    "lr_scheduler_type": "cosine",
    "eval_on_start": True,
}


class StopAt(TrainerCallback):
    """Ends the process, or the training, in the middle of a step as far as checkpoints are concerned."""

    def __init__(self, step: int, kill: bool = False):
        self.step = step
        self.kill = kill

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyboardInterrupt


def assert_same_controller(first: JointControllerModel, second: JointControllerModel) -> None:
    for (name, value), other in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


def best_of(trainer) -> tuple[int, float]:
    return trainer.state.best_global_step, trainer.state.best_metric


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    trainer = make_trainer(folder, outcomes=make_collector(folder / "outcomes"), **RUN)
    trainer.train()
    return trainer


# Step 10 resumes inside the second epoch, 8 at an epoch's end, 23 in the last.
@pytest.mark.parametrize("stop_at", [8, 10, 23])
def test_resuming_equals_never_having_stopped(tmp_path, uninterrupted, stop_at):
    stopped = make_trainer(
        tmp_path, outcomes=make_collector(tmp_path / "outcomes"), callbacks=[StopAt(stop_at)], **RUN
    )
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = make_trainer(tmp_path, outcomes=make_collector(tmp_path / "outcomes"), **RUN)
    resumed.train(resume_from_checkpoint=True)
    assert_same_controller(resumed.model, uninterrupted.model)
    assert best_of(resumed) == best_of(uninterrupted)
    last = JointControllerModel.from_pretrained(tmp_path / "checkpoint-24")
    assert_same_controller(
        last, JointControllerModel.from_pretrained(f"{uninterrupted.args.output_dir}/checkpoint-24")
    )
    assert stopped.outcomes.num_executed + resumed.outcomes.num_executed == uninterrupted.outcomes.num_executed


@pytest.mark.slow
def test_a_process_that_is_killed_is_resumed_exactly(tmp_path, uninterrupted):
    program = (
        "from formula_world import make_collector, make_trainer\n"
        "from test_resuming import RUN, StopAt\n"
        f"folder = {str(tmp_path)!r}\n"
        "collector = make_collector(folder + '/outcomes')\n"
        "make_trainer(folder, outcomes=collector, callbacks=[StopAt(14, kill=True)], **RUN).train()\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", program],
        # The same number of threads as here: sums are rounded differently by another.
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert last_complete_checkpoint(tmp_path).endswith("checkpoint-12")
    resumed = make_trainer(tmp_path, outcomes=make_collector(tmp_path / "outcomes"), **RUN)
    resumed.train(resume_from_checkpoint=True)
    assert_same_controller(resumed.model, uninterrupted.model)


def test_a_checkpoint_that_was_not_written_to_the_end_is_passed_over(tmp_path, uninterrupted):
    whole = Path(uninterrupted.args.output_dir) / "checkpoint-24"
    for name, damage in (
        ("checkpoint-28", lambda folder: (folder / "optimizer.pt").unlink()),
        ("checkpoint-32", lambda folder: (folder / "trainer_state.json").write_text('{"epoch": 1.5, "glob')),
        ("checkpoint-36", lambda folder: (folder / "trainer_state.json").unlink()),
    ):
        shutil.copytree(whole, tmp_path / name)
        damage(tmp_path / name)
    assert last_complete_checkpoint(tmp_path) is None
    shutil.copytree(whole, tmp_path / "checkpoint-24")
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-24")
    # One process's generators were saved, two are asked for.
    assert last_complete_checkpoint(tmp_path, num_processes=2) is None


def test_resuming_where_nothing_was_saved_yet_starts_from_the_first_step(tmp_path, uninterrupted):
    trainer = make_trainer(tmp_path, **RUN)
    trainer.train(resume_from_checkpoint=True)
    assert_same_controller(trainer.model, uninterrupted.model)


def test_the_same_seed_gives_the_same_controller_and_another_seed_another(tmp_path, uninterrupted):
    other = make_trainer(tmp_path, **{**RUN, "seed": 4})
    other.train()
    state = json.loads((tmp_path / "checkpoint-24" / "trainer_state.json").read_text())
    assert state["global_step"] == 24
    with pytest.raises(AssertionError):
        assert_same_controller(other.model, uninterrupted.model)


def test_resuming_a_run_that_had_ended_changes_nothing(tmp_path):
    run = {**RUN, "max_steps": 20}  # ends inside an epoch
    ended = make_trainer(tmp_path, outcomes=make_collector(tmp_path / "outcomes"), **run)
    ended.train()
    again = make_trainer(tmp_path, outcomes=make_collector(tmp_path / "outcomes"), **run)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 20
    assert_same_controller(again.model, ended.model)
    assert again.outcomes.num_executed == 0


# Eight epochs of three optimiser steps, with all outcomes known before the first.
RUN_EXACT = {
    "loss": "expected",
    "num_rows": 24,
    "per_device_train_batch_size": 8,
    "max_steps": 24,
    "eval_steps": 4,
    "save_steps": 4,
    "learning_rate": 5e-3,
    "lr_scheduler_type": "cosine",
}


def make_exact_trainer(folder, **kwargs):
    return make_trainer(
        folder,
        make_controller(sees_slack=True),
        make_collector(folder / "outcomes"),
        guardrail=make_guardrail(),
        **RUN_EXACT,
        **kwargs,
    )


# Steps 8 and 20 resume inside of epochs, 12 at an epoch's end.
@pytest.mark.parametrize("stop_at", [9, 12, 23])
@pytest.mark.slow
def test_resuming_on_all_outcomes_equals_never_having_stopped(tmp_path, stop_at):
    whole = make_exact_trainer(tmp_path / "whole")
    whole.train()
    stopped = make_exact_trainer(tmp_path / "run", callbacks=[StopAt(stop_at)])
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = make_exact_trainer(tmp_path / "run")
    resumed.train(resume_from_checkpoint=True)
    assert_same_controller(resumed.model, whole.model)
    assert best_of(resumed) == best_of(whole)
    answered = [*stopped.outcomes.executor.answered, *resumed.outcomes.executor.answered]
    assert len(answered) == len(set(answered)) and set(answered) == set(whole.outcomes.executor.answered)
