"""
What the modules behind the `joint-controller` command share. Each has `make_parser()`, which returns a [`ScriptParser`],
and `main(...)`, which takes what the parser returns; it runs through `joint-controller <name>`, `python -m <module>` and
`accelerate launch -m <module>` alike.
"""

import argparse
import dataclasses
import difflib
import inspect
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml


# Libraries show bars for work of milliseconds, too. tqdm reads this when it is imported: what takes less shows none.
os.environ.setdefault("TQDM_DELAY", "2")
from trl import TrlParser  # noqa: E402

from ..cli import COMMANDS, print_help_text


DEBUG_VARIABLE = "JOINT_CONTROLLER_DEBUG"
"""Environment variable: set to 1, errors come with their traceback."""

# What help says of inherited fields that most trainings set. In words of our own: they must not change with the version of
# the library that they come from.
COMMON_INHERITED_FIELDS = {
    "output_dir": "Folder of the controller, its checkpoints and its tables.",
    "resume_from_checkpoint": "`true` continues the run in the output folder.",
    "seed": "Seed of everything that is drawn.",
    "max_steps": "Optimiser steps. By default, as many as `num_train_epochs` takes.",
    "num_train_epochs": "Passes over the training samples.",
    "per_device_train_batch_size": "Answers (questions x settings each) in a training batch.",
    "per_device_eval_batch_size": "Questions in an evaluation batch.",
    "num_generations": "Settings that are tried for each question.",
    "steps_per_generation": "Batches in a rollout.",
    "num_iterations": "Passes over a rollout.",
    "gradient_accumulation_steps": "Batches in an optimiser step.",
    "lr_scheduler_type": "How the learning rate falls, e.g. `linear` or `cosine`.",
    "warmup_steps": "Optimiser steps in which the learning rate rises.",
    "weight_decay": "Weight decay of AdamW.",
    "max_grad_norm": "Length that gradients are clipped to.",
    "temperature": "Temperature at which settings are drawn in training.",
    "beta": "Coefficient of the divergence from the initial controller.",
    "epsilon": "Range that the probability ratio is clipped to.",
    "loss_type": "Variant of the GRPO loss.",
    "eval_on_start": "Whether to evaluate before the first step.",
    "logging_steps": "Optimiser steps between two logs.",
    "save_total_limit": "Checkpoints that are kept.",
    "push_to_hub": "Whether to push the controller to the Hub.",
    "hub_model_id": "Repository on the Hub to push to.",
    "use_cpu": "Whether to train on the CPU though there is a GPU.",
}

# How help writes the types of values.
_TYPE_NAMES = {"str": "TEXT", "int": "INT", "float": "NUMBER", "string_to_bool": "BOOL", "dict": "MAPPING"}


class ScriptParser(TrlParser):
    """
    [`trl.TrlParser`] (flags over a YAML recipe over defaults) that refuses what it does not know: an unknown field or flag,
    a value of the wrong type, a flag spelt in part. Errors are `ValueError`s that name the field, where it stood and the
    nearest known one.

    Help lists the fields that this package declares, and of those that they inherit from other libraries the common ones;
    `--help_all` lists all. It depends neither on the terminal nor on the versions of other libraries.

    Args:
        dataclass_types (`Iterable[type]`):
            Dataclasses whose fields are the script's arguments.
    """

    def __init__(self, dataclass_types: Iterable[type], **kwargs):
        dataclass_types = tuple(dataclass_types)
        # An abbreviation that is unique today names two fields once another is added.
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)
        self.add_argument("--help_all", "--help-all", action=_HelpAllAction, nargs=0, dest=argparse.SUPPRESS)
        self.recipe_path: str | None = None
        self._kinds: dict[str, set[type]] = {}  # what the values of each field may be
        self._own_fields: list[str] = []  # in the order of their declarations
        self._libraries: dict[str, str] = {}  # those that declare the other fields
        for dataclass_type in dataclass_types:
            hints = get_type_hints(dataclass_type)
            declared_by: dict[str, type] = {}
            for base in reversed(dataclass_type.__mro__):
                for name in inspect.get_annotations(base):
                    declared_by.pop(name, None)
                    declared_by[name] = base
            fields = {field.name for field in dataclasses.fields(dataclass_type) if field.init}
            for name in (name for name in declared_by if name in fields):
                self._kinds[name] = {get_origin(kind) or kind for kind in (hints[name], *get_args(hints[name]))}
                library = declared_by[name].__module__.partition(".")[0]
                # A script that is run as a module is `__main__`, what it imports is not.
                if library in (dataclass_type.__module__.partition(".")[0], __name__.partition(".")[0]):
                    self._own_fields.append(name)
                else:
                    self._libraries[name] = library
        # A field that is true by default has two flags: the second one, `--no_field`, is left out.
        self._fields = {action.dest: action for action in reversed(self._actions) if action.dest in self._kinds}

    def error(self, message: str):
        """Raises instead of printing the usage: that of a training script has hundreds of lines."""
        raise ValueError(message)

    def print_help(self, file=None) -> None:
        print_help_text(self.format_help())

    def format_help(self, everything: bool = False) -> str:
        """The help text; `everything` explains all inherited fields, in the words of the installed libraries."""
        lines = [f"usage: {self.prog} [--config RECIPE.yaml] [--FIELD VALUE ...]", ""]
        if self.description is not None:
            # Paragraphs are made one line each.
            lines += [re.sub(r"(?<=\S)\n(?=\S)", " ", self.description.strip()), ""]
        lines += ["fields, as flags or in a recipe (YAML), which flags override:"]
        lines += [line for name in self._own_fields for line in _describe(self._fields[name])]
        if self._libraries:
            inherited_from = f"fields of {' and '.join(sorted(set(self._libraries.values())))}"
            if everything:
                lines += ["", f"{inherited_from}:"]
                lines += [line for name in self._libraries for line in _describe(self._fields[name])]
            else:
                lines += ["", f"common {inherited_from}; `{self.prog} --help_all` lists all:"]
                for name, text in COMMON_INHERITED_FIELDS.items():
                    if name in self._libraries:
                        lines += [f"  --{name}", f"      {text}"]
        return "\n".join(lines) + "\n"

    def parse_args_and_config(self, args: Iterable[str] | None = None, **kwargs) -> tuple[Any, ...]:
        """
        Parses flags (by default `sys.argv[1:]`), and the recipe that `--config` names, into instances of the dataclasses.

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
            position = args.index("--config")
            if "--config" in args[position + 1 :]:
                raise ValueError("`--config` is given twice: give one recipe, and override its fields with flags.")
            if position + 1 == len(args) or not args[position + 1] or args[position + 1].startswith("--"):
                raise ValueError("`--config` needs a value: the path of a recipe (YAML).")
            self.recipe_path = args[position + 1]
            del args[position : position + 2]
            self._read_recipe()
        return super().parse_args_and_config(args, **kwargs)

    def _read_recipe(self) -> None:
        """Takes the fields of the recipe as defaults, and sets the environment variables of its `env`, as TRL does."""
        where = f"recipe '{self.recipe_path}'"
        if not Path(self.recipe_path).is_file():
            raise FileNotFoundError(f"{where} does not exist: check the path after `--config`.")
        try:
            with open(self.recipe_path, encoding="utf-8") as file:
                recipe = yaml.load(file, _RecipeLoader)
        except UnicodeDecodeError as error:
            raise ValueError(f"{where} is not UTF-8 text ({error}): save it as UTF-8.") from error
        except yaml.YAMLError as error:
            raise ValueError(f"{where} is not valid YAML: {error}") from error
        if not isinstance(recipe, dict):
            raise ValueError(f"{where} holds no fields: write one a line, as `field: value`.")
        for key in recipe:
            if not isinstance(key, str):
                raise ValueError(f"{where} has the key {key!r}: keys are names of fields.")
        environment = recipe.pop("env", {})
        if not isinstance(environment, dict):
            raise ValueError(f"field `env` in {where} must be a mapping of environment variables to values.")
        os.environ.update({str(name): str(value) for name, value in environment.items()})
        for field, value in recipe.items():
            if field not in self._fields:
                raise ValueError(f"unknown field `{field}` in {where}.{_nearest(field, self._fields)}")
            # argparse converts and checks flags, but takes a default that is not a string as it is.
            recipe[field] = self._convert(self._fields[field], value)
        self.set_defaults_with_config(**recipe)

    def parse_known_args(self, args=None, namespace=None):
        # Checked before the dataclasses are built, so that a misspelt flag is reported and not what follows from it.
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flags = [arg.split("=", 1)[0] for arg in unknown if arg.startswith("-")]
            if not flags:
                raise ValueError(f"unexpected argument '{unknown[0]}': arguments are given as `--field value`.")
            known = [option for action in self._actions for option in action.option_strings]
            raise ValueError(f"unknown flag `{flags[0]}`.{_nearest(flags[0], known)}")
        for name, value in vars(namespace).items():
            _check_number(f"`{name}`", name, value)
        return namespace, unknown

    def _convert(self, action: argparse.Action, value: Any) -> Any:
        where = f"field `{action.dest}` in recipe '{self.recipe_path}'"
        if value is None:
            if action.required or action.default is not None:
                raise ValueError(f"{where} has no value: give one, or leave the field out.")
            return None
        takes_list = action.nargs in ("+", "*")
        kinds = self._kinds[action.dest]
        if (isinstance(value, dict) and dict in kinds) or (
            isinstance(value, list) and list in kinds and not takes_list
        ):
            return value
        if takes_list and not isinstance(value, list):
            raise ValueError(f"{where} must be a list, got {value!r}: write `{action.dest}: [{value}]`.")
        items = value if takes_list else [value]
        if any(item is None or isinstance(item, list | dict) for item in items):
            raise ValueError(f"{where} must be {'a list of values' if takes_list else 'one value'}, got {value!r}.")
        try:
            converted = [action.type(str(item)) for item in items]
        except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
            kind = getattr(action.type, "__name__", str(action.type))
            raise ValueError(f"{where} has the value {value!r}, which is not a valid {kind}: {error}") from error
        if action.choices is not None and any(item not in action.choices for item in converted):
            raise ValueError(f"{where} has the value {value!r}: choose from {', '.join(map(repr, action.choices))}.")
        converted = converted if takes_list else converted[0]
        _check_number(where, action.dest, converted)
        return converted


class _HelpAllAction(argparse.Action):
    """`--help_all`: prints the help of all fields."""

    def __call__(self, parser: ScriptParser, namespace, values, option_string=None):
        print_help_text(parser.format_help(everything=True))
        parser.exit()


class _RecipeLoader(yaml.SafeLoader):
    """Reads plain data, and refuses a key that occurs twice in a mapping instead of taking the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                if key.value in lines:
                    raise yaml.YAMLError(f"`{key.value}` is in line {lines[key.value]} and again in line {line}.")
                lines[key.value] = line
        return super().construct_mapping(node, deep)


def _check_number(where: str, field: str, value: Any) -> None:
    """Refuses numbers that no field takes: NaN, and seeds that random generators refuse."""
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, float) and math.isnan(number):
            raise ValueError(f"{where} has the value NaN: give a number.")
        if (field == "seed" or field.endswith("_seed")) and isinstance(number, int) and not 0 <= number < 2**32:
            raise ValueError(f"{where} has the value {number}: seeds are whole numbers from 0 to {2**32 - 1}.")


def _describe(action: argparse.Action) -> list[str]:
    """Lines of a help text that explain a field."""
    text = (action.help or "") % vars(action)
    if action.required:
        text += " (required)"
    elif action.default not in (None, "", []):
        default = action.default if isinstance(action.default, list) else [action.default]
        text += f" (default: {' '.join(map(str, default))})"
    return [f"  --{action.dest} {_value_name(action)}", f"      {' '.join(text.split())}"]


def _value_name(action: argparse.Action) -> str:
    """How help writes the value of a field, e.g. `INT`, `{fast,exact}` or `TEXT ...`."""
    if action.metavar is not None:
        name = action.metavar
    elif action.choices is not None:
        name = f"{{{','.join(map(str, action.choices))}}}"
    else:
        name = _TYPE_NAMES.get(action.type.__name__, action.type.__name__.upper())
    return f"{name} ..." if action.nargs in ("+", "*") else f"[{name}]" if action.nargs == "?" else name


def _nearest(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean `{matches[0]}`?" if matches else " `--help` lists what there is."


def guard(program: str, function: Callable[[], Any]) -> int:
    """
    Calls `function` and turns an error at its edge (`ValueError`, `OSError`, a package that is not installed) into one
    line on stderr, after the name of the program. With the environment variable `JOINT_CONTROLLER_DEBUG=1` the error is
    raised with its traceback. Returns an exit code: 0, 2 after an error, 130 after Ctrl-C.
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
    Parses the arguments (by default `sys.argv[1:]`) of a subcommand and runs its script under [`guard`], whose exit code it
    returns. At the end of a script:

    ```python
    if __name__ == "__main__":
        sys.exit(run_script("train", make_parser, main))
    ```
    """
    return guard(
        f"joint-controller {name}", lambda: main(*command_parser(name, make_parser).parse_args_and_config(argv))
    )


def command_parser(name: str, make_parser: Callable[[], ScriptParser]) -> ScriptParser:
    """The parser of a subcommand, which knows its name, what the subcommand does, and an example."""
    parser = make_parser()
    parser.prog = f"joint-controller {name}"
    if parser.description is None and name in COMMANDS:
        command = COMMANDS[name]
        summary = command.summary[0].upper() + command.summary[1:]
        parser.description = f"{summary}.\n\nexample:\n  joint-controller {name} {command.example}"
    return parser
