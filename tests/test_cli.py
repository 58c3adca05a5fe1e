"""The command: its subcommands, their help, errors in one line, launching."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from joint_controller import __version__, cli
from joint_controller.scripts import COMMON_INHERITED_FIELDS, command_parser, run_script


REPOSITORY = Path(__file__).parents[1]

UPDATE_HELP = "UPDATE_HELP"
"""Environment variable: set to 1, the help texts that ship are written anew."""


def test_help_lists_every_subcommand_with_an_example(capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["--help"])
    assert exit_info.value.code == 0
    shown = capsys.readouterr().out
    for name, command in cli.COMMANDS.items():
        assert f"  {name:15} {command.summary}\n" in shown
        assert f"  joint-controller {name} {command.example}\n" in shown


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


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_the_help_that_ships_is_what_the_parser_says(name):
    text = command_parser(name, cli.import_command(name).make_parser).format_help()
    if os.environ.get(UPDATE_HELP) == "1":
        cli.help_file(name).write_text(text, encoding="utf-8")
    assert cli.help_file(name).read_text(encoding="utf-8") == text, (
        f"the help of `joint-controller {name}` is stale: write it anew with `{UPDATE_HELP}=1 pytest tests/test_cli.py`"
    )


def test_no_help_ships_without_a_subcommand():
    files = {cli.help_file(name) for name in cli.COMMANDS}
    assert files == set(cli.help_file("train").parent.iterdir())


@pytest.mark.parametrize("argv", [["train", "--help"], ["train", "-h"], ["train", "--config", "none.yaml", "--help"]])
def test_help_of_a_subcommand_is_shown(argv, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    assert cli.main(argv) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(
        "usage: joint-controller train [--config RECIPE.yaml] [--FIELD VALUE ...]\n\nTrain a controller"
    )
    for field in ("model_path", "knob_values", "latency_budget_max_ms", "max_steps"):
        assert re.search(rf"^  --{field}\b", shown, re.MULTILINE)


def test_a_script_run_as_a_module_gives_the_same_help(capsys):
    shown = subprocess.run(
        [sys.executable, "-m", cli.COMMANDS["sweep"].module, "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert cli.main(["sweep", "--help"]) == 0
    assert shown == capsys.readouterr().out


def test_help_does_not_wait_for_torch():
    code = (
        "import sys; from joint_controller.cli import COMMANDS, main\n"
        "for name in COMMANDS: assert main([*name.split(), '--help']) == 0\n"
        "print(*sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    imported = set(shown.splitlines()[-1].split())
    assert "joint_controller.cli" in imported
    assert not {"torch", "transformers", "trl", "datasets", "numpy"} & imported


def test_all_fields_of_a_training_are_shown_when_asked(capsys):
    """The real parser of the installed versions: the fields of transformers and TRL, too."""
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["train", "--help_all"])
    assert exit_info.value.code == 0
    everything = capsys.readouterr().out
    for field in ("model_path", "latency_budget_max_ms", "adam_beta1", "num_generations", "ddp_timeout"):
        assert f"\n  --{field} " in everything
    assert cli.main(["train", "--help"]) == 0
    short = capsys.readouterr().out
    fields = {line.split()[0] for line in short.splitlines() if line.startswith("  --")}
    assert fields < {line.split()[0] for line in everything.splitlines() if line.startswith("  --")}
    assert {f"--{name}" for name in COMMON_INHERITED_FIELDS} <= fields


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_the_example_of_each_subcommand_can_be_parsed(name, monkeypatch):
    """The recipe exists, and recipe and flags are fields of the script."""
    monkeypatch.chdir(REPOSITORY)
    parsed = []
    script = cli.import_command(name)
    flags = cli.COMMANDS[name].example.split()
    assert run_script(name, script.make_parser, lambda *args: parsed.extend(args), flags) == 0
    assert parsed


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
        [sys.executable, *launcher, cli.COMMANDS["sweep"].module, "--config", recipe],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert shown.returncode != 0
    expected = f"unknown field `max_sample` in recipe '{recipe}'. Did you mean `max_samples`?"
    assert f"joint-controller sweep: error: {expected}\n" in shown.stderr
    if launcher == ["-m"]:
        assert shown.returncode == 2 and shown.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_processes", "4096"], "--num_processes asks for 4096 processes, but this machine has"),
        (["--num_processes", "0"], "--num_processes asks for 0 processes, but"),
        (
            ["--accelerate_config", "tpu"],
            "accelerate config 'tpu' does not exist: give one of cpu, multi_gpu, single_gpu, or the path of a file",
        ),
    ],
)
def test_a_launch_that_cannot_be_is_refused(capsys, flags, message):
    assert cli.main(["train", *flags]) == 2
    assert capsys.readouterr().err.startswith(f"joint-controller train: error: {message}")


def test_a_configuration_for_more_devices_than_there_are_is_refused(capsys, tmp_path):
    path = tmp_path / "many.yaml"
    text = (cli.ACCELERATE_CONFIGS / "multi_gpu.yaml").read_text()
    path.write_text(text.replace("num_processes: 2", "num_processes: 4096"))
    assert cli.main(["train", "--accelerate_config", str(path)]) == 2
    assert capsys.readouterr().err.startswith(
        f"joint-controller train: error: accelerate config '{path}' asks for 4096 processes, but this machine has"
    )


@pytest.mark.parametrize(
    ("name", "num_processes", "distributed_type", "use_cpu"),
    [("cpu", 1, "NO", True), ("single_gpu", 1, "NO", False), ("multi_gpu", 2, "MULTI_GPU", False)],
)
def test_launch_configurations_ship(name, num_processes, distributed_type, use_cpu):
    config = load_config_from_file(str(cli.ACCELERATE_CONFIGS / f"{name}.yaml"))
    assert (config.num_processes, config.distributed_type.value) == (num_processes, distributed_type)
    assert (config.use_cpu, config.mixed_precision, config.num_machines) == (use_cpu, "no", 1)
    assert len(list(cli.ACCELERATE_CONFIGS.iterdir())) == 3


@pytest.mark.slow
def test_train_is_launched_through_accelerate_when_asked():
    """The launched script's own error line comes through, and its exit code."""
    flags = ["--num_processes", "1", "--accelerate_config", "cpu", "--learning_rat", "1"]
    shown = subprocess.run(
        [sys.executable, "-m", "joint_controller.cli", "train", *flags],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
    )
    assert shown.returncode == 2, shown.stderr
    assert "joint-controller train: error: unknown flag `--learning_rat`. Did you mean" in shown.stderr
