"""
Synthetic scenes: a few coloured objects and often a sign or two, in images of several shapes, with questions that need
different things of an executor. Some are about large things and are answered from the smallest image, some are about small
things and need resolution, some need several steps of reasoning. What an image costs depends on its shape.

A scene is made in three steps: place objects and signs, draw them, ask about them. All randomness comes from one
`random.Random(seed)` and all drawing is exact arithmetic on our own shapes and glyphs, so a seed gives the same scene
on every machine, whatever fonts it has.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image


COLORS = {
    "red": (214, 32, 36),
    "orange": (246, 138, 22),
    "yellow": (250, 230, 50),
    "green": (30, 150, 50),
    "blue": (34, 76, 214),
    "purple": (134, 40, 168),
    "black": (22, 22, 24),
    "white": (244, 244, 242),
}
"""Colours of objects and their RGB values (0–255), before a small jitter."""

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
"""Shapes of objects."""

WORDS = ("stop", "exit", "open", "taxi", "cafe", "shop", "bank", "park", "fish", "milk", "book", "food")
"""Words on signs. All have four letters, so that the width of a sign does not give its word away."""

DIGITS = tuple("0123456789")
"""Digits on signs."""

IMAGE_SIZES = {(128, 128): 0.3, (168, 128): 0.15, (128, 168): 0.15, (256, 128): 0.2, (128, 256): 0.2}
"""Width and height of images, in pixels, and the share of scenes that have them."""

TRANSFER_IMAGE_SIZES = {(384, 128): 0.5, (128, 384): 0.5}
"""Those of the scenes that no controller of this project is trained on."""

# Sizes are in pixels and grow with `size_scale`.
LARGEST_OBJECT = (24.0, 32.0)
SMALLEST_OBJECT = 12.0
TEXT_HEIGHTS = {"digit": (16.0, 24.0), "word": (13.0, 18.0)}
LARGE_TEXT_HEIGHTS = {"digit": (32.0, 44.0), "word": (22.0, 26.0)}
SMALL_TEXT_HEIGHTS = {"digit": (12.0, 15.0), "word": (11.0, 13.0)}

# The largest object is this much wider than any other: enough that its area is the largest too, whatever the shapes.
LARGEST_RATIO = 1.35
# The smallest object is asked about where any other is this much wider.
SMALLEST_RATIO = 1.2
# "Left most" and "nearest" are asked where the answer wins by this many pixels: more than half of the greatest difference of
# two sizes, so that objects' edges and objects' centres give the same answer.
CLEAR_MARGIN = 10.24

# Of a scene with one sign, and of one with a large and a small sign; the others have none.
ONE_SIGN_PROBABILITY = 0.46
TWO_SIGNS_PROBABILITY = 0.46
SIGN_KINDS = ("digit", "word")
MAX_SAME_COLOR = 4
ABSENT_COLOR_PROBABILITY = 0.2
COLOR_JITTER = 12

# Background tints are muted and of middle lightness, so that every object colour stands out, black and white included.
TINT_LIGHTNESS = (100, 180)
TINT_CHROMA = 22
BACKGROUNDS = ("solid", "gradient", "stripes", "noise", "blotches")

TEMPLATES = {
    "existence": "is there any {color} object ?",
    "color_largest": "what color is the largest object ?",
    "color_smallest": "what color is the smallest object ?",
    "shape_largest": "what shape is the largest object ?",
    "shape_smallest": "what shape is the smallest object ?",
    "shape_of_color": "what shape is the {color} object ?",
    "color_of_shape": "what color is the {shape} ?",
    "count": "how many objects are there ?",
    "count_color": "how many {color} objects are there ?",
    "extreme": "what color is the {side} most object ?",
    "nearest": "what color is the object nearest to the {color} {shape} ?",
    "compare": "are there more {color} objects than {other} objects ?",
    "digit": "what digit is on the sign ?",
    "word": "what word is on the sign ?",
    "large_digit": "what digit is on the large sign ?",
    "large_word": "what word is on the large sign ?",
    "small_digit": "what digit is on the small sign ?",
    "small_word": "what word is on the small sign ?",
}
"""How each type of question is put. Words are lower case and separated by blanks, the question mark included."""

QUESTION_TYPES = tuple(TEMPLATES)
"""Names of the question types."""

TRANSFER_QUESTION_TYPES = ("color_smallest", "shape_largest", "large_word", "small_digit")
"""Those that no controller of this project is trained on: it knows each of their words from other types."""

SIDES = ("left", "right", "top", "bottom")

# Weights with which types are drawn when not all are asked: those that fewer scenes allow weigh more. Fitted on 6,000
# scenes so that with 3 questions a scene every type but those of transfer is asked about equally often (within a tenth).
TYPE_WEIGHTS = dict.fromkeys(QUESTION_TYPES, 1.0) | {
    "shape_smallest": 2.7,
    "shape_of_color": 1.6,
    "color_of_shape": 1.1,
    "extreme": 1.6,
    "nearest": 1.5,
    "compare": 2.4,
    "digit": 15.0,
    "word": 13.0,
    "large_digit": 19.0,
    "small_word": 19.0,
}

SCENE_SPLITS = ("train", "validation", "test", "executor")
"""Splits of scenes; `"executor"` is kept for training an executor."""

SEEDS_PER_SPLIT = 10**9

# Glyphs of 5 × 7 cells, row by row.
GLYPHS = {
    "0": ("01110", "10001", "10001", "10001", "10001", "10001", "01110"),
    "1": ("00100", "01100", "00100", "00100", "00100", "00100", "01110"),
    "2": ("01110", "10001", "00001", "00110", "01000", "10000", "11111"),
    "3": ("11110", "00001", "00001", "01110", "00001", "00001", "11110"),
    "4": ("00010", "00110", "01010", "10010", "11111", "00010", "00010"),
    "5": ("11111", "10000", "11110", "00001", "00001", "10001", "01110"),
    "6": ("00110", "01000", "10000", "11110", "10001", "10001", "01110"),
    "7": ("11111", "00001", "00010", "00010", "00100", "00100", "00100"),
    "8": ("01110", "10001", "10001", "01110", "10001", "10001", "01110"),
    "9": ("01110", "10001", "10001", "01111", "00001", "00010", "01100"),
    "a": ("01110", "10001", "10001", "11111", "10001", "10001", "10001"),
    "b": ("11110", "10001", "10001", "11110", "10001", "10001", "11110"),
    "c": ("01110", "10001", "10000", "10000", "10000", "10001", "01110"),
    "d": ("11110", "10001", "10001", "10001", "10001", "10001", "11110"),
    "e": ("11111", "10000", "10000", "11110", "10000", "10000", "11111"),
    "f": ("11111", "10000", "10000", "11110", "10000", "10000", "10000"),
    "h": ("10001", "10001", "10001", "11111", "10001", "10001", "10001"),
    "i": ("01110", "00100", "00100", "00100", "00100", "00100", "01110"),
    "k": ("10001", "10010", "10100", "11000", "10100", "10010", "10001"),
    "l": ("10000", "10000", "10000", "10000", "10000", "10000", "11111"),
    "m": ("10001", "11011", "10101", "10101", "10001", "10001", "10001"),
    "n": ("10001", "11001", "10101", "10101", "10011", "10001", "10001"),
    "o": ("01110", "10001", "10001", "10001", "10001", "10001", "01110"),
    "p": ("11110", "10001", "10001", "11110", "10000", "10000", "10000"),
    "r": ("11110", "10001", "10001", "11110", "10100", "10010", "10001"),
    "s": ("01111", "10000", "10000", "01110", "00001", "00001", "11110"),
    "t": ("11111", "00100", "00100", "00100", "00100", "00100", "00100"),
    "x": ("10001", "10001", "01010", "00100", "01010", "10001", "10001"),
}

# Outlines on the unit square, rows downwards. Areas lie between 0.40 and 0.67, so that sizes and areas agree.
POLYGONS = {
    "square": ((0.09, 0.09), (0.91, 0.09), (0.91, 0.91), (0.09, 0.91)),
    "triangle": ((0.5, 0.04), (1.0, 0.94), (0.0, 0.94)),
    "diamond": ((0.5, 0.0), (0.94, 0.5), (0.5, 1.0), (0.06, 0.5)),
    "cross": tuple(
        zip(
            (0.32, 0.68, 0.68, 1.0, 1.0, 0.68, 0.68, 0.32, 0.32, 0.0, 0.0, 0.32),
            (0.0, 0.0, 0.32, 0.32, 0.68, 0.68, 1.0, 1.0, 0.68, 0.68, 0.32, 0.32),
            strict=True,
        )
    ),
    "star": tuple(
        (0.5 + radius * math.sin(point * math.pi / 5), 0.53 - radius * math.cos(point * math.pi / 5))
        for point, radius in enumerate((0.52, 0.26) * 5)
    ),
}
CIRCLE_RADIUS = 0.46

SAMPLES = 4  # samples per pixel and axis when edges are smoothed


@dataclass(frozen=True)
class SceneObject:
    """A coloured object of a scene: its shape and colour, and its square box, in pixels."""

    shape: str  # one of `SHAPES`
    color: str  # one of `COLORS`
    size: int
    left: int
    top: int

    @property
    def center(self) -> tuple[float, float]:
        """Centre of the box as (x, y), in pixels."""
        return self.left + self.size / 2, self.top + self.size / 2


@dataclass(frozen=True)
class SceneSign:
    """A board with a text, in pixels."""

    kind: str  # one of `SIGN_KINDS`
    text: str  # the digit or the (lower-case) word; drawn in capitals
    text_height: int
    width: int
    height: int
    left: int
    top: int


@dataclass(frozen=True)
class SceneQuestion:
    """A question about a scene."""

    question: str  # lower-case words separated by blanks
    answer: str  # one word
    question_type: str  # one of `QUESTION_TYPES`


@dataclass(frozen=True)
class Scene:
    """
    A picture, what is in it, and questions about it.

    Args:
        image (`PIL.Image.Image`):
            RGB image.
        questions (`tuple[SceneQuestion, ...]`):
            Questions, each of another type.
        objects (`tuple[SceneObject, ...]`):
            The objects, none of which overlap.
        signs (`tuple[SceneSign, ...]`):
            No sign, one, or a large and a small one.
    """

    image: Image.Image
    questions: tuple[SceneQuestion, ...]
    objects: tuple[SceneObject, ...]
    signs: tuple[SceneSign, ...]


def generate_scene(
    seed: int,
    size_scale: float = 1.0,
    image_sizes: Mapping[tuple[int, int], float] = IMAGE_SIZES,
    questions_per_scene: int | None = None,
    question_types: Sequence[str] = QUESTION_TYPES,
) -> Scene:
    """
    Makes the scene of a seed: 2 to 6 objects, in most scenes a sign or two, and questions about them.

    Args:
        seed (`int`):
            Names the scene: equal arguments give an equal scene on every machine.
        size_scale (`float`, *optional*, defaults to 1.0):
            Draws objects and signs this much larger; a curriculum for training goes from about 2 down to 1. A layout
            that does not fit is shrunk until it does.
        image_sizes (`dict[tuple[int, int], float]`, *optional*, defaults to `IMAGE_SIZES`):
            Width and height of the image in pixels: one is drawn, by their shares.
        questions_per_scene (`int`, *optional*):
            Most questions, drawn so that over many scenes no type is rare. By default one of every type that the scene
            allows, in random order. Every scene allows existence, color_largest, shape_largest, count and count_color.
        question_types (`Sequence[str]`, *optional*, defaults to `QUESTION_TYPES`):
            Types of question that are asked.

    Raises:
        ValueError: If `size_scale` is not positive, there is no image size or one has a side below 64, `questions_per_scene`
            is below 1, or a type of question is unknown.
    """
    if size_scale <= 0:
        raise ValueError(f"size_scale is {size_scale}: give a positive factor.")
    if not image_sizes or min(map(min, image_sizes)) < 64:
        raise ValueError(
            f"image_sizes is {dict(image_sizes)}: give one or more, of 64 pixels or more a side, below which objects cannot be "
            "told apart."
        )
    if questions_per_scene is not None and questions_per_scene < 1:
        raise ValueError(f"questions_per_scene is {questions_per_scene}: give 1 or more, or None for all.")
    unknown = [name for name in question_types if name not in TEMPLATES]
    if unknown:
        raise ValueError(f"question_types has {unknown[0]!r}: the types are {', '.join(QUESTION_TYPES)}.")
    rng = random.Random(seed)
    image_size = rng.choices(list(image_sizes), list(image_sizes.values()))[0]
    objects, signs = _place(rng, size_scale, image_size)
    image = _draw(rng, objects, signs, image_size)
    questions = _ask(rng, objects, signs, question_types, questions_per_scene)
    return Scene(image, questions, objects, signs)


def scene_seed(split: str, index: int) -> int:
    """
    The seed of a split's scene. Splits draw from disjoint ranges of seeds, so that they share no scene.

    Args:
        split (`str`):
            `"train"`, `"validation"`, `"test"`, or `"executor"`: scenes for training an executor, which no data set of
            this project contains.
        index (`int`):
            Number of the scene in its split, 0 to 10⁹ - 1.

    Raises:
        ValueError: If the split is unknown or the index outside its range.
    """
    if split not in SCENE_SPLITS:
        raise ValueError(f"scenes have no split '{split}': choose one of {list(SCENE_SPLITS)}.")
    if not 0 <= index < SEEDS_PER_SPLIT:
        raise ValueError(f"scene {index} is outside split '{split}': scenes are numbered 0 to {SEEDS_PER_SPLIT - 1}.")
    return SCENE_SPLITS.index(split) * SEEDS_PER_SPLIT + index


def vocabulary() -> list[str]:
    """All words that occur in questions and answers, sorted."""
    words = {"yes", "no", *COLORS, *SHAPES, *WORDS, *DIGITS, *SIDES}
    for template in TEMPLATES.values():
        words.update(word for word in template.split() if not word.startswith("{"))
    return sorted(words)


# ---- place ----------------------------------------------------------------------------------------------------------


def _place(
    rng: random.Random, size_scale: float, image_size: tuple[int, int]
) -> tuple[tuple[SceneObject, ...], tuple[SceneSign, ...]]:
    """Chooses objects and signs and finds a place for each."""
    count = rng.randint(2, 6)
    colors = _choose_colors(rng, count)
    shapes = [rng.choice(SHAPES) for _ in range(count)]
    largest = rng.uniform(*LARGEST_OBJECT)
    sizes = [largest] + [rng.uniform(SMALLEST_OBJECT, largest / LARGEST_RATIO) for _ in range(count - 1)]
    texts = _choose_texts(rng)

    scale = size_scale
    while True:
        object_sizes = [round(size * scale) for size in sizes]
        heights = [round(height * scale) for _, _, height in texts]
        boards = [_board_size(text, height) for (_, text, _), height in zip(texts, heights, strict=True)]
        boxes = [(size, size) for size in object_sizes] + boards
        corners = _find_corners(rng, boxes, image_size)
        if corners is not None:
            break
        scale *= 0.9

    objects = tuple(
        SceneObject(shape, color, size, *corner)
        for shape, color, size, corner in zip(shapes, colors, object_sizes, corners[:count], strict=True)
    )
    signs = tuple(
        SceneSign(kind, text, height, *board, *corner)
        for (kind, text, _), height, board, corner in zip(texts, heights, boards, corners[count:], strict=True)
    )
    return objects, signs


def _choose_colors(rng: random.Random, count: int) -> list[str]:
    """Gives one colour to 1–4 objects and others at random to the rest: so colours' counts vary."""
    main_color = rng.choice(tuple(COLORS))
    main_count = rng.randint(1, min(count, MAX_SAME_COLOR))
    other_colors = [color for color in COLORS if color != main_color]
    colors = [main_color] * main_count + [rng.choice(other_colors) for _ in range(count - main_count)]
    rng.shuffle(colors)
    return colors


def _choose_texts(rng: random.Random) -> list[tuple[str, str, float]]:
    """Chooses kind, text and height of the glyphs of each sign; of two, the large one comes first."""
    draw = rng.random()
    if draw < ONE_SIGN_PROBABILITY:
        ranges = [TEXT_HEIGHTS]
    elif draw < ONE_SIGN_PROBABILITY + TWO_SIGNS_PROBABILITY:
        ranges = [LARGE_TEXT_HEIGHTS, SMALL_TEXT_HEIGHTS]
    else:
        ranges = []
    texts = []
    for heights in ranges:
        kind = rng.choice(SIGN_KINDS)
        texts.append((kind, rng.choice(DIGITS if kind == "digit" else WORDS), rng.uniform(*heights[kind])))
    return texts


def _board_padding(text_height: int) -> int:
    return max(2, round(0.3 * text_height))


def _board_size(text: str, text_height: int) -> tuple[int, int]:
    """Width and height of the board that holds the text."""
    padding = _board_padding(text_height)
    return _text_width(text, text_height) + 2 * padding, text_height + 2 * padding


def _find_corners(
    rng: random.Random, boxes: list[tuple[int, int]], image_size: tuple[int, int]
) -> list[tuple[int, int]] | None:
    """Upper left corners (left, top) at which boxes (width, height) do not touch, or None where none were found."""
    image_width, image_height = image_size
    gap = max(2, min(image_size) // 42)
    corners: dict[int, tuple[int, int]] = {}
    for index in sorted(range(len(boxes)), key=lambda index: -boxes[index][0]):
        width, height = boxes[index]
        if width + 2 * gap > image_width or height + 2 * gap > image_height:
            return None
        for _ in range(60):
            left = rng.randint(gap, image_width - gap - width)
            top = rng.randint(gap, image_height - gap - height)
            if all(
                left >= other_left + boxes[other][0] + gap
                or other_left >= left + width + gap
                or top >= other_top + boxes[other][1] + gap
                or other_top >= top + height + gap
                for other, (other_left, other_top) in corners.items()
            ):
                corners[index] = (left, top)
                break
        else:
            return None
    return [corners[index] for index in range(len(boxes))]


# ---- draw -----------------------------------------------------------------------------------------------------------


def _draw(
    rng: random.Random,
    objects: tuple[SceneObject, ...],
    signs: tuple[SceneSign, ...],
    image_size: tuple[int, int],
) -> Image.Image:
    """Draws background, signs and objects."""
    canvas = _background(rng, image_size)
    for sign in signs:
        _draw_sign(rng, canvas, sign)
    for item in objects:
        color = [value + rng.randint(-COLOR_JITTER, COLOR_JITTER) for value in COLORS[item.color]]
        _blend(canvas, _shape_mask(item.shape, item.size), color, item.left, item.top)
    return Image.fromarray(canvas.clip(0, 255).round().astype(np.uint8))


def _background(rng: random.Random, image_size: tuple[int, int]) -> np.ndarray:
    """A mix of two tints: (height, width, 3), whole numbers as float32."""
    width, height = image_size
    unit = min(image_size)
    first, second = _tint(rng), _tint(rng)
    rows, columns = np.ogrid[:height, :width]
    # Across the image, down it, or both.
    distance = rows * rng.choice((0, 1)) + columns * rng.choice((-1, 0, 1))
    if not distance.any():
        distance = rows + columns
    distance = np.broadcast_to(distance - distance.min(), (height, width))
    background = rng.choice(BACKGROUNDS)
    if background == "solid":
        share = np.zeros((height, width))
    elif background == "gradient":
        share = distance / distance.max()
    elif background == "stripes":
        share = (distance // rng.randint(unit // 16, unit // 5)) % 2
    elif background == "noise":
        share = np.frombuffer(rng.randbytes(height * width), np.uint8).reshape(height, width) / 255
    else:
        cell = rng.randint(unit // 20, unit // 6)
        cells = -(-height // cell), -(-width // cell)
        coarse = np.frombuffer(rng.randbytes(cells[0] * cells[1]), np.uint8).reshape(cells) / 255
        share = coarse.repeat(cell, axis=0).repeat(cell, axis=1)[:height, :width]
    return (first + share[..., None] * (second - first)).round().astype(np.float32)


def _tint(rng: random.Random) -> np.ndarray:
    lightness = rng.randint(*TINT_LIGHTNESS)
    return np.array([lightness + rng.randint(-TINT_CHROMA, TINT_CHROMA) for _ in range(3)])


def _draw_sign(rng: random.Random, canvas: np.ndarray, sign: SceneSign) -> None:
    """Draws dark glyphs on a light board or the other way round, with a frame in the glyphs' colour."""
    board, ink = [rng.randint(215, 250)] * 3, [rng.randint(5, 45)] * 3
    if rng.random() < 0.5:
        board, ink = ink, board
    frame = max(1, round(sign.text_height / 16))
    canvas[sign.top : sign.top + sign.height, sign.left : sign.left + sign.width] = ink
    canvas[sign.top + frame : sign.top + sign.height - frame, sign.left + frame : sign.left + sign.width - frame] = (
        board
    )
    padding = _board_padding(sign.text_height)
    _blend(canvas, _text_mask(sign.text, sign.text_height), ink, sign.left + padding, sign.top + padding)


def _blend(canvas: np.ndarray, mask: np.ndarray, color: list[int], left: int, top: int) -> None:
    """Lays a colour over the canvas where the mask (height, width) covers it."""
    # Masks are multiples of 1/16 and colours are whole numbers: float32 holds the result exactly on every machine.
    height, width = mask.shape
    region = canvas[top : top + height, left : left + width]
    region += mask[..., None] * (np.array(color, np.float32) - region)


@lru_cache(maxsize=2048)
def _shape_mask(shape: str, size: int) -> np.ndarray:
    """The share of each pixel that the shape covers: (size, size)."""
    if shape == "circle":
        return _coverage(lambda x, y: (x - 0.5) ** 2 + (y - 0.5) ** 2 <= CIRCLE_RADIUS**2, size, size)
    return _coverage(lambda x, y: _inside_polygon(POLYGONS[shape], x, y), size, size)


@lru_cache(maxsize=2048)
def _text_mask(text: str, height: int) -> np.ndarray:
    """The share of each pixel that the glyphs cover: (height, width)."""
    cells = np.array(
        [[int(cell) for cell in "0".join(row)] for row in zip(*(GLYPHS[letter] for letter in text), strict=True)]
    )
    rows, columns = cells.shape
    return _coverage(
        lambda x, y: cells[(y * rows).astype(int), (x * columns).astype(int)] == 1, _text_width(text, height), height
    )


def _text_width(text: str, height: int) -> int:
    """Width in pixels: five cells a glyph and one between two, of a seventh of the height each."""
    return round((6 * len(text) - 1) * height / 7)


def _coverage(inside: Callable[[np.ndarray, np.ndarray], np.ndarray], width: int, height: int) -> np.ndarray:
    """Averages a test of points of the unit square, inside(x, y), over 4 × 4 points a pixel: (height, width)."""
    x = (np.arange(width * SAMPLES) + 0.5) / (width * SAMPLES)
    y = (np.arange(height * SAMPLES) + 0.5) / (height * SAMPLES)
    covered = inside(x[None, :], y[:, None]).reshape(height, SAMPLES, width, SAMPLES)
    return covered.mean(axis=(1, 3), dtype=np.float32)


def _inside_polygon(corners: tuple[tuple[float, float], ...], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Even-odd rule: a point is inside where a ray from it crosses the outline an odd number of times."""
    inside = np.zeros(np.broadcast_shapes(x.shape, y.shape), dtype=bool)
    for (x1, y1), (x2, y2) in zip(corners, corners[1:] + corners[:1], strict=True):
        if y1 != y2:
            inside ^= ((y1 > y) != (y2 > y)) & (x < x1 + (y - y1) * (x2 - x1) / (y2 - y1))
    return inside


# ---- ask ------------------------------------------------------------------------------------------------------------

Asked = tuple[dict[str, str], str]


def _ask(
    rng: random.Random,
    objects: tuple[SceneObject, ...],
    signs: tuple[SceneSign, ...],
    question_types: Sequence[str],
    questions_per_scene: int | None,
) -> tuple[SceneQuestion, ...]:
    """Asks one question of every type that the scene allows and keeps as many as wanted, in random order."""
    counts = Counter(item.color for item in objects)
    by_size = sorted(objects, key=lambda item: item.size)
    largest, smallest = by_size[-1], by_size[0]
    has_smallest = by_size[1].size >= SMALLEST_RATIO * smallest.size
    # By type: the words that fill its template and the answer, or None where the scene does not allow a question of it.
    asked: dict[str, Asked | None] = {
        "existence": _ask_existence(rng, counts),
        # Need little: the largest patch of colour is seen in a small image too, and mostly its outline.
        "color_largest": ({}, largest.color),
        "shape_largest": ({}, largest.shape),
        # Need resolution: small outlines blur into each other.
        "color_smallest": ({}, smallest.color) if has_smallest else None,
        "shape_smallest": ({}, smallest.shape) if has_smallest else None,
        "shape_of_color": _ask_unique(rng, objects, "color", "shape"),
        "color_of_shape": _ask_unique(rng, objects, "shape", "color"),
        # Needs some resolution and depth: objects of all colours, told from background and signs, are added up.
        "count": ({}, str(len(objects))),
        "count_color": _ask_count_color(rng, counts),
        "extreme": _ask_extreme(rng, objects),
        "nearest": _ask_nearest(rng, objects),
        "compare": _ask_compare(rng, counts),
    }
    # Glyphs are read, the smaller, the more resolution it takes. The project's stand-in for questions about text in images.
    if len(signs) == 1:
        asked[signs[0].kind] = ({}, signs[0].text)
    elif signs:
        large, small = signs
        asked[f"large_{large.kind}"] = ({}, large.text)
        asked[f"small_{small.kind}"] = ({}, small.text)
    questions = [
        SceneQuestion(TEMPLATES[question_type].format(**filled[0]), filled[1], question_type)
        for question_type, filled in asked.items()
        if filled is not None
    ]
    # Weighted draw without replacement: order by u^(1/w), u uniform (Efraimidis and Spirakis, 2006).
    questions.sort(key=lambda question: -(rng.random() ** (1 / TYPE_WEIGHTS[question.question_type])))
    return tuple(
        [question for question in questions if question.question_type in question_types][:questions_per_scene]
    )


def _ask_existence(rng: random.Random, counts: Counter[str]) -> Asked:
    """Needs little: whether a colour occurs anywhere. Half of the answers are yes."""
    answer = rng.choice(("yes", "no"))
    candidates = list(counts) if answer == "yes" else [color for color in COLORS if color not in counts]
    return {"color": rng.choice(candidates)}, answer


def _ask_unique(rng: random.Random, objects: tuple[SceneObject, ...], known: str, asked: str) -> Asked | None:
    """One attribute of an object by another one, which no other object shares."""
    values = [(vars(item)[known], vars(item)[asked]) for item in objects]
    frequency = Counter(value for value, _ in values)
    unique = [pair for pair in values if frequency[pair[0]] == 1]
    if not unique:
        return None
    value, answer = rng.choice(unique)
    return {known: value}, answer


def _ask_count_color(rng: random.Random, counts: Counter[str]) -> Asked:
    """Needs some resolution and depth: objects of one colour, often the most frequent one, are added up."""
    if rng.random() < ABSENT_COLOR_PROBABILITY:
        return {"color": rng.choice([color for color in COLORS if color not in counts])}, "0"
    # First the answer, the higher the likelier, then the colour: else most answers would be 1.
    present = sorted(set(counts.values()))
    count = rng.choices(present, weights=present)[0]
    color = rng.choice([color for color in counts if counts[color] == count])
    return {"color": color}, str(count)


def _ask_extreme(rng: random.Random, objects: tuple[SceneObject, ...]) -> Asked | None:
    """Needs depth: all positions are compared. The outermost wins by the margin, the next has another colour."""
    candidates = []
    for side in SIDES:
        axis = 0 if side in ("left", "right") else 1
        sign = 1 if side in ("left", "top") else -1
        first, second = sorted(objects, key=lambda item: sign * item.center[axis])[:2]
        if abs(second.center[axis] - first.center[axis]) >= CLEAR_MARGIN and first.color != second.color:
            candidates.append((side, first.color))
    if not candidates:
        return None
    side, color = rng.choice(candidates)
    return {"side": side}, color


def _ask_nearest(rng: random.Random, objects: tuple[SceneObject, ...]) -> Asked | None:
    """Needs depth: find the object meant, then compare its distances to all others. It is one of a kind, and the
    nearest centre wins by the margin."""
    if len(objects) < 3:
        return None
    kinds = Counter((item.color, item.shape) for item in objects)
    candidates = []
    for item in objects:
        others = sorted((math.dist(item.center, other.center), other.color) for other in objects if other is not item)
        if kinds[item.color, item.shape] == 1 and others[1][0] - others[0][0] >= CLEAR_MARGIN:
            candidates.append((item, others[0][1]))
    if not candidates:
        return None
    item, color = rng.choice(candidates)
    return {"color": item.color, "shape": item.shape}, color


def _ask_compare(rng: random.Random, counts: Counter[str]) -> Asked | None:
    """Needs depth: two counts are compared. Both colours occur, not equally often; half of the answers are yes."""
    pairs = [(more, less) for more in counts for less in counts if counts[more] > counts[less]]
    if not pairs:
        return None
    more, less = rng.choice(pairs)
    if rng.random() < 0.5:
        return {"color": more, "other": less}, "yes"
    return {"color": less, "other": more}, "no"
