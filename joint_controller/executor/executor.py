"""The interface of an executor: a frozen model that answers questions about images at knob settings."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from ..knobs import KnobSetting, KnobSpace
from .requests import ExecutorOutput, ExecutorRequest
from .stage_clock import StageClock


class FeatureSource(Protocol):
    """
    Gives what a controller sees of a request.

    Attributes:
        question_size (`int`):
            Width of question features.
        vision_size (`int`):
            Width of vision features.
    """

    question_size: int
    vision_size: int

    def question_features(self, questions: Sequence[str]) -> torch.Tensor:
        """
        Features of bare questions, which cost next to nothing: `(n, question_size)`, float32. Those of a question do not
        depend on the others.
        """

    def vision_features(self, requests: Sequence[ExecutorRequest]) -> torch.Tensor:
        """
        Pooled features of each request's image, encoded as its setting says: `(n, vision_size)`, float32. Of the settings,
        only the knobs that stage 1 decides are looked at. Images that are encoded here are found again by
        [`~Executor.run`].
        """


class InputCounter(Protocol):
    """
    Says how large the inputs of a request will be before anything is computed, without any weights.

    Attributes:
        knob_space ([`KnobSpace`]):
            Settings that it counts for.
        count_names (`tuple[str, ...]`):
            Names of the counts, e.g. `("num_views", "vision_tokens", "text_tokens")`. Those that end in `_tokens` add up to
            the length of the prompt.
        max_prompt_tokens (`int`):
            Longest prompt that the model takes, room for an answer left.
    """

    knob_space: KnobSpace
    count_names: tuple[str, ...]
    max_prompt_tokens: int

    def count_inputs(self, request: ExecutorRequest, settings: Sequence[KnobSetting]) -> dict[str, list[int]]:
        """
        Counts of a request at each of some settings. Its own setting is not looked at, nor are its image's pixels: the
        size is enough.

        Args:
            request ([`ExecutorRequest`]):
                The request.
            settings (`Sequence[KnobSetting]`):
                s settings.

        Returns:
            `dict[str, list[int]]`: s values of each count.

        Raises:
            ValueError: If the request's style is not one that the executor knows.
        """


class OpenRequest(FeatureSource, Protocol):
    """
    One request on its way through an executor, in order: what the controller's stage 1 sees, the image, what stage 2 sees,
    the answer. Each step marks its borders on the request's clock: what was not the executor's work since the border
    before is the controller's.
    """

    def count_inputs(self, request: ExecutorRequest, settings: Sequence[KnobSetting]) -> dict[str, list[int]]:
        """As [`InputCounter.count_inputs`], for this request."""

    def answer(self, setting: KnobSetting, decode_steps: int | None = None) -> ExecutorOutput:
        """
        Answers the request, whose image was encoded by [`~FeatureSource.vision_features`] (or is now).

        Args:
            setting ([`KnobSetting`]):
                The setting, with the knobs of stage 1 as the image was encoded.
            decode_steps (`int`, *optional*):
                Tokens to decode after the first, whatever the answer. By default, decoding ends with the answer.

        Raises:
            ValueError: If the setting is outside the knob space.
        """


class Executor(FeatureSource, InputCounter, Protocol):
    """
    A frozen model of some family that answers questions about images, each at its own knob setting.

    Attributes:
        model_type (`str`):
            Family, as in the `config.json` of its checkpoints.
        knob_space ([`KnobSpace`]):
            Values of the knobs. May be set: it is checked against the model.
        fingerprint (`str`):
            Stands for everything that an answer depends on but sample and setting.
        max_new_tokens (`int`):
            Most tokens of an answer, the end-of-sequence token included.
        shape (`Mapping[str, Any]`):
            Sizes of the model that its latency depends on; JSON-friendly.
        stage_names (`tuple[str, ...]`):
            Stages up to the first output token, in order, as its [`~executor.costs.CostModel`] has them; an [`OpenRequest`]
            marks each of them, and its decode steps.
        device (`torch.device`):
            Where it computes.
        dtype (`str`):
            Precision that it computes in, e.g. `"bfloat16"`.
        mode (`str`):
            How it computes, of the ways that its family has.
        prefill_lengths (`Sequence[int]` or `None`):
            Lengths, ascending, that the prompt of a single request is padded to; `None` where it is not padded.
    """

    model_type: str
    fingerprint: str
    max_new_tokens: int
    shape: Mapping[str, Any]
    stage_names: tuple[str, ...]
    device: torch.device
    dtype: str
    mode: str
    prefill_lengths: Sequence[int] | None

    def run(
        self,
        requests: Sequence[ExecutorRequest],
        on_batch: Callable[[list[ExecutorOutput]], None] | None = None,
        progress: bool = False,
    ) -> list[ExecutorOutput]:
        """
        Answers requests.

        Args:
            requests (`Sequence[ExecutorRequest]`):
                What to answer, at any settings of the knob space.
            on_batch (`Callable[[list[ExecutorOutput]], None]`, *optional*):
                Called with the outputs of each batch as soon as it is done.
            progress (`bool`, *optional*, defaults to `False`):
                Whether to show a progress bar (never where the output is not a terminal).

        Returns:
            `list[ExecutorOutput]`: One a request, in order.

        Raises:
            ValueError: If a setting is outside the knob space.
        """

    def open(self, request: ExecutorRequest, clock: StageClock) -> OpenRequest:
        """
        Begins to answer one request alone, in the calling thread. Nothing that was encoded before is used.

        Args:
            request ([`ExecutorRequest`]):
                The request. Its setting is not looked at.
            clock ([`StageClock`]):
                Takes the time of each stage.

        Raises:
            ValueError: If the executor does not know the style, or the question is empty.
        """

    def warm_up(self, progress: bool = False) -> None:
        """
        Does beforehand what the first requests would wait for, whatever their setting, image and question: code that is
        compiled, graphs that are captured, memory that is asked for.

        Args:
            progress (`bool`, *optional*, defaults to `False`):
                Whether to show a progress bar (never where the output is not a terminal).
        """
