"""A picture of samples: images with their questions and answers, to be looked at before training on them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont


COLUMNS = 5
CELL_WIDTH, IMAGE_HEIGHT = 320, 240
PADDING, GAP, LINE_SPACING = 14, 24, 4
TITLE_SIZE, QUESTION_SIZE, NOTE_SIZE = 26, 16, 13
QUESTION_LINES, ANSWER_LINES, NOTE_LINES = 10, 2, 2
INK, ANSWER_INK, NOTE_INK, FRAME, MAT, PAPER = "#1b1f24", "#0a6640", "#6a737d", "#d0d7de", "#eaeef2", "#ffffff"


def format_answers(answers: Sequence[str]) -> str:
    """Reference answers in one line, the most frequent first, with how often each was given: 'red ×2, dark red'."""
    counts = Counter(answers).most_common()
    return ", ".join(answer if count == 1 else f"{answer} ×{count}" for answer, count in counts)


def draw_contact_sheet(samples: Sequence[Mapping[str, Any]], title: str) -> Image.Image:
    """
    Draws samples in rows of five, each with its image, question, answers, id, size and question type. Small images are
    enlarged pixel by pixel, so that nothing is shown that is not there; long texts end in an ellipsis.
    """
    if not samples:
        raise ValueError("there are no samples to show: give at least one.")
    title_font, answer_font = _font(TITLE_SIZE, "bold"), _font(QUESTION_SIZE, "bold")
    question_font, note_font = _font(QUESTION_SIZE), _font(NOTE_SIZE)
    cells = []
    for sample in samples:
        width, height = sample["image"].size
        texts = [
            (sample["question"], question_font, INK, QUESTION_LINES),
            (format_answers(sample["answers"]), answer_font, ANSWER_INK, ANSWER_LINES),
            (sample["sample_id"], note_font, NOTE_INK, NOTE_LINES),
            (f"{width}×{height} · {sample['question_type']}", note_font, NOTE_INK, NOTE_LINES),
        ]
        cells.append([(line, font, ink) for text, font, ink, most in texts for line in _wrap(text, font, most)])
    rows = [range(start, min(start + COLUMNS, len(cells))) for start in range(0, len(cells), COLUMNS)]
    text_heights = [max(sum(_line_height(font) for _, font, _ in cells[index]) for index in row) for row in rows]
    title_lines = _wrap(title, title_font, 2, COLUMNS * (CELL_WIDTH + GAP) - GAP)
    top = GAP + len(title_lines) * _line_height(title_font) + PADDING
    row_heights = [IMAGE_HEIGHT + text_height + 2 * PADDING for text_height in text_heights]
    sheet = Image.new("RGB", (COLUMNS * (CELL_WIDTH + GAP) + GAP, top + sum(row_heights) + GAP * len(rows)), PAPER)
    draw = ImageDraw.Draw(sheet)
    _draw_lines(draw, (GAP, GAP), [(line, title_font, INK) for line in title_lines])
    for row, row_height in zip(rows, row_heights, strict=True):
        for column, index in enumerate(row):
            left = GAP + column * (CELL_WIDTH + GAP)
            draw.rectangle((left - 1, top - 1, left + CELL_WIDTH, top + row_height), outline=FRAME)
            draw.rectangle((left, top, left + CELL_WIDTH - 1, top + IMAGE_HEIGHT - 1), fill=MAT)
            picture = _fit(samples[index]["image"])
            margins = (CELL_WIDTH - picture.width) // 2, (IMAGE_HEIGHT - picture.height) // 2
            sheet.paste(picture, (left + margins[0], top + margins[1]))
            _draw_lines(draw, (left + PADDING, top + IMAGE_HEIGHT + PADDING), cells[index])
        top += row_height + GAP
    return sheet


def _font(size: int, weight: str = "normal") -> ImageFont.FreeTypeFont:
    # DejaVu Sans, which comes with matplotlib: it has the letters of most alphabets.
    from matplotlib.font_manager import FontProperties, findfont

    return ImageFont.truetype(findfont(FontProperties(family="DejaVu Sans", weight=weight)), size)


def _line_height(font: ImageFont.FreeTypeFont) -> int:
    return sum(font.getmetrics()) + LINE_SPACING


def _draw_lines(
    draw: ImageDraw.ImageDraw, corner: tuple[int, int], lines: Sequence[tuple[str, ImageFont.FreeTypeFont, str]]
) -> None:
    left, top = corner
    for text, font, ink in lines:
        draw.text((left, top), text, font=font, fill=ink)
        top += _line_height(font)


def _wrap(text: str, font: ImageFont.FreeTypeFont, max_lines: int, width: int = CELL_WIDTH - 2 * PADDING) -> list[str]:
    """Lines no wider than `width` pixels; line breaks of the text are kept. The last of too many ends in an ellipsis."""
    lines: list[str] = []
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}" if line else word
            if font.getlength(longer) <= width:
                line = longer
                continue
            if line:
                lines.append(line)
            # A word that is wider than a line, such as an id, is broken where the line ends.
            while font.getlength(word) > width:
                fitting = next(n for n in range(len(word), 0, -1) if n == 1 or font.getlength(word[:n]) <= width)
                lines.append(word[:fitting])
                word = word[fitting:]
            line = word
        if line:
            lines.append(line)
    if len(lines) <= max_lines:
        return lines
    last = lines[max_lines - 1]
    while last and font.getlength(last + "…") > width:
        last = last[:-1]
    return [*lines[: max_lines - 1], last.rstrip() + "…"]


def _fit(image: Image.Image) -> Image.Image:
    """The image at the largest size that fits its box."""
    scale = min(CELL_WIDTH / image.width, IMAGE_HEIGHT / image.height)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    return image.resize(size, method)
