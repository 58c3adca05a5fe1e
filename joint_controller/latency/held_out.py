"""How far an estimator is from measurements that it has not seen."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset

from .profile_table import ProfileSchema, profile_settings


PARTS = {
    "preparation": "preparation_ms",
    "prefill": "prefill_ms",
    "decode": "decode_ms_per_token",
    "total": "all together",
}
"""What errors are reported of; the first is left out in the scope of the model."""
COVERED_QUANTILE = 0.95
"""Upper quantile whose coverage is reported."""


@dataclass(frozen=True)
class HeldOut:
    """
    Measurements that were predicted by an estimator which had seen neither their setting nor their input.

    Args:
        rows, folds (`list[int]`):
            Rows of the profile, and the fold of each.
        measured_ms, predicted_ms, physical_ms (`dict[str, torch.Tensor]`):
            `"preparation"` (in the scope of requests), `"prefill"`, `"decode"` (per token) and `"total"` of each row,
            float64; NaN where nothing was decoded. The last is what the physical terms alone predict; `None` if that was not
            asked.
        learned_stages (`tuple[str, ...]`):
            Stages that are predicted better with a learned factor than by their physical terms alone, if that was asked.
        single_ratios (`dict[str, torch.Tensor]`):
            By latency scope, of each single repeat of each row (n, repeats), float64, what it took together as a share of
            what is predicted; NaN where a row has fewer repeats than another.
        profile ([`~datasets.Dataset`]):
            The profile.
    """

    rows: list[int]
    folds: list[int]
    measured_ms: dict[str, torch.Tensor]
    predicted_ms: dict[str, torch.Tensor]
    physical_ms: dict[str, torch.Tensor] | None
    learned_stages: tuple[str, ...]
    single_ratios: dict[str, torch.Tensor]
    profile: Dataset

    @property
    def latency_scope(self) -> str:
        """What was measured."""
        return ProfileSchema.of(self.profile).costs.latency_scope

    def rows_by_value(self) -> dict[str, dict[Any, torch.Tensor]]:
        """For each knob and each of its values that occurs, cheapest first, which of `rows` have it (a mask)."""
        by_value = {}
        for knob in ProfileSchema.of(self.profile).knob_space.knobs:
            column = self.profile[knob.name][:]
            values = [column[row] for row in self.rows]
            occurring = (value for value in knob.values if value in values)
            by_value[knob.name] = {value: torch.tensor([one == value for one in values]) for value in occurring}
        return by_value


def conformal_quantile(ratios: torch.Tensor, quantile: float) -> float:
    """
    What an estimate is multiplied with so that a new measurement lies below with the given probability: the ceil((n +
    1) quantile)-th smallest of n ratios of a held-out measurement to its estimate (split conformal prediction); the
    largest one where there are too few. NaNs are left out.
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


def coverage(held_out: HeldOut) -> float | None:
    """
    Share of single held-out requests that take no longer than their predicted upper quantile, which is fitted to the other
    folds; None with a single fold.
    """
    ratios = held_out.single_ratios[held_out.latency_scope]
    folds = torch.tensor(held_out.folds)
    if len(folds.unique()) == 1:
        return None
    below = []
    for fold in folds.unique():
        tested = ratios[folds == fold]
        below.append(tested[~tested.isnan()] <= conformal_quantile(ratios[folds != fold], COVERED_QUANTILE))
    return torch.cat(below).double().mean().item()


def report_errors(held_out: HeldOut) -> dict[str, Any]:
    """
    The held-out error of an estimator: for `"preparation"` (in the scope of requests), `"prefill"`, `"decode"` (per token)
    and `"total"` the errors ([`~latency.held_out.errors`]), perhaps with `mape_physical` (with the physical terms alone);
    in that of `"total"`, `p95_coverage` (share of single requests below their predicted 95th percentile); `by_knob`, the
    errors of `"prefill"` and `"decode"` at each value of each knob; `num_measurements`, `num_settings`, `num_inputs`,
    `num_held_out`, `num_disagreeing` (measurements whose repeats disagree; None where that is unknown).
    """
    profile, measured_ms, predicted_ms = held_out.profile, held_out.measured_ms, held_out.predicted_ms
    report: dict[str, Any] = {}
    for part in measured_ms:
        report[part] = errors(measured_ms[part], predicted_ms[part])
        if held_out.physical_ms is not None:
            report[part]["mape_physical"] = errors(measured_ms[part], held_out.physical_ms[part])["mape"]
    report["total"]["p95_coverage"] = coverage(held_out)
    report["by_knob"] = {
        knob: {
            str(value): {
                part: errors(measured_ms[part][chosen], predicted_ms[part][chosen]) for part in ("prefill", "decode")
            }
            for value, chosen in rows_by_value.items()
        }
        for knob, rows_by_value in held_out.rows_by_value().items()
    }
    report["num_measurements"] = len(profile)
    report["num_settings"] = len(set(profile_settings(profile)))
    report["num_inputs"] = len(set(profile["sample_id"]))
    report["num_held_out"] = len(held_out.rows)
    report["num_disagreeing"] = num_disagreeing(profile)
    return report


def num_disagreeing(profile: Dataset) -> int | None:
    """Measurements whose repeats disagree; None where that is unknown."""
    disagree = profile["repeats_disagree"][:]
    return None if None in disagree else sum(disagree)
