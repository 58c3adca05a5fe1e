"""`joint-controller sweep`, from the command line to the files it leaves, for an executor that only tests know."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from accelerate import PartialState
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from toy_family import KNOBS, NEEDS, SIZE, FormulaClock, ToyExecutor, make_checkpoint, register_toy_family

from joint_controller import (
    JointControllerConfig,
    JointControllerModel,
    KnobSpace,
    LatencyEstimatorConfig,
    LatencyEstimatorModel,
)
from joint_controller.cli import main
from joint_controller.evaluation.request_table import read_request_table
from joint_controller.evaluation.summary import rows_of


SPACE = KnobSpace(KNOBS).restrict({"patience": (0.25, 1.0), "zoom": (1, 4)})
SPLITS = {"train": 40, "test": 20}
POLICIES = {
    *("controller", "controller, no mask", "full", "static", "static by reward", "fits", "look-up"),
    *("per question type", "random"),
}


def make_data(folder):
    folder.mkdir()
    strings = Value("string")
    features = Features(
        {
            "sample_id": strings,
            "image": Image(),
            "question": strings,
            "answers": List(strings),
            "metric": strings,
            "question_type": strings,
        }
    )
    for split, num_rows in SPLITS.items():
        kinds = [list(NEEDS)[row % 4] for row in range(num_rows)]
        rows = {
            "sample_id": [f"{split}/{row:04d}" for row in range(num_rows)],
            # Two questions to an image.
            "image": [
                PILImage.new("RGB", (20 + row // 2 % 7 * 4, 30), (row // 2 * 37 % 256,) * 3) for row in range(num_rows)
            ],
            "question": [f"{kind} question ?" for kind in kinds],
            "answers": [["yes"]] * num_rows,
            "metric": ["exact_match"] * num_rows,
            "question_type": kinds,
        }
        Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")
    return folder


def make_estimator(folder, scope="request"):
    """5 ms, 2 ms a thousand pixels, and as much as there is thought."""
    estimator = LatencyEstimatorModel(
        LatencyEstimatorConfig(
            executor_type=ToyExecutor.model_type,
            executor_shape={"thinkers": 3},
            fitted_knobs={name: list(values) for name, values in SPACE.values.items()},
            upper_quantiles={scope: {"0.95": 1.1} for scope in ("request", "model")},
        )
    )
    terms = {"looking": [1.0, 0.002], "thinking": [2.0, 4.0, 0.2], "decode": [0.5, 0.5]}
    for stage in estimator.costs.stages:
        coefficients, units = (torch.zeros_like(values) for values in estimator.stage_parameters(stage))
        for number, value in enumerate(terms.get(stage, [0.1])):
            coefficients[number] = value
        units[:, :-1] = 1.0  # steps of no height: the factor is 1
        estimator.set_stage_parameters(stage, coefficients, units)
    estimator.in_scope(scope).save_pretrained(folder)


def make_controller(folder, seed, space=SPACE, scope="request", **kwargs):
    torch.manual_seed(seed)
    config = JointControllerConfig(
        knob_space=space.to_dict(),
        question_size=SIZE,
        vision_size=SIZE + 2,
        latency_budget_min_ms=20,
        latency_budget_max_ms=100,
        **kwargs,
    )
    JointControllerModel(config).save_pretrained(folder)
    make_estimator(folder / "latency_estimator", scope)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two controllers that were not trained at all, an executor, and data."""
    register_toy_family()
    root = tmp_path_factory.mktemp("sweep")
    make_checkpoint(root / "model")
    make_data(root / "data")
    for seed in (1, 2):
        make_controller(root / f"seed{seed}", seed)
    return root


@pytest.fixture(scope="module")
def flags(world):
    return [
        *("--model_path", world / "model", "--dataset_names", world / "data", "--max_new_tokens", 2),
        *("--budget_fractions", 0.6, 1.0, "--outcomes_dir", world / "outcomes"),
    ]


def run(*arguments):
    return main(["sweep", *(str(argument) for argument in arguments)])


@pytest.fixture(scope="module")
def swept(world, flags):
    """A sweep over two seeds."""
    folder = world / "swept"
    assert run("--controller_path", world / "seed1", world / "seed2", "--output_dir", folder, *flags) == 0
    return folder


def error_of(capsys, *arguments):
    capsys.readouterr()
    assert run(*arguments) == 2
    [line] = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("joint-controller sweep: error")
    ]
    return line


def test_it_leaves_tables_and_pictures(swept, tmp_path):
    requests = read_request_table(swept / "requests.parquet")
    keys = {(row["policy"], row["seed"]) for row in requests}
    trained = {"controller", "controller, no mask"}
    assert keys == {(name, seed) for name in trained for seed in (0, 1)} | {(name, -1) for name in POLICIES - trained}
    assert len(requests) == len(keys) * 2 * SPLITS["test"]
    assert len(set(requests["image_id"])) == SPLITS["test"] / 2
    assert set(requests["question_type"]) == set(NEEDS) and set(requests["dataset"]) == {"test"}
    assert None not in requests["upper_latency_ms"][:] and set(requests["measured_ms"]) == {None}
    summary = Dataset.from_parquet(str(swept / "sweep.parquet"), cache_dir=str(tmp_path / "cache"))
    assert set(summary["dataset"]) == {"all", "test"}
    for row in rows_of(summary):
        assert row["num_seeds"] == (2 if row["policy"] in trained else 1)
        assert row["num_samples"] == SPLITS["test"] and row["num_images"] == SPLITS["test"] / 2
        if row["policy"] in ("controller", "fits", "per question type"):
            assert row["violations"] == 0.0
    content = json.loads((swept / "sweep.json").read_text())
    assert content["baseline"] == "static" and [one["budget_fraction"] for one in content["budgets"]] == [0.6, 1.0]
    assert content["rows"] == summary.to_list()
    text = (swept / "sweep.md").read_text()
    assert "# Policies by latency budget" in text and "## All data sets" in text and "## test" in text
    assert text.count("| per question type |") == 4
    assert list(swept.glob("*.png"))


def test_a_finished_sweep_is_not_run_again(world, flags, swept, tmp_path, capsys, monkeypatch):
    folder = shutil.copytree(swept, tmp_path / "again")
    (folder / "sweep.json").unlink()
    monkeypatch.setattr("joint_controller.scripts.sweep.load_executor_from", None)
    assert run("--controller_path", world / "seed1", world / "seed2", "--output_dir", folder, *flags) == 0
    assert "is there already: nothing is answered again" in " ".join(capsys.readouterr().out.split())
    assert (folder / "sweep.json").read_text() == (swept / "sweep.json").read_text()


def test_an_interrupted_sweep_goes_on(world, flags, swept, tmp_path, monkeypatch):
    folder = shutil.copytree(swept, tmp_path / "again")
    (folder / "requests.parquet").unlink()
    monkeypatch.setattr(ToyExecutor, "run", None)  # all outcomes are known
    assert run("--controller_path", world / "seed1", world / "seed2", "--output_dir", folder, *flags) == 0
    tables = [read_request_table(one / "requests.parquet").to_list() for one in (folder, swept)]
    assert tables[0] == tables[1]


def test_the_folder_of_another_sweep_is_refused(world, flags, swept, tmp_path, capsys):
    controllers = ("--controller_path", world / "seed1", world / "seed2", "--output_dir", swept)
    assert "holds another run: its `seed` is 42, now it is 3." in error_of(capsys, *controllers, *flags, "--seed", 3)
    assert "its `controllers` is" in error_of(capsys, *controllers[:2], *controllers[3:], *flags)
    folder = shutil.copytree(swept, tmp_path / "unknown")
    (folder / "sweep_arguments.json").write_text("{")
    assert "sweep_arguments.json' cannot be read" in error_of(capsys, *controllers[:4], folder, *flags)
    (folder / "sweep_arguments.json").unlink()
    assert "holds another run (requests.parquet)" in error_of(capsys, *controllers[:4], folder, *flags)
    (tmp_path / "file").write_text("")
    assert "is a file: name a folder" in error_of(capsys, *controllers[:4], tmp_path / "file", *flags)


def test_the_ceiling_answers_everything_and_is_the_best(world, flags, tmp_path, capsys):
    arguments = ("--controller_path", world / "seed1", "--output_dir", tmp_path / "out", *flags)
    assert run(*arguments, "--policies", "controller", "static", "ceiling") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"The ceiling answers all 20 samples at all {len(SPACE)} settings." in shown
    summary = Dataset.from_parquet(str(tmp_path / "out" / "sweep.parquet"), cache_dir=str(tmp_path / "cache"))
    assert summary["policy"][:3] == ["controller", "static", "ceiling"]
    of = {(row["policy"], row["latency_budget_ms"]): row["accuracy"] for row in rows_of(summary)}
    for (_, budget), accuracy in of.items():
        assert of["ceiling", budget] >= accuracy


def test_controllers_have_the_names_and_seeds_they_are_given(world, flags, tmp_path, capsys):
    made = [make_controller(tmp_path / f"run={seed}", seed, training_seed=seed) for seed in (5, 6)]
    named = [f"other={world / 'seed1'}", f"other={world / 'seed2'}", *made]
    arguments = ("--policies", "controller", "full", "--output_dir", tmp_path / "out", *flags)
    assert run("--controller_path", *named, *arguments) == 0
    requests = read_request_table(tmp_path / "out" / "requests.parquet")
    assert {(row["policy"], row["seed"]) for row in requests} == {
        *(("other", 0), ("other", 1), ("controller", 5), ("controller", 6), ("full", -1))
    }
    content = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert content["baseline"] is None and {row["accuracy_difference"] for row in content["rows"]} == {None}

    def refused(*paths):
        return error_of(capsys, "--controller_path", *paths, *arguments)

    assert "are both named 'controller' and were trained with the seed 5" in refused(made[0], made[0])
    assert "but 'static' is another policy: choose another name" in refused(f"static={made[0]}")
    assert "is another policy" in refused(f"tuned, no mask={made[0]}")
    assert "give a path, or `name=path`" in refused("tuned=")
    assert "`controller_path` 'nowhere' is not the folder of a controller" in refused("tuned=nowhere")
    less = make_controller(tmp_path / "less", 1, SPACE.restrict({"zoom": (4,)}))
    assert "compare controllers of one knob space" in refused(made[0], f"less={less}")
    of_model = make_controller(tmp_path / "of_model", 1, scope="model")
    assert "different scopes" in refused(made[0], f"other={of_model}")
    assert "give `latency_scope`" in refused(made[0], f"other={of_model}")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output_dir", "x"], "`--controller_path` is missing"),
        (["--controller_path", "x"], "`--output_dir` is missing"),
        (
            ["--policies", "statics"],
            "`policies` has 'statics': choose from 'controller', 'controller, no mask', 'full'",
        ),
        (["--policies", "full", "full"], "`policies` is ['full', 'full']: name one or more, each once"),
        (["--budgets_ms", "10", "10"], "`budgets_ms` is [10.0, 10.0]: give each budget once"),
        (["--budget_fractions", "0"], "`budget_fractions` is [0.0]: give one or more finite numbers above 0"),
        (["--max_static_samples", "0"], "`max_static_samples` is 0"),
        (["--guardrail_quantile", "0", "--policies", "fits"], "`policies` has 'fits', which has to know what fits"),
        (
            ["--latency_estimator_path", "fit"],
            "a sweep takes the latency estimator that the controller was trained with",
        ),
        (["--dataset_split", "train[:50%]"], "but static settings are chosen on 'train'"),
    ],
)
def test_arguments_that_make_no_sweep_are_refused(flags, message, tmp_path, capsys):
    given = [] if "is missing" in message else ["--controller_path", "any", "--output_dir", tmp_path / "out"]
    assert message in error_of(capsys, *given, *flags)
    assert list(tmp_path.iterdir()) == []


def test_without_a_quantile_what_needs_one_is_left_out(world, flags, tmp_path):
    arguments = ("--controller_path", world / "seed1", "--output_dir", tmp_path / "out", "--guardrail_quantile", 0)
    assert run(*arguments, *flags) == 0
    requests = read_request_table(tmp_path / "out" / "requests.parquet")
    left_out = {"controller", "fits", "look-up", "per question type"}
    assert set(requests["policy"]) == POLICIES - left_out and set(requests["upper_latency_ms"]) == {None}


def test_a_quantile_that_the_estimator_does_not_have_is_refused(world, flags, tmp_path, capsys):
    arguments = ("--controller_path", world / "seed1", "--output_dir", tmp_path / "out", "--guardrail_quantile", 0.9)
    assert "has no quantile 0.9 (it has ['0.95'])" in error_of(capsys, *arguments, *flags)


@pytest.mark.slow
def test_requests_are_measured_once(world, flags, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("joint_controller.request_path.StageClock", FormulaClock)
    folder = tmp_path / "out"
    policies = ("--policies", "controller", "static", "random")
    arguments = ("--controller_path", world / "seed1", "--output_dir", folder, "--measure", "true", *policies, *flags)
    assert run(*arguments) == 0
    requests = read_request_table(folder / "requests.parquet")
    for row in requests:
        assert (row["measured_ms"] is None) == (row["controller_ms"] is None) == (row["policy"] == "random")
        if row["policy"] != "random":
            assert row["controller_ms"] == (0.2 if row["policy"] == "controller" else 0.0)
            # The clock's formulas but for the image's size and the question.
            think = row["patience"] * row["helpers"]
            at_least = 0.8 + 1.0 + 2.0 + 4.0 * think + 0.5 + 0.5 * think
            assert row["measured_ms"] > at_least
    lines = (folder / "measurements.jsonl").read_text().splitlines()
    pairs = {
        (row["policy"], row["seed"], row["sample_id"], row["setting"]) for row in requests if row["policy"] != "random"
    }
    assert len(lines) == len(pairs) and {tuple(json.loads(line)[:4]) for line in lines} == pairs
    summary = Dataset.from_parquet(str(folder / "sweep.parquet"), cache_dir=str(tmp_path / "cache"))
    for row in rows_of(summary):
        assert (row["measured_p95_ms"] is None) == (row["policy"] == "random")

    # A run that was stopped in the middle of a line measures what is missing, and that one again.
    (folder / "requests.parquet").unlink()
    (folder / "measurements.jsonl").write_text("\n".join(lines[:4]) + "\n" + lines[4][:9])
    measured = []
    answer = "joint_controller.request_path.RequestPath._answer"
    original = sys.modules["joint_controller.request_path"].RequestPath._answer
    monkeypatch.setattr("joint_controller.request_path.RequestPath.warm_up", lambda self: None)
    monkeypatch.setattr(
        answer, lambda self, request, *rest: measured.append(request) or original(self, request, *rest)
    )
    assert run(*arguments) == 0
    assert len(measured) == len(lines) - 4
    assert read_request_table(folder / "requests.parquet").to_list() == requests.to_list()
    (folder / "requests.parquet").unlink()
    (folder / "measurements.jsonl").write_text("[1]\n")
    assert "line 1 of '" in error_of(capsys, *arguments)


TWO_PROCESSES = """
import sys
from toy_family import ToyExecutor, register_toy_family
from accelerate import PartialState
from joint_controller.cli import main

register_toy_family()
state = PartialState(cpu=True)
runs = []
run = ToyExecutor.run
ToyExecutor.run = lambda self, requests, *rest, **kwargs: runs.extend(requests) or run(self, requests, *rest, **kwargs)
assert main(["sweep", *sys.argv[2:]]) == 0
open(f"{sys.argv[1]}/process_{state.process_index}.txt", "w").write(str(len(runs)))
"""


@pytest.mark.slow
def test_two_processes_share_the_answers_and_leave_the_same_table(world, flags, swept, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(TWO_PROCESSES)
    arguments = ("--controller_path", world / "seed1", world / "seed2", "--output_dir", tmp_path / "out", *flags)
    arguments = [*map(str, arguments), "--outcomes_dir", str(tmp_path / "outcomes")]
    launched = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
            *(program, tmp_path, *arguments),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert launched.returncode == 0, launched.stderr
    tables = [read_request_table(folder / "requests.parquet").to_list() for folder in (tmp_path / "out", swept)]
    assert tables[0] == tables[1]
    ran = [int((tmp_path / f"process_{index}.txt").read_text()) for index in range(2)]
    distinct = {(row["sample_id"], row["setting"]) for row in tables[0]}
    assert sum(ran) == len(distinct) + SPLITS["train"] * len(SPACE)
    assert min(ran) > 0.4 * sum(ran)
    assert re.search("In .*out: requests.parquet, sweep.parquet", " ".join(launched.stdout.split()))


def test_several_processes_do_not_measure(world, flags, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(vars(PartialState()), "num_processes", 2)
    arguments = ("--controller_path", world / "seed1", "--output_dir", tmp_path / "out", "--measure", "true", *flags)
    assert "`measure` needs a machine that does nothing else, but there are 2 processes" in error_of(
        capsys, *arguments
    )
