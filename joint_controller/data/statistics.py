"""What a data set holds, in numbers: before a run trains on it."""

import hashlib
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from datasets import Dataset, Image

from ..executor import ExecutorRequest, InputCounter
from ..images import oriented_size
from ..knobs import KnobSetting, KnobSpace
from .images import open_image


READ_BATCH_SIZE = 64
"""Rows whose encoded images are in memory at once."""


def summarize(values: Sequence[float]) -> dict[str, float]:
    """Least, median, mean, 95th percentile and largest of one or more numbers."""
    values = np.asarray(values)
    return {
        "min": values.min().item(),
        "median": float(np.median(values)),
        "mean": float(values.mean()),
        "p95": float(np.quantile(values, 0.95)),
        "max": values.max().item(),
    }


@dataclass(frozen=True)
class InputStatistics:
    """
    What the executor is given for the rows of a data set at one combination of values of the knobs that stage 1 decides:
    [`summarize`] of each of its counts and of the lengths of the prompts, and the ids of the samples with too long a prompt.
    """

    counts: dict[str, dict[str, float]]
    prompt_tokens: dict[str, float]
    too_long: list[str]


@dataclass(frozen=True)
class DatasetStatistics:
    """Counts over the rows of a data set; where these are `dict[str, float]`, as [`summarize`] gives them."""

    num_rows: int
    num_images: int  # different ones
    image_sizes: Counter[tuple[int, int]]  # rows with an image of each width and height
    answers: Counter[str]  # rows by their most frequent reference (the first of equally frequent ones)
    references: dict[str, float]
    answer_words: dict[str, float]
    question_words: dict[str, float]
    question_types: Counter[str]
    metrics: Counter[str]
    styles: Counter[str]
    inputs: dict[str, InputStatistics]  # by combination of stage 1's knobs, e.g. "tier=low"


def describe_dataset(dataset: Dataset, counter: InputCounter) -> DatasetStatistics:
    """
    Counts what the rows of a data set (columns as in `FEATURES`) hold, and what the executor of the counter will be given
    for them. Refuses a data set without rows, and a style that the executor does not know.
    """
    if len(dataset) == 0:
        raise ValueError("the data set has no rows.")
    settings = _settings_of_stage_1(counter.knob_space)
    sizes, images, counts = [], set(), []
    # What a request counts depends on the size of its image, the question and its style: many rows share all three.
    known: dict[tuple, dict[str, list[int]]] = {}
    columns = dataset.select_columns(["sample_id", "image", "question", "style"])
    for batch in columns.cast_column("image", Image(decode=False)).iter(READ_BATCH_SIZE):
        for sample_id, encoded, question, style in zip(*batch.values(), strict=True):
            images.add(encoded["path"] if encoded["bytes"] is None else hashlib.sha1(encoded["bytes"]).digest())
            with open_image(encoded) as image:
                sizes.append(oriented_size(image))
                key = (sizes[-1], question, style)
                if key not in known:
                    request = ExecutorRequest(sample_id, image, question, style, counter.knob_space.cheapest)
                    try:
                        known[key] = counter.count_inputs(request, list(settings.values()))
                    except ValueError as error:
                        raise ValueError(f"sample '{sample_id}': {error}") from error
            counts.append(known[key])
    references = dataset["answers"][:]
    answers = Counter(Counter(row).most_common(1)[0][0] for row in references)
    sample_ids = dataset["sample_id"][:]

    def describe_inputs(position: int) -> InputStatistics:
        values = {name: [row[name][position] for row in counts] for name in counter.count_names}
        token_counts = [values[name] for name in values if name.endswith("_tokens")]
        prompt_tokens = [sum(row) for row in zip(*token_counts, strict=True)]
        lengths = zip(sample_ids, prompt_tokens, strict=True)
        return InputStatistics(
            counts={name: summarize(values[name]) for name in values},
            prompt_tokens=summarize(prompt_tokens),
            too_long=[sample_id for sample_id, length in lengths if length > counter.max_prompt_tokens],
        )

    return DatasetStatistics(
        num_rows=len(dataset),
        num_images=len(images),
        image_sizes=Counter(sizes),
        answers=answers,
        references=summarize([len(row) for row in references]),
        answer_words=summarize([len(answer.split()) for answer in answers.elements()]),
        question_words=summarize([len(question.split()) for question in dataset["question"]]),
        question_types=Counter(dataset["question_type"]),
        metrics=Counter(dataset["metric"]),
        styles=Counter(dataset["style"]),
        inputs={name: describe_inputs(position) for position, name in enumerate(settings)},
    )


def _settings_of_stage_1(space: KnobSpace) -> dict[str, KnobSetting]:
    """Each combination of values of the knobs that stage 1 decides, with the others at their highest, by its name."""
    knobs = [space.knobs[position] for position in space.decided_by(1)]
    chosen = [
        dict(zip((knob.name for knob in knobs), values, strict=True))
        for values in itertools.product(*(knob.values for knob in knobs))
    ]
    return {str(KnobSetting(values)) or "any setting": KnobSetting({**space.full, **values}) for values in chosen}
