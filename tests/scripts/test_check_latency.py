"""`joint-controller check-latency` with the embedded executor."""

import json

import pytest

from joint_controller import JointControllerConfig, JointControllerModel, LatencyEstimatorModel
from joint_controller.cli import main
from joint_controller.executor import load_executor
from joint_controller.latency import clock_check, embedded_latency_estimator_path


STAGES = ["overhead", "controller", "image_processing", "vision", "llm_prefill", "decode", "total"]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("JOINT_CONTROLLER_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def slow_estimator(tmp_path):
    """The one that ships, as if it had been measured on a machine three times as slow."""
    estimator = LatencyEstimatorModel.from_pretrained(embedded_latency_estimator_path())
    estimator.load_state_dict({**estimator.state_dict(), "coefficients": 3 * estimator.coefficients})
    estimator.save_pretrained(tmp_path / "slow")
    return tmp_path / "slow"


@pytest.mark.slow
def test_without_a_controller_the_shipped_estimator_is_compared(tmp_path, capsys):
    file = tmp_path / "numbers" / "check.json"
    assert main(["check-latency", "--num_requests", "40", "--recalibrate", "never", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    numbers = json.loads(file.read_text())
    assert list(numbers["ratios"]) == STAGES and numbers["is_kept"] is False
    assert numbers["num_requests"] + numbers["num_disturbed"] == 40 or numbers["num_requests"] == 40
    for stage, ratio in numbers["ratios"].items():
        name = "decode, a token" if stage == "decode" else stage
        [line] = [line for line in out.splitlines() if line.strip().startswith(name)]
        assert line.split()[-1] == f"{ratio:.2f}" and line.split()[-2] == f"{numbers['measured_ms'][stage]:.2f}"
    assert f"are {numbers['ratios']['total']:.2f} times what was predicted" in out
    assert out.endswith("Nothing was kept.\n")


@pytest.mark.slow
def test_a_controllers_estimator_that_is_off_is_adapted_and_kept(slow_estimator, tmp_path, capsys, monkeypatch):
    # Other tests may share the core.
    monkeypatch.setattr(clock_check, "LEAST_CPU_SHARE", 0.0)
    monkeypatch.setattr(clock_check, "WIDEST_SWING", 10.0)
    executor = load_executor("embedded")
    sizes = {"question_size": executor.question_size, "vision_size": executor.vision_size}
    config = JointControllerConfig(knob_space=executor.knob_space.to_dict(), max_new_tokens=3, **sizes)
    JointControllerModel(config).save_pretrained(tmp_path / "run")
    slow_estimator.rename(tmp_path / "run" / "latency_estimator")
    command = ["check-latency", "--controller_path", str(tmp_path / "run"), "--num_requests", "48"]
    assert main([*command, "--recalibrate", "always"]) == 0
    out = capsys.readouterr().out
    assert "the estimator was adapted" in out and "Kept for the first time: " in out
    # What was kept is compared from now on, and is right where the one in the folder is not.
    file = tmp_path / "check.json"
    assert main([*command, "--recalibrate", "always", "--json", str(file)]) == 0
    assert "Kept in place of what an earlier check found: " in capsys.readouterr().out
    numbers = json.loads(file.read_text())
    assert 0.5 < numbers["ratios"]["total"] < 2.0 and numbers["is_adapted"] and numbers["is_kept"]


def test_what_cannot_be_checked_is_refused_in_one_line(tmp_path, capsys):
    for flags, message in (
        (["--model_path", "random:molmoe-1b"], "give `--latency_estimator_path`: the estimator of 'random:molmoe-1b'"),
        (["--controller_path", str(tmp_path)], "is not the folder of a controller"),
        (["--recalibrate", "perhaps"], "invalid choice: 'perhaps'"),
        (["--num_requests", "0"], "`num_requests` is 0"),
    ):
        assert main(["check-latency", *flags]) == 2
        [line] = capsys.readouterr().err.strip().splitlines()[-1:]
        assert line.startswith("joint-controller check-latency: error: ") and message in line
