"""Statistics of a data set: counts by hand, lengths against the processor's own output."""

import io
import math

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from joint_controller.data import FEATURES
from joint_controller.data.statistics import describe_dataset, summarize


TIER_CROPS = {"low": (1, 2), "high": (4, 9)}


def encode(image: Image.Image, **kwargs) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, **kwargs)
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    noise = np.random.default_rng(0).integers(0, 256, (40, 90, 3), dtype=np.uint8)
    wide = Image.fromarray(noise)
    turned = wide.getexif()
    turned[0x0112] = 6  # stored lying on its side: 90x40 is to be seen as 40x90
    path = tmp_path_factory.mktemp("images") / "square.png"
    Image.new("RGB", (64, 64), "red").save(path)
    rows = [
        (encode(wide, format="PNG"), "what color is the star ?", ["red", "blue", "blue"], "vqa2", "color"),
        (encode(wide, format="PNG"), "is the star red ?", ["no"], "vqa2", "yes_no"),
        (encode(wide, format="JPEG", exif=turned), "what is left of the star ?", ["blue"], "okvqa", "color"),
        ({"bytes": None, "path": str(path)}, "what shape ?", ["a red star", "star"], "vqa2", "shape"),
    ]
    return Dataset.from_list(
        [
            {
                "sample_id": f"sample{number}",
                "image": image,
                "question": question,
                "answers": answers,
                "style": style,
                "metric": "vqa_accuracy" if number < 3 else "anls",
                "question_type": question_type,
            }
            for number, (image, question, answers, style, question_type) in enumerate(rows)
        ],
        features=FEATURES,
    )


def test_counts_by_hand(dataset, tiny_processor):
    statistics = describe_dataset(dataset, tiny_processor, TIER_CROPS, max_prompt_tokens=100)
    assert (statistics.num_rows, statistics.num_images) == (4, 3)
    assert statistics.image_sizes == {(90, 40): 2, (40, 90): 1, (64, 64): 1}
    assert statistics.answers == {"blue": 2, "no": 1, "a red star": 1}
    assert statistics.references == {"min": 1, "median": 1.5, "mean": 1.75, "p95": pytest.approx(2.85), "max": 3}
    assert (statistics.answer_words["min"], statistics.answer_words["max"]) == (1, 3)
    assert (statistics.question_words["min"], statistics.question_words["max"]) == (3, 7)
    assert statistics.question_types == {"color": 2, "yes_no": 1, "shape": 1}
    assert statistics.metrics == {"vqa_accuracy": 3, "anls": 1}
    assert statistics.styles == {"vqa2": 3, "okvqa": 1}


def test_lengths_are_those_of_the_processors_output(dataset, tiny_processor):
    limit = 75
    statistics = describe_dataset(dataset, tiny_processor, TIER_CROPS, limit)
    text_lengths = [tiny_processor(text=row["question"], style=row["style"])["input_ids"].shape[1] for row in dataset]
    assert statistics.text_tokens == summarize(text_lengths)
    for tier, numbers in statistics.tiers.items():
        lengths, crops = [], []
        for row in dataset:
            inputs = tiny_processor(
                images=row["image"], text=row["question"], style=row["style"], tier=tier, tier_crops=TIER_CROPS
            )
            lengths.append(inputs["input_ids"].shape[1])
            crops.append(inputs["pixel_values"].shape[1] - 1)
        assert numbers.prompt_tokens == summarize(lengths)
        assert numbers.crops == summarize(crops)
        assert numbers.vision_tokens == summarize(
            [length - text for length, text in zip(lengths, text_lengths, strict=True)]
        )
        assert numbers.too_long == [f"sample{row}" for row, length in enumerate(lengths) if length > limit]
    assert not statistics.tiers["low"].too_long and statistics.tiers["high"].too_long, "the limit shows nothing"


def test_an_empty_data_set_is_refused(dataset, tiny_processor):
    with pytest.raises(ValueError, match="no rows"):
        describe_dataset(dataset.select([]), tiny_processor, TIER_CROPS, 100)


def test_summary():
    values = list(range(1, 102))
    assert summarize(values) == {"min": 1, "median": 51.0, "mean": 51.0, "p95": 96.0, "max": 101}
    assert not math.isnan(summarize([3])["p95"])
