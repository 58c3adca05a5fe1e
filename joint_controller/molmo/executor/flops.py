"""Floating-point operations of a request, from sizes alone."""

from collections.abc import Mapping
from typing import Any


def request_flops(
    executor_shape: Mapping[str, Any], num_views: int, num_tokens: int, output_tokens: int, top_k: int, num_blocks: int
) -> int:
    """
    Floating-point operations (two a multiplication and addition) of the matrix products of one request at batch 1: tower
    and connector over all views, prefill over the prompt with the scores of its last token, a decode step for each further
    output token. Norms, activations, softmax and embeddings are left out. Attention counts all pairs of tokens in the
    prefill, as kernels without a causal shortcut compute them.

    Args:
        executor_shape (`Mapping[str, Any]`):
            Sizes of the executor, see [`~latency.executor_shape`].
        num_views (`int`):
            Views that are encoded.
        num_tokens (`int`):
            Tokens of the prompt, the image's included.
        output_tokens (`int`):
            Tokens of the answer.
        top_k (`int`):
            Experts per token.
        num_blocks (`int`):
            Blocks that run.

    Returns:
        `int`: floating-point operations.
    """
    vision = {name.partition(".")[2]: size for name, size in executor_shape.items() if name.startswith("vision_")}
    text = {name.partition(".")[2]: size for name, size in executor_shape.items() if name.startswith("text_")}

    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    seen = patches + 1  # and the class token
    width = vision["hidden_size"]
    # Blocks behind the last whose output is read do not run.
    depth = max(layer % vision["num_hidden_layers"] for layer in executor_shape["vit_layers"]) + 1
    block = seen * (4 * width**2 + 2 * width * vision["intermediate_size"]) + 2 * seen**2 * width
    tower = patches * 3 * vision["patch_size"] ** 2 * width + depth * block

    pooled = executor_shape["pooling_size"][0] * executor_shape["pooling_size"][1]
    tokens = patches // pooled
    features = len(executor_shape["vit_layers"]) * width
    # Attention over each group of patches: the mean is the query; then the gated projection.
    pooling = patches * 2 * features * width + tokens * (features * width + width**2) + 2 * patches * width
    inner = executor_shape["projector_intermediate_size"]
    projection = tokens * (2 * width * inner + inner * text["hidden_size"])

    hidden = text["hidden_size"]
    key_width = hidden // text["num_attention_heads"] * text["num_key_value_heads"]
    per_token = 2 * hidden**2 + 2 * hidden * key_width + hidden * text["num_experts"]
    per_token += top_k * 3 * hidden * text["intermediate_size"]
    scores = hidden * text["vocab_size"]
    prefill = num_blocks * (num_tokens * per_token + 2 * num_tokens**2 * hidden) + scores
    contexts = range(num_tokens + 1, num_tokens + output_tokens)
    decode = sum(num_blocks * (per_token + 2 * context * hidden) + scores for context in contexts)
    return 2 * (num_views * (tower + pooling + projection) + prefill + decode)
