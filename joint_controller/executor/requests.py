"""What an executor is asked, what it answers, and what it measures."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from operator import getitem
from typing import Any

from PIL import Image

from ..knobs import KnobSetting


@dataclass(frozen=True)
class ExecutorRequest:
    """
    A question about an image, and the setting to answer it at.

    Args:
        sample_id (`str`):
            Name of the sample. Encoded images are kept under it, so it must stand for one image and one question.
        image (`PIL.Image.Image` or `Callable[[], PIL.Image.Image]`):
            The image, or a function that gives it: called when the image is encoded, so that many requests can wait
            without their pixels.
        question (`str`):
            The bare question.
        style (`str`):
            How the question is put to the executor: one of the styles that it knows.
        setting ([`KnobSetting`]):
            Knob setting.
        image_id (`str`, *optional*):
            Names the image, where other requests may be about the same one.
    """

    sample_id: str
    image: Image.Image | Callable[[], Image.Image]
    question: str
    style: str
    setting: KnobSetting
    image_id: str | None = None

    @classmethod
    def of(cls, sample: Mapping[str, Any], setting: KnobSetting) -> "ExecutorRequest":
        """
        The request for a row of a data set.

        Args:
            sample (`dict`):
                Has `sample_id`, `image`, `question` and `style`. The image is not read before it is encoded.
            setting ([`KnobSetting`]):
                Knob setting.
        """
        return cls(
            sample["sample_id"],
            partial(getitem, sample, "image"),
            sample["question"],
            sample["style"],
            setting,
            getattr(sample, "image_id", None),
        )

    def at(self, setting: KnobSetting) -> "ExecutorRequest":
        """The same request at another setting."""
        return replace(self, setting=setting)

    def load_image(self) -> Image.Image:
        """The image."""
        return self.image() if callable(self.image) else self.image


@dataclass(frozen=True)
class ExecutorOutput:
    """
    The executor's answer to one request.

    Args:
        sample_id (`str`):
            Sample of the request.
        setting ([`KnobSetting`]):
            Setting of the request.
        answer (`str`):
            Decoded answer, without surrounding blanks.
        counts (`Mapping[str, int]`):
            How large its inputs were, by the executor's `count_names`.
        output_tokens (`int`):
            Tokens generated, the end-of-sequence token included.
    """

    sample_id: str
    setting: KnobSetting
    answer: str
    counts: Mapping[str, int]
    output_tokens: int


@dataclass(frozen=True)
class StageTimes:
    """
    What each stage of answering one request took, in milliseconds, and what it worked on.

    Args:
        stage_ms (`Mapping[str, float]`):
            Each stage but the decode steps: `"overhead"`, `"controller"` (where there was one), and those up to the first
            output token, by the executor's `stage_names`, in order.
        decode_ms (`list[float]`):
            Each further output token: `output_tokens - 1` values.
        counts (`Mapping[str, int]`):
            As in [`ExecutorOutput`].
        output_tokens (`int`):
            As in [`ExecutorOutput`].
    """

    stage_ms: Mapping[str, float]
    decode_ms: list[float]
    counts: Mapping[str, int]
    output_tokens: int

    @property
    def total_ms(self) -> float:
        """All of it."""
        return sum(self.stage_ms.values()) + sum(self.decode_ms)
