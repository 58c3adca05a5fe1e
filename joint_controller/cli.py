"""The `joint-controller` command: each subcommand runs a module of the room that it belongs to."""

import argparse
import importlib
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from subprocess import CalledProcessError
from types import ModuleType
from typing import NamedTuple

from .version import __version__


class Command(NamedTuple):
    """A subcommand."""

    module: str  # with its `make_parser` and `main`
    summary: str
    example: str  # flags


# By subcommand, or by subcommand and target.
COMMANDS = {
    "train": Command(
        "joint_controller.scripts.train",
        "train a controller by GRPO: what to spend on each question",
        "--config recipes/easy_vqa/train.yaml --learning_rate 1e-3",
    ),
    "train-executor": Command(
        "joint_controller.molmo.embedded.train_executor",
        "train the small executor that ships with the package, from scratch",
        "--config recipes/embedded_executor/train.yaml",
    ),
    "importance": Command(
        "joint_controller.molmo.blocks.importance_command",
        "score the executor's blocks, and search for those that can be left out",
        "--config recipes/embedded_executor/importance.yaml",
    ),
    "profile": Command(
        "joint_controller.scripts.profile",
        "time the executor on this machine over the knob grid",
        "--model_path embedded --output_dir outputs/profile",
    ),
    "fit-latency": Command(
        "joint_controller.scripts.fit_latency",
        "fit a latency estimator to profiled times",
        "--profile outputs/profile --output_dir outputs/latency",
    ),
    "check-latency": Command(
        "joint_controller.scripts.check_latency",
        "compare a latency estimator with this machine's clock, and adapt it if it is off",
        "--controller_path outputs/easy_vqa",
    ),
    "import-results": Command(
        "joint_controller.original_scripts.import_results",
        "import results of the original profiling scripts: outcomes and times to learn from",
        "--results_dir profiling_results --output_dir outputs/recorded",
    ),
    "data": Command(
        "joint_controller.scripts.data",
        "show what a recipe would train on: samples, answers, images, lengths",
        "--config recipes/easy_vqa/train.yaml --output_dir outputs/easy_vqa_data",
    ),
    "sweep": Command(
        "joint_controller.scripts.sweep",
        "evaluate a controller and static settings over latency budgets",
        "--config recipes/easy_vqa/sweep.yaml",
    ),
    "ablate": Command(
        "joint_controller.scripts.ablate",
        "train variants of a recipe with several seeds, and compare them in one table",
        "--config recipes/easy_vqa/ablate.yaml",
    ),
    "bench executor": Command(
        "joint_controller.benchmarks.executor",
        "time the executor against transformers' own modules, alone and in batches",
        "--repeats 20",
    ),
    "bench controller": Command(
        "joint_controller.benchmarks.controller",
        "time the controller for single requests against its modules",
        "--num_requests 500",
    ),
    "bench image-processing": Command(
        "joint_controller.benchmarks.image_processing",
        "time cutting images into views against torch's own interpolation",
        "--repeats 30",
    ),
    "bench training": Command(
        "joint_controller.benchmarks.training",
        "time training, with outcomes to be computed and with known ones",
        "--num_rollouts 4",
    ),
    "bench data": Command(
        "joint_controller.benchmarks.data",
        "time the way from a Parquet file to the executor's input, and watch its memory",
        "--num_images 200",
    ),
}

EPILOG = (
    "subcommands:\n"
    + "\n".join(f"  {name:15} {command.summary}" for name, command in COMMANDS.items())
    + "\n\nexamples:\n"
    + "\n".join(f"  joint-controller {name} {command.example}" for name, command in COMMANDS.items())
    + """

A recipe (YAML) gives the fields of a subcommand; flags override the recipe. `joint-controller SUBCOMMAND --help` lists
the fields. `train` runs in this process; `--num_processes N` or `--accelerate_config NAME_OR_FILE` launches it through
accelerate, as does `accelerate launch -m joint_controller.scripts.train --config RECIPE.yaml`."""
)

ACCELERATE_CONFIGS = Path(__file__).parent / "accelerate_configs"
"""Folder of the launch configurations that `--accelerate_config` takes by name."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the `joint-controller` command. Returns its exit code: 0, 2 after an error, 130 after Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="joint-controller",
        usage="joint-controller [--debug] SUBCOMMAND [--config RECIPE.yaml] [--FIELD VALUE ...]",
        description="Answer visual questions inside a latency budget: train and evaluate a controller of a model's knobs.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subcommands = list(dict.fromkeys(name.split()[0] for name in COMMANDS))
    parser.add_argument("command", metavar="SUBCOMMAND", choices=subcommands, help="what to do, see below")
    if not argv:
        parser.print_help()
        return 2
    # What follows the subcommand, `--help` included, belongs to its script.
    position = next((index for index, arg in enumerate(argv) if not arg.startswith("-")), len(argv))
    options, script_argv = parser.parse_args(argv[: position + 1]), argv[position + 1 :]
    command = options.command
    if command not in COMMANDS:
        command, script_argv = f"{command} {_parse_target(command, script_argv)}", script_argv[1:]
    if "-h" in script_argv or "--help" in script_argv:
        # A text that ships with the package: the parser's own needs torch and transformers, which take seconds to import.
        print_help_text(help_file(command).read_text(encoding="utf-8"))
        return 0

    # Imported here: `joint-controller --help` should not wait for it.
    from .scripts import DEBUG_VARIABLE, guard, run_script

    if options.debug:
        os.environ[DEBUG_VARIABLE] = "1"
    if command == "train":
        launch_parser = argparse.ArgumentParser(prog="joint-controller train", add_help=False, allow_abbrev=False)
        launch_parser.usage = "joint-controller train [--config RECIPE.yaml] [--FIELD VALUE ...]"
        launch_parser.add_argument("--num_processes", type=int)
        launch_parser.add_argument("--accelerate_config")
        launch_options, script_argv = launch_parser.parse_known_args(script_argv)
        if launch_options.num_processes is not None or launch_options.accelerate_config is not None:
            return guard("joint-controller train", lambda: _launch(launch_options, script_argv))
    script = import_command(command)
    return run_script(command, script.make_parser, script.main, script_argv)


def import_command(name: str) -> ModuleType:
    """The module of a subcommand, e.g. `joint_controller.benchmarks.data` for `"bench data"`."""
    return importlib.import_module(COMMANDS[name].module)


def help_file(name: str) -> Path:
    """The file with what the parser of a subcommand says to `--help`."""
    return Path(__file__).parent / "assets" / "help" / f"{name.replace(' ', '-')}.txt"


def print_help_text(text: str) -> None:
    """Prints a help text, each line wrapped to the width of the terminal behind its own indentation."""
    width = min(shutil.get_terminal_size().columns, 120)
    lines = []
    for line in text.splitlines():
        indent = " " * (len(line) - len(line.lstrip()))
        wrapper = textwrap.TextWrapper(
            width, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )
        lines.append(wrapper.fill(line.lstrip()) if len(line) > width else line)
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError:  # `| head` has read enough; Python would complain once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parse_target(command: str, argv: list[str]) -> str:
    """What a subcommand such as `bench` is asked to do, its first argument."""
    targets = {name.split()[1]: entry.summary for name, entry in COMMANDS.items() if name.split()[0] == command}
    parser = argparse.ArgumentParser(
        prog=f"joint-controller {command}",
        usage=f"joint-controller {command} TARGET [--FIELD VALUE ...]",
        epilog="targets:\n" + "\n".join(f"  {name:15} {summary}" for name, summary in targets.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", metavar="TARGET", choices=list(targets), help="see below")
    return parser.parse_args(argv[:1]).target


def _accelerate_config_file(name_or_path: str) -> Path:
    """A launch configuration by the name under which it ships, or by its path."""
    if Path(name_or_path).is_file():
        return Path(name_or_path)
    shipped = {path.stem: path for path in sorted(ACCELERATE_CONFIGS.glob("*.yaml"))}
    if name_or_path not in shipped:
        raise FileNotFoundError(
            f"accelerate config '{name_or_path}' does not exist: give one of {', '.join(shipped)}, or the path of a file "
            "that `accelerate config` wrote."
        )
    return shipped[name_or_path]


def _launch(options: argparse.Namespace, script_argv: list[str]) -> None:
    """
    Runs the training script through `accelerate launch`. TRL's command launches every training that way; here it is on
    request only, since the launched process imports torch once more and a run on one device gains nothing by it.
    """
    import torch
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command, launch_command_parser

    arguments = []
    num_processes, asked_by = options.num_processes, "--num_processes"
    if num_processes is not None:
        arguments += ["--num_processes", str(num_processes)]
    if options.accelerate_config is not None:
        file = str(_accelerate_config_file(options.accelerate_config))
        arguments += ["--config_file", file]
        config = load_config_from_file(file)
        if num_processes is None and config.num_machines == 1 and not config.use_cpu:
            num_processes, asked_by = config.num_processes, f"accelerate config '{options.accelerate_config}'"
    # Where accelerate finds fewer devices, it runs one process, or several that do not know of each other.
    devices = torch.accelerator.device_count()
    if num_processes is not None and not 1 <= num_processes <= max(devices, 1):
        raise ValueError(
            f"{asked_by} asks for {num_processes} processes, but this machine has {devices} accelerators: ask for as many "
            "at most; for several CPU processes use `torchrun --nproc_per_node N -m joint_controller.scripts.train`."
        )
    arguments += ["--module", COMMANDS["train"].module, *script_argv]
    try:
        launch_command(launch_command_parser().parse_args(arguments))
    except CalledProcessError as error:
        sys.exit(error.returncode)  # the script has said why


if __name__ == "__main__":
    sys.exit(main())
