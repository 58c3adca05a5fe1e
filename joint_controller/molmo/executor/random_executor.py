"""Executors with random weights: what a checkpoint of these sizes costs, without downloading it."""

import math
from typing import Any

import torch

from .. import MolmoConfig, MolmoForConditionalGeneration, MolmoImageProcessor, MolmoProcessor, build_word_tokenizer
from .molmo_executor import MolmoExecutor, default_place


RANDOM_CONFIGS = {"molmoe-1b": MolmoConfig}
"""Sizes by name: `"molmoe-1b"` are those of `allenai/MolmoE-1B-0924`."""


def random_executor(
    config: MolmoConfig,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 42,
    **kwargs: Any,
) -> MolmoExecutor:
    """An executor of these sizes with random weights, made on its device. It answers nonsense, in the time that a
    trained one takes; its tokenizer knows words only. Defaults of device and precision are those of
    [`MolmoExecutor.from_pretrained`]; `kwargs` are further arguments of [`MolmoExecutor`]."""
    device, dtype = default_place(device, dtype)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(seed)
        model = MolmoForConditionalGeneration._from_config(config, dtype=dtype)
    return MolmoExecutor(model, random_processor(config), **kwargs)


def random_processor(config: MolmoConfig) -> MolmoProcessor:
    """A processor that fits a configuration, with a word-level tokenizer that fills its vocabulary."""
    vision = config.vision_config
    grid = vision.image_size // vision.patch_size
    rows, columns = config.pooling_size
    image_processor = MolmoImageProcessor(
        base_image_input_size=(vision.image_size, vision.image_size),
        image_patch_size=vision.patch_size,
        image_token_length_h=math.ceil(grid / rows),
        image_token_length_w=math.ceil(grid / columns),
        max_crops=config.max_crops,
        overlap_margins=config.overlap_margins,
    )
    base_size = build_word_tokenizer([]).convert_tokens_to_ids("<im_start>")
    fillers = [f"word{index}" for index in range(config.text_config.vocab_size - base_size)]
    return MolmoProcessor(image_processor, build_word_tokenizer(fillers))
