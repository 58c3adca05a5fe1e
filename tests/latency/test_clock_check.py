"""Estimators whose formula is known, checked against machines whose times are formulas, too."""

import json
import shutil

import numpy as np
import pytest
import torch
from toy_family import KNOBS, FormulaClock, ToyExecutor, register_toy_family

from joint_controller import KnobSpace, LatencyEstimatorModel
from joint_controller.latency import LatencyEstimatorConfig
from joint_controller.latency import clock_check as module
from joint_controller.latency.clock_check import ClockChecker
from joint_controller.latency.profiling import path_to_measure


pytestmark = pytest.mark.slow


SPACE = KnobSpace(KNOBS)
# Coefficients of the toy executor's times, by stage.
FORMULA = {
    "overhead": (0.1, 0.0),
    "controller": (0.2,),
    "fetching": (0.5,),
    "looking": (1.0, 0.002),
    "thinking": (2.0, 4.0, 0.2),
    "decode": (0.5, 0.5),
}
QUANTILES = {"0.9": 1.05, "0.95": 1.07, "0.99": 1.1}


def make_estimator(quantiles=QUANTILES):
    """What the toy executor takes, exactly."""
    config = LatencyEstimatorConfig(
        executor_type="toy_thinker",
        executor_shape={"thinkers": 3},
        fitted_knobs={name: list(values) for name, values in SPACE.values.items()},
        fitted_counts={"pixels": [1, 4000], "prompt_tokens": [3, 60]},
        upper_quantiles={"request": quantiles, "model": quantiles},
        num_units=2,
        device_type="cpu",
        device_name="a machine of formulas",
    )
    estimator = LatencyEstimatorModel(config)
    for stage, coefficients in FORMULA.items():
        _, units = estimator.stage_parameters(stage)
        units = torch.ones_like(units)
        units[:, -1] = 0.0
        estimator.set_stage_parameters(stage, torch.tensor(coefficients), units)
    return estimator


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Sets what the stages take as multiples of the formula, with noise; nothing disturbs."""
    register_toy_family()
    monkeypatch.setenv("JOINT_CONTROLLER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "LEAST_CPU_SHARE", 0.0)

    def set_times(factors=None, noise=0.03):
        generator = np.random.default_rng(0)

        class Clock(FormulaClock):
            def stop(self, stage):
                by_request = np.exp(generator.normal(0, noise))
                return {
                    name: [ms * (factors or {}).get(name, 1.0) * by_request for ms in times]
                    for name, times in super().stop(stage).items()
                }

        monkeypatch.setattr("joint_controller.request_path.StageClock", Clock)

    set_times()
    return set_times


@pytest.fixture
def executor(machine):
    return ToyExecutor({"thinkers": 3}, {}, SPACE)


def predicted_full_ms(estimator):
    counts = {"pixels": [3000], "prompt_tokens": [9]}
    return {stage: ms.item() for stage, ms in estimator.predict_stage_ms([SPACE.full], counts, [2]).items()}


def test_an_estimator_that_is_right_is_kept(executor):
    base = make_estimator()
    checker = ClockChecker(base, executor)
    assert checker.kept() is None
    estimator, check = checker.check(path_to_measure(executor))
    assert estimator is base and check.finding == "" and not check.is_adapted and check.is_kept
    assert check.num_requests == 96 and check.num_disturbed == 0
    assert tuple(check.ratios) == (*FORMULA, "total")
    assert all(ratio == pytest.approx(1.0, abs=0.01) for ratio in check.ratios.values())
    assert check.p95_ratio == pytest.approx(np.exp(1.645 * 0.03), abs=0.02) and 0.93 <= check.coverage <= 1.0
    assert "1.00 times what was predicted" in check.summary() and "is kept." in check.summary()
    # Later, nothing is measured.
    assert ClockChecker(make_estimator(), executor).kept()[1] == check


@pytest.mark.parametrize("factors", [dict.fromkeys(FORMULA, 1.6), {"looking": 3.0, "thinking": 0.5, "decode": 2.0}])
def test_an_estimator_that_is_off_is_adapted(executor, machine, factors):
    base = make_estimator()
    machine(factors)
    checker = ClockChecker(base, executor)
    estimator, check = checker.check(path_to_measure(executor))
    assert check.is_adapted and check.is_kept and "times what was predicted" in check.finding
    assert check.error > 0.15 and check.adapted_error < 0.04
    assert f"the estimator was adapted, its mean error is {check.error:.1%} without" in check.summary()
    expected = {stage: ms * factors.get(stage, 1.0) for stage, ms in predicted_full_ms(base).items()}
    for stage, ms in predicted_full_ms(estimator).items():
        assert ms == pytest.approx(expected[stage], rel=0.08), stage
    # It promises what the clock keeps, and is as wide as the base was.
    _, again = checker.check(path_to_measure(executor), estimator, seed=1, recalibrate="never")
    assert again.finding == "" and not again.is_kept
    assert estimator.config.fitted_knobs == base.config.fitted_knobs
    assert estimator.config.device_name != "a machine of formulas"
    assert estimator.config.recalibrated_from["device_name"] == "a machine of formulas"

    kept, kept_check = ClockChecker(base, executor).kept()
    assert kept_check == check and kept is not base
    assert predicted_full_ms(kept) == predicted_full_ms(estimator)


@pytest.mark.parametrize(
    "quantiles, finding",
    [
        ({"0.95": 1.01}, "below the predicted 95 % quantile"),
        ({"0.95": 2.0}, "times the measured one"),
        ({}, "no 95 %"),
    ],
)
def test_a_quantile_that_is_off_is_measured(executor, quantiles, finding):
    base = make_estimator(quantiles)
    estimator, check = ClockChecker(base, executor).check(path_to_measure(executor))
    assert check.is_adapted and finding in check.finding
    assert estimator.quantile_factor(0.95) == pytest.approx(np.exp(1.645 * 0.03), abs=0.03)
    assert estimator.quantile_factor(0.9) <= estimator.quantile_factor(0.95) <= estimator.quantile_factor(0.99)


def test_it_is_adapted_as_one_asks(executor, machine):
    checker = ClockChecker(make_estimator(), executor)
    estimator, check = checker.check(path_to_measure(executor), recalibrate="always")
    assert check.is_adapted and check.finding == "" and estimator is not checker.base
    machine(dict.fromkeys(FORMULA, 2.0))
    estimator, check = checker.check(path_to_measure(executor), recalibrate="never")
    assert estimator is checker.base and not check.is_adapted and not check.is_kept
    assert check.finding == "latencies are 2.00 times what was predicted" or check.ratios["total"] == pytest.approx(
        2, 0.02
    )
    assert "is kept, though latencies are" in check.summary()
    for wrong in ({"recalibrate": "perhaps"}, {"num_requests": 0}, {"time_limit_s": 0}):
        with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` is"):
            checker.check(path_to_measure(executor), **wrong)


def test_nothing_is_concluded_from_few_requests_or_on_a_busy_machine(executor, machine, monkeypatch):
    machine(dict.fromkeys(FORMULA, 2.0))
    checker = ClockChecker(make_estimator(), executor)
    estimator, check = checker.check(path_to_measure(executor), num_requests=20)
    assert estimator is checker.base and not check.is_kept and check.num_requests == 20
    assert "too few to conclude anything" in check.summary()
    _, check = checker.check(path_to_measure(executor), time_limit_s=1e-9)
    assert check.num_requests == 1 and not check.is_kept

    # Its thread never has a core.
    monkeypatch.setattr(module, "LEAST_CPU_SHARE", 0.95)
    monkeypatch.setattr(module.time, "thread_time", lambda: 0.0)
    estimator, check = checker.check(path_to_measure(executor), recalibrate="always")
    assert estimator is checker.base and not check.is_kept and check.num_disturbed == 96
    assert "busy with something else" in check.summary()
    assert checker.kept() is None


def test_nothing_is_concluded_while_the_machine_becomes_slower(executor, machine, monkeypatch):
    clock, num = FormulaClock, [0]

    class SlowLater(clock):
        def stop(self, stage):
            num[0] += 1
            # The warm-up takes the first 96.
            factor = 1.5 if num[0] > 96 + 48 else 1.0
            return {name: [factor * ms for ms in times] for name, times in super().stop(stage).items()}

    monkeypatch.setattr("joint_controller.request_path.StageClock", SlowLater)
    checker = ClockChecker(make_estimator(), executor)
    estimator, check = checker.check(path_to_measure(executor))
    assert check.swing == pytest.approx(1.5, rel=0.01) and estimator is checker.base and not check.is_kept
    assert "its speed swings by a factor of 1.50" in check.summary()


def test_single_requests_that_were_disturbed_are_left_out(executor, monkeypatch):
    monkeypatch.setattr(module, "LEAST_CPU_SHARE", 0.95)
    ticks = iter(range(10**6))
    # Every tenth request computes for no time, the others for longer than they take.
    monkeypatch.setattr(module.time, "thread_time", lambda: 0.0 if (tick := next(ticks)) % 20 < 2 else 100.0 * tick)
    _, check = ClockChecker(make_estimator(), executor).check(path_to_measure(executor), num_requests=50)
    assert (check.num_requests, check.num_disturbed) == (45, 5) and check.is_conclusive


def test_what_is_kept_is_of_this_estimator_and_this_way_of_running(executor):
    folder = ClockChecker(make_estimator(), executor).folder
    assert folder == ClockChecker(make_estimator(), executor).folder
    others = [
        ClockChecker(make_estimator({"0.95": 1.2}), executor),
        ClockChecker(make_estimator().in_scope("model"), executor),
        ClockChecker(make_estimator(), ToyExecutor({"thinkers": 3}, {"zoom": [1, 4]})),
    ]
    executor.mode = "by another formula"
    others.append(ClockChecker(make_estimator(), executor))
    assert len({folder, *(other.folder for other in others)}) == 5


def test_what_is_damaged_is_told_and_measured_again(executor, machine, monkeypatch, tmp_path):
    machine(dict.fromkeys(FORMULA, 1.5))
    checker = ClockChecker(make_estimator(), executor)
    warnings = []
    monkeypatch.setattr(module.logger, "warning", warnings.append)

    def cut(file):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    def change_a_weight(file):
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(content)

    def change_a_field(file):
        file.write_text(json.dumps({**json.loads(file.read_text()), "check": {"what": 1}}))

    damages = [(cut, "check.json"), (cut, "model.safetensors"), (change_a_weight, "model.safetensors")]
    damages += [
        (cut, "config.json"),
        (change_a_field, "check.json"),
        (lambda file: file.unlink(), "model.safetensors"),
    ]
    checker.check(path_to_measure(executor))
    whole = shutil.copytree(checker.folder, tmp_path / "whole")
    for number, (damage, name) in enumerate(damages, start=1):
        shutil.copytree(whole, checker.folder, dirs_exist_ok=True)
        assert checker.kept() is not None and len(warnings) == number - 1
        damage(checker.folder / name)
        assert checker.kept() is None and len(warnings) == number
        assert "is damaged" in warnings[-1] and "\n" not in warnings[-1]
    # What is written anew takes its place.
    checker.check(path_to_measure(executor))
    assert checker.kept() is not None
    assert [path.name for path in checker.folder.parent.iterdir()] == [checker.folder.name]


def test_a_cache_that_cannot_be_written_to_is_told(executor, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("JOINT_CONTROLLER_CACHE", str(tmp_path / "file"))
    warnings = []
    monkeypatch.setattr(module.logger, "warning", warnings.append)
    _, check = ClockChecker(make_estimator(), executor).check(path_to_measure(executor))
    assert not check.is_kept and check.finding == ""
    [warning] = warnings
    assert "cannot be kept" in warning and "$JOINT_CONTROLLER_CACHE" in warning


def test_without_the_variable_it_is_in_hugging_faces_cache(executor, monkeypatch, tmp_path):
    monkeypatch.delenv("JOINT_CONTROLLER_CACHE")
    monkeypatch.setattr(module.constants, "HF_HOME", str(tmp_path / "hf"))
    folder = ClockChecker(make_estimator(), executor).folder
    assert folder.parent == tmp_path / "hf" / "joint_controller" / "latency"


def test_the_models_stages_alone_are_checked_in_their_scope(executor, machine):
    machine({"overhead": 50.0, "fetching": 9.0})
    base = make_estimator().in_scope("model")
    estimator, check = ClockChecker(base, executor).check(path_to_measure(executor))
    assert estimator is base and check.latency_scope == "model" and check.finding == ""
    assert tuple(check.ratios) == ("looking", "thinking", "decode", "total")
    machine({"looking": 2.0, "thinking": 2.0, "decode": 2.0})
    estimator, check = ClockChecker(base, executor).check(path_to_measure(executor))
    assert check.is_adapted and estimator.latency_scope == "model" and check.adapted_error < 0.04
