"""The one schema of all data sets."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Features, Image, List, Value, concatenate_datasets


SPLITS = ("train", "validation", "test")
"""Splits of every data set."""

FEATURES = Features(
    {
        "sample_id": Value("string"),
        "image": Image(),
        "question": Value("string"),
        "answers": List(Value("string")),
        "style": Value("string"),
        "metric": Value("string"),
        "question_type": Value("string"),
    }
)
"""Columns of every data set. Images are decoded when a row is read."""

ENCODED_FEATURES = Features({**FEATURES, "image": Image(decode=False)})
"""The same with images as they were encoded: the columns of a stream."""

REQUIRED_COLUMNS = ("image", "question", "answers")

DEFAULT_STYLE = "vqa2"
DEFAULT_METRIC = "vqa_accuracy"
DEFAULT_QUESTION_TYPE = "unknown"

DEFAULTS = {"style": DEFAULT_STYLE, "metric": DEFAULT_METRIC, "question_type": DEFAULT_QUESTION_TYPE}
"""Values of the columns that a table may lack."""

STRING_TYPES = (Value("string"), Value("large_string"))


def cache_folder() -> Path:
    """Where this package keeps what it makes of data sets: not in their folders, which are the user's."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "joint_controller"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def check_split(split: str) -> None:
    """Refuses a split that no data set has."""
    if split not in SPLITS:
        raise ValueError(f"there is no split '{split}': choose one of {list(SPLITS)}.")


def check_columns(features: Features, name: str) -> None:
    """
    Refuses a table that cannot be brought to the columns of `FEATURES`: it has at least `image` (an image, its bytes or its
    path), `question` (a string) and `answers` (a list of strings).
    """
    for column in REQUIRED_COLUMNS:
        if column not in features:
            raise ValueError(
                f"data set '{name}' has no column '{column}' (it has {list(features)}): "
                "add it or rename the column that holds it."
            )
    for column in ("sample_id", *DEFAULTS, "question"):
        if column in features and features[column] not in STRING_TYPES:
            raise ValueError(
                f"data set '{name}', column '{column}' has the type {features[column]}: give a string in each row."
            )
    answers = features["answers"]
    if not isinstance(answers, List) or answers.feature not in STRING_TYPES:
        raise ValueError(
            f"data set '{name}', column 'answers' has the type {answers}: give a list of strings in each row."
        )
    image = features["image"]
    accepted = (Image(), Image(decode=False), Value("binary"), *STRING_TYPES)
    if image not in accepted and (not isinstance(image, dict) or set(image) != {"bytes", "path"}):
        raise ValueError(
            f"data set '{name}', column 'image' has the type {image}: give images (`datasets.Image`), "
            "their encoded bytes or their paths."
        )


def conform_to_schema(dataset: Dataset, name: str) -> Dataset:
    """
    Brings a data set to the columns of `FEATURES`: fills in those of `DEFAULTS` and drops unknown ones. A column `defect`
    stays: why a row cannot be used. Refuses a missing column, one of another type, and a sample id that occurs twice.
    """
    check_columns(dataset.features, name)
    for column, value in DEFAULTS.items():
        if column not in dataset.column_names:
            dataset = dataset.add_column(column, [value] * len(dataset))
    defect = ["defect"] if "defect" in dataset.column_names else []
    dataset = dataset.select_columns([*FEATURES, *defect])

    first_rows: dict[str, int] = {}
    for row, sample_id in enumerate(dataset["sample_id"]):
        if sample_id in first_rows:
            raise ValueError(
                f"data set '{name}', rows {first_rows[sample_id]} and {row}, column 'sample_id': "
                f"both are '{sample_id}'. Give each row its own id, or leave the column out."
            )
        first_rows[sample_id] = row
    dataset = dataset.cast_column("image", Image())
    features = Features({**FEATURES, **{column: Value("string") for column in defect}})
    if dataset.features == features:
        return dataset
    # Casting copies into memory, which images must not be: texts alone are cast.
    texts = dataset.remove_columns("image")
    text_features = Features({column: features[column] for column in texts.column_names})
    texts = texts.cast(text_features, keep_in_memory=True)
    columns = concatenate_datasets([texts, dataset.select_columns("image")], axis=1)
    return columns.select_columns(list(features))


def conform_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Does for one row of a stream what [`conform_to_schema`] does for a table. The image becomes `bytes` and `path`."""
    conformed = {**DEFAULTS, **{column: row[column] for column in (*FEATURES, "defect") if column in row}}
    image = row["image"]
    if isinstance(image, bytes):
        conformed["image"] = {"bytes": image, "path": None}
    elif isinstance(image, str):
        conformed["image"] = {"bytes": None, "path": image}
    return conformed
