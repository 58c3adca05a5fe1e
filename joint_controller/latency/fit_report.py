"""How far an estimator is from measurements: numbers, a card, pictures."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from ..knobs import TIERS
from .modeling_latency_estimator import DECODE_FEATURES, LLM_PREFILL_FEATURES, VISION_FEATURES, LatencyEstimatorModel
from .profile_table import KNOB_COLUMNS, UNKNOWN


if TYPE_CHECKING:
    from .fitting import HeldOut


REPORT_FILE = "fit_report.json"
PARTS = {"prefill": "prefill_ms", "decode": "decode_ms_per_token", "total": "whole request"}
"""What errors are reported of."""
COVERED_QUANTILE = 0.95
"""Upper quantile whose coverage is reported."""


def conformal_quantile(ratios: torch.Tensor, quantile: float) -> float:
    """
    What an estimate is multiplied with so that a new measurement lies below with the given probability: the
    ceil((n + 1) quantile)-th smallest of n ratios of a held-out measurement to its estimate (split conformal prediction);
    the largest one where there are too few. NaNs are left out.
    """
    ratios = ratios[~ratios.isnan()].sort().values
    rank = math.ceil((len(ratios) + 1) * quantile)
    return ratios[min(rank, len(ratios)) - 1].item()


def errors(measured_ms: torch.Tensor, predicted_ms: torch.Tensor) -> dict[str, float | int | None]:
    """
    Errors of predictions: `mae_ms`, `mape` (a share: 0.05 is 5 %), `p95_error_ms` and `p95_error` (95th percentiles of
    the absolute and of the relative error), `r2` (None where all measurements are equal) and `num` measurements. Those
    that are NaN are left out; without any, all are None.
    """
    known = ~measured_ms.isnan()
    measured_ms, predicted_ms = measured_ms[known].double(), predicted_ms[known].double()
    if len(measured_ms) == 0:
        return dict.fromkeys(("mae_ms", "mape", "p95_error_ms", "p95_error", "r2")) | {"num": 0}
    error = predicted_ms - measured_ms
    relative = error.abs() / measured_ms
    total = (measured_ms - measured_ms.mean()).square().sum()
    return {
        "mae_ms": error.abs().mean().item(),
        "mape": relative.mean().item(),
        "p95_error_ms": error.abs().quantile(0.95).item(),
        "p95_error": relative.quantile(0.95).item(),
        "r2": (1 - error.square().sum() / total).item() if total > 0 else None,
        "num": len(measured_ms),
    }


def coverage(held_out: "HeldOut", part: str, quantile: float = COVERED_QUANTILE) -> float | None:
    """
    Share of held-out measurements that lie below their predicted upper quantile, which is fitted to the other folds; None
    with a single fold.
    """
    ratios = held_out.measured_ms[part] / held_out.predicted_ms[part]
    folds = torch.tensor(held_out.folds)
    below = []
    for fold in folds.unique():
        tested, others = ratios[folds == fold], ratios[folds != fold]
        if others.isnan().all():
            return None
        tested = tested[~tested.isnan()]
        below.append(tested <= conformal_quantile(others, quantile))
    return torch.cat(below).double().mean().item()


def report_errors(held_out: "HeldOut") -> dict[str, Any]:
    """
    The held-out error of an estimator.

    Args:
        held_out ([`~latency.fitting.HeldOut`]):
            Result of [`~latency.cross_validate`].

    Returns:
        `dict[str, Any]`: for `"prefill"`, `"decode"` (per token) and `"total"` the errors
        ([`~latency.fit_report.errors`]), with `p95_coverage` (share of measurements below their predicted 95th
        percentile) and perhaps `mape_physical` (with the physical terms alone); `by_knob`, the errors of `"prefill"` and
        `"decode"` at each value of each knob; `num_measurements`, `num_settings`, `num_inputs`, `num_held_out`,
        `num_disagreeing` (measurements whose repeats disagree; None
        where nobody knows).
    """
    profile = held_out.profile
    report: dict[str, Any] = {}
    for part in PARTS:
        measured_ms = held_out.measured_ms[part]
        report[part] = errors(measured_ms, held_out.predicted_ms[part])
        report[part]["p95_coverage"] = coverage(held_out, part)
        if held_out.physical_ms is not None:
            report[part]["mape_physical"] = errors(measured_ms, held_out.physical_ms[part])["mape"]
    knobs = {knob: [profile[knob][row] for row in held_out.rows] for knob in KNOB_COLUMNS}
    report["by_knob"] = {}
    for knob, values in knobs.items():
        report["by_knob"][knob] = {}
        for value in dict.fromkeys(sorted(values, key=_cheapest_first)):
            chosen = torch.tensor([one == value for one in values])
            report["by_knob"][knob][str(value)] = {
                part: errors(held_out.measured_ms[part][chosen], held_out.predicted_ms[part][chosen])
                for part in ("prefill", "decode")
            }
    report["num_measurements"] = len(profile)
    report["num_settings"] = len(set(zip(*(profile[knob] for knob in KNOB_COLUMNS), strict=True)))
    report["num_inputs"] = len(set(profile["sample_id"]))
    report["num_held_out"] = len(held_out.rows)
    disagree = profile["repeats_disagree"][:]
    report["num_disagreeing"] = None if None in disagree else sum(disagree)
    return report


def _cheapest_first(value: str | int) -> int:
    return TIERS.index(value) if isinstance(value, str) else value


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def format_error_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """
    The errors of a report as a table: what, MAE in ms, MAPE, P95 error, R², coverage of the 95th percentile, number n of
    measurements; overall, then by the value of each knob.
    """

    def row(label: str, found: dict[str, Any]) -> tuple[str, ...]:
        mae = "-" if found["mae_ms"] is None else f"{found['mae_ms']:.3f}"
        r2 = "-" if found["r2"] is None else f"{found['r2']:.3f}"
        covered = _share(found.get("p95_coverage"))
        return label, mae, _share(found["mape"]), _share(found["p95_error"]), r2, covered, str(found["num"])

    rows = [row(label, report[part]) for part, label in PARTS.items()]
    for knob, values in report["by_knob"].items():
        for value, parts in values.items():
            rows += [row(f"{part}, {knob}={value}", found) for part, found in parts.items()]
    return rows


ERROR_HEADINGS = ("", "MAE (ms)", "MAPE", "P95 error", "R²", "below p95", "n")
"""Headings of [`~latency.fit_report.format_error_rows`]."""


def format_markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown: the first column to the left, the others to the right."""
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def format_model_card(model: LatencyEstimatorModel, more: str = "") -> str:
    """
    The README of a fitted estimator's folder: what was measured, how large the error is, and the coefficients.

    Args:
        model ([`LatencyEstimatorModel`]):
            A fitted estimator.
        more (`str`, *optional*):
            Markdown to put behind the error.

    Returns:
        `str`: Markdown.
    """
    config = model.config
    report = config.held_out
    coefficients = [
        (stage, feature, f"{value:.3e}")
        for stage, names, values in (
            ("vision tower and connector", VISION_FEATURES, model.vision_coefficients),
            ("language model, prefill", LLM_PREFILL_FEATURES[config.formula_version], model.llm_prefill_coefficients),
            ("language model, decode step", DECODE_FEATURES, model.decode_coefficients),
        )
        for feature, value in zip(names, values.tolist(), strict=True)
    ]
    knobs = ", ".join(f"`{knob}` {values}" for knob, values in config.fitted_knobs.items())
    counts = ", ".join(f"`{name}` {low} to {high}" for name, (low, high) in config.fitted_counts.items())
    facts = [
        ("device, driver", f"{config.device_name}, {config.driver_version}"),
        ("torch, data type", f"{config.torch_version}, {config.executor_dtype}"),
        ("executor", f"fingerprint `{config.executor_fingerprint}`"),
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
With the physical terms alone, without the learned factor, the MAPE is {_share(report["prefill"]["mape_physical"])} for
`prefill_ms` and {_share(report["decode"]["mape_physical"])} for `decode_ms_per_token`.
"""
    if config.recalibrated_from is not None:
        facts.append(("recalibrated from", ", ".join(str(value) for value in config.recalibrated_from.values())))
    return f"""---
library_name: transformers
tags:
- joint-controller
- latency
---

# Latency estimator

Predicts how long a Molmo executor takes for one request (batch 1) from its knob setting and token counts: a sum of
physical terms for each stage, times a learned factor.

{format_markdown_table(("", ""), facts)}

## Error

On {report["num_held_out"]} measurements whose setting and whose input the fit had not seen (cross-validation; the
estimator is then fitted to all measurements). *Below p95* is the share of them that took no longer than the predicted
95th percentile.

{format_markdown_table(ERROR_HEADINGS, format_error_rows(report))}
{physical}{more}
## Physical terms

{format_markdown_table(("stage", "feature", "ms per unit"), coefficients)}

```python
from joint_controller import KnobSetting, LatencyEstimatorModel

model = LatencyEstimatorModel.from_pretrained("path/to/this/folder")
model.predict_latency_ms(
    [KnobSetting("low", top_k={config.fitted_knobs["top_k"][0]}, num_blocks={config.fitted_knobs["num_blocks"][0]})],
    num_views=[2],
    vision_tokens=[40],
    text_tokens=[12],
    output_tokens=[2],
    quantile=0.95,  # leave it out for the typical latency
)
```
"""


def plot_fit(held_out: "HeldOut", folder: str | Path) -> list[Path]:
    """
    Draws how an estimator does on what it has not seen: predicted against measured times (`predicted.png`), and the error
    at each value of each knob (`error_by_knob.png`).

    Args:
        held_out ([`~latency.fitting.HeldOut`]):
            Result of [`~latency.cross_validate`].
        folder (`str` or `Path`):
            Folder for the pictures; it is made if needed.

    Returns:
        `list[Path]`: the pictures.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tiers = [held_out.profile["tier"][row] for row in held_out.rows]
    figure = Figure(figsize=(10, 5), layout="constrained")
    for axes, part in zip(figure.subplots(1, 2), ("prefill", "decode"), strict=True):
        measured_ms, predicted_ms = held_out.measured_ms[part], held_out.predicted_ms[part]
        for tier in sorted(set(tiers), key=_cheapest_first):
            chosen = torch.tensor([one == tier for one in tiers])
            axes.scatter(measured_ms[chosen], predicted_ms[chosen], s=10, alpha=0.6, label=f"tier {tier}")
        known = measured_ms[~measured_ms.isnan()]
        ends = [known.min().item(), known.max().item()]
        factor = conformal_quantile(measured_ms / predicted_ms, COVERED_QUANTILE)
        axes.plot(ends, ends, color="black", linewidth=1, label="exact")
        axes.plot(
            ends, [end / factor for end in ends], color="black", linewidth=1, linestyle=":", label="95th percentile"
        )
        axes.set(xlabel="measured (ms)", ylabel="predicted (ms)", xscale="log", yscale="log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 1)))
        found = errors(measured_ms, predicted_ms)
        axes.set_title(f"{PARTS[part]}: MAPE {_share(found['mape'])}, {found['num']} held out")
        axes.legend()
    pictures = [folder / "predicted.png"]
    figure.savefig(pictures[0], dpi=110)

    by_knob = report_errors(held_out)["by_knob"]
    figure = Figure(figsize=(12, 4), layout="constrained")
    for axes, (knob, values) in zip(figure.subplots(1, len(by_knob), sharey=True), by_knob.items(), strict=True):
        for shift, part in ((-0.2, "prefill"), (0.2, "decode")):
            positions = [position + shift for position in range(len(values))]
            heights = [100 * (found[part]["mape"] or 0.0) for found in values.values()]
            axes.bar(positions, heights, width=0.38, label=PARTS[part])
        axes.set_xticks(range(len(values)), list(values))
        axes.set_xlabel(knob)
    figure.axes[0].set_ylabel("MAPE on held-out measurements (%)")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    pictures.append(folder / "error_by_knob.png")
    figure.savefig(pictures[1], dpi=110)
    return pictures
