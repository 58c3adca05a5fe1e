"""
The published data sets that are known by name: where they are, what their columns hold, and how a published row
becomes one of ours.

Schemas and splits are those of the data set cards on the Hub (`dataset_info` of each repository's README.md). Two of
them could be read from code that uses the repository only, see `ST_QA` and `TALLY_QA`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from datasets import Features, Image, List, Value


@dataclass(frozen=True)
class VQADataset:
    """
    One published data set.

    Args:
        name (`str`):
            The name that recipes use. Sample ids start with it.
        repository (`str`):
            Repository on the Hub that is read when the bare name is asked for.
        splits (`Mapping[str, str]`):
            Published splits: their role (`"train"`, `"validation"`, `"test"` or a further one) and their published
            name, which is the middle part of sample ids.
        columns (`datasets.Features`):
            The published columns that are read, with their published types. Others are left alone.
        convert (`Callable[[Mapping, int], dict]`):
            Takes a published row without its images and its number in the split. Returns `id` (unique in the split),
            `question`, `answers`, and, where they differ from the defaults, `question_type`, `style`, `metric`,
            `image_key` (names the row's image; by default the image's bytes tell) and `defect` (why the row cannot be
            used).
        style (`str`):
            Style of the prompts, as Molmo was trained with.
        metric (`str`):
            The metric that the field reports.
        configuration (`str`, *optional*):
            Configuration of the repository, where it has several. Also the folder of its Parquet files.
        image_column (`str`, *optional*, defaults to `"image"`):
            Column of the image.
        questions_column (`str`, *optional*):
            Column of a list of questions on the row's image, each of which becomes a row, where there is one.
        unlabelled (`tuple[str, ...]`, *optional*, defaults to `()`):
            Roles of the splits that were published without answers.
        not_on_hub (`tuple[str, ...]`, *optional*, defaults to `()`):
            Roles of the splits that the official files have and the repository does not.
    """

    name: str
    repository: str
    splits: Mapping[str, str]
    columns: Features
    convert: Callable[[Mapping[str, Any], int], dict[str, Any]]
    style: str
    metric: str
    configuration: str | None = None
    image_column: str = "image"
    questions_column: str | None = None
    unlabelled: tuple[str, ...] = ()
    not_on_hub: tuple[str, ...] = ()
    text_columns: tuple[str, ...] = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "text_columns", tuple(name for name in self.columns if name != self.image_column))


# ---- answer formats -------------------------------------------------------------------------------------------------


def render_choices(question: str, choices: list[str]) -> str:
    """The question with its choices below it, one a line: "A. first", "B. second"."""
    lines = [question, *(f"{letter(index)}. {choice}" for index, choice in enumerate(choices))]
    return "\n".join(lines)


def letter(index: int) -> str:
    """The letter of a choice: 0 is A."""
    return chr(ord("A") + index)


def _convert_text_vqa(row: Mapping[str, Any], number: int) -> dict[str, Any]:
    return {
        "id": row["question_id"],
        "image_key": row["image_id"],
        "question": row["question"],
        "answers": row["answers"],
    }


def _convert_coco_2014_vqa(row: Mapping[str, Any], number: int) -> dict[str, Any]:
    return {
        "id": row["question_id"],
        "image_key": str(row["image_id"]),
        "question": row["question"],
        "answers": [answer["answer"] for answer in row["answers"] or []],
        "question_type": row["question_type"],
    }


TEXT_VQA = VQADataset(
    name="text_vqa",
    repository="lmms-lab/textvqa",
    splits={"train": "train", "validation": "validation", "test": "test"},
    unlabelled=("test",),
    columns=Features(
        {
            "image_id": Value("string"),
            "question_id": Value("int32"),
            "question": Value("string"),
            "image": Image(),
            "answers": List(Value("string")),
        }
    ),
    convert=_convert_text_vqa,
    style="text_vqa",
    metric="vqa_accuracy",
)

COCO_2014_VQA = VQADataset(
    name="coco_2014_vqa",
    repository="lmms-lab/VQAv2",
    splits={"train": "train", "validation": "validation", "testdev": "testdev", "test": "test"},
    unlabelled=("testdev", "test"),
    not_on_hub=("train",),
    columns=Features(
        {
            "question_type": Value("string"),
            "answers": List(
                {"answer": Value("string"), "answer_confidence": Value("string"), "answer_id": Value("int64")}
            ),
            "image_id": Value("int64"),
            "question_id": Value("int64"),
            "question": Value("string"),
            "image": Image(),
        }
    ),
    convert=_convert_coco_2014_vqa,
    style="vqa2",
    metric="vqa_accuracy",
)

VQA_DATASETS: dict[str, VQADataset] = {entry.name: entry for entry in (TEXT_VQA, COCO_2014_VQA)}
"""The published data sets by name."""
