"""The guardrail: which settings of a request are predicted to keep its budget."""

from collections.abc import Sequence

import torch

from ..executor import ExecutorRequest
from ..molmo.executor import MolmoExecutor
from ..molmo.image_processing_molmo import oriented_size
from .modeling_latency_estimator import LatencyEstimatorModel
from .modeling_original_estimator import OriginalLatencyEstimatorModel


class Guardrail:
    """
    Says which settings fit a request's budget before anything was run: those whose latency is predicted to stay below it
    in all but few cases. What the image will cost at each tier follows from its size, and time is kept for an answer of
    the executor's `max_new_tokens`: give the executor as many as answers need.

    Args:
        latency_estimator ([`LatencyEstimatorModel`]):
            Predicts upper quantiles.
        executor ([`MolmoExecutor`]):
            Answers the requests: its knob space, its processor and its `max_new_tokens` are read.
        quantile (`float`, *optional*, defaults to 0.95):
            Share of requests whose latency is to stay below what is predicted: 0.9, 0.95 or 0.99.

    Raises:
        ValueError: If the estimator cannot predict this quantile, or settings of the executor's knob space.

    Example:

    ```python
    >>> guardrail = Guardrail(latency_estimator, executor)
    >>> fits, fits_budget = settings_that_fit(guardrail.predict_latency_ms([request]), latency_budget_ms=60)
    >>> tier_index = request_controller.choose_tier(question_features, 60, fits[0])
    ```
    """

    def __init__(
        self,
        latency_estimator: LatencyEstimatorModel | OriginalLatencyEstimatorModel,
        executor: MolmoExecutor,
        quantile: float = 0.95,
    ):
        if isinstance(latency_estimator, OriginalLatencyEstimatorModel):
            raise ValueError(
                "the guardrail needs upper quantiles, which the original latency estimators do not predict: give an "
                "estimator that `joint-controller fit-latency` fitted."
            )
        self.latency_estimator = latency_estimator
        self.executor = executor
        # What cannot be predicted is refused now rather than at the first request.
        settings = list(executor.knob_space)
        latency_estimator.predict_latency_ms(settings, *[torch.ones(len(settings))] * 4, quantile)
        self._quantile_factor = latency_estimator.quantile_factor(quantile)
        self._knobs = {
            "top_k": torch.tensor(executor.knob_space.top_k)[:, None],
            "num_blocks": torch.tensor(executor.knob_space.num_blocks),
        }

    @torch.inference_mode()
    def predict_latency_ms(self, requests: Sequence[ExecutorRequest]) -> torch.Tensor:
        """
        The upper quantile of the latency of each request at each setting.

        Args:
            requests (`Sequence[ExecutorRequest]`):
                Requests. Their settings are not looked at, nor their pixels.

        Returns:
            `torch.Tensor` of shape `(n, tiers, top_k values, num_blocks values)`: ms, on the CPU.
        """
        space, processor = self.executor.knob_space, self.executor.processor
        num_views, vision_tokens, text_tokens = [], [], []
        for request in requests:
            width, height = oriented_size(request.load_image())
            tilings = [
                processor.image_processor.choose_tiling(height, width, tier=tier, tier_crops=space.tier_crops)
                for tier in space.tier_crops
            ]
            num_views.append([1 + rows * columns for rows, columns in tilings])
            vision_tokens.append([processor.image_processor.count_image_tokens(tiling) for tiling in tilings])
            prompt = processor.format_prompt(request.question, request.style)
            text_tokens.append(1 + len(processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]))
        # Not all settings one by one: what depends on the tier alone is worked out once a tier.
        estimate = self.latency_estimator(
            torch.tensor(num_views)[:, :, None, None],
            torch.tensor(vision_tokens)[:, :, None, None],
            torch.tensor(text_tokens)[:, None, None, None],
            **self._knobs,
            output_tokens=torch.tensor(self.executor.max_new_tokens),
        )
        latency_ms = estimate.prefill_ms + estimate.decode_ms_per_token * (self.executor.max_new_tokens - 1)
        return latency_ms * self._quantile_factor


def settings_that_fit(latency_ms: torch.Tensor, latency_budget_ms: float) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The settings that a controller may choose from under a budget.

    Args:
        latency_ms (`torch.Tensor` of shape `(n, tiers, top_k values, num_blocks values)`):
            What [`Guardrail.predict_latency_ms`] gives.
        latency_budget_ms (`float`):
            Budget of each request, in ms.

    Returns:
        `tuple[torch.BoolTensor, torch.BoolTensor]`: of the shape of `latency_ms`, the settings that fit or, where none does,
        the cheapest one alone; and of shape `(n,)`, whether any fits.
    """
    fits = latency_ms <= latency_budget_ms
    fits_budget = fits.flatten(1).any(dim=1)
    fits[:, 0, 0, 0] |= ~fits_budget
    return fits, fits_budget
