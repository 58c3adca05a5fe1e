"""What the two stages choose from: all values of their knobs together."""

import itertools
import math
from collections.abc import Sequence

import torch

from ..knobs import STAGES, KnobSpace


class StageTable:
    """
    Where the settings of a knob space are in terms of the choices of the two stages. A choice is one value for each knob of a
    stage; a stage without knobs has one choice.

    Args:
        knob_space ([`KnobSpace`]):
            The knob space.

    Attributes:
        sizes (`tuple[tuple[int, ...], tuple[int, ...]]`):
            Number of values of each knob of stage 1, and of stage 2.
        num_choices (`tuple[int, int]`):
            Number of choices of stage 1, and of stage 2.
        positions (`torch.LongTensor` of shape `(choices of stage 1, choices of stage 2)`):
            Position in the knob space of the setting of each pair of choices, the last knob of a stage moving fastest.
        values (`tuple[torch.LongTensor, torch.LongTensor]`, each of shape `(choices, knobs)`):
            For each choice of stage 1, and of stage 2, the position of each value among the values of its knob.
        setting_values (`torch.LongTensor` of shape `(settings, knobs)`):
            The same for each setting, knobs and settings in the order of the knob space.
        settings_of_first (`tuple[KnobSetting, ...]`):
            For each choice of stage 1, the setting with its values and the cheapest of the other knobs: what images are
            encoded at.
    """

    def __init__(self, knob_space: KnobSpace):
        knobs = [knob_space.decided_by(stage) for stage in STAGES]
        self.sizes = tuple(tuple(knob_space.sizes[knob] for knob in of_stage) for of_stage in knobs)
        self.num_choices = tuple(math.prod(sizes) for sizes in self.sizes)
        # On the CPU also where a model is loaded, whose tensors have no values at first.
        all_positions = torch.arange(len(knob_space), device="cpu").reshape(knob_space.sizes)
        self.positions = all_positions.permute(*knobs[0], *knobs[1]).reshape(self.num_choices)
        self.values = tuple(_every_choice(sizes) for sizes in self.sizes)
        self.setting_values = _every_choice(knob_space.sizes)
        # Every knob's cheapest value is its first, so the first choice of stage 2 has them.
        self.settings_of_first = tuple(knob_space.settings[position] for position in self.positions[:, 0].tolist())


def _every_choice(sizes: Sequence[int]) -> torch.Tensor:
    return torch.tensor(list(itertools.product(*map(range, sizes))), dtype=torch.long, device="cpu")


def knob_log_probs(
    log_probs: torch.Tensor, sizes: Sequence[int], values: torch.Tensor
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    r"""
    Splits the probability of a stage's choice by the chain rule into one factor for each of its knobs:
    \\(p(k_1)\, p(k_2 \mid k_1) \dots\\)

    Args:
        log_probs (`torch.Tensor` of shape `(n, choices)`):
            Logarithms of the probabilities of choices.
        sizes (`Sequence[int]`):
            Number of values of each knob; their product is the number of choices.
        values (`torch.LongTensor` of shape `(n, knobs)`):
            Position of the value taken of each knob.

    Returns:
        `tuple[list[torch.Tensor], list[torch.Tensor]]`: for each knob, of shape `(n,)`, the log-probability of the value taken
        given those taken before, and the entropy of what it was taken from.
    """
    taken, entropies = [], []
    rows = torch.arange(len(log_probs), device=log_probs.device)
    left = log_probs
    for knob, size in enumerate(sizes):
        left = left.reshape(len(left), size, -1)
        of_knob = left.logsumexp(dim=-1).log_softmax(dim=-1)  # (n, size)
        taken.append(of_knob[rows, values[:, knob]])
        entropies.append(-(of_knob.exp() * of_knob).sum(dim=-1))
        left = left[rows, values[:, knob]]
    return taken, entropies
