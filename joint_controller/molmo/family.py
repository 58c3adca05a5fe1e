"""Molmo as an executor family, see [`ExecutorFamily`]."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from ..knobs import KnobSpace, KnobValue
from . import MolmoConfig, MolmoProcessor
from .costs import MolmoCostModel
from .executor import MolmoExecutor
from .executor.input_counter import MolmoInputCounter
from .executor.random_executor import RANDOM_CONFIGS, random_executor
from .knob_space import molmo_knob_space
from .shape import molmo_shape


model_type = MolmoConfig.model_type
random_names = tuple(RANDOM_CONFIGS)
code_folders = (Path(__file__).parent,)


def load_executor(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype | None,
    knob_values: Mapping[str, list[KnobValue]],
    knob_space: KnobSpace | None,
    **options: Any,
) -> MolmoExecutor:
    """Loads a checkpoint, see [`ExecutorFamily.load_executor`]. `options` are those of [`MolmoExecutor.from_pretrained`]."""
    if knob_space is None:
        knob_space = molmo_knob_space(MolmoConfig.from_pretrained(folder), knob_values)
    return MolmoExecutor.from_pretrained(folder, device, dtype, knob_space=knob_space, **options)


def load_input_counter(
    folder: Path, knob_values: Mapping[str, list[KnobValue]], max_new_tokens: int
) -> MolmoInputCounter:
    """Loads what counts inputs, see [`ExecutorFamily.load_input_counter`]."""
    config = MolmoConfig.from_pretrained(folder)
    processor = MolmoProcessor.from_pretrained(folder)
    return MolmoInputCounter(config, processor, molmo_knob_space(config, knob_values), max_new_tokens)


def make_random_executor(
    name: str,
    device: torch.device,
    dtype: torch.dtype | None,
    knob_values: Mapping[str, list[KnobValue]],
    knob_space: KnobSpace | None,
    seed: int,
    importance: Any = None,
    **options: Any,
) -> MolmoExecutor:
    """Makes an executor with random weights, see [`ExecutorFamily.make_random_executor`]."""
    if importance is not None:
        raise ValueError(
            f"`importance` {importance!r} scores blocks of a trained model, but the weights of '{name}' are random: leave "
            "it out."
        )
    config = RANDOM_CONFIGS[name]()
    if knob_space is None:
        knob_space = molmo_knob_space(config, knob_values)
    return random_executor(config, device, dtype, seed, knob_space=knob_space, **options)


def shape_of(folder: Path) -> dict[str, Any]:
    """Sizes of a checkpoint, see [`ExecutorFamily.shape_of`]."""
    return molmo_shape(MolmoConfig.from_pretrained(folder))


def cost_model(
    shape: Mapping[str, Any] | None, prefill_lengths: list[int] | None, knob_names: Collection[str]
) -> MolmoCostModel:
    """What stages cost, see [`ExecutorFamily.cost_model`]."""
    return MolmoCostModel(shape, prefill_lengths, knob_names)
