"""What a data set holds, in numbers: before a run trains on it."""

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from datasets import Dataset, Image

from ..molmo.image_processing_molmo import oriented_size
from ..molmo.processing_molmo import MolmoProcessor
from .images import open_image


READ_BATCH_SIZE = 64
"""Rows whose encoded images are in memory at once."""

ENCODING_BATCH_SIZE = 1024
"""Questions that are tokenised at once."""


def summarize(values: Sequence[float]) -> dict[str, float]:
    """
    Least, median, mean, 95th percentile and largest of some numbers.

    Args:
        values (`Sequence[float]`):
            One or more numbers.
    """
    values = np.asarray(values)
    return {
        "min": values.min().item(),
        "median": float(np.median(values)),
        "mean": float(values.mean()),
        "p95": float(np.quantile(values, 0.95)),
        "max": values.max().item(),
    }


@dataclass(frozen=True)
class TierStatistics:
    """
    What the executor is given for the rows of a data set at one tier.

    Args:
        crops (`dict[str, float]`):
            [`summarize`] of the crops of an image, the global view apart.
        vision_tokens (`dict[str, float]`):
            [`summarize`] of the tokens that stand for an image.
        prompt_tokens (`dict[str, float]`):
            [`summarize`] of the tokens of a prompt, those of the image included.
        too_long (`list[str]`):
            Sample ids of the prompts that are longer than the executor takes.
    """

    crops: dict[str, float]
    vision_tokens: dict[str, float]
    prompt_tokens: dict[str, float]
    too_long: list[str]


@dataclass(frozen=True)
class DatasetStatistics:
    """
    Counts over the rows of a data set.

    Args:
        num_rows (`int`):
            Rows.
        num_images (`int`):
            Different images.
        image_sizes (`Counter[tuple[int, int]]`):
            Rows with an image of each width and height.
        answers (`Counter[str]`):
            Rows with each answer, a row's answer being its most frequent reference (the first of equally frequent ones).
        references (`dict[str, float]`):
            [`summarize`] of the number of references of a row.
        answer_words, question_words (`dict[str, float]`):
            [`summarize`] of the words of an answer and of a question.
        text_tokens (`dict[str, float]`):
            [`summarize`] of the tokens of a prompt, those of the image apart.
        question_types, metrics, styles (`Counter[str]`):
            Rows with each value of these columns.
        tiers (`dict[str, TierStatistics]`):
            What the executor is given at each tier.
    """

    num_rows: int
    num_images: int
    image_sizes: Counter[tuple[int, int]]
    answers: Counter[str]
    references: dict[str, float]
    answer_words: dict[str, float]
    question_words: dict[str, float]
    text_tokens: dict[str, float]
    question_types: Counter[str]
    metrics: Counter[str]
    styles: Counter[str]
    tiers: dict[str, TierStatistics]


def describe_dataset(
    dataset: Dataset, processor: MolmoProcessor, tier_crops: Mapping[str, Sequence[int]], max_prompt_tokens: int
) -> DatasetStatistics:
    """
    Counts what the rows of a data set hold, and what an executor will be given for them. Of images the headers are read,
    not the pixels.

    Args:
        dataset (`datasets.Dataset`):
            Columns as in `FEATURES`, one row or more.
        processor ([`MolmoProcessor`]):
            The executor's.
        tier_crops (`dict[str, tuple[int, int]]`):
            Crop range of each tier.
        max_prompt_tokens (`int`):
            Most tokens of a prompt that the executor takes.

    Raises:
        ValueError: If there are no rows.
    """
    if len(dataset) == 0:
        raise ValueError("the data set has no rows.")
    sizes, num_images = _read_image_sizes(dataset)
    text_tokens = _count_text_tokens(dataset, processor)
    sample_ids = dataset["sample_id"][:]
    tiers = {}
    for tier in tier_crops:
        # Most data sets have many rows of one size.
        tilings = {
            (width, height): processor.image_processor.choose_tiling(height, width, tier=tier, tier_crops=tier_crops)
            for width, height in set(sizes)
        }
        vision_tokens = {
            size: processor.image_processor.count_image_tokens(tiling) for size, tiling in tilings.items()
        }
        prompt_tokens = [vision_tokens[size] + text for size, text in zip(sizes, text_tokens, strict=True)]
        tiers[tier] = TierStatistics(
            crops=summarize([math.prod(tilings[size]) for size in sizes]),
            vision_tokens=summarize([vision_tokens[size] for size in sizes]),
            prompt_tokens=summarize(prompt_tokens),
            too_long=[
                sample_id
                for sample_id, length in zip(sample_ids, prompt_tokens, strict=True)
                if length > max_prompt_tokens
            ],
        )
    references = dataset["answers"][:]
    answers = Counter(Counter(row).most_common(1)[0][0] for row in references)
    return DatasetStatistics(
        num_rows=len(dataset),
        num_images=num_images,
        image_sizes=Counter(sizes),
        answers=answers,
        references=summarize([len(row) for row in references]),
        answer_words=summarize([len(answer.split()) for answer in answers.elements()]),
        question_words=summarize([len(question.split()) for question in dataset["question"]]),
        text_tokens=summarize(text_tokens),
        question_types=Counter(dataset["question_type"]),
        metrics=Counter(dataset["metric"]),
        styles=Counter(dataset["style"]),
        tiers=tiers,
    )


def _read_image_sizes(dataset: Dataset) -> tuple[list[tuple[int, int]], int]:
    """Width and height of each row's image as it is to be seen, and how many different images there are."""
    sizes, images = [], set()
    encoded = dataset.select_columns("image").cast_column("image", Image(decode=False))
    for batch in encoded.iter(READ_BATCH_SIZE):
        for image in batch["image"]:
            images.add(image["path"] if image["bytes"] is None else hashlib.sha1(image["bytes"]).digest())
            with open_image(image) as opened:
                sizes.append(oriented_size(opened))
    return sizes, len(images)


def _count_text_tokens(dataset: Dataset, processor: MolmoProcessor) -> list[int]:
    """Tokens of each row's prompt without the image's: the beginning of the sequence, the question in its style."""
    lengths = []
    for batch in dataset.select_columns(["question", "style"]).iter(ENCODING_BATCH_SIZE):
        prompts = [processor.format_prompt(*row) for row in zip(batch["question"], batch["style"], strict=True)]
        lengths += [1 + len(ids) for ids in processor.tokenizer(prompts, add_special_tokens=False)["input_ids"]]
    return lengths
