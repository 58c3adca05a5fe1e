"""The benchmarks of the controller and of training, with few requests."""

import json

import pytest

from joint_controller.benchmarks.training import PHOTOGRAPH_SIZE, BenchTrainingArguments, load_questions
from joint_controller.cli import main
from joint_controller.executor import embedded_executor_path
from joint_controller.molmo import MolmoConfig, family
from joint_controller.molmo.executor.random_executor import RANDOM_CONFIGS


SMALL = ["--num_questions", "4", "--num_generations", "4", "--num_rollouts", "2", "--batch_size", "4"]


def test_the_controller_is_timed_beside_its_modules(tmp_path, capsys):
    path = tmp_path / "controller.json"
    assert main(["bench", "controller", "--device", "cpu", "--num_requests", "20", "--json", str(path)]) == 0
    results = json.loads(path.read_text())
    for way in ("modules", "request controller"):
        stages = results["ms"][way]
        assert 0 < stages["stage 1"] < stages["both stages"] < results["full_setting_ms"]
    assert f"of the full setting's {results['full_setting_ms']:.1f} ms" in capsys.readouterr().out


@pytest.mark.slow
def test_training_runs_the_executor_for_what_is_not_known(tmp_path, capsys):
    path = tmp_path / "training.json"
    assert main(["bench", "training", *SMALL, "--device", "cpu", "--json", str(path)]) == 0
    plain, batched, known = json.loads(path.read_text())["runs"].values()
    # The same questions, budgets and decisions, so the same answers are asked for.
    assert 0 < plain["num_executed"] == batched["num_executed"] <= 32
    assert known["num_executed"] == 0
    assert plain["num_rows"] == batched["num_rows"] == known["num_rows"] == 32
    out = capsys.readouterr().out
    assert "2 rollouts of 16 rows" in out and "train_runtime" not in out


@pytest.mark.slow
def test_training_with_random_weights_asks_about_photographs_and_less_of_the_modules(tmp_path, monkeypatch):
    # Sizes that an estimator ships for, and that a CPU can run.
    monkeypatch.setitem(RANDOM_CONFIGS, "small", lambda: MolmoConfig.from_pretrained(embedded_executor_path()))
    monkeypatch.setattr(family, "random_names", ("small",))
    path = tmp_path / "training.json"
    flags = ["--model_path", "random:small", "--num_stock_questions", "1", "--max_new_tokens", "3"]
    assert main(["bench", "training", *SMALL, *flags, "--device", "cpu", "--json", str(path)]) == 0
    plain, batched, known = json.loads(path.read_text())["runs"].values()
    assert plain["num_rows"] == 8 and batched["num_rows"] == known["num_rows"] == 32
    assert 0 < plain["num_executed"] <= 8 < batched["num_executed"] <= 32 and known["num_executed"] == 0

    args = BenchTrainingArguments(model_path="random:small", num_questions=2, num_rollouts=1)
    assert {row["image"].size for row in load_questions(args)} == {PHOTOGRAPH_SIZE}


def test_an_executor_that_no_estimator_ships_for_is_refused(tmp_path, tiny_molmo, tiny_processor, capsys):
    tiny_molmo.save_pretrained(tmp_path)
    tiny_processor.save_pretrained(tmp_path)
    assert main(["bench", "training", *SMALL, "--model_path", str(tmp_path), "--device", "cpu"]) == 2
    assert "no latency estimator ships for an executor of the sizes of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["controller", "--num_requests", "0"], "`num_requests` is 0: give 1 or more"),
        (["training", "--num_generations", "1"], "`num_generations` is 1: give 2 or more"),
        (["training", "--num_rollouts", "0"], "`num_rollouts` is 0: give 1 or more"),
        (["training", "--num_stock_questions", "65"], "`num_stock_questions` is 65, but a rollout has 64"),
        (["training", "--model_path", "random:molmo-72b"], "choose random:molmoe-1b"),
    ],
)
def test_impossible_numbers_are_refused(flags, message, capsys):
    assert main(["bench", *flags]) == 2
    assert message in capsys.readouterr().err
