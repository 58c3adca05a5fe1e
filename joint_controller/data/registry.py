"""
The published data sets that are known by name: where they are, what their columns hold, and how a published row
becomes one of ours.

Columns, their types and the splits are those of the data set cards on the Hub (`dataset_info` in each repository's
README.md), but for two whose cards could not be read: see `ST_QA` and `TALLY_QA`. Prompt styles are named after the data
sets that executors learn them from.
"""

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from datasets import Features, Image, List, Value


STRING, INT64 = Value("string"), Value("int64")
STRINGS = List(STRING)


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
        convert (`Callable[[Mapping, int | str], dict]`):
            Takes a published row without its image and its number in the split. Returns `id` (unique in the split),
            `question`, `answers`, and, where they differ from the defaults, `question_type`, `style`, `metric`,
            `image_key` (what names the row's image; by default the image's bytes do) and `defect` (column and cause,
            "image: it is ...", of a row that cannot be used).
        style, metric (`str`):
            Style of the prompts, and the metric that the field reports.
        configuration (`str`, *optional*):
            Configuration of the repository, where it has several. Its Parquet files are in a folder of that name.
        image_column (`str`, *optional*, defaults to `"image"`):
            Column of the image.
        questions_column (`str`, *optional*):
            Column of a list of questions on the row's image, each of which becomes a row. By default a row is one
            question.
        unlabelled, not_on_hub (`tuple[str, ...]`, *optional*, default to `()`):
            Roles of the splits that were published without answers, and of those that only the official files have.
        elsewhere (`Mapping[str, str]`, *optional*, defaults to `{}`):
            Roles of the splits that another repository has, of the same schema and without configurations, and that
            repository.
    """

    name: str
    repository: str
    splits: Mapping[str, str]
    columns: Features
    convert: Callable[[Mapping[str, Any], int | str], dict[str, Any]]
    style: str
    metric: str
    configuration: str | None = None
    image_column: str = "image"
    questions_column: str | None = None
    unlabelled: tuple[str, ...] = ()
    not_on_hub: tuple[str, ...] = ()
    elsewhere: Mapping[str, str] = field(default_factory=dict)

    @property
    def text_columns(self) -> list[str]:
        """The columns that are read, but the image."""
        return [name for name in self.columns if name != self.image_column]


def render_choices(question: str, choices: Sequence[str]) -> str:
    """The question with its choices below it, one a line: "A. first", "B. second"."""
    return "\n".join([question, *(f"{_letter(index)}. {choice}" for index, choice in enumerate(choices))])


def _letter(index: int) -> str:
    return chr(ord("A") + index)


def _take(row: Mapping[str, Any], number: int | str, **columns: str) -> dict[str, Any]:
    """A published row whose columns, here given by name of ours, are taken as they are."""
    return {name: row[column] for name, column in columns.items()}


# ---- ten answers a question -----------------------------------------------------------------------------------------

TEXT_VQA = VQADataset(
    name="text_vqa",
    repository="lmms-lab/textvqa",
    splits={"train": "train", "validation": "validation", "test": "test"},
    unlabelled=("test",),
    columns=Features(
        {"image_id": STRING, "question_id": Value("int32"), "question": STRING, "image": Image(), "answers": STRINGS}
    ),
    convert=partial(_take, id="question_id", image_key="image_id", question="question", answers="answers"),
    style="text_vqa",
    metric="vqa_accuracy",
)


def _convert_coco_2014_vqa(row: Mapping[str, Any], number: int | str) -> dict[str, Any]:
    return {
        "id": row["question_id"],
        "image_key": str(row["image_id"]),
        "question": row["question"],
        "answers": [answer["answer"] for answer in row["answers"] or []],
        "question_type": row["question_type"],
    }


COCO_2014_VQA = VQADataset(
    name="coco_2014_vqa",
    repository="lmms-lab/VQAv2",
    splits={"train": "train", "validation": "validation", "testdev": "testdev", "test": "test"},
    unlabelled=("testdev", "test"),
    not_on_hub=("train",),
    columns=Features(
        {
            **dict.fromkeys(("image_id", "question_id"), INT64),
            **dict.fromkeys(("question", "question_type"), STRING),
            "image": Image(),
            "answers": List({"answer": STRING, "answer_confidence": STRING, "answer_id": INT64}),
        }
    ),
    convert=_convert_coco_2014_vqa,
    style="vqa2",
    metric="vqa_accuracy",
)


def _convert_okvqa(row: Mapping[str, Any], number: int | str) -> dict[str, Any]:
    # OK-VQA's question ids are the COCO image's id with one more digit.
    taken = {column: row[column] for column in ("question", "answers", "question_type")}
    return {**taken, "id": row["question_id"], "image_key": row["question_id"][:-1]}


OKVQA = VQADataset(
    name="okvqa",
    repository="lmms-lab/OK-VQA",
    splits={"train": "train2014", "validation": "val2014"},
    not_on_hub=("train",),
    columns=Features(
        {"question_id": STRING, "image": Image(), "question": STRING, "answers": STRINGS, "question_type": STRING}
    ),
    convert=_convert_okvqa,
    style="okvqa",
    metric="vqa_accuracy",
)


# ---- captions -------------------------------------------------------------------------------------------------------


def _convert_coco_caption(row: Mapping[str, Any], number: int | str) -> dict[str, Any]:
    # An id is the name of the image's file.
    taken = _take(row, number, id="question_id", image_key="question_id", question="question", answers="answer")
    return {**taken, "question_type": "caption"}


COCO_CAPTION = VQADataset(
    name="coco_caption",
    repository="lmms-lab/COCO-Caption",
    splits={"validation": "val", "test": "test"},
    unlabelled=("test",),
    columns=Features({"question_id": STRING, "image": Image(), "question": STRING, "answer": STRINGS}),
    convert=_convert_coco_caption,
    style="coco_captioning",
    metric="cider",
)


# ---- one answer, or a few that are all right ------------------------------------------------------------------------


def _convert_doc_qa(row: Mapping[str, Any], number: int | str) -> dict[str, Any]:
    return {
        "id": row["questionId"],
        # All pages of a document are on one side.
        "image_key": row["ucsf_document_id"],
        "question": row["question"],
        "answers": row["answers"],
        "question_type": "/".join(row["question_types"] or []),
    }


DOC_QA = VQADataset(
    name="doc_qa",
    repository="lmms-lab/DocVQA",
    configuration="DocVQA",
    splits={"train": "train", "validation": "validation", "test": "test"},
    unlabelled=("test",),
    elsewhere={"train": "HuggingFaceM4/DocumentVQA"},
    columns=Features(
        {
            **dict.fromkeys(("questionId", "question", "ucsf_document_id"), STRING),
            "image": Image(),
            "question_types": STRINGS,
            "answers": STRINGS,
        }
    ),
    convert=_convert_doc_qa,
    style="doc_qa",
    metric="anls",
)


ST_QA = VQADataset(
    name="st_qa",
    # It has the test split of task 3 alone, which has no answers. Its card could not be read: these columns are those
    # that lmms-eval's task `stvqa` uses, and `answers`, which the official files have.
    repository="lmms-lab/ST-VQA",
    splits={"train": "train", "test": "test"},
    unlabelled=("test",),
    not_on_hub=("train",),
    columns=Features({"question_id": STRING, "question": STRING, "image": Image(), "answers": STRINGS}),
    convert=partial(_take, id="question_id", question="question", answers="answers"),
    style="st_qa",
    metric="anls",
)


OFFICIAL_ST_QA = replace(
    ST_QA,
    columns=Features({**ST_QA.columns, "file_path": STRING}),
    convert=partial(ST_QA.convert, image_key="file_path"),
)
"""As in the official JSON files."""


# ---- counts ---------------------------------------------------------------------------------------------------------


def _convert_tally_qa(row: Mapping[str, Any], number: int | str) -> dict[str, Any]:
    return {
        "id": number,
        "question": row["question"],
        "answers": [] if row["answer"] is None else [str(row["answer"])],
        "question_type": "simple" if row["is_simple"] else "complex",
    }


TALLY_QA = VQADataset(
    name="tally_qa",
    # lmms-lab has none. This one holds the test split, a row being an image with its questions. Its card could not be
    # read: the columns are those that Moondream's evaluation uses.
    repository="vikhyatk/tallyqa-test",
    splits={"train": "train", "test": "test"},
    not_on_hub=("train",),
    questions_column="qa",
    columns=Features(
        {"image": Image(), "qa": List({"question": STRING, "answer": INT64, "is_simple": Value("bool")})}
    ),
    convert=_convert_tally_qa,
    style="tally_qa",
    metric="exact_count",
)


def _convert_official_tally_qa(row: Mapping[str, Any], number: int | str) -> dict[str, Any]:
    return {
        "id": row["question_id"],
        "image_key": str(row["image_id"]),
        "question": row["question"],
        "answers": [str(row["answer"])],
        # Training questions were not told apart.
        "question_type": {True: "simple", False: "complex", None: None}[row["issimple"]],
    }


OFFICIAL_TALLY_QA = replace(
    TALLY_QA,
    questions_column=None,
    columns=Features(
        {
            **dict.fromkeys(("image_id", "question_id", "answer"), INT64),
            "image": Image(),
            "question": STRING,
            "issimple": Value("bool"),
        }
    ),
    convert=_convert_official_tally_qa,
)
"""As in the official JSON files."""


# ---- multiple choice ------------------------------------------------------------------------------------------------


def _convert_science_qa_img(row: Mapping[str, Any], number: int | str) -> dict[str, Any]:
    choices = row["choices"] or []
    converted = {
        # The card has no ids.
        "id": f"{number:06d}",
        # The hint, which the question may refer to, goes above it.
        "question": render_choices("\n".join(text for text in (row["hint"], row["question"]) if text), choices),
        "answers": [],
        "question_type": row["subject"],
    }
    if row["answer"] is not None:
        answer = int(row["answer"])
        if 0 <= answer < len(choices):
            converted["answers"] = [_letter(answer), choices[answer]]
        else:
            converted["defect"] = f"answers: the right choice is number {answer} of {len(choices)}, counted from 0"
    return converted


SCIENCE_QA_IMG = VQADataset(
    name="science_qa_img",
    repository="lmms-lab/ScienceQA",
    configuration="ScienceQA-IMG",
    splits={"train": "train", "validation": "validation", "test": "test"},
    elsewhere={"train": "lmms-lab/ScienceQA-IMG"},
    columns=Features(
        {
            **dict.fromkeys(("question", "hint", "subject"), STRING),
            "image": Image(),
            "choices": STRINGS,
            "answer": Value("int8"),
        }
    ),
    convert=_convert_science_qa_img,
    style="science_qa",
    metric="multiple_choice",
)

_MMMU_IMAGE = re.compile(r"<image (\d+)>")


def _convert_mmmu(row: Mapping[str, Any], number: int | str) -> dict[str, Any]:
    """
    Questions and options name their images as "<image 1>". An executor gets one image, before the question: a row that
    names another one cannot be used. The name of the one image is left out at either end of a text, and is
    "the image" elsewhere.
    """
    converted = {"id": row["id"], "image_key": row["id"], "question": row["question"], "answers": []}
    converted["question_type"] = row["question_type"]
    is_open = row["question_type"] == "open"
    try:
        # A Python list, written as a string.
        options = [] if is_open else _parse_list(row["options"])
        answers = _parse_list(row["answer"]) if is_open and row["answer"].startswith("[") else [row["answer"]]
    except ValueError:
        return {**converted, "defect": f"question: its options are not a list ({row['options']})"}
    images = sorted({int(image) for text in (row["question"], *options) for image in _MMMU_IMAGE.findall(text)})
    if images not in ([], [1]):
        names = ", ".join(f"image_{image}" for image in images)
        converted["defect"] = f"image: the question is on {names}, and one image, image_1, is what can be shown"
    question = _leave_out_image_names(row["question"])
    if is_open:
        return {**converted, "question": question, "answers": answers, "style": "vqa2", "metric": "exact_match"}
    options = [_leave_out_image_names(option) for option in options]
    letters = [_letter(index) for index in range(len(options))]
    if row["answer"] in letters:
        converted["answers"] = [row["answer"], options[letters.index(row["answer"])]]
    # The test split's answers are "?".
    elif row["answer"] not in ("", "?"):
        converted.setdefault("defect", f"answers: the right choice is '{row['answer']}' of {letters}")
    return {**converted, "question": render_choices(question, options)}


def _parse_list(text: str) -> list[str]:
    try:
        values = ast.literal_eval(text)
    except SyntaxError as error:
        raise ValueError(f"'{text}' is not Python.") from error
    if not isinstance(values, list):
        raise ValueError(f"'{text}' is not a list.")
    return [str(value) for value in values]


def _leave_out_image_names(text: str) -> str:
    text = re.sub(r"^(\s*<image 1>)+\s*|\s*(<image 1>\s*)+$", "", text)
    return text.replace("<image 1>", "the image")


MMMU = VQADataset(
    name="mmmu",
    repository="lmms-lab/MMMU",
    splits={"dev": "dev", "validation": "validation", "test": "test"},
    unlabelled=("test",),
    image_column="image_1",
    columns=Features(
        {**dict.fromkeys(("id", "question", "options", "answer", "question_type"), STRING), "image_1": Image()}
    ),
    convert=_convert_mmmu,
    style="a_okvqa_mc",
    metric="multiple_choice",
)

VQA_DATASETS: dict[str, VQADataset] = {
    entry.name: entry
    for entry in (TEXT_VQA, COCO_2014_VQA, OKVQA, COCO_CAPTION, TALLY_QA, DOC_QA, SCIENCE_QA_IMG, ST_QA, MMMU)
}
"""The published data sets by name."""
