"""Finds an executor by the `model_type` of its checkpoint: each model family is one room, and no other room names it."""

import importlib
import json
import re
from collections.abc import Collection, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import snapshot_download

from ..knobs import KnobSpace, KnobValue
from .costs import CostModel
from .executor import Executor, InputCounter


EMBEDDED = "embedded"
"""Name that stands for the executor that ships with the package."""

RANDOM_PREFIX = "random:"
"""Begins the name of an executor with random weights, e.g. `"random:molmoe-1b"`."""


class ExecutorFamily(Protocol):
    """
    What a model family offers: an object (a module will do) with these names.

    Attributes:
        model_type (`str`):
            As in the `config.json` of its checkpoints.
        random_names (`tuple[str, ...]`):
            Sizes that an executor with random weights can be made of, e.g. `("molmoe-1b",)`.
        code_folders (`tuple[Path, ...]`):
            Folders with the code that the latency of its executors depends on.
    """

    model_type: str
    random_names: tuple[str, ...]
    code_folders: tuple[Path, ...]

    def load_executor(
        self,
        folder: Path,
        device: torch.device,
        dtype: torch.dtype | None,
        knob_values: Mapping[str, list[KnobValue]],
        knob_space: KnobSpace | None,
        **options: Any,
    ) -> Executor:
        """
        Loads the executor of a checkpoint.

        Args:
            folder (`Path`):
                Folder of the checkpoint.
            device (`torch.device`):
                Where to put it.
            dtype (`torch.dtype`, *optional*):
                Precision. Defaults to what suits the device.
            knob_values (`Mapping[str, list[KnobValue]]`):
                Values of some knobs, by name, as strings or in the knob's type; the others have the checkpoint's.
            knob_space ([`KnobSpace`], *optional*):
                A whole knob space, in place of `knob_values`.
            options:
                Further arguments of [`load_executor`].
        """

    def load_input_counter(
        self, folder: Path, knob_values: Mapping[str, list[KnobValue]], max_new_tokens: int
    ) -> InputCounter:
        """Loads what tells how large the inputs of an executor are. No weights."""

    def make_random_executor(
        self,
        name: str,
        device: torch.device,
        dtype: torch.dtype | None,
        knob_values: Mapping[str, list[KnobValue]],
        knob_space: KnobSpace | None,
        seed: int,
        **options: Any,
    ) -> Executor:
        """
        Makes an executor of one of `random_names` on its device, with arguments as [`~ExecutorFamily.load_executor`] takes
        them. It answers nonsense, in the time of a trained one.
        """

    def shape_of(self, folder: Path) -> dict[str, Any]:
        """[`Executor.shape`] of a checkpoint, from its configuration."""

    def cost_model(
        self, shape: Mapping[str, Any] | None, prefill_lengths: list[int] | None, knob_names: Collection[str]
    ) -> CostModel:
        """
        What a latency estimator has to know of an executor.

        Args:
            shape (`Mapping[str, Any]`, *optional*):
                [`Executor.shape`]. `None` if it is unknown.
            prefill_lengths (`list[int]`, *optional*):
                [`Executor.prefill_lengths`].
            knob_names (`Collection[str]`):
                Knobs that there are: costs of others, which a family may have, are left out.

        Raises:
            ValueError: If a knob is missing that costs cannot do without.
        """


ENTRY_POINT_GROUP = "joint_controller.executor_families"
"""Entry points of installed packages: the name is a model type, the value its family (`my_package.family` or
`my_package:FAMILY`)."""

# Families by model type: the module of each, imported when it is asked for, or what was registered.
_FAMILIES: dict[str, str | ExecutorFamily] = {"molmo": "joint_controller.molmo.family"}


def register_executor_family(family: ExecutorFamily) -> None:
    """
    Makes a family known, in addition to those that come with the package.

    Args:
        family ([`ExecutorFamily`]):
            The family.

    Raises:
        ValueError: If there is another family of this `model_type`.
    """
    if _FAMILIES.setdefault(family.model_type, family) is not family:
        raise ValueError(f"there is an executor family of the model type '{family.model_type}' already.")


def executor_family(model_type: str) -> ExecutorFamily:
    """
    The family of a `model_type`.

    Raises:
        ValueError: If there is none.
    """
    if model_type not in _FAMILIES:
        installed = entry_points(group=ENTRY_POINT_GROUP)
        if model_type not in installed.names:
            raise ValueError(
                f"there is no executor for models of the type '{model_type}': choose one of "
                f"{', '.join(_known_model_types())}, or register its family with `register_executor_family`."
            )
        _FAMILIES[model_type] = installed[model_type].load()
    family = _FAMILIES[model_type]
    return importlib.import_module(family) if isinstance(family, str) else family


def _known_model_types() -> list[str]:
    return list(dict.fromkeys([*_FAMILIES, *sorted(entry_points(group=ENTRY_POINT_GROUP).names)]))


def load_executor(
    model_path: str | Path = EMBEDDED,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    knob_values: Mapping[str, list[KnobValue]] | None = None,
    knob_space: KnobSpace | None = None,
    seed: int = 42,
    **options: Any,
) -> Executor:
    """
    Loads the executor of a checkpoint, whatever its family, or makes one with random weights.

    Args:
        model_path (`str` or `Path`, *optional*, defaults to `"embedded"`):
            A model folder, the name of a Hub repository (`org/name`), `"embedded"` for the executor that ships with the
            package, or `random:` and a name of sizes, e.g. `"random:molmoe-1b"`: its weights cost what trained ones do.
        device (`str` or `torch.device`, *optional*):
            Defaults to `"cuda"` where there is one, else `"cpu"`.
        dtype (`str` or `torch.dtype`, *optional*):
            Precision. Defaults to bfloat16 on a CUDA device, else float32.
        knob_values (`Mapping[str, list[KnobValue]]`, *optional*):
            Values of some knobs, cheapest first. Those of the others are the checkpoint's.
        knob_space ([`KnobSpace`], *optional*):
            All knobs, e.g. those of a controller.
        seed (`int`, *optional*, defaults to 42):
            Seed of random weights.
        **options:
            What else the family's executor takes: `importance`, `max_new_tokens`, `batch_size`, `num_workers`, `mode`, …

    Returns:
        [`Executor`]

    Raises:
        FileNotFoundError: If the model cannot be found.
        ValueError: If there is no executor for its family, the checkpoint is incomplete, or an argument does not fit it.
    """
    device = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    knob_values = dict(knob_values or {})
    if knob_values and knob_space is not None:
        raise ValueError("both `knob_values` and `knob_space` are given: give one of them.")
    if str(model_path).startswith(RANDOM_PREFIX):
        name = str(model_path).removeprefix(RANDOM_PREFIX)
        families = [executor_family(model_type) for model_type in _known_model_types()]
        for family in families:
            if name in family.random_names:
                return family.make_random_executor(name, device, dtype, knob_values, knob_space, seed, **options)
        known = [f"{RANDOM_PREFIX}{one}" for family in families for one in family.random_names]
        raise ValueError(f"`model_path` '{model_path}' is unknown: choose {', '.join(known)}.")
    folder = find_model_folder(model_path)
    return executor_family(_model_type(folder)).load_executor(
        folder, device, dtype, knob_values, knob_space, **options
    )


def load_input_counter(
    model_path: str | Path = EMBEDDED,
    knob_values: Mapping[str, list[KnobValue]] | None = None,
    max_new_tokens: int = 16,
) -> InputCounter:
    """
    Loads what tells how large the inputs of an executor are. No weights.

    Args:
        model_path (`str` or `Path`, *optional*, defaults to `"embedded"`), knob_values (*optional*):
            As in [`load_executor`].
        max_new_tokens (`int`, *optional*, defaults to 16):
            Room that is left for an answer.

    Raises:
        FileNotFoundError: If the model cannot be found.
        ValueError: If the checkpoint lacks a knob value.
    """
    folder = find_model_folder(model_path)
    return executor_family(_model_type(folder)).load_input_counter(folder, dict(knob_values or {}), max_new_tokens)


def executor_shape(model_path: str | Path) -> tuple[str, dict[str, Any]]:
    """Model type and [`Executor.shape`] of a checkpoint, from its configuration alone."""
    folder = find_model_folder(model_path)
    model_type = _model_type(folder)
    return model_type, executor_family(model_type).shape_of(folder)


def find_model_folder(model_path: str | Path) -> Path:
    """
    The folder that a `model_path` stands for; a Hub repository is fetched into the local cache.

    Raises:
        FileNotFoundError: If there is none.
    """
    if str(model_path) == EMBEDDED:
        return embedded_executor_path()
    folder = Path(model_path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"`model_path` '{model_path}' is a folder without a config.json: give the folder of a checkpoint."
            )
        return folder
    what_to_give = f"give a model folder, the name of a Hub repository (org/name), or '{EMBEDDED}'"
    if re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", str(model_path)) is None:
        raise FileNotFoundError(f"`model_path` '{model_path}' does not exist: {what_to_give}.")
    try:
        return Path(snapshot_download(str(model_path), allow_patterns=["*.json", "*.safetensors", "*.txt"]))
    except OSError as error:
        raise FileNotFoundError(
            f"`model_path` '{model_path}' is not a folder here, and the Hub did not give a repository of that name "
            f"({type(error).__name__}): {what_to_give}."
        ) from error


def embedded_executor_path() -> Path:
    """
    Folder of the executor that ships with the package.

    Raises:
        FileNotFoundError: If the installed package has no such folder.
    """
    path = Path(__file__).parents[1] / "assets" / "executor"
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"the embedded executor is missing from '{path}': install the package again, or train it with "
            "`joint-controller train-executor`."
        )
    return path


def _model_type(folder: Path) -> str:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"'{folder / 'config.json'}' is not valid JSON ({error}): fetch the checkpoint again."
        ) from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ValueError(f"'{folder / 'config.json'}' names no `model_type`: give the folder of a checkpoint.")
    return config["model_type"]
