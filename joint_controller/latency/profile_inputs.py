"""Inputs to profile any checkpoint with, made here: images of many shapes, questions of many lengths."""

import math

import numpy as np
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage


IMAGE_SIDES = (64, 1280)
"""Shortest and longest longer side of an image, in pixels."""
ASPECT_RATIO = 3.0
"""Largest ratio of an image's sides."""
QUESTION_WORDS = (3, 96)
"""Fewest and most words of a question."""

_WORDS = "what color is the object left of a small red circle and how many are there in this image".split()


def make_profile_inputs(num_inputs: int, seed: int = 42) -> Dataset:
    """
    Images and questions that mean nothing: a request costs what its shape, its length and its setting cost, whatever
    is asked. Sides, aspect ratios and numbers of words are spread evenly over their ranges (on a logarithmic scale),
    each in an order of its own, so that few inputs cover all three.

    Args:
        num_inputs (`int`):
            Inputs to make, 1 or more.
        seed (`int`, *optional*, defaults to 42):
            Seed of the orders and of the contents.

    Returns:
        [`~datasets.Dataset`]: columns `sample_id` (e.g. `"made/0003-640x427-12"`: number, width, height and words),
        `image`, `question`, `style`.
    """
    if num_inputs < 1:
        raise ValueError(f"`num_inputs` is {num_inputs}: give 1 or more.")
    generator = np.random.default_rng(seed)

    def spread(low: float, high: float) -> np.ndarray:
        steps = (np.arange(num_inputs) + 0.5) / num_inputs
        return np.exp(math.log(low) + steps[generator.permutation(num_inputs)] * math.log(high / low))

    sides, ratios, words = spread(*IMAGE_SIDES), spread(1 / ASPECT_RATIO, ASPECT_RATIO), spread(*QUESTION_WORDS)
    rows = []
    for number, (side, ratio, num_words) in enumerate(zip(sides, ratios, np.rint(words).astype(int), strict=True)):
        width, height = (round(side), round(side / ratio)) if ratio >= 1 else (round(side * ratio), round(side))
        question = " ".join(generator.choice(_WORDS, num_words)) + " ?"
        rows.append(
            {
                "sample_id": f"made/{number:04d}-{width}x{height}-{num_words}",
                "image": _make_image(width, height, generator),
                "question": question,
                "style": "vqa2",
            }
        )
    strings = dict.fromkeys(("sample_id", "question", "style"), Value("string"))
    return Dataset.from_list(rows, features=Features({**strings, "image": Image()}))


def _make_image(width: int, height: int, generator: np.random.Generator) -> PILImage.Image:
    """Soft patches of random colors."""
    patches = PILImage.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    return patches.resize((width, height), PILImage.Resampling.BICUBIC)
