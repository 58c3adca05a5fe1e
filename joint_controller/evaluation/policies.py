"""Ways to choose a knob setting for a request: what all have in common, and the controller. See `baselines` for others."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from ..controller import BatchController, JointControllerModel
from ..decisions import decide
from ..executor import ExecutorRequest, FeatureSource
from ..knobs import KnobSetting
from ..latency import FitCache, Guardrail


class Policy(Protocol):
    """Anything with a choice of settings, and a name in tables and files."""

    name: str

    def choose(self, samples: Sequence[Mapping[str, Any]], latency_budget_ms: float) -> list[KnobSetting]:
        """One setting for each sample, all under one budget in ms."""
        ...


class ControllerPolicy:
    """
    The controller's most likely choice.

    Args:
        controller ([`JointControllerModel`]):
            The controller, moved to evaluation mode.
        features ([`FeatureSource`], *optional*):
            Gives the features of questions and images. `None` for a controller that sees the budget alone.
        name (`str`, *optional*, defaults to `"controller"`):
            Name in tables.
        guardrail ([`~latency.Guardrail`], *optional*):
            Leaves only settings that are predicted to fit the budget. By default, all can be chosen.
    """

    def __init__(
        self,
        controller: JointControllerModel,
        features: FeatureSource | None,
        name: str = "controller",
        guardrail: Guardrail | None = None,
    ):
        self.controller = controller.eval()
        self.features = features
        self.name = name
        self.guardrail = guardrail
        self._fits = None if guardrail is None else FitCache(guardrail)

    def choose(self, samples: Sequence[Mapping[str, Any]], latency_budget_ms: float) -> list[KnobSetting]:
        requests = [ExecutorRequest.of(sample, self.controller.knob_space.cheapest) for sample in samples]
        budgets, fit = torch.full((len(samples),), float(latency_budget_ms)), None
        if self._fits is not None:
            budgets, fit = self._fits.fit(samples, budgets)
        chooser = BatchController(self.controller)
        return decide(chooser, self.features, requests, budgets.to(self.controller.device), fit).settings
