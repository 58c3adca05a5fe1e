"""
Several questions about one image in one sequence, as in Molmo's own training: BOS and image tokens first, then the
questions with their answers, each of which attends to the image and itself only. Positions restart behind the image, so
that every question sees exactly what it would see alone, and the image is encoded once for all of them.

Images of one size have sequences of one shape and one mask at a tier: a batch holds images of one size.
"""

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..modeling_molmo import MolmoForConditionalGeneration
from ..processing_molmo import MolmoProcessor
from ..view_cutting import ViewGeometry, cut_batch, view_masks


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
class PackedLayout:
    """
    All that packed sequences of images of one size have in common at a tier: L tokens, P of them the shared prefix.

    Args:
        geometry ([`ViewGeometry`]): How images are cut into views.
        tiling (`tuple[int, int]`): Rows and columns of crops.
        image_masks (`torch.Tensor` of shape `(1, V, patches)`): Share of each patch that is not padding.
        prefix_ids (`torch.Tensor` of shape `(1, P)`): Tokens of the prefix.
        image_input_idx (`torch.Tensor` of shape `(1, V, T)`): Position of each pooled patch.
        position_ids (`torch.Tensor` of shape `(1, L)`): Positions, which restart with each question.
        attention_mask (`torch.Tensor` of shape `(1, 1, L, L)`): True where a token attends to another.
    """

    geometry: ViewGeometry
    tiling: tuple[int, int]
    image_masks: torch.Tensor
    prefix_ids: torch.Tensor
    image_input_idx: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor

    @classmethod
    def of(cls, packer: Packer, image_size: tuple[int, int], tier: str, device: torch.device) -> "PackedLayout":
        """The layout of images of a width and height at a tier, read off the processor's output for an empty question."""
        width, height = image_size
        image_processor = packer.processor.image_processor
        geometry = image_processor.view_geometry
        tiling = image_processor.choose_tiling(height, width, tier=tier)
        inputs = packer.processor(Image.new("RGB", image_size), "", tier=tier)
        prefix = inputs["input_ids"][:, : -packer.unshared]
        length = prefix.shape[1]
        segment = torch.arange(packer.num_questions).repeat_interleave(packer.segment_length)
        owner = torch.cat([torch.full((length,), -1), segment])  # -1: belongs to all questions
        order = torch.arange(len(owner))
        visible = (order[:, None] >= order) & ((owner == -1) | (owner[:, None] == owner))
        positions = torch.where(owner == -1, order, length + (order - length) % packer.segment_length)
        return cls(
            geometry=geometry,
            tiling=tiling,
            image_masks=view_masks(geometry, (height, width), tiling)[None].to(device),
            prefix_ids=prefix.to(device),
            image_input_idx=inputs["image_input_idx"].to(device),
            position_ids=positions[None].to(device),
            attention_mask=visible[None, None].to(device),
        )

    def cut(self, images: torch.Tensor) -> torch.Tensor:
        """What [`MolmoImageProcessor`] makes of images `(B, 3, height, width)`, on their device: `(B, V, patches,
        3 · patch²)`."""
        return cut_batch(images, self.geometry, self.tiling)


def segment_logits(
    model: MolmoForConditionalGeneration, layout: PackedLayout, segments: torch.Tensor, **inputs: Any
) -> torch.Tensor:
    """Logits of the questions' tokens, `(B, questions, segment length, vocabulary)`, of segments
    `(B, questions, segment length)`. `inputs` are `pixel_values` or `image_features`, and knobs, for the model."""
    batch_size = len(segments)
    logits = model(
        input_ids=torch.cat([layout.prefix_ids.expand(batch_size, -1), segments.flatten(1)], dim=1),
        image_input_idx=layout.image_input_idx.expand(batch_size, -1, -1),
        image_masks=layout.image_masks.expand(batch_size, -1, -1),
        position_ids=layout.position_ids,
        attention_mask=layout.attention_mask,
        logits_to_keep=segments[0].numel(),
        use_cache=False,
        **inputs,
    ).logits
    return logits.unflatten(1, segments.shape[1:])
