"""One request on its way through a Molmo, in the calling thread, each stage marked on the request's clock."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ...executor.costs import CONTROLLER, DECODE, OVERHEAD
from ...executor.requests import ExecutorOutput, ExecutorRequest
from ...executor.stage_clock import StageClock
from ...images import oriented_size
from ...knobs import KnobSetting
from ..knob_space import tier_crops_of
from .encoding import EncodedSample
from .input_counter import count_prompt


if TYPE_CHECKING:
    from .molmo_executor import MolmoExecutor


STAGE_NAMES = ("image_processing", "vision", "llm_prefill")
"""Stages up to the first output token: cutting the image; tower and connector; language model."""


class MolmoOpenRequest:
    """The [`~executor.OpenRequest`] of a Molmo, see [`Executor.open`]."""

    def __init__(self, executor: "MolmoExecutor", request: ExecutorRequest, clock: StageClock):
        self.executor = executor
        self.request = request
        self.question_size, self.vision_size = executor.question_size, executor.vision_size
        self._clock = clock
        self._image = request.load_image()
        self._prompt_ids, self._of_question = executor.processor.prompt_tokens(request.question, request.style)
        self._encoded: EncodedSample | None = None
        clock.mark(OVERHEAD)

    def count_inputs(self, request: ExecutorRequest, settings: Sequence[KnobSetting]) -> dict[str, list[int]]:
        """As [`OpenRequest.count_inputs`]."""
        executor, size = self.executor, oriented_size(self._image)
        tier_crops = tier_crops_of(executor.knob_space)
        return count_prompt(executor.processor, tier_crops, size, len(self._prompt_ids), settings)

    def question_features(self, questions: Sequence[str]) -> torch.Tensor:
        """As [`FeatureSource.question_features`]."""
        return self.executor.question_feature(self._prompt_ids[self._of_question])[None]

    @torch.inference_mode()
    def vision_features(self, requests: Sequence[ExecutorRequest]) -> torch.Tensor:
        """As [`FeatureSource.vision_features`]."""
        self._clock.mark(CONTROLLER)
        [request] = requests
        prepared = self.executor.prepare(request, self._image, request.setting["tier"], self._prompt_ids)
        self._clock.mark("image_processing")
        self._encoded = self.executor.encoder.encode_prepared(prepared)
        self._clock.mark("vision")
        return self._encoded.vision_features[None]

    @torch.inference_mode()
    def answer(self, setting: KnobSetting, decode_steps: int | None = None) -> ExecutorOutput:
        """As [`OpenRequest.answer`]."""
        executor, clock = self.executor, self._clock
        request = self.request.at(setting)
        executor.check_setting(request)
        if self._encoded is None:
            self.vision_features([request])
        clock.mark(CONTROLLER)
        encoded, top_k, blocks = executor.apply_setting(request, self._encoded)
        decoding = executor.start([encoded], top_k, blocks)
        tokens = [decoding.tokens.item()]
        clock.mark("llm_prefill")
        most = executor.max_new_tokens if decode_steps is None else 1 + decode_steps
        while len(tokens) < most and (
            decode_steps is not None or tokens[-1] != executor.processor.tokenizer.eos_token_id
        ):
            decoding.step()
            tokens.append(decoding.tokens.item())
            clock.mark(DECODE)
        answer = executor.decode(tokens)
        return ExecutorOutput(request.sample_id, setting, answer, encoded.counts, len(tokens))
