"""Data sets by name or path, all in one schema."""

import logging
import random
from collections.abc import Sequence

from datasets import Dataset

from .built_in import SCENE_FAMILIES, load_easy_vqa, load_scenes
from .mixture import check_mixture, mix, split_by_weight, split_evenly
from .row_checks import SkippedRows, keep_good_rows
from .schema import conform_to_schema
from .sources import read_source


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
            `"easy_vqa"`, `"scenes"`, `"scenes_transfer"`, or what [`~joint_controller.data.sources.read_source`] takes: the name of a published
            data set, `"<name>=<path>"`, or a path. A path's data set needs the columns `image`, `question` and `answers` (a
            list of strings); other columns of the schema are filled in (`sample_id` is then
            "<folder or file>/<split>/<row>") and unknown ones dropped.
        split (`str`, *optional*, defaults to `"train"`):
            The split, or a part of it, such as `"validation[:50%]"`.
        max_samples (`int`, *optional*):
            At most this many samples: a random subset, in the order of the data set. Of scenes, which have no end,
            exactly this many, the first. By default all; of scenes, 4,000 for `train`, 1,000 for `validation` and 2,000 for
            `test`.
        seed (`int`, *optional*, defaults to 42):
            Chooses the subset.
        skipped_rows ([`SkippedRows`], *optional*):
            Where bad rows are counted and listed, and then left out. By default a bad row is an error. Rows are chosen
            before they are checked, so there may be fewer than `max_samples`.

    Returns:
        `datasets.Dataset`: Columns `sample_id`, `image`, `question`, `answers`, `style`, `metric`, `question_type`.
        Every row but those of `easy_vqa` and of scenes was read once, its image included ([`~joint_controller.data.keep_good_rows`]).

    Raises:
        ValueError: If the data set or split does not exist, or a column or row is not usable. The message names the
            data set, the row as counted in the whole split, and the column.
    """
    return load_vqa_parts([name_or_path], split, max_samples, seed, skipped_rows=skipped_rows)[name_or_path]


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
            Names or paths, as for [`load_vqa_dataset`], as are `split` and `skipped_rows`.
        max_samples (`int`, *optional*):
            At most this many samples in total.
        seed (`int`, *optional*, defaults to 42):
            Chooses subsets and order.
        weights (`Sequence[float]`, *optional*):
            One positive number for each data set. Only their ratios count.

    Returns:
        `datasets.Dataset`: Columns as of [`load_vqa_dataset`].

    Raises:
        ValueError: If no name is given, `max_samples` is smaller than the number of data sets, a weight is not positive or
            leaves no sample of a data set, two data sets share sample ids, or one of them cannot be loaded.
    """
    parts = load_vqa_parts(names, split, max_samples, seed, weights, skipped_rows)
    return mix(list(parts.values()), weights, seed)


def load_vqa_parts(
    names: Sequence[str],
    split: str = "train",
    max_samples: int | None = None,
    seed: int = 42,
    weights: Sequence[float] | None = None,
    skipped_rows: SkippedRows | None = None,
) -> dict[str, Dataset]:
    """
    Loads what [`load_vqa_datasets`] mixes: by name, the samples of each data set that are in an epoch, in its order. Args and
    errors are those of [`load_vqa_datasets`].
    """
    check_mixture(names, max_samples, weights)
    if weights is None:
        limits = [None] * len(names) if max_samples is None else split_evenly(max_samples, len(names))
        sources = (_read_split(name, split, limit) for name, limit in zip(names, limits, strict=True))
    else:
        sources = [_read_split(name, split, max_samples) for name in names]
        limits = split_by_weight(weights, [len(source) for source in sources], max_samples)
        logger.info("An epoch of '%s' is %d samples: %s.", split, sum(limits), dict(zip(names, limits, strict=True)))
    parts = {}
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
        parts[name] = dataset
    return parts


def _read_split(name_or_path: str, split: str, num_scenes: int | None) -> Dataset:
    """All rows of a split, unchecked; of scenes, which have no end, the first `num_scenes`."""
    if name_or_path in SCENE_FAMILIES:
        return load_scenes(name_or_path, split, num_scenes)
    if name_or_path == "easy_vqa":
        return load_easy_vqa(split)
    return conform_to_schema(read_source(name_or_path, split), name=name_or_path)


def _choose_samples(
    name_or_path: str,
    source: Dataset,
    split: str,
    max_samples: int | None,
    seed: int,
    skipped_rows: SkippedRows | None,
) -> Dataset:
    if name_or_path in SCENE_FAMILIES:
        return source if max_samples is None else source.select(range(min(max_samples, len(source))))
    rows: Sequence[int] = range(len(source))
    if max_samples is not None and len(source) > max_samples:
        rows = sorted(random.Random(seed).sample(rows, max_samples))
    dataset = source.select(rows)
    if name_or_path == "easy_vqa":
        return dataset
    if skipped_rows is not None:
        skipped_rows.forget(name_or_path, split)
    return keep_good_rows(dataset, name_or_path, split, rows, skipped_rows)
