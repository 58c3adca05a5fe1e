"""The checks that a row must pass before it is trained on, and the list of the rows that did not."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, Value
from datasets.fingerprint import Hasher

from .images import MAX_IMAGE_PIXELS, MIN_IMAGE_SIDE, ImageError, check_image
from .schema import FEATURES, cache_folder


CHECKS_VERSION = 1
"""To be raised when a check changes: what an earlier version found is then not reused."""

CHECK_BATCH_SIZE = 64
"""Rows that are in memory while they are checked."""


@dataclass(frozen=True)
class BadRow:
    """
    A row that cannot be used.

    Args:
        dataset, split (`str`):
            Name or path of its data set, and its split.
        row (`int`), sample_id (`str` or `None`):
            Its number in the whole split, counted from 0, and its id.
        column, cause (`str`):
            The column that is at fault, and what is wrong.
    """

    dataset: str
    split: str
    row: int
    sample_id: str | None
    column: str
    cause: str

    def __str__(self) -> str:
        return (
            f"data set '{self.dataset}', row {self.row} (sample '{self.sample_id}') of '{self.split}', column "
            f"'{self.column}': {self.cause}"
        )


class SkippedRows:
    """
    Rows that were left out, counted, and listed in a file: a JSON object a line, with the fields of [`BadRow`].

    A row that is met again, in another pass over a stream or in a resumed run, is listed once. What an earlier run listed of
    a data set and split is forgotten when a later one loads it anew.

    Args:
        path (`str` or `Path`, *optional*):
            The file, made (with its folder) when the first row is left out. Without one, rows are only counted, as all
            processes of a run but the main one must.
    """

    def __init__(self, path: str | Path | None = None):
        self.path = None if path is None else Path(path)
        self._rows: set[BadRow] = set()
        self._of_earlier_runs: set[BadRow] = set()
        if self.path is not None and self.path.exists():
            with open(self.path, encoding="utf-8") as file:
                self._of_earlier_runs.update(BadRow(**json.loads(line)) for line in file)
            self._rows |= self._of_earlier_runs

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[BadRow]:
        return iter(sorted(self._rows, key=lambda bad: (bad.dataset, bad.split, bad.row)))

    def counts(self) -> dict[tuple[str, str], int]:
        """Rows left out of each data set and split."""
        return dict(Counter((bad.dataset, bad.split) for bad in self))

    def summary(self) -> str:
        """What was left out, in words, for a log."""
        parts = [f"{count} of '{dataset}' ({split})" for (dataset, split), count in self.counts().items()]
        listed = "" if self.path is None else f" They are listed in '{self.path}'."
        return f"Bad rows left out: {', '.join(parts)}.{listed}"

    def forget(self, dataset: str, split: str) -> None:
        """Takes what earlier runs found in a data set's split off the list: it is about to be read again."""
        forgotten = {bad for bad in self._of_earlier_runs if (bad.dataset, bad.split) == (dataset, split)}
        if forgotten:
            self._of_earlier_runs -= forgotten
            self._rows -= forgotten
            if self.path is not None:
                lines = [json.dumps(asdict(bad)) + "\n" for bad in self]
                self.path.write_text("".join(lines), encoding="utf-8")

    def add(self, bad: BadRow) -> None:
        """Lists a row."""
        if bad in self._rows:
            return
        self._rows.add(bad)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(bad)) + "\n")


def find_fault(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """
    The column and the cause that keep a row from being used, or `None` if it is good. The row has the columns of
    `ENCODED_FEATURES`, and perhaps `defect`: column and cause, "image: it is ...", of one found to be bad when it was read.
    """
    if row.get("defect") is not None:
        column, _, cause = row["defect"].partition(": ")
        return column, cause
    if row["sample_id"] is None or not row["sample_id"].strip():
        return "sample_id", "it is empty"
    if row["question"] is None or not row["question"].strip():
        return "question", "the question is empty"
    if not row["answers"]:
        return "answers", "there are none"
    if any(answer is None for answer in row["answers"]):
        return "answers", f"an answer is missing in {row['answers']}"
    # One of ten people may have written nothing, and counts in the published metrics like the others.
    if not any(answer.strip() for answer in row["answers"]):
        return "answers", "all are empty"
    try:
        check_image(row["image"])
    except ImageError as error:
        return "image", str(error)
    return None


def keep_good_rows(
    dataset: Dataset,
    name: str,
    split: str,
    rows: Sequence[int] | None = None,
    skipped: SkippedRows | None = None,
) -> Dataset:
    """
    Reads every row once, images included, so that nothing fails in the middle of a run. Images are decoded in threads and
    not kept. What was found is kept in the cache of `datasets`, so that the next start with the same rows takes no time.

    Args:
        dataset (`datasets.Dataset`):
            A data set with the columns of `FEATURES`, and perhaps `defect` (see [`find_fault`]).
        name, split (`str`):
            Name of the data set and its split, in messages.
        rows (`Sequence[int]`, *optional*):
            Numbers that the rows had in the file they come from, by default those of `dataset`.
        skipped ([`SkippedRows`], *optional*):
            Where bad rows are listed. By default they are an error.

    Returns:
        `datasets.Dataset`: The good rows, in order, with the columns of `FEATURES`.

    Raises:
        ValueError: If a row has no question, no answer that is not empty, or an image that cannot be used, and bad rows are
            not to be skipped; or if no row is good. The message names data set, row, column and cause.
    """
    encoded = dataset.cast_column("image", Image(decode=False))
    faults = encoded.map(
        _find_faults,
        batched=True,
        batch_size=CHECK_BATCH_SIZE,
        remove_columns=encoded.column_names,
        features=Features({"column": Value("string"), "cause": Value("string")}),
        cache_file_name=str(_cache_file(encoded)),
        desc=f"Checking '{name}' ({split})",
    )
    dataset = dataset.select_columns(list(FEATURES))
    columns, causes = faults["column"][:], faults["cause"][:]
    bad_positions = [position for position, column in enumerate(columns) if column is not None]
    if not bad_positions:
        return dataset
    sample_ids = dataset["sample_id"]
    numbers = range(len(dataset)) if rows is None else rows
    bad_rows = [BadRow(name, split, numbers[at], sample_ids[at], columns[at], causes[at]) for at in bad_positions]
    if skipped is None:
        raise ValueError(f"{refusal(bad_rows[0])} ({len(bad_rows)} of {len(dataset)} rows are bad.)")
    for bad in bad_rows:
        skipped.add(bad)
    if len(bad_rows) == len(dataset):
        raise ValueError(f"data set '{name}' has no good row in '{split}'; the first is bad: {bad_rows[0]}.")
    return dataset.select([position for position, column in enumerate(columns) if column is None])


def refusal(bad: BadRow) -> str:
    """The message of the error that a bad row is by default."""
    return f"{bad}. Repair or remove the row, or leave such rows out with `skip_bad_rows: true`."


def _find_faults(batch: Mapping[str, list[Any]]) -> dict[str, list[str | None]]:
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        columns, causes = zip(*(fault or (None, None) for fault in pool.map(find_fault, rows)), strict=True)
    return {"column": list(columns), "cause": list(causes)}


def _cache_file(encoded: Dataset) -> Path:
    """Where the faults of these rows are kept."""
    hasher = Hasher()
    hasher.update((encoded._fingerprint, CHECKS_VERSION, MIN_IMAGE_SIDE, MAX_IMAGE_PIXELS))
    # The fingerprint says how the table was made. The files that it is in, and those of images that it only names, may
    # have been repaired, damaged or lost since.
    paths = {path for path in encoded.with_format(None).flatten()["image.path"][:] if path is not None}
    for path in [*sorted(paths), *(file["filename"] for file in encoded.cache_files)]:
        try:
            status = os.stat(path)
        except OSError:
            # A name that came with embedded bytes, or a missing file, which is found when the row is checked.
            hasher.update((path, None))
        else:
            hasher.update((path, status.st_size, status.st_mtime_ns))
    return cache_folder() / f"row-checks-{hasher.hexdigest()}.arrow"
