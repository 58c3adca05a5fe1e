"""How far an estimator is from measurements: tables, a card, pictures."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from .held_out import COVERED_QUANTILE, PARTS, HeldOut, conformal_quantile, errors, report_errors
from .latency_estimator import SCOPE_IN_WORDS
from .modeling_latency_estimator import LatencyEstimatorModel
from .profile_table import UNKNOWN


REPORT_FILE = "fit_report.json"

ERROR_HEADINGS = ("", "MAE (ms)", "MAPE", "P95 error", "R²", "below p95", "n")
"""Headings of [`~latency.fit_report.format_error_rows`]."""


def _show(value: float | None, form: str = ".1%") -> str:
    return "-" if value is None else format(value, form)


def format_error_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """
    Rows of a table with `ERROR_HEADINGS`: the errors of a report ([`~latency.held_out.report_errors`]) overall, then
    by the value of each knob.
    """

    def row(label: str, found: dict[str, Any]) -> tuple[str, ...]:
        mae, r2 = (_show(found[name], ".3f") for name in ("mae_ms", "r2"))
        covered = _show(found.get("p95_coverage"))
        return label, mae, _show(found["mape"]), _show(found["p95_error"]), r2, covered, str(found["num"])

    rows = [row(label, report[part]) for part, label in PARTS.items() if part in report]
    for knob, values in report["by_knob"].items():
        for value, parts in values.items():
            rows += [row(f"{part}, {knob}={value}", found) for part, found in parts.items()]
    return rows


def format_recalibration_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """
    Rows of a table, headings first, and then without recalibration: MAPEs of a report
    ([`~latency.recalibration.recalibration_errors`]), the mean over draws with the largest in brackets.
    """
    rows = [("measurements", *(f"MAPE, {part}" for part in report["without"]))]
    rows.append(("none", *(_show(found["mape"]) for found in report["without"].values())))
    for size, parts in report["by_size"].items():
        cells = [
            _show(found["mape"]) + (f" ({_show(found['largest_mape'])})" if found["mape"] is not None else "")
            for found in parts.values()
        ]
        rows.append((size, *cells))
    return rows


def format_markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown: the first column to the left, the others to the right."""
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def format_model_card(model: LatencyEstimatorModel, more: str = "") -> str:
    """
    The README (Markdown) of a fitted estimator's folder: what was measured, how large the error is, and the
    coefficients. `more` is put behind the error.
    """
    config = model.config
    report = config.held_out
    coefficients = [
        (stage, feature, f"{value:.3e}")
        for stage, cost in model.costs.stages.items()
        for feature, value in zip(cost.features, model.stage_parameters(stage)[0].tolist(), strict=True)
    ]
    knobs = ", ".join(f"`{knob}` {values}" for knob, values in config.fitted_knobs.items())
    counts = ", ".join(f"`{name}` {low} to {high}" for name, (low, high) in config.fitted_counts.items())
    facts = [
        ("latencies", f"those of {SCOPE_IN_WORDS[config.latency_scope]}"),
        ("device, driver", f"{config.device_name}, {config.driver_version}"),
        ("CPU threads", str(config.num_threads or "-")),
        ("libraries, data type", f"{config.library_versions}, {config.executor_dtype}"),
        ("executor", f"model type `{config.executor_type}`, fingerprint `{config.executor_fingerprint}`"),
        ("executor's code and mode", f"`{config.executor_revision}`, {config.executor_mode}"),
        ("knobs measured", knobs),
        ("counts measured", counts),
        (
            "measurements",
            f"{report['num_measurements']}: {report['num_settings']} settings, {report['num_inputs']} inputs; repeats "
            f"disagree in {UNKNOWN if report['num_disagreeing'] is None else report['num_disagreeing']}",
        ),
    ]
    physical = ""
    if "mape_physical" in report["prefill"]:
        physical = f"""
With the physical terms alone, without the learned factor, the MAPE is {_show(report["prefill"]["mape_physical"])} for
`prefill_ms` and {_show(report["decode"]["mape_physical"])} for `decode_ms_per_token`.
"""
    if config.recalibrated_from is not None:
        facts.append(("recalibrated from", ", ".join(str(value) for value in config.recalibrated_from.values())))
    setting = ", ".join(f"{knob}={json.dumps(values[0])}" for knob, values in config.fitted_knobs.items())
    example = json.dumps({name: [low] for name, (low, _) in config.fitted_counts.items()})
    return f"""---
library_name: transformers
tags:
- joint-controller
- latency
---

# Latency estimator

Predicts how long an executor takes for one request (batch 1) from its knob setting and the sizes of its inputs: a sum of
physical terms for each stage, times a learned factor where that predicts better.

{format_markdown_table(("", ""), facts)}

## Error

On {report["num_held_out"]} measurements whose setting and whose input the fit had not seen (cross-validation; the
estimator is then fitted to all measurements). *Below p95* is the share of single requests that took no longer than the
predicted 95th percentile.

{format_markdown_table(ERROR_HEADINGS, format_error_rows(report))}
{physical}{more}
## Physical terms

{format_markdown_table(("stage", "feature", "ms per unit"), coefficients)}

```python
from joint_controller import KnobSetting, LatencyEstimatorModel

model = LatencyEstimatorModel.from_pretrained("path/to/this/folder")
model.predict_latency_ms(
    [KnobSetting({setting})],
    counts={example},
    output_tokens=[2],
    quantile=0.95,  # leave it out for the typical latency
)
```
"""


def _label_logarithmic(*axes: Axis) -> None:
    for axis in axes:
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 1)))


def plot_fit(held_out: HeldOut, folder: str | Path) -> list[Path]:
    """
    Draws how an estimator does on what it has not seen: predicted against measured times (`predicted.png`), and the
    error at each value of each knob (`error_by_knob.png`). Gives the pictures; the folder is made if needed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    knob, rows_by_value = next(iter(held_out.rows_by_value().items()))
    figure = Figure(figsize=(15, 5), layout="constrained")
    for axes, part in zip(figure.subplots(1, 3), ("prefill", "decode", "total"), strict=True):
        measured_ms, predicted_ms = held_out.measured_ms[part], held_out.predicted_ms[part]
        for value, chosen in rows_by_value.items():
            axes.scatter(measured_ms[chosen], predicted_ms[chosen], s=10, alpha=0.6, label=f"{knob} {value}")
        known = measured_ms[~measured_ms.isnan()]
        ends = [known.min().item(), known.max().item()]
        axes.plot(ends, ends, color="black", linewidth=1, label="exact")
        if part == "total":
            factor = conformal_quantile(held_out.single_ratios[held_out.latency_scope].flatten(), COVERED_QUANTILE)
            percentile = [end / factor for end in ends]
            axes.plot(ends, percentile, color="black", linewidth=1, linestyle=":", label="95th percentile")
        axes.set(xlabel="measured (ms)", ylabel="predicted (ms)", xscale="log", yscale="log")
        _label_logarithmic(axes.xaxis, axes.yaxis)
        found = errors(measured_ms, predicted_ms)
        axes.set_title(f"{PARTS[part]}: MAPE {_show(found['mape'])}, {found['num']} held out")
        axes.legend()
    pictures = [folder / "predicted.png"]
    figure.savefig(pictures[0], dpi=110)

    by_knob = report_errors(held_out)["by_knob"]
    figure = Figure(figsize=(12, 4), layout="constrained")
    all_axes = figure.subplots(1, len(by_knob), sharey=True, squeeze=False)[0]
    for axes, (knob, values) in zip(all_axes, by_knob.items(), strict=True):
        for shift, part in ((-0.2, "prefill"), (0.2, "decode")):
            positions = [position + shift for position in range(len(values))]
            heights = [100 * (found[part]["mape"] or 0.0) for found in values.values()]
            axes.bar(positions, heights, width=0.38, label=PARTS[part])
        axes.set_xticks(range(len(values)), list(values))
        axes.set_xlabel(knob)
    all_axes[0].set_ylabel("MAPE on held-out measurements (%)")
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    pictures.append(folder / "error_by_knob.png")
    figure.savefig(pictures[1], dpi=110)
    return pictures


def plot_recalibration(report: dict[str, Any], folder: str | Path) -> Path:
    """
    Draws the error of recalibration ([`~latency.recalibration.recalibration_errors`]) against the number of
    measurements (`recalibration.png`). Gives the picture; the folder is made if needed.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for index, part in enumerate(report["without"]):
        label = PARTS[part]
        sizes = [size for size, parts in report["by_size"].items() if parts[part]["mape"] is not None]
        means = [100 * report["by_size"][size][part]["mape"] for size in sizes]
        largest = [100 * report["by_size"][size][part]["largest_mape"] for size in sizes]
        numbers = [int(size) for size in sizes]
        axes.plot(numbers, means, color=f"C{index}", marker="o", label=label)
        axes.fill_between(numbers, means, largest, color=f"C{index}", alpha=0.15)
        without = report["without"][part]["mape"]
        if without is not None:
            axes.axhline(100 * without, color=f"C{index}", linestyle=":", label=f"{label}, without: {_show(without)}")
    axes.set(xlabel="measurements to recalibrate with", ylabel="MAPE on other settings and inputs (%)", yscale="log")
    _label_logarithmic(axes.yaxis)
    axes.legend(fontsize=8)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "recalibration.png", dpi=110)
    return folder / "recalibration.png"
