"""Statistics of a data set: counts by hand, and the inputs of an executor against what its counter says of each row."""

import io
import math

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from joint_controller.data import FEATURES
from joint_controller.data.statistics import describe_dataset, summarize
from joint_controller.images import oriented_size
from joint_controller.knobs import Knob, KnobSpace


class TileCounter:
    """Counts tiles of a side that the knob `detail` gives, each of four tokens, and a token a word."""

    count_names = ("num_tiles", "vision_tokens", "text_tokens")

    def __init__(self, stages=(2, 1), limit=100):
        depth_stage, detail_stage = stages
        self.knob_space = KnobSpace(
            [Knob("depth", (4, 8), depth_stage), Knob("detail", ("low", "high"), detail_stage, (40, 10))]
        )
        self.max_prompt_tokens = limit
        self.asked = []

    def count_inputs(self, request, settings):
        self.asked.append((request.question, list(settings)))
        width, height = oriented_size(request.load_image())
        sides = [self.knob_space["detail"].meaning(setting["detail"]) for setting in settings]
        # Landscape and portrait differ, so that it shows how an image was turned.
        num_tiles = [math.ceil(width / side) * math.ceil(height / side) + (width > height) for side in sides]
        words = len(request.question.split()) + (request.style == "okvqa")
        text_tokens = [words + (setting["depth"] == 8) for setting in settings]
        return {
            "num_tiles": num_tiles,
            "vision_tokens": [4 * tiles for tiles in num_tiles],
            "text_tokens": text_tokens,
        }


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


def test_counts_by_hand(dataset):
    statistics = describe_dataset(dataset, TileCounter())
    assert (statistics.num_rows, statistics.num_images) == (4, 3)
    assert statistics.image_sizes == {(90, 40): 2, (40, 90): 1, (64, 64): 1}
    assert statistics.answers == {"blue": 2, "no": 1, "a red star": 1}
    assert statistics.references == {"min": 1, "median": 1.5, "mean": 1.75, "p95": pytest.approx(2.85), "max": 3}
    assert (statistics.answer_words["min"], statistics.answer_words["max"]) == (1, 3)
    assert (statistics.question_words["min"], statistics.question_words["max"]) == (3, 7)
    assert statistics.question_types == {"color": 2, "yes_no": 1, "shape": 1}
    assert statistics.metrics == {"vqa_accuracy": 3, "anls": 1}
    assert statistics.styles == {"vqa2": 3, "okvqa": 1}


def test_inputs_at_each_value_of_stage_1_with_the_other_knobs_at_their_highest(dataset):
    inputs = describe_dataset(dataset, TileCounter(limit=150)).inputs
    assert list(inputs) == ["detail=low", "detail=high"]
    # Tiles of 40 pixels, then of 10: 90x40, 90x40, 40x90 (as it is to be seen) and 64x64.
    tiles = {"detail=low": [4, 4, 3, 4], "detail=high": [37, 37, 36, 49]}
    words = [7, 6, 9, 4]  # with the one that `depth` adds at its highest value, and the one of the style
    for name, numbers in inputs.items():
        lengths = [4 * count + text for count, text in zip(tiles[name], words, strict=True)]
        assert numbers.counts == {
            "num_tiles": summarize(tiles[name]),
            "vision_tokens": summarize([4 * count for count in tiles[name]]),
            "text_tokens": summarize(words),
        }
        assert numbers.prompt_tokens == summarize(lengths)
        assert numbers.too_long == [f"sample{row}" for row, length in enumerate(lengths) if length > 150]
    assert not inputs["detail=low"].too_long and inputs["detail=high"].too_long


def test_several_knobs_of_stage_1_and_none(dataset):
    inputs = describe_dataset(dataset, TileCounter(stages=(1, 1))).inputs
    assert list(inputs) == [f"depth={depth} detail={detail}" for depth in (4, 8) for detail in ("low", "high")]
    assert [numbers.counts["text_tokens"]["max"] for numbers in inputs.values()] == [8, 8, 9, 9]
    inputs = describe_dataset(dataset, TileCounter(stages=(2, 2))).inputs
    assert list(inputs) == ["any setting"] and inputs["any setting"].counts["num_tiles"]["max"] == 49


def test_rows_that_count_the_same_are_counted_once(dataset):
    counter = TileCounter()
    describe_dataset(dataset.select([0, 1, 0, 0, 2, 1]), counter)
    assert [question for question, _ in counter.asked] == [dataset[row]["question"] for row in (0, 1, 2)]
    assert all(len(settings) == 2 for _, settings in counter.asked)


def test_an_empty_data_set_is_refused(dataset):
    with pytest.raises(ValueError, match="no rows"):
        describe_dataset(dataset.select([]), TileCounter())


def test_summary():
    values = list(range(1, 102))
    assert summarize(values) == {"min": 1, "median": 51.0, "mean": 51.0, "p95": 96.0, "max": 101}
    assert not math.isnan(summarize([3])["p95"])
