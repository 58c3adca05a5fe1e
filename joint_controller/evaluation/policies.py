"""Ways to choose a knob setting for a request: the controller, and the baselines that it is compared with."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from ..controller import JointControllerModel, likeliest_depth, likeliest_tier
from ..executor import ExecutorRequest
from ..knobs import KnobSetting, KnobSpace
from ..latency import Guardrail, settings_that_fit
from ..molmo.executor import MolmoExecutor


class Policy(Protocol):
    """
    Anything with a name and a choice of settings.

    Attributes:
        name (`str`):
            Name in tables and files.
    """

    name: str

    def choose(self, samples: Sequence[Mapping[str, Any]], latency_budget_ms: float) -> list[KnobSetting]:
        """One setting for each sample, all under one budget in ms."""
        ...


class ControllerPolicy:
    """
    The controller's most likely choice: stage 1 takes the tier, stage 2 the rest after it has seen the image at that tier.

    Args:
        controller ([`JointControllerModel`]):
            The controller, moved to evaluation mode.
        feature_source ([`MolmoExecutor`], *optional*):
            Gives the features of questions and images. `None` for a controller that sees the budget alone.
        name (`str`, *optional*, defaults to `"controller"`):
            Name in tables.
        guardrail ([`~latency.Guardrail`], *optional*):
            Leaves only settings that are predicted to fit the budget. By default, all can be chosen.
    """

    def __init__(
        self,
        controller: JointControllerModel,
        feature_source: MolmoExecutor | None,
        name: str = "controller",
        guardrail: Guardrail | None = None,
    ):
        self.controller = controller.eval()
        self.feature_source = feature_source
        self.name = name
        self.guardrail = guardrail
        self._predicted_ms: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def choose(self, samples: Sequence[Mapping[str, Any]], latency_budget_ms: float) -> list[KnobSetting]:
        device = self.controller.device
        config, space = self.controller.config, self.controller.knob_space
        budgets = torch.full((len(samples),), float(latency_budget_ms), device=device)
        questions = vision = torch.empty(len(samples), 0, device=device)
        if config.sees_question:
            questions = self.feature_source.question_features([sample["question"] for sample in samples]).to(device)
        fits = None if self.guardrail is None else self._fits(samples, latency_budget_ms).to(device)
        tier_index = likeliest_tier(self.controller.stage1(questions, budgets), fits)
        if config.sees_image:
            vision = self._vision_features(samples, tier_index)
        logits = self.controller.stage2(vision, questions, budgets, tier_index)
        fits_at_tier = None if fits is None else fits[torch.arange(len(samples), device=device), tier_index]
        choices = torch.cat([tier_index[:, None], likeliest_depth(*logits, fits_at_tier)], dim=1)
        return [space.setting(indices) for indices in choices.tolist()]

    def _fits(self, samples: Sequence[Mapping[str, Any]], latency_budget_ms: float) -> torch.Tensor:
        # Samples are asked for under one budget after the other: their images are opened once.
        new = {sample["sample_id"]: sample for sample in samples if sample["sample_id"] not in self._predicted_ms}
        if new:
            requests = [ExecutorRequest.of(sample, self.controller.knob_space.cheapest) for sample in new.values()]
            self._predicted_ms.update(zip(new, self.guardrail.predict_latency_ms(requests), strict=True))
        predicted_ms = torch.stack([self._predicted_ms[sample["sample_id"]] for sample in samples])
        return settings_that_fit(predicted_ms, latency_budget_ms)[0]

    def _vision_features(self, samples: Sequence[Mapping[str, Any]], tier_index: torch.Tensor) -> torch.Tensor:
        space = self.controller.knob_space
        features = torch.empty(len(samples), self.controller.config.vision_size, device=tier_index.device)
        for index, tier in enumerate(space.tier_crops):
            rows = (tier_index == index).nonzero().flatten().tolist()
            if rows:
                requests = [
                    ExecutorRequest.of(samples[row], KnobSetting(tier, space.top_k[0], space.num_blocks[0]))
                    for row in rows
                ]
                features[rows] = self.feature_source.vision_features(requests, tier).to(features.device)
        return features


class StaticPolicy:
    """
    One setting for all requests of a budget.

    Args:
        settings (`Mapping[float, KnobSetting]` or `KnobSetting`):
            The setting, or the setting for each budget in ms.
        name (`str`):
            Name in tables.
    """

    def __init__(self, settings: Mapping[float, KnobSetting] | KnobSetting, name: str):
        self.settings = settings
        self.name = name

    def choose(self, samples: Sequence[Mapping[str, Any]], latency_budget_ms: float) -> list[KnobSetting]:
        setting = self.settings if isinstance(self.settings, KnobSetting) else self.settings[latency_budget_ms]
        return [setting] * len(samples)


class RandomPolicy:
    """
    A uniformly random setting for each request, whatever its budget.

    Args:
        space ([`KnobSpace`]):
            Settings to choose from.
        seed (`int`, *optional*, defaults to 42):
            Seed. A sample gets the same setting under every budget, so that budgets are compared on equal terms.
        name (`str`, *optional*, defaults to `"random"`):
            Name in tables.
    """

    def __init__(self, space: KnobSpace, seed: int = 42, name: str = "random"):
        self.settings = list(space)
        self.seed = seed
        self.name = name

    def choose(self, samples: Sequence[Mapping[str, Any]], latency_budget_ms: float) -> list[KnobSetting]:
        choices = np.random.default_rng(self.seed).integers(len(self.settings), size=len(samples))
        return [self.settings[choice] for choice in choices]
