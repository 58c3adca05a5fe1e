"""How ways of choosing the blocks that run compare: accuracy at each number of blocks, as a table and as a picture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from .block_accuracy import BlockSetAccuracies
from .block_selection import random_block_sets
from .importance import bootstrap_intervals


PREFIX = "prefix"
RANDOM = "random"
ALL_DATASETS = "all"
"""Name of all data sets together, where there are several."""


@dataclass(frozen=True)
class BlockComparisonRow:
    """
    The accuracy of one way of choosing blocks, at one number of blocks, on the samples of a data set (`"all"`: of all
    of them).

    Args:
        accuracy_interval (`tuple[float, float]`):
            Interval that has 95 % confidence, by a bootstrap over samples.
        gain (`float`), gain_interval (`tuple[float, float]`):
            Accuracy beyond that of `"prefix"` with as many blocks, and its interval, by a paired bootstrap over samples.
        spread (`float`, *optional*), lowest (`float`, *optional*), highest (`float`, *optional*):
            Of `"random"`, whose accuracy is a mean over sets: standard deviation of the sets' accuracies (with n - 1),
            accuracy of the worst set and of the best.
        active_blocks (`list[int]`, *optional*):
            The blocks, but of `"random"`.
    """

    dataset: str
    num_blocks: int
    selection: str
    accuracy: float
    accuracy_interval: tuple[float, float]
    gain: float
    gain_interval: tuple[float, float]
    spread: float | None
    lowest: float | None
    highest: float | None
    active_blocks: list[int] | None
    num_samples: int


def compare_block_selections(
    accuracies: BlockSetAccuracies,
    selections: Mapping[str, Mapping[int, Sequence[int]]],
    counts: Sequence[int],
    datasets: Mapping[str, Sequence[int]],
    num_random_sets: int = 20,
    seed: int = 42,
) -> list[BlockComparisonRow]:
    """
    Measures ways of choosing blocks, and for comparison the first blocks (`"prefix"`) and random sets (`"random"`), on
    samples that none of them was chosen on. `selections` has, for each way, the blocks that run for each number in
    `counts`; `datasets` has the rows of each data set's samples.

    Gives rows data set by data set, those together first; number by number, ascending; in each the ways in the order
    of `selections`, prefix, random. A `ValueError` tells of fewer than 2 random sets or samples of a data set.
    """
    if num_random_sets < 2:
        raise ValueError(f"`num_random_sets` is {num_random_sets}: their spread needs 2 or more.")
    chosen: dict[tuple[int, str], list[tuple[int, ...]]] = {}
    for count in sorted(counts):
        for name, blocks_of in selections.items():
            chosen[count, name] = [tuple(blocks_of[count])]
        chosen[count, PREFIX] = [accuracies.all_blocks[:count]]
        chosen[count, RANDOM] = random_block_sets(accuracies.num_layers, count, num_random_sets, seed)
    # All at once, for one progress bar.
    accuracies.measure([blocks for sets in chosen.values() for blocks in sets], title="Comparing on held-out samples")
    measured = {key: accuracies.measure(sets) for key, sets in chosen.items()}  # (sets, samples) each
    groups = dict(datasets)
    if len(groups) > 1:
        groups = {ALL_DATASETS: [row for rows in datasets.values() for row in rows], **groups}
    rows = []
    for dataset, members in groups.items():
        sets_of = {key: sets[:, list(members)] for key, sets in measured.items()}
        accuracy = np.stack([sets.mean(axis=0) for sets in sets_of.values()], axis=1)  # (samples, ways)
        prefix = np.stack([sets_of[count, PREFIX][0] for count, _ in sets_of], axis=1)
        gain = accuracy - prefix
        intervals = bootstrap_intervals(np.concatenate([accuracy, gain], axis=1), seed).tolist()
        for way, ((count, name), sets) in enumerate(sets_of.items()):
            of_sets = sets.mean(axis=1)
            is_random = name == RANDOM
            rows.append(
                BlockComparisonRow(
                    dataset=dataset,
                    num_blocks=count,
                    selection=name,
                    accuracy=float(accuracy[:, way].mean()),
                    accuracy_interval=tuple(intervals[way]),
                    gain=float(gain[:, way].mean()),
                    gain_interval=tuple(intervals[len(sets_of) + way]),
                    spread=float(of_sets.std(ddof=1)) if is_random else None,
                    lowest=float(of_sets.min()) if is_random else None,
                    highest=float(of_sets.max()) if is_random else None,
                    active_blocks=None if is_random else list(chosen[count, name][0]),
                    num_samples=len(members),
                )
            )
    return rows


def format_comparison_table(rows: Sequence[BlockComparisonRow], title: str) -> Table:
    """The comparison on all samples as a table for the console."""
    table = Table(title=title, title_justify="left")
    for heading in ("count", "selection", "accuracy", "over prefix", "95 %"):
        table.add_column(heading, justify="left" if heading == "selection" else "right", no_wrap=True)
    previous = None
    for row in rows:
        if row.dataset == rows[0].dataset:
            if previous not in (None, row.num_blocks):
                table.add_section()
            count, selection, accuracy, _, gain, gain_interval, _ = _cells(row)
            table.add_row("" if row.num_blocks == previous else count, selection, accuracy, gain, gain_interval)
            previous = row.num_blocks
    return table


def format_comparison_markdown(
    rows: Sequence[BlockComparisonRow], full_accuracies: Mapping[str, float], title: str, picture: str
) -> str:
    """The comparison as Markdown: the picture (its path), a table for each data set, and what the numbers are."""
    parts = [f"# {title}", f"![Accuracy against the number of blocks]({picture})"]
    for dataset in dict.fromkeys(row.dataset for row in rows):
        members = [row for row in rows if row.dataset == dataset]
        parts.append(
            f"## {'All samples' if dataset == ALL_DATASETS else dataset}\n\n"
            f"{members[0].num_samples} held-out samples; accuracy with all blocks: {full_accuracies[dataset]:.3f}."
        )
        lines = [f"| {' | '.join(_HEADINGS)} |", "| ---: | --- | ---: | ---: | ---: | ---: | --- |"]
        lines += [f"| {' | '.join(_cells(row))} |" for row in members]
        parts.append("\n".join(lines))
    parts.append(
        "Brackets: 95 % confidence, by a bootstrap over samples (paired for the gain over the first blocks). "
        "± is the standard deviation between random sets, each of which was drawn by itself; then their lowest and highest "
        "accuracy, which the picture shows as a band."
    )
    return "\n\n".join(parts) + "\n"


_HEADINGS = ("count", "selection", "accuracy", "95 %", "over prefix", "95 %", "blocks")


def _cells(row: BlockComparisonRow) -> list[str]:
    if row.active_blocks is None:
        blocks = f"± {row.spread:.3f}, {row.lowest:.3f} to {row.highest:.3f}"
    else:
        blocks = " ".join(map(str, row.active_blocks))
    return [
        str(row.num_blocks),
        row.selection,
        f"{row.accuracy:.3f}",
        "[{:.3f}, {:.3f}]".format(*row.accuracy_interval),
        f"{row.gain:+.3f}",
        "[{:+.3f}, {:+.3f}]".format(*row.gain_interval),
        blocks,
    ]


def draw_comparison(
    rows: Sequence[BlockComparisonRow], full_accuracies: Mapping[str, float], path: str | Path
) -> None:
    """Draws accuracy against the number of blocks to a PNG, a panel for each data set: a line for each way of
    choosing, with 95 % intervals, and for random sets their mean and the range from the worst to the best set."""
    datasets = list(dict.fromkeys(row.dataset for row in rows))
    names = [name for name in dict.fromkeys(row.selection for row in rows) if name != RANDOM]
    counts = sorted({row.num_blocks for row in rows})
    figure = Figure(figsize=(3.8 * len(datasets) + 2, 4), layout="constrained")
    panels = figure.subplots(1, len(datasets), squeeze=False, sharey=True)[0]
    for panel, dataset in zip(panels, datasets, strict=True):
        members = {(row.selection, row.num_blocks): row for row in rows if row.dataset == dataset}
        panel.axhline(full_accuracies[dataset], color="black", linestyle=":", linewidth=1, label="all blocks")
        drawn = [members[RANDOM, count] for count in counts]
        panel.fill_between(
            counts,
            [row.lowest for row in drawn],
            [row.highest for row in drawn],
            color="gray",
            alpha=0.2,
            linewidth=0,
            label="random: worst to best",
        )
        panel.plot(
            counts, [row.accuracy for row in drawn], color="gray", linestyle="--", marker="_", label="random: mean"
        )
        for index, name in enumerate(names):
            line = [members[name, count] for count in counts]
            # Side by side, so that equal ones can be told apart.
            places = [count + 0.09 * (index - (len(names) - 1) / 2) for count in counts]
            errors = [
                [row.accuracy - row.accuracy_interval[0] for row in line],
                [row.accuracy_interval[1] - row.accuracy for row in line],
            ]
            panel.errorbar(
                places,
                [row.accuracy for row in line],
                yerr=errors,
                color=f"C{index}",
                marker="osD^"[index % 4],
                markersize=5,
                linewidth=1.2,
                elinewidth=0.8,
                label=name,
            )
        panel.set_title("all samples" if dataset == ALL_DATASETS else dataset)
        panel.set_xlabel("blocks that run")
        panel.set_xticks(counts)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy on held-out samples")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    figure.savefig(path, dpi=150)
