"""Data sets that are read row by row, while they are trained on."""

from collections.abc import Iterator, Sequence
from typing import Any

from datasets import Dataset, Image, IterableDataset

from .built_in import SCENE_FAMILIES, load_easy_vqa, load_scenes
from .mixture import check_mixture, interleave_streams
from .row_checks import BadRow, SkippedRows, find_fault, refusal
from .schema import ENCODED_FEATURES, FEATURES, check_columns, conform_row
from .sources import read_source


def stream_vqa_datasets(
    names: Sequence[str],
    split: str = "train",
    max_samples: int | None = None,
    seed: int = 42,
    weights: Sequence[float] | None = None,
    skipped_rows: SkippedRows | None = None,
) -> IterableDataset:
    """
    Opens a split of several data sets as one stream: nothing is read before it is asked for.

    One pass over the stream is an epoch. Without `weights`, data sets take turns and an epoch has each sample once. With
    `weights`, the data set of the next sample is drawn by weight, and an epoch ends when the first data set has run out.
    With `max_samples`, an epoch ends after that many samples, and each has the same ones, the first.

    Args are those of [`~joint_controller.data.load_vqa_datasets`]; `seed` chooses from which data set the next sample is,
    where there are weights. Without `skipped_rows`, a bad row is an error when its turn comes.

    Returns:
        `datasets.IterableDataset`: Columns as in `ENCODED_FEATURES`: images are not decoded (see
        [`~joint_controller.data.decode_image`]). That sample ids are unique is not checked.

    Raises:
        ValueError: If the names or weights make no mixture, a data set or split does not exist or a column is not usable;
            on reading, if a row is not.
    """
    check_mixture(names, max_samples, weights)
    streams = [_stream_split(name, split, skipped_rows) for name in names]
    return interleave_streams(streams, weights, seed, max_samples)


def _stream_split(name_or_path: str, split: str, skipped_rows: SkippedRows | None) -> IterableDataset:
    """A split of one data set, in its order."""
    if name_or_path == "easy_vqa" or name_or_path in SCENE_FAMILIES:
        dataset = load_easy_vqa(split) if name_or_path == "easy_vqa" else load_scenes(name_or_path, split)
        return dataset.cast_column("image", Image(decode=False)).to_iterable_dataset()
    source = read_source(name_or_path, split, streaming=True)
    check_columns(source.features, name_or_path)
    if skipped_rows is not None:
        skipped_rows.forget(name_or_path, split)
    # A stream of one part: its rows keep their order, and so their numbers, when parts are shuffled.
    return IterableDataset.from_generator(
        _good_rows,
        features=ENCODED_FEATURES,
        gen_kwargs={"source": source, "name": name_or_path, "split": split, "skipped_rows": skipped_rows},
    )


def _good_rows(
    source: IterableDataset, name: str, split: str, skipped_rows: SkippedRows | None
) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(source):
        row = conform_row(row)
        fault = find_fault(row)
        if fault is None:
            yield {column: row[column] for column in FEATURES}
            continue
        bad = BadRow(name, split, number, row["sample_id"], *fault)
        if skipped_rows is None:
            raise ValueError(refusal(bad))
        skipped_rows.add(bad)


def take_rows(dataset: Dataset | IterableDataset, num_rows: int) -> Dataset:
    """The first rows of a data set or stream with the columns of `FEATURES`, at most `num_rows`, as a data set."""
    if isinstance(dataset, Dataset):
        return dataset.select(range(min(num_rows, len(dataset))))
    return Dataset.from_list(list(dataset.take(num_rows)), features=FEATURES)
