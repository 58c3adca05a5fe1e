"""Pictures of sweeps: accuracy, latency and violations of policies, and what they choose."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from .request_table import arrow_table, check_request_table, knob_columns
from .summary import STATIC, rows_of, summarize


SWEEP_PICTURE_FILE = "accuracy_latency.png"
"""Name of a sweep's main picture in an output folder."""

BUDGET_PICTURE_FILE = "budget.png"
KNOB_SHARES_PICTURE_FILE = "knob_shares.png"
CHOICES_PICTURE_FILE = "choices.png"

MAX_VIOLATION_RATE = 0.05
"""Share of requests above the budget beyond which a policy does not keep it: its marker is then hollow."""

CONTROLLER = "controller"
"""Policy whose knobs are shown."""

NUM_CHOICES = 8
"""Images in the picture of choices."""

MAX_CHOICE_POLICIES = 4
"""Policies in the picture of choices."""

# The palette of Okabe and Ito, which people with a color vision deficiency can tell apart, without the yellow that is too
# pale for a line. Policies beyond it are gray, and told apart by their markers.
_FIXED_COLORS = {CONTROLLER: "#0072B2", STATIC: "#D55E00"}
_COLORS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_OTHER_COLOR = "#767676"
_REFERENCES = ("full", "random", "untrained")
_MARKERS = "os^DvPp<>hd8"
_TEXT_COLOR = "#333333"
_GRID_COLOR = "#e6e6e6"
_RIGHT_COLOR, _WRONG_COLOR = "#007a5a", "#b34700"
_DPI = 160
_MAX_QUESTION_TYPES = 12
_FIRST_IN_CHOICES = (CONTROLLER, STATIC, "fits", "full")


def plot_sweep_pictures(
    request_table: Dataset, output_dir: str | Path, samples: Sequence[Mapping[str, Any]] | None = None
) -> list[Path]:
    """
    Draws a sweep: accuracy against mean latency (`accuracy_latency.png`), accuracy and violations against the budget
    (`budget.png`), the values of knobs that the policy `"controller"` chooses by budget and question type
    (`knob_shares.png`, where the table has that policy), and what policies choose for eight images (`choices.png`, where
    there are samples with images). Several seeds of a policy are one line: their mean.

    Args:
        request_table (`datasets.Dataset`):
            What policies chose, and what came of it.
        output_dir (`str` or `Path`):
            Folder to write to; it is made if need be.
        samples (`Sequence[dict]`, *optional*):
            Samples of the table, with `sample_id`, `image` (`PIL.Image.Image`) and `question`. Eight images are looked at, the
            others are not decoded. By default no images are shown.

    Returns:
        `list[Path]`: the files.

    Raises:
        ValueError: If the table is not a request table or has no rows, or has none of the samples.
    """
    check_request_table(request_table)
    if len(request_table) == 0:
        raise ValueError("the request table has no rows: there is nothing to draw.")
    summary = summarize(request_table, baseline=None)
    figures = {SWEEP_PICTURE_FILE: draw_accuracy_latency(summary), BUDGET_PICTURE_FILE: draw_budget(summary)}
    if CONTROLLER in summary["policy"]:
        figures[KNOB_SHARES_PICTURE_FILE] = draw_knob_shares(request_table)
    if samples is not None:
        figure = draw_choices(request_table, samples)
        if figure is not None:
            figures[CHOICES_PICTURE_FILE] = figure
    return [save_picture(figure, Path(output_dir) / name) for name, figure in figures.items()]


def save_picture(figure: Figure, path: str | Path) -> Path:
    """
    Writes a figure to a PNG file.

    Args:
        figure (`matplotlib.figure.Figure`):
            The figure.
        path (`str` or `Path`):
            The file; its folder is made if need be.

    Returns:
        `Path`: the file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI)
    return path


# --- accuracy, latency, violations ----------------------------------------------------------------------------------


def draw_accuracy_latency(summary: Dataset) -> Figure:
    """
    Accuracy against mean latency: a line for each policy, with a marker and the 95 % interval for each budget. A marker is
    hollow where more than `MAX_VIOLATION_RATE` of the requests exceed the budget.

    Args:
        summary (`datasets.Dataset`):
            What [`~joint_controller.evaluation.summary.summarize`] gives.

    Returns:
        `matplotlib.figure.Figure`

    Raises:
        ValueError: If the summary has no rows.
    """
    points = _points_by_policy(summary)
    figure = _figure(8, 4.8)
    axes = figure.subplots()
    _set_up(axes, "mean estimated latency (ms)", "accuracy")
    for policy, style in policy_styles(points).items():
        rows = points[policy]
        color, width = style["color"], style["width"]
        latency_ms, accuracy = _column(rows, "latency_ms"), _column(rows, "accuracy")
        axes.plot(latency_ms, accuracy, color=color, linewidth=width, zorder=2)
        bars = _interval_lengths(rows)
        axes.errorbar(
            latency_ms, accuracy, bars, fmt="none", ecolor=color, alpha=0.6, elinewidth=0.8, capsize=2, zorder=1.5
        )
        # Hollow markers last: a policy that does not look at budgets has all of them in one place.
        for row in sorted(rows, key=lambda row: row["violations"] > MAX_VIOLATION_RATE):
            face = "white" if row["violations"] > MAX_VIOLATION_RATE else color
            look = {"facecolor": face, "edgecolor": color, "linewidth": width, "zorder": 3, "marker": style["marker"]}
            axes.scatter(row["latency_ms"], row["accuracy"], s=22 * width, **look)
    axes.margins(x=0.06, y=0.1)
    axes.set_title(
        f"{_size(summary)}; bars: 95 % intervals\n"
        f"a marker for each latency budget, hollow where more than {MAX_VIOLATION_RATE:.0%} of requests exceed it",
        loc="left",
        fontsize=9,
        color=_TEXT_COLOR,
    )
    _write_labels(axes, points)
    return figure


def draw_budget(summary: Dataset) -> Figure:
    """
    Accuracy, with bands of the 95 % intervals, and violations against the budget, in two panels with a line for each policy.

    Args:
        summary (`datasets.Dataset`):
            What [`~joint_controller.evaluation.summary.summarize`] gives.

    Returns:
        `matplotlib.figure.Figure`

    Raises:
        ValueError: If the summary has no rows.
    """
    points = _points_by_policy(summary)
    styles = policy_styles(points)
    figure = _figure(9, 4.6)
    accuracies, violations = figure.subplots(1, 2)
    _set_up(accuracies, "latency budget (of the full setting's latency)", "accuracy")
    _set_up(violations, "latency budget (of the full setting's latency)", "requests above the budget")
    for policy, style in styles.items():
        rows = points[policy]
        color, fractions = style["color"], _column(rows, "budget_fraction")
        look = {"color": color, "linewidth": style["width"], "marker": style["marker"], "markersize": 4, "zorder": 2}
        accuracies.plot(fractions, _column(rows, "accuracy"), **look)
        if len(rows) > 1:
            low, high = _column(rows, "accuracy_low"), _column(rows, "accuracy_high")
            accuracies.fill_between(fractions, low, high, color=color, alpha=0.12, linewidth=0, zorder=1)
        else:  # a band needs two points
            bars = _interval_lengths(rows)
            accuracies.errorbar(fractions, _column(rows, "accuracy"), bars, fmt="none", ecolor=color, capsize=2)
        violations.plot(fractions, _column(rows, "violations"), **look)
    violations.set_ylim(bottom=0, top=max(violations.get_ylim()[1], MAX_VIOLATION_RATE))
    violations.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    accuracies.set_title(f"{_size(summary)}; bands: 95 % intervals", loc="left", fontsize=9, color=_TEXT_COLOR)
    handles = [
        Line2D([], [], color=style["color"], linewidth=style["width"], marker=style["marker"], markersize=4)
        for style in styles.values()
    ]
    legend = figure.legend(handles, list(styles), loc="outside lower center", ncols=min(4, len(styles)), frameon=False)
    _style_legend(legend, 9)
    return figure


def policy_styles(policies: Sequence[str] | Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """
    How policies are drawn: the controller and the static baseline always in their colors, others in those that are left, and
    the references (full, random, untrained) in gray.

    Args:
        policies (`Sequence[str]`):
            Names.

    Returns:
        `dict[str, dict]`: `color`, `marker` and line `width` (points) of each.
    """
    free = iter(_COLORS)
    styles = {}
    for number, policy in enumerate(policies):
        color = _FIXED_COLORS.get(policy)
        if color is None:
            color = _OTHER_COLOR if policy in _REFERENCES else next(free, _OTHER_COLOR)
        width = 1.0 if color == _OTHER_COLOR else 1.8
        styles[policy] = {"color": color, "marker": _MARKERS[number % len(_MARKERS)], "width": width}
    return styles


def _points_by_policy(summary: Dataset) -> dict[str, list[dict[str, Any]]]:
    """Rows about all data sets, by policy and then by budget."""
    points: dict[str, list[dict[str, Any]]] = {}
    for row in rows_of(summary):
        points.setdefault(row["policy"], []).append(row)
    if not points:
        raise ValueError("the summary has no rows: there is nothing to draw.")
    return {policy: sorted(rows, key=lambda row: row["latency_budget_ms"]) for policy, rows in points.items()}


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows], dtype=float)


def _interval_lengths(rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """From accuracies down and up to the ends of their intervals. A percentile interval need not hold the mean."""
    accuracy = _column(rows, "accuracy")
    ends = [accuracy - _column(rows, "accuracy_low"), _column(rows, "accuracy_high") - accuracy]
    return np.maximum(ends, 0)


def _size(summary: Dataset) -> str:
    row = rows_of(summary)[0]
    seeds = max(one["num_seeds"] for one in rows_of(summary))
    size = f"{row['num_samples']:,} questions about {row['num_images']:,} images"
    return f"{size}, {seeds} seeds" if seeds > 1 else size


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=_DPI, layout="constrained", facecolor="white")


def _set_up(axes: Axes, x_label: str, y_label: str) -> None:
    axes.set_xlabel(x_label, color=_TEXT_COLOR)
    axes.set_ylabel(y_label, color=_TEXT_COLOR)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=_GRID_COLOR, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_TEXT_COLOR)


def _style_legend(legend: Any, size: float) -> None:
    for text in legend.get_texts():
        text.set(fontsize=size, color=_TEXT_COLOR, parse_math=False)


# --- labels ---------------------------------------------------------------------------------------------------------


def place_labels(
    anchors: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    area: tuple[float, float, float, float],
    obstacles: Sequence[tuple[float, float]] = (),
    gap: float = 10.0,
) -> list[tuple[float, float]]:
    """
    Finds places for labels near their anchors, so that they neither cover each other nor leave the area, and cover as few
    obstacles as can be.

    Args:
        anchors (`Sequence[tuple[float, float]]`):
            Points that labels belong to, (x, y).
        sizes (`Sequence[tuple[float, float]]`):
            Width and height of each label, in the unit of the anchors.
        area (`tuple[float, float, float, float]`):
            Left, bottom, right and top that labels stay within, where there is room.
        obstacles (`Sequence[tuple[float, float]]`, *optional*):
            Points that are better not covered, besides the anchors.
        gap (`float`, *optional*, defaults to 10.0):
            Distance between an anchor and its label.

    Returns:
        `list[tuple[float, float]]`: lower left corner of each label.
    """
    left, bottom, right, top = area
    places: list[tuple[float, float]] = [(0.0, 0.0)] * len(anchors)
    taken: list[tuple[float, float, float, float]] = []
    points = np.array([*anchors, *obstacles], dtype=float).reshape(-1, 2)
    # From the top, so that where labels are many each goes below the one before.
    for number in sorted(range(len(anchors)), key=lambda number: (-anchors[number][1], anchors[number][0])):
        (x, y), (width, height) = anchors[number], sizes[number]
        steps = int((top - bottom) / height) + 1
        best = None
        for step in range(-2 * steps, 2 * steps + 1):
            for start in (x + gap, x - gap - width, x - width / 2):
                corner_x = min(max(start, left), max(right - width, left))
                corner_y = y - height / 2 + step * height / 2
                if corner_y < bottom or corner_y + height > top:
                    continue
                box = (corner_x, corner_y, corner_x + width, corner_y + height)
                covered = sum(_overlap(box, other) for other in taken)
                is_inside = (points > np.array(box[:2]) - 2) & (points < np.array(box[2:]) + 2)
                distance = abs(step) * height / 2 + (gap if start != x + gap else 0.0)
                cost = (covered, distance + 1.5 * height * int(is_inside.all(axis=1).sum()))
                if best is None or cost < best[0]:
                    best = cost, box
        # An area that is lower than a label has no place inside.
        box = best[1] if best is not None else (x + gap, y - height / 2, x + gap + width, y + height / 2)
        taken.append(box)
        places[number] = box[:2]
    return places


def _overlap(box: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> float:
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    return width * height if width > 0 and height > 0 else 0.0


def _write_labels(axes: Axes, points: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Writes the name of each line near its last point, with a thin line to it where it had to move away."""
    figure, styles = axes.figure, policy_styles(points)
    figure.draw_without_rendering()  # lays out the axes: only then is it known where points are
    texts, anchors, sizes, markers = [], [], [], []
    for policy, rows in points.items():
        color = styles[policy]["color"]
        text = axes.text(0, 0, policy, color=color, fontsize=9, parse_math=False, transform=None, zorder=4)
        text.set(fontweight="normal" if color == _OTHER_COLOR else "bold", in_layout=False)
        box = text.get_window_extent()
        texts.append(text)
        sizes.append((box.width, 1.1 * box.height))
        pixels = axes.transData.transform([(row["latency_ms"], row["accuracy"]) for row in rows])
        anchors.append(tuple(pixels[-1]))
        markers += [tuple(pixel) for pixel in pixels]
        # Lines, too, as far as that is: labels are better not written on them.
        for start, end in zip(pixels, pixels[1:], strict=False):
            markers += [tuple(start + share * (end - start)) for share in np.linspace(0.1, 0.9, 9)]
    gap = figure.dpi / 72 * 7
    places = place_labels(anchors, sizes, axes.get_window_extent().extents, markers, gap)
    to_data = axes.transData.inverted().transform
    for text, (x, y), anchor, (width, height) in zip(texts, places, anchors, sizes, strict=True):
        text.set(position=to_data((x, y)), transform=axes.transData, verticalalignment="bottom")
        nearest = np.clip(anchor[0], x, x + width), np.clip(anchor[1], y, y + height)
        if np.hypot(nearest[0] - anchor[0], nearest[1] - anchor[1]) > 1.5 * gap:
            line = np.array([to_data(anchor), to_data(nearest)])
            axes.plot(
                line[:, 0], line[:, 1], color=text.get_color(), linewidth=0.5, zorder=1, scalex=False, scaley=False
            )


# --- what is chosen -------------------------------------------------------------------------------------------------


def draw_knob_shares(request_table: Dataset, policy: str = CONTROLLER) -> Figure:
    """
    How often a policy chooses each value of each knob: by budget, and at the middle budget by type of question. A panel for
    each knob; values are in the order of the latency that comes with them. Of many types, the twelve most frequent are shown.

    Args:
        request_table (`datasets.Dataset`):
            What policies chose.
        policy (`str`, *optional*, defaults to `"controller"`):
            The policy.

    Returns:
        `matplotlib.figure.Figure`

    Raises:
        ValueError: If the table has no rows of the policy, or no knobs.
    """
    knobs = knob_columns(request_table)
    if not knobs:
        raise ValueError("the request table has no columns of knobs: there is nothing to draw.")
    table = arrow_table(request_table)
    is_shown = np.array(table["policy"].to_pylist()) == policy
    if not is_shown.any():
        raise ValueError(f"the request table has no policy '{policy}': name one that it has.")
    fractions = table["budget_fraction"].to_numpy()
    latency_ms = table["latency_ms"].to_numpy()
    types = np.array(table["question_type"].to_pylist())
    budgets = np.unique(fractions[is_shown])
    middle = middle_budget(budgets)
    of_middle = is_shown & (fractions == middle)
    names, counts = np.unique(types[of_middle], return_counts=True)
    shown_types = [str(name) for name in names[np.argsort(-counts, kind="stable")][:_MAX_QUESTION_TYPES]]
    lines = max(2.4, 0.28 * len(shown_types) + 1.0)
    figure = _figure(max(3.4 * len(knobs), 6.0), 2.6 + lines)
    panels = figure.subplots(2, len(knobs), squeeze=False, height_ratios=(2.6, lines), sharey="row")
    for (by_budget, by_type), knob in zip(panels.T, knobs, strict=True):
        chosen = np.array([str(value) for value in table[knob].to_pylist()])
        values = _in_order(table[knob].to_pylist(), latency_ms)
        colors = _value_colors(len(values))
        shares = [_shares(chosen[is_shown & (fractions == budget)], values) for budget in budgets]
        _stack(by_budget.bar, [f"{budget:.2f}" for budget in budgets], shares, colors)
        shares = [_shares(chosen[of_middle & (types == name)], values) for name in reversed(shown_types)]
        _stack(by_type.barh, [_shortened(name, 22) for name in reversed(shown_types)], shares, colors)
        by_budget.set_ylim(0, 1)
        by_type.set_xlim(0, 1)
        by_budget.yaxis.set_major_formatter(PercentFormatter(1.0))
        by_type.xaxis.set_major_formatter(PercentFormatter(1.0))
        handles = [Patch(facecolor=color) for color in colors]
        legend = by_budget.legend(
            handles, values, title=knob, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(4, len(values))
        )
        legend.set_frame_on(False)
        legend.get_title().set(fontsize=10, color=_TEXT_COLOR, parse_math=False, fontweight="bold")
        _style_legend(legend, 8)
        by_budget.set_xlabel("latency budget (of the full setting's latency)", fontsize=8, color=_TEXT_COLOR)
        by_type.set_xlabel(f"at a budget of {middle:.2f}", fontsize=8, color=_TEXT_COLOR)
        for axes in (by_budget, by_type):
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(colors=_TEXT_COLOR, labelsize=8)
    panels[0, 0].set_ylabel("share of requests", color=_TEXT_COLOR, fontsize=9)
    panels[1, 0].set_ylabel("question type", color=_TEXT_COLOR, fontsize=9)
    return figure


def middle_budget(budgets: Sequence[float]) -> float:
    """
    The budget in the middle; of an even number, the higher of the two.

    Args:
        budgets (`Sequence[float]`):
            One or more.
    """
    ordered = sorted(set(budgets))
    return float(ordered[len(ordered) // 2])


def _in_order(column: Sequence[Any], latency_ms: np.ndarray) -> list[str]:
    """Values of a knob in words: numbers by size, others by the mean latency of the rows that have them."""
    distinct = set(column)
    if all(isinstance(value, int | float) for value in distinct):
        return [str(value) for value in sorted(distinct)]
    chosen = np.array([str(value) for value in column])
    return sorted({str(value) for value in distinct}, key=lambda value: (latency_ms[chosen == value].mean(), value))


def _value_colors(number: int) -> list[str]:
    """From light to dark: values have an order."""
    return [to_hex(colormaps["viridis"](1 - share)) for share in np.linspace(0.08, 0.9, number)]


def _shares(chosen: np.ndarray, values: Sequence[str]) -> list[float]:
    return [float((chosen == value).mean()) for value in values]


def _stack(draw_bars: Any, names: Sequence[str], shares: Sequence[Sequence[float]], colors: Sequence[str]) -> None:
    """Draws bars of shares on top of each other, by `Axes.bar` or, side by side, by `Axes.barh`."""
    ends = np.zeros(len(names))
    places = np.arange(len(names))
    is_upright = draw_bars.__name__ == "bar"
    for position, color in enumerate(colors):
        lengths = np.array([of_bar[position] for of_bar in shares])
        start = {"bottom" if is_upright else "left": ends}
        draw_bars(places, lengths, 0.8, color=color, edgecolor="white", linewidth=0.5, **start)
        ends = ends + lengths
    axes = draw_bars.__self__
    (axes.set_xticks if is_upright else axes.set_yticks)(places, names)


def draw_choices(request_table: Dataset, samples: Sequence[Mapping[str, Any]]) -> Figure | None:
    """
    Images with what up to four policies chose for a question about each at the middle budget, and whether the answer was right
    (an accuracy of 0.5 or more). Those on which policies disagree come first, of one question type after the other. Of several
    seeds of a policy, the first is shown.

    Args:
        request_table (`datasets.Dataset`):
            What policies chose.
        samples (`Sequence[dict]`):
            Samples with `sample_id`, `image` (`PIL.Image.Image`) and `question`. Those that the table does not have, or whose
            image is `None`, are passed over.

    Returns:
        `matplotlib.figure.Figure` or `None`: `None` if no sample of the table has an image.

    Raises:
        ValueError: If the table has none of the samples.
    """
    middle = middle_budget(request_table.unique("budget_fraction"))
    table = arrow_table(request_table)
    table = table.filter(np.isclose(table["budget_fraction"].to_numpy(), middle, rtol=0, atol=0))
    there = list(dict.fromkeys(table["policy"].to_pylist()))
    policies = sorted(there, key=lambda name: _FIRST_IN_CHOICES.index(name) if name in _FIRST_IN_CHOICES else 99)
    policies = policies[:MAX_CHOICE_POLICIES]
    knobs = knob_columns(request_table)
    seeds: dict[str, int] = {}
    chosen: dict[str, dict[str, dict[str, Any]]] = {}
    for row in table.to_pylist():
        if row["policy"] in policies and row["seed"] == seeds.setdefault(row["policy"], row["seed"]):
            chosen.setdefault(row["sample_id"], {})[row["policy"]] = row
    known = [sample for sample in samples if sample["sample_id"] in chosen]
    if not known:
        raise ValueError(
            f"none of the {len(samples)} samples is in the request table: give those that the policies were asked for."
        )
    shown = _choose_images(known, chosen)
    if not shown:
        return None
    columns = min(4, len(shown))
    lines = -(-len(shown) // columns)
    figure = _figure(3.3 * columns, 0.4 + (3.3 + 0.24 * len(policies)) * lines)
    panels = figure.subplots(lines, columns, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for axes, (sample, image) in zip(panels.flat, shown, strict=False):
        axes.imshow(np.asarray(image.convert("RGB")))
        axes.set_title(
            _wrapped(sample["question"], 40, 3), fontsize=8.5, color=_TEXT_COLOR, loc="left", parse_math=False
        )
        for number, policy in enumerate(policies):
            row = chosen[sample["sample_id"]].get(policy)
            if row is None:
                continue
            is_right = row["accuracy"] >= 0.5
            partly = "" if row["accuracy"] in (0.0, 1.0) else f" {row['accuracy']:.2f}"
            values = " · ".join(str(row[knob]) for knob in knobs)
            late = " (late)" if row["latency_ms"] > row["latency_budget_ms"] else ""
            line = f"{'✓' if is_right else '✗'}{partly} {_shortened(policy, 20)}: {values}, {row['latency_ms']:.1f} ms{late}"
            # Below the image, in the layout: so that rows of images make room for it.
            axes.annotate(
                line,
                (0, 0),
                xycoords="axes fraction",
                xytext=(0, -6 - 11 * number),
                textcoords="offset points",
                va="top",
                fontsize=7.5,
                color=_RIGHT_COLOR if is_right else _WRONG_COLOR,
                parse_math=False,
            )
    budget_ms = table["latency_budget_ms"][0].as_py()
    figure.suptitle(
        f"Choices at a budget of {budget_ms:.1f} ms ({middle:.2f} of the full setting's latency): "
        f"{' · '.join(knobs)}, estimated latency; ✓ answered right, ✗ wrong",
        fontsize=9,
        color=_TEXT_COLOR,
        x=0.01,
        ha="left",
        parse_math=False,
    )
    return figure


def _choose_images(
    samples: Sequence[Mapping[str, Any]], chosen: Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> list[tuple[Mapping[str, Any], Any]]:
    """Samples to show, each with its image: one of each question type by turns, disagreements first, no image twice."""
    by_type: dict[str, list[Mapping[str, Any]]] = {}
    for sample in samples:
        rows = chosen[sample["sample_id"]].values()
        by_type.setdefault(next(iter(rows))["question_type"], []).append(sample)

    def agreement(sample: Mapping[str, Any]) -> float:
        accuracies = [row["accuracy"] for row in chosen[sample["sample_id"]].values()]
        return min(accuracies) - max(accuracies)

    queues = [sorted(of_type, key=agreement) for _, of_type in sorted(by_type.items())]
    shown: list[tuple[Mapping[str, Any], Any]] = []
    used: set[str] = set()
    while len(shown) < NUM_CHOICES and any(queues):
        for queue in queues:
            while queue and len(shown) < NUM_CHOICES:
                sample = queue.pop(0)
                image_id = next(iter(chosen[sample["sample_id"]].values()))["image_id"]
                if image_id in used:
                    continue
                used.add(image_id)
                image = sample["image"]
                if image is not None:
                    shown.append((sample, image))
                    break
    return shown


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1].rstrip()}…"


def _wrapped(text: str, width: int, max_lines: int) -> str:
    return "\n".join(textwrap.wrap(text, width, max_lines=max_lines, placeholder=" …"))
