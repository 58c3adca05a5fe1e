"""The command: help, errors in one line, recipes and flags, launching."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from joint_controller import __version__, cli
from joint_controller.scripts import ScriptParser, guard, run_script


REPOSITORY = Path(__file__).parents[1]


@dataclass
class Arguments:
    """Fields of the kinds that scripts have."""

    output_dir: str = field(metadata={"help": "Where results go."})
    dataset_names: list[str] = field(default_factory=lambda: ["scenes"], metadata={"help": "Data sets."})
    top_k_values: list[int] | None = field(default=None, metadata={"help": "Values of a knob."})
    learning_rate: float = field(default=0.1, metadata={"help": "Learning rate."})
    max_samples: int | None = field(default=None, metadata={"help": "Samples."})
    shuffle: bool = field(default=True, metadata={"help": "Whether to shuffle."})
    mode: Literal["fast", "exact"] = field(default="fast", metadata={"help": "Mode."})
    tier_crops: dict | None = field(default=None, metadata={"help": "Crop ranges, in a recipe only."})


def run(argv, recipe=None, tmp_path=None):
    """Runs a script of the fields above; returns its exit code and the arguments that it got."""
    if recipe is not None:
        path = tmp_path / "recipe.yaml"
        path.write_text(recipe)
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
top_k_values: [1, 2]
tier_crops: {low: [1, 3]}
"""
    code, got = run(["--max_samples", "9", "--dataset_names", "a", "b"], recipe, tmp_path)
    assert code == 0
    assert got == Arguments("outputs", ["a", "b"], [1, 2], 1e-3, 9, False, "exact", {"low": [1, 3]})


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("learning_rat: 1", "unknown field `learning_rat` in recipe '{path}'. Did you mean `learning_rate`?"),
        ("zzz: 1", "unknown field `zzz` in recipe '{path}'. `--help` lists what there is."),
        ("help: true", "unknown field `help` in recipe '{path}'. `--help` lists what there is."),
        ("max_samples: many", "field `max_samples` in recipe '{path}' has the value 'many', which is not a valid int"),
        ("max_samples: 1.5", "field `max_samples` in recipe '{path}' has the value 1.5, which is not a valid int"),
        ("learning_rate: fast", "field `learning_rate` in recipe '{path}' has the value 'fast'"),
        ("shuffle: perhaps", "field `shuffle` in recipe '{path}' has the value 'perhaps'"),
        ("mode: slow", "field `mode` in recipe '{path}' has the value 'slow': choose from 'fast', 'exact'."),
        ("dataset_names: scenes", "field `dataset_names` in recipe '{path}' must be a list, got 'scenes'"),
        ("top_k_values: [1, two]", "field `top_k_values` in recipe '{path}' has the value [1, 'two']"),
        ("- a\n- b", "Config file {path} must contain a YAML mapping."),
        ("a: [1", "recipe '{path}' is not valid YAML"),
        ("learning_rate: 1", "the following arguments are required: --output_dir"),
    ],
)
def test_a_wrong_recipe_is_one_line_that_names_field_and_file(tmp_path, capsys, recipe, message):
    (code,) = run([], recipe, tmp_path)
    captured = capsys.readouterr()
    assert code == 2 and captured.out == ""
    assert captured.err.startswith(f"joint-controller example: error: {message.format(path=tmp_path / 'recipe.yaml')}")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max_sample", "3"], "unknown flag `--max_sample`. Did you mean `--max_samples`?"),
        (["--learning-rat=3"], "unknown flag `--learning-rat`. Did you mean `--learning-rate`?"),
        (["surplus"], "unexpected argument 'surplus': arguments are given as `--field value`."),
        (["--max_samples", "many"], "argument --max_samples/--max-samples: invalid int value: 'many'"),
        (["--config"], "`--config` needs a value"),
        (["--config", "none.yaml"], "recipe 'none.yaml' does not exist"),
        (["--config=none.yaml"], "recipe 'none.yaml' does not exist"),
        (["--config", "a.yaml", "--config", "b.yaml"], "`--config` is given twice"),
    ],
)
def test_a_wrong_flag_is_one_line_that_names_it(capsys, argv, message):
    (code,) = run(["--output_dir", "outputs", *argv])
    captured = capsys.readouterr()
    assert code == 2
    assert captured.err.startswith(f"joint-controller example: error: {message}")
    assert captured.err.count("\n") == 1


def test_help_of_a_script_teaches_its_fields(capsys):
    with pytest.raises(SystemExit) as exit_info:
        run(["--help"])
    assert exit_info.value.code == 0
    help_text = capsys.readouterr().out
    assert "usage: joint-controller example [--config RECIPE.yaml] [--FIELD VALUE ...]" in help_text
    assert "Crop ranges, in a recipe only." in help_text


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


def test_help_lists_every_subcommand_with_an_example_and_does_not_import_torch():
    code = "import sys; from joint_controller.cli import main; main(['--help'])"
    shown = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    for name, (summary, flags) in cli.COMMANDS.items():
        assert summary in shown.stdout
        assert f"joint-controller {name} {flags}" in shown.stdout
    imported = set(re.findall(r"\| +(\w+)\n", shown.stderr))
    assert "argparse" in imported and "torch" not in imported


def test_without_a_subcommand_help_is_shown_and_a_wrong_one_is_refused(capsys):
    assert cli.main([]) == 2
    assert "subcommands:" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["trian"])
    assert exit_info.value.code == 2
    assert "invalid choice: 'trian'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out.strip() == __version__


def test_a_missing_model_is_one_line(tmp_path, capsys):
    flags = ["--model_path", "no/such/model", "--output_dir", str(tmp_path / "importance")]
    assert cli.main(["importance", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("joint-controller importance: error: `model_path` 'no/such/model' does not exist")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback(tmp_path, monkeypatch):
    monkeypatch.setenv("JOINT_CONTROLLER_DEBUG", "0")  # put back afterwards: the flag sets it
    with pytest.raises(FileNotFoundError, match="no/such/model"):
        cli.main(["--debug", "importance", "--model_path", "no/such/model", "--output_dir", str(tmp_path / "x")])


@pytest.mark.parametrize("launcher", [["-m"], ["-m", "accelerate.commands.launch", "--cpu", "-m"]])
def test_a_script_run_as_a_module_reports_errors_the_same_way(launcher, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("max_sample: 3")
    shown = subprocess.run(
        [sys.executable, *launcher, "joint_controller.scripts.importance", "--config", recipe],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert shown.returncode != 0
    expected = f"unknown field `max_sample` in recipe '{recipe}'. Did you mean `max_samples`?"
    assert f"joint-controller importance: error: {expected}\n" in shown.stderr
    if launcher == ["-m"]:
        assert shown.returncode == 2 and shown.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_processes", "4096"], "--num_processes 4096 asked for, but this machine has"),
        (["--num_processes", "0"], "--num_processes 0 asked for"),
        (["--accelerate_config", "none.yaml"], "accelerate config 'none.yaml' does not exist"),
    ],
)
def test_a_launch_that_cannot_be_is_refused(capsys, flags, message):
    assert cli.main(["train", *flags]) == 2
    assert capsys.readouterr().err.startswith(f"joint-controller train: error: {message}")


def test_train_is_launched_through_accelerate_when_asked(tmp_path):
    """The launched script's own error line comes through, and its exit code."""
    shown = subprocess.run(
        [sys.executable, "-m", "joint_controller.cli", "train", "--num_processes", "1", "--learning_rat", "1"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
    )
    assert shown.returncode == 2, shown.stderr
    assert "joint-controller train: error: unknown flag `--learning_rat`. Did you mean" in shown.stderr


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_the_example_of_each_subcommand_can_be_parsed(command, monkeypatch):
    """The recipe exists, and recipe and flags are fields of the script."""
    monkeypatch.chdir(REPOSITORY)
    parsed = []
    script = cli.import_script(command)
    flags = cli.COMMANDS[command][1].split()
    assert run_script(command, script.make_parser, lambda *args: parsed.extend(args), flags) == 0
    assert parsed


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_the_help_of_each_subcommand_can_be_printed(command, capsys):
    """A bare percent sign in a help text breaks all of it."""
    with pytest.raises(SystemExit) as exit_info:
        cli.main([*command.split(), "--help"])
    assert exit_info.value.code == 0
    assert f"usage: joint-controller {command} " in capsys.readouterr().out
