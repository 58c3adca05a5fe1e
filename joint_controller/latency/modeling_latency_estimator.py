"""The latency estimator: milliseconds of one request from the knob setting and the sizes of its inputs."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel, initialization
from transformers.utils import ModelOutput, logging

from ..executor import DECODE, Executor, executor_family
from ..knobs import KnobSetting
from .configuration_latency_estimator import LatencyEstimatorConfig


if TYPE_CHECKING:
    from ..outcomes import Outcome


logger = logging.get_logger(__name__)

_CACHED_VALUES = 2**14
"""Values of a temporary tensor that stays in a core's cache."""


@dataclass
class LatencyEstimatorOutput(ModelOutput):
    """
    Estimated times of the stages of a request at batch 1, in milliseconds. All have the broadcast shape of the inputs.

    Args:
        prefill_ms (`torch.FloatTensor`):
            All that is predicted up to the first output token: the sum of `stage_ms`.
        decode_ms_per_token (`torch.FloatTensor`):
            Each output token after the first, the mean over the answer.
        stage_ms (`dict[str, torch.FloatTensor]`):
            Each predicted stage up to the first output token, in order.
    """

    prefill_ms: torch.FloatTensor | None = None
    decode_ms_per_token: torch.FloatTensor | None = None
    stage_ms: dict[str, torch.FloatTensor] | None = None


def _weighted_sum(coefficients: torch.Tensor, features: Sequence[torch.Tensor]) -> torch.Tensor:
    # Term by term rather than as a matrix product, whose order of additions may differ between rows: rounding must not
    # make a larger setting cheaper.
    return reduce(operator.add, map(operator.mul, coefficients, features))


def learned_factor(units: torch.Tensor, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """
    1 or more, and non-decreasing in every input (not negative, of shapes that broadcast): a network with one hidden
    layer whose weights are not negative. Its units, z^8 / (1 + z^8), are soft steps at z = 1, so that thresholds,
    kinks and saturation can be learnt. A row of `units` holds the weights of a unit's inputs and the weight of its
    output.
    """
    inputs = torch.broadcast_tensors(*inputs)
    # Several units at once, along a new first dimension, since a single request costs what launching the operations costs;
    # only as many as a core's cache holds, since many requests cost what memory does.
    together = max(1, _CACHED_VALUES // max(1, inputs[0].numel()))
    total = torch.ones_like(inputs[0])
    for group in units.view(*units.shape, *[1] * inputs[0].dim()).split(together):
        *weights, steps = group.unbind(1)
        z = _weighted_sum(weights, inputs)
        for _ in range(3):
            z = z * z
        # Written so that each operation is monotone after rounding, too; a plain sum may add up in another order elsewhere.
        total = total + (steps * (1 - (1 + z).reciprocal())).cumsum(0)[-1]
    return total


class LatencyEstimatorModel(PreTrainedModel):
    """
    Predicts what a request costs an executor at batch 1: a [`LatencyEstimator`]. Each stage is a sum of the physical terms
    that the executor's [`~executor.CostModel`] names (weights read, work per token, attention, …) with non-negative
    coefficients, times a learned factor ([`~latency.modeling_latency_estimator.learned_factor`]) for what these do not
    explain, fitted to measurements by [`~latency.fitting.fit_latency_estimator`]. Estimates are positive and non-decreasing
    in every knob and in every count.

    Args:
        config ([`LatencyEstimatorConfig`]):
            Whose costs these are, and what the coefficients were fitted on.

    Attributes:
        cost_model ([`~executor.CostModel`]):
            That of the executor.

    Raises:
        ValueError: If the configuration does not say which family of executors it is about, or there is no such family.
    """

    config_class = LatencyEstimatorConfig
    config: LatencyEstimatorConfig

    def __init__(self, config: LatencyEstimatorConfig):
        super().__init__(config)
        if config.executor_type is None:
            raise ValueError(
                f"the latency estimator '{config.name_or_path}' has no `executor_type`, as those of earlier versions: make it "
                "anew with `joint-controller profile` and `joint-controller fit-latency`."
            )
        if config.fitted_knobs is None:
            raise ValueError(
                f"the latency estimator '{config.name_or_path}' has no `fitted_knobs`: it was not fitted, or its folder is "
                "incomplete. Fit one with `joint-controller fit-latency`."
            )
        self.cost_model = executor_family(config.executor_type).cost_model(
            config.executor_shape, config.prefill_lengths, list(config.fitted_knobs)
        )
        self._is_fitted = False

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape), requires_grad=False)

        for stage, cost in self.cost_model.stages.items():
            # Milliseconds per unit of each feature; zeros until they are fitted or loaded.
            self.register_parameter(f"{stage}_coefficients", zeros(len(cost.features)))
            self.register_parameter(f"{stage}_units", zeros(config.num_units, len(cost.inputs) + 1))
        self.post_init()

    def _init_weights(self, module: nn.Module):
        # What a folder lacks becomes zeros, which are refused at use; what was loaded stays as it is.
        if module is self:
            for coefficients in self.parameters():
                initialization.zeros_(coefficients)

    @torch.no_grad()
    def forward(self, output_tokens: torch.Tensor | None = None, **columns: torch.Tensor) -> LatencyEstimatorOutput:
        """
        Estimates for any combination of settings and inputs: integer or floating tensors whose shapes broadcast, (n,)
        each for n requests, or e.g. (settings, 1) knobs with (n,) counts for every setting of n requests.

        Args:
            output_tokens (`torch.Tensor`, *optional*, defaults to 2):
                Tokens of the answer: `decode_ms_per_token` is the mean of its steps.
            **columns (`torch.Tensor`):
                Every count of `cost_model.count_names` and every knob of `cost_model.knob_names`.

        Returns:
            [`LatencyEstimatorOutput`]

        Raises:
            ValueError: If the estimator was not fitted, or columns are missing or unknown.
        """
        parameters = self._fitted_parameters()
        names = (*self.cost_model.count_names, *self.cost_model.knob_names)
        if set(columns) != set(names):
            raise ValueError(f"the latency estimator takes {', '.join(names)}, but got {', '.join(columns)}.")
        like = parameters[f"{DECODE}_coefficients"]
        columns = {name: values.to(like) for name, values in columns.items()}
        columns["output_tokens"] = like.new_tensor(2.0) if output_tokens is None else output_tokens.to(like)
        times = []
        for stage in self.cost_model.stages:
            terms = self.cost_model.terms(stage, columns)
            physical_ms = _weighted_sum(parameters[f"{stage}_coefficients"], terms.features)
            times.append(physical_ms * learned_factor(parameters[f"{stage}_units"], terms.inputs))
        *stage_ms, decode_ms = times
        prefill_ms = reduce(operator.add, stage_ms)
        prefill_ms, decode_ms, *stage_ms = torch.broadcast_tensors(prefill_ms, decode_ms, *stage_ms)
        return LatencyEstimatorOutput(prefill_ms, decode_ms, dict(zip(self.cost_model.stages, stage_ms, strict=False)))

    def latency_ms(self, outcomes: "Sequence[Outcome]") -> torch.Tensor:
        """As [`LatencyEstimator.latency_ms`]."""
        counts = {name: [outcome.counts[name] for outcome in outcomes] for name in self.cost_model.count_names}
        output_tokens = [outcome.output_tokens for outcome in outcomes]
        return self.predict_latency_ms([outcome.setting for outcome in outcomes], counts, output_tokens).cpu()

    def predict_latency_ms(
        self,
        settings: Sequence[KnobSetting],
        counts: Mapping[str, torch.Tensor | Sequence[int]],
        output_tokens: torch.Tensor | Sequence[int],
        quantile: float | None = None,
    ) -> torch.Tensor:
        """
        As [`LatencyEstimator.predict_latency_ms`]: `prefill_ms + decode_ms_per_token * (output_tokens - 1)`, as the prefill
        gives the first output token.

        Raises:
            ValueError: If the estimator was not fitted, counts are missing or unknown or of a wrong shape, a knob lies
                outside the range that was measured, an answer has no token, or the quantile was not fitted.
        """
        device = self.device
        columns = {name: torch.as_tensor(values, device=device) for name, values in counts.items()}
        output_tokens = torch.as_tensor(output_tokens, device=device)
        shape = next((values.shape for values in columns.values()), ())
        for name, values in columns.items():
            if values.shape != shape or len(shape) not in (1, 2) or shape[-1] != len(settings):
                raise ValueError(
                    f"`{name}` has the shape {tuple(values.shape)} but there are {len(settings)} settings: give one value a "
                    "setting, or one a request and setting."
                )
        try:
            output_tokens.expand(shape)
        except RuntimeError as error:
            raise ValueError(
                f"`output_tokens` has the shape {tuple(output_tokens.shape)}, but counts have {tuple(shape)}: give one value "
                "each."
            ) from error
        if (output_tokens < 1).any():
            raise ValueError(
                f"`output_tokens` holds {int(output_tokens.min())}: an answer has 1 token at least, its end of sequence."
            )
        # Other knobs are not looked at: what they cost comes in through the counts.
        knobs = {name: [setting[name] for setting in settings] for name in self.cost_model.knob_names}
        columns.update({name: torch.tensor(values, device=device) for name, values in knobs.items()})
        estimate = self(**columns, output_tokens=output_tokens)
        for name, values in knobs.items():
            measured = self.config.fitted_knobs[name]
            lowest, highest = measured[0], measured[-1]
            if values and not lowest <= min(values) <= max(values) <= highest:
                outside = min(values) if min(values) < lowest else max(values)
                raise ValueError(
                    f"knob `{name}` is {outside} but the latency estimator was fitted on {lowest} to {highest}: profile the "
                    "executor over the wanted values and fit again."
                )
        latency_ms = estimate.prefill_ms + estimate.decode_ms_per_token * (output_tokens - 1)
        return latency_ms if quantile is None else latency_ms * self.quantile_factor(quantile)

    def quantile_factor(self, quantile: float) -> float:
        """
        What an estimate of a `part` (`"prefill"`, `"decode"` or `"total"`) is multiplied with to get an upper quantile
        that was fitted: 0.9, 0.95 or 0.99. Others are refused (`ValueError`).
        """
        factors = (self.config.upper_quantiles or {}).get("total", {})
        if str(quantile) not in factors:
            raise ValueError(
                f"the latency estimator has no quantile {quantile} of 'total' (it has {list(factors) or 'none'}): ask for "
                "one that it has, or fit it again with `joint-controller fit-latency`."
            )
        return factors[str(quantile)]

    def _fitted_parameters(self) -> dict[str, nn.Parameter]:
        parameters = dict(self.named_parameters())
        if not self._is_fitted:
            lacking = [name for name, values in parameters.items() if not (values > 0).any()]
            if lacking:
                raise ValueError(
                    f"the latency estimator has no {lacking}: it was not fitted, or its folder is "
                    "incomplete. Fit one with `joint-controller fit-latency`."
                )
            self._is_fitted = True
        return parameters

    def check_executor(self, executor: Executor) -> None:
        """
        As [`LatencyEstimator.check_executor`]: the family, and the sizes that latency depends on, must be those of the
        executor that was measured. Where its sizes are unknown (imported profiles may not say), a warning takes the
        place of the check.
        """
        differing = differing_executors(self.config, executor.model_type, executor.shape)
        if not differing and self.config.executor_shape is None:
            logger.warning(
                "the latency estimator does not know the sizes of the executor that it was fitted on: make sure that it is "
                "this one."
            )
        if differing:
            raise ValueError(
                f"the latency estimator was fitted on another executor ({differing}): fit one for this executor with "
                "`joint-controller profile` and `joint-controller fit-latency`."
            )


def differing_executors(measured: LatencyEstimatorConfig, model_type: str, shape: Mapping[str, Any] | None) -> str:
    """In which family or sizes an executor differs from the measured one, in words; empty where none is known to."""
    if measured.executor_type != model_type:
        return f"model type '{measured.executor_type}' there, '{model_type}' here"
    if measured.executor_shape is None or shape is None:
        return ""
    there = measured.executor_shape
    return "; ".join(
        f"{name} {there.get(name)} there, {shape.get(name)} here"
        for name in dict.fromkeys((*there, *shape))
        if there.get(name) != shape.get(name)
    )
