"""The guardrail: which settings of a request are predicted to keep its budget."""

from collections.abc import Sequence

import torch

from ..executor import Executor, ExecutorRequest
from .latency_estimator import LatencyEstimator


class Guardrail:
    """
    Says which settings fit a request's budget before anything was run: those whose latency is predicted to stay below it
    in all but few cases. What the image will cost at each setting follows from its size, and time is kept for an answer of
    the executor's `max_new_tokens`: give the executor as many as answers need.

    Args:
        latency_estimator ([`LatencyEstimator`]):
            Predicts upper quantiles.
        executor ([`Executor`]):
            Answers the requests: it counts their inputs, and its knob space and its `max_new_tokens` are read.
        quantile (`float`, *optional*, defaults to 0.95):
            Share of requests whose latency is to stay below what is predicted: 0.9, 0.95 or 0.99.

    Raises:
        ValueError: If the estimator cannot predict this quantile, or settings of the executor's knob space.

    Example:

    ```python
    >>> guardrail = Guardrail(latency_estimator, executor)
    >>> fits, fits_budget = settings_that_fit(guardrail.predict_latency_ms([request]), latency_budget_ms=60)
    >>> request_controller.choose_stage1(question_features, latency_budget_ms=60, fits=fits)
    ```
    """

    def __init__(self, latency_estimator: LatencyEstimator, executor: Executor, quantile: float = 0.95):
        self.latency_estimator = latency_estimator
        self.executor = executor
        self.quantile = quantile
        # What cannot be predicted is refused now rather than at the first request.
        settings = executor.knob_space.settings
        ones = dict.fromkeys(executor.count_names, torch.ones(len(settings)))
        latency_estimator.predict_latency_ms(settings, ones, torch.tensor(executor.max_new_tokens), quantile)

    @torch.inference_mode()
    def predict_latency_ms(self, requests: Sequence[ExecutorRequest]) -> torch.Tensor:
        """
        The upper quantile of the latency of each request at each setting.

        Args:
            requests (`Sequence[ExecutorRequest]`):
                n requests. Their settings are not looked at, nor their pixels.

        Returns:
            `torch.Tensor` of shape `(n, settings)`: ms, in the order of the knob space, on the CPU.
        """
        settings, names = self.executor.knob_space.settings, self.executor.count_names
        counted = [self.executor.count_inputs(request, settings) for request in requests]
        # One tensor for all counts: for a single request, what it costs to make each would be felt.
        counts = torch.tensor([[counts[name] for counts in counted] for name in names])
        output_tokens = torch.tensor(self.executor.max_new_tokens)
        latency_ms = self.latency_estimator.predict_latency_ms(
            settings, dict(zip(names, counts, strict=True)), output_tokens, self.quantile
        )
        return latency_ms.cpu()


def settings_that_fit(latency_ms: torch.Tensor, latency_budget_ms: float) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The settings that a controller may choose from under a budget.

    Args:
        latency_ms (`torch.Tensor` of shape `(n, settings)`):
            What [`Guardrail.predict_latency_ms`] gives.
        latency_budget_ms (`float`):
            Budget of each request, in ms.

    Returns:
        `tuple[torch.BoolTensor, torch.BoolTensor]`: of the shape of `latency_ms`, the settings that fit or, where none does,
        the cheapest one alone; and of shape `(n,)`, whether any fits.
    """
    fits = latency_ms <= latency_budget_ms
    fits_budget = fits.any(dim=1)
    fits[:, 0] |= ~fits_budget
    return fits, fits_budget
