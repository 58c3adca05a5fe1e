"""The contact sheet: every sample is on it, and nothing leaves its cell."""

import numpy as np
import pytest
from PIL import Image

from joint_controller.data.contact_sheet import (
    CELL_WIDTH,
    COLUMNS,
    GAP,
    IMAGE_HEIGHT,
    draw_contact_sheet,
    format_answers,
)


COLORS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255), (0, 255, 255), (200, 100, 0)]


def make_sample(number: int, size=(64, 64), question="What is it?", answers=("a star",)) -> dict:
    return {
        "sample_id": f"set/train/{number}",
        "image": Image.new("RGB", size, COLORS[number]),
        "question": question,
        "answers": list(answers),
        "question_type": "other",
    }


def columns_of_color(sheet: Image.Image, color) -> np.ndarray:
    return np.flatnonzero((np.asarray(sheet) == color).all(axis=2).any(axis=0))


def test_each_image_is_in_its_cell_at_the_largest_size_that_fits():
    sizes = [(64, 64), (640, 480), (1000, 10), (10, 1000), (4, 4), (320, 240), (3, 2)]
    samples = [make_sample(number, size) for number, size in enumerate(sizes)]
    sheet = draw_contact_sheet(samples, "title")
    assert sheet.width == COLUMNS * (CELL_WIDTH + GAP) + GAP
    for number, (width, height) in enumerate(sizes):
        left = GAP + number % COLUMNS * (CELL_WIDTH + GAP)
        shown = columns_of_color(sheet, COLORS[number])
        scale = min(CELL_WIDTH / width, IMAGE_HEIGHT / height)
        assert len(shown) == round(width * scale)
        assert shown[0] == left + (CELL_WIDTH - len(shown)) // 2
    rows = [np.flatnonzero((np.asarray(sheet) == COLORS[number]).all(axis=2).any(axis=1))[0] for number in (0, 5)]
    assert rows[1] - rows[0] > IMAGE_HEIGHT  # the sixth sample begins a second row


@pytest.mark.parametrize("text", ["word " * 300, "W" * 500, "first\nsecond\n\nthird " + "x" * 90, "Где это? ñ ✓", ""])
def test_text_stays_in_its_cell(text):
    short, long = make_sample(0), make_sample(1, question=text or "?", answers=[text or "?"])
    pixels = np.asarray(draw_contact_sheet([short, long, short], "title"))
    for column in range(1, 4):  # between the cells
        gap = pixels[:, column * (CELL_WIDTH + GAP) + 1 : column * (CELL_WIDTH + GAP) + GAP - 2]
        title_height = 80
        assert (gap[title_height:] == 255).all()
    assert (pixels[-GAP + 1 :] == 255).all()
    height_of_one_line = draw_contact_sheet([short], "title").height
    assert pixels.shape[0] < height_of_one_line + 300  # long texts are cut


def test_texts_are_drawn():
    base = np.asarray(draw_contact_sheet([make_sample(0)], "title"))
    for changed in (make_sample(0, question="Who is it?"), make_sample(0, answers=["a moon"])):
        assert (np.asarray(draw_contact_sheet([changed], "title")) != base).any()
    assert (np.asarray(draw_contact_sheet([make_sample(0)], "other")) != base).any()


def test_answers_are_counted():
    assert format_answers(["red", "dark red", "red", "maroon"]) == "red ×2, dark red, maroon"
    assert format_answers(["yes"]) == "yes"


def test_no_samples_are_refused():
    with pytest.raises(ValueError, match="no samples to show"):
        draw_contact_sheet([], "title")
