"""The latency estimator: milliseconds of one request from the knob setting and the sizes of its inputs."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel, initialization
from transformers.utils import ModelOutput, logging

from ..executor import DECODE, MODEL_SCOPE, Executor, executor_family
from ..knobs import KnobSetting
from .configuration_latency_estimator import LatencyEstimatorConfig
from .latency_estimator import check_scope_is_known
from .profile_table import UNKNOWN
from .request_costs import RequestCosts
from .way_of_running import WayOfRunning


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
        preparation_ms (`torch.FloatTensor`):
            What is not the model's: overhead, the controller, and stages such as image processing; zeros in the scope of
            the model.
        prefill_ms (`torch.FloatTensor`):
            The model's stages up to the first output token.
        decode_ms_per_token (`torch.FloatTensor`):
            Each output token after the first, the mean over the answer.
        stage_ms (`dict[str, torch.FloatTensor]`):
            Each predicted stage but decoding, in order: preparation and prefill are sums of these.
    """

    preparation_ms: torch.FloatTensor | None = None
    prefill_ms: torch.FloatTensor | None = None
    decode_ms_per_token: torch.FloatTensor | None = None
    stage_ms: dict[str, torch.FloatTensor] | None = None


def weighted_sum(coefficients: Sequence[torch.Tensor | float], features: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum of features, each times its coefficient."""
    # Term by term rather than as a matrix product, whose order of additions may differ between rows: rounding must not
    # make a larger setting cheaper.
    return reduce(operator.add, map(operator.mul, coefficients, features))


def learned_factors(units: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """
    1 or more, and non-decreasing in every input (not negative): for each stage a network with one hidden layer whose
    weights are not negative. Its units, z^8 / (1 + z^8), are soft steps at z = 1, so that thresholds, kinks and
    saturation can be learnt.

    Args:
        units (`torch.Tensor` of shape `(stages, units, inputs + 1)`):
            Weights of each unit's inputs, and last the weight of its output.
        inputs (`torch.Tensor` of shape `(stages, inputs, ...)`):
            Inputs.

    Returns:
        `torch.Tensor` of shape `(stages, ...)`
    """
    inputs = inputs[:, None]
    # All stages and several units at once, since a single request costs what launching the operations costs; only as many
    # as a core's cache holds, since many requests cost what memory does.
    together = max(1, _CACHED_VALUES // max(1, inputs[:, :, 0].numel()))
    total = 1.0
    for group in units.view(*units.shape, *[1] * (inputs.dim() - 3)).split(together, dim=1):
        *weights, steps = group.unbind(2)
        z = weighted_sum(weights, inputs.unbind(2))
        for _ in range(3):
            z = z * z
        # Written so that each operation is monotone after rounding, too; a plain sum may add up in another order elsewhere.
        total = total + (steps * (1 - (1 + z).reciprocal())).cumsum(1)[:, -1]
    return total


def learned_factor(units: torch.Tensor, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """[`~latency.modeling_latency_estimator.learned_factors`] of a single stage, whose inputs have shapes that
    broadcast."""
    return learned_factors(units[None], torch.stack(torch.broadcast_tensors(*inputs))[None])[0]


class LatencyEstimatorModel(PreTrainedModel):
    """
    Predicts what a request costs an executor at batch 1: a [`LatencyEstimator`]. Each stage is a sum of the physical terms
    that [`~latency.request_costs.RequestCosts`] names (weights read, work per token, attention, …) with non-negative
    coefficients, perhaps times a learned factor ([`~latency.modeling_latency_estimator.learned_factors`]) for what these do not
    explain, fitted to measurements by [`~latency.fitting.fit_latency_estimator`]. Estimates are positive and non-decreasing
    in every knob and in every count.

    Args:
        config ([`LatencyEstimatorConfig`]):
            Whose costs these are, and what the coefficients were fitted on.

    Attributes:
        costs ([`~latency.request_costs.RequestCosts`]):
            The stages that are predicted.

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
        cost_model = executor_family(config.executor_type).cost_model(
            config.executor_shape, config.prefill_lengths, list(config.fitted_knobs)
        )
        self.costs = costs = RequestCosts(cost_model, config.latency_scope)
        self._is_fitted = False
        self._knobs: tuple[Sequence[KnobSetting], torch.device, dict[str, torch.Tensor]] | None = None
        # Of all stages at once, with zeros where one has fewer features or inputs than another. Coefficients are
        # milliseconds per unit of each feature; zeros until they are fitted or loaded.
        num_features, num_inputs = (
            max(len(getattr(cost, part)) for cost in costs.stages.values()) for part in ("features", "inputs")
        )

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(len(costs.stages), *shape), requires_grad=False)

        self.coefficients = zeros(num_features)
        self.units = zeros(config.num_units, num_inputs + 1)
        self.post_init()

    def _init_weights(self, module: nn.Module):
        # What a folder lacks becomes zeros, which are refused at use; what was loaded stays as it is.
        if module is self:
            for coefficients in self.parameters():
                initialization.zeros_(coefficients)

    def stage_parameters(self, stage: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Coefficients, (features,), and units, (units, inputs + 1), of a stage."""
        row, cost = list(self.costs.stages).index(stage), self.costs.stages[stage]
        units = self.units[row]
        units = torch.cat([units[:, : len(cost.inputs)], units[:, -1:]], dim=1)
        return self.coefficients[row, : len(cost.features)], units

    @torch.no_grad()
    def set_stage_parameters(self, stage: str, coefficients: torch.Tensor, units: torch.Tensor) -> None:
        """Sets what [`~LatencyEstimatorModel.stage_parameters`] gives."""
        row, cost = list(self.costs.stages).index(stage), self.costs.stages[stage]
        self.coefficients[row, : len(cost.features)] = coefficients.to(self.coefficients)
        self.units[row, :, : len(cost.inputs)] = units[:, :-1].to(self.units)
        self.units[row, :, -1] = units[:, -1].to(self.units)

    @property
    def latency_scope(self) -> str:
        """As in [`LatencyEstimator`]."""
        return self.config.latency_scope

    @property
    def way(self) -> WayOfRunning | None:
        """As in [`LatencyEstimator`]."""
        if self.config.device_type in (None, UNKNOWN):
            return None
        return WayOfRunning(**{field.name: getattr(self.config, field.name) for field in fields(WayOfRunning)})

    def in_scope(self, latency_scope: str) -> "LatencyEstimatorModel":
        """As [`LatencyEstimator.in_scope`]: itself, or one of the model's stages alone."""
        check_scope_is_known(self.latency_scope, latency_scope)
        if latency_scope == self.latency_scope:
            return self
        # The held-out error is that of whole requests.
        config = LatencyEstimatorConfig(
            **{**self.config.to_dict(), "latency_scope": latency_scope, "held_out": None, "fitted_counts": None}
        )
        model = LatencyEstimatorModel(config)
        fitted_counts = self.config.fitted_counts or {}
        config.fitted_counts = {name: fitted_counts[name] for name in model.costs.count_names if name in fitted_counts}
        for stage in model.costs.stages:
            model.set_stage_parameters(stage, *self.stage_parameters(stage))
        return model.to(self.device)

    @torch.no_grad()
    def forward(self, output_tokens: torch.Tensor | None = None, **columns: torch.Tensor) -> LatencyEstimatorOutput:
        """
        Estimates for any combination of settings and inputs: integer or floating tensors whose shapes broadcast, (n,)
        each for n requests, or e.g. (settings, 1) knobs with (n,) counts for every setting of n requests.

        Args:
            output_tokens (`torch.Tensor`, *optional*, defaults to 2):
                Tokens of the answer: `decode_ms_per_token` is the mean of its steps.
            **columns (`torch.Tensor`):
                Knobs and counts of `costs.knob_names` and `costs.count_names`. Other counts are not looked at.

        Returns:
            [`LatencyEstimatorOutput`]

        Raises:
            ValueError: If the estimator was not fitted, or columns are missing or unknown.
        """
        stage_ms = dict(zip(self.costs.stages, self._stages_ms(output_tokens, columns), strict=True))
        decode_ms = stage_ms.pop(DECODE)
        preparation_ms, prefill_ms = self._sums(stage_ms)
        if preparation_ms is None:
            preparation_ms = torch.zeros_like(prefill_ms)
        return LatencyEstimatorOutput(preparation_ms, prefill_ms, decode_ms, stage_ms)

    def _stages_ms(
        self, output_tokens: torch.Tensor | None, columns: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """Times of all stages in order, of decoding that of a step, in ms."""
        self._check_fitted()
        coefficients, units = self.coefficients, self.units
        known = (*self.costs.cost_model.count_names, *self.costs.knob_names)
        unknown = [name for name in columns if name not in known]
        if unknown:
            raise ValueError(f"the latency estimator takes {', '.join(known)}, but got `{unknown[0]}`.")
        names = (*self.costs.count_names, *self.costs.knob_names)
        columns = {name: columns[name].to(coefficients) for name in names if name in columns}
        columns["output_tokens"] = (
            coefficients.new_tensor(2.0) if output_tokens is None else output_tokens.to(coefficients)
        )
        terms = [self.costs.terms(stage, columns) for stage in self.costs.stages]
        values = [value for one in terms for part in (one.features, one.inputs) for value in part]
        values = torch.stack(torch.broadcast_tensors(*values))
        features, inputs = (values[places] for places in self._places)  # (stages, features or inputs, ...)
        coefficients = coefficients.view(*coefficients.shape, *[1] * (features.dim() - 2))
        physical_ms = weighted_sum(coefficients.unbind(1), features.unbind(1))
        return (physical_ms * learned_factors(units, inputs)).unbind()

    def _sums(self, stage_ms: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Preparation (None where nothing is) and prefill, from the times of all stages but decoding."""
        stages = self.costs.stages
        prefill = [values for stage, values in stage_ms.items() if stages[stage].scope == MODEL_SCOPE]
        preparation = [values for stage, values in stage_ms.items() if stages[stage].scope != MODEL_SCOPE]
        return reduce(operator.add, preparation) if preparation else None, reduce(operator.add, prefill)

    def latency_ms(self, outcomes: "Sequence[Outcome]") -> torch.Tensor:
        """As [`LatencyEstimator.latency_ms`]."""
        names = [name for name in self.costs.count_names if name in outcomes[0].counts]
        counts = {name: [outcome.counts[name] for outcome in outcomes] for name in names}
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
        As [`LatencyEstimator.predict_latency_ms`]: `preparation_ms + prefill_ms + decode_ms_per_token * (output_tokens - 1)`,
        as the prefill gives the first output token.

        Raises:
            ValueError: If the estimator was not fitted, counts are missing or unknown or of a wrong shape, a knob lies
                outside the range that was measured, an answer has no token, or the quantile was not fitted.
        """
        stage_ms = self.predict_stage_ms(settings, counts, output_tokens)
        decode_ms = stage_ms.pop(DECODE)
        preparation_ms, prefill_ms = self._sums(stage_ms)
        latency_ms = (prefill_ms if preparation_ms is None else preparation_ms + prefill_ms) + decode_ms
        return latency_ms if quantile is None else latency_ms * self.quantile_factor(quantile)

    @torch.no_grad()
    def predict_stage_ms(
        self,
        settings: Sequence[KnobSetting],
        counts: Mapping[str, torch.Tensor | Sequence[int]],
        output_tokens: torch.Tensor | Sequence[int],
    ) -> dict[str, torch.Tensor]:
        """
        The typical time of each stage, `"decode"` being all steps of the answer together. Arguments and errors are those of
        [`~LatencyEstimatorModel.predict_latency_ms`].

        Returns:
            `dict[str, torch.Tensor]`: ms of each stage in order, of the shape of counts.
        """
        device = self.coefficients.device
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
        columns.update(self._knob_columns(settings))
        *others_ms, step_ms = self._stages_ms(output_tokens, columns)
        return dict(zip(self.costs.stages, (*others_ms, step_ms * (output_tokens - 1)), strict=True))

    def _knob_columns(self, settings: Sequence[KnobSetting]) -> dict[str, torch.Tensor]:
        """
        The knobs that cost something by themselves; what others cost comes in through the counts. Those of the last
        settings are kept: a guardrail asks for the same ones at every request.
        """
        like = self.coefficients
        if self._knobs is not None and self._knobs[0] is settings and self._knobs[1] == like.device:
            return self._knobs[2]
        columns = {}
        for name in self.costs.knob_names:
            values = [setting[name] for setting in settings]
            lowest, highest = self.config.fitted_knobs[name][0], self.config.fitted_knobs[name][-1]
            if values and not lowest <= min(values) <= max(values) <= highest:
                outside = min(values) if min(values) < lowest else max(values)
                raise ValueError(
                    f"knob `{name}` is {outside} but the latency estimator was fitted on {lowest} to {highest}: profile the "
                    "executor over the wanted values and fit again."
                )
            columns[name] = like.new_tensor(values)
        if isinstance(settings, tuple):  # others may be changed
            self._knobs = settings, like.device, columns
        return columns

    def quantile_factor(self, quantile: float) -> float:
        """
        What the estimate of a request is multiplied with to get an upper quantile that was fitted: 0.9, 0.95 or 0.99. Others
        are refused (`ValueError`).
        """
        factors = (self.config.upper_quantiles or {}).get(self.latency_scope, {})
        if str(quantile) not in factors:
            raise ValueError(
                f"the latency estimator has no quantile {quantile} (it has {list(factors) or 'none'}): ask for one that it "
                "has, or fit it again with `joint-controller fit-latency`."
            )
        return factors[str(quantile)]

    def _check_fitted(self) -> None:
        device = self.coefficients.device
        if self._is_fitted and self._places[0].device == device:
            return
        lacking = [
            stage
            for stage, *parameters in zip(self.costs.stages, self.coefficients, self.units, strict=True)
            if not all((values > 0).any() for values in parameters)
        ]
        if lacking:
            raise ValueError(
                f"the latency estimator has no coefficients of {lacking}: it was not fitted, or its folder is incomplete. "
                "Fit one with `joint-controller fit-latency`."
            )
        self._is_fitted = True
        # Where each stage's features and inputs are among those of all stages. Where there are fewer than the parameters have
        # room for, any will do: their weights are zero.
        rows: tuple[list[list[int]], list[list[int]]] = [], []
        position = 0
        for cost in self.costs.stages.values():
            sizes = (self.coefficients.shape[1], self.units.shape[2] - 1)
            for part, size, places in zip((cost.features, cost.inputs), sizes, rows, strict=True):
                places.append([position + min(place, len(part) - 1) for place in range(size)])
                position += len(part)
        self._places = tuple(torch.tensor(places, device=device) for places in rows)

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
