"""The data set of the PyPI package `easy-vqa`: 5,000 images of one shape each, 48,248 questions, 13 answers."""

from datasets import Dataset

from .schema import DEFAULT_METRIC, DEFAULT_STYLE, FEATURES, check_split
from .splits import SplitPart, select_part


NUM_TRAIN_IMAGES = 3500
"""Training images with a lower id are `train`, the other 500 `validation`, a split that the package does not have."""

COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")


def load_easy_vqa(split: str) -> Dataset:
    """
    Reads a split of easy-vqa from the installed package.

    Args:
        split (`str`):
            `"train"` (the questions on the package's first 3,500 training images), `"validation"` (those on its last
            500), `"test"` (the package's own test questions), or a part of one, such as `"test[:50%]"`.

    Returns:
        `datasets.Dataset`: Columns as in `FEATURES`; `question_type` is `"easy_vqa_color"`, `"easy_vqa_shape"` or
        `"easy_vqa_yes_no"`, by the answer.

    Raises:
        ValueError: If the split is unknown.
    """
    part = SplitPart.parse(split)
    split = part.name
    check_split(split)
    # Imported here: who brings data of their own needs none of it.
    import easy_vqa

    if split == "test":
        samples = zip(*easy_vqa.get_test_questions(), strict=True)
        image_paths = easy_vqa.get_test_image_paths()
    else:
        samples = zip(*easy_vqa.get_train_questions(), strict=True)
        image_paths = easy_vqa.get_train_image_paths()
        is_train = split == "train"
        samples = (sample for sample in samples if (sample[2] < NUM_TRAIN_IMAGES) == is_train)
    questions, answers, image_ids = zip(*samples, strict=True)
    columns = {
        "sample_id": [f"easy_vqa/{split}/{row:06d}" for row in range(len(questions))],
        "image": [image_paths[image_id] for image_id in image_ids],
        "question": list(questions),
        "answers": [[answer] for answer in answers],
        "style": [DEFAULT_STYLE] * len(questions),
        "metric": [DEFAULT_METRIC] * len(questions),
        "question_type": [_question_type(answer) for answer in answers],
    }
    return select_part(Dataset.from_dict(columns, features=FEATURES), part, "easy_vqa")


def _question_type(answer: str) -> str:
    if answer in COLORS:
        return "easy_vqa_color"
    if answer in SHAPES:
        return "easy_vqa_shape"
    return "easy_vqa_yes_no"
