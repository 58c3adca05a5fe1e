"""
Data sets as their authors publish them: JSON files of questions and answers, and folders of images.

A JSON file of VQA v2 has 400 MB; it is read as a stream, and its rows are written to the cache of `datasets` once.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ijson
from datasets import Dataset, Features, Image
from datasets.exceptions import DatasetGenerationError

from .registry import VQA_DATASETS


READING_VERSION = 1
"""Raise it when a file's rows become others than before, so that no cached ones are taken for them."""


@dataclass(frozen=True)
class OfficialSplit:
    """
    The files of one split.

    Args:
        records (`str`):
            JSON file of the rows: of questions with answers, or of the answers alone.
        records_key (`str`):
            Key of the list of rows in it, or `""` if the file is that list.
        image_folder (`str`):
            Folder of the images.
        image_file (`str`):
            File of an image in it, with the row's fields in braces.
        questions (`str`, *optional*):
            JSON file of the questions, where they have one of their own.
    """

    records: str
    records_key: str
    image_folder: str
    image_file: str
    questions: str | None = None

    def describe(self) -> str:
        """The files and the folder, for a message."""
        files = [self.questions, self.records] if self.questions else [self.records]
        return " and ".join(f"'{file}'" for file in files) + f" with the images in '{self.image_folder}/'"


def _coco_split(subset: str, prefix: str) -> OfficialSplit:
    return OfficialSplit(
        questions=f"{prefix}OpenEnded_mscoco_{subset}_questions.json",
        records=f"{prefix}mscoco_{subset}_annotations.json",
        records_key="annotations",
        image_folder=subset,
        image_file=f"COCO_{subset}_{{image_id:012d}}.jpg",
    )


OFFICIAL_FILES: dict[str, dict[str, OfficialSplit]] = {
    # https://visualqa.org/download.html
    "coco_2014_vqa": {
        "train": _coco_split("train2014", "v2_"),
        "validation": _coco_split("val2014", "v2_"),
    },
    # https://okvqa.allenai.org/download.html
    "okvqa": {
        "train": _coco_split("train2014", ""),
        "validation": _coco_split("val2014", ""),
    },
    # https://textvqa.org/dataset: the validation split's images are in the folder of the training split's.
    "text_vqa": {
        "train": OfficialSplit("TextVQA_0.5.1_train.json", "data", "train_images", "{image_id}.jpg"),
        "validation": OfficialSplit("TextVQA_0.5.1_val.json", "data", "train_images", "{image_id}.jpg"),
    },
}
"""Official files by data set and split."""


def find_official_splits(name: str, folder: Path) -> dict[str, tuple[OfficialSplit, dict[str, Path]]]:
    """
    Looks for the official files of a data set in a folder and in the folders in it.

    Args:
        name (`str`):
            Name of the data set.
        folder (`Path`):
            Where to look.

    Returns:
        `dict[str, tuple[OfficialSplit, dict[str, Path]]]`: Splits of which all files are there, with their paths by field
        of [`OfficialSplit`].

    Raises:
        ValueError: If a split's questions, answers and images are not all there.
    """
    if name not in OFFICIAL_FILES or not folder.is_dir():
        return {}
    places = [folder, *sorted(place for place in folder.iterdir() if place.is_dir())]
    found = {}
    for role, split in OFFICIAL_FILES[name].items():
        wanted = {"records": split.records, "image_folder": split.image_folder}
        if split.questions:
            wanted["questions"] = split.questions
        paths = {
            field: path
            for field, file in wanted.items()
            if (path := next((place / file for place in places if (place / file).exists()), None))
        }
        if not paths.keys() - {"image_folder"}:
            continue
        for field, file in wanted.items():
            if field not in paths:
                kind = "folder" if field == "image_folder" else "file"
                raise ValueError(
                    f"data set '{name}' in '{folder}' has no {kind} '{file}', which its split '{role}' needs: put it there "
                    "or into a folder there."
                )
        found[role] = (split, paths)
    return found


def read_official_files(name: str, found: tuple[OfficialSplit, dict[str, Path]]) -> Dataset:
    """
    Makes a table of a split's official files, with the columns of the repository on the Hub. It is kept in the cache of
    `datasets` until a file changes. Images are named in it, not read.

    Args:
        name (`str`):
            Name of the data set.
        found (`tuple[OfficialSplit, dict[str, Path]]`):
            Files of the split, as of [`find_official_splits`].

    Raises:
        ValueError: If a file is not what was published.
    """
    split, paths = found
    entry = VQA_DATASETS[name]
    files = {field: str(path.resolve()) for field, path in paths.items()}
    stamps = {
        field: (os.stat(file).st_size, os.stat(file).st_mtime_ns)
        for field, file in files.items()
        if field != "image_folder"
    }
    features = Features({**entry.columns, entry.image_column: Image(decode=False)})
    try:
        return Dataset.from_generator(
            _iterate_official_files,
            features=features,
            gen_kwargs={
                "name": name,
                "split": split,
                "files": files,
                "stamps": stamps,
                "version": READING_VERSION,
            },
        )
    except DatasetGenerationError as error:
        cause = error.__cause__ if error.__cause__ is not None else error
        raise ValueError(
            f"the official files of data set '{name}' in '{paths['records'].parent}' cannot be read "
            f"({' '.join(str(cause).split())})."
        ) from error


def _iterate_official_files(
    name: str, split: OfficialSplit, files: dict[str, str], stamps: dict[str, tuple[int, int]], version: int
) -> Iterator[dict[str, Any]]:
    entry = VQA_DATASETS[name]
    questions = {}
    if split.questions:
        for number, record in enumerate(_iterate_json(files["questions"], "questions")):
            questions[_get(record, "question_id", files["questions"], number)] = _get(
                record, "question", files["questions"], number
            )
    number = -1
    for number, record in enumerate(_iterate_json(files["records"], split.records_key)):
        if split.questions:
            question_id = _get(record, "question_id", files["records"], number)
            if question_id not in questions:
                raise ValueError(
                    f"'{files['records']}', row {number}: '{files['questions']}' has no question {question_id}"
                )
            record["question"] = questions.pop(question_id)
        image_file = split.image_file.format(**record)
        row = {
            column: _get(record, column, files["records"], number)
            for column in entry.columns
            if column != entry.image_column
        }
        yield {**row, entry.image_column: os.path.join(files["image_folder"], image_file)}
    if number < 0:
        raise ValueError(f"'{files['records']}' has no rows under '{split.records_key}'")
    if questions:
        raise ValueError(
            f"'{files['records']}' has no answers for {len(questions)} questions of '{files['questions']}', the first of "
            f"them {next(iter(questions))}"
        )


def _iterate_json(file: str, key: str) -> Iterator[dict[str, Any]]:
    """Items of a list in a JSON file, one at a time."""
    with open(file, "rb") as opened:
        try:
            yield from ijson.items(opened, f"{key}.item" if key else "item", use_float=True)
        except ijson.JSONError as error:
            raise ValueError(f"'{file}' is no whole JSON file: {error}") from error


def _get(record: dict[str, Any], field: str, file: str, number: int) -> Any:
    if field not in record:
        raise ValueError(f"'{file}', row {number} has no '{field}' (it has {sorted(record)})")
    return record[field]
