"""
Several questions about one image in one sequence, as in Molmo's own training: BOS and image tokens first, then the
questions with their answers, each of which attends to the image and itself only. Positions restart behind the image, so
that every question sees exactly what it would see alone, and the image is encoded once for all of them.

Images are square here, so that all sequences of a tier have one shape and one mask.
"""

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ..configuration_molmo import MolmoConfig
from ..modeling_molmo import MolmoForConditionalGeneration
from ..processing_molmo import MolmoProcessor


@dataclass
class AskedImage:
    """An image and the questions about it: (question, answer, question type)."""

    image: Image.Image
    questions: list[tuple[str, str, str]]


class Packer:
    """Puts the questions about an image one after another, as tensors of a fixed shape: a prefix that all questions
    share (BOS, image, the beginning of the prompt) and then a segment for each question: the rest of its prompt, its
    answer, padding. Padding needs no mask: it comes after everything that the loss looks at."""

    segment_length = 14

    def __init__(self, processor: MolmoProcessor, num_questions: int):
        self.processor = processor
        self.num_questions = num_questions
        self._known_ids: dict[str, list[int]] = {}  # questions repeat, and looking them up beats tokenizing by far
        # The beginning of the prompt is the same for all questions: it joins the prefix.
        empty, short = (self._ids(processor.format_prompt(question)) for question in ("", "?"))
        self.shared = len(os.path.commonprefix([empty, short]))
        self.unshared = len(empty) - self.shared

    def _ids(self, text: str) -> list[int]:
        if text not in self._known_ids:
            self._known_ids[text] = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._known_ids[text]

    def pack(self, asked: AskedImage) -> dict[str, torch.Tensor]:
        """Packs the first `num_questions` questions; missing ones are empty segments without labels. Gives `images`
        (3, height, width) uint8, `segments` and `labels` (num_questions, segment_length), the latter with the answer
        at the last token of the prompt, the end of the sequence at the answer, and -100 elsewhere."""
        tokenizer = self.processor.tokenizer
        segments = torch.full((self.num_questions, self.segment_length), tokenizer.pad_token_id)
        labels = torch.full_like(segments, -100)
        for row, (question, answer, _) in enumerate(asked.questions[: self.num_questions]):
            prompt = self._ids(self.processor.format_prompt(question))[self.shared :]
            answer_ids = self._ids(" " + answer)
            length = len(prompt)
            if len(answer_ids) != 1 or length >= self.segment_length:
                raise ValueError(
                    f"question '{question}' with answer '{answer}' does not fit: answers are one word, and a question "
                    f"with its answer takes {self.segment_length} tokens at most."
                )
            segments[row, : length + 1] = torch.tensor(prompt + answer_ids)
            labels[row, length - 1] = answer_ids[0]
            labels[row, length] = tokenizer.eos_token_id
        pixels = torch.from_numpy(np.array(asked.image.convert("RGB"))).permute(2, 0, 1)
        return {"images": pixels, "segments": segments, "labels": labels}


@dataclass
class TierLayout:
    """
    All that packed sequences of square images have in common at a tier: L tokens, P of them the shared prefix.

    Args:
        tiling (`tuple[int, int]`): Rows and columns of crops.
        prefix_ids (`torch.Tensor` of shape `(1, P)`): Tokens of the prefix.
        image_input_idx (`torch.Tensor` of shape `(1, V, T)`): Position of each pooled patch.
        position_ids (`torch.Tensor` of shape `(1, L)`): Positions, which restart with each question.
        attention_mask (`torch.Tensor` of shape `(1, 1, L, L)`): True where a token attends to another.
    """

    tiling: tuple[int, int]
    prefix_ids: torch.Tensor
    image_input_idx: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor

    @classmethod
    def of(cls, packer: Packer, tier: str, device: torch.device) -> "TierLayout":
        """The layout of a tier, read off the processor's output for an empty question about a square image."""
        side = packer.processor.image_processor.base_image_input_size[0]
        inputs = packer.processor(Image.new("RGB", (side, side)), "", tier=tier)
        prefix = inputs["input_ids"][:, : -packer.unshared]
        length = prefix.shape[1]
        segment = torch.arange(packer.num_questions).repeat_interleave(packer.segment_length)
        owner = torch.cat([torch.full((length,), -1), segment])  # -1: belongs to all questions
        order = torch.arange(len(owner))
        visible = (order[:, None] >= order) & ((owner == -1) | (owner[:, None] == owner))
        positions = torch.where(owner == -1, order, length + (order - length) % packer.segment_length)
        return cls(
            tiling=packer.processor.image_processor.choose_tiling(side, side, tier=tier),
            prefix_ids=prefix.to(device),
            image_input_idx=inputs["image_input_idx"].to(device),
            position_ids=positions[None].to(device),
            attention_mask=visible[None, None].to(device),
        )


def cut_views(images: torch.Tensor, tiling: tuple[int, int], config: MolmoConfig) -> torch.Tensor:
    """What [`MolmoImageProcessor`] does to square images, for a batch on the training device: pixels
    `(B, 3, side, side)`, 0–255, to `(B, V, P, 3·patch²)`. The tiling has as many rows as columns."""
    view, patch = config.vision_config.image_size, config.vision_config.patch_size
    margin = sum(config.overlap_margins) * patch
    mean, std = (
        torch.tensor(value, device=images.device).view(3, 1, 1) for value in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
    )

    def resize(side: int) -> torch.Tensor:
        resized = F.interpolate(images.float() / 255, (side, side), mode="bilinear", antialias=True)
        return (resized.clamp(0, 1) - mean) / std

    canvas = resize(tiling[0] * (view - margin) + margin)
    crops = canvas.unfold(2, view, view - margin).unfold(3, view, view - margin)  # (B, 3, rows, columns, view, view)
    views = torch.cat([resize(view)[:, None], crops.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)], dim=1)
    patches = views.unflatten(4, (-1, patch)).unflatten(3, (-1, patch))  # (B, V, 3, grid, patch, grid, patch)
    return patches.permute(0, 1, 3, 5, 4, 6, 2).flatten(4).flatten(2, 3)


def segment_logits(
    model: MolmoForConditionalGeneration, layout: TierLayout, segments: torch.Tensor, **inputs: Any
) -> torch.Tensor:
    """Logits of the questions' tokens, `(B, questions, segment length, vocabulary)`, of segments
    `(B, questions, segment length)`. `inputs` are `pixel_values` or `image_features`, and knobs, for the model."""
    batch_size = len(segments)
    logits = model(
        input_ids=torch.cat([layout.prefix_ids.expand(batch_size, -1), segments.flatten(1)], dim=1),
        image_input_idx=layout.image_input_idx.expand(batch_size, -1, -1),
        position_ids=layout.position_ids,
        attention_mask=layout.attention_mask,
        logits_to_keep=segments[0].numel(),
        use_cache=False,
        **inputs,
    ).logits
    return logits.unflatten(1, segments.shape[1:])
