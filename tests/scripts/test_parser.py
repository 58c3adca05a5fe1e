"""What every script does with its arguments: recipes and flags, help, errors in one line."""

import os
from dataclasses import dataclass, field
from typing import Literal

import pytest
from trl import RewardConfig

from joint_controller.cli import print_help_text
from joint_controller.scripts import ScriptParser, command_parser, guard, run_script


@dataclass
class Arguments:
    """Fields of the kinds that scripts have."""

    output_dir: str = field(metadata={"help": "Where results go."})
    dataset_names: list[str] = field(default_factory=lambda: ["scenes"], metadata={"help": "Data sets."})
    depths: list[int] | None = field(default=None, metadata={"help": "Values of a knob."})
    learning_rate: float = field(default=0.1, metadata={"help": "Learning rate."})
    max_samples: int | None = field(default=None, metadata={"help": "Samples."})
    shuffle: bool = field(default=True, metadata={"help": "Whether to shuffle 100 %% of them."})
    mode: Literal["fast", "exact"] = field(default="fast", metadata={"help": "Mode."})
    crops: dict | None = field(default=None, metadata={"help": "Crop ranges, in a recipe only."})
    scores: dict | str | None = field(default=None, metadata={"help": "A path, or one for each data set."})
    knob_values: dict | str | list[str] | None = field(
        default=None, metadata={"help": "Values of knobs.", "nargs": "+", "metavar": "KNOB=VALUE,VALUE"}
    )
    seed: int = field(default=42, metadata={"help": "Seed."})
    split_seed: int | None = field(default=None, metadata={"help": "Seed of the split."})


def run(argv, recipe=None, tmp_path=None):
    """Runs a script of the fields above; returns its exit code and the arguments that it got."""
    if recipe is not None:
        path = tmp_path / "recipe.yaml"
        path.write_bytes(recipe if isinstance(recipe, bytes) else recipe.encode())
        argv = ["--config", str(path), *argv]
    got = []
    return run_script("example", lambda: ScriptParser([Arguments]), got.append, argv), *got


def test_flags_override_the_recipe_and_the_recipe_the_defaults(tmp_path):
    recipe = """
output_dir: outputs
learning_rate: 1e-3
max_samples: 7
shuffle: false
mode: exact
depths: [1, 2]
crops: {low: [1, 3]}
split_seed: null
"""
    code, got = run(["--max_samples", "9", "--dataset_names", "a", "b"], recipe, tmp_path)
    assert code == 0
    assert got == Arguments("outputs", ["a", "b"], [1, 2], 1e-3, 9, False, "exact", {"low": [1, 3]})


@pytest.mark.parametrize("form", [["--config", "{}"], ["--config={}"]])
def test_the_recipe_is_named_by_a_flag_in_either_form(tmp_path, form):
    path = tmp_path / "recipe.yaml"
    path.write_text("output_dir: outputs")
    code, got = run([part.format(path) for part in form])
    assert code == 0 and got.output_dir == "outputs"


def test_environment_variables_of_a_recipe_are_set(tmp_path, monkeypatch):
    monkeypatch.setenv("JOINT_CONTROLLER_EXAMPLE", "old")
    assert run([], "output_dir: outputs\nenv: {JOINT_CONTROLLER_EXAMPLE: 7}", tmp_path)[0] == 0
    assert os.environ["JOINT_CONTROLLER_EXAMPLE"] == "7"


@pytest.mark.parametrize(
    ("flags", "recipe", "expected"),
    [
        (["--knob_values", "tier=low,high", "depth=4"], "", ["tier=low,high", "depth=4"]),
        ([], "knob_values: {tier: [low, high], depth: [4]}", {"tier": ["low", "high"], "depth": [4]}),
        ([], "knob_values: ['tier=low,high', depth=4]", ["tier=low,high", "depth=4"]),
        (["--knob-values", "depth=8"], "knob_values: {depth: [4]}", ["depth=8"]),
    ],
)
def test_a_field_can_be_a_mapping_in_a_recipe_and_words_in_flags(tmp_path, flags, recipe, expected):
    code, got = run(flags, f"output_dir: outputs\n{recipe}", tmp_path)
    assert code == 0 and got.knob_values == expected


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("learning_rat: 1", "unknown field `learning_rat` in {recipe}. Did you mean `learning_rate`?"),
        ("zzz: 1", "unknown field `zzz` in {recipe}. `--help` lists what there is."),
        ("self: 1", "unknown field `self` in {recipe}."),
        ("help: true", "unknown field `help` in {recipe}. `--help` lists what there is."),
        ("max_samples: many", "field `max_samples` in {recipe} has the value 'many', which is not a valid int"),
        ("max_samples: 1.5", "field `max_samples` in {recipe} has the value 1.5, which is not a valid int"),
        ("learning_rate: fast", "field `learning_rate` in {recipe} has the value 'fast'"),
        ("shuffle: perhaps", "field `shuffle` in {recipe} has the value 'perhaps'"),
        ("mode: slow", "field `mode` in {recipe} has the value 'slow': choose from 'fast', 'exact'."),
        ("dataset_names: scenes", "field `dataset_names` in {recipe} must be a list, got 'scenes'"),
        ("knob_values: tier=low", "field `knob_values` in {recipe} must be a list, got 'tier=low'"),
        ("depths: [1, two]", "field `depths` in {recipe} has the value [1, 'two']"),
        # Values of another shape than the field's
        ("seed: [1, 2]", "field `seed` in {recipe} must be one value, got [1, 2]."),
        ("seed: {a: 1}", "field `seed` in {recipe} must be one value, got {{'a': 1}}."),
        ("scores: [a.json]", "field `scores` in {recipe} must be one value, got ['a.json']."),
        ("dataset_names: {a: b}", "field `dataset_names` in {recipe} must be a list"),
        ("dataset_names: [a, null]", "field `dataset_names` in {recipe} must be a list of values, got ['a', None]."),
        ("depths: [[1], [2]]", "field `depths` in {recipe} must be a list of values, got [[1], [2]]."),
        # No value
        ("learning_rate:", "field `learning_rate` in {recipe} has no value: give one, or leave the field out."),
        ("seed: null", "field `seed` in {recipe} has no value: give one, or leave the field out."),
        ("output_dir: ~", "field `output_dir` in {recipe} has no value: give one, or leave the field out."),
        ("dataset_names:", "field `dataset_names` in {recipe} has no value: give one, or leave the field out."),
        # Numbers that no script takes
        ("seed: -1", "field `seed` in {recipe} has the value -1: seeds are whole numbers from 0 to 4294967295."),
        ("split_seed: 4294967296", "field `split_seed` in {recipe} has the value 4294967296: seeds are whole"),
        ("learning_rate: .nan", "field `learning_rate` in {recipe} has the value NaN: give a number."),
        # Files that are no recipes
        ("- a\n- b", "{recipe} holds no fields: write one a line, as `field: value`."),
        ("", "{recipe} holds no fields: write one a line, as `field: value`."),
        ("a: [1", "{recipe} is not valid YAML"),
        ("1: seed", "{recipe} has the key 1: keys are names of fields."),
        ("seed: 1\nmode: fast\nseed: 2", "{recipe} is not valid YAML: `seed` is in line 1 and again in line 3."),
        (
            "crops: {low: [1, 3], low: [4, 8]}",
            "{recipe} is not valid YAML: `low` is in line 1 and again in line 1.",
        ),
        ("output_dir: r\u00e9sultats".encode("latin-1"), "{recipe} is not UTF-8 text ('utf-8' codec can't decode"),
        ("env: [a]", "field `env` in {recipe} must be a mapping of environment variables to values."),
        # Tags that would run code
        ("output_dir: !!python/object/apply:os.getcwd []", "{recipe} is not valid YAML: could not determine"),
        ("seed: !!python/object/new:int [7]", "{recipe} is not valid YAML: could not determine a constructor"),
        ("learning_rate: 1", "the following arguments are required: --output_dir"),
    ],
)
def test_a_wrong_recipe_is_one_line_that_names_field_and_file(tmp_path, capsys, recipe, message):
    (code,) = run([], recipe, tmp_path)
    captured = capsys.readouterr()
    assert code == 2 and captured.out == ""
    expected = message.format(recipe=f"recipe '{tmp_path / 'recipe.yaml'}'")
    assert captured.err.startswith(f"joint-controller example: error: {expected}")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max_sample", "3"], "unknown flag `--max_sample`. Did you mean `--max_samples`?"),
        (["--learning-rat=3"], "unknown flag `--learning-rat`. Did you mean `--learning-rate`?"),
        (["surplus"], "unexpected argument 'surplus': arguments are given as `--field value`."),
        (["--max_samples", "many"], "argument --max_samples/--max-samples: invalid int value: 'many'"),
        (["--seed", "-1"], "`seed` has the value -1: seeds are whole numbers from 0 to 4294967295."),
        (["--split_seed", "-7"], "`split_seed` has the value -7: seeds are whole numbers"),
        (["--learning_rate", "nan"], "`learning_rate` has the value NaN: give a number."),
        (["--config"], "`--config` needs a value"),
        (["--config="], "`--config` needs a value"),
        (["--config", ""], "`--config` needs a value"),
        (["--config", "--seed", "1"], "`--config` needs a value"),
        (["--config", "none.yaml"], "recipe 'none.yaml' does not exist"),
        (["--config=none.yaml"], "recipe 'none.yaml' does not exist"),
        (["--config", "a.yaml", "--config", "b.yaml"], "`--config` is given twice"),
        (["--config=a.yaml", "--config", "b.yaml"], "`--config` is given twice"),
    ],
)
def test_a_wrong_flag_is_one_line_that_names_it(capsys, argv, message):
    (code,) = run(["--output_dir", "outputs", *argv])
    captured = capsys.readouterr()
    assert code == 2
    assert captured.err.startswith(f"joint-controller example: error: {message}")
    assert captured.err.count("\n") == 1


def test_help_lists_the_fields(capsys):
    with pytest.raises(SystemExit) as exit_info:
        run(["--help"])
    assert exit_info.value.code == 0
    assert (
        capsys.readouterr().out
        == """\
usage: joint-controller example [--config RECIPE.yaml] [--FIELD VALUE ...]

fields, as flags or in a recipe (YAML), which flags override:
  --output_dir TEXT
      Where results go. (required)
  --dataset_names TEXT ...
      Data sets. (default: scenes)
  --depths INT ...
      Values of a knob.
  --learning_rate NUMBER
      Learning rate. (default: 0.1)
  --max_samples INT
      Samples.
  --shuffle [BOOL]
      Whether to shuffle 100 % of them. (default: True)
  --mode {fast,exact}
      Mode. (default: fast)
  --crops MAPPING
      Crop ranges, in a recipe only.
  --scores TEXT
      A path, or one for each data set.
  --knob_values KNOB=VALUE,VALUE ...
      Values of knobs.
  --seed INT
      Seed. (default: 42)
  --split_seed INT
      Seed of the split.
"""
    )


@dataclass
class InheritingArguments(RewardConfig):
    """Arguments with most fields from another library."""

    learning_rate: float = field(default=0.5, metadata={"help": "Our learning rate."})


def test_help_explains_inherited_fields_when_asked(capsys):
    parser = command_parser("example", lambda: ScriptParser([InheritingArguments]))
    assert "Our learning rate. (default: 0.5)" in parser.format_help()
    listed = "common fields of transformers and trl; `joint-controller example --help_all` lists all:\n"
    assert listed in parser.format_help()
    assert "  --max_steps\n      Optimiser steps." in parser.format_help()
    assert "--center_rewards_coefficient" not in parser.format_help()
    with pytest.raises(SystemExit) as exit_info:
        parser.parse_args_and_config(["--help_all"])
    assert exit_info.value.code == 0
    shown = capsys.readouterr().out
    assert "Our learning rate. (default: 0.5)" in shown
    assert "--center_rewards_coefficient NUMBER" in shown and "--adam_beta1 NUMBER" in shown


def test_help_is_wrapped_to_the_terminal_behind_its_indentation(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    print_help_text("usage: x\n\n      one two three four five six seven eight nine\n")
    assert capsys.readouterr().out == "usage: x\n\n      one two three four five six seven\n      eight nine\n"


def fail(error):
    raise error


def test_errors_at_the_edge_are_one_line_and_others_keep_their_traceback(capsys, monkeypatch):
    assert guard("joint-controller x", lambda: fail(ValueError("row 17\n  is broken"))) == 2
    assert capsys.readouterr().err == "joint-controller x: error: row 17 is broken\n"
    assert guard("joint-controller x", lambda: fail(FileNotFoundError("no folder"))) == 2
    assert guard("joint-controller x", lambda: fail(ModuleNotFoundError("no package"))) == 2
    assert guard("joint-controller x", lambda: fail(KeyboardInterrupt())) == 130
    assert guard("joint-controller x", lambda: None) == 0
    with pytest.raises(ZeroDivisionError):
        guard("joint-controller x", lambda: 1 / 0)
    monkeypatch.setenv("JOINT_CONTROLLER_DEBUG", "1")
    with pytest.raises(ValueError, match="row 17"):
        guard("joint-controller x", lambda: fail(ValueError("row 17")))
