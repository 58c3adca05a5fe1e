"""`joint-controller importance` with the recipes that ship, on few samples."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from joint_controller import cli
from joint_controller.molmo.blocks.importance_files import load_block_sets, load_importance
from joint_controller.molmo.executor import MolmoExecutor


RECIPES = Path(__file__).parents[3] / "recipes" / "embedded_executor"
RECIPE = RECIPES / "importance.yaml"


def test_the_recipe_scores_every_block_and_says_how(tmp_path, capsys):
    folder = tmp_path / "importance"
    flags = ["--config", str(RECIPE), "--max_samples", "8", "--output_dir", str(folder)]
    assert cli.main(["importance", *flags]) == 0
    shown = capsys.readouterr().out
    assert "This takes 72 answers and 8 prefills." in shown  # (1 + 8 blocks) x 8 samples
    executor = MolmoExecutor.from_pretrained("embedded", max_new_tokens=4)
    tables = {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}
    assert set(tables) == {
        f"{method}{suffix}.json"
        for method in ("importance", "hidden_change")
        for suffix in ("", "_easy_vqa", "_scenes")
    }
    for name, table in tables.items():
        scores = load_importance(folder / name)
        assert sorted(scores) == list(range(executor.model.config.text_config.num_hidden_layers))
        for block, score in table["scores"].items():
            lower, upper = table["intervals_95"][block]
            assert lower <= score <= upper and table["standard_errors"][block] >= 0
        provenance = table["provenance"]
        assert provenance["dataset_split"] == "validation" and provenance["seed"] == 42
        assert provenance["executor_fingerprint"] == executor.model_fingerprint
        assert ("cosine" in provenance["method"]) == name.startswith("hidden_change")
    assert tables["importance.json"]["provenance"]["num_samples"] == {"easy_vqa": 4, "scenes": 4}
    assert tables["importance_scenes.json"]["provenance"]["num_samples"] == {"scenes": 4}
    # As many samples of each: what counts for all is the mean of what counts for each.
    for method in ("importance", "hidden_change"):
        for block, score in tables[f"{method}.json"]["scores"].items():
            parts = [tables[f"{method}_{name}.json"]["scores"][block] for name in ("easy_vqa", "scenes")]
            assert score == pytest.approx(sum(parts) / 2)
    accuracy = tables["importance.json"]["provenance"]["accuracy"]
    assert f"Accuracy with all blocks: {accuracy:.3f} (8 samples)" in shown

    written = (folder / "importance.json").read_text()
    assert cli.main(["importance", *flags]) == 2
    assert "exists: name another `output_dir`" in capsys.readouterr().err
    assert (folder / "importance.json").read_text() == written


@pytest.mark.slow
def test_the_search_is_compared_on_another_split_and_can_be_used(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "search"
    flags = ["--config", str(RECIPES / "search_blocks.yaml"), "--max_samples", "4", "--max_comparison_samples", "6"]
    flags += ["--beam_width", "1", "--num_blocks_values", "6", "7", "--num_random_sets", "3"]
    flags += ["--output_dir", str(folder)]
    # Interrupted: nothing but answers is left, and the same command goes on with them.
    calls = []
    generate = MolmoExecutor.generate

    def interrupted(self, *args):
        calls.append(args)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return generate(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(MolmoExecutor, "generate", interrupted)
        assert cli.main(["importance", *flags]) == 130
    assert [path.name for path in folder.iterdir()] == ["accuracies"]
    first_calls, calls = len(calls), []
    with monkeypatch.context() as patch:
        patch.setattr(MolmoExecutor, "generate", lambda self, *args: calls.append(args) or generate(self, *args))
        assert cli.main(["importance", *flags]) == 0
    shown = capsys.readouterr().out
    # 1 + 8 sets score, 6 more are new to the search (leaving out one more block), all with 4 samples in one batch.
    scored = [args for args in calls if len(args[0]) == 4]
    assert len(scored) == 1 + 8 + 6 - (first_calls - 1)

    table = json.loads((folder / "comparison.json").read_text())
    assert table["provenance"]["dataset_split"] == "test" and table["provenance"]["searched_on"] == "validation"
    rows = {(row["dataset"], row["num_blocks"], row["selection"]): row for row in table["rows"]}
    assert set(table["full_accuracy"]) == {"all", "easy_vqa", "scenes"}
    selections = ("search", "accuracy drop", "hidden change", "prefix", "random")
    assert set(rows) == {(d, n, s) for d in ("all", "easy_vqa", "scenes") for n in (6, 7) for s in selections}
    sets = load_block_sets(folder / "searched_blocks.json")
    assert {n: rows["all", n, "search"]["active_blocks"] for n in (6, 7)} == sets
    assert rows["all", 6, "prefix"]["active_blocks"] == list(range(6)) and rows["all", 6, "prefix"]["gain"] == 0
    assert "chosen on 'validation' and compared on 'test'" in shown
    markdown = (folder / "comparison.md").read_text()
    assert f"| {rows['scenes', 6, 'search']['accuracy']:.3f} |" in markdown and "](comparison.png)" in markdown
    pixels = np.asarray(Image.open(folder / "comparison.png").convert("RGB"))
    assert pixels.shape[1] > 1000 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50

    executor = MolmoExecutor.from_pretrained("embedded", importance=folder / "searched_blocks.json")
    assert {n: executor.active_blocks(n) for n in (6, 7)} == sets
    # The ranking decides where nothing was searched.
    scores = load_importance(folder / "searched_blocks.json")
    assert executor.active_blocks(4) == sorted(
        [0, *sorted(range(1, 8), key=lambda block: (-scores[block], block))[:3]]
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset_names", "no_such_data"], "no_such_data"),
        (["--dataset_split", "no_such_split"], "no_such_split"),
        (["--max_new_tokens", "0"], "`max_new_tokens` is 0"),
        (["--max_samples", "2"], "confidence needs 2 of each data set"),
        (["--num_blocks_values", "4"], "`num_blocks_values` is for a search"),
        (["--beam_width", "1", "--num_blocks_values", "8"], "from 1 to 7 blocks"),
        (["--beam_width", "1", "--num_blocks_values", "0", "4"], "from 1 to 7 blocks"),
        (["--beam_width", "0"], "`beam_width` is 0"),
        (["--beam_width", "1", "--num_random_sets", "1"], "`num_random_sets` is 1"),
        (
            ["--beam_width", "1", "--comparison_split", "validation", "--max_comparison_samples", "6"],
            "4 samples, 'easy_vqa/validation/",
        ),
        (["--beam_width", "1", "--comparison_split", "no_such_split"], "no_such_split"),
    ],
)
def test_wrong_fields_are_one_line_and_write_nothing(tmp_path, capsys, flags, message):
    folder = tmp_path / "importance"
    arguments = ["--config", str(RECIPE), "--max_samples", "4", "--output_dir", str(folder), *flags]
    assert cli.main(["importance", *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("joint-controller importance: error: ") and message in error
    assert not list(folder.rglob("*"))


def test_without_an_output_folder_nothing_is_begun(capsys):
    assert cli.main(["importance"]) == 2
    assert "`--output_dir` is missing" in capsys.readouterr().err
