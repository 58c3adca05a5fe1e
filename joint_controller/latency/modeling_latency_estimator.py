"""The latency estimator: milliseconds of one request from the knob setting and the token counts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, initialization
from transformers.utils import ModelOutput

from ..knobs import KnobSetting
from .configuration_latency_estimator import LatencyEstimatorConfig, executor_shape


# What the time of each stage is a sum of. Every feature is non-negative and non-decreasing in every knob and count, and
# every coefficient is non-negative: so is the estimate, by construction.
VISION_FEATURES = ("constant", "views")
LLM_PREFILL_FEATURES = ("constant", "blocks", "tokens x blocks", "tokens x blocks x top_k", "tokens^2 x blocks")
DECODE_FEATURES = ("constant", "blocks", "blocks x top_k", "tokens x blocks")


@dataclass
class LatencyEstimatorOutput(ModelOutput):
    """
    Estimated times of the stages of a request at batch 1, in milliseconds. All have the broadcast shape of the inputs.

    Args:
        prefill_ms (`torch.FloatTensor`):
            From pixels to the first output token: `vision_ms + llm_prefill_ms`. Image processing is not in it.
        decode_ms_per_token (`torch.FloatTensor`):
            Each output token after the first.
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
    num_tokens: torch.Tensor, top_k: torch.Tensor, num_blocks: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """
    Values of `LLM_PREFILL_FEATURES`: weights are read once a block, projections and router work once a token, experts
    `top_k` times a token, attention once a pair of tokens.
    """
    tokens_blocks = num_tokens * num_blocks
    return torch.ones_like(num_tokens), num_blocks, tokens_blocks, tokens_blocks * top_k, num_tokens * tokens_blocks


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
    total = torch.zeros_like(features[0])
    for coefficient, feature in zip(coefficients, features, strict=True):
        total = total + coefficient * feature
    return total


class LatencyEstimatorModel(PreTrainedModel):
    """
    Predicts what a request costs the executor at batch 1: a sum of physical terms (weights read, work per token, work
    per expert, attention) with non-negative coefficients, fitted to measurements by
    [`~latency.fit_latency_estimator`]. Estimates are positive and non-decreasing in every knob and in every count.

    Args:
        config ([`LatencyEstimatorConfig`]):
            What the coefficients were fitted on.
    """

    config_class = LatencyEstimatorConfig
    config: LatencyEstimatorConfig

    def __init__(self, config: LatencyEstimatorConfig):
        super().__init__(config)
        # Milliseconds per unit of each feature; zeros until they are fitted or loaded.
        self.vision_coefficients = nn.Parameter(torch.zeros(len(VISION_FEATURES)), requires_grad=False)
        self.llm_prefill_coefficients = nn.Parameter(torch.zeros(len(LLM_PREFILL_FEATURES)), requires_grad=False)
        self.decode_coefficients = nn.Parameter(torch.zeros(len(DECODE_FEATURES)), requires_grad=False)
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

        Returns:
            [`LatencyEstimatorOutput`]

        Raises:
            ValueError: If the estimator was not fitted.
        """
        self._check_fitted()
        counts = (num_views, vision_tokens, text_tokens, top_k, num_blocks)
        counts = [count.to(self.decode_coefficients) for count in counts]
        num_views, vision_tokens, text_tokens, top_k, num_blocks = torch.broadcast_tensors(*counts)
        num_tokens = vision_tokens + text_tokens
        vision_ms = _weighted_sum(self.vision_coefficients, vision_features(num_views))
        llm_prefill_ms = _weighted_sum(
            self.llm_prefill_coefficients, llm_prefill_features(num_tokens, top_k, num_blocks)
        )
        decode_ms = _weighted_sum(self.decode_coefficients, decode_features(num_tokens, top_k, num_blocks))
        return LatencyEstimatorOutput(
            prefill_ms=vision_ms + llm_prefill_ms,
            decode_ms_per_token=decode_ms,
            vision_ms=vision_ms,
            llm_prefill_ms=llm_prefill_ms,
        )

    def predict_latency_ms(
        self,
        settings: Sequence[KnobSetting],
        num_views: Sequence[int] | torch.Tensor,
        vision_tokens: Sequence[int] | torch.Tensor,
        text_tokens: Sequence[int] | torch.Tensor,
        output_tokens: Sequence[int] | torch.Tensor,
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

        Returns:
            `torch.Tensor` of shape (n,): milliseconds, float32.

        Raises:
            ValueError: If the estimator was not fitted, the arguments' lengths differ, a `top_k` or `num_blocks` lies
                outside the range that was measured, or an answer has no token.
        """
        self._check_fitted()
        for setting in set(settings):
            self._check_setting(setting)
        top_k = torch.tensor([setting.top_k for setting in settings], device=self.device)
        num_blocks = torch.tensor([setting.num_blocks for setting in settings], device=self.device)
        counts = {
            "num_views": num_views,
            "vision_tokens": vision_tokens,
            "text_tokens": text_tokens,
            "output_tokens": output_tokens,
        }
        counts = {name: torch.as_tensor(values, device=self.device) for name, values in counts.items()}
        for name, values in counts.items():
            if values.shape != top_k.shape:
                raise ValueError(
                    f"`{name}` has the shape {tuple(values.shape)} but there are {len(settings)} settings: give one "
                    "value a setting."
                )
        output_tokens = counts.pop("output_tokens")
        if (output_tokens < 1).any():
            raise ValueError(
                f"`output_tokens` holds {int(output_tokens.min())}: an answer has 1 token at least, its end of sequence."
            )
        estimate = self(**counts, top_k=top_k, num_blocks=num_blocks)
        return estimate.prefill_ms + estimate.decode_ms_per_token * (output_tokens - 1)

    def _check_fitted(self):
        lacking = [name for name, coefficients in self.named_parameters() if not (coefficients > 0).any()]
        if lacking or self.config.fitted_knobs is None:
            raise ValueError(
                f"the latency estimator has no {lacking or 'fitted_knobs'}: it was not fitted, or its folder is "
                "incomplete. Fit one with `joint-controller fit-latency`."
            )

    def _check_setting(self, setting: KnobSetting):
        # The tier needs no check: what it costs comes in through the counts.
        for knob in ("top_k", "num_blocks"):
            measured = self.config.fitted_knobs[knob]
            value = getattr(setting, knob)
            if not measured[0] <= value <= measured[-1]:
                raise ValueError(
                    f"knob `{knob}` is {value} but the latency estimator was fitted on {measured[0]} to "
                    f"{measured[-1]}: profile the executor over the wanted values and fit again."
                )

    def check_executor(self, config: PreTrainedConfig):
        """
        Makes sure that the estimator is about an executor.

        Args:
            config ([`MolmoConfig`]):
                Configuration of the executor's model.

        Raises:
            ValueError: If a size that latency depends on differs from the executor that was measured.
        """
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


def embedded_latency_estimator_path() -> Path:
    """
    Folder of the latency estimator that ships with the package: the embedded executor on a CPU.

    Raises:
        FileNotFoundError: If the installed package has no such folder.
    """
    path = Path(__file__).parents[1] / "assets" / "latency" / "embedded_cpu"
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"the embedded executor's latency estimator is missing from '{path}': install the package again, or measure "
            "this machine with `--latency_estimator_path fit`."
        )
    return path
