"""The benchmarks of the controller and of training, with few requests."""

import json

import pytest

from joint_controller.cli import main


def test_the_controller_is_timed_beside_its_modules(tmp_path, capsys):
    path = tmp_path / "controller.json"
    assert main(["bench", "controller", "--device", "cpu", "--num_requests", "20", "--json", str(path)]) == 0
    results = json.loads(path.read_text())
    assert results["limit_ms"] == pytest.approx(0.01 * results["full_setting_ms"])
    for way in ("modules", "request controller"):
        stages = results["ms"][way]
        assert 0 < stages["stage 1"] < stages["both stages"]
    assert "Both stages may take" in capsys.readouterr().out


def test_training_runs_the_executor_for_what_is_not_known(tmp_path, capsys):
    path = tmp_path / "training.json"
    sizes = {"num_questions": 4, "num_generations": 4, "num_rollouts": 2, "batch_size": 4}
    flags = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    assert main(["bench", "training", *flags, "--json", str(path)]) == 0
    plain, batched, known = json.loads(path.read_text())["runs"].values()
    # The same questions, budgets and decisions, so the same answers are asked for.
    assert 0 < plain["num_executed"] == batched["num_executed"] <= 32
    assert known["num_executed"] == 0
    assert "2 rollouts of 16 rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["controller", "--num_requests", "0"], "`num_requests` is 0: give 1 or more"),
        (["training", "--num_generations", "1"], "`num_generations` is 1: a group needs 2 settings or more"),
        (["training", "--num_rollouts", "0"], "`num_rollouts` is 0: give 1 or more"),
    ],
)
def test_impossible_numbers_are_refused(flags, message, capsys):
    assert main(["bench", *flags]) == 2
    assert message in capsys.readouterr().err
