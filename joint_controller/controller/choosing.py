"""From logits to decisions: the likeliest values or sampled ones, among all settings or among those that fit."""

import itertools
import math
from collections.abc import Sequence

import torch

from ..knobs import STAGES, KnobSpace
from .modeling_joint_controller import JointControllerModel


class StageTable:
    """
    Where the settings of a knob space are in terms of the choices of the two stages.

    Args:
        knob_space ([`KnobSpace`]):
            The knob space.

    Attributes:
        sizes (`tuple[tuple[int, ...], tuple[int, ...]]`):
            Number of values of each knob of stage 1, and of stage 2.
        positions (`torch.LongTensor` of shape `(choices of stage 1, choices of stage 2)`):
            Position in the knob space of the setting of each pair of choices, the last knob of a stage moving fastest.
        values (`tuple[torch.LongTensor, torch.LongTensor]`, each of shape `(choices, knobs)`):
            For each choice of stage 1, and of stage 2, the position of each value among the values of its knob.
    """

    def __init__(self, knob_space: KnobSpace):
        knobs = [knob_space.decided_by(stage) for stage in STAGES]
        self.sizes = tuple(tuple(knob_space.sizes[knob] for knob in of_stage) for of_stage in knobs)
        all_positions = torch.arange(len(knob_space)).reshape(knob_space.sizes)
        self.positions = all_positions.permute(*knobs[0], *knobs[1]).reshape(math.prod(self.sizes[0]), -1)
        self.values = tuple(
            torch.tensor(list(itertools.product(*map(range, sizes))), dtype=torch.long) for sizes in self.sizes
        )


def likeliest(logits: Sequence[torch.Tensor], penalty: torch.Tensor) -> torch.Tensor:
    """
    The likeliest choice of a stage: of all its knobs together, since some combinations may be out while each of their values
    is in others.

    Args:
        logits (`Sequence[torch.Tensor]`):
            One of shape `(n, num_values)` for each knob, independent of each other.
        penalty (`torch.Tensor` of shape `(n, choices)` or `(1, 1)`, float64):
            0 for choices that may be taken, -inf for those that are out.

    Returns:
        `torch.LongTensor` of shape `(n,)`: positions among the stage's choices.
    """
    # The knobs are independent: the logarithm of a choice's probability is the sum of its logits and a constant. In float64,
    # as penalties are, whose rounding makes no ties, so that the likeliest choice is that of the likeliest values.
    sizes = [one.shape[-1] for one in logits]
    scores = penalty.reshape(len(penalty), *(sizes if penalty.shape[-1] > 1 else [1] * len(sizes)))
    for knob, one in enumerate(logits):
        scores = scores + one.reshape(len(one), *(size if other == knob else 1 for other, size in enumerate(sizes)))
    return scores.flatten(1).argmax(dim=-1)


def penalty_of(fits: torch.Tensor) -> torch.Tensor:
    """What the scores of settings change by: 0, or -inf for those that do not fit; float64."""
    return torch.zeros_like(fits, dtype=torch.float64).masked_fill_(~fits, -math.inf)


class BatchController:
    """
    Takes the decisions of a controller for a batch of requests, stage by stage. See [`~joint_controller.decisions.decide`].

    Args:
        controller ([`JointControllerModel`]):
            The controller.
        noise (`torch.Tensor` of shape `(n, values of all knobs)`, *optional*):
            Gumbel noise, with which decisions are sampled from the softmax of logits. By default the likeliest are taken.
        temperature (`float`, *optional*, defaults to 1.0):
            What logits are divided by before noise is added.
    """

    def __init__(self, controller: JointControllerModel, noise: torch.Tensor | None = None, temperature: float = 1.0):
        self.controller = controller
        self._noise = None if noise is None else noise.to(controller.device).split(controller.knob_space.sizes, dim=-1)
        self._temperature = temperature
        self._table = StageTable(controller.knob_space)

    def choose_stage1(
        self, question_features: torch.Tensor | None, latency_budget_ms: torch.Tensor, fits: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Stage 1 of n requests.

        Args:
            question_features (`torch.Tensor` of shape `(n, question_size)`, *optional*):
                As in [`JointControllerModel.forward`]. `None` for a controller that does not see it.
            latency_budget_ms (`torch.Tensor` of shape `(n,)`):
                Budgets in ms.
            fits (`torch.BoolTensor` of shape `(n, settings)`, *optional*):
                Settings to choose from in both stages, at least one for each request, see [`~latency.Guardrail`]. By
                default all. Only for the likeliest decisions.

        Returns:
            `torch.LongTensor` of shape `(n, knobs of stage 1)`: positions of values.

        Raises:
            ValueError: If decisions are sampled, and only some settings fit.
        """
        if fits is not None and self._noise is not None:
            raise ValueError("sampled decisions come from all settings: leave `fits` out, or take the likeliest ones.")
        self._question, self._budgets = question_features, latency_budget_ms
        self._penalty = None
        if fits is not None:
            self._penalty = penalty_of(
                fits.to(latency_budget_ms.device)[:, self._table.positions]
            )  # (n, first, second)
        logits = self.controller.stage1(question_features, latency_budget_ms)
        self._first = self._choose(1, logits, None if self._penalty is None else self._penalty.amax(dim=-1))
        return self._first

    def choose_stage2(self, vision_features: torch.Tensor | None) -> torch.Tensor:
        """
        Stage 2 of the requests that [`~BatchController.choose_stage1`] was last called for.

        Args:
            vision_features (`torch.Tensor` of shape `(n, vision_size)`, *optional*):
                As in [`JointControllerModel.forward`]. `None` for a controller that does not see it.

        Returns:
            `torch.LongTensor` of shape `(n, knobs of stage 2)`: positions of values.
        """
        logits = self.controller.stage2(vision_features, self._question, self._budgets, self._first)
        penalty = self._penalty
        if penalty is not None:
            penalty = penalty[torch.arange(len(penalty), device=penalty.device), self._place(self._first)]
        return self._choose(2, logits, penalty)

    def _choose(self, stage: int, logits: Sequence[torch.Tensor], penalty: torch.Tensor | None) -> torch.Tensor:
        if not logits:
            return torch.empty(len(self._budgets), 0, dtype=torch.long, device=self._budgets.device)
        if self._noise is not None:
            noise = [self._noise[knob] for knob in self.controller.knob_space.decided_by(stage)]
            scores = [one / self._temperature + its_noise for one, its_noise in zip(logits, noise, strict=True)]
            return torch.stack([one.argmax(dim=-1) for one in scores], dim=-1)
        penalty = logits[0].new_zeros(1, 1, dtype=torch.float64) if penalty is None else penalty
        return self._table.values[stage - 1].to(penalty.device)[likeliest(logits, penalty)]

    def _place(self, values: torch.Tensor) -> torch.Tensor:
        """Positions among the choices of stage 1."""
        place = torch.zeros_like(self._budgets, dtype=torch.long)
        for column, size in enumerate(self._table.sizes[0]):
            place = place * size + values[:, column]
        return place
