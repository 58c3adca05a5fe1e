"""
A world of four knobs with other names over another executor family, by the commands that users run: nothing of it is known to
the package.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from safetensors.torch import load_file
from toy_family import KNOBS, NEEDS, STAGES, FormulaClock, ToyExecutor, make_checkpoint, register_toy_family

import joint_controller
from joint_controller import JointPipeline, KnobSpace
from joint_controller.cli import main
from joint_controller.evaluation.request_table import knob_columns, read_request_table
from joint_controller.evaluation.summary import rows_of
from joint_controller.executor import load_executor
from joint_controller.latency import load_profile, read_latency_estimator


pytestmark = pytest.mark.slow


SPLITS = {"train": 48, "validation": 16, "test": 24}


def make_data(folder: Path) -> Path:
    folder.mkdir()
    strings = Value("string")
    features = Features({"sample_id": strings, "image": Image(), "question": strings, "answers": List(strings)})
    for split, num_rows in SPLITS.items():
        rows = {
            "sample_id": [f"{split}/{row:04d}" for row in range(num_rows)],
            "image": [PILImage.new("RGB", (20 + row % 7 * 4, 30), (row * 37 % 256,) * 3) for row in range(num_rows)],
            "question": [f"{list(NEEDS)[row % 4]} question number {row % 5} ?" for row in range(num_rows)],
            "answers": [["yes"]] * num_rows,
        }
        Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")
    return folder


def run(*arguments) -> None:
    assert main([str(argument) for argument in arguments]) == 0, arguments


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The whole way: profile, estimator, training that was interrupted and resumed, sweep."""
    register_toy_family()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("joint_controller.request_path.StageClock", FormulaClock)
        yield make_world(tmp_path_factory)


def make_world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    model, data = make_checkpoint(root / "model"), make_data(root / "data")
    run("profile", "--model_path", model, "--output_dir", root / "profile", "--repeats", 2, "--report", "true")
    run("fit-latency", "--profile", root / "profile", "--output_dir", root / "latency")
    # fmt: off
    train = (
        "train", "--model_path", model, "--dataset_names", data, "--max_static_samples", 16, "--max_new_tokens", 2,
        "--latency_estimator_path", root / "latency", "--use_cpu", "true", "--seed", 5, "--disable_tqdm", "true",
        "--per_device_train_batch_size", 32, "--num_generations", 4, "--max_steps", 30, "--learning_rate", "5e-3",
        "--latency_budget_min_fraction", 0.6, "--latency_budget_max_fraction", 1.1, "--eval_steps", 10, "--save_steps", 10,
        "--sweep_budget_fractions", 0.6, 1.0,
    )
    # fmt: on
    run(*train, "--output_dir", root / "run")
    shutil.copytree(root / "run", root / "resumed")
    for step in (20, 30):
        shutil.rmtree(root / "resumed" / f"checkpoint-{step}")
    run(*train, "--output_dir", root / "resumed", "--resume_from_checkpoint", "true")
    # fmt: off
    run(
        "sweep", "--controller_path", root / "run", "--model_path", model, "--dataset_names", data,
        "--outcomes_dir", root / "run" / "outcomes", "--output_dir", root / "sweep", "--max_new_tokens", 2,
        "--guardrail_quantile", 0.95, "--budget_fractions", 0.6, 1.0, "--max_static_samples", 16,
    )
    # fmt: on
    return root


def test_the_package_does_not_know_its_names():
    package = Path(joint_controller.__file__).parent
    names = [ToyExecutor.model_type, *KnobSpace(KNOBS).names, "pixels", *STAGES]
    for file in package.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert not [name for name in names if re.search(rf"[\"'.`]{name}[\"'`]", text)], file


def test_profile_and_estimator_are_about_its_stages(world):
    profile = load_profile(world / "profile")
    assert {"patience", "zoom", "palette", "helpers", "pixels", "fetching_ms", "looking_ms"} <= set(
        profile.column_names
    )
    assert len(profile) == len(KnobSpace(KNOBS)) * 12
    estimator = read_latency_estimator(world / "latency")
    assert list(estimator.costs.stages) == ["overhead", "controller", *STAGES, "decode"]
    # The formulas, found again: looking, thinking and one decode step; in whole requests, the others, too.
    setting = KnobSpace(KNOBS).full
    counts = {"pixels": [3000], "prompt_tokens": [9]}
    expected = 1.0 + 0.002 * 3000 + 2.0 + 2.0 * (4.0 + 0.2 * 9) + 0.5 + 0.5 * 2.0
    of_model = read_latency_estimator(world / "latency", "model")
    assert of_model.predict_latency_ms([setting], counts, [2]).item() == pytest.approx(expected, rel=0.02)
    whole = expected + 0.1 + 0.2 + 0.5
    assert estimator.predict_latency_ms([setting], counts, [2]).item() == pytest.approx(whole, rel=0.02)
    assert (world / "profile" / "README.md").is_file() and list((world / "profile").glob("*.png"))


def test_training_learns_and_its_card_and_outcomes_have_its_knobs(world):
    log = [json.loads(line.split(" ", 2)[2]) for line in _log_lines(world / "run")]
    rewards = [entry["eval_reward"] for entry in log if "eval_reward" in entry]
    assert len(rewards) == 3 and max(rewards) > rewards[0] - 1e-9
    assert any("eval_knobs/palette=gray" in entry for entry in log)
    card = (world / "run" / "README.md").read_text()
    assert "Sets 4 knobs" in card and "| `palette` | gray, color | stage 1 | channels of the image |" in card
    outcomes = Dataset.from_parquet(
        [str(file) for file in (world / "run" / "outcomes").glob("*.parquet")], cache_dir=str(world / "cache")
    )
    assert {"patience", "zoom", "palette", "helpers", "pixels", "prompt_tokens"} <= set(outcomes.column_names)
    keys = list(zip(*(outcomes[name] for name in ("sample_id", *KnobSpace(KNOBS).names)), strict=True))
    assert len(keys) == len(set(keys))


def _log_lines(folder):
    return [line for line in (folder / "joint_controller_training.log").read_text().splitlines() if '{"step"' in line]


def test_a_run_that_was_resumed_ends_with_the_same_controller(world):
    whole, resumed = (load_file(world / run / "model.safetensors") for run in ("run", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_sweep_has_the_controller_within_budgets(world):
    table = Dataset.from_parquet(str(world / "sweep" / "sweep.parquet"), cache_dir=str(world / "cache"))
    assert {"controller", "controller, no mask", "static", "fits", "look-up"} < set(table["policy"])
    assert [row["violations"] for row in rows_of(table, policies=["controller"])] == [0.0, 0.0]
    requests = read_request_table(world / "sweep" / "requests.parquet")
    assert knob_columns(requests) == list(KnobSpace(KNOBS).names)


def test_the_pipeline_answers_within_the_budget(world):
    pipeline = JointPipeline.from_pretrained(
        world / "run", model_path=world / "model", check_latency=False, adapt=False
    )
    image = PILImage.new("RGB", (40, 30), "red")
    full_ms = pipeline(image, "easy question ?", latency_budget_ms=1000.0).latency_ms
    for budget in (9.0, 12.0, 20.0, full_ms):
        result = pipeline(image, "easy question ?", latency_budget_ms=budget)
        assert result.fits_budget and result.latency_ms <= budget
        assert result.answer == "yes" and set(result.setting) == {"patience", "zoom", "palette", "helpers"}
    assert not pipeline(image, "easy question ?", latency_budget_ms=0.1).fits_budget


def test_knob_values_are_chosen_by_their_names(world):
    executor = load_executor(world / "model", knob_values={"zoom": ["1", "4"], "patience": [0.5]})
    assert isinstance(executor, ToyExecutor)
    assert executor.knob_space.values["zoom"] == (1, 4) and executor.knob_space.values["patience"] == (0.5,)
    with pytest.raises(
        ValueError, match="there is no knob `zooom`: the executor has patience, zoom, palette, helpers"
    ):
        load_executor(world / "model", knob_values={"zooom": ["1"]})
    assert load_executor("random:toy-tiny").model_type == "toy_thinker"
