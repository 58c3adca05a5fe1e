"""What a profile shows: pictures, repeatability, a card."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..knobs import TIERS, KnobSetting
from ..molmo.executor.flops import request_flops
from .fit_report import format_markdown_table
from .profile_table import KNOB_COLUMNS, MACHINE_COLUMNS, PROFILE_FILE, UNKNOWN, check_one_machine, profile_settings


REPORT_FILE = "profile_report.json"
REPEATABILITY_TOLERANCE = 0.03
"""Medians of two profiles agree within this share."""
REPEATABILITY_TARGET = 0.95
"""Share of settings that must agree for a machine to count as repeatable."""

_COLORS = "viridis"


def _columns(profile: Dataset) -> dict[str, np.ndarray]:
    """The numbers of a profile, NaN where they are null; with `num_tokens` and `total_ms` (what budgets are about)."""
    names = ("top_k", "num_blocks", "num_views", "vision_tokens", "text_tokens", "output_tokens")
    names += ("controller_ms", "image_processing_ms", "vision_ms", "llm_prefill_ms", "decode_ms_per_token")
    columns = {name: np.array([math.nan if v is None else v for v in profile[name]], dtype=float) for name in names}
    columns["num_tokens"] = columns["vision_tokens"] + columns["text_tokens"]
    columns["prefill_ms"] = columns["vision_ms"] + columns["llm_prefill_ms"]
    columns["decode_ms"] = np.nan_to_num(columns["decode_ms_per_token"]) * (columns["output_tokens"] - 1)
    columns["total_ms"] = columns["prefill_ms"] + columns["decode_ms"]
    return columns


def _rows_of_settings(profile: Dataset) -> dict[KnobSetting, list[int]]:
    """Rows of each setting, cheapest first."""
    rows: dict[KnobSetting, list[int]] = {}
    for row, setting in enumerate(profile_settings(profile)):
        rows.setdefault(setting, []).append(row)
    return dict(sorted(rows.items(), key=lambda item: _order(item[0])))


def _order(setting: KnobSetting) -> tuple[int, int, int]:
    return TIERS.index(setting.tier), setting.top_k, setting.num_blocks


def repeatability(first: Dataset, second: Dataset, tolerance: float = REPEATABILITY_TOLERANCE) -> dict[str, Any]:
    """
    How well two profiles of the same executor on the same machine agree.

    Args:
        first, second ([`~datasets.Dataset`]):
            The profiles. Measurements that only one of them has are left out.
        tolerance (`float`, *optional*, defaults to 0.03):
            Largest difference between the medians of a setting, as a share.

    Returns:
        `dict[str, Any]`: `tolerance`, `num_settings`, `num_measurements` that both have, and for `"prefill"`, `"decode"`
        (per token) and `"total"` (with as many decode steps as were timed) `share` (of settings whose medians over inputs
        agree), `median_difference` and `largest_difference` (shares); `is_repeatable`: all three shares reach 95 %.

    Raises:
        ValueError: If the profiles are of different executors or machines, or have no measurement in common.
    """
    check_one_machine(concatenate_datasets([first, second]), name="the pair of profiles")
    keys = [list(zip(profile_settings(one), one["sample_id"], strict=True)) for one in (first, second)]
    positions = [{key: row for row, key in enumerate(one)} for one in keys]
    common = [key for key in positions[0] if key in positions[1]]
    if not common:
        raise ValueError("the two profiles have no measurement (setting and input) in common: profile the same ones.")
    columns = [_columns(one) for one in (first, second)]
    rows_of: dict[KnobSetting, list[tuple[int, int]]] = {}
    for key in common:
        rows_of.setdefault(key[0], []).append((positions[0][key], positions[1][key]))
    report: dict[str, Any] = {
        "tolerance": tolerance,
        "num_settings": len(rows_of),
        "num_measurements": len(common),
    }
    for part, column in (("prefill", "prefill_ms"), ("decode", "decode_ms_per_token"), ("total", "total_ms")):
        differences = []
        for rows in rows_of.values():
            medians = [
                np.median(values[column][list(own)])
                for values, own in zip(columns, zip(*rows, strict=True), strict=True)
            ]
            if not np.isnan(medians).any():
                differences.append(abs(medians[1] / medians[0] - 1))
        report[part] = {
            "share": float(np.mean(np.array(differences) <= tolerance)) if differences else None,
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
    A profile in numbers: the machine, how much was measured, how far repeats differ, and the latency of the cheapest and of
    the most expensive setting.
    """
    columns = _columns(profile)
    rows_of = _rows_of_settings(profile)
    spreads = [
        value for name in ("vision_ms", "llm_prefill_ms", "decode_ms_per_token") for value in profile[f"{name}_spread"]
    ]
    spreads = [value for value in spreads if value is not None]
    disagree = profile["repeats_disagree"][:]
    ends = [next(iter(rows_of)), list(rows_of)[-1]]
    return {
        "machine": {column: profile.unique(column) for column in MACHINE_COLUMNS if column != "executor_shape"},
        "num_measurements": len(profile),
        "num_settings": len(rows_of),
        "num_inputs": len(profile.unique("sample_id")),
        "num_disagreeing": None if None in disagree else sum(disagree),
        "median_spread": float(np.median(spreads)) if spreads else None,
        "settings": {
            str(setting): {
                name: float(np.median(columns[name][rows_of[setting]]))
                for name in ("prefill_ms", "decode_ms_per_token", "total_ms")
            }
            for setting in ends
        },
    }


def plot_profile(profile: Dataset, folder: str | Path) -> list[Path]:
    """
    Draws a profile: shares of the stages in each setting (`stage_shares.png`), prefill against input tokens
    (`prefill.png`), decode against position (`decode.png`), latency against each knob with the others fixed (`knobs.png`),
    FLOPs against latency (`flops.png`; only where the executor's sizes are known).

    Args:
        profile ([`~datasets.Dataset`]):
            Measurements of one executor on one machine.
        folder (`str` or `Path`):
            Folder for the pictures; it is made if needed.

    Returns:
        `list[Path]`: the pictures.

    Raises:
        ValueError: If the profile mixes executors or machines.
    """
    check_one_machine(profile)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "stage_shares.png": _plot_stage_shares(profile),
        "prefill.png": _plot_prefill(profile),
        "decode.png": _plot_decode(profile),
        "knobs.png": _plot_knobs(profile),
    }
    if profile["executor_shape"][0] != UNKNOWN:
        figures["flops.png"] = _plot_flops(profile)
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=110)
    return [folder / name for name in figures]


def _plot_stage_shares(profile: Dataset) -> Figure:
    columns = _columns(profile)
    rows_of = _rows_of_settings(profile)
    stages = {
        "controller": "controller_ms",
        "image processing": "image_processing_ms",
        "vision tower and connector": "vision_ms",
        "prefill": "llm_prefill_ms",
        "decode": "decode_ms",
    }
    stages = {stage: name for stage, name in stages.items() if not np.isnan(columns[name]).all()}
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
        f"{setting.tier}, {setting.top_k}, {setting.num_blocks}: {total:.3g} ms"
        for setting, total in zip(rows_of, totals, strict=True)
    ]
    axes.set_yticks(range(len(rows_of)), labels, fontsize=7)
    axes.set_ylim(len(rows_of) - 0.4, -0.6)
    axes.set_xlim(0, 100)
    steps = np.median(columns["output_tokens"]) - 1
    axes.set_xlabel(f"share of the time of a request with {steps:g} decode steps (%)")
    axes.set_ylabel("tier, top_k, num_blocks: mean time")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=5)
    return figure


def _scatter_by_knob(figure: Figure, axes: Axes, knob: str, values: np.ndarray, x: np.ndarray, y: np.ndarray) -> None:
    points = axes.scatter(x, y, c=values, s=9, alpha=0.7, cmap=_COLORS)
    figure.colorbar(points, ax=axes, label=knob, ticks=sorted(set(values)))


def _plot_prefill(profile: Dataset) -> Figure:
    columns = _columns(profile)
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, knob in zip(figure.subplots(1, 2, sharey=True), ("num_blocks", "top_k"), strict=True):
        _scatter_by_knob(figure, axes, knob, columns[knob], columns["num_tokens"], columns["llm_prefill_ms"])
        axes.set_xlabel("tokens of the prompt, the image's included")
        axes.set_ylim(bottom=0)
    figure.axes[0].set_ylabel("prefill of the language model (ms)")
    return figure


def _plot_decode(profile: Dataset) -> Figure:
    columns = _columns(profile)
    positions, times, rows = [], [], []
    for row, steps in enumerate(profile["decode_ms"]):
        # Profiles that were imported know the mean step only.
        if steps is None and not math.isnan(columns["decode_ms_per_token"][row]):
            positions.append(columns["num_tokens"][row] + columns["output_tokens"][row] / 2)
            times.append(columns["decode_ms_per_token"][row])
            rows.append(row)
        for step, step_ms in enumerate(steps or [], start=1):
            positions.append(columns["num_tokens"][row] + step)
            times.append(step_ms)
            rows.append(row)
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, knob in zip(figure.subplots(1, 2, sharey=True), ("num_blocks", "top_k"), strict=True):
        _scatter_by_knob(figure, axes, knob, columns[knob][rows], np.array(positions), np.array(times))
        axes.set_xlabel("position of the token")
        axes.set_ylim(0, 1.3 * np.quantile(times, 0.99) if times else None)
    figure.axes[0].set_ylabel("decode step (ms)")
    return figure


def _plot_knobs(profile: Dataset) -> Figure:
    columns = _columns(profile)
    rows_of = _rows_of_settings(profile)
    latency = {setting: float(np.median(columns["total_ms"][rows])) for setting, rows in rows_of.items()}
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    for axes, knob in zip(figure.subplots(1, 3, sharey=True), KNOB_COLUMNS, strict=True):
        values = list(dict.fromkeys(getattr(s, knob) for s in sorted(latency, key=lambda s: _order_of(s, knob))))
        others = [other for other in KNOB_COLUMNS if other != knob]
        lines: dict[tuple, dict[Any, float]] = {}
        for setting, latency_ms in latency.items():
            lines.setdefault(tuple(getattr(setting, other) for other in others), {})[getattr(setting, knob)] = (
                latency_ms
            )
        ends = (next(iter(lines)), list(lines)[-1])
        for fixed, line in lines.items():
            label = ", ".join(f"{other}={value}" for other, value in zip(others, fixed, strict=True))
            style = {"color": "0.8", "linewidth": 0.8, "zorder": 1}
            if fixed in ends:
                style = {"linewidth": 2, "marker": "o", "markersize": 4, "label": label, "zorder": 2}
            axes.plot([values.index(value) for value in line], list(line.values()), **style)
        axes.set_xticks(range(len(values)), [str(value) for value in values])
        axes.set_xlabel(knob)
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8)
    figure.axes[0].set_ylabel("vision, prefill and decode (ms), median over inputs")
    return figure


def _order_of(setting: KnobSetting, knob: str) -> int:
    return _order(setting)[KNOB_COLUMNS.index(knob)]


def _plot_flops(profile: Dataset) -> Figure:
    columns = _columns(profile)
    shape = json.loads(profile["executor_shape"][0])
    counts = zip(
        *(columns[name] for name in ("num_views", "num_tokens", "output_tokens", "top_k", "num_blocks")), strict=True
    )
    flops = np.array([request_flops(shape, *map(int, row)) for row in counts])
    tiers = np.array(profile["tier"][:])
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for tier in sorted(set(tiers), key=TIERS.index):
        axes.scatter(
            flops[tiers == tier] / 1e9, columns["total_ms"][tiers == tier], s=9, alpha=0.6, label=f"tier {tier}"
        )
    correlation = np.corrcoef(np.log(flops), np.log(columns["total_ms"]))[0, 1] if len(flops) > 1 else math.nan
    axes.set(xlabel="GFLOPs of the request, from its sizes", ylabel="vision, prefill and decode (ms)")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_title(f"correlation of the logarithms: {correlation:.3f}")
    axes.legend()
    return figure


def write_profile_report(profile: Dataset, folder: str | Path, repeated: Dataset | None = None) -> dict[str, Any]:
    """
    Writes a profile's pictures, its numbers (`profile_report.json`) and its card (`README.md`) into its folder.

    Args:
        profile ([`~datasets.Dataset`]):
            The profile.
        folder (`str` or `Path`):
            Its folder.
        repeated ([`~datasets.Dataset`], *optional*):
            A second profile of the same, to say how repeatable measuring is.

    Returns:
        `dict[str, Any]`: the numbers: those of [`~latency.profile_report.summarize_profile`], and `repeatability`
        ([`~latency.repeatability`]) if there is a second profile.

    Raises:
        ValueError: If the profiles mix executors or machines.
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
    The README of a profile's folder, which is a data set of the Hub.

    Args:
        report (`Mapping[str, Any]`):
            What [`~latency.profile_report.write_profile_report`] returns.
        pictures (`Sequence[str]`):
            Names of the pictures beside it.

    Returns:
        `str`: Markdown.
    """
    machine = [(column.replace("_", " "), ", ".join(values)) for column, values in report["machine"].items()]
    rows = [
        (setting, *(f"{times[name]:.2f}" for name in ("prefill_ms", "decode_ms_per_token", "total_ms")))
        for setting, times in report["settings"].items()
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

What single requests (batch 1) take a Molmo executor, stage by stage, over its knob settings: one row a measurement, the
median of interleaved repeats. Written by `joint-controller profile`; `joint-controller fit-latency` fits a latency
estimator to it.

{format_markdown_table(("", ""), machine)}

{report["num_measurements"]} measurements of {report["num_settings"]} settings and {report["num_inputs"]} inputs. The
interquartile range of the repeats is {spread} of their median, as a median over stages and measurements; repeats disagree
(above 10 %) in {UNKNOWN if disagreeing is None else disagreeing} measurements.{repeated}

{format_markdown_table(("setting", "prefill_ms", "decode_ms_per_token", "whole request (ms)"), rows)}

Medians over inputs; prefill includes the vision tower.

{shown}
"""
