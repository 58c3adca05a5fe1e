"""Scenes as a data set: one sample is one question about one scene."""

import io
import itertools

from datasets import Dataset

from .scenes import generate_scene, scene_seed
from .schema import DEFAULT_METRIC, DEFAULT_STYLE, FEATURES, check_split
from .splits import SplitPart, is_image_in_part


QUESTIONS_PER_SCENE = 4
"""Four questions a scene make all types of question equally frequent."""

DEFAULT_NUM_SAMPLES = {"train": 4000, "validation": 1000, "test": 2000}


def load_scenes(split: str, max_samples: int | None = None) -> Dataset:
    """
    Generates the first samples of a split of scenes.

    Args:
        split (`str`):
            `"train"`, `"validation"` or `"test"`, or a part of one, such as `"test[:50%]"`. No scene is in two splits.
        max_samples (`int`, *optional*):
            Number of samples; there is always a next scene. By default 4,000 for `train`, 1,000 for `validation` and
            2,000 for `test`; of a part, those of them that are in it.

    Returns:
        `datasets.Dataset`: Columns as in `FEATURES`; `question_type` is one of `QUESTION_TYPES`.

    Raises:
        ValueError: If the split is unknown.
    """
    part = SplitPart.parse(split)
    check_split(part.name)
    columns = {column: [] for column in FEATURES}
    number = 0
    for index in itertools.count():
        missing = DEFAULT_NUM_SAMPLES[part.name] - number
        if max_samples is not None:
            missing = max_samples - len(columns["sample_id"])
        if missing <= 0:
            break
        scene = generate_scene(scene_seed(part.name, index), questions_per_scene=QUESTIONS_PER_SCENE)
        buffer = io.BytesIO()
        scene.image.save(buffer, format="PNG", compress_level=1)
        image = {"bytes": buffer.getvalue(), "path": None}
        if part.is_whole or is_image_in_part({"image": image}, part):
            for offset, question in enumerate(scene.questions[:missing]):
                columns["sample_id"].append(f"scenes/{part.name}/{number + offset:06d}")
                columns["image"].append(image)
                columns["question"].append(question.question)
                columns["answers"].append([question.answer])
                columns["style"].append(DEFAULT_STYLE)
                columns["metric"].append(DEFAULT_METRIC)
                columns["question_type"].append(question.question_type)
        number += len(scene.questions)
    return Dataset.from_dict(columns, features=FEATURES)
