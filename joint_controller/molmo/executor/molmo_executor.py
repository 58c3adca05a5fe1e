"""
Answers visual questions with a frozen Molmo, each at its own knob setting.

A request passes three stages. *Encode*: the image is cut into the crops of its tier, and tower and connector turn them
into features; these are kept, since the same image is asked for at many settings. *Prefill*: the prompts of one setting
run through the active blocks as a left-padded batch. *Decode*: greedily, until every answer has ended.
"""

import hashlib
import json
import re
import statistics
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
import xxhash
from huggingface_hub import snapshot_download
from PIL import ExifTags, Image
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import BatchFeature

from ...controller import RequestController
from ...executor.requests import ExecutorOutput, ExecutorRequest, StageTimes
from ...executor.stage_clock import StageClock
from ...knobs import KnobSpace
from .. import MolmoConfig, MolmoForConditionalGeneration, MolmoProcessor
from ..blocks.block_selection import BlockSelection
from ..image_processing_molmo import DROPPED_POSITION
from ..processing_molmo import IMAGE_TOKENS
from .inference import Decoding, Inference, load_inference


EMBEDDED = "embedded"
"""Name that stands for the executor that ships with the package."""

IMPORTANCE_FILE = "importance.json"
"""Name of the importance scores in a model folder."""

DEFAULT_DATASET = "default"
"""Stands for all other data sets, and for requests that are of none, where blocks are chosen by data set."""


@dataclass(frozen=True)
class EncodedSample:
    """
    A prompt whose image has been encoded.

    Args:
        input_ids (`torch.LongTensor` of shape `(L,)`):
            Tokens of the prompt, without padding.
        image_features (`torch.Tensor` of shape `(N, hidden)`):
            Projected features that enter the sequence; those that overlap and are dropped are not kept.
        image_input_idx (`torch.LongTensor` of shape `(N,)`):
            Position of each feature in the prompt.
        num_views (`int`):
            As in [`ExecutorOutput`].
        vision_tokens (`int`):
            As in [`ExecutorOutput`].
    """

    input_ids: torch.LongTensor
    image_features: torch.Tensor
    image_input_idx: torch.LongTensor
    num_views: int
    vision_tokens: int

    @property
    def num_bytes(self) -> int:
        tensors = (self.input_ids, self.image_features, self.image_input_idx)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def embedded_executor_path() -> Path:
    """
    Folder of the executor that ships with the package.

    Raises:
        FileNotFoundError: If the installed package has no such folder.
    """
    path = Path(__file__).parents[2] / "assets" / "executor"
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"the embedded executor is missing from '{path}': install the package again, or train it with "
            "`joint-controller train-executor`."
        )
    return path


class MolmoExecutor:
    """
    A frozen Molmo that answers questions at knob settings.

    Args:
        model ([`MolmoForConditionalGeneration`]):
            The model, on its device and in its precision. It is frozen and put into evaluation mode.
        processor ([`MolmoProcessor`]):
            Its processor.
        knob_space ([`KnobSpace`], *optional*):
            Values of the knobs. Defaults to [`KnobSpace.from_executor_config`] of the model's configuration.
        importance (`dict[int, float]`, [`BlockSelection`] or `dict[str, BlockSelection]`, *optional*):
            Score of each block, higher for blocks that matter more, or the choice of blocks itself; or a choice for each
            data set, by the beginning of its sample ids (up to the first `/`: `"easy_vqa"` for
            `"easy_vqa/train/000012"`), `"default"` for all others. By default, blocks are dropped from the end.
        max_new_tokens (`int`, *optional*, defaults to 16):
            Most tokens of an answer, the end-of-sequence token included.
        batch_size (`int`, *optional*):
            Most prompts that go through the model together. Defaults to 64 on a CUDA device (one H200, MolmoE-1B's sizes,
            requests/s: 91 with 32, 103 with 64, 120 with 128), else to 16.
        num_workers (`int`, *optional*, defaults to 1):
            Batches that are answered at the same time, each by a thread of its own. On a CPU, two threads
            with a batch each beat two threads that share every small operation of one batch. A GPU takes one batch after
            the other, whatever the number.
        vision_cache_bytes (`int`, *optional*):
            Memory for encoded images on the model's device; the least recently used go first. Defaults to 2 GiB on a CUDA
            device (MolmoE-1B's features of 64 photographs at every tier are 0.5 GiB), else to 512 MiB.
        mode (`str`, *optional*):
            How the model is computed: one of `MODES` in `executor.inference`, all of which give the same answers.
            Defaults to the fastest one for the model's device and precision.
        max_batch_tokens (`int`, *optional*):
            Most tokens of the prompts that go through the model together, which bounds the memory that they take. Defaults
            to 65,536 on a CUDA device (8 GiB of keys and values at MolmoE-1B's sizes), else to 16,384. Prompts
            or images that do not fit in a GPU's memory together all the same are done in two parts, with a warning.

    Raises:
        ValueError: If the knob space is outside what the model has, the importance scores name a block that it does not
            have or cannot satisfy a value of `num_blocks`, or a number is not positive.

    Example:

    ```python
    >>> executor = MolmoExecutor.from_pretrained("embedded")
    >>> request = ExecutorRequest("example", image, "What color is the circle?", "vqa2", executor.knob_space.full)
    >>> executor.run([request])[0].answer
    'red'
    ```
    """

    def __init__(
        self,
        model: MolmoForConditionalGeneration,
        processor: MolmoProcessor,
        knob_space: KnobSpace | None = None,
        importance: Mapping[int, float] | BlockSelection | Mapping[str, BlockSelection] | None = None,
        max_new_tokens: int = 16,
        batch_size: int | None = None,
        num_workers: int = 1,
        vision_cache_bytes: int | None = None,
        mode: str | None = None,
        max_batch_tokens: int | None = None,
    ):
        is_cuda = model.device.type == "cuda"
        batch_size = (64 if is_cuda else 16) if batch_size is None else batch_size
        max_batch_tokens = (2**16 if is_cuda else 2**14) if max_batch_tokens is None else max_batch_tokens
        counts = {
            "max_new_tokens": max_new_tokens,
            "batch_size": batch_size,
            "num_workers": num_workers,
            "max_batch_tokens": max_batch_tokens,
        }
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"`{name}` is {value}: give 1 or more.")
        if vision_cache_bytes is None:
            vision_cache_bytes = 2**31 if is_cuda else 2**29
        if vision_cache_bytes < 0:
            raise ValueError(f"`vision_cache_bytes` is {vision_cache_bytes}: give 0 (keep nothing) or more.")
        if processor.tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end-of-sequence token, so no answer would end: set `eos_token`.")
        self.model = model.eval().requires_grad_(False)
        self.processor = processor
        self.mode, self._inference = load_inference(self.model, mode)
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.vision_cache_bytes = vision_cache_bytes
        self.max_batch_tokens = max_batch_tokens
        self._encoded: OrderedDict[tuple[str, str], EncodedSample] = OrderedDict()
        self._encoded_bytes = 0
        # Questions about one image share its features, as long as one of them is kept.
        self._features_of_image: WeakValueDictionary[str, torch.Tensor] = WeakValueDictionary()
        self._block_selections = _block_selections(importance, model.config.text_config.num_hidden_layers)
        self.knob_space = KnobSpace.from_executor_config(model.config) if knob_space is None else knob_space

    @classmethod
    def from_pretrained(
        cls,
        model_path: str | Path | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        importance: Mapping[int, float] | str | Path | Mapping[str, str | Path] | None = None,
        **kwargs,
    ) -> "MolmoExecutor":
        """
        Loads an executor.

        Args:
            model_path (`str` or `Path`, *optional*, defaults to `"embedded"`):
                A model folder, the name of a Hub repository (`org/name`), or `"embedded"` for the executor that ships
                with the package.
            device (`str` or `torch.device`, *optional*):
                Defaults to `"cuda"` where there is one, else `"cpu"`.
            dtype (`str` or `torch.dtype`, *optional*):
                Precision. Defaults to bfloat16 on a CUDA device, else float32.
            importance (`dict[int, float]`, `str`, `Path` or `dict[str, str | Path]`, *optional*):
                Scores of the blocks, or the JSON file that holds them (and perhaps searched sets of blocks), or a file for
                each data set, by the beginning of its sample ids, and `"default"` for all others. Defaults to
                `importance.json` in the model folder, if there is one.
            kwargs:
                Further arguments of [`MolmoExecutor`].

        Raises:
            FileNotFoundError: If the model or the importance file cannot be found.
            ValueError: If the checkpoint is incomplete, or an argument does not fit it.
        """
        folder = _model_folder(model_path)
        device = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
        if dtype is None:
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        if importance is None and (folder / IMPORTANCE_FILE).is_file():
            importance = folder / IMPORTANCE_FILE
        importance = _read_importance(importance, folder)
        model = MolmoForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(device)
        return cls(model, MolmoProcessor.from_pretrained(folder), importance=importance, **kwargs)

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.model.device

    @property
    def inference(self) -> Inference:
        """The model in the executor's mode."""
        return self._inference

    @property
    def hidden_size(self) -> int:
        """Width of the language model: of question features and of vision features."""
        return self.model.config.text_config.hidden_size

    @property
    def prefill_lengths(self) -> Sequence[int] | None:
        """Lengths, ascending, that the prompt of a single request is padded to; `None` where it is not padded."""
        return self._inference.prefill_lengths

    @property
    def knob_space(self) -> KnobSpace:
        """Values of the knobs. May be set: it is checked against the model, and encoded images are dropped."""
        return self._knob_space

    @knob_space.setter
    def knob_space(self, knob_space: KnobSpace):
        knob_space = KnobSpace.from_executor_config(self.model.config, **knob_space.to_dict())
        for selection in self._block_selections.values():
            unavailable = [count for count in knob_space.num_blocks if count not in selection.counts]
            if unavailable:
                required = selection.required_blocks
                raise ValueError(
                    f"the blocks {required} always run (block 0, and blocks without an importance score), so `num_blocks` "
                    f"cannot be {unavailable[0]}: score more blocks, or use values of {len(required)} or more."
                )
        self._knob_space = knob_space
        self.forget_images()

    def forget_images(self) -> None:
        """Drops the encoded images that are kept for further requests about them."""
        self._encoded.clear()
        self._encoded_bytes = 0
        self._features_of_image.clear()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that an outcome depends on but sample and setting: weights, configuration, choice of the
        blocks, crops of the tiers, processor, `max_new_tokens` and precision."""
        active_blocks = {
            dataset: [selection.active_blocks(n) for n in selection.counts]
            for dataset, selection in self._block_selections.items()
        }
        is_same_for_all = list(active_blocks) == [DEFAULT_DATASET]
        return self._digest_with(
            {"active_blocks": active_blocks[DEFAULT_DATASET] if is_same_for_all else active_blocks}
        )

    @property
    def model_fingerprint(self) -> str:
        """SHA-256 of everything that an answer depends on but sample, setting and blocks: [`~MolmoExecutor.fingerprint`]
        without the choice of the blocks."""
        return self._digest_with({})

    def _digest_with(self, more: Mapping[str, Any]) -> str:
        parts = {
            **more,
            "model": self._model_digest,
            "tier_crops": self.knob_space.to_dict()["tier_crops"],
            "image_processor": self.processor.image_processor.to_dict(),
            "tokenizer": self.processor.tokenizer.backend_tokenizer.to_str(),
            "prompt": self.processor.format_prompt("{question}", "{style}"),
            "max_new_tokens": self.max_new_tokens,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    @cached_property
    def _model_digest(self) -> str:
        config = _architecture(self.model.config.to_dict())
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def active_blocks(self, num_blocks: int, sample_id: str | None = None) -> list[int]:
        """
        Blocks that run when `num_blocks` do, ascending: see [`BlockSelection`].

        Args:
            num_blocks (`int`):
                How many.
            sample_id (`str`, *optional*):
                Sample that is answered. Only makes a difference where blocks are chosen by data set.

        Raises:
            ValueError: If the executor cannot run with that many blocks, or has no choice of blocks for the sample.
        """
        dataset = DEFAULT_DATASET if sample_id is None else sample_id.split("/")[0]
        selection = self._block_selections.get(dataset) or self._block_selections.get(DEFAULT_DATASET)
        if selection is None:
            raise ValueError(
                f"blocks are chosen for samples of {list(self._block_selections)}, and "
                f"{'none is named' if sample_id is None else repr(sample_id) + ' is of none of them'}: give importance "
                f"scores for '{DEFAULT_DATASET}', too."
            )
        return selection.active_blocks(num_blocks)

    @torch.inference_mode()
    def question_features(self, questions: Sequence[str]) -> torch.Tensor:
        """
        The mean of the token embeddings of each bare question.

        Args:
            questions (`Sequence[str]`):
                Questions.

        Returns:
            `torch.Tensor` of shape `(n, hidden)`, float32, on the executor's device.

        Raises:
            ValueError: If a question is empty.
        """
        features = []
        for row, question in enumerate(questions):
            ids = self.processor.tokenizer(question, add_special_tokens=False, return_tensors="pt")["input_ids"]
            if ids.numel() == 0:
                raise ValueError(f"question {row} is empty: every sample needs a question.")
            features.append(self.model.get_input_embeddings()(ids.to(self.device))[0].float().mean(dim=0))
        return torch.stack(features)

    @torch.inference_mode()
    def vision_features(self, samples: Sequence[ExecutorRequest], tier: str) -> torch.Tensor:
        """
        The mean of the projected features of each sample's image that enter the sequence.

        Args:
            samples (`Sequence[ExecutorRequest]`):
                Samples. Their settings are not looked at.
            tier (`str`):
                Tier to encode the images at.

        Returns:
            `torch.Tensor` of shape `(n, hidden)`, float32, on the executor's device.
        """
        return torch.stack([encoded.image_features.float().mean(dim=0) for encoded in self.encode(samples, tier)])

    @torch.inference_mode()
    def encode(self, samples: Sequence[ExecutorRequest], tier: str) -> list[EncodedSample]:
        """
        Encodes the images of samples at a tier, each once as long as it is kept.

        Args:
            samples (`Sequence[ExecutorRequest]`):
                Samples. Their settings are not looked at.
            tier (`str`):
                Tier to encode the images at.

        Returns:
            `list[EncodedSample]`: One a sample, in order.
        """
        # Held here as well: a call's images may be more than the cache keeps.
        found: dict[str, EncodedSample] = {}
        missing: dict[str, ExecutorRequest] = {}
        for sample in samples:
            key = (sample.sample_id, tier)
            if key in self._encoded:
                self._encoded.move_to_end(key)
                found[sample.sample_id] = self._encoded[key]
            else:
                missing.setdefault(sample.sample_id, sample)
        encode = self._encode_together if self.mode == "captured" else self._encode_each
        for sample, inputs, digest, features in encode(list(missing.values()), tier):
            self._features_of_image[digest] = features
            found[sample.sample_id] = self._encoded_sample(inputs, features)
            self._keep((sample.sample_id, tier), found[sample.sample_id])
        return [found[sample.sample_id] for sample in samples]

    def _encode_together(
        self, samples: Sequence[ExecutorRequest], tier: str
    ) -> Iterator[tuple[ExecutorRequest, BatchFeature, str, torch.Tensor]]:
        """Each sample with its inputs, its image's digest and features: several images in a pass of the tower."""
        # A few at a time, so that not all pixels are in memory at once.
        for group in _split(samples, max(8, 4 * self.num_workers)):
            images = [sample.load_image() for sample in group]
            inputs = [self._process(sample, image, tier) for sample, image in zip(group, images, strict=True)]
            digests = [f"{tier} {_digest(image)}" for image in images]
            features = {digest: self._features_of_image.get(digest) for digest in digests}
            unseen = {digest: one for digest, one in zip(digests, inputs, strict=True) if features[digest] is None}
            if len(unseen) == 1:
                features.update({digest: self._image_features(one) for digest, one in unseen.items()})
            elif unseen:
                found = self._do_or_split(self._features_of_images, list(unseen.values()), "images")
                features.update(zip(unseen, found, strict=True))
            for sample, one, digest in zip(group, inputs, digests, strict=True):
                yield sample, one, digest, features[digest]

    def _encode_each(
        self, samples: Sequence[ExecutorRequest], tier: str
    ) -> Iterator[tuple[ExecutorRequest, BatchFeature, str, torch.Tensor]]:
        """As `_encode_together`, but each image goes through the tower by itself, since the rounding of a batch may depend
        on its size, while the next ones are cut in this thread: the tokenizer cannot be used by two."""
        with ThreadPoolExecutor(self.num_workers) as pool:
            waiting: deque[tuple[ExecutorRequest, BatchFeature, str, Future | torch.Tensor]] = deque()

            def first_waiting() -> tuple[ExecutorRequest, BatchFeature, str, torch.Tensor]:
                sample, inputs, digest, features = waiting.popleft()
                return sample, inputs, digest, features.result() if isinstance(features, Future) else features

            for sample in samples:
                image = sample.load_image()
                inputs, digest = self._process(sample, image, tier), f"{tier} {_digest(image)}"
                features = self._features_of_image.get(digest)
                if features is None:
                    # Of an image that is being encoded for another question.
                    features = next((future for *_, other, future in waiting if other == digest), None)
                if features is None:
                    features = pool.submit(self._image_features, inputs)
                waiting.append((sample, inputs, digest, features))
                # No more than a few, so that not all pixels are in memory at once.
                if len(waiting) > 2 * self.num_workers:
                    yield first_waiting()
            while waiting:
                yield first_waiting()

    def _process(self, sample: ExecutorRequest, image: Image.Image, tier: str) -> BatchFeature:
        return self.processor(
            images=image,
            text=sample.question,
            style=sample.style,
            tier=tier,
            tier_crops=self.knob_space.tier_crops,
        )

    @torch.inference_mode()  # entered by each thread for itself
    def _image_features(self, inputs: BatchFeature) -> torch.Tensor:
        """Features of one image that enter the sequence: `(N, hidden)`."""
        return self._entering(inputs, self._inference.image_features(inputs["pixel_values"], inputs["image_masks"]))

    def _features_of_images(self, inputs: Sequence[BatchFeature]) -> list[torch.Tensor]:
        """As `_image_features`, for several images: their views share passes of the tower."""
        features = self._inference.features_of_images([(one["pixel_values"], one["image_masks"]) for one in inputs])
        return [self._entering(one, its_features) for one, its_features in zip(inputs, features, strict=True)]

    def _entering(self, inputs: BatchFeature, features: torch.Tensor) -> torch.Tensor:
        """Those of an image's features `(V, T, hidden)` that enter the sequence: `(N, hidden)`."""
        (enters,) = (inputs["image_input_idx"].flatten() >= 0).nonzero(as_tuple=True)
        return features.flatten(0, 1)[enters.to(self.device, non_blocking=True)]

    def _encoded_sample(self, inputs: BatchFeature, image_features: torch.Tensor) -> EncodedSample:
        input_ids = inputs["input_ids"][0]
        image_tokens = torch.tensor(self.processor.tokenizer.convert_tokens_to_ids(list(IMAGE_TOKENS)))
        positions = inputs["image_input_idx"].flatten()
        return EncodedSample(
            # Copies from ordinary memory are safe without waiting, and waiting would stop the tower's next image.
            input_ids=input_ids.to(self.device, non_blocking=True),
            image_features=image_features,
            image_input_idx=positions[positions >= 0].to(self.device, non_blocking=True),
            num_views=inputs["pixel_values"].shape[1],
            vision_tokens=int(torch.isin(input_ids, image_tokens).sum()),
        )

    def _keep(self, key: tuple[str, str], encoded: EncodedSample) -> None:
        self._encoded[key] = encoded
        self._encoded_bytes += encoded.num_bytes
        while self._encoded_bytes > self.vision_cache_bytes:
            _, oldest = self._encoded.popitem(last=False)
            self._encoded_bytes -= oldest.num_bytes

    @torch.inference_mode()  # entered by each thread for itself
    def start(
        self,
        encoded: Sequence[EncodedSample],
        top_k: int | Sequence[int],
        active_blocks: Sequence[int] | Sequence[Sequence[int]],
    ) -> Decoding:
        """
        Runs a batch of prompts up to the first token of each answer; [`~MolmoExecutor.generate`] goes on to their ends.

        Args are those of [`~MolmoExecutor.generate`].
        """
        return self._inference.prefill(self._collate(encoded), top_k, active_blocks)

    @torch.inference_mode()  # entered by each thread for itself
    def generate(
        self,
        encoded: Sequence[EncodedSample],
        top_k: int | Sequence[int],
        active_blocks: Sequence[int] | Sequence[Sequence[int]],
    ) -> list[list[int]]:
        """
        Decodes the answers to a batch of prompts greedily.

        Args:
            encoded (`Sequence[EncodedSample]`):
                Prompts, of any length.
            top_k (`int` or `Sequence[int]`):
                Experts per token. Where the mode mixes settings, each prompt may have its own.
            active_blocks (`Sequence[int]` or `Sequence[Sequence[int]]`):
                Blocks that run, ascending. Where the mode mixes settings, each prompt may have its own.

        Returns:
            `list[list[int]]`: Tokens of each answer, up to and with the end-of-sequence token, or `max_new_tokens`.
        """
        decoding = self.start(encoded, top_k, active_blocks)
        answers: list[list[int]] = [[] for _ in encoded]
        rows = list(range(len(encoded)))  # rows of the batch whose answers have not ended
        while True:
            unfinished = []
            for position, (row, token) in enumerate(zip(rows, decoding.tokens.tolist(), strict=True)):
                answers[row].append(token)
                if token != self.processor.tokenizer.eos_token_id and len(answers[row]) < self.max_new_tokens:
                    unfinished.append(position)
            if not unfinished:
                return answers
            if len(unfinished) < len(rows):
                decoding.keep(unfinished)
                rows = [rows[position] for position in unfinished]
            decoding.step()

    def _collate(self, encoded: Sequence[EncodedSample]) -> dict[str, torch.Tensor]:
        """Inputs of the prefill: prompts padded on the left to length L, features to N a sample."""
        if len(encoded) == 1:  # nothing to pad: a request that is served alone does not wait for that
            [one] = encoded
            return {
                "input_ids": one.input_ids[None],
                "attention_mask": torch.ones_like(one.input_ids)[None],
                "image_features": one.image_features[None, None],
                "image_input_idx": one.image_input_idx[None, None],
            }
        input_ids = [one.input_ids for one in encoded]
        length = max(len(ids) for ids in input_ids)
        attention_mask = pad_sequence([torch.ones_like(ids) for ids in input_ids], True, 0, padding_side="left")
        positions = [one.image_input_idx + length - len(one.input_ids) for one in encoded]
        return {
            "input_ids": pad_sequence(
                input_ids, True, self.processor.tokenizer.pad_token_id, padding_side="left"
            ),  # (B, L)
            "attention_mask": attention_mask,  # (B, L)
            "image_features": pad_sequence([one.image_features for one in encoded], True)[
                :, None
            ],  # (B, 1, N, hidden)
            "image_input_idx": pad_sequence(positions, True, DROPPED_POSITION)[:, None],  # (B, 1, N)
        }

    def run(
        self,
        requests: Sequence[ExecutorRequest],
        on_batch: Callable[[list[ExecutorOutput]], None] | None = None,
        progress: bool = False,
    ) -> list[ExecutorOutput]:
        """
        Answers requests in batches: of any settings, or, in the mode `"plain"`, of one setting each. An answer does not
        depend on the other requests (in float32; bfloat16 kernels round differently for different batch shapes, so that a
        near tie may fall either way).

        Args:
            requests (`Sequence[ExecutorRequest]`):
                What to answer.
            on_batch (`Callable[[list[ExecutorOutput]], None]`, *optional*):
                Called with the outputs of each batch as soon as it is done.
            progress (`bool`, *optional*, defaults to `False`):
                Whether to show a progress bar (never where the output is not a terminal).

        Returns:
            `list[ExecutorOutput]`: One a request, in order.

        Raises:
            ValueError: If a setting is outside the knob space.
        """
        by_tier: dict[str, dict[str, list[int]]] = {}
        for position, request in enumerate(requests):
            if request.setting not in self.knob_space:
                raise ValueError(
                    f"sample '{request.sample_id}' asks for the setting '{request.setting}', which is outside the knob "
                    f"space {self.knob_space.to_dict()}."
                )
            by_tier.setdefault(request.setting.tier, {}).setdefault(request.sample_id, []).append(position)

        outputs: dict[int, ExecutorOutput] = {}
        with tqdm(total=len(requests), desc="Answering", unit="request", disable=None if progress else True) as bar:
            for window in self._windows(by_tier):
                for batch in self._answer_window(requests, window):
                    outputs.update(batch)
                    bar.update(len(batch))
                    if on_batch is not None:
                        on_batch(list(batch.values()))
        return [outputs[position] for position in range(len(requests))]

    def _windows(self, by_tier: Mapping[str, Mapping[str, list[int]]]) -> Iterator[dict[str, list[int]]]:
        """
        Positions by tier and sample, in parts: as many images as fit in the cache are answered at all their settings
        before the next are encoded.
        """
        config = self.model.config
        # Work for all threads, in any case: two batches each, so that none waits long for another.
        at_least = self.batch_size if self.device.type == "cuda" else 2 * self.num_workers * self.batch_size
        window: dict[str, list[int]] = {}
        num_images = num_bytes = 0
        for tier, positions_of in by_tier.items():
            num_views = 1 + min(self.knob_space.tier_crops[tier][1], config.max_crops)
            image_bytes = num_views * config.tokens_per_view * self.hidden_size * self.model.dtype.itemsize
            for positions in positions_of.values():
                if num_images >= at_least and num_bytes + image_bytes > self.vision_cache_bytes:
                    yield window
                    window, num_images, num_bytes = {}, 0, 0
                window.setdefault(tier, []).extend(positions)
                num_images += 1
                num_bytes += image_bytes
        if window:
            yield window

    def _answer_window(
        self, requests: Sequence[ExecutorRequest], window: Mapping[str, list[int]]
    ) -> Iterator[dict[int, ExecutorOutput]]:
        """Answers the requests at a window's positions, which are listed by tier, and yields the outputs of each batch."""
        encoded: dict[int, EncodedSample] = {}
        for tier, positions in window.items():
            encoded.update(zip(positions, self.encode([requests[p] for p in positions], tier), strict=True))
        blocks = {p: tuple(self.active_blocks(requests[p].setting.num_blocks, requests[p].sample_id)) for p in encoded}
        # What shares a batch: prompts of similar length, or first of all those of the same blocks and experts.
        positions = sorted(
            encoded,
            key=lambda p: (
                (blocks[p], requests[p].setting.top_k) if self._inference.prefers_same_settings else (),
                len(encoded[p].input_ids),
            ),
        )

        def answer(batch: list[int]) -> list[list[int]]:
            prompts = [encoded[position] for position in batch]
            if self._inference.mixes_settings:
                top_k = [requests[position].setting.top_k for position in batch]
                return self.generate(prompts, top_k, [blocks[position] for position in batch])
            return self.generate(prompts, requests[batch[0]].setting.top_k, blocks[batch[0]])

        def outputs(batch: list[int], answers: list[list[int]]) -> dict[int, ExecutorOutput]:
            return {
                position: ExecutorOutput(
                    sample_id=requests[position].sample_id,
                    setting=requests[position].setting,
                    answer=self.decode(tokens),
                    num_views=encoded[position].num_views,
                    vision_tokens=encoded[position].vision_tokens,
                    text_tokens=len(encoded[position].input_ids) - encoded[position].vision_tokens,
                    output_tokens=len(tokens),
                )
                for position, tokens in zip(batch, answers, strict=True)
            }

        groups: dict[Hashable, list[int]] = {}
        for position in positions:
            knobs = None if self._inference.mixes_settings else (requests[position].setting, blocks[position])
            groups.setdefault(knobs, []).append(position)
        rounds: dict[int | None, list[list[int]]] = {}
        for knobs, members in groups.items():
            top_k = None if knobs is None else knobs[0].top_k
            rounds.setdefault(top_k, []).extend(self._batches(members, encoded))
        for top_k, batches in rounds.items():
            # The longest first, so that at the end no thread is left alone with one.
            batches.sort(key=lambda batch: -sum(len(blocks[p]) * len(encoded[p].input_ids) for p in batch))
            # The modules' routers keep their number of experts as an attribute, so threads work on one `top_k` at a time.
            with (
                self.model.model.language_model.experts_per_token(top_k),
                ThreadPoolExecutor(self.num_workers) as pool,
            ):
                work = map if self.num_workers == 1 else pool.map
                answers = work(lambda batch: self._do_or_split(answer, batch, "requests"), batches)
                for batch, its_answers in zip(batches, answers, strict=True):
                    yield outputs(batch, its_answers)

    def _batches(self, positions: Sequence[int], encoded: Mapping[int, EncodedSample]) -> list[list[int]]:
        """The positions in batches, in order, of at most `batch_size` prompts and `max_batch_tokens` tokens."""
        batches: list[list[int]] = []
        num_tokens = 0
        for position in positions:
            num_tokens += len(encoded[position].input_ids)
            if not batches or len(batches[-1]) == self.batch_size or num_tokens > self.max_batch_tokens:
                batches.append([])
                num_tokens = len(encoded[position].input_ids)
            batches[-1].append(position)
        return batches

    def _do_or_split(self, work: Callable[[list], list], batch: list, what: str) -> list:
        """What `work` gives for each member of a batch, in two parts if the batch does not fit in the device's memory."""
        try:
            return work(batch)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
        # Out of the handler, which holds on to the tensors of the attempt.
        torch.cuda.empty_cache()
        warnings.warn(
            f"a batch of {len(batch)} {what} did not fit in the memory of {self.device}: it is done in two parts. A smaller "
            "`batch_size`, `max_batch_tokens` or `vision_cache_bytes` saves the time of trying."
        )
        middle = len(batch) // 2
        return [*self._do_or_split(work, batch[:middle], what), *self._do_or_split(work, batch[middle:], what)]

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of an answer's tokens."""
        return self.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()

    @torch.inference_mode()
    def time_request(
        self,
        request: ExecutorRequest,
        repeats: int = 5,
        warmup: int = 2,
        decode_steps: int | None = None,
        controller: RequestController | None = None,
    ) -> StageTimes:
        """
        Times the stages of one request at batch 1 in one pass, image processing included. Nothing that was encoded before
        is used.

        Args:
            request (`ExecutorRequest`):
                The request.
            repeats (`int`, *optional*, defaults to 5):
                Runs that are measured; times are their medians.
            warmup (`int`, *optional*, defaults to 2):
                Runs before these that are not measured.
            decode_steps (`int`, *optional*):
                Tokens to decode after the first, whatever the answer. By default, decoding ends with the answer.
            controller ([`RequestController`], *optional*):
                A controller whose two stages are timed, too, each at its place in the request. The request is answered
                at its own setting, whatever the controller would choose.

        Raises:
            ValueError: If the setting is outside the knob space, or there is nothing to measure.
        """
        if request.setting not in self.knob_space:
            raise ValueError(f"setting '{request.setting}' is outside the knob space {self.knob_space.to_dict()}.")
        if repeats < 1 or warmup < 0:
            raise ValueError(f"`repeats` is {repeats} and `warmup` is {warmup}: give 1 or more and 0 or more.")
        # Reading the image's file is no part of the request, nor is what is still to be captured.
        request = replace(request, image=request.load_image())
        if self.mode == "captured":
            inputs = self._process(request, request.image, request.setting.tier)
            num_views, length = inputs["pixel_values"].shape[1], inputs["input_ids"].shape[1]
            self._inference.prepare(num_views, length, request.setting.num_blocks)
        runs = [self._time_once(request, decode_steps, controller) for _ in range(warmup + repeats)][warmup:]
        return replace(
            runs[0],
            controller_ms=None if controller is None else statistics.median(run.controller_ms for run in runs),
            image_processing_ms=statistics.median(run.image_processing_ms for run in runs),
            vision_ms=statistics.median(run.vision_ms for run in runs),
            llm_prefill_ms=statistics.median(run.llm_prefill_ms for run in runs),
            decode_ms=[statistics.median(step) for step in zip(*(run.decode_ms for run in runs), strict=True)],
        )

    def _time_once(
        self, request: ExecutorRequest, decode_steps: int | None, controller: RequestController | None
    ) -> StageTimes:
        clock = StageClock(self.device)
        clock.mark()
        if controller is not None:
            question = self.question_features([request.question])
            controller.choose_tier(question, controller.controller.config.latency_budget_max_ms)
        clock.mark()
        inputs = self._process(request, request.image, request.setting.tier)
        clock.mark()
        encoded = self._encoded_sample(inputs, self._image_features(inputs))
        clock.mark()
        if controller is not None:
            controller.choose_depth(encoded.image_features.float().mean(dim=0, keepdim=True))
        clock.mark()
        active_blocks = self.active_blocks(request.setting.num_blocks, request.sample_id)
        decoding = self.start([encoded], request.setting.top_k, active_blocks)
        clock.mark()
        for _ in range(self.max_new_tokens - 1 if decode_steps is None else decode_steps):
            if decode_steps is None and decoding.tokens.item() == self.processor.tokenizer.eos_token_id:
                break
            decoding.step()
            clock.mark()
        stage1_ms, image_processing_ms, vision_ms, stage2_ms, llm_prefill_ms, *decode_ms = clock.stages_ms()
        return StageTimes(
            controller_ms=None if controller is None else stage1_ms + stage2_ms,
            image_processing_ms=image_processing_ms,
            vision_ms=vision_ms,
            llm_prefill_ms=llm_prefill_ms,
            decode_ms=decode_ms,
            vision_tokens=encoded.vision_tokens,
            text_tokens=len(encoded.input_ids) - encoded.vision_tokens,
            output_tokens=1 + len(decode_ms),
            num_views=encoded.num_views,
        )


def _block_selections(
    importance: Mapping[int, float] | BlockSelection | Mapping[str, BlockSelection] | None, num_layers: int
) -> dict[str, BlockSelection]:
    """The choice of blocks for each data set."""
    if importance is None or isinstance(importance, BlockSelection):
        return {DEFAULT_DATASET: importance or BlockSelection(num_layers)}
    if importance and all(isinstance(selection, BlockSelection) for selection in importance.values()):
        return dict(importance)
    return {DEFAULT_DATASET: BlockSelection(num_layers, importance)}


def _read_importance(
    importance: Mapping[int, float] | str | Path | Mapping[str, str | Path] | None, folder: Path
) -> Mapping[int, float] | BlockSelection | Mapping[str, BlockSelection] | None:
    """Reads the files that importance scores of the model in `folder` are given as."""
    if importance is None:
        return None

    def read(path: str | Path) -> BlockSelection:
        return BlockSelection.from_file(path, MolmoConfig.from_pretrained(folder).text_config.num_hidden_layers)

    if isinstance(importance, str | Path):
        return read(importance)
    return {key: read(value) if isinstance(value, str | Path) else value for key, value in importance.items()}


def _architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    """
    The part of a configuration that an answer depends on: not the library's version, nor the folder's name, nor knob
    values that an executor may not use. The precision is that of the tensors.
    """
    ignored = ("_name_or_path", "architectures", "dtype", "knob_space", "transformers_version")
    return {
        key: _architecture(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in ignored
    }


def _digest(image: Image.Image) -> str:
    """Stands for an image: all that its pixels come from."""
    about = (
        image.mode,
        image.size,
        image.getpalette(),
        image.info.get("transparency"),
        image.getexif().get(ExifTags.Base.Orientation),
    )
    # Not SHA-256, which takes half a millisecond for 640x480 pixels, forty times as long.
    digest = xxhash.xxh3_128(repr(about).encode())
    digest.update(np.ascontiguousarray(image))
    return digest.hexdigest()


def _split(items: list, size: int) -> list[list]:
    """The items in lists of `size`, the last one perhaps shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def _model_folder(model_path: str | Path | None) -> Path:
    """The folder that `model_path` stands for; a Hub repository is fetched into the local cache."""
    if model_path is None or str(model_path) == EMBEDDED:
        return embedded_executor_path()
    folder = Path(model_path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"`model_path` '{model_path}' is a folder without a config.json: give the folder of a Molmo checkpoint."
            )
        return folder
    what_to_give = f"give a model folder, the name of a Hub repository (org/name), or '{EMBEDDED}'"
    if re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", str(model_path)) is None:
        raise FileNotFoundError(f"`model_path` '{model_path}' does not exist: {what_to_give}.")
    try:
        return Path(snapshot_download(str(model_path), allow_patterns=["*.json", "*.safetensors", "*.txt"]))
    except OSError as error:
        raise FileNotFoundError(
            f"`model_path` '{model_path}' is not a folder here, and the Hub did not give a repository of that name "
            f"({type(error).__name__}): {what_to_give}."
        ) from error
