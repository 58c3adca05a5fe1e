"""The way through a controller for requests: look at the questions, decide stage 1, look at the images, decide stage 2."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .controller import BatchController, RequestController, RequestFit, SettingFit
from .executor import ExecutorRequest, FeatureSource
from .knobs import KnobSetting


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
    chooser: BatchController,
    features: FeatureSource | None,
    requests: Sequence[ExecutorRequest],
    latency_budget_ms: torch.Tensor,
    fit: SettingFit | None = None,
) -> Decisions:
    """
    Decides the settings of requests under their budgets.

    Args:
        chooser ([`BatchController`]):
            Takes the decisions, likeliest or sampled.
        features ([`FeatureSource`], *optional*):
            Gives what the controller sees. `None` for a controller that sees the budget alone.
        requests (`Sequence[ExecutorRequest]`):
            n requests. Their settings are not looked at.
        latency_budget_ms (`torch.Tensor` of shape `(n,)`):
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
        encoded_as = [controller.table.settings_of_first[choice] for choice in first.tolist()]
        asked = [request.at(setting) for request, setting in zip(requests, encoded_as, strict=True)]
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


def decide_one(
    chooser: RequestController,
    features: FeatureSource | None,
    request: ExecutorRequest,
    latency_budget_ms: float,
    fit: RequestFit | None = None,
) -> KnobSetting:
    """
    Decides the setting of one request, as fast as it goes. Arguments are those of [`~joint_controller.decisions.decide`], for
    the one.

    Returns:
        [`KnobSetting`]

    Example:

    ```python
    >>> decide_one(RequestController(controller), opened, request, latency_budget_ms=20.0)
    KnobSetting(tier='low', depth=4)
    ```
    """
    question_features = vision_features = None
    if chooser.sees_question:
        question_features = features.question_features([request.question])
    first = chooser.choose_stage1(question_features, latency_budget_ms, fit)
    if chooser.sees_image:
        vision_features = features.vision_features([request.at(chooser.controller.table.settings_of_first[first])])
    second = chooser.choose_stage2(vision_features)
    return chooser.setting(first, second)
