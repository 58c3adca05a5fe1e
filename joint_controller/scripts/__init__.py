"""
The scripts behind the `joint-controller` command. Each module has `make_parser()`, which returns a [`ScriptParser`], and
`main(...)`, which takes what the parser returns; it runs through `joint-controller <name>`, `python -m
joint_controller.scripts.<name>` and `accelerate launch -m joint_controller.scripts.<name>` alike.
"""

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from trl import TrlParser


DEBUG_VARIABLE = "JOINT_CONTROLLER_DEBUG"
"""Environment variable: set to 1, errors come with their traceback."""


class ScriptParser(TrlParser):
    """
    TRL's parser (flags over a YAML recipe over defaults) that refuses what it does not know: an unknown field or flag, a
    value of the wrong type, a flag spelt in part. Errors are `ValueError`s that name the field, where it stood and the
    nearest known one.

    Args:
        dataclass_types (`Iterable[type]`):
            Dataclasses whose fields are the script's arguments.
        kwargs:
            Passed on to [`trl.TrlParser`].
    """

    def __init__(self, dataclass_types: Iterable[type], **kwargs):
        kwargs.setdefault("usage", "%(prog)s [--config RECIPE.yaml] [--FIELD VALUE ...]")
        # An abbreviation that is unique today names two fields once another is added.
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)
        self.recipe_path: str | None = None

    def error(self, message: str):
        """Raises instead of printing the usage: that of a training script has hundreds of lines."""
        raise ValueError(message)

    def parse_args_and_config(self, args: Iterable[str] | None = None, **kwargs) -> tuple[Any, ...]:
        """
        Parses flags, and the recipe that `--config` names, into instances of the dataclasses.

        Args:
            args (`Iterable[str]`, *optional*, defaults to `sys.argv[1:]`):
                Command-line arguments.
            kwargs:
                Passed on to [`trl.TrlParser.parse_args_and_config`].

        Raises:
            ValueError: If a field or flag is unknown, or a value cannot be read.
            FileNotFoundError: If the recipe does not exist.
        """
        args = [
            part
            for arg in (sys.argv[1:] if args is None else args)
            for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])
        ]
        if "--config" in args:
            position = args.index("--config") + 1
            if position == len(args):
                raise ValueError("`--config` needs a value: the path of a recipe (YAML).")
            if "--config" in args[position:]:
                raise ValueError("`--config` is given twice: give one recipe, and override its fields with flags.")
            self.recipe_path = args[position]
            if not Path(self.recipe_path).is_file():
                raise FileNotFoundError(
                    f"recipe '{self.recipe_path}' does not exist: check the path after `--config`."
                )
        try:
            return super().parse_args_and_config(args, **kwargs)
        except yaml.YAMLError as error:
            raise ValueError(f"recipe '{self.recipe_path}' is not valid YAML: {error}") from error

    def parse_known_args(self, args=None, namespace=None):
        # Checked before the dataclasses are built, so that a misspelt flag is reported and not what follows from it.
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flags = [arg.split("=", 1)[0] for arg in unknown if arg.startswith("-")]
            if not flags:
                raise ValueError(f"unexpected argument '{unknown[0]}': arguments are given as `--field value`.")
            known = [option for action in self._actions for option in action.option_strings]
            raise ValueError(f"unknown flag `{flags[0]}`.{_nearest(flags[0], known)}")
        return namespace, unknown

    def set_defaults_with_config(self, **recipe: Any) -> list[str]:
        # argparse converts and checks flags, but takes a default that is not a string as it is.
        actions: dict[str, argparse.Action] = {}
        for action in self._actions:
            if action.dest != "help":
                actions.setdefault(action.dest, action)
        for field, value in recipe.items():
            if field not in actions:
                raise ValueError(
                    f"unknown field `{field}` in recipe '{self.recipe_path}'.{_nearest(str(field), actions)}"
                )
            recipe[field] = self._convert(actions[field], value)
        return super().set_defaults_with_config(**recipe)

    def _convert(self, action: argparse.Action, value: Any) -> Any:
        takes_list = action.nargs in ("+", "*")
        if value is None or isinstance(value, dict) or (isinstance(value, list) and not takes_list):
            return value
        where = f"field `{action.dest}` in recipe '{self.recipe_path}'"
        if takes_list and not isinstance(value, list):
            raise ValueError(f"{where} must be a list, got {value!r}: write `{action.dest}: [{value}]`.")
        items = value if takes_list else [value]
        try:
            converted = [action.type(str(item)) for item in items]
        except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
            kind = getattr(action.type, "__name__", str(action.type))
            raise ValueError(f"{where} has the value {value!r}, which is not a valid {kind}: {error}") from error
        if action.choices is not None and any(item not in action.choices for item in converted):
            raise ValueError(f"{where} has the value {value!r}: choose from {', '.join(map(repr, action.choices))}.")
        return converted if takes_list else converted[0]


def _nearest(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean `{matches[0]}`?" if matches else " `--help` lists what there is."


def guard(program: str, function: Callable[[], Any]) -> int:
    """
    Calls `function` and turns an error at its edge (`ValueError`, `OSError`, a package that is not installed) into one
    line on stderr. With the environment variable `JOINT_CONTROLLER_DEBUG=1` the error is raised with its traceback.

    Args:
        program (`str`):
            Name in front of the line, e.g. `"joint-controller train"`.
        function (`Callable`):
            What to run.

    Returns:
        `int`: Exit code: 0, 2 after an error, 130 after Ctrl-C.
    """
    try:
        function()
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if os.environ.get(DEBUG_VARIABLE) == "1":
            raise
        print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    return 0


def run_script(
    name: str, make_parser: Callable[[], ScriptParser], main: Callable[..., Any], argv: Sequence[str] | None = None
) -> int:
    """
    Parses the arguments and runs the script under [`guard`].

    Args:
        name (`str`):
            Name of the subcommand, e.g. `"train"`.
        make_parser (`Callable`):
            The script's `make_parser`.
        main (`Callable`):
            The script's `main`, called with what the parser returns.
        argv (`Sequence[str]`, *optional*, defaults to `sys.argv[1:]`):
            Command-line arguments.

    Returns:
        `int`: Exit code, as [`guard`] gives it.

    Example, at the end of a script:

    ```python
    if __name__ == "__main__":
        sys.exit(run_script("train", make_parser, main))
    ```
    """
    program = f"joint-controller {name}"

    def parse_and_run():
        parser = make_parser()
        parser.prog = program
        main(*parser.parse_args_and_config(argv))

    return guard(program, parse_and_run)
