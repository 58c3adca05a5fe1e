"""The `joint-controller` command: one subcommand a script."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from subprocess import CalledProcessError
from types import ModuleType

from .version import __version__


# Subcommand, or subcommand and target: (what it does, an example of its flags).
COMMANDS = {
    "train": (
        "train a controller by GRPO: what to spend on each question",
        "--config recipes/easy_vqa/grpo.yaml --learning_rate 1e-3",
    ),
    "train-executor": (
        "train the small Molmo that ships with the package, from scratch",
        "--config recipes/embedded_executor/train.yaml",
    ),
    "importance": (
        "score the executor's blocks, and search for those that can be left out",
        "--config recipes/embedded_executor/importance.yaml",
    ),
    "profile": (
        "time the executor on this machine over the knob grid",
        "--model_path embedded --output_dir outputs/profile",
    ),
    "fit-latency": (
        "fit a latency estimator to profiled times",
        "--profile outputs/profile --output_dir outputs/latency",
    ),
    "import-results": (
        "import results of the original profiling scripts: outcomes and times to learn from",
        "--results_dir profiling_results --output_dir outputs/recorded",
    ),
    "data": (
        "show what a recipe would train on: samples, answers, images, lengths",
        "--config recipes/easy_vqa/grpo.yaml --output_dir outputs/easy_vqa_data",
    ),
    "sweep": (
        "evaluate a controller and static settings over latency budgets",
        "--config recipes/easy_vqa/sweep.yaml",
    ),
    "bench executor": (
        "time the executor beside transformers' own modules, alone and in batches",
        "--repeats 20",
    ),
    "bench controller": (
        "time the controller for single requests beside its modules",
        "--num_requests 500",
    ),
    "bench training": (
        "time training, with outcomes to be computed and with known ones",
        "--num_rollouts 4",
    ),
    "bench data": (
        "time the way from a Parquet file to the executor's input, and watch its memory",
        "--num_images 200",
    ),
}

EPILOG = (
    "subcommands:\n"
    + "\n".join(f"  {name:15} {summary}" for name, (summary, _) in COMMANDS.items())
    + "\n\nexamples:\n"
    + "\n".join(f"  joint-controller {name} {flags}" for name, (_, flags) in COMMANDS.items())
    + """

A recipe (YAML) gives the fields of a subcommand; flags override the recipe. `joint-controller SUBCOMMAND --help` lists
the fields. `train` runs in this process; `--num_processes N` or `--accelerate_config FILE` launches it through
accelerate, as does `accelerate launch -m joint_controller.scripts.train --config RECIPE.yaml`."""
)


def main(argv: Sequence[str] | None = None) -> int:
    """
    Runs the `joint-controller` command.

    Args:
        argv (`Sequence[str]`, *optional*, defaults to `sys.argv[1:]`):
            Command-line arguments.

    Returns:
        `int`: Exit code: 0, 2 after an error, 130 after Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="joint-controller",
        usage="joint-controller [--debug] SUBCOMMAND [--config RECIPE.yaml] [--FIELD VALUE ...]",
        description="Answer visual questions inside a latency budget: train and evaluate a controller for Molmo's knobs.",
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

    # Imported here: `joint-controller --help` should not wait for torch.
    from .scripts import DEBUG_VARIABLE, guard, run_script

    if options.debug:
        os.environ[DEBUG_VARIABLE] = "1"
    if command == "train":
        launch_options, script_argv = _split_launch_options(script_argv)
        if launch_options.num_processes is not None or launch_options.accelerate_config is not None:
            return guard("joint-controller train", lambda: _launch(launch_options, script_argv))
    script = import_script(command)
    return run_script(command, script.make_parser, script.main, script_argv)


def import_script(command: str) -> ModuleType:
    """
    The module of a subcommand's script, e.g. `joint_controller.scripts.fit_latency` for `"fit-latency"`, and
    `joint_controller.benchmarks.bench_data` for `"bench data"`.
    """
    room = "benchmarks" if command.startswith("bench ") else "scripts"
    return importlib.import_module(f"joint_controller.{room}.{command.replace('-', '_').replace(' ', '_')}")


def _parse_target(command: str, argv: list[str]) -> str:
    """What a subcommand such as `bench` is asked to do, its first argument."""
    targets = {name.split()[1]: summary for name, (summary, _) in COMMANDS.items() if name.split()[0] == command}
    parser = argparse.ArgumentParser(
        prog=f"joint-controller {command}",
        usage=f"joint-controller {command} TARGET [--FIELD VALUE ...]",
        epilog="targets:\n" + "\n".join(f"  {name:15} {summary}" for name, summary in targets.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", metavar="TARGET", choices=list(targets), help="see below")
    return parser.parse_args(argv[:1]).target


def _split_launch_options(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog="joint-controller train", add_help=False, allow_abbrev=False)
    parser.add_argument("--num_processes", type=int)
    parser.add_argument("--accelerate_config")
    return parser.parse_known_args(argv)


def _launch(options: argparse.Namespace, script_argv: list[str]) -> None:
    """
    Runs the training script through `accelerate launch`. TRL's command launches every training that way; here it is on
    request only, since the launched process imports torch once more and a run on one device gains nothing by it.
    """
    import torch
    from accelerate.commands.launch import launch_command, launch_command_parser

    arguments = []
    if options.accelerate_config is not None:
        if not os.path.isfile(options.accelerate_config):
            raise FileNotFoundError(
                f"accelerate config '{options.accelerate_config}' does not exist: give one of "
                "recipes/accelerate_configs/ or a file written by `accelerate config`."
            )
        arguments += ["--config_file", options.accelerate_config]
    if options.num_processes is not None:
        # accelerate runs a single process when it finds no device, whatever the number asked for.
        devices = torch.accelerator.device_count()
        if not 1 <= options.num_processes <= max(devices, 1):
            raise ValueError(
                f"--num_processes {options.num_processes} asked for, but this machine has {devices} accelerators: ask "
                "for as many at most; for several CPU processes use `torchrun --nproc_per_node N -m "
                "joint_controller.scripts.train`."
            )
        arguments += ["--num_processes", str(options.num_processes)]
    arguments += ["--module", "joint_controller.scripts.train", *script_argv]
    try:
        launch_command(launch_command_parser().parse_args(arguments))
    except CalledProcessError as error:
        sys.exit(error.returncode)  # the script has said why


if __name__ == "__main__":
    sys.exit(main())
