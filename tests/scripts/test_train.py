"""`joint-controller train`, from the command line to the files it leaves."""

import io
import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers.trainer
import yaml
from datasets import Dataset, Features, List, Value
from PIL import Image
from safetensors.torch import load_file, save_file

from joint_controller import (
    JointControllerModel,
    JointGRPOTrainer,
    JointPipeline,
    Knob,
    KnobSetting,
    KnobSpace,
    LatencyEstimatorConfig,
    LatencyEstimatorModel,
)
from joint_controller.cli import main
from joint_controller.evaluation.summary import SWEEP_FILE, rows_of
from joint_controller.executor import executor_shape
from joint_controller.scripts.train import LOG_FILE, RESULTS_FILE
from joint_controller.scripts.training_console import TrainingConsole, likeliest_by_budget


ROWS = 24
FEATURES = Features(
    {
        "sample_id": Value("string"),
        "image": {"bytes": Value("binary"), "path": Value("string")},
        "question": Value("string"),
        "answers": List(Value("string")),
    }
)


def noise_rows(split):
    generator = np.random.default_rng(len(split))
    rows = []
    for row in range(ROWS):
        buffer = io.BytesIO()
        Image.fromarray(generator.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(buffer, format="PNG")
        rows.append(
            {
                "sample_id": f"{split}/{row}",
                "image": {"bytes": buffer.getvalue(), "path": None},
                "question": ["what color is the star?", "is the circle left of the star?"][row % 2],
                "answers": ["red"],
            }
        )
    return rows


def write_data(folder, change=None):
    """Parquet files of three splits; `change` alters the rows of the training split."""
    folder.mkdir()
    for split in ("train", "validation", "test"):
        rows = noise_rows(split)
        features = FEATURES
        if change is not None and split == "train":
            rows, features = change(rows)
        Dataset.from_list(rows, features=features).to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_molmo, tiny_processor):
    """An executor with random weights, an estimator of its latency, and data."""
    root = tmp_path_factory.mktemp("train")
    tiny_molmo.save_pretrained(root / "executor")
    tiny_processor.save_pretrained(root / "executor")
    executor_type, shape = executor_shape(root / "executor")
    estimator = LatencyEstimatorModel(
        LatencyEstimatorConfig(
            executor_type=executor_type,
            fitted_knobs={"tier": ["low", "medium", "high"], "top_k": [1, 4], "num_blocks": [1, 4]},
            executor_shape=shape,
            upper_quantiles={"request": {"0.95": 1.5}},
        )
    )
    # 1 ms a view, 1 ms a block, 1 ms a block and expert; next to nothing for the rest of a request.
    features = {"vision": (1, 1.0), "llm_prefill": (1, 1.0), "decode": (2, 1.0)}
    for stage in estimator.costs.stages:
        feature, ms = features.get(stage, (0, 1e-6))
        coefficients, units = (torch.zeros_like(values) for values in estimator.stage_parameters(stage))
        coefficients[feature] = ms
        units[:, :-1] = 1.0  # steps of no height: the factor is 1
        estimator.set_stage_parameters(stage, coefficients, units)
    estimator.save_pretrained(root / "estimator")
    write_data(root / "data")
    return root


@pytest.fixture
def recipe(folders, tmp_path):
    """Writes a recipe with the given changes and returns its path; the run goes to `tmp_path / "run"`."""

    def write(**changes):
        fields = {
            "model_path": str(folders / "executor"),
            "latency_estimator_path": str(folders / "estimator"),
            "dataset_names": [str(folders / "data")],
            "output_dir": str(tmp_path / "run"),
            "knob_values": {"top_k": [1, 4], "num_blocks": [2, 4]},
            "max_new_tokens": 2,
            "max_static_samples": 4,
            "precompute_outcomes": True,
            "latency_budget_min_ms": 10.0,
            "latency_budget_max_ms": 40.0,
            "per_device_train_batch_size": 16,
            "num_generations": 4,
            "max_steps": 4,
            "eval_on_start": True,
            "eval_steps": 2,
            "save_steps": 2,
            "logging_steps": 1,
            "sweep_budget_fractions": [0.7, 1.0],
            **changes,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({name: value for name, value in fields.items() if value is not None}))
        return str(path)

    return write


def error_of(capsys, argv):
    """The one line of an error, from a command that must fail."""
    capsys.readouterr()
    assert main(argv) == 2
    lines = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("joint-controller train: error:")
    ]
    assert len(lines) == 1
    return lines[0]


def test_a_run_leaves_controller_log_outcomes_and_sweep(recipe, tmp_path, capsys):
    assert main(["train", "--config", recipe()]) == 0
    run = tmp_path / "run"
    controller = JointControllerModel.from_pretrained(run)
    assert controller.knob_space.values["num_blocks"] == (2, 4)
    best = max(
        json.loads((checkpoint / "trainer_state.json").read_text())["best_global_step"]
        for checkpoint in run.glob("checkpoint-*")
    )
    for name, value in load_file(run / f"checkpoint-{best}" / "model.safetensors").items():
        assert torch.equal(controller.state_dict()[name], value)

    log = (run / LOG_FILE).read_text()
    entries = [json.loads(line[line.index("{") :]) for line in log.splitlines() if line.endswith("}")]
    assert [entry["step"] for entry in entries if "eval_reward" in entry] == [0, 2, 4]
    for entry in entries:
        if "eval_reward" in entry:
            assert {"eval_accuracy", "eval_latency_ms", "eval_budget_violation_rate"} <= entry.keys()
    assert any("rewards/accuracy_in_time_reward/mean" in entry for entry in entries)

    sweep = Dataset.from_parquet(str(run / SWEEP_FILE))
    policies = {"controller", "full", "static", "static by reward", "fits"}
    # All data sets together, which is one here, and each.
    assert set(sweep["policy"]) == policies and len(sweep) == 2 * 2 * len(policies)
    assert len(Dataset.from_parquet(str(run / "requests.parquet"))) == 2 * ROWS * len(policies)
    assert json.loads((run / "sweep.json").read_text())["baseline"] == "static"
    results = json.loads((run / RESULTS_FILE).read_text())
    assert set(results["eval_reward_mean_over_budgets"]) == set(sweep["policy"])
    card = (run / "README.md").read_text()
    assert "| static, equally accurate | saved |" in card and "| fits |" in card
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", card)
    assert pictures and all((run / name).stat().st_size > 1000 for name in pictures)
    shown = capsys.readouterr().out
    assert "static" in shown and " ± " in shown and "violations" in shown and "fits  " not in shown
    outcomes = Dataset.from_parquet([str(path) for path in (run / "outcomes").glob("*.parquet")])
    keys = set(zip(outcomes["sample_id"], outcomes["tier"], outcomes["top_k"], outcomes["num_blocks"], strict=True))
    assert len(keys) == len(outcomes)
    assert sum(sample_id.startswith("train/") for sample_id in outcomes["sample_id"]) == ROWS * 3 * 2 * 2


@pytest.mark.slow
def test_a_finished_run_is_not_overwritten_and_resuming_it_runs_nothing_again(recipe, tmp_path, capsys):
    path = recipe()
    assert main(["train", "--config", path]) == 0
    before = load_file(tmp_path / "run" / "model.safetensors")
    assert "holds another run" in error_of(capsys, ["train", "--config", path])
    assert main(["train", "--config", path, "--resume_from_checkpoint", "true"]) == 0
    after = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "run" / RESULTS_FILE).read_text())["num_executed"] == 0


@pytest.mark.slow
def test_two_runs_with_one_seed_give_the_same_numbers(recipe, tmp_path):
    runs = []
    for name in ("one", "two"):
        assert main(["train", "--config", recipe(output_dir=str(tmp_path / name))]) == 0
        runs.append((load_file(tmp_path / name / "model.safetensors"), (tmp_path / name / RESULTS_FILE).read_text()))
    assert all(torch.equal(runs[0][0][key], runs[1][0][key]) for key in runs[0][0])
    assert runs[0][1] == runs[1][1]


@pytest.mark.slow
def test_a_run_on_a_stream_ends_as_one_that_was_interrupted(recipe, folders, tmp_path):
    data = write_data(tmp_path / "broken", with_a_corrupt_image)
    changes = {
        "dataset_names": [str(data)],
        "streaming": True,
        "skip_bad_rows": True,
        "precompute_outcomes": None,
        "max_steps": 32,
        "eval_steps": 16,
        "save_steps": 16,
    }
    path = recipe(**changes)
    assert main(["train", "--config", path]) == 0
    run = tmp_path / "run"
    log = (run / LOG_FILE).read_text()
    assert "a stream to train" in log
    assert f"Bad rows left out: 1 of '{data}' (train)" in log
    [listed] = [json.loads(line) for line in (run / "skipped_rows.jsonl").read_text().splitlines()]
    assert (listed["row"], listed["sample_id"], listed["column"]) == (17, "train/17", "image")
    whole = load_file(run / "model.safetensors")
    for name in ("model.safetensors", "config.json"):
        (run / name).unlink()
    shutil.rmtree(run / "checkpoint-32")
    assert main(["train", "--config", path, "--resume_from_checkpoint", "true"]) == 0
    resumed = load_file(run / "model.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert len((run / "skipped_rows.jsonl").read_text().splitlines()) == 1


def short_answer(answer, **kwargs):
    """A reward function of the user's own, which reads a column that the package's do not."""
    return [1.0 / (1 + len(one)) for one in answer]


@pytest.mark.slow
def test_the_sweep_takes_the_rewards_and_the_latencies_that_the_controller_was_trained_with(recipe, folders, tmp_path):
    """Not the default reward, nor another estimator."""
    rewards = {"reward_funcs": [f"{__name__}.short_answer", "accuracy_reward"], "reward_weights": [2.0, 0.25]}
    assert main(["train", "--config", recipe(**rewards)]) == 0
    run = tmp_path / "run"
    trained = Dataset.from_parquet(str(run / SWEEP_FILE), cache_dir=str(tmp_path / "cache"))
    # fmt: off
    swept = [
        "sweep", "--controller_path", run, "--model_path", folders / "executor", "--dataset_names", folders / "data",
        "--outcomes_dir", run / "outcomes", "--max_new_tokens", 2, "--max_static_samples", 4, "--output_dir", tmp_path / "sweep",
        "--budgets_ms", *sorted(set(trained["latency_budget_ms"])),
    ]
    # fmt: on
    assert main([str(one) for one in swept]) == 0
    again = Dataset.from_parquet(str(tmp_path / "sweep" / SWEEP_FILE), cache_dir=str(tmp_path / "cache"))
    expected, found = (rows_of(table, policies=["controller", "full"]) for table in (trained, again))
    assert len(found) == 4
    for row, other in zip(expected, found, strict=True):
        assert (row["policy"], row["accuracy"], row["latency_ms"]) == (
            other["policy"],
            other["accuracy"],
            other["latency_ms"],
        )
        assert row["reward"] == pytest.approx(other["reward"])
        assert row["reward"] > 0.25 * row["accuracy"]  # short answers count


@pytest.mark.slow
def test_a_pushed_controller_is_finished_when_it_is_pushed(recipe, folders, tmp_path, monkeypatch):
    """What would go to the Hub has its card with the results, and its latencies; nothing is pushed before."""
    pushed = []

    def upload(**kwargs):
        folder = tmp_path / "run"
        pushed.append(((folder / "README.md").read_text(), (folder / "latency_estimator" / "config.json").is_file()))

    monkeypatch.setattr(
        JointGRPOTrainer, "init_hf_repo", lambda self, **kwargs: setattr(self, "hub_model_id", "me/mine")
    )
    # Releases of transformers upload by a function of their own, or by that of `huggingface_hub`.
    monkeypatch.setattr(transformers.trainer, "upload_folder", upload, raising=False)
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: SimpleNamespace(upload_folder=upload), raising=False)
    assert main(["train", "--config", recipe(push_to_hub=True, hub_model_id="me/mine", hub_strategy="end")]) == 0
    [(card, has_latencies)] = pushed
    assert has_latencies and "| `num_blocks` | 2, 4 | stage 2 |" in card and "| static |" in card
    assert "text-generation" not in card and "JointPipeline.from_pretrained" in card
    assert JointPipeline.from_pretrained(tmp_path / "run", model_path=folders / "executor")


@pytest.mark.slow
def test_a_pipe_gets_one_line_for_each_logged_step_and_evaluation(recipe, capsys):
    assert main(["train", "--config", recipe()]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines if "reward" in line and line.startswith("step")] == [
        *("step 0/4", "step 1/4", "step 2/4", "step 2/4", "step 3/4", "step 4/4", "step 4/4")
    ]
    evaluations = [line for line in lines if "evaluation:" in line]
    assert len(evaluations) == 3
    number = r"-?\d+\.\d+"
    knobs = r"(low|medium|high)·[14]·[24]"
    for line in evaluations:
        assert re.search(
            rf"reward {number}  accuracy {number}  latency {number} ms  violations {number}%  entropy {number}  "
            rf"tight {knobs}, middle {knobs}, ample {knobs}$",
            line,
        )
    assert not any(line.startswith("{") or "'loss'" in line for line in lines)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_one_line_of_progress_and_a_row_for_each_evaluation(monkeypatch):
    terminal, rows = Terminal(), io.StringIO()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr("sys.stdout", rows)
    space = KnobSpace([Knob("tier", ("low", "high"), stage=1), Knob("depth", (1, 2), stage=2)])
    decisions = [(float(budget), space.full if budget > 3 else space.cheapest) for budget in range(6)]
    console = TrainingConsole(SimpleNamespace(knob_space=space, evaluation_decisions=decisions))
    args = SimpleNamespace(disable_tqdm=False)
    state = SimpleNamespace(is_world_process_zero=True, max_steps=4, global_step=0)
    metrics = {"reward": 0.5, "accuracy": 0.75, "latency_ms": 12.34, "budget_violation_rate": 0.125, "entropy": 1.5}
    console.on_train_begin(args, state, None)
    console.on_evaluate(args, state, None, metrics={f"eval_{name}": value for name, value in metrics.items()})
    state.global_step = 2
    console.on_step_end(args, state, None)
    console.on_log(args, state, None, logs=metrics)
    console.on_evaluate(args, state, None, metrics={f"eval_{name}": value for name, value in metrics.items()})
    console.on_train_end(args, state, None)
    assert "2/4" in terminal.getvalue() and "accuracy 0.750, latency 12.3 ms, violations 12.5%" in terminal.getvalue()
    table = [line.split() for line in rows.getvalue().splitlines() if line.strip() and "Last columns" not in line]
    assert table[0][:3] == ["step", "reward", "accuracy"] and len(table) == 3
    values = ["0.500", "0.750", "12.3", "ms", "12.5%", "1.50", "low·1", "low·1", "high·2"]
    assert table[1:] == [["0", *values], ["2", *values]]


def test_bars_of_libraries_are_not_shown_for_work_of_moments():
    """tqdm reads the variable when it is imported: it must be set before."""
    code = "import joint_controller.scripts, io; from tqdm import tqdm; print(tqdm(total=1, file=io.StringIO()).delay)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(shown.stdout) == 2


def test_a_sweep_on_the_samples_that_static_settings_are_chosen_on_is_refused(tmp_path, capsys):
    flags = ["--controller_path", "any", "--output_dir", str(tmp_path / "sweep"), "--dataset_split", "train[:50%]"]
    assert main(["sweep", *flags]) == 2
    assert "`dataset_split` is 'train[:50%]', but static settings are chosen on 'train'" in capsys.readouterr().err


def test_likeliest_knobs_are_those_of_each_third_of_the_budgets():
    def setting(number):
        return KnobSetting(tier="low" if number < 4 else "high", depth=number % 3)

    decisions = [(float(budget), setting(budget)) for budget in (8, 1, 2, 6, 0, 3, 4, 7, 5)]
    # Budgets 0 to 2, 3 to 5, 6 to 8.
    assert [one.split("·")[0] for one in likeliest_by_budget(decisions)] == ["low", "high", "high"]
    assert likeliest_by_budget([]) == ["-", "-", "-"]


# --- what is refused ----------------------------------------------------------------------------------------------


def test_a_missing_model_folder(recipe, capsys, tmp_path):
    message = error_of(capsys, ["train", "--config", recipe(model_path="/no/such/folder")])
    assert "'/no/such/folder' does not exist" in message
    assert not (tmp_path / "run").exists()


def test_a_folder_without_a_tensor(recipe, folders, capsys, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(folders / "executor", damaged)
    tensors = load_file(damaged / "model.safetensors")
    del tensors["model.vision_backbone.pad_embed"]
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    message = error_of(capsys, ["train", "--config", recipe(model_path=str(damaged))])
    assert "missing tensors: " in message and "pad_embed" in message and str(damaged) in message


def test_an_unknown_field(recipe, capsys):
    path = recipe(lerning_rate=1e-3)
    message = error_of(capsys, ["train", "--config", path])
    assert "unknown field `lerning_rate`" in message and path in message and "`learning_rate`" in message
    assert "unknown flag `--lerning_rate`" in error_of(capsys, ["train", "--config", recipe(), "--lerning_rate", "1"])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"top_k": [4, 9]}, "knob `top_k` has the value 9 but the executor has 8 experts"),
        ({"num_blocks": [4, 5]}, "knob `num_blocks` has the value 5 but the executor has 4 blocks"),
        ({"tier": ["low", "huge"]}, "huge"),
        ({"depth": [1]}, "there is no knob `depth`"),
        ({"top_k": [1, 8]}, "`top_k` is 8 but the latency estimator was fitted on 1 to 4"),
    ],
)
def test_knob_values_outside_the_checkpoint(recipe, capsys, change, expected):
    assert expected in error_of(capsys, ["train", "--config", recipe(knob_values=change)])


def without_questions(rows):
    features = Features({name: feature for name, feature in FEATURES.items() if name != "question"})
    return [{name: value for name, value in row.items() if name != "question"} for row in rows], features


def with_a_corrupt_image(rows):
    rows[17]["image"]["bytes"] = rows[17]["image"]["bytes"][:60]
    return rows, FEATURES


def without_answers(rows):
    rows[5]["answers"] = []
    return rows, FEATURES


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (without_questions, ["no column 'question'"]),
        (with_a_corrupt_image, ["row 17", "'image'", "cannot be decoded"]),
        (without_answers, ["row 5", "'answers'"]),
    ],
)
def test_data_that_cannot_be_used(recipe, capsys, tmp_path, change, expected):
    data = write_data(tmp_path / "broken", change)
    message = error_of(capsys, ["train", "--config", recipe(dataset_names=[str(data)])])
    assert str(data) in message
    assert all(part in message for part in expected)


def test_a_budget_range_that_no_setting_can_meet(recipe, capsys):
    message = error_of(capsys, ["train", "--config", recipe(latency_budget_min_ms=1.0, latency_budget_max_ms=2.0)])
    assert "no setting can meet it" in message and "latency_budget_min_ms" in message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"max_steps": None}, "set `max_steps`"),
        ({"precompute_outcomes": True}, "`precompute_outcomes` answers all training samples"),
    ],
)
def test_what_cannot_be_done_on_a_stream(recipe, capsys, tmp_path, change, expected):
    path = recipe(**{"streaming": True, "precompute_outcomes": None, **change})
    assert expected in error_of(capsys, ["train", "--config", path])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"max_static_samples": 0}, "`max_static_samples` is 0: give 1 or more"),
        ({"max_static_samples": -3}, "`max_static_samples` is -3"),
        ({"sweep_budget_fractions": []}, "`sweep_budget_fractions` is []: give one or more"),
        ({"sweep_budget_fractions": [0.5, float("nan")]}, "`sweep_budget_fractions` in recipe"),
        ({"sweep_budget_fractions": [0.0]}, "`sweep_budget_fractions` is [0.0]"),
        ({"reward_weights": [1.0, float("nan"), 1.0, 1.0, 1.0]}, "`reward_weights` in recipe"),
        ({"temperature": 0.0}, "`temperature` is 0.0"),
        ({"latency_budget_max_ms": float("inf")}, "which must be finite"),
        ({"reward_funcs": ["acuracy_reward"]}, "there is no reward function 'acuracy_reward'"),
        ({"test_split": "train"}, "`train_split` 'train' and `test_split` 'train' share images"),
    ],
)
def test_what_would_fail_after_training_is_refused_before(recipe, capsys, tmp_path, change, expected):
    assert expected in error_of(capsys, ["train", "--config", recipe(**change)])
    assert not (tmp_path / "run").exists()


def test_an_executor_without_a_latency_estimator(recipe, capsys):
    message = error_of(capsys, ["train", "--config", recipe(latency_estimator_path=None)])
    assert "--latency_estimator_path fit" in message


def test_an_estimator_of_another_executor(recipe, capsys, folders, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folders / "estimator", other)
    config = json.loads((other / "config.json").read_text())
    config["executor_shape"]["text_config.hidden_size"] = 2048
    (other / "config.json").write_text(json.dumps(config))
    message = error_of(capsys, ["train", "--config", recipe(latency_estimator_path=str(other))])
    assert "text_config.hidden_size 2048 there, 32 here" in message
