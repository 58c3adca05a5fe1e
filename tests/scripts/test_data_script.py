"""What a recipe trains on, shown by the command: on the recipe as shipped, and on data with every difficulty."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from joint_controller.cli import main
from joint_controller.data import FEATURES
from joint_controller.data.scenes import IMAGE_SIZES
from joint_controller.executor import embedded_executor_path


RECIPE = Path(__file__).parents[2] / "recipes" / "easy_vqa" / "train.yaml"


def run(output_dir, *flags) -> int:
    return main(["data", "--config", str(RECIPE), "--output_dir", str(output_dir), *map(str, flags)])


def report_of(folder):
    return json.loads((folder / "data_report.json").read_text(encoding="utf-8"))


def test_the_recipe_as_shipped_with_fewer_samples(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    flags = ["--max_train_samples", 40, "--max_eval_samples", 8, "--max_test_samples", 8]
    assert run(tmp_path, *flags) == 0
    report = report_of(tmp_path)
    numbers = {(part["name"], part["role"]): part["num_rows"] for part in report["parts"]}
    assert numbers == {
        (name, role): share * rows
        for name, share in (("easy_vqa", 1), ("scenes", 3))
        for role, rows in (("train", 10), ("validation", 2), ("test", 2))
    }
    scenes = next(part for part in report["parts"] if (part["name"], part["role"]) == ("scenes", "train"))
    assert set(scenes["image_sizes"]) <= {f"{width}x{height}" for width, height in IMAGE_SIZES}
    assert scenes["num_images"] == 10 and sum(scenes["image_sizes"].values()) == 30  # three questions a scene
    inputs = [scenes["inputs"][f"tier={tier}"] for tier in ("low", "medium", "high")]
    assert [numbers["counts"]["num_views"]["max"] for numbers in inputs] == [3, 9, 13]  # with the view of the whole
    for numbers in inputs:
        counts = numbers["counts"]
        assert counts["vision_tokens"]["min"] + counts["text_tokens"]["min"] == numbers["prompt_tokens"]["min"]
    assert report["knob_space"]["knobs"][0]["name"] == "tier"
    assert len(report["examples"]) == 5 and all(
        example["sample_id"].split("/")[1] == "train" for example in report["examples"]
    )
    with Image.open(tmp_path / "contact_sheet.png") as sheet:
        assert sheet.width > 1600 and sheet.height > 5 * 300  # five rows of five
    shown = capsys.readouterr().out
    for title in ("Samples", "Images by area", "What the executor is given", "Answers", "Question types"):
        assert title in shown
    assert "5 training samples" in shown and "No prompt is longer than the 1,022 tokens" in shown
    markdown = (tmp_path / "data_report.md").read_text(encoding="utf-8")
    assert "| easy_vqa | train | 10 |" in markdown and "| easy_vqa | train | num_views | 2 | 5 | 10 |" in markdown
    assert "![Training samples](contact_sheet.png)" in markdown


def own_rows(num_rows: int) -> list[dict]:
    noise = np.random.default_rng(0).integers(0, 256, (num_rows, 30, 40, 3), dtype=np.uint8)
    return [
        {
            "sample_id": f"own-{row}",
            "image": Image.fromarray(noise[row]),
            "question": "how many stars | circles are there ?",
            "answers": ["2", "two", "2"],
            "style": "tally_qa",
            "metric": "exact_count",
            "question_type": "[red]count[/red]",
        }
        for row in range(num_rows)
    ]


def save(folder, train_rows) -> Path:
    for split, rows in (("train", train_rows), ("validation", own_rows(3)), ("test", own_rows(3))):
        Dataset.from_list(rows, features=FEATURES).to_parquet(folder / f"{split}.parquet")
    return folder


def test_rows_of_ones_own_with_bad_and_too_long_ones(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    rows = own_rows(6)
    rows[1]["question"] = "star " * 1100
    rows[2]["answers"] = []
    rows[3]["image"] = Image.new("RGBA", (40, 30), (255, 0, 0, 0))  # what is hidden is red, what is seen is white
    folder = save(tmp_path, rows)
    output_dir = tmp_path / "report"
    own = ["--dataset_names", folder, "--dataset_weights", 1]
    assert run(output_dir, "--dataset_names", folder) == 2
    assert "give one weight for each (`--dataset_weights`" in capsys.readouterr().err
    assert run(output_dir, *own) == 2
    assert "column 'answers': there are none" in capsys.readouterr().err

    assert run(output_dir, *own, "--skip_bad_rows", "true") == 0
    report = report_of(output_dir)
    own = next(part for part in report["parts"] if (part["name"], part["role"]) == (str(folder), "train"))
    assert own["num_rows"] == 5 and own["answers"] == {"2": 5} and own["metrics"] == {"exact_count": 5}
    assert own["inputs"]["tier=low"]["too_long"] == ["own-1"]
    assert [(bad["row"], bad["column"]) for bad in report["skipped_rows"]] == [(2, "answers")]
    shown = capsys.readouterr().out
    too_long = "1, namely own-1 (tier=low, tier=medium, tier=high)"
    assert f"Prompts longer than the 1,022 tokens that leave room for an answer: {too_long}" in " ".join(shown.split())
    assert "Rows that were left out: 1 of 1" in shown
    assert "[red]count[/red] (100%)" in shown  # text of the data is not markup
    with Image.open(output_dir / "contact_sheet.png") as sheet:
        assert not (np.asarray(sheet) == (255, 0, 0)).all(axis=2).any()
    markdown = (output_dir / "data_report.md").read_text(encoding="utf-8")
    assert "how many stars \\| circles" in markdown


def test_a_stream_is_read_from_its_beginning(tmp_path, capsys):
    folder = save(tmp_path, own_rows(30))
    flags = ["--dataset_names", folder, "scenes", "--dataset_weights", 1, 3, "--streaming", "true"]
    assert (
        run(tmp_path / "report", *flags, "--max_train_samples", 40, "--max_eval_samples", 4, "--max_test_samples", 4)
        == 0
    )
    report = report_of(tmp_path / "report")
    assert [part["num_rows"] for part in report["parts"] if part["role"] == "train"] == [10, 30]
    assert "Training samples are a stream: these are its first 40." in capsys.readouterr().out


def test_no_weights_are_loaded(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(embedded_executor_path(), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    flags = ["--max_train_samples", 4, "--max_eval_samples", 4, "--max_test_samples", 4]
    flags += ["--dataset_names", "scenes", "--dataset_weights", 1]
    assert run(tmp_path / "report", "--model_path", folder, "--knob_values", "tier=low,high", *flags) == 0
    tier = report_of(tmp_path / "report")["knob_space"]["knobs"][0]
    assert (tier["values"], tier["meanings"]) == (["low", "high"], [[1, 3], [9, 12]])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model_path", "no/such/model"], "`model_path` 'no/such/model' does not exist"),
        (["--knob_values", "tier=huge"], "knob `tier` has unknown values ['huge']"),
        (["--test_split", "train[50%:]"], "`train_split` 'train' and `test_split` 'train[50%:]' share images"),
        (["--dataset_names", "nowhere", "--dataset_weights", 1], "nowhere"),
    ],
)
def test_what_cannot_be_found_is_refused(tmp_path, flags, message, capsys):
    assert run(tmp_path, *flags) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("joint-controller data: error: ") and message in error


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("metric", "accuracy", "sample 'own-0', column 'metric': there is no metric 'accuracy'"),
        ("style", "my_style", "sample 'own-0': `style` is 'my_style'"),
    ],
)
def test_a_metric_or_style_that_does_not_exist_is_refused(tmp_path, column, value, message, capsys):
    rows = own_rows(3)
    rows[0][column] = value
    assert run(tmp_path / "report", "--dataset_names", save(tmp_path, rows), "--dataset_weights", 1) == 2
    assert message in capsys.readouterr().err


def test_recorded_results_are_no_data_set(tmp_path, capsys):
    assert main(["data", "--results_dir", "results", "--device", "cpu", "--output_dir", str(tmp_path)]) == 2
    assert "not recorded results (`results_dir`)" in capsys.readouterr().err
