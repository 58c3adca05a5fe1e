"""Several data sets as one."""

from collections.abc import Sequence

from datasets import Dataset, IterableDataset, concatenate_datasets, interleave_datasets


def check_mixture(names: Sequence[str], max_samples: int | None, weights: Sequence[float] | None) -> None:
    """Refuses what cannot be mixed."""
    if isinstance(names, str):
        raise ValueError(f"names is the string '{names}': give a list of names.")
    if not names:
        raise ValueError("names is empty: give at least one data set.")
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"max_samples is {max_samples}: give 1 or more, or None for all.")
    if max_samples is not None and max_samples < len(names):
        raise ValueError(f"max_samples is {max_samples} for {len(names)} data sets: give at least one for each.")
    if weights is None:
        return
    if len(weights) != len(names):
        raise ValueError(
            f"{len(weights)} weights are given for {len(names)} data sets: give one weight for each "
            "(`--dataset_weights`, where those of a recipe are of its own data sets)."
        )
    for name, weight in zip(names, weights, strict=True):
        if not 0 < weight < float("inf"):
            raise ValueError(f"the weight of data set '{name}' is {weight}: give a positive number, or leave it out.")


def split_evenly(max_samples: int, num_datasets: int) -> list[int]:
    """Shares of a number of samples, as equal as can be, the larger ones first."""
    return [max_samples // num_datasets + (index < max_samples % num_datasets) for index in range(num_datasets)]


def split_by_weight(weights: Sequence[float], num_rows: Sequence[int], max_samples: int | None = None) -> list[int]:
    """
    How many of the rows of each data set make an epoch. Each has its weight's share of them, no row occurs twice, and the
    epoch is as long as that allows: min over data sets of rows / share, or `max_samples` if that is less. Shares are rounded
    down or, for those with the largest remainders, up.
    """
    total = sum(weights)
    limits = [rows * total / weight for rows, weight in zip(num_rows, weights, strict=True)]
    # Not beyond the limit by a rounding error of the division.
    epoch = int(min(limit + 1e-6 for limit in [*limits, *([] if max_samples is None else [max_samples])]))
    exact = [epoch * weight / total for weight in weights]
    counts = [int(share + 1e-9) for share in exact]
    by_remainder = sorted(range(len(counts)), key=lambda index: counts[index] - exact[index])
    for index in by_remainder[: epoch - sum(counts)]:
        if counts[index] < num_rows[index]:
            counts[index] += 1
    if 0 in counts:
        raise ValueError(
            f"with the weights {list(weights)}, an epoch of {epoch} samples has none of data set {counts.index(0) + 1}: raise "
            "`max_samples` or its weight, or leave it out."
        )
    return counts


def mix(datasets: Sequence[Dataset], weights: Sequence[float] | None, seed: int) -> Dataset:
    """
    All rows of several data sets, each once, in random order. With weights, the next row is from a data set drawn by weight,
    as long as that has rows left.
    """
    if weights is None:
        return concatenate_datasets(list(datasets)).shuffle(seed=seed, keep_in_memory=True)
    return interleave_datasets(
        [dataset.shuffle(seed=seed, keep_in_memory=True) for dataset in datasets],
        probabilities=[weight / sum(weights) for weight in weights],
        seed=seed,
        stopping_strategy="all_exhausted_without_replacement",
    )


def interleave_streams(
    streams: Sequence[IterableDataset], weights: Sequence[float] | None, seed: int, max_samples: int | None = None
) -> IterableDataset:
    """
    Several streams as one. With weights, the next row is from a stream drawn by weight, and a pass ends when the first one
    has run out. Without, streams take turns, those that have run out are passed over, and a pass ends with the last.
    """
    if len(streams) == 1:
        mixture = streams[0]
    else:
        mixture = interleave_datasets(
            list(streams),
            probabilities=None if weights is None else [weight / sum(weights) for weight in weights],
            seed=None if weights is None else seed,
            stopping_strategy="all_exhausted_without_replacement" if weights is None else "first_exhausted",
        )
    return mixture if max_samples is None else mixture.take(max_samples)
