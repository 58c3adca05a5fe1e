"""What a profile shows: pictures, repeatability, a card."""

import json
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..executor import DECODE, MODEL_SCOPE, REQUEST_SCOPE
from ..knobs import Knob, KnobSetting, KnobValue
from .fit_report import format_markdown_table
from .fitting import profile_columns
from .held_out import num_disagreeing
from .latency_estimator import SCOPE_IN_WORDS
from .profile_table import (
    PROFILE_FILE,
    PROVENANCE_COLUMNS,
    SINGLE_TIMES,
    UNKNOWN,
    ProfileSchema,
    check_one_machine,
    profile_settings,
    time_column,
)
from .profiling import relative_spread


_SHOWN_TIMES = ("preparation_ms", "prefill_ms", "decode_ms_per_token", "total_ms")

REPORT_FILE = "profile_report.json"
REPEATABILITY_TOLERANCE = 0.03
"""Medians of two profiles agree within this share."""
REPEATABILITY_TARGET = 0.95
"""Share of settings that must agree for a machine to count as repeatable."""

_COLORS = "viridis"


class _Measurements:
    """A profile in numbers: NaN where they are null."""

    def __init__(self, profile: Dataset):
        self.profile = profile
        self.schema = schema = ProfileSchema.of(profile)
        self.settings = profile_settings(profile)
        self.space = schema.knob_space
        self.columns = columns = {name: values.numpy() for name, values in profile_columns(profile).items()}
        columns["num_tokens"] = sum(columns[name] for name in schema.costs.token_names)
        stages = schema.costs.stages
        for scope, name in ((REQUEST_SCOPE, "preparation_ms"), (MODEL_SCOPE, "prefill_ms")):
            in_scope = [stage for stage in stages if stage != DECODE and stages[stage].scope == scope]
            columns[name] = sum((columns[time_column(stage)] for stage in in_scope), np.zeros(len(profile)))
        columns["decode_ms"] = np.nan_to_num(columns[time_column(DECODE)]) * (columns["output_tokens"] - 1)
        # What budgets are about.
        columns["total_ms"] = columns["preparation_ms"] + columns["prefill_ms"] + columns["decode_ms"]
        self.what = SCOPE_IN_WORDS[schema.costs.latency_scope]

    @cached_property
    def rows_of(self) -> dict[KnobSetting, list[int]]:
        """Rows of each setting, cheapest first."""
        rows: dict[KnobSetting, list[int]] = {}
        for row, setting in enumerate(self.settings):
            rows.setdefault(setting, []).append(row)
        return dict(sorted(rows.items(), key=lambda item: self.space.index(item[0])))

    def flops(self) -> list[int | None]:
        """Floating-point operations of each request."""
        names = self.schema.costs.count_names
        counts = zip(*(self.profile[name] for name in names), strict=True)
        requests = zip(self.settings, counts, self.profile["output_tokens"], strict=True)
        return [
            self.schema.cost_model.request_flops(setting, dict(zip(names, values, strict=True)), output_tokens)
            for setting, values, output_tokens in requests
        ]


def repeatability(first: Dataset, second: Dataset) -> dict[str, Any]:
    """
    How well two profiles of the same executor on the same machine agree. Measurements that only one of them has are
    left out.

    Returns:
        `dict[str, Any]`: `tolerance`, `num_settings`, `num_measurements` that both have, and for `"prefill"`,
        `"decode"` (per token) and `"total"` (with as many decode steps as were timed) `share` (of settings whose
        medians over inputs agree within the tolerance), `median_difference` and `largest_difference` (shares);
        `is_repeatable`: all three shares reach 95 %.

    Raises:
        ValueError: If the profiles are of different executors or machines, or have no measurement in common.
    """
    check_one_machine(first, second, name="the pair of profiles")
    both = [_Measurements(one) for one in (first, second)]
    keys = [list(zip(one.settings, one.profile["sample_id"], strict=True)) for one in both]
    positions = [{key: row for row, key in enumerate(one)} for one in keys]
    common = [key for key in positions[0] if key in positions[1]]
    if not common:
        raise ValueError("the two profiles have no measurement (setting and input) in common: profile the same ones.")
    rows_of: dict[KnobSetting, list[tuple[int, int]]] = {}
    for key in common:
        rows_of.setdefault(key[0], []).append((positions[0][key], positions[1][key]))
    report: dict[str, Any] = {
        "tolerance": REPEATABILITY_TOLERANCE,
        "num_settings": len(rows_of),
        "num_measurements": len(common),
    }
    for part, column in (("prefill", "prefill_ms"), ("decode", "decode_ms_per_token"), ("total", "total_ms")):
        differences = []
        for rows in rows_of.values():
            medians = [
                np.median(one.columns[column][list(own)])
                for one, own in zip(both, zip(*rows, strict=True), strict=True)
            ]
            if not np.isnan(medians).any():
                differences.append(abs(medians[1] / medians[0] - 1))
        report[part] = {
            "share": float(np.mean(np.array(differences) <= REPEATABILITY_TOLERANCE)) if differences else None,
            "median_difference": float(np.median(differences)) if differences else None,
            "largest_difference": float(np.max(differences)) if differences else None,
        }
    shares = [report[part]["share"] for part in ("prefill", "decode", "total")]
    report["is_repeatable"] = all(share is None or share >= REPEATABILITY_TARGET for share in shares)
    return report


def format_repeatability(report: Mapping[str, Any]) -> str:
    """One sentence for people: how well two profiles agree."""
    shares = ", ".join(
        f"{part} {report[part]['share']:.1%} (largest difference {report[part]['largest_difference']:.1%})"
        for part in ("prefill", "decode", "total")
        if report[part]["share"] is not None
    )
    verdict = "repeatable" if report["is_repeatable"] else "NOT repeatable"
    return (
        f"Two profiles of the same {report['num_settings']} settings have medians within {report['tolerance']:.0%} on this "
        f"share of settings: {shares}. With {REPEATABILITY_TARGET:.0%} asked for, measuring is {verdict} on this machine."
    )


def summarize_profile(profile: Dataset) -> dict[str, Any]:
    """
    A profile in numbers: the machine, how much was measured, how far repeats of whole requests differ, and the latency of the
    cheapest and of the most expensive setting.
    """
    measured = _Measurements(profile)
    scope = measured.schema.costs.latency_scope
    spreads = [relative_spread(times) for times in profile[SINGLE_TIMES[scope]] if times is not None]
    rows_of = measured.rows_of
    ends = [next(iter(rows_of)), list(rows_of)[-1]]
    return {
        "machine": {column: profile.unique(column) for column in (*PROVENANCE_COLUMNS, "latency_scope")},
        "num_measurements": len(profile),
        "num_settings": len(rows_of),
        "num_inputs": len(profile.unique("sample_id")),
        "num_disagreeing": num_disagreeing(profile),
        "median_spread": float(np.median(spreads)) if spreads else None,
        "settings": {
            str(setting): {name: float(np.median(measured.columns[name][rows_of[setting]])) for name in _SHOWN_TIMES}
            for setting in ends
        },
    }


def plot_profile(profile: Dataset, folder: str | Path) -> list[Path]:
    """
    Draws a profile into a folder: shares of the stages in each setting (`stage_shares.png`), prefill against input
    tokens (`prefill.png`), decode against position (`decode.png`), latency against each knob with the others fixed
    (`knobs.png`), FLOPs against latency (`flops.png`; only where the executor's sizes are known). Gives the pictures.
    """
    check_one_machine(profile)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    measured = _Measurements(profile)
    figures = {
        "stage_shares.png": _plot_stage_shares(measured),
        "prefill.png": _plot_prefill(measured),
        "decode.png": _plot_decode(measured),
        "knobs.png": _plot_knobs(measured),
    }
    flops = measured.flops()
    if None not in flops:
        figures["flops.png"] = _plot_flops(measured, np.array(flops))
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=110)
    return [folder / name for name in figures]


def _plot_stage_shares(measured: _Measurements) -> Figure:
    columns, rows_of = measured.columns, measured.rows_of
    stages = {stage.replace("_", " "): time_column(stage) for stage in measured.schema.costs.stages if stage != DECODE}
    stages |= {DECODE: "decode_ms"}
    means = np.array(
        [[np.nan_to_num(columns[name][rows]).mean() for name in stages.values()] for rows in rows_of.values()]
    )  # (settings, stages)
    totals = means.sum(axis=1)
    figure = Figure(figsize=(10, 1.6 + 0.17 * len(rows_of)), layout="constrained")
    axes = figure.subplots()
    left = np.zeros(len(rows_of))
    for index, stage in enumerate(stages):
        share = 100 * means[:, index] / totals
        axes.barh(range(len(rows_of)), share, left=left, height=0.85, label=stage)
        left += share
    labels = [
        f"{', '.join(map(str, setting.values()))}: {total:.3g} ms"
        for setting, total in zip(rows_of, totals, strict=True)
    ]
    axes.set_yticks(range(len(rows_of)), labels, fontsize=7)
    axes.set_ylim(len(rows_of) - 0.4, -0.6)
    axes.set_xlim(0, 100)
    steps = np.median(columns["output_tokens"]) - 1
    axes.set_xlabel(f"share of the time of a request with {steps:g} decode steps (%)")
    axes.set_ylabel(f"{', '.join(measured.space.names)}: mean time")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=len(stages))
    return figure


def _knob_axes(measured: _Measurements) -> tuple[Figure, list[tuple[Axes, Knob]]]:
    """A figure with axes for each knob."""
    knobs = measured.space.knobs
    figure = Figure(figsize=(5 * len(knobs), 4.5), layout="constrained")
    return figure, list(zip(figure.subplots(1, len(knobs), sharey=True, squeeze=False)[0], knobs, strict=True))


def _scatter_by_knob(
    measured: _Measurements, rows: Sequence[int], x: Sequence[float], y: Sequence[float], label: str
) -> Figure:
    """Points of rows of the profile, once for each knob, which gives the color."""
    figure, all_axes = _knob_axes(measured)
    for axes, knob in all_axes:
        positions = [knob.values.index(measured.settings[row][knob.name]) for row in rows]
        ticks = sorted(set(positions))
        points = axes.scatter(x, y, c=positions, s=9, alpha=0.7, cmap=_COLORS)
        bar = figure.colorbar(points, ax=axes, label=knob.name, ticks=ticks)
        bar.ax.set_yticklabels([str(knob.values[tick]) for tick in ticks])
        axes.set_xlabel(label)
    return figure


def _plot_prefill(measured: _Measurements) -> Figure:
    column = measured.schema.predicted_columns[-2]  # the last stage before the first output token
    label = "tokens of the prompt, the image's included"
    rows = range(len(measured.settings))
    figure = _scatter_by_knob(measured, rows, measured.columns["num_tokens"], measured.columns[column], label)
    figure.axes[0].set_ylim(bottom=0)
    figure.axes[0].set_ylabel(f"{column.removesuffix('_ms').replace('_', ' ')} (ms)")
    return figure


def _plot_decode(measured: _Measurements) -> Figure:
    columns = measured.columns
    positions, times, rows = [], [], []
    for row, steps in enumerate(measured.profile["decode_ms"]):
        # Profiles that were imported know the mean step only.
        if steps is None and not math.isnan(columns["decode_ms_per_token"][row]):
            positions.append(columns["num_tokens"][row] + columns["output_tokens"][row] / 2)
            times.append(columns["decode_ms_per_token"][row])
            rows.append(row)
        for step, step_ms in enumerate(steps or [], start=1):
            positions.append(columns["num_tokens"][row] + step)
            times.append(step_ms)
            rows.append(row)
    figure = _scatter_by_knob(measured, rows, positions, times, "position of the token")
    figure.axes[0].set_ylim(0, 1.3 * np.quantile(times, 0.99) if times else None)
    figure.axes[0].set_ylabel("decode step (ms)")
    return figure


def _plot_knobs(measured: _Measurements) -> Figure:
    latency = {
        setting: float(np.median(measured.columns["total_ms"][rows])) for setting, rows in measured.rows_of.items()
    }
    figure, all_axes = _knob_axes(measured)
    for axes, knob in all_axes:
        values = [value for value in knob.values if any(setting[knob.name] == value for setting in latency)]
        lines: dict[str, dict[KnobValue, float]] = {}
        for setting, latency_ms in latency.items():
            others = ", ".join(f"{name}={value}" for name, value in setting.items() if name != knob.name)
            lines.setdefault(others, {})[setting[knob.name]] = latency_ms
        ends = (next(iter(lines)), list(lines)[-1])
        for others, line in lines.items():
            style = {"color": "0.8", "linewidth": 0.8, "zorder": 1}
            if others in ends:
                style = {"linewidth": 2, "marker": "o", "markersize": 4, "label": others or knob.name, "zorder": 2}
            axes.plot([values.index(value) for value in line], list(line.values()), **style)
        axes.set_xticks(range(len(values)), [str(value) for value in values])
        axes.set_xlabel(knob.name)
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8)
    figure.axes[0].set_ylabel(f"{measured.what} (ms), median over inputs")
    return figure


def _plot_flops(measured: _Measurements, flops: np.ndarray) -> Figure:
    total_ms, knob = measured.columns["total_ms"], measured.space.knobs[0]
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for value in knob.values:
        rows = [row for row, setting in enumerate(measured.settings) if setting[knob.name] == value]
        if rows:
            axes.scatter(flops[rows] / 1e9, total_ms[rows], s=9, alpha=0.6, label=f"{knob.name} {value}")
    correlation = np.corrcoef(np.log(flops), np.log(total_ms))[0, 1] if len(flops) > 1 else math.nan
    axes.set(xlabel="GFLOPs of the request, from its sizes", ylabel=f"{measured.what} (ms)")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_title(f"correlation of the logarithms: {correlation:.3f}")
    axes.legend()
    return figure


def write_profile_report(profile: Dataset, folder: str | Path, repeated: Dataset | None = None) -> dict[str, Any]:
    """
    Writes a profile's pictures, its numbers (`profile_report.json`) and its card (`README.md`) into its folder.
    `repeated` is a second profile of the same, to say how repeatable measuring is. Profiles that mix executors or
    machines are refused.

    Returns:
        `dict[str, Any]`: the numbers: those of [`~latency.profile_report.summarize_profile`], and `repeatability`
        ([`~latency.profile_report.repeatability`]) if there is a second profile.
    """
    folder = Path(folder)
    pictures = plot_profile(profile, folder)
    report = summarize_profile(profile)
    if repeated is not None:
        report["repeatability"] = repeatability(profile, repeated)
    (folder / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(format_profile_card(report, [picture.name for picture in pictures]), "utf-8")
    return report


def format_profile_card(report: Mapping[str, Any], pictures: Sequence[str]) -> str:
    """
    The README (Markdown) of a profile's folder, which is a data set of the Hub, from its numbers and the names of its
    pictures.
    """
    machine = [(column.replace("_", " "), ", ".join(values)) for column, values in report["machine"].items()]
    rows = [
        (setting, *(f"{times[name]:.2f}" for name in _SHOWN_TIMES)) for setting, times in report["settings"].items()
    ]
    disagreeing = report["num_disagreeing"]
    spread = "unknown" if report["median_spread"] is None else f"{report['median_spread']:.1%}"
    repeated = f"\n\n{format_repeatability(report['repeatability'])}" if "repeatability" in report else ""
    shown = "\n".join(f"![{name.removesuffix('.png').replace('_', ' ')}]({name})" for name in pictures)
    return f"""---
configs:
- config_name: default
  data_files: {PROFILE_FILE}
tags:
- joint-controller
- latency
---

# Latency profile

What single requests (batch 1) take an executor, stage by stage, over its knob settings: one row a measurement, the
median of interleaved repeats. Written by `joint-controller profile`; `joint-controller fit-latency` fits a latency
estimator to it.

{format_markdown_table(("", ""), machine)}

{report["num_measurements"]} measurements of {report["num_settings"]} settings and {report["num_inputs"]} inputs. The
interquartile range of the repeats of a request is {spread} of their median, as a median over measurements; repeats disagree
(above 10 %) in {UNKNOWN if disagreeing is None else disagreeing} measurements.{repeated}

{format_markdown_table(("setting", *_SHOWN_TIMES), rows)}

Medians over inputs; preparation is all up to the first output token that is not the model's (overhead, the controller, image
processing, …), prefill what is, and total what budgets are about, with as many decode steps as were timed.

{shown}
"""
