"""Ways to choose a knob setting for a request: the controller, and the baselines that it is compared with."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from ..controller import BatchController, JointControllerModel
from ..decisions import decide
from ..executor import ExecutorRequest, FeatureSource
from ..knobs import KnobSetting, KnobSpace
from ..latency import Guardrail, settings_that_fit


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
        self._predicted_ms: dict[str, torch.Tensor] = {}

    def choose(self, samples: Sequence[Mapping[str, Any]], latency_budget_ms: float) -> list[KnobSetting]:
        requests = [ExecutorRequest.of(sample, self.controller.knob_space.cheapest) for sample in samples]
        budgets = torch.full((len(samples),), float(latency_budget_ms), device=self.controller.device)
        fits = None if self.guardrail is None else self._fits(requests, latency_budget_ms)
        return decide(BatchController(self.controller), self.features, requests, budgets, fits).settings

    def _fits(self, requests: Sequence[ExecutorRequest], latency_budget_ms: float) -> torch.Tensor:
        # Samples are asked for under one budget after the other: their images are opened once.
        new = {request.sample_id: request for request in requests if request.sample_id not in self._predicted_ms}
        if new:
            self._predicted_ms.update(zip(new, self.guardrail.predict_latency_ms(list(new.values())), strict=True))
        predicted_ms = torch.stack([self._predicted_ms[request.sample_id] for request in requests])
        return settings_that_fit(predicted_ms, latency_budget_ms)[0]


class StaticPolicy:
    """One setting for all requests; `name` is its name in tables."""

    def __init__(self, setting: KnobSetting, name: str):
        self.setting = setting
        self.name = name

    def choose(self, samples: Sequence[Mapping[str, Any]], latency_budget_ms: float) -> list[KnobSetting]:
        return [self.setting] * len(samples)


class BestStaticPolicy:
    """
    One setting for all requests of a budget: what `best` gives for a budget in ms, e.g. [`StaticSettings.best`], which
    was chosen on training samples.
    """

    name = "best static"

    def __init__(self, best: Callable[[float], KnobSetting]):
        self.best = best

    def choose(self, samples: Sequence[Mapping[str, Any]], latency_budget_ms: float) -> list[KnobSetting]:
        return [self.best(latency_budget_ms)] * len(samples)


class RandomPolicy:
    """
    A uniformly random setting for each request, whatever its budget. A sample gets the same setting under every
    budget, so that budgets are compared on equal terms.
    """

    name = "random"

    def __init__(self, space: KnobSpace, seed: int = 42):
        self.settings = space.settings
        self.seed = seed

    def choose(self, samples: Sequence[Mapping[str, Any]], latency_budget_ms: float) -> list[KnobSetting]:
        choices = np.random.default_rng(self.seed).integers(len(self.settings), size=len(samples))
        return [self.settings[choice] for choice in choices]
