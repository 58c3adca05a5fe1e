"""What samples are predicted to take at each setting, predicted once."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..controller import SettingFit
from ..executor import ExecutorRequest
from .guardrail import Guardrail


class FitCache:
    """
    Typical latencies of samples at each setting, as a guardrail predicts them, kept by sample id: training and evaluation
    come back to the same samples under other budgets.

    Args:
        guardrail ([`Guardrail`]):
            Predicts.
    """

    def __init__(self, guardrail: Guardrail):
        self.guardrail = guardrail
        self._typical_ms: dict[str, torch.Tensor] = {}

    def typical_ms(self, samples: Sequence[Mapping[str, Any]]) -> torch.Tensor:
        """Of n samples, in ms, of shape `(n, settings)`; infinite where the prompt is longer than the executor takes."""
        cheapest = self.guardrail.executor.knob_space.cheapest
        new = {
            sample["sample_id"]: ExecutorRequest.of(sample, cheapest)
            for sample in samples
            if sample["sample_id"] not in self._typical_ms
        }
        if new:
            predicted_ms = self.guardrail.typical_ms(list(new.values()))
            self._typical_ms.update(zip(new, predicted_ms, strict=True))
        return torch.stack([self._typical_ms[sample["sample_id"]] for sample in samples])

    def fit(
        self, samples: Sequence[Mapping[str, Any]], latency_budget_ms: torch.Tensor
    ) -> tuple[torch.Tensor, SettingFit]:
        """As [`Guardrail.fit`], for samples."""
        return self.guardrail.fit(self.typical_ms(samples), latency_budget_ms)
