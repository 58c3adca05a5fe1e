"""The way through a controller for requests: look at the questions, decide stage 1, look at the images, decide stage 2."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .controller import BatchController, RequestController, SettingFit, StageTable
from .executor import ExecutorRequest, FeatureSource
from .knobs import KnobSetting, KnobSpace


@dataclass(frozen=True)
class Decisions:
    """
    What a controller decided for n requests, and what it saw.

    Args:
        settings (`list[KnobSetting]`):
            Setting of each request.
        positions (`list[int]`):
            Position of each setting in the knob space.
        first, second (`torch.LongTensor` of shape `(n,)`):
            What the stages chose, see [`StageTable`].
        question_features (`torch.Tensor` of shape `(n, question_size)`):
            What the stages saw of the questions; of shape `(n, 0)` where they do not look.
        vision_features (`torch.Tensor` of shape `(n, vision_size)`):
            What stage 2 saw of the images; of shape `(n, 0)` where it does not look.
    """

    settings: list[KnobSetting]
    positions: list[int]
    first: torch.Tensor
    second: torch.Tensor
    question_features: torch.Tensor
    vision_features: torch.Tensor


@torch.no_grad()
def decide(
    chooser: BatchController | RequestController,
    features: FeatureSource | None,
    requests: Sequence[ExecutorRequest],
    latency_budget_ms: torch.Tensor | float,
    fit: SettingFit | None = None,
) -> Decisions:
    """
    Decides the settings of requests under their budgets.

    Args:
        chooser ([`BatchController`] or [`RequestController`]):
            Takes the decisions: for any number of requests, likeliest or sampled; or for one request, as fast as it goes.
        features ([`FeatureSource`], *optional*):
            Gives what the controller sees. `None` for a controller that sees the budget alone.
        requests (`Sequence[ExecutorRequest]`):
            n requests. Their settings are not looked at.
        latency_budget_ms (`torch.Tensor` of shape `(n,)`, or `float` for a [`RequestController`]):
            Budgets in ms.
        fit ([`SettingFit`], *optional*):
            Settings to choose from, and how much of the budget each is predicted to leave. By default all, for a controller
            that does not see what fits.

    Returns:
        [`Decisions`]

    Example:

    ```python
    >>> budgets = torch.full((len(requests),), 20.0)
    >>> decide(BatchController(controller), executor, requests, budgets).settings
    [KnobSetting(tier='low', depth=4), ...]
    ```
    """
    controller = chooser.controller
    space, device = controller.knob_space, controller.device
    question_features = vision_features = None
    if controller.sees_question:
        question_features = features.question_features([request.question for request in requests]).to(device)
    first = chooser.choose_stage1(question_features, latency_budget_ms, fit)
    if controller.sees_image:
        encoded_as = _settings_of_stage1(space, controller.table, first)
        asked = [replace(request, setting=setting) for request, setting in zip(requests, encoded_as, strict=True)]
        vision_features = features.vision_features(asked).to(device)
    second = chooser.choose_stage2(vision_features)
    positions = controller.table.positions[first.cpu(), second.cpu()].tolist()
    nothing = torch.empty(len(requests), 0, device=device)
    return Decisions(
        settings=[space.settings[position] for position in positions],
        positions=positions,
        first=first,
        second=second,
        question_features=nothing if question_features is None else question_features,
        vision_features=nothing if vision_features is None else vision_features,
    )


def _settings_of_stage1(space: KnobSpace, table: StageTable, first: torch.Tensor) -> list[KnobSetting]:
    """Settings with the values that stage 1 took, and the cheapest of the other knobs."""
    knobs = [space.knobs[position] for position in space.decided_by(1)]
    return [
        KnobSetting(
            {**space.cheapest, **{knob.name: knob.values[index] for knob, index in zip(knobs, row, strict=True)}}
        )
        for row in table.values[0][first.cpu()].tolist()
    ]
