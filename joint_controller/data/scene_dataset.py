"""Scenes as a data set: one sample is one question about one scene."""

import io

from datasets import Dataset

from .scenes import generate_scene, scene_seed
from .schema import DEFAULT_METRIC, DEFAULT_STYLE, FEATURES, check_split


QUESTIONS_PER_SCENE = 4
"""Four questions a scene make all types of question equally frequent."""

DEFAULT_NUM_SAMPLES = {"train": 4000, "validation": 1000, "test": 2000}


def load_scenes(split: str, max_samples: int | None = None) -> Dataset:
    """
    Generates the first samples of a split of scenes.

    Args:
        split (`str`):
            `"train"`, `"validation"` or `"test"`. No scene is in two splits.
        max_samples (`int`, *optional*):
            Number of samples; there is always a next scene. By default 4,000 for `train`, 1,000 for `validation` and
            2,000 for `test`.

    Returns:
        `datasets.Dataset`: Columns as in `FEATURES`; `question_type` is one of `QUESTION_TYPES`.

    Raises:
        ValueError: If the split is unknown.
    """
    check_split(split)
    num_samples = DEFAULT_NUM_SAMPLES[split] if max_samples is None else max_samples
    columns = {column: [] for column in FEATURES}
    for index in range(-(-num_samples // QUESTIONS_PER_SCENE)):
        scene = generate_scene(scene_seed(split, index), questions_per_scene=QUESTIONS_PER_SCENE)
        buffer = io.BytesIO()
        scene.image.save(buffer, format="PNG", compress_level=1)
        image = {"bytes": buffer.getvalue(), "path": None}
        for question in scene.questions[: num_samples - len(columns["sample_id"])]:
            columns["sample_id"].append(f"scenes/{split}/{len(columns['sample_id']):06d}")
            columns["image"].append(image)
            columns["question"].append(question.question)
            columns["answers"].append([question.answer])
            columns["style"].append(DEFAULT_STYLE)
            columns["metric"].append(DEFAULT_METRIC)
            columns["question_type"].append(question.question_type)
    return Dataset.from_dict(columns, features=FEATURES)
