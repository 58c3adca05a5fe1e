"""Data sets by name or path, all in one schema."""

import logging
import random
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from .easy_vqa import load_easy_vqa
from .mixture import check_weights, concatenate_and_shuffle, interleave_by_weight, split_by_weight, split_evenly
from .row_checks import SkippedRows, keep_good_rows
from .scene_dataset import load_scenes
from .schema import SPLITS, check_split, conform_to_schema


logger = logging.getLogger(__name__)


def load_vqa_dataset(
    name_or_path: str,
    split: str = "train",
    max_samples: int | None = None,
    seed: int = 42,
    skipped_rows: SkippedRows | None = None,
) -> Dataset:
    """
    Loads a split of a data set of visual questions.

    Args:
        name_or_path (`str`):
            `"easy_vqa"`, `"scenes"`, or a path: a folder written by `save_to_disk` (of a `Dataset` or a
            `DatasetDict`), a Parquet file, or a folder of Parquet files. A path's data set needs the columns `image`,
            `question` and `answers` (a list of strings); other columns of the schema are filled in (`sample_id` is
            then "<folder or file>/<split>/<row>") and unknown ones dropped. Files belong to the split that their name
            starts with (`train*.parquet`); data that name no split are `train`.
        split (`str`, *optional*, defaults to `"train"`):
            `"train"`, `"validation"` or `"test"`.
        max_samples (`int`, *optional*):
            At most so many samples: a random subset, in the order of the data set. Of `"scenes"`, which have no end,
            exactly the first so many. By default all (see [`load_scenes`] for scenes).
        seed (`int`, *optional*, defaults to 42):
            Chooses the subset.
        skipped_rows ([`SkippedRows`], *optional*):
            Where bad rows are counted and listed, and then left out. By default a bad row is an error. Rows are chosen
            before they are checked, so there may be fewer than `max_samples`.

    Returns:
        `datasets.Dataset`: Columns `sample_id`, `image`, `question`, `answers`, `style`, `metric`, `question_type`.
        Every row of data from a path was read once, its image included ([`~joint_controller.data.keep_good_rows`]).

    Raises:
        ValueError: If the data set or split does not exist, or a column or row is not usable. The message names the
            data set, the row as counted in the whole split, and the column.
    """
    _check_arguments([name_or_path], split, max_samples)
    return _choose_samples(
        name_or_path, _read_split(name_or_path, split, max_samples), split, max_samples, seed, skipped_rows
    )


def load_vqa_datasets(
    names: Sequence[str],
    split: str = "train",
    max_samples: int | None = None,
    seed: int = 42,
    weights: Sequence[float] | None = None,
    skipped_rows: SkippedRows | None = None,
) -> Dataset:
    """
    Loads a split of several data sets and mixes them into one, whose length is that of an epoch.

    Without `weights`, an epoch is all samples of all data sets, or `max_samples`, shared evenly (a data set smaller than
    its share gives all it has). With `weights`, each data set has its weight's share of an epoch, no sample occurs twice in
    one, and it is as long as that allows: with n samples in a data set of share s, the smallest n / s, or `max_samples` if
    that is less. What a larger data set has beyond its share is left out, the same samples in every epoch.

    Args:
        names (`Sequence[str]`):
            Names or paths, as for [`load_vqa_dataset`].
        split (`str`, *optional*, defaults to `"train"`):
            `"train"`, `"validation"` or `"test"`.
        max_samples (`int`, *optional*):
            At most so many samples in total.
        seed (`int`, *optional*, defaults to 42):
            Chooses subsets and order.
        weights (`Sequence[float]`, *optional*):
            One positive number for each data set. Only their ratios count.
        skipped_rows ([`SkippedRows`], *optional*):
            As for [`load_vqa_dataset`].

    Returns:
        `datasets.Dataset`: Columns as of [`load_vqa_dataset`].

    Raises:
        ValueError: If no name is given, `max_samples` is smaller than the number of data sets, a weight is not positive or
            leaves no sample of a data set, two data sets share sample ids, or one of them cannot be loaded.
    """
    _check_arguments(names, split, max_samples)
    if weights is None:
        limits = [None] * len(names) if max_samples is None else split_evenly(max_samples, len(names))
        sources = (_read_split(name, split, limit) for name, limit in zip(names, limits, strict=True))
    else:
        check_weights(weights, names)
        sources = [_read_split(name, split, max_samples) for name in names]
        limits = split_by_weight(weights, [len(source) for source in sources], max_samples)
        logger.info("An epoch of '%s' is %d samples: %s.", split, sum(limits), dict(zip(names, limits, strict=True)))
    datasets = []
    owners: dict[str, str] = {}
    for name, source, limit in zip(names, sources, limits, strict=True):
        dataset = _choose_samples(name, source, split, limit, seed, skipped_rows)
        for sample_id in dataset["sample_id"]:
            if sample_id in owners:
                raise ValueError(
                    f"data sets '{owners[sample_id]}' and '{name}' both have a sample '{sample_id}': name each "
                    "data set once, and give their rows ids of their own in a column 'sample_id'."
                )
            owners[sample_id] = name
        datasets.append(dataset)
    if weights is None:
        return concatenate_and_shuffle(datasets, seed)
    return interleave_by_weight(datasets, weights, seed)


def _check_arguments(names: Sequence[str], split: str, max_samples: int | None) -> None:
    if isinstance(names, str):
        raise ValueError(f"names is the string '{names}': give a list of names.")
    if not names:
        raise ValueError("names is empty: give at least one data set.")
    check_split(split)
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"max_samples is {max_samples}: give 1 or more, or None for all.")
    if max_samples is not None and max_samples < len(names):
        raise ValueError(f"max_samples is {max_samples} for {len(names)} data sets: give at least one for each.")


def _read_split(name_or_path: str, split: str, num_scenes: int | None) -> Dataset:
    """All rows of a split, unchecked; of scenes, which have no end, the first so many."""
    if name_or_path == "scenes":
        return load_scenes(split, num_scenes)
    if name_or_path == "easy_vqa":
        return load_easy_vqa(split)
    path = Path(name_or_path)
    base_name = path.resolve().name.removesuffix(".parquet")
    return conform_to_schema(_read_path(path, split), name=name_or_path, id_prefix=f"{base_name}/{split}")


def _choose_samples(
    name_or_path: str,
    source: Dataset,
    split: str,
    max_samples: int | None,
    seed: int,
    skipped_rows: SkippedRows | None,
) -> Dataset:
    if name_or_path == "scenes":
        return source if max_samples is None else source.select(range(min(max_samples, len(source))))
    rows = _choose_rows(len(source), max_samples, seed)
    dataset = source.select(rows)
    if name_or_path == "easy_vqa":
        return dataset
    if skipped_rows is not None:
        skipped_rows.forget(name_or_path, split)
    return keep_good_rows(dataset, name_or_path, split, rows, skipped_rows)


def _choose_rows(num_rows: int, max_samples: int | None, seed: int) -> Sequence[int]:
    """Row numbers of a random subset, ascending; all rows where the limit is None or not reached."""
    if max_samples is None or num_rows <= max_samples:
        return range(num_rows)
    return sorted(random.Random(seed).sample(range(num_rows), max_samples))


def _read_path(path: Path, split: str) -> Dataset:
    """Reads a split from a folder written by `save_to_disk`, a Parquet file or a folder of Parquet files."""
    if (path / "dataset_dict.json").is_file():
        saved = load_from_disk(str(path))
        if split not in saved:
            raise ValueError(f"data set '{path}' has no split '{split}' (it has {list(saved)}): add it.")
        return saved[split]
    if (path / "state.json").is_file():
        if split != "train":
            raise ValueError(
                f"data set '{path}' has no split '{split}': a folder of one saved `Dataset` is its 'train'. "
                "Save a `DatasetDict` with the splits that you need."
            )
        return load_from_disk(str(path))
    if path.is_file() and path.suffix == ".parquet":
        files = [path]
    elif path.is_dir():
        files = sorted(path.glob("*.parquet"))
    else:
        files = []
    if not files:
        raise ValueError(
            f"there is no data set '{path}': give 'easy_vqa', 'scenes', a folder written by `save_to_disk`, "
            "a Parquet file or a folder of Parquet files."
        )
    split_files = [file for file in files if _split_of_file(file) == split]
    if not split_files:
        raise ValueError(
            f"data set '{path}' has no split '{split}': start the names of its Parquet files with '{split}' "
            f"(files whose names start with none of {list(SPLITS)} are 'train')."
        )
    try:
        return Dataset.from_parquet([str(file) for file in split_files])
    # A ValueError is what `datasets` and Arrow raise for files without rows and for files that are no Parquet.
    except (ValueError, DatasetGenerationError) as error:
        raise ValueError(
            f"data set '{path}' cannot be read ({error}): "
            "its Parquet files must be whole, hold rows and have one schema."
        ) from error


def _split_of_file(file: Path) -> str:
    return next((split for split in SPLITS if file.name.startswith(split)), "train")
