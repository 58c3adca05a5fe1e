"""
Answers visual questions with a frozen Molmo, each at its own knob setting.

A request passes three stages. *Encode*: the image is cut into the crops of its tier, and tower and connector turn them
into features; these are kept, since the same image is asked for at many settings. *Prefill*: the prompts of one setting
run through the active blocks as a left-padded batch. *Decode*: greedily, until every answer has ended.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from ...executor.families import EMBEDDED, find_model_folder
from ...executor.requests import ExecutorOutput, ExecutorRequest
from ...executor.stage_clock import StageClock
from ...images import oriented_size
from ...knobs import KnobSetting, KnobSpace
from .. import MolmoConfig, MolmoForConditionalGeneration, MolmoProcessor
from ..blocks.block_selection import BlockSelection
from ..knob_space import check_knob_space, molmo_knob_space, tier_crops_of
from ..processing_molmo import PROMPT
from ..shape import molmo_shape
from .answering import answer_requests
from .dataset_blocks import DatasetBlocks, read_importance
from .decoding import collate_prompts, finish_answers
from .encoding import EncodedSample, ImageLayout, PreparedSample, SampleEncoder
from .fingerprint import digest_of, model_digest
from .inference import Decoding, load_inference
from .input_counter import COUNT_NAMES, count_inputs, counts_of
from .open_request import STAGE_NAMES, MolmoOpenRequest
from .warm_up import warm_up


class MolmoExecutor:
    """
    The [`Executor`] of a frozen Molmo.

    Args:
        model ([`MolmoForConditionalGeneration`]):
            The model, on its device and in its precision. It is frozen and put into evaluation mode.
        processor ([`MolmoProcessor`]):
            Its processor.
        knob_space ([`KnobSpace`], *optional*):
            Values of the knobs. Defaults to [`~molmo.knob_space.molmo_knob_space`] of the model's configuration.
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
            How the model is computed: one of `MODES` in `inference.py`, all of which give the same answers. Defaults to
            the fastest one for the model's device and precision.
        max_batch_tokens (`int`, *optional*):
            Most tokens of the prompts that go through the model together, which bounds the memory that they take. Defaults
            to 65,536 on a CUDA device (8 GiB of keys and values at MolmoE-1B's sizes), else to 16,384. Prompts
            or images that do not fit in a GPU's memory together all the same are done in two parts, with a warning.

    Attributes:
        encoder ([`SampleEncoder`]):
            Encodes images, and keeps them.
        inference ([`Inference`]):
            The model in the executor's mode.

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

    model_type = MolmoConfig.model_type
    count_names = COUNT_NAMES
    stage_names = STAGE_NAMES

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
        self.device = model.device
        self.dtype = str(model.dtype).removeprefix("torch.")
        self.shape = molmo_shape(model.config)
        text_config = model.config.text_config
        self.question_size = self.vision_size = text_config.hidden_size
        self.max_prompt_tokens: int = text_config.max_position_embeddings - max_new_tokens
        self.mode, self.inference = load_inference(self.model, mode)
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.max_batch_tokens = max_batch_tokens
        self._layouts: dict[tuple[int, int], ImageLayout] = {}  # a few dozen at most
        self.encoder = SampleEncoder(self.inference, self.prepare, model.device, num_workers, vision_cache_bytes)
        self._blocks = DatasetBlocks(importance, text_config.num_hidden_layers)
        self.knob_space = molmo_knob_space(model.config) if knob_space is None else knob_space

    @classmethod
    def from_pretrained(
        cls,
        model_path: str | Path = EMBEDDED,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        importance: Mapping[int, float] | str | Path | Mapping[str, str | Path] | None = None,
        **kwargs: Any,
    ) -> "MolmoExecutor":
        """
        Loads an executor.

        Args:
            model_path (`str` or `Path`, *optional*, defaults to `"embedded"`):
                A model folder, the name of a Hub repository (`org/name`), or `"embedded"` for the executor that ships
                with the package.
            device (`str` or `torch.device`, *optional*), dtype (`torch.dtype`, *optional*):
                Default to those of [`default_place`].
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
        folder = find_model_folder(model_path)
        device, dtype = default_place(device, dtype)
        num_layers = MolmoConfig.from_pretrained(folder).text_config.num_hidden_layers
        importance = read_importance(importance, folder, num_layers)
        model = MolmoForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(device)
        return cls(model, MolmoProcessor.from_pretrained(folder), importance=importance, **kwargs)

    # --- what it is -----------------------------------------------------------------------------------------------

    @property
    def prefill_lengths(self) -> Sequence[int] | None:
        """Lengths, ascending, that the prompt of a single request is padded to; `None` where it is not padded."""
        return self.inference.prefill_lengths

    @property
    def vision_cache_bytes(self) -> int:
        """Memory for encoded images. May be set."""
        return self.encoder.cache_bytes

    @vision_cache_bytes.setter
    def vision_cache_bytes(self, vision_cache_bytes: int):
        self.encoder.cache_bytes = vision_cache_bytes

    @property
    def knob_space(self) -> KnobSpace:
        """Values of the knobs. May be set: it is checked against the model, and encoded images are dropped."""
        return self._knob_space

    @knob_space.setter
    def knob_space(self, knob_space: KnobSpace):
        check_knob_space(knob_space, self.model.config)
        self._blocks.check_counts(knob_space["num_blocks"].values)
        self._knob_space = knob_space
        self.forget_images()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that an outcome depends on but sample and setting: weights, configuration, choice of the
        blocks, crops of the tiers, processor, `max_new_tokens` and precision."""
        return digest_of({**self._digest_parts(), "active_blocks": self._blocks.all_blocks()})

    @property
    def model_fingerprint(self) -> str:
        """SHA-256 of everything that an answer depends on but sample, setting and blocks: [`~MolmoExecutor.fingerprint`]
        without the choice of the blocks."""
        return digest_of(self._digest_parts())

    def _digest_parts(self) -> dict[str, Any]:
        return {
            "model": self._model_digest,
            "tier_crops": tier_crops_of(self.knob_space),
            "image_processor": self.processor.image_processor.to_dict(),
            "tokenizer": self.processor.tokenizer.backend_tokenizer.to_str(),
            "prompt": PROMPT,
            "max_new_tokens": self.max_new_tokens,
        }

    @cached_property
    def _model_digest(self) -> str:
        return model_digest(self.model)

    def active_blocks(self, num_blocks: int, sample_id: str | None = None) -> list[int]:
        """As [`DatasetBlocks.active_blocks`]."""
        return self._blocks.active_blocks(num_blocks, sample_id)

    # --- what it sees ---------------------------------------------------------------------------------------------

    def count_inputs(self, request: ExecutorRequest, settings: Sequence[KnobSetting]) -> dict[str, list[int]]:
        """As [`InputCounter.count_inputs`]."""
        return count_inputs(self.processor, tier_crops_of(self.knob_space), request, settings)

    @torch.inference_mode()
    def question_features(self, questions: Sequence[str]) -> torch.Tensor:
        """As [`FeatureSource.question_features`]: the mean of the token embeddings of each question. A `ValueError`
        tells of an empty one."""
        return torch.stack(
            [
                self.question_feature(self.processor.question_ids(question), row)
                for row, question in enumerate(questions)
            ]
        )

    @torch.inference_mode()
    def question_feature(self, ids: list[int], row: int = 0) -> torch.Tensor:
        """As [`~MolmoExecutor.question_features`], `(question_size,)`, of a question whose tokens are known."""
        if not ids:
            raise ValueError(f"question {row} is empty: every sample needs a question.")
        return self.model.get_input_embeddings()(torch.tensor(ids).to(self.device)).float().mean(dim=0)

    @torch.inference_mode()
    def vision_features(self, requests: Sequence[ExecutorRequest]) -> torch.Tensor:
        """As [`FeatureSource.vision_features`]: the mean of the projected features of each image that enter the
        sequence."""
        features: dict[int, torch.Tensor] = {}
        for tier in dict.fromkeys(request.setting["tier"] for request in requests):
            positions = [place for place, request in enumerate(requests) if request.setting["tier"] == tier]
            encoded = self.encode([requests[position] for position in positions], tier)
            features.update(zip(positions, (one.vision_features for one in encoded), strict=True))
        return torch.stack([features[position] for position in range(len(requests))])

    @torch.inference_mode()
    def encode(self, samples: Sequence[ExecutorRequest], tier: str) -> list[EncodedSample]:
        """Encodes the images of samples at a tier, whatever their settings, each once as long as it is kept."""
        return self.encoder.encode(samples, tier)

    def apply_setting(
        self, request: ExecutorRequest, encoded: EncodedSample
    ) -> tuple[EncodedSample, int, tuple[int, ...]]:
        """Applies the knobs that stage 2 decides to a request whose image and question are encoded at its tier: gives
        what [`~MolmoExecutor.generate`] takes for it, that is prompt, experts per token, blocks that run."""
        setting = request.setting
        blocks = self.active_blocks(setting["num_blocks"], request.sample_id)
        return encoded, setting["top_k"], tuple(blocks)

    def forget_images(self) -> None:
        """Drops the encoded images that are kept for further requests about them."""
        self.encoder.forget()

    def prepare(
        self, sample: ExecutorRequest, image: Image.Image, tier: str, prompt_ids: list[int] | None = None
    ) -> PreparedSample:
        """Cuts a sample's image at a tier, on the GPU if the model is there. Its prompt is tokenized if it is not yet."""
        if prompt_ids is None:
            prompt_ids = self.processor.prompt_ids(sample.question, sample.style)
        size, image_processor = oriented_size(image), self.processor.image_processor
        tiling = image_processor.choose_tiling(*reversed(size), tier=tier, tier_crops=tier_crops_of(self.knob_space))
        views, masks = image_processor.cut(image, tiling, self.device)
        counts = counts_of(self.processor, size, tiling, len(prompt_ids))
        return PreparedSample(views[None], masks[None], self._layout(tiling), prompt_ids, counts)

    def _layout(self, tiling: tuple[int, int]) -> ImageLayout:
        if tiling not in self._layouts:
            ids = torch.tensor([self.processor.bos_token_id, *self.processor.image_layout_ids(tiling)])
            positions = self.processor.image_processor.image_input_idx(tiling).flatten()
            (places,) = (positions >= 0).nonzero(as_tuple=True)
            # The image's first token follows the beginning-of-sequence token.
            parts = (ids, places, 1 + positions[places])
            self._layouts[tiling] = ImageLayout(tiling, *(part.to(self.device) for part in parts))
        return self._layouts[tiling]

    # --- what it answers ------------------------------------------------------------------------------------------

    @torch.inference_mode()  # entered by each thread for itself
    def start(
        self,
        encoded: Sequence[EncodedSample],
        top_k: int | Sequence[int],
        active_blocks: Sequence[int] | Sequence[Sequence[int]],
    ) -> Decoding:
        """Runs a batch of prompts up to the first token of each answer. Arguments are those of
        [`~MolmoExecutor.generate`]."""
        prompts = collate_prompts(encoded, self.processor.tokenizer.pad_token_id)
        return self.inference.prefill(prompts, top_k, active_blocks)

    @torch.inference_mode()  # entered by each thread for itself
    def generate(
        self,
        encoded: Sequence[EncodedSample],
        top_k: int | Sequence[int],
        active_blocks: Sequence[int] | Sequence[Sequence[int]],
    ) -> list[list[int]]:
        """Decodes the answers to a batch of prompts greedily: gives the tokens of each answer, up to and with the
        end-of-sequence token, or `max_new_tokens`. The experts per token and the blocks that run, ascending, are those
        of all prompts, or where the mode mixes settings, of each."""
        decoding = self.start(encoded, top_k, active_blocks)
        return finish_answers(decoding, self.processor.tokenizer.eos_token_id, self.max_new_tokens)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of an answer's tokens."""
        return self.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()

    def run(
        self,
        requests: Sequence[ExecutorRequest],
        on_batch: Callable[[list[ExecutorOutput]], None] | None = None,
        progress: bool = False,
    ) -> list[ExecutorOutput]:
        """As [`Executor.run`], in batches: of any settings, or, in the mode `"plain"`, of one setting each. An answer
        does not depend on the other requests (in float32; bfloat16 kernels round differently for different batch
        shapes, so that a near tie may fall either way)."""
        for request in requests:
            self.check_setting(request)
        outputs: dict[int, ExecutorOutput] = {}
        with tqdm(total=len(requests), desc="Answering", unit="request", disable=None if progress else True) as bar:
            for batch in answer_requests(self, requests):
                outputs.update(batch)
                bar.update(len(batch))
                if on_batch is not None:
                    on_batch(list(batch.values()))
        return [outputs[position] for position in range(len(requests))]

    def open(self, request: ExecutorRequest, clock: StageClock) -> MolmoOpenRequest:
        """As [`Executor.open`]."""
        return MolmoOpenRequest(self, request, clock)

    def warm_up(self, progress: bool = False) -> None:
        """As [`Executor.warm_up`]."""
        warm_up(self, progress)

    def check_setting(self, request: ExecutorRequest) -> None:
        """Refuses (`ValueError`) a request at a setting outside the knob space."""
        if request.setting not in self.knob_space:
            raise ValueError(
                f"sample '{request.sample_id}' asks for the setting '{request.setting}', which is outside the knob space "
                f"({self.knob_space})."
            )


def default_place(device: str | torch.device | None, dtype: torch.dtype | None) -> tuple[torch.device, torch.dtype]:
    """The device asked for, else `"cuda"` where there is one, else `"cpu"`; and its precision: if none is asked for,
    bfloat16 on a CUDA device, float32 on a CPU."""
    device = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return device, dtype
