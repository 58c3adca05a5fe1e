"""`joint-controller importance` with the recipe that ships, on few samples."""

import json
from pathlib import Path

import pytest

from joint_controller import cli
from joint_controller.executor import MolmoExecutor, load_importance


RECIPE = Path(__file__).parents[2] / "recipes" / "embedded_executor" / "importance.yaml"


def test_the_recipe_scores_every_block_and_says_how(tmp_path, capsys):
    output_path = tmp_path / "importance.json"
    flags = ["--config", str(RECIPE), "--max_samples", "8", "--output_path", str(output_path)]
    assert cli.main(["importance", *flags]) == 0
    shown = capsys.readouterr().out
    executor = MolmoExecutor.from_pretrained("embedded", max_new_tokens=4)
    scores = load_importance(output_path)
    assert sorted(scores) == list(range(executor.model.config.text_config.num_hidden_layers))
    provenance = json.loads(output_path.read_text())["provenance"]
    assert provenance["num_samples"] == 8 and provenance["seed"] == 42
    assert provenance["executor_fingerprint"] == executor.fingerprint
    # What a block costs is a difference of two accuracies over 8 samples, so it lies between -1 and the full accuracy.
    assert all(-1 <= score <= provenance["accuracy"] + 1e-9 for score in scores.values())
    assert f"Accuracy with all blocks: {provenance['accuracy']:.3f}" in shown

    written = output_path.read_text()
    assert cli.main(["importance", *flags]) == 2
    assert "exists: choose another path" in capsys.readouterr().err
    assert output_path.read_text() == written


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset_names", "no_such_data"], "no_such_data"),
        (["--dataset_split", "no_such_split"], "no_such_split"),
        (["--max_new_tokens", "0"], "`max_new_tokens` is 0"),
    ],
)
def test_wrong_fields_are_one_line_and_write_nothing(tmp_path, capsys, flags, message):
    output_path = tmp_path / "importance.json"
    assert cli.main(["importance", "--config", str(RECIPE), "--output_path", str(output_path), *flags]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("joint-controller importance: error: ") and message in error
    assert not output_path.exists()
