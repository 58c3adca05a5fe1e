"""The latency estimator: milliseconds of one request from the knob setting and the token counts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, initialization
from transformers.utils import ModelOutput, logging

from ..knobs import KnobSetting
from .configuration_latency_estimator import LatencyEstimatorConfig, executor_shape


logger = logging.get_logger(__name__)

# What the time of each stage is a sum of. Every feature is non-negative and non-decreasing in every knob and count, and
# every coefficient is non-negative: so is the estimate, by construction.
VISION_FEATURES = ("constant", "views")
LLM_PREFILL_FEATURES = {
    1: ("constant", "blocks", "tokens x blocks", "tokens x blocks x top_k", "tokens^2 x blocks"),
    2: (
        "constant",
        "blocks",
        "blocks x share of experts touched",
        "tokens x blocks",
        "tokens x blocks x top_k",
        "tokens^2 x blocks",
    ),
}
"""By version of the formula."""
DECODE_FEATURES = ("constant", "blocks", "blocks x top_k", "tokens x blocks")

VISION_INPUTS = ("views",)
LLM_PREFILL_INPUTS = ("tokens", "top_k", "blocks", "tokens x top_k")
DECODE_INPUTS = ("tokens", "top_k", "blocks", "blocks x top_k")
"""What the learned factor of each stage sees."""

_CACHED_VALUES = 2**14
"""Values of a temporary tensor that stays in a core's cache."""


@dataclass
class LatencyEstimatorOutput(ModelOutput):
    """
    Estimated times of the stages of a request at batch 1, in milliseconds. All have the broadcast shape of the inputs.

    Args:
        prefill_ms (`torch.FloatTensor`):
            From pixels to the first output token: `vision_ms + llm_prefill_ms`. Image processing is not in it.
        decode_ms_per_token (`torch.FloatTensor`):
            Each output token after the first, the mean over the answer.
        vision_ms (`torch.FloatTensor`):
            Vision tower and connector.
        llm_prefill_ms (`torch.FloatTensor`):
            Language model over the whole sequence, first output token included.
    """

    prefill_ms: torch.FloatTensor | None = None
    decode_ms_per_token: torch.FloatTensor | None = None
    vision_ms: torch.FloatTensor | None = None
    llm_prefill_ms: torch.FloatTensor | None = None


def vision_features(num_views: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Values of `VISION_FEATURES`: every view costs the same."""
    return torch.ones_like(num_views), num_views


def llm_prefill_features(
    num_tokens: torch.Tensor, top_k: torch.Tensor, num_blocks: torch.Tensor, num_experts: int | None = None
) -> tuple[torch.Tensor, ...]:
    """
    Values of `LLM_PREFILL_FEATURES`: weights are read once a block, those of an expert if a token is sent to it,
    projections and router work once a token, experts `top_k` times a token, attention once a pair of tokens. Without
    `num_experts`, those of version 1.
    """
    tokens_blocks = num_tokens * num_blocks
    weights = (num_blocks,)
    if num_experts is not None:
        weights += (num_blocks * share_of_experts_touched(num_tokens, top_k, num_experts),)
    return torch.ones_like(num_tokens), *weights, tokens_blocks, tokens_blocks * top_k, num_tokens * tokens_blocks


def share_of_experts_touched(num_tokens: torch.Tensor, top_k: torch.Tensor, num_experts: int) -> torch.Tensor:
    """
    Share of a block's experts that at least one token is sent to, if every token is sent to `top_k` of them at random:
    1 - (1 - top_k / num_experts)^num_tokens. The weights of these are read, however few tokens they get.
    """
    # In float64, whose rounding is lost in the precision of the result: a longer prompt must not touch less.
    missed = torch.log1p(-(top_k.double() / num_experts).clamp(max=1))
    return -torch.expm1(num_tokens.double() * missed).to(num_tokens.dtype)


def llm_prefill_inputs(
    num_tokens: torch.Tensor, top_k: torch.Tensor, num_blocks: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Values of `LLM_PREFILL_INPUTS`."""
    return num_tokens, top_k, num_blocks, num_tokens * top_k


def decode_inputs(num_tokens: torch.Tensor, top_k: torch.Tensor, num_blocks: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Values of `DECODE_INPUTS`."""
    return num_tokens, top_k, num_blocks, num_blocks * top_k


def decode_features(
    num_tokens: torch.Tensor, top_k: torch.Tensor, num_blocks: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """
    Values of `DECODE_FEATURES`: attention weights are read once a block, those of `top_k` experts too, and the cache of
    all tokens before.
    """
    return torch.ones_like(num_tokens), num_blocks, num_blocks * top_k, num_tokens * num_blocks


def _weighted_sum(coefficients: torch.Tensor, features: Sequence[torch.Tensor]) -> torch.Tensor:
    # Term by term rather than as a matrix product, whose order of additions may differ between rows: rounding must not
    # make a larger setting cheaper.
    return sum(coefficient * feature for coefficient, feature in zip(coefficients, features, strict=True))


def pad_lengths(num_tokens: torch.Tensor, lengths: Sequence[int] | None) -> torch.Tensor:
    """Each number of tokens rounded up to the next of `lengths` (ascending); as it is without any, or beyond the last."""
    if lengths is None:
        return num_tokens
    steps = torch.tensor(lengths, dtype=num_tokens.dtype, device=num_tokens.device)
    position = torch.searchsorted(steps, num_tokens.contiguous())
    return torch.where(position < len(lengths), steps[position.clamp(max=len(lengths) - 1)], num_tokens)


def mean_context(num_tokens: torch.Tensor, output_tokens: torch.Tensor) -> torch.Tensor:
    """
    Tokens that a decode step sees on average over an answer: the first step sees the prompt and one token, the last,
    number `output_tokens - 1`, that many.
    """
    return num_tokens + output_tokens / 2


def learned_factor(units: torch.Tensor, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """
    1 or more, and non-decreasing in every input: a network with one hidden layer whose weights are not negative. Its units,
    z^8 / (1 + z^8), are soft steps at z = 1, so that thresholds, kinks and saturation can be learnt.

    Args:
        units (`torch.Tensor` of shape `(num_units, num_inputs + 1)`):
            Of each unit, the weights of its inputs and the weight of its output; not negative.
        inputs (`Sequence[torch.Tensor]`):
            One tensor an input, not negative; their shapes broadcast.
    """
    # Several units at once, along a new first dimension, since a single request costs what launching the operations costs;
    # only as many as a core's cache holds, since many requests cost what memory does.
    together = max(1, _CACHED_VALUES // inputs[0].numel())
    total = torch.ones_like(inputs[0])
    for group in units.view(*units.shape, *[1] * inputs[0].dim()).split(together):
        z = _weighted_sum(group[:, :-1].unbind(1), inputs)
        for _ in range(3):
            z = z * z
        # Written so that each operation is monotone after rounding, too; a plain sum may add up in another order elsewhere.
        total = total + (group[:, -1] * (1 - 1 / (1 + z))).cumsum(0)[-1]
    return total


class LatencyEstimatorModel(PreTrainedModel):
    """
    Predicts what a request costs the executor at batch 1. Each stage is a sum of physical terms (weights read, work per
    token, work per expert, attention) with non-negative coefficients, times a learned factor
    ([`~latency.modeling_latency_estimator.learned_factor`]) for what these do not explain, fitted to measurements by
    [`~latency.fit_latency_estimator`]. Estimates are positive and non-decreasing in every knob and in every count.

    Args:
        config ([`LatencyEstimatorConfig`]):
            The formula, and what the coefficients were fitted on.
    """

    config_class = LatencyEstimatorConfig
    config: LatencyEstimatorConfig

    def __init__(self, config: LatencyEstimatorConfig):
        super().__init__(config)

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape), requires_grad=False)

        # Milliseconds per unit of each feature; zeros until they are fitted or loaded.
        self.vision_coefficients = zeros(len(VISION_FEATURES))
        self.llm_prefill_coefficients = zeros(len(LLM_PREFILL_FEATURES[config.formula_version]))
        self.decode_coefficients = zeros(len(DECODE_FEATURES))
        if config.formula_version == 2:
            self.vision_units = zeros(config.num_units, len(VISION_INPUTS) + 1)
            self.llm_prefill_units = zeros(config.num_units, len(LLM_PREFILL_INPUTS) + 1)
            self.decode_units = zeros(config.num_units, len(DECODE_INPUTS) + 1)
        self.post_init()

    def _init_weights(self, module: nn.Module):
        # What a folder lacks becomes zeros, which are refused at use; what was loaded stays as it is.
        if module is self:
            for coefficients in self.parameters():
                initialization.zeros_(coefficients)

    @torch.no_grad()
    def forward(
        self,
        num_views: torch.Tensor,
        vision_tokens: torch.Tensor,
        text_tokens: torch.Tensor,
        top_k: torch.Tensor,
        num_blocks: torch.Tensor,
        output_tokens: torch.Tensor | None = None,
    ) -> LatencyEstimatorOutput:
        """
        Estimates for any combination of settings and inputs. All arguments are integer or floating tensors whose shapes
        broadcast: (n,) each for n requests, or e.g. (settings, 1) knobs with (n,) counts for every setting of n
        requests.

        Args:
            num_views (`torch.Tensor`):
                Views the image is encoded in, the global one included.
            vision_tokens (`torch.Tensor`):
                Image tokens in the sequence, start, column and end tokens included.
            text_tokens (`torch.Tensor`):
                All other tokens of the sequence before the answer.
            top_k (`torch.Tensor`):
                Experts per token.
            num_blocks (`torch.Tensor`):
                Blocks that run.
            output_tokens (`torch.Tensor`, *optional*):
                Tokens of the answer: `decode_ms_per_token` is the mean of its steps. Defaults to 2, an answer of one
                step. Version 1 of the formula does not look at it.

        Returns:
            [`LatencyEstimatorOutput`]

        Raises:
            ValueError: If the estimator was not fitted.
        """
        self._check_fitted()
        counts = (num_views, vision_tokens, text_tokens, top_k, num_blocks)
        num_views, vision_tokens, text_tokens, top_k, num_blocks = (
            count.to(self.decode_coefficients) for count in counts
        )
        num_tokens = vision_tokens + text_tokens
        # Vision is worked out for as many views as are given, however many settings share them.
        vision_ms = _weighted_sum(self.vision_coefficients, vision_features(num_views))
        num_tokens, top_k, num_blocks = torch.broadcast_tensors(num_tokens, top_k, num_blocks)
        if self.config.formula_version == 1:
            llm_prefill = llm_prefill_features(num_tokens, top_k, num_blocks)
            llm_prefill_ms = _weighted_sum(self.llm_prefill_coefficients, llm_prefill)
            decode_ms = _weighted_sum(self.decode_coefficients, decode_features(num_tokens, top_k, num_blocks))
        else:
            vision_ms = vision_ms * learned_factor(self.vision_units, (num_views,))
            padded_tokens = pad_lengths(num_tokens, self.config.prefill_lengths)
            llm_prefill = llm_prefill_features(padded_tokens, top_k, num_blocks, self.num_experts)
            llm_prefill_ms = _weighted_sum(self.llm_prefill_coefficients, llm_prefill)
            llm_prefill_ms = llm_prefill_ms * learned_factor(
                self.llm_prefill_units, llm_prefill_inputs(padded_tokens, top_k, num_blocks)
            )
            output_tokens = torch.full_like(num_tokens, 2) if output_tokens is None else output_tokens
            context = mean_context(num_tokens, output_tokens.to(num_tokens))
            context, top_k, num_blocks = torch.broadcast_tensors(context, top_k, num_blocks)
            decode_ms = _weighted_sum(self.decode_coefficients, decode_features(context, top_k, num_blocks))
            decode_ms = decode_ms * learned_factor(self.decode_units, decode_inputs(context, top_k, num_blocks))
        stages = torch.broadcast_tensors(vision_ms + llm_prefill_ms, decode_ms, vision_ms, llm_prefill_ms)
        names = ("prefill_ms", "decode_ms_per_token", "vision_ms", "llm_prefill_ms")
        return LatencyEstimatorOutput(**dict(zip(names, stages, strict=True)))

    @property
    def num_experts(self) -> int:
        """Experts of each block of the executor; 1 for one whose sizes nobody knows: each prompt touches all weights."""
        if self.config.executor_shape is None:
            return 1
        return self.config.executor_shape["text_config.num_experts"]

    def predict_latency_ms(
        self,
        settings: Sequence[KnobSetting],
        num_views: Sequence[int] | torch.Tensor,
        vision_tokens: Sequence[int] | torch.Tensor,
        text_tokens: Sequence[int] | torch.Tensor,
        output_tokens: Sequence[int] | torch.Tensor,
        quantile: float | None = None,
    ) -> torch.Tensor:
        """
        Latency of whole requests: `prefill_ms + decode_ms_per_token * (output_tokens - 1)`, as the prefill gives the
        first output token.

        Args:
            settings (`Sequence[KnobSetting]`):
                Knob setting of each of the n requests.
            num_views, vision_tokens, text_tokens (`Sequence[int]` or `torch.Tensor`):
                As in [`~LatencyEstimatorModel.forward`], n each.
            output_tokens (`Sequence[int]` or `torch.Tensor`):
                Tokens of the answer with the end of sequence, 1 or more, n of them.
            quantile (`float`, *optional*):
                Share of requests whose latency is to lie below what is predicted, e.g. 0.95 for a promise that is kept 19
                times in 20. By default, the typical latency.

        Returns:
            `torch.Tensor` of shape (n,): milliseconds, float32.

        Raises:
            ValueError: If the estimator was not fitted, the arguments' lengths differ, a `top_k` or `num_blocks` lies
                outside the range that was measured, an answer has no token, or the quantile was not fitted.
        """
        counts = {
            "num_views": num_views,
            "vision_tokens": vision_tokens,
            "text_tokens": text_tokens,
            "output_tokens": output_tokens,
        }
        counts = {name: torch.as_tensor(values, device=self.device) for name, values in counts.items()}
        for name, values in counts.items():
            if values.shape != (len(settings),):
                raise ValueError(
                    f"`{name}` has the shape {tuple(values.shape)} but there are {len(settings)} settings: give one "
                    "value a setting."
                )
        top_k, num_blocks = self._knobs(settings)
        return self._total_ms(counts, top_k, num_blocks, quantile)

    def predict_grid_ms(
        self,
        settings: Sequence[KnobSetting],
        num_views: torch.Tensor,
        vision_tokens: torch.Tensor,
        text_tokens: torch.Tensor,
        output_tokens: torch.Tensor,
        quantile: float | None = None,
    ) -> torch.Tensor:
        """
        Latency of n requests at each of s settings.

        Args:
            settings (`Sequence[KnobSetting]`):
                The s settings, e.g. all of a [`KnobSpace`].
            num_views, vision_tokens (`torch.Tensor`):
                As in [`~LatencyEstimatorModel.forward`], of shape (s, n): they depend on the setting's tier.
            text_tokens, output_tokens (`torch.Tensor`):
                As in [`~LatencyEstimatorModel.predict_latency_ms`], of shape (n,) or (s, n).
            quantile (`float`, *optional*):
                As in [`~LatencyEstimatorModel.predict_latency_ms`].

        Returns:
            `torch.Tensor` of shape (s, n): milliseconds, float32.

        Raises:
            ValueError: As [`~LatencyEstimatorModel.predict_latency_ms`].
        """
        counts = {
            "num_views": num_views,
            "vision_tokens": vision_tokens,
            "text_tokens": text_tokens,
            "output_tokens": output_tokens,
        }
        shape = torch.Size((len(settings), num_views.shape[-1]))
        for name, values in counts.items():
            if values.shape != shape and (name.startswith(("num", "vision")) or values.shape != shape[1:]):
                raise ValueError(f"`{name}` has the shape {tuple(values.shape)}: give {tuple(shape)}.")
        top_k, num_blocks = self._knobs(settings)
        counts = {name: values.to(self.device) for name, values in counts.items()}
        return self._total_ms(counts, top_k[:, None], num_blocks[:, None], quantile)

    def _knobs(self, settings: Sequence[KnobSetting]) -> tuple[torch.Tensor, torch.Tensor]:
        self._check_fitted()
        # The tier needs no check: what it costs comes in through the counts.
        knobs = {name: [getattr(setting, name) for setting in settings] for name in ("top_k", "num_blocks")}
        for name, values in knobs.items():
            measured = self.config.fitted_knobs[name]
            outside = [value for value in values if not measured[0] <= value <= measured[-1]]
            if outside:
                raise ValueError(
                    f"knob `{name}` is {outside[0]} but the latency estimator was fitted on {measured[0]} to "
                    f"{measured[-1]}: profile the executor over the wanted values and fit again."
                )
        top_k, num_blocks = (torch.tensor(values, device=self.device) for values in knobs.values())
        return top_k, num_blocks

    def _total_ms(
        self, counts: dict[str, torch.Tensor], top_k: torch.Tensor, num_blocks: torch.Tensor, quantile: float | None
    ) -> torch.Tensor:
        output_tokens = counts["output_tokens"]
        if (output_tokens < 1).any():
            raise ValueError(
                f"`output_tokens` holds {int(output_tokens.min())}: an answer has 1 token at least, its end of sequence."
            )
        estimate = self(**counts, top_k=top_k, num_blocks=num_blocks)
        latency_ms = estimate.prefill_ms + estimate.decode_ms_per_token * (output_tokens - 1)
        return latency_ms if quantile is None else latency_ms * self.quantile_factor(quantile)

    def quantile_factor(self, quantile: float, part: str = "total") -> float:
        """
        What an estimate is multiplied with to get an upper quantile.

        Args:
            quantile (`float`):
                A quantile that was fitted: 0.9, 0.95 or 0.99.
            part (`str`, *optional*, defaults to `"total"`):
                `"prefill"`, `"decode"` or `"total"`.

        Raises:
            ValueError: If the quantile was not fitted.
        """
        factors = (self.config.upper_quantiles or {}).get(part, {})
        if str(quantile) not in factors:
            raise ValueError(
                f"the latency estimator has no quantile {quantile} of '{part}' (it has {list(factors) or 'none'}): ask for "
                "one that it has, or fit it again with `joint-controller fit-latency`."
            )
        return factors[str(quantile)]

    def _check_fitted(self):
        lacking = [name for name, coefficients in self.named_parameters() if not (coefficients > 0).any()]
        if lacking or self.config.fitted_knobs is None:
            raise ValueError(
                f"the latency estimator has no {lacking or 'fitted_knobs'}: it was not fitted, or its folder is "
                "incomplete. Fit one with `joint-controller fit-latency`."
            )

    def check_executor(self, config: PreTrainedConfig):
        """
        Makes sure that the estimator is about an executor. Where nobody knows which executor was measured (imported
        profiles may not say), a warning takes the place of the check.

        Args:
            config ([`MolmoConfig`]):
                Configuration of the executor's model.

        Raises:
            ValueError: If a size that latency depends on differs from the executor that was measured.
        """
        if self.config.executor_shape is None:
            logger.warning(
                "the latency estimator does not know the sizes of the executor that it was fitted on: make sure that it is "
                "this one."
            )
            return
        shape = executor_shape(config)
        differing = [
            f"{field} {measured} there, {shape[field]} here"
            for field, measured in self.config.executor_shape.items()
            if shape[field] != measured
        ]
        if differing:
            raise ValueError(
                f"the latency estimator was fitted on another executor ({'; '.join(differing)}): fit one for this "
                "executor with `joint-controller profile` and `joint-controller fit-latency`."
            )
