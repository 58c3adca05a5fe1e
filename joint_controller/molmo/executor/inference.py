"""
How a Molmo computes the stages of a request: encoding views, prefill, decode.

An [`Inference`] is one way to do it, and all of them give the same answers; [`PlainInference`], which runs the model's
modules as transformers does, is the one that the others are tested against.
"""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

import torch
from torch.nn import functional as F
from transformers import DynamicCache

from .. import MolmoForConditionalGeneration


if TYPE_CHECKING:
    from .captured import GraphPool


class Decoding(Protocol):
    """
    A batch of answers that are being decoded greedily.

    Attributes:
        logits (`torch.Tensor` of shape `(B, vocab_size)`):
            Scores of the next token of each answer.
        tokens (`torch.LongTensor` of shape `(B,)`):
            The next token of each answer: the argmax of `logits`.
    """

    logits: torch.Tensor
    tokens: torch.Tensor

    def step(self) -> None:
        """Appends `tokens` to the answers and computes the next ones."""

    def keep(self, rows: Sequence[int]) -> None:
        """Goes on with these rows of the batch only, in this order."""


class Inference(Protocol):
    """
    One way to compute the stages of a request. By default nothing is padded, mixed, shared or kept.

    Attributes:
        prefill_lengths (`Sequence[int]` or `None`):
            Lengths, ascending, that the prompt of a single request is padded to; `None` where it is not padded.
        mixes_settings (`bool`):
            Whether each row of a batch may have a `top_k` and `active_blocks` of its own.
        prefers_same_settings (`bool`):
            Whether prompts of the same blocks and experts are faster in a batch than prompts of the same length.
        shares_passes (`bool`):
            Whether several images are faster together ([`~Inference.features_of_images`]) than each by itself.
        graphs ([`GraphPool`] or `None`):
            Graphs that are kept for requests; `None` where nothing is captured.
    """

    prefill_lengths: Sequence[int] | None = None
    mixes_settings: bool = False
    prefers_same_settings: bool = False
    shares_passes: bool = False
    graphs: "GraphPool | None" = None

    def image_features(self, pixel_values: torch.Tensor, image_masks: torch.Tensor) -> torch.Tensor:
        """Features `(V, T, hidden)` of the views of one image: patches `pixel_values` `(1, V, P, 3·patch²)`, and
        `image_masks` `(1, V, P)`, the share of each patch that is not padding, on any device and in any precision."""

    def features_of_images(self, images: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
        """Features of several images, whose pixels and masks are as [`~Inference.image_features`] takes them."""
        return [self.image_features(*image) for image in images]

    def prepare(self, num_views: int, length: int, num_blocks: int) -> None:
        """Does beforehand what a request of these views, prompt tokens and blocks needs but once: here, nothing."""

    def prefill(
        self,
        prompts: Mapping[str, torch.Tensor],
        top_k: int | Sequence[int],
        active_blocks: Sequence[int] | Sequence[Sequence[int]],
    ) -> Decoding:
        """Runs a batch of prompts, as [`~executor.decoding.collate_prompts`] gives them, and gives the first token of
        each answer. `top_k` and `active_blocks` (ascending) are those of all rows, or where the mode mixes settings,
        of each."""


class PlainInference(Inference):
    """Runs the model's modules as they are."""

    def __init__(self, model: MolmoForConditionalGeneration):
        self.model = model

    def image_features(self, pixel_values: torch.Tensor, image_masks: torch.Tensor) -> torch.Tensor:
        place = {"device": self.model.device, "dtype": self.model.dtype}
        return self.model.get_image_features(pixel_values.to(**place), image_masks.to(**place))[0]

    def prefill(
        self, prompts: Mapping[str, torch.Tensor], top_k: int, active_blocks: Sequence[int]
    ) -> "PlainDecoding":
        return PlainDecoding(self.model, prompts, top_k, active_blocks)


class PlainDecoding:
    """A [`Decoding`] by the model's modules. Arguments are those of [`Inference.prefill`]."""

    def __init__(
        self,
        model: MolmoForConditionalGeneration,
        prompts: Mapping[str, torch.Tensor],
        top_k: int,
        active_blocks: Sequence[int],
    ):
        self.model = model
        self._knobs = {"top_k": top_k, "active_blocks": active_blocks}
        self._attention_mask = prompts["attention_mask"]
        self._cache = DynamicCache()
        self._forward({name: value for name, value in prompts.items() if name != "attention_mask"})

    def _forward(self, inputs: Mapping[str, torch.Tensor]) -> None:
        outputs = self.model(
            **inputs, **self._knobs, attention_mask=self._attention_mask, cache=self._cache, logits_to_keep=1
        )
        self.logits = outputs.logits[:, -1]
        self.tokens = self.logits.argmax(dim=-1)

    def step(self) -> None:
        self._attention_mask = F.pad(self._attention_mask, (0, 1), value=1)
        self._forward({"input_ids": self.tokens[:, None]})

    def keep(self, rows: Sequence[int]) -> None:
        kept = torch.tensor(rows, device=self.tokens.device)
        self._cache.batch_select_indices(kept)
        self._attention_mask = self._attention_mask[kept]
        self.logits, self.tokens = self.logits[kept], self.tokens[kept]


MODES = ("plain", "onednn", "captured")
"""
Ways to compute a Molmo, by name: `"plain"` runs its modules, anywhere; `"onednn"` is [`CpuInference`], on a CPU in float32;
`"captured"` is [`~molmo.executor.captured.CapturedInference`], on a CUDA device, with Triton.
"""


def load_inference(model: MolmoForConditionalGeneration, mode: str | None = None) -> tuple[str, Inference]:
    """
    Prepares a model, whose weights must not change afterwards, to be computed in a mode: one of `MODES`, by default
    `"captured"` on a CUDA device, where Triton is installed and the model is a MolmoE, `"onednn"` on a CPU in float32,
    where torch has oneDNN, else `"plain"`. Gives the mode, and the model in that mode.

    Raises:
        ValueError: If there is no such mode, or not for this model.
        ImportError: If the mode needs Triton, and it is not installed.
    """
    if mode not in (None, *MODES):
        raise ValueError(f"`mode` is '{mode}': choose one of {list(MODES)}.")
    # Imported here: they import this file, and the captured mode Triton, which CPU builds of torch come without.
    if mode == "captured" or (mode is None and model.device.type == "cuda" and find_spec("triton") is not None):
        from .captured import CapturedInference

        if mode == "captured" or CapturedInference.supports(model):
            return "captured", CapturedInference(model)
    from .cpu_inference import CpuInference

    if mode == "onednn" or (mode is None and CpuInference.supports(model)):
        return "onednn", CpuInference(model)
    return "plain", PlainInference(model)
