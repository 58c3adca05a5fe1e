"""What recipes and flags say of the executor."""

import json

import pytest

from joint_controller.scripts import ScriptParser
from joint_controller.scripts.executor_arguments import ExecutorArguments, load_executor, open_executor


def parse(*flags):
    [args] = ScriptParser([ExecutorArguments]).parse_args_and_config(flags)
    return args


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("importance")
    last_blocks = {str(block): block / 10 for block in range(8)}
    (folder / "last.json").write_text(json.dumps(last_blocks))
    (folder / "sets.json").write_text(json.dumps({"scores": last_blocks, "block_sets": {"4": [0, 2, 3, 5]}}))
    return folder


def test_importance_scores_are_a_file_or_one_for_each_data_set(files, tmp_path):
    assert load_executor(parse("--importance_path", str(files / "last.json"))).active_blocks(4) == [0, 5, 6, 7]
    searched = load_executor(parse("--importance_path", str(files / "sets.json")))
    assert searched.active_blocks(4) == [0, 2, 3, 5] and searched.active_blocks(5) == [0, 4, 5, 6, 7]

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"importance_path: {{easy_vqa: {files}/last.json, default: {files}/sets.json}}")
    executor = load_executor(parse("--config", str(recipe)))
    assert executor.active_blocks(4, "easy_vqa/train/000001") == [0, 5, 6, 7]
    assert executor.active_blocks(4, "scenes/train/000001") == [0, 2, 3, 5]
    assert executor.active_blocks(4) == [0, 2, 3, 5], "a request that is of no data set"


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("importance_path: {easy_vqa: [1, 2]}", r"gives \[1, 2\] for data set 'easy_vqa'"),
        ("importance_path: {easy_vqa: none.json}", "'none.json' does not exist"),
        ("importance_path: none.json", "'none.json' does not exist"),
    ],
)
def test_wrong_importance_paths_are_refused(tmp_path, recipe, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_executor(parse("--config", str(path)))


@pytest.mark.parametrize(
    ("model_path", "importance", "error", "message"),
    [
        ("random:molmo-72b", None, ValueError, "'random:molmo-72b' is unknown: choose random:molmoe-1b"),
        ("random:molmoe-1b", "scores.json", ValueError, "are random: leave it out"),
        ("nowhere/to/be/found", None, FileNotFoundError, "'nowhere/to/be/found' does not exist"),
    ],
)
def test_executors_that_there_are_not_are_refused(model_path, importance, error, message):
    with pytest.raises(error, match=message):
        open_executor(model_path, "cpu", importance)
