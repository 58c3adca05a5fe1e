"""The two stages of a controller on the host, for one request at a time."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.special import ndtr
from torch import nn

from .modeling_joint_controller import BudgetEncoder, ChoiceHead, FeatureProjector, JointControllerModel
from .setting_fit import RequestFit


Layer = Callable[[np.ndarray], np.ndarray]


class HostStages:
    """
    Takes the choices that [`JointControllerModel.score_stage1`] and [`JointControllerModel.score_stage2`] score highest, in
    NumPy.

    Between two requests a model runs, and the core forgets all code but the model's. So what a stage takes is not its
    arithmetic, but to fetch the code of each kind of operation again: 10 to 50 µs for one of torch's. Here there are few kinds,
    and they are small.

    Args:
        controller ([`JointControllerModel`]):
            The controller. Its weights must not be replaced afterwards.
    """

    def __init__(self, controller: JointControllerModel):
        table, stage1, stage2 = controller.table, controller.stage1, controller.stage2
        self._sees_slack = controller.config.sees_slack
        # Positions of the settings that each choice of stage 1 leaves, by choice of stage 2; and the values it stands for.
        self._left: list[list[int]] = table.positions.tolist()
        self._first_values: list[list[int]] = table.values[0].tolist()
        # A stage without knobs has one choice, and no layers.
        self._has_stage1, self._has_stage2 = map(bool, table.sizes)
        if self._has_stage1:
            self._budget1 = _budget_encoder(stage1.budget_encoder)
            self._question1 = _projector(stage1.question_projector)
            self._layers1 = _hidden_layers(stage1.trunk.layers), _head(stage1.head)
        if self._has_stage2:
            self._vision2 = _projector(stage2.vision_projector)
            self._question2 = _projector(stage2.question_projector)
            self._budget2 = _budget_encoder(stage2.budget_encoder)
            self._embeddings2 = [_array(embedding.weight) for embedding in stage2.choice_embeddings]
            self._layers2 = _hidden_layers(stage2.trunk.layers), _head(stage2.head)

    def choose_stage1(
        self, question_features: torch.Tensor | None, latency_budget_ms: float, fit: RequestFit | None = None
    ) -> int:
        """As [`RequestController.choose_stage1`]."""
        self._budget_ms, self._first = latency_budget_ms, 0
        self._question = None if question_features is None else question_features[0].cpu().numpy()
        self._fits = [True] * len(self._left) * len(self._left[0]) if fit is None else fit.fits
        self._slack = fit.slack if self._sees_slack else None
        if self._has_stage1:
            inputs = [self._budget1(latency_budget_ms, self._slack)]
            if self._question1 is not None:
                inputs.append(self._question1(self._question))
            is_left = [any(self._fits[position] for position in left) for left in self._left]
            self._first = _best(self._layers1, inputs, is_left)
        return self._first

    def choose_stage2(self, vision_features: torch.Tensor | None) -> int:
        """As [`RequestController.choose_stage2`]."""
        if not self._has_stage2:
            return 0
        left, inputs = self._left[self._first], []
        if self._vision2 is not None:
            inputs.append(self._vision2(vision_features[0].cpu().numpy()))
        if self._question2 is not None:
            inputs.append(self._question2(self._question))
        slack = [self._slack[position] for position in left] if self._sees_slack else None
        inputs.append(self._budget2(self._budget_ms, slack))
        values = self._first_values[self._first]
        inputs += [embedding[value] for embedding, value in zip(self._embeddings2, values, strict=True)]
        return _best(self._layers2, inputs, [self._fits[position] for position in left])


def _best(layers: tuple[Layer, Layer], inputs: Sequence[np.ndarray], is_left: Sequence[bool]) -> int:
    """Position of the choice with the highest score among those that are left."""
    trunk, head = layers
    scores = head(trunk(np.concatenate(inputs))).tolist()
    return max((choice for choice, left in enumerate(is_left) if left), key=scores.__getitem__)


# What modules of the controller compute, for one request, in vectors.


def _array(values: torch.Tensor) -> np.ndarray:
    """The tensor's own memory, if it is on the CPU."""
    return values.detach().cpu().numpy()


def _linear(linear: nn.Linear) -> Layer:
    weight, bias = _array(linear.weight), _array(linear.bias)
    return lambda inputs: weight @ inputs + bias


def _gelu(inputs: np.ndarray) -> np.ndarray:
    return inputs * ndtr(inputs)


def _hidden_layers(layers: nn.Sequential) -> Layer:
    """Linear layers, each with a GELU after it."""
    linears = [_linear(layer) for layer in layers if isinstance(layer, nn.Linear)]

    def forward(inputs: np.ndarray) -> np.ndarray:
        for linear in linears:
            inputs = _gelu(linear(inputs))
        return inputs

    return forward


def _projector(projector: FeatureProjector | None) -> Layer | None:
    if projector is None:
        return None
    weight, bias, epsilon = _array(projector.norm.weight), _array(projector.norm.bias), projector.norm.eps
    linear, share = _linear(projector.projection), np.full_like(weight, 1 / len(weight))

    def forward(features: np.ndarray) -> np.ndarray:
        # Products for the mean and the variance: they are in the core's cache already, or will be needed soon.
        centered = features + -(share @ features)
        scale = (float(centered @ centered) / len(centered) + epsilon) ** -0.5
        return _gelu(linear(centered * scale * weight + bias))

    return forward


def _budget_encoder(encoder: BudgetEncoder) -> Callable[[float, Sequence[float] | None], np.ndarray]:
    mlp, frequencies = _hidden_layers(encoder.mlp), encoder.frequencies.tolist()

    def forward(latency_budget_ms: float, slack: Sequence[float] | None) -> np.ndarray:
        normalized = (latency_budget_ms - encoder.minimum_ms) / encoder.range_ms
        angles = [normalized * frequency for frequency in frequencies]
        return mlp(np.array([*map(math.sin, angles), *map(math.cos, angles), *(slack or ())], dtype=np.float32))

    return forward


def _head(head: ChoiceHead) -> Layer:
    first, *others = [_linear(linear) for linear in head.linears]

    def forward(hidden: np.ndarray) -> np.ndarray:
        scores = first(hidden)
        for linear in others:
            scores = (scores[:, None] + linear(hidden)).reshape(-1)
        return scores

    return forward
