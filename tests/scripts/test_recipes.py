"""The recipes as shipped, on the embedded executor, with fewer steps and samples."""

from pathlib import Path

import pytest
from datasets import Dataset

from joint_controller import JointControllerModel, LatencyEstimatorModel
from joint_controller.cli import main
from joint_controller.evaluation.summary import rows_of


RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("recipes") / "easy_vqa"
    sizes = {
        "max_train_samples": 12,
        "max_eval_samples": 4,
        "max_test_samples": 4,
        "max_static_samples": 2,
        "max_steps": 16,
        "eval_steps": 8,
        "save_steps": 8,
        "per_device_train_batch_size": 8,
        "output_dir": output_dir,
    }
    flags = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    assert main(["train", "--config", str(RECIPES / "easy_vqa" / "train.yaml"), *flags]) == 0
    return output_dir


def test_train(trained):
    controller = JointControllerModel.from_pretrained(trained)
    assert controller.config.question_size == 192
    sweep = Dataset.from_parquet(str(trained / "sweep.parquet"))
    assert [round(fraction, 2) for fraction in sweep.unique("budget_fraction")] == [0.35, 0.5, 0.7, 0.85, 1.0]


@pytest.mark.slow
def test_sweep(trained, tmp_path, capsys):
    flags = ["--controller_path", trained, "--outcomes_dir", trained / "outcomes", "--output_dir", tmp_path]
    flags += ["--max_samples", 4, "--max_static_samples", 4]
    recipe = str(RECIPES / "easy_vqa" / "sweep.yaml")
    assert main(["sweep", "--config", recipe, *map(str, flags)]) == 0
    sweep = Dataset.from_parquet(str(tmp_path / "sweep.parquet"))
    policies = ["controller", "controller, no mask", "full", "static", "static by reward", "fits", "look-up"]
    policies += ["per question type", "random"]
    assert len(rows_of(sweep)) == 8 * len(policies) and {row["num_samples"] for row in rows_of(sweep)} == {4}
    assert [row["policy"] for row in rows_of(sweep)][: len(policies)] == policies
    shown = capsys.readouterr().out
    assert "static by reward" in shown and "latencies of whole requests" in " ".join(shown.split())
    of_model = [*map(str, flags), "--output_dir", str(tmp_path / "model"), "--latency_scope", "model"]
    assert main(["sweep", "--config", recipe, *of_model]) == 0
    assert "latencies of the model alone" in " ".join(capsys.readouterr().out.split())
    less = Dataset.from_parquet(str(tmp_path / "model" / "sweep.parquet"))
    of_full = [[row["latency_ms"] for row in table if row["policy"] == "full"] for table in (sweep, less)]
    assert all(model < whole for whole, model in zip(*of_full, strict=True))
    assert main(["sweep", "--config", recipe, *map(str, flags), "--max_samples", "3"]) == 2
    assert "holds another run: its `max_samples` is 4, now it is 3" in " ".join(capsys.readouterr().err.split())
    flags[-5:-4] = [tmp_path / "another"]
    assert main(["sweep", "--config", recipe, *map(str, flags), "--guardrail_quantile", "0.6"]) == 2
    assert "has no quantile 0.6 (it has ['0.9', '0.95', '0.99'])" in capsys.readouterr().err.splitlines()[-1]


def test_sweep_without_a_controller_is_refused(capsys, tmp_path):
    assert main(["sweep", "--controller_path", "no-such-folder", "--output_dir", str(tmp_path / "sweep")]) == 2
    assert "`controller_path` 'no-such-folder' is not the folder of a controller" in capsys.readouterr().err
    assert main(["sweep", "--output_dir", str(tmp_path / "sweep")]) == 2
    assert "`--controller_path` is missing" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["embedded_executor", "molmoe_1b"])
@pytest.mark.slow
def test_profile_and_fit_latency(tmp_path, name):
    """That of MolmoE-1B on the embedded executor: its own needs a GPU."""
    sizes = {"model_path": "embedded", "num_inputs": 4, "num_measurements": 32, "num_threads": 1}
    sizes |= {"repeats": 1, "decode_steps": 1, "output_dir": tmp_path / "profile"}
    flags = [part for field, value in sizes.items() for part in (f"--{field}", str(value))]
    assert main(["profile", "--config", str(RECIPES / name / "profile.yaml"), *flags]) == 0
    assert (tmp_path / "profile" / "knobs.png").exists()
    assert (tmp_path / "profile" / "repeat" / "profile.parquet").exists() == (name == "molmoe_1b")
    flags = [
        "--profile",
        str(tmp_path / "profile"),
        "--output_dir",
        str(tmp_path / "latency"),
        "--num_units",
        "4",
        "--num_folds",
        "2",
    ]
    assert main(["fit-latency", "--config", str(RECIPES / name / "fit_latency.yaml"), *flags]) == 0
    estimator = LatencyEstimatorModel.from_pretrained(tmp_path / "latency")
    assert estimator.config.fitted_knobs["num_blocks"] == [4, 5, 6, 8]


def test_every_recipe_is_run_by_a_test():
    """
    `train.yaml` of the executor is run in test_train_executor.py, `ablate.yaml` in test_ablate.py, those of blocks in test_importance_command.py, `grpo.yaml` of MolmoE-1B
    in test_official_files.py.
    """
    assert {str(path.relative_to(RECIPES)) for path in RECIPES.rglob("*.yaml")} == {
        "easy_vqa/ablate.yaml",
        "easy_vqa/sweep.yaml",
        "easy_vqa/train.yaml",
        "embedded_executor/fit_latency.yaml",
        "embedded_executor/importance.yaml",
        "embedded_executor/profile.yaml",
        "embedded_executor/search_blocks.yaml",
        "embedded_executor/train.yaml",
        "molmoe_1b/fit_latency.yaml",
        "molmoe_1b/grpo.yaml",
        "molmoe_1b/profile.yaml",
    }
