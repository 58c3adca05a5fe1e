"""The guardrail: which settings of a request are predicted to keep its budget."""

import math
import operator
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce

import torch

from ..controller import SettingFit
from ..executor import Executor, ExecutorRequest, InputCounter, OpenRequest
from .latency_estimator import LatencyEstimator


TYPICAL_QUANTILE = 0.5
"""Half of the requests take less than is typical."""

KNOWN_PREDICTIONS = 1024
"""Predictions for single requests that are kept, by the sizes of their inputs: half a kilobyte each."""


@dataclass(frozen=True)
class LatencyPrediction:
    """
    What n requests are predicted to take at each setting, in the order of the knob space.

    Args:
        first_token_ms, all_tokens_ms (`torch.Tensor` of shape `(n, settings)`):
            Typical latency with an answer of one token, and of the executor's `max_new_tokens`, in ms, on the CPU.
        prompt_tokens (`torch.Tensor` of shape `(n, settings)`):
            Length of the prompt.
        max_new_tokens (`int`):
            That of the executor.
    """

    first_token_ms: torch.Tensor
    all_tokens_ms: torch.Tensor
    prompt_tokens: torch.Tensor
    max_new_tokens: int

    @cached_property
    def prompt_range(self) -> tuple[int, int]:
        """Length of the shortest and of the longest prompt."""
        return int(self.prompt_tokens.min()), int(self.prompt_tokens.max())

    def typical_ms(self, request: int, setting: int, output_tokens: int) -> float:
        """Typical latency of a request at a setting, by their positions, with an answer of so many tokens."""
        first, all_tokens = (float(ms[request, setting]) for ms in (self.first_token_ms, self.all_tokens_ms))
        return first + (all_tokens - first) * (output_tokens - 1) / max(1, self.max_new_tokens - 1)


class Guardrail:
    """
    Says which settings fit a request's budget before anything was run: those whose latency is predicted to stay below it
    in all but few cases. What the image will cost at each setting follows from its size, and time is kept for an answer of
    the executor's `max_new_tokens`: give the executor as many as answers need.

    Args:
        latency_estimator ([`LatencyEstimator`]):
            Predicts latencies.
        executor ([`Executor`]):
            Answers the requests: it counts their inputs, and its knob space and its `max_new_tokens` are read.
        quantile (`float`, *optional*, defaults to 0.95):
            Share of requests whose latency is to stay below what is predicted: 0.5 (typical latencies), 0.9, 0.95 or 0.99.
            `None` promises nothing: every setting fits whose prompt is not too long.

    Attributes:
        upper_ratio (`float` or `None`):
            The upper quantile of a latency as a multiple of the typical latency: 1 for the quantile 0.5.

    Raises:
        ValueError: If the estimator cannot predict this quantile, or settings of the executor's knob space.

    Example:

    ```python
    >>> guardrail = Guardrail(latency_estimator, executor)
    >>> budget_ms, fit = guardrail.fit(guardrail.typical_ms([request]), latency_budget_ms=60)
    >>> request_controller.choose_stage1(question_features, budget_ms, fit)
    ```
    """

    def __init__(self, latency_estimator: LatencyEstimator, executor: Executor, quantile: float | None = 0.95):
        self.latency_estimator = latency_estimator
        self.executor = executor
        self.quantile = quantile
        self._known: OrderedDict[tuple, LatencyPrediction] = OrderedDict()
        # What cannot be predicted is refused now rather than at the first request.
        settings, names = executor.knob_space.settings, executor.count_names
        self._token_rows = [row for row, name in enumerate(names) if name.endswith("_tokens")]
        ones = dict.fromkeys(names, torch.ones(len(settings)))
        answer = torch.tensor(executor.max_new_tokens)
        typical_ms = latency_estimator.predict_latency_ms(settings, ones, answer)
        self.upper_ratio = None
        if quantile == TYPICAL_QUANTILE:
            self.upper_ratio = 1.0
        elif quantile is not None:
            upper_ms = latency_estimator.predict_latency_ms(settings, ones, answer, quantile)
            self.upper_ratio = (upper_ms.double() / typical_ms.double()).max().item()

    @torch.inference_mode()
    def predict(
        self, requests: Sequence[ExecutorRequest], counter: InputCounter | OpenRequest | None = None
    ) -> LatencyPrediction:
        """
        Typical latencies of requests at each setting.

        Args:
            requests (`Sequence[ExecutorRequest]`):
                n requests. Their settings are not looked at, nor their pixels.
            counter ([`InputCounter`] or [`OpenRequest`], *optional*):
                Counts their inputs. By default the executor.

        Returns:
            [`LatencyPrediction`]
        """
        counter = self.executor if counter is None else counter
        counted = [counter.count_inputs(request, self.executor.knob_space.settings) for request in requests]
        if len(counted) != 1:
            return self._predict(counted)
        # Images of few sizes and questions of few lengths come again and again.
        key = tuple(map(tuple, counted[0].values()))
        if key not in self._known:
            while len(self._known) >= KNOWN_PREDICTIONS:
                self._known.popitem(last=False)
            self._known[key] = self._predict(counted)
        self._known.move_to_end(key)
        return self._known[key]

    def _predict(self, counted: Sequence[Mapping[str, Sequence[int]]]) -> LatencyPrediction:
        settings, names, most = (
            self.executor.knob_space.settings,
            self.executor.count_names,
            self.executor.max_new_tokens,
        )
        # Each request once with the shortest and once with the longest answer, in one call; and one tensor for all counts,
        # as estimators compute: for a single request, what it costs to make each would be felt.
        values = torch.tensor(
            [[counts[name] for counts in (*counted, *counted)] for name in names], dtype=torch.float32
        )
        prompt_tokens = reduce(operator.add, [values[row, : len(counted)] for row in self._token_rows])
        output_tokens = torch.tensor([[1]] * len(counted) + [[most]] * len(counted))
        counts = dict(zip(names, values.unbind(), strict=True))
        latency_ms = self.latency_estimator.predict_latency_ms(settings, counts, output_tokens).cpu()
        return LatencyPrediction(*latency_ms.chunk(2), prompt_tokens, most)

    def predict_latency_ms(
        self, requests: Sequence[ExecutorRequest], counter: InputCounter | OpenRequest | None = None
    ) -> torch.Tensor:
        """
        The upper quantile of the latency of each request at each setting. Arguments are those of [`~Guardrail.predict`].

        Returns:
            `torch.Tensor` of shape `(n, settings)`: ms, in the order of the knob space, on the CPU; infinite where the
            prompt is longer than the executor takes.
        """
        return self.typical_ms(requests, counter) * (self.upper_ratio or 0.0)

    def typical_ms(
        self, requests: Sequence[ExecutorRequest], counter: InputCounter | OpenRequest | None = None
    ) -> torch.Tensor:
        """As [`~Guardrail.predict_latency_ms`], but the typical latency, with an answer of all tokens."""
        return self.runnable_ms(self.predict(requests, counter))

    def fit(
        self, typical_ms: torch.Tensor, latency_budget_ms: torch.Tensor | float, upper_ratio: float | None = None
    ) -> tuple[torch.Tensor | float, SettingFit]:
        """
        Which settings keep budgets, in terms of typical latencies: a controller is told what a typical request may take, so
        that the promised share of requests keeps the budget.

        Args:
            typical_ms (`torch.Tensor` of shape `(n, settings)`):
                What [`~Guardrail.typical_ms`] gives.
            latency_budget_ms (`torch.Tensor` of shape `(n,)` or `float`):
                Budgets, in ms.
            upper_ratio (`float`, *optional*):
                The upper quantile as a multiple of the typical latency. Defaults to `Guardrail.upper_ratio`.

        Returns:
            `tuple[torch.Tensor | float, SettingFit]`: What typical latencies must keep, in ms, in the form of
            `latency_budget_ms`, and the settings that do.
        """
        is_masked = self.quantile is not None
        if is_masked:
            latency_budget_ms = latency_budget_ms / (self.upper_ratio if upper_ratio is None else upper_ratio)
        return latency_budget_ms, SettingFit.of(typical_ms, latency_budget_ms, is_masked)

    def runnable_ms(self, prediction: LatencyPrediction) -> torch.Tensor:
        """Typical latencies with all tokens, infinite where the prompt is longer than the executor takes."""
        most = self.executor.max_prompt_tokens
        if prediction.prompt_range[1] <= most:
            return prediction.all_tokens_ms
        return prediction.all_tokens_ms.masked_fill(prediction.prompt_tokens > most, math.inf)
