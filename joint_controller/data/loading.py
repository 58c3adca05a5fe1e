"""Data sets by name or path, all in one schema."""

import random
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset, concatenate_datasets, load_from_disk
from datasets.exceptions import DatasetGenerationError

from .easy_vqa import load_easy_vqa
from .scene_dataset import load_scenes
from .schema import SPLITS, check_split, conform_to_schema, validate_dataset


def load_vqa_dataset(
    name_or_path: str, split: str = "train", max_samples: int | None = None, seed: int = 42
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

    Returns:
        `datasets.Dataset`: Columns `sample_id`, `image`, `question`, `answers`, `style`, `metric`, `question_type`.
        Every row of data from a path was read once, its image included.

    Raises:
        ValueError: If the data set or split does not exist, or a column or row is not usable. The message names the
            data set, the row as counted in the whole split, and the column.
    """
    check_split(split)
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"max_samples is {max_samples}: give 1 or more, or None for all.")
    if name_or_path == "scenes":
        return load_scenes(split, max_samples)
    if name_or_path == "easy_vqa":
        dataset = load_easy_vqa(split)
        return dataset.select(_choose_rows(len(dataset), max_samples, seed))
    path = Path(name_or_path)
    dataset = _read_path(path, split)
    base_name = path.resolve().name.removesuffix(".parquet")
    dataset = conform_to_schema(dataset, name=str(path), id_prefix=f"{base_name}/{split}")
    rows = _choose_rows(len(dataset), max_samples, seed)
    dataset = dataset.select(rows)
    validate_dataset(dataset, name=str(path), rows=rows)
    return dataset


def load_vqa_datasets(
    names: Sequence[str], split: str = "train", max_samples: int | None = None, seed: int = 42
) -> Dataset:
    """
    Loads a split of several data sets and shuffles them into one.

    Args:
        names (`Sequence[str]`):
            Names or paths, as for [`load_vqa_dataset`].
        split (`str`, *optional*, defaults to `"train"`):
            `"train"`, `"validation"` or `"test"`.
        max_samples (`int`, *optional*):
            At most so many samples in total, shared evenly: a data set smaller than its share gives all it has.
        seed (`int`, *optional*, defaults to 42):
            Chooses subsets and order.

    Returns:
        `datasets.Dataset`: Columns as of [`load_vqa_dataset`].

    Raises:
        ValueError: If no name is given, `max_samples` is smaller than the number of data sets, two data sets share
            sample ids, or one of them cannot be loaded.
    """
    if isinstance(names, str):
        raise ValueError(f"names is the string '{names}': give a list of names.")
    if not names:
        raise ValueError("names is empty: give at least one data set.")
    if max_samples is not None and max_samples < len(names):
        raise ValueError(f"max_samples is {max_samples} for {len(names)} data sets: give at least one for each.")
    datasets = []
    owners: dict[str, str] = {}
    for index, name in enumerate(names):
        share = None if max_samples is None else max_samples // len(names) + (index < max_samples % len(names))
        dataset = load_vqa_dataset(name, split, share, seed)
        for sample_id in dataset["sample_id"]:
            if sample_id in owners:
                raise ValueError(
                    f"data sets '{owners[sample_id]}' and '{name}' both have a sample '{sample_id}': name each "
                    "data set once, and give their rows ids of their own in a column 'sample_id'."
                )
            owners[sample_id] = name
        datasets.append(dataset)
    return concatenate_datasets(datasets).shuffle(seed=seed, keep_in_memory=True)


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
