"""The guardrail: which settings of a request are predicted to keep its budget."""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch

from ..controller import RequestFit, SettingFit
from ..executor import Executor, ExecutorRequest, InputCounter, OpenRequest
from .latency_estimator import LatencyEstimator
from .modeling_latency_estimator import LatencyEstimatorModel
from .setting_latencies import SettingLatencies


TYPICAL_QUANTILE = 0.5
"""Half of the requests take less than is typical."""


@dataclass(frozen=True)
class RequestPrediction:
    """
    What one request is predicted to take at each setting, in the order of the knob space.

    Args:
        first_token_ms, all_tokens_ms (`Sequence[float]`):
            Typical latency with an answer of one token, and of the executor's `max_new_tokens`, in ms.
        prompt_tokens (`Sequence[int]`):
            Length of the prompt.
        max_new_tokens (`int`):
            That of the executor.
    """

    first_token_ms: Sequence[float]
    all_tokens_ms: Sequence[float]
    prompt_tokens: Sequence[int]
    max_new_tokens: int

    def typical_ms(self, setting: int, output_tokens: int) -> float:
        """Typical latency at a setting, by its position, with an answer of so many tokens."""
        first, all_tokens = self.first_token_ms[setting], self.all_tokens_ms[setting]
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
        # What cannot be predicted is refused now rather than at the first request.
        settings, names = executor.knob_space.settings, executor.count_names
        self._token_places = [place for place, name in enumerate(names) if name.endswith("_tokens")]
        ones = dict.fromkeys(names, torch.ones(len(settings)))
        answer = torch.tensor(executor.max_new_tokens)
        typical_ms = latency_estimator.predict_latency_ms(settings, ones, answer)
        self.upper_ratio = None
        if quantile == TYPICAL_QUANTILE:
            self.upper_ratio = 1.0
        elif quantile is not None:
            upper_ms = latency_estimator.predict_latency_ms(settings, ones, answer, quantile)
            self.upper_ratio = (upper_ms.double() / typical_ms.double()).max().item()
        self._setting_latencies = None
        if isinstance(latency_estimator, LatencyEstimatorModel):
            answers = 1, executor.max_new_tokens
            self._setting_latencies = SettingLatencies(latency_estimator, settings, names, answers)

    @torch.inference_mode()
    def typical_ms(self, requests: Sequence[ExecutorRequest], counter: InputCounter | None = None) -> torch.Tensor:
        """
        The typical latency of each request at each setting, with an answer of all tokens.

        Args:
            requests (`Sequence[ExecutorRequest]`):
                n requests. Their settings are not looked at, nor their pixels.
            counter ([`InputCounter`], *optional*):
                Counts their inputs. By default the executor.

        Returns:
            `torch.Tensor` of shape `(n, settings)`: ms, in the order of the knob space, on the CPU; infinite where the
            prompt is longer than the executor takes.
        """
        executor = self.executor
        counter = executor if counter is None else counter
        settings, names = executor.knob_space.settings, executor.count_names
        counted = [counter.count_inputs(request, settings) for request in requests]
        counts = {
            name: torch.tensor([one[name] for one in counted], dtype=torch.float32).view(len(counted), len(settings))
            for name in names
        }
        latency_ms = self.latency_estimator.predict_latency_ms(
            settings, counts, torch.tensor(executor.max_new_tokens)
        ).cpu()
        prompt_tokens = reduce(operator.add, [counts[names[place]] for place in self._token_places])
        return latency_ms.masked_fill(prompt_tokens > executor.max_prompt_tokens, math.inf)

    def predict_latency_ms(
        self, requests: Sequence[ExecutorRequest], counter: InputCounter | None = None
    ) -> torch.Tensor:
        """As [`~Guardrail.typical_ms`], but the upper quantile of the latency."""
        return self.typical_ms(requests, counter) * (self.upper_ratio or 0.0)

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

    # One request, in plain numbers: what it costs to make tensors of them would be felt.

    def predict_one(
        self, request: ExecutorRequest, counter: InputCounter | OpenRequest | None = None
    ) -> RequestPrediction:
        """
        Typical latencies of one request at each setting, as fast as it goes.

        Args:
            request ([`ExecutorRequest`]):
                The request. Its setting is not looked at, nor its pixels.
            counter ([`InputCounter`] or [`OpenRequest`], *optional*):
                Counts its inputs. By default the executor.

        Returns:
            [`RequestPrediction`]
        """
        executor = self.executor
        settings, names, answers = executor.knob_space.settings, executor.count_names, (1, executor.max_new_tokens)
        counts = (executor if counter is None else counter).count_inputs(request, settings)
        rows = list(zip(*[counts[name] for name in names], strict=True))
        if self._setting_latencies is not None:
            latency_ms = self._setting_latencies.predict(rows)
        else:
            of_both = {name: [counts[name]] * len(answers) for name in names}
            output_tokens = [[tokens] for tokens in answers]
            latency_ms = self.latency_estimator.predict_latency_ms(settings, of_both, output_tokens).tolist()
        lengths = {row: sum([row[place] for place in self._token_places]) for row in dict.fromkeys(rows)}
        prompt_tokens = [lengths[row] for row in rows]
        return RequestPrediction(*latency_ms, prompt_tokens, executor.max_new_tokens)

    def fit_one(
        self, prediction: RequestPrediction, latency_budget_ms: float, upper_ratio: float | None = None
    ) -> tuple[float, RequestFit]:
        """As [`~Guardrail.fit`], for one request."""
        is_masked, most = self.quantile is not None, self.executor.max_prompt_tokens
        if is_masked:
            latency_budget_ms = latency_budget_ms / (self.upper_ratio if upper_ratio is None else upper_ratio)
        latency_ms = prediction.all_tokens_ms
        if max(prediction.prompt_tokens) > most:
            latency_ms = [
                ms if tokens <= most else math.inf
                for ms, tokens in zip(latency_ms, prediction.prompt_tokens, strict=True)
            ]
        return latency_budget_ms, RequestFit.of(latency_ms, latency_budget_ms, is_masked)
