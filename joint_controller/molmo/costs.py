"""What the stages of a Molmo request cost, in terms of its knobs and the sizes of its inputs."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from ..executor.costs import DECODE, REQUEST_SCOPE, StageCost, StageTerms
from ..knobs import KnobSetting


class MolmoCostModel:
    """
    The [`~executor.CostModel`] of Molmo. Arguments are those of [`~executor.ExecutorFamily.cost_model`].

    Where the executor's sizes are unknown, every prompt is taken to touch all weights. Where prompts are padded, each
    costs what the next of the lengths costs; those longer than the last are not padded.
    """

    count_names = ("image_pixels", "num_views", "vision_tokens", "text_tokens")
    knob_names = ("top_k", "num_blocks")
    stages = {
        "image_processing": StageCost(
            features=("constant", "image pixels", "views"), inputs=("views",), scope=REQUEST_SCOPE
        ),
        "vision": StageCost(features=("constant", "views"), inputs=("views",)),
        "llm_prefill": StageCost(
            features=(
                "constant",
                "blocks",
                "blocks x share of experts touched",
                "tokens x blocks",
                "tokens x blocks x top_k",
                "tokens^2 x blocks",
            ),
            inputs=("tokens", "top_k", "blocks", "tokens x top_k"),
        ),
        DECODE: StageCost(
            features=("constant", "blocks", "blocks x top_k", "tokens x blocks"),
            inputs=("tokens", "top_k", "blocks", "blocks x top_k"),
        ),
    }

    def __init__(
        self,
        shape: Mapping[str, Any] | None,
        prefill_lengths: list[int] | None,
        knob_names: Collection[str] = ("top_k", "num_blocks"),
    ):
        missing = [name for name in self.knob_names if name not in knob_names]
        if missing:
            raise ValueError(
                f"the latencies of a Molmo depend on its knob `{missing[0]}`, but there are {', '.join(knob_names)} alone: "
                "profile it with all of its knobs."
            )
        self.shape = shape
        self.prefill_lengths = prefill_lengths
        self.num_experts = 1 if shape is None else shape["text_config.num_experts"]

    def terms(self, stage: str, columns: Mapping[str, torch.Tensor]) -> StageTerms:
        """As [`~executor.CostModel.terms`]."""
        if stage == "image_processing":
            # All pixels are read and scaled; every view is written.
            image_pixels, num_views = columns["image_pixels"], columns["num_views"]
            return StageTerms((torch.ones_like(num_views), image_pixels, num_views), (num_views,))
        if stage == "vision":
            num_views = columns["num_views"]  # every view costs the same
            return StageTerms((torch.ones_like(num_views), num_views), (num_views,))
        num_tokens = columns["vision_tokens"] + columns["text_tokens"]
        top_k, num_blocks = columns["top_k"], columns["num_blocks"]
        if stage == DECODE:
            # Tokens that a step sees on average over an answer: the first sees the prompt and one token, the last, number
            # `output_tokens - 1`, that many.
            context = num_tokens + columns["output_tokens"] / 2
            blocks_experts = num_blocks * top_k
            # Attention weights are read once a block, those of `top_k` experts too, and the cache of all tokens before.
            features = (torch.ones_like(context), num_blocks, blocks_experts, context * num_blocks)
            return StageTerms(features, (context, top_k, num_blocks, blocks_experts))
        num_tokens = pad_lengths(num_tokens, self.prefill_lengths)
        tokens_blocks = num_tokens * num_blocks
        # Weights are read once a block, those of an expert if a token is sent to it; projections and router work once a
        # token, experts `top_k` times a token, attention once a pair of tokens.
        features = (
            torch.ones_like(num_tokens),
            num_blocks,
            num_blocks * share_of_experts_touched(num_tokens, top_k, self.num_experts),
            tokens_blocks,
            tokens_blocks * top_k,
            num_tokens * tokens_blocks,
        )
        return StageTerms(features, (num_tokens, top_k, num_blocks, num_tokens * top_k))

    def request_flops(self, setting: KnobSetting, counts: Mapping[str, int], output_tokens: int) -> int | None:
        """As [`~executor.CostModel.request_flops`], two a multiplication and addition, at batch 1: tower and connector
        over all views, prefill over the prompt with the scores of its last token, a decode step for each further
        output token. Norms, activations, softmax and embeddings are left out. Attention counts all pairs of tokens in
        the prefill, as kernels without a causal shortcut compute them."""
        if self.shape is None:
            return None
        vision = {name.partition(".")[2]: size for name, size in self.shape.items() if name.startswith("vision_")}
        text = {name.partition(".")[2]: size for name, size in self.shape.items() if name.startswith("text_")}

        patches = (vision["image_size"] // vision["patch_size"]) ** 2
        seen = patches + 1  # and the class token
        width = vision["hidden_size"]
        # Blocks behind the last whose output is read do not run.
        depth = max(layer % vision["num_hidden_layers"] for layer in self.shape["vit_layers"]) + 1
        block = seen * (4 * width**2 + 2 * width * vision["intermediate_size"]) + 2 * seen**2 * width
        tower = patches * 3 * vision["patch_size"] ** 2 * width + depth * block

        pooled = self.shape["pooling_size"][0] * self.shape["pooling_size"][1]
        tokens = patches // pooled
        features = len(self.shape["vit_layers"]) * width
        # Attention over each group of patches: the mean is the query; then the gated projection.
        pooling = patches * 2 * features * width + tokens * (features * width + width**2) + 2 * patches * width
        inner = self.shape["projector_intermediate_size"]
        projection = tokens * (2 * width * inner + inner * text["hidden_size"])

        num_tokens, num_blocks = counts["vision_tokens"] + counts["text_tokens"], setting["num_blocks"]
        hidden = text["hidden_size"]
        key_width = hidden // text["num_attention_heads"] * text["num_key_value_heads"]
        per_token = 2 * hidden**2 + 2 * hidden * key_width + hidden * text["num_experts"]
        per_token += setting["top_k"] * 3 * hidden * text["intermediate_size"]
        scores = hidden * text["vocab_size"]
        prefill = num_blocks * (num_tokens * per_token + 2 * num_tokens**2 * hidden) + scores
        contexts = range(num_tokens + 1, num_tokens + output_tokens)
        decode = sum(num_blocks * (per_token + 2 * context * hidden) + scores for context in contexts)
        return 2 * (counts["num_views"] * (tower + pooling + projection) + prefill + decode)


def share_of_experts_touched(num_tokens: torch.Tensor, top_k: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Share of a block's experts that at least one token is sent to, if every token is sent to `top_k` of them at
    random: 1 - (1 - top_k / num_experts)^num_tokens. The weights of these are read, however few tokens they get."""
    # In float64, whose rounding is lost in the precision of the result: a longer prompt must not touch less.
    missed = torch.log1p(-(top_k.double() / num_experts).clamp(max=1))
    return -torch.expm1(num_tokens.double() * missed).to(num_tokens.dtype)


def pad_lengths(num_tokens: torch.Tensor, lengths: Sequence[int] | None) -> torch.Tensor:
    """Each number of tokens rounded up to the next of `lengths` (ascending); as it is without any, or beyond the last."""
    if lengths is None:
        return num_tokens
    steps = torch.tensor(lengths, dtype=num_tokens.dtype, device=num_tokens.device)
    position = torch.searchsorted(steps, num_tokens.contiguous())
    return torch.where(position < len(lengths), steps[position.clamp(max=len(lengths) - 1)], num_tokens)
