"""Pictures of sweeps."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .sweep import MAX_VIOLATION_RATE, SweepRow


SWEEP_PICTURE_FILE = "accuracy_latency.png"
"""Name of a sweep's picture in an output folder."""

# The palette of Okabe and Ito, which people with a color vision deficiency can tell apart. Policies beyond it are gray.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
_OTHER_COLOR = "#767676"
_BASELINES = ("full", "random", "untrained")
_TEXT_COLOR = "#333333"
_LABEL_DISTANCE = 0.055
"""Smallest distance between two labels, as a share of the height of the axes."""


def plot_sweep(rows: Sequence[SweepRow], path: str | Path) -> Path:
    """
    Draws accuracy against mean latency: a line for each policy, with a marker for each budget. It is hollow where the
    policy does not keep the budget, that is where more than `MAX_VIOLATION_RATE` of the requests exceed it.

    Args:
        rows (`Sequence[SweepRow]`):
            A sweep. For one that was saved: `[SweepRow(**row) for row in Dataset.from_parquet("sweep.parquet")]`.
        path (`str` or `Path`):
            PNG file to write.

    Returns:
        `Path`: the file.

    Raises:
        ValueError: If there are no rows.
    """
    if not rows:
        raise ValueError("the sweep has no rows: there is nothing to draw.")
    figure = Figure(figsize=(8, 4.5), layout="constrained", facecolor="white")
    axes = figure.subplots()
    colors = iter(_COLORS)
    labels = []
    for policy in dict.fromkeys(row.policy for row in rows):
        color = _OTHER_COLOR if policy in _BASELINES else next(colors, _OTHER_COLOR)
        points = [row for row in rows if row.policy == policy]
        points.sort(key=lambda row: row.latency_budget_ms)
        latency_ms, accuracy = [row.latency_ms for row in points], [row.accuracy for row in points]
        width = 1 if color == _OTHER_COLOR else 2
        axes.plot(latency_ms, accuracy, color=color, linewidth=width, zorder=2)
        # Hollow markers last: a policy that does not look at budgets has all of them in one place.
        for row in sorted(points, key=lambda row: row.budget_violation_rate > MAX_VIOLATION_RATE):
            face = "white" if row.budget_violation_rate > MAX_VIOLATION_RATE else color
            style = {"facecolor": face, "edgecolor": color, "linewidth": width, "zorder": 3}
            axes.scatter(row.latency_ms, row.accuracy, s=20 * width, **style)
        labels.append((latency_ms[-1], accuracy[-1], policy, color))

    axes.margins(x=0.05, y=0.08)
    axes.set_xlabel("mean estimated latency (ms)", color=_TEXT_COLOR)
    axes.set_ylabel("accuracy", color=_TEXT_COLOR)
    axes.set_title(
        f"{rows[0].num_samples} samples, one marker per latency budget "
        f"(hollow: more than {MAX_VIOLATION_RATE:.0%} of the requests exceed it)",
        loc="left",
        fontsize=10,
        color=_TEXT_COLOR,
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_TEXT_COLOR)
    _write_labels(axes, labels)
    figure.savefig(path, dpi=160)
    return Path(path)


def _write_labels(axes: Axes, labels: list[tuple[float, float, str, str]]) -> None:
    """Writes the name of each line behind its last point, moved up where it would cover another one."""
    bottom, top = axes.get_ylim()
    distance = _LABEL_DISTANCE * (top - bottom)
    placed: list[tuple[float, float]] = []
    left, right = axes.get_xlim()
    for x, y, name, color in sorted(labels, key=lambda label: label[1]):
        # Labels are about a fifth as wide as the axes: others farther away are not covered.
        near = [other_y for other_x, other_y in placed if abs(other_x - x) < 0.2 * (right - left)]
        label_y = max([y, *(other_y + distance for other_y in near)])
        placed.append((x, label_y))
        is_right = x > left + 0.85 * (right - left)
        axes.annotate(
            name,
            (x, label_y),
            xytext=(-8 if is_right else 8, 0),
            textcoords="offset points",
            ha="right" if is_right else "left",
            va="center",
            color=color,
            fontweight="normal" if color == _OTHER_COLOR else "bold",
            annotation_clip=False,
        )
