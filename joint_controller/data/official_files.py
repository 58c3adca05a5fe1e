"""
Data sets as their authors publish them: JSON files of questions and answers, and folders of images.

The JSON files of VQA v2 take 400 MB. They are read as streams, and their rows written to the cache of `datasets` once.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from string import Formatter
from typing import Any

import ijson
from datasets import Dataset, Features, Image, List, Value
from datasets.exceptions import DatasetGenerationError

from .registry import COCO_2014_VQA, OFFICIAL_ST_QA, OFFICIAL_TALLY_QA, OKVQA, TEXT_VQA, VQADataset


READING_VERSION = 2
"""To be raised when a file is read or checked differently: rows that an earlier version cached are then not reused."""


@dataclass(frozen=True)
class OfficialSplit:
    """The files of one split."""

    entry: VQADataset  # with the columns that the official files have
    records: str  # JSON file of the rows: of questions with their answers, or of the answers alone
    records_key: str  # of the list of rows in it, "" where the file is that list
    image: str  # path of an image, with a field of the row in braces; its first part is a folder
    questions: str | None = None  # JSON file of the questions, where they have one of their own
    optional: tuple[str, ...] = ()  # columns that rows may lack

    @property
    def files(self) -> list[str]:
        """The JSON files."""
        return [self.records] if self.questions is None else [self.questions, self.records]

    @property
    def image_folder(self) -> str | None:
        """The folder of the images, or `None` where rows name it."""
        folder = self.image.split("/")[0]
        return None if "{" in folder else folder

    def describe(self) -> str:
        """Files and folder, for a message."""
        folder = "the image folders" if self.image_folder is None else f"the image folder '{self.image_folder}'"
        return f"{' and '.join(repr(file) for file in self.files)} with {folder}"


@dataclass(frozen=True)
class FoundSplit:
    """The files of one split, found."""

    split: OfficialSplit
    files: tuple[str, ...]  # paths of `split.files`
    places: tuple[str, ...]  # folders that image folders are in


def _coco_split(entry: VQADataset, subset: str, prefix: str) -> OfficialSplit:
    return OfficialSplit(
        entry=entry,
        questions=f"{prefix}OpenEnded_mscoco_{subset}_questions.json",
        records=f"{prefix}mscoco_{subset}_annotations.json",
        records_key="annotations",
        image=f"{subset}/COCO_{subset}_{{image_id:012d}}.jpg",
    )


OFFICIAL_FILES: dict[str, dict[str, OfficialSplit]] = {
    # https://visualqa.org/download.html
    "coco_2014_vqa": {
        "train": _coco_split(COCO_2014_VQA, "train2014", "v2_"),
        "validation": _coco_split(COCO_2014_VQA, "val2014", "v2_"),
    },
    # https://okvqa.allenai.org/download.html
    "okvqa": {
        "train": _coco_split(OKVQA, "train2014", ""),
        "validation": _coco_split(OKVQA, "val2014", ""),
    },
    # https://textvqa.org/dataset/: training and validation images are in one archive.
    "text_vqa": {
        "train": OfficialSplit(TEXT_VQA, "TextVQA_0.5.1_train.json", "data", "train_images/{image_id}.jpg"),
        "validation": OfficialSplit(TEXT_VQA, "TextVQA_0.5.1_val.json", "data", "train_images/{image_id}.jpg"),
    },
    # https://rrc.cvc.uab.es/?ch=11
    "st_qa": {"train": OfficialSplit(OFFICIAL_ST_QA, "train_task_3.json", "data", "{file_path}")},
    # https://github.com/manoja328/TallyQA_dataset
    "tally_qa": {
        "train": OfficialSplit(OFFICIAL_TALLY_QA, "train.json", "", "{image}", optional=("issimple",)),
        "test": OfficialSplit(OFFICIAL_TALLY_QA, "test.json", "", "{image}"),
    },
}
"""Official files by data set and role of the split."""


def find_official_split(name: str, role: str, folder: Path) -> FoundSplit | None:
    """
    Looks for the official files of a data set's split in a folder, in the folders in it, and, for images, in those of a
    folder `images` or `Images`. `None` if there is none of the JSON files; some of the files, but not all, are an error.
    """
    split = OFFICIAL_FILES.get(name, {}).get(role)
    if split is None or not folder.is_dir():
        return None
    places = [folder, *_subfolders(folder)]
    files = [next((place / file for place in places if (place / file).is_file()), None) for file in split.files]
    if not any(files):
        return None
    for place in _subfolders(folder):
        if place.name.lower() == "images":
            places += _subfolders(place)
    missing = [f"file '{file}'" for file, path in zip(split.files, files, strict=True) if path is None]
    if split.image_folder and not any((place / split.image_folder).is_dir() for place in places):
        missing.append(f"folder '{split.image_folder}'")
    if missing:
        raise ValueError(
            f"data set '{name}' in '{folder}' has no {' and no '.join(missing)}, which split '{role}' needs: it was "
            f"looked for there and in {[place.name for place in places[1:]]}."
        )
    return FoundSplit(split, tuple(str(path.resolve()) for path in files), tuple(str(p.resolve()) for p in places))


def _subfolders(folder: Path) -> list[Path]:
    return sorted(place for place in folder.iterdir() if place.is_dir())


def read_official_split(found: FoundSplit) -> Dataset:
    """
    Makes a table of a split's official files, which `datasets` keeps in its cache until a file changes: the columns of
    `found.split.entry`. Images are named in it, not read.
    """
    entry = found.split.entry
    stamps = [(os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in found.files]
    content = repr((entry.name, found.files, found.places, stamps, READING_VERSION))
    try:
        return Dataset.from_generator(
            _iterate_official_split,
            features=Features({**entry.columns, entry.image_column: Image(decode=False)}),
            gen_kwargs={"found": found},
            fingerprint=hashlib.sha256(content.encode()).hexdigest()[:16],
        )
    except DatasetGenerationError as error:
        cause = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"the official files of data set '{entry.name}' cannot be read: {cause}.") from error


def _iterate_official_split(found: FoundSplit) -> Iterator[dict[str, Any]]:
    entry, split = found.split.entry, found.split
    records_file = found.files[-1]
    image_field = next(name for _, name, _, _ in Formatter().parse(split.image) if name)
    questions = None
    if split.questions is not None:
        questions = {
            _field(record, "question_id", found.files[0], row, int): _field(record, "question", found.files[0], row)
            for row, record in enumerate(_iterate_json(found.files[0], "questions"))
        }
    folders: dict[str, list[str]] = {}
    row = -1
    for row, record in enumerate(_iterate_json(records_file, split.records_key)):
        if questions is not None:
            question_id = _field(record, "question_id", records_file, row, int)
            if question_id not in questions:
                raise ValueError(f"'{records_file}', row {row}: '{found.files[0]}' has no question {question_id}")
            record["question"] = questions.pop(question_id)
        for column in split.optional:
            record.setdefault(column, None)
        published = {
            column: _as_published(_field(record, column, records_file, row, _kind(feature)), feature)
            for column, feature in entry.columns.items()
            if column != entry.image_column
        }
        kind = int if f"{{{image_field}:" in split.image else str
        image = split.image.format(**{image_field: _field(record, image_field, records_file, row, kind)})
        if PurePath(image).is_absolute() or ".." in PurePath(image).parts:
            raise ValueError(
                f"'{records_file}', row {row}, field '{image_field}' names the image '{image}': give its path below the "
                "data set's folder"
            )
        folder = image.split("/")[0]
        if folder not in folders:
            folders[folder] = [place for place in found.places if os.path.isdir(os.path.join(place, folder))]
        if not folders[folder]:
            raise ValueError(
                f"'{records_file}', row {row} names the image '{image}', and there is no folder '{folder}' in "
                f"'{found.places[0]}'"
            )
        paths = [os.path.join(place, image) for place in folders[folder]]
        # Whether the one path exists is seen when images are read; of several, it says which one is meant.
        path = paths[0] if len(paths) == 1 else next((path for path in paths if os.path.exists(path)), paths[0])
        yield {**published, entry.image_column: path}
    if row < 0:
        raise ValueError(f"'{records_file}' has no rows" + f" under '{split.records_key}'" * bool(split.records_key))
    if questions:
        raise ValueError(
            f"'{records_file}' has no answers to {len(questions)} questions of '{found.files[0]}', the first of which "
            f"is {next(iter(questions))}"
        )


def _kind(feature: Any) -> type | None:
    """The type of a published column's values in JSON, where only one will do."""
    if isinstance(feature, List):
        return list
    return int if feature.dtype.startswith("int") else None


def _as_published(value: Any, feature: Any) -> Any:
    """As the repository on the Hub has it: OK-VQA's answers are strings there, and its question ids too."""
    if feature == List(Value("string")):
        return [item["answer"] if isinstance(item, dict) else item for item in value]
    return str(value) if feature == Value("string") and value is not None else value


def _iterate_json(file: str, key: str) -> Iterator[dict[str, Any]]:
    """Items of a list in a JSON file, one at a time."""
    with open(file, "rb") as opened:
        try:
            yield from ijson.items(opened, f"{key}.item" if key else "item", use_float=True)
        except ijson.JSONError as error:
            raise ValueError(f"'{file}' is not a whole JSON file ({error})") from error


def _field(record: dict[str, Any], field: str, file: str, row: int, kind: type | None = None) -> Any:
    """A field of a record, which must have it, of a type if one is given."""
    if field not in record:
        raise ValueError(f"'{file}', row {row} has no '{field}' (it has {sorted(record)})")
    value = record[field]
    if kind is not None and type(value) is not kind:
        expected = {int: "a whole number", str: "a string", list: "a list"}[kind]
        raise ValueError(f"'{file}', row {row}, field '{field}' is {value!r}, which is not {expected}")
    return value
