"""What a recipe trains on, as tables: for a terminal, as Markdown and as JSON."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from .contact_sheet import format_answers
from .row_checks import SkippedRows
from .statistics import DatasetStatistics


GROUP_COLUMNS = ["data set", "split"]
TOO_LONG = "too long"
TEXT_COLUMNS = ("sample", "question", "answers", "most frequent", "cause")
"""Columns whose cells are text even if they begin with a digit."""

MAX_VALUES = 10
"""Answers and question types that a table lists, the most frequent ones."""
MAX_NAMED_ROWS = 10
"""Rows that a table names, of those that are left out or too long."""
MAX_VALUE_LENGTH, MAX_TEXT_LENGTH = 32, 240
"""Characters of an answer in a list, and of a text in the examples."""
MAX_UNBROKEN = 14
"""Characters of a word that a narrow terminal leaves on one line."""
MAX_WRITTEN_VALUES = 100
"""Answers in JSON, the most frequent ones."""


@dataclass(frozen=True)
class DataPart:
    """The samples of one data set and split that a recipe uses in one role: `"train"`, `"validation"` or `"test"`."""

    name: str
    split: str
    role: str
    statistics: DatasetStatistics


@dataclass
class ReportTable:
    """A table of text. Where its columns begin with `GROUP_COLUMNS`, a terminal shows data sets as groups."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""

    def to_rich(self) -> Table:
        """The table for a terminal."""
        shown = Table(
            title=f"[bold not italic]{escape(self.title)}[/]",
            caption=f"[not italic]{escape(self.note)}[/]" if self.note else None,
            title_justify="left",
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            pad_edge=False,
        )
        columns, rows = self.columns, self.rows
        if self.columns[:2] == GROUP_COLUMNS:
            # A data set's name goes above its splits: a narrow terminal needs the column.
            columns, rows = ["", *self.columns[2:]], [[f"  {row[1]}", *row[2:]] for row in self.rows]
        for column, cells in zip(columns, zip(*rows, strict=True), strict=True):
            is_number = column not in TEXT_COLUMNS and all(cell[:1].isdigit() for cell in cells)
            words = (word for cell in cells for word in [cell, *cell.split()] if len(word) <= MAX_UNBROKEN)
            shown.add_column(
                column,
                justify="right" if is_number else "left",
                no_wrap=is_number,
                min_width=max(map(len, words), default=0),
                overflow="fold",
            )
        group = None
        for whole_row, row in zip(self.rows, rows, strict=True):
            if row is not whole_row:
                if group is None or group[0] != whole_row[0]:
                    shown.add_row(f"[bold]{escape(whole_row[0])}[/]")
                if group == whole_row[:2]:
                    row = ["", *row[1:]]
                group = whole_row[:2]
            shown.add_row(*map(escape, row), style="red" if TOO_LONG in row else None)
        return shown

    def to_markdown(self) -> str:
        """The table as a section of a Markdown file."""

        def line(cells: Iterable[str]) -> str:
            return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"

        lines = [line(self.columns), line("---" for _ in self.columns), *map(line, self.rows)]
        return "\n\n".join([f"## {self.title}", "\n".join(lines), *([self.note] if self.note else [])])


def make_tables(
    parts: Sequence[DataPart],
    examples: Sequence[Mapping[str, Any]],
    max_prompt_tokens: int,
    skipped_rows: SkippedRows | None = None,
) -> list[ReportTable]:
    """Tables of what a recipe trains on, data set after data set, of some rows of it, and of the rows that were left out."""
    tables = [
        _samples_table(parts, skipped_rows),
        _images_table(parts),
        _inputs_table(parts, max_prompt_tokens),
        _values_table("Answers: of several references, the most frequent one", parts, "answers", "answer_words"),
        _values_table("Question types, and words of a question", parts, "question_types", "question_words"),
        _examples_table(examples),
    ]
    return [*tables, _skipped_table(skipped_rows)] if skipped_rows else tables


def to_json(part: DataPart) -> dict[str, Any]:
    """A part's numbers, for a JSON file."""
    statistics = part.statistics
    return {
        "name": part.name,
        "split": part.split,
        "role": part.role,
        **vars(statistics),
        "image_sizes": {f"{width}x{height}": count for (width, height), count in statistics.image_sizes.most_common()},
        "num_answers": len(statistics.answers),
        "answers": dict(statistics.answers.most_common(MAX_WRITTEN_VALUES)),
        "inputs": {name: asdict(numbers) for name, numbers in statistics.inputs.items()},
    }


def _samples_table(parts: Sequence[DataPart], skipped_rows: SkippedRows | None) -> ReportTable:
    left_out = {} if skipped_rows is None else skipped_rows.counts()
    rows = []
    for part in parts:
        statistics = part.statistics
        counts = (statistics.num_rows, statistics.num_images, left_out.get((part.name, part.split), 0))
        texts = (_range(statistics.references), ", ".join(statistics.styles), ", ".join(statistics.metrics))
        rows.append([part.name, part.split, *(f"{count:,}" for count in counts), *texts])
    columns = [*GROUP_COLUMNS, "samples", "images", "left out", "refs", "style", "metric"]
    return ReportTable("Samples", columns, rows)


def _images_table(parts: Sequence[DataPart]) -> ReportTable:
    rows = []
    for part in parts:
        sizes = sorted(part.statistics.image_sizes.elements(), key=lambda size: (size[0] * size[1], size))
        shown = (sizes[0], sizes[len(sizes) // 2], sizes[-1])
        rows.append([part.name, part.split, *(f"{width}×{height}" for width, height in shown)])
    return ReportTable("Images by area", [*GROUP_COLUMNS, "smallest", "median", "largest"], rows)


def _inputs_table(parts: Sequence[DataPart], max_prompt_tokens: int) -> ReportTable:
    def mean_and_range(numbers: Mapping[str, float]) -> str:
        is_same = numbers["min"] == numbers["max"]
        return _range(numbers) if is_same else f"{numbers['mean']:,.1f} ({_range(numbers)})"

    rows = []
    too_long: dict[str, list[str]] = {}  # where each of these samples is too long
    for part in parts:
        inputs = part.statistics.inputs
        numbers = [{**one.counts, "prompt_tokens": one.prompt_tokens} for one in inputs.values()]
        for count in numbers[0]:
            rows.append([part.name, part.split, count, *(mean_and_range(one[count]) for one in numbers)])
        if any(one.too_long for one in inputs.values()):
            rows.append([part.name, part.split, TOO_LONG, *(f"{len(one.too_long):,}" for one in inputs.values())])
        for name, one in inputs.items():
            for sample_id in one.too_long:
                too_long.setdefault(sample_id, []).append(name)
    named = [f"{sample_id} ({', '.join(names)})" for sample_id, names in too_long.items()]
    note = f"No prompt is longer than the {max_prompt_tokens:,} tokens that leave room for an answer."
    if named:
        more = ", …" if len(named) > MAX_NAMED_ROWS else ""
        note = (
            f"Prompts longer than the {max_prompt_tokens:,} tokens that leave room for an answer: {len(named):,}, namely "
            f"{', '.join(named[:MAX_NAMED_ROWS])}{more}"
        )
    return ReportTable(
        "What the executor is given, by what stage 1 decides: mean (range)",
        [*GROUP_COLUMNS, "count", *parts[0].statistics.inputs],
        rows,
        note,
    )


def _values_table(title: str, parts: Sequence[DataPart], counts: str, words: str) -> ReportTable:
    def most_frequent(values: Counter[str]) -> str:
        most_common, total = values.most_common(MAX_VALUES), values.total()
        shares = [f"{_shorten(value, MAX_VALUE_LENGTH)} ({count / total:.0%})" for value, count in most_common]
        return " · ".join([*shares, *(["…"] if len(values) > MAX_VALUES else [])])

    rows = []
    for part in parts:
        values = getattr(part.statistics, counts)
        words_of_one = _range(getattr(part.statistics, words))
        rows.append([part.name, part.split, f"{len(values):,}", words_of_one, most_frequent(values)])
    return ReportTable(title, [*GROUP_COLUMNS, "different", "words", "most frequent"], rows)


def _examples_table(samples: Sequence[Mapping[str, Any]]) -> ReportTable:
    rows = []
    for sample in samples:
        size = f"{sample['image'].width}×{sample['image'].height}"
        texts = (_shorten(text, MAX_TEXT_LENGTH) for text in (sample["question"], format_answers(sample["answers"])))
        rows.append([sample["sample_id"], size, *texts, sample["question_type"]])
    return ReportTable(f"{len(samples)} training samples", ["sample", "image", "question", "answers", "type"], rows)


def _skipped_table(skipped_rows: SkippedRows) -> ReportTable:
    named = list(skipped_rows)[:MAX_NAMED_ROWS]
    return ReportTable(
        f"Rows that were left out: {len(named):,} of {len(skipped_rows):,}",
        [*GROUP_COLUMNS, "row", "sample", "column", "cause"],
        [[bad.dataset, bad.split, f"{bad.row:,}", str(bad.sample_id), bad.column, bad.cause] for bad in named],
        skipped_rows.summary(),
    )


def _range(numbers: Mapping[str, float]) -> str:
    least, most = numbers["min"], numbers["max"]
    return f"{least:,}" if least == most else f"{least:,}–{most:,}"


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"
