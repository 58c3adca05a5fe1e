"""What is asked for by a caller, refused in one line before any work if it cannot be answered."""

import reprlib
import sys
from numbers import Real
from typing import Any

import numpy as np
import torch
from PIL import Image

from .images import convert_to_rgb


def checked_budget(latency_budget_ms: Any) -> float:
    """
    A budget as a number of milliseconds.

    Args:
        latency_budget_ms (`float`):
            A number, or an array or a tensor that holds a single one.

    Raises:
        ValueError: If it is not a finite number above 0.
    """
    number = latency_budget_ms
    if isinstance(number, np.generic | np.ndarray | torch.Tensor) and np.prod(number.shape) == 1:
        number = number.item()
    if not isinstance(number, Real) or isinstance(number, bool) or not 0 < number <= sys.float_info.max:
        shown = " ".join(reprlib.repr(latency_budget_ms).split())
        raise ValueError(f"`latency_budget_ms` is {shown}: give a finite number of milliseconds above 0.")
    return float(number)


def checked_question(question: Any) -> str:
    """A question; what is no text, blank, or not Unicode is a `ValueError`."""
    if not isinstance(question, str):
        raise ValueError(f"`question` is a {type(question).__name__}: give the text of a question.")
    if not question.strip():
        raise ValueError("`question` is empty: give the text of a question.")
    try:
        question.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"`question` is not Unicode ({error}): decode it with the encoding that it has.") from error
    return question


def checked_image(image: Any) -> Image.Image:
    """
    An image in memory, as [`~joint_controller.images.convert_to_rgb`] gives it, from one that may not have been read from its
    file yet.

    Args:
        image (`PIL.Image.Image`):
            The image.

    Raises:
        ValueError: If it is no PIL image, it is closed or empty, its file is damaged, or its pixels have no meaning in RGB.
    """
    if not isinstance(image, Image.Image):
        raise ValueError(f"`image` is a {type(image).__name__}: give a PIL image, e.g. `PIL.Image.open(path)`.")
    if min(image.size) < 1:
        raise ValueError(f"`image` is empty, it has {image.width}x{image.height} pixels: give one with pixels.")
    try:
        return convert_to_rgb(image)
    except ValueError as error:
        raise ValueError(f"`image` cannot be used: {error}.") from error
