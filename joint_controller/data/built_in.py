"""The data sets that need no files: easy-vqa, which a PyPI package holds, and scenes, which are generated."""

import io
import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from datasets import Dataset

from .scenes import (
    IMAGE_SIZES,
    QUESTION_TYPES,
    TRANSFER_IMAGE_SIZES,
    TRANSFER_QUESTION_TYPES,
    generate_scene,
    scene_seed,
)
from .schema import DEFAULT_METRIC, DEFAULT_STYLE, FEATURES, check_split
from .splits import SplitPart, is_image_in_part, select_part


NUM_EASY_VQA_TRAIN_IMAGES = 3500
"""Training images with a lower id are `train`, the other 500 `validation`, a split that the package does not have."""

EASY_VQA_COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
EASY_VQA_SHAPES = ("circle", "rectangle", "triangle")

QUESTIONS_PER_SCENE = 3
"""Three questions a scene make all types of question equally frequent."""


@dataclass(frozen=True)
class SceneFamily:
    """Scenes of some image sizes, with their shares, and of some types of question."""

    image_sizes: Mapping[tuple[int, int], float]
    question_types: tuple[str, ...]


SCENE_FAMILIES = {
    "scenes": SceneFamily(IMAGE_SIZES, tuple(name for name in QUESTION_TYPES if name not in TRANSFER_QUESTION_TYPES)),
    "scenes_transfer": SceneFamily(TRANSFER_IMAGE_SIZES, TRANSFER_QUESTION_TYPES),
}
"""
Data sets of scenes. Those of `"scenes_transfer"` have image shapes and types of question that `"scenes"` does not have: they
show what a controller does with what it was not trained on.
"""

NUM_SCENE_SAMPLES = {"train": 4000, "validation": 1000, "test": 2000}
"""Samples of scenes by default."""


def load_easy_vqa(split: str) -> Dataset:
    """
    Reads a split of easy-vqa: 5,000 images of one shape each, 48,248 questions, 13 answers. `question_type` is
    `"easy_vqa_color"`, `"easy_vqa_shape"` or `"easy_vqa_yes_no"`, by the answer.
    """
    part = SplitPart.parse(split)
    check_split(part.name)
    # Imported here: who brings data of their own needs none of it.
    import easy_vqa

    if part.name == "test":
        questions, answers, image_ids = easy_vqa.get_test_questions()
        image_paths = easy_vqa.get_test_image_paths()
    else:
        is_train = part.name == "train"
        samples = zip(*easy_vqa.get_train_questions(), strict=True)
        samples = (sample for sample in samples if (sample[2] < NUM_EASY_VQA_TRAIN_IMAGES) == is_train)
        questions, answers, image_ids = zip(*samples, strict=True)
        image_paths = easy_vqa.get_train_image_paths()
    types = {**dict.fromkeys(EASY_VQA_COLORS, "color"), **dict.fromkeys(EASY_VQA_SHAPES, "shape")}
    columns = {
        "sample_id": [f"easy_vqa/{part.name}/{row:06d}" for row in range(len(questions))],
        "image": [image_paths[image_id] for image_id in image_ids],
        "question": list(questions),
        "answers": [[answer] for answer in answers],
        "style": [DEFAULT_STYLE] * len(questions),
        "metric": [DEFAULT_METRIC] * len(questions),
        "question_type": [f"easy_vqa_{types.get(answer, 'yes_no')}" for answer in answers],
    }
    return select_part(Dataset.from_dict(columns, features=FEATURES), part, "easy_vqa")


def load_scenes(name: str, split: str, max_samples: int | None = None) -> Dataset:
    """
    Generates the first `max_samples` samples of a split of a family of scenes, or as many as `NUM_SCENE_SAMPLES` says (of a part of a
    split, those of them that are in it). A sample is one question about one scene; no scene is in two splits.
    """
    part = SplitPart.parse(split)
    check_split(part.name)
    family = SCENE_FAMILIES[name]
    rows: list[dict] = []
    number = 0
    for index in itertools.count():
        missing = NUM_SCENE_SAMPLES[part.name] - number if max_samples is None else max_samples - len(rows)
        if missing <= 0:
            break
        scene = generate_scene(
            scene_seed(part.name, index),
            image_sizes=family.image_sizes,
            questions_per_scene=QUESTIONS_PER_SCENE,
            question_types=family.question_types,
        )
        buffer = io.BytesIO()
        scene.image.save(buffer, format="PNG", compress_level=1)
        image = {"bytes": buffer.getvalue(), "path": None}
        if part.is_whole or is_image_in_part({"image": image}, part):
            rows += [
                {
                    "sample_id": f"{name}/{part.name}/{number + offset:06d}",
                    "image": image,
                    "question": question.question,
                    "answers": [question.answer],
                    "style": DEFAULT_STYLE,
                    "metric": DEFAULT_METRIC,
                    "question_type": question.question_type,
                }
                for offset, question in enumerate(scene.questions[:missing])
            ]
        number += len(scene.questions)
    return Dataset.from_list(rows, features=FEATURES)
