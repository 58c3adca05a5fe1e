"""The one schema of all data sets."""

from datasets import Dataset, Features, Image, List, Value


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

REQUIRED_COLUMNS = ("image", "question", "answers")

DEFAULT_STYLE = "vqa2"
DEFAULT_METRIC = "vqa_accuracy"
DEFAULT_QUESTION_TYPE = "unknown"

STRING_TYPES = (Value("string"), Value("large_string"))


def check_split(split: str) -> None:
    """
    Refuses a split that no data set has.

    Raises:
        ValueError: If the split is not `"train"`, `"validation"` or `"test"`.
    """
    if split not in SPLITS:
        raise ValueError(f"there is no split '{split}': choose one of {list(SPLITS)}.")


def conform_to_schema(dataset: Dataset, name: str, id_prefix: str) -> Dataset:
    """
    Brings a data set to the columns of `FEATURES`: fills in those that have a default and drops unknown ones.

    Args:
        dataset (`datasets.Dataset`):
            Has at least the columns `image` (an image, its bytes or its path), `question` (a string) and `answers` (a
            list of strings). `sample_id` becomes "<id_prefix>/<row>" where it is missing, `style` `"vqa2"`, `metric`
            `"vqa_accuracy"` and `question_type` `"unknown"`.
        name (`str`):
            Name of the data set in error messages.
        id_prefix (`str`):
            Start of the sample ids that are filled in.

    Raises:
        ValueError: If a column is missing, has another type, or a sample id occurs twice.
    """
    for column in REQUIRED_COLUMNS:
        if column not in dataset.column_names:
            raise ValueError(
                f"data set '{name}' has no column '{column}' (it has {dataset.column_names}): "
                "add it or rename the column that holds it."
            )
    filled = {
        "sample_id": lambda row: f"{id_prefix}/{row:06d}",
        "style": lambda row: DEFAULT_STYLE,
        "metric": lambda row: DEFAULT_METRIC,
        "question_type": lambda row: DEFAULT_QUESTION_TYPE,
    }
    for column, value in filled.items():
        if column not in dataset.column_names:
            dataset = dataset.add_column(column, [value(row) for row in range(len(dataset))])
    dataset = dataset.select_columns(list(FEATURES))

    for column in (*filled, "question"):
        if dataset.features[column] not in STRING_TYPES:
            raise ValueError(
                f"data set '{name}', column '{column}' has the type {dataset.features[column]}: "
                "give a string in each row."
            )
    answers = dataset.features["answers"]
    if not isinstance(answers, List) or answers.feature not in STRING_TYPES:
        raise ValueError(
            f"data set '{name}', column 'answers' has the type {answers}: give a list of strings in each row."
        )
    image = dataset.features["image"]
    accepted = (Image(), Image(decode=False), Value("binary"), *STRING_TYPES)
    if image not in accepted and (not isinstance(image, dict) or set(image) != {"bytes", "path"}):
        raise ValueError(
            f"data set '{name}', column 'image' has the type {image}: give images (`datasets.Image`), "
            "their encoded bytes or their paths."
        )

    first_rows: dict[str, int] = {}
    for row, sample_id in enumerate(dataset["sample_id"]):
        if sample_id in first_rows:
            raise ValueError(
                f"data set '{name}', rows {first_rows[sample_id]} and {row}, column 'sample_id': "
                f"both are '{sample_id}'. Give each row its own id, or leave the column out."
            )
        first_rows[sample_id] = row
    # This leaves the images where they are. Casting all columns copies them, which few files need.
    dataset = dataset.cast_column("image", Image())
    return dataset if dataset.features == FEATURES else dataset.cast(FEATURES, keep_in_memory=True)
