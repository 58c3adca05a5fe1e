"""What the stages of a request cost, in terms of its knobs and the sizes of its inputs: each model family says it of its own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from ..knobs import KnobSetting


DECODE = "decode"
"""Name of the stage that gives each output token after the first."""

OVERHEAD = "overhead"
"""Name of what a request costs besides its other stages: checking, tokenizing, counting, detokenizing, bookkeeping."""

CONTROLLER = "controller"
"""Name of the controller's share: both stages, the features that they read, and which settings fit."""

REQUEST_SCOPE, MODEL_SCOPE = "request", "model"
LATENCY_SCOPES = (REQUEST_SCOPE, MODEL_SCOPE)
"""
What counts as the latency of a request: `"request"`, all that it costs by the clock, from the call with an image in memory to
the answer; `"model"`, the stages of the model alone.
"""


@dataclass(frozen=True)
class StageCost:
    """
    What the time of a stage is explained by.

    Args:
        features (`tuple[str, ...]`):
            Names of the physical terms that it is a sum of, e.g. `("constant", "views")`.
        inputs (`tuple[str, ...]`):
            Names of what the learned factor over that sum sees.
        scope (`str`, *optional*, defaults to `"model"`):
            `"model"` for a stage of the model, which counts in both scopes; `"request"` for one that counts in whole
            requests only, such as image processing.
    """

    features: tuple[str, ...]
    inputs: tuple[str, ...]
    scope: str = MODEL_SCOPE


@dataclass(frozen=True)
class StageTerms:
    """
    Values of a stage's [`StageCost`] for some requests: tensors whose shapes broadcast, none negative, each
    non-decreasing in every knob and count.

    Args:
        features (`tuple[torch.Tensor, ...]`):
            One for each name in [`StageCost.features`].
        inputs (`tuple[torch.Tensor, ...]`):
            One for each name in [`StageCost.inputs`].
    """

    features: tuple[torch.Tensor, ...]
    inputs: tuple[torch.Tensor, ...]


class CostModel(Protocol):
    """
    What a latency estimator has to know of a model family. Made by [`ExecutorFamily.cost_model`] for an executor's sizes.

    Attributes:
        count_names (`tuple[str, ...]`):
            Sizes of a request's inputs, as in [`Executor`].
        knob_names (`tuple[str, ...]`):
            Knobs that cost something by themselves, in addition to what they cost through the counts. Their values are
            numbers.
        stages (`Mapping[str, StageCost]`):
            The stages that are the executor's: those up to the first output token in order, and last `"decode"`, the mean
            step of an answer. What every request costs on top (`"overhead"`, `"controller"`) is no family's.
    """

    count_names: tuple[str, ...]
    knob_names: tuple[str, ...]
    stages: Mapping[str, StageCost]

    def terms(self, stage: str, columns: Mapping[str, torch.Tensor]) -> StageTerms:
        """
        The terms of a stage.

        Args:
            stage (`str`):
                One of `stages`.
            columns (`Mapping[str, torch.Tensor]`):
                Every count and every knob of `knob_names` by name, and `output_tokens`: floating tensors whose shapes
                broadcast.
        """

    def request_flops(self, setting: KnobSetting, counts: Mapping[str, int], output_tokens: int) -> int | None:
        """Floating-point operations of the matrix products of a request; `None` where the executor's sizes are unknown."""
