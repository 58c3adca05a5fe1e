"""Adapts a fitted latency estimator to other hardware from a few measurements."""

import itertools
import random
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset

from .configuration_latency_estimator import LatencyEstimatorConfig
from .fitting import (
    StageData,
    calibrate_quantiles,
    estimator_config,
    fit_coefficients,
    held_out_folds,
    measured_parts,
    predict_held_out,
    predicted_parts,
    profile_columns,
    stage_data,
)
from .held_out import HeldOut, errors, report_errors
from .modeling_latency_estimator import LatencyEstimatorModel, differing_executors, learned_factor
from .profile_table import PROVENANCE_COLUMNS, profile_settings


RECALIBRATION_SIZES = (10, 25, 50)
"""Numbers of measurements whose error is reported."""

# How strongly each physical term is held to its share of the base estimator's time, in measurements that the belief is
# worth, and how much of the learned factor is kept. Which of them suits a stage is found by cross-validation.
_PRIOR_STRENGTHS = (0.01, 0.1, 1.0, 10.0)
_FACTOR_SHARES = (0.0, 1.0)
_FOLDS = 5
_REWEIGHTINGS = 4


@torch.no_grad()
def recalibrate(
    base: LatencyEstimatorModel, profile: Dataset, rows: Sequence[int] | None = None
) -> LatencyEstimatorModel:
    """
    Adapts a fitted estimator to measurements (`rows` of a profile, by default all) of the same executor on other
    hardware. The shares of the physical terms in each stage are those of the base estimator, except where the
    measurements speak against it, and its learned factor is kept or left out, whichever predicts the measurements
    better. The result has no upper quantiles, see [`~latency.recalibration.fit_recalibration`].

    Raises:
        ValueError: If the profile cannot be fitted to, it is of an executor of another family or of other sizes, or of whole
            requests where the base knows the model alone, or there are fewer than two measurements with a decode step.
    """
    config = estimator_config(profile, base.config.num_units)
    base = _checked_base(base, config)
    rows = list(range(len(profile))) if rows is None else list(rows)
    config.recalibrated_from = {name: getattr(base.config, name) for name in PROVENANCE_COLUMNS}
    model = LatencyEstimatorModel(config)
    for stage, data in stage_data(profile_columns(profile), rows, model).items():
        if len(data.measured_ms) < 2:
            raise ValueError(
                f"{len(data.measured_ms)} measurement(s) of the stage '{stage}' are too few to recalibrate with: give at "
                "least two."
            )
        parameters = (values.double() for values in base.stage_parameters(stage))
        model.set_stage_parameters(stage, *_recalibrate_stage(data, *parameters))
    return model


def _checked_base(base: LatencyEstimatorModel, config: LatencyEstimatorConfig) -> LatencyEstimatorModel:
    """The base estimator in the scope of what it is adapted to."""
    differing = differing_executors(base.config, config.executor_type, config.executor_shape)
    if differing:
        raise ValueError(
            f"the base estimator was fitted on another executor ({differing}): hardware can be changed, the executor cannot."
        )
    return base.in_scope(config.latency_scope)


def _recalibrate_stage(data: StageData, base: torch.Tensor, units: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Coefficients and units of a stage, from those of the base estimator."""

    def scaled_units(share: float) -> torch.Tensor:
        return torch.cat([units[:, :-1], share * units[:, -1:]], dim=1)

    def features(share: float) -> torch.Tensor:
        return data.features * learned_factor(scaled_units(share), data.inputs.unbind(1))[:, None]

    def fit(shaped: torch.Tensor, rows: list[int], strength: float) -> torch.Tensor:
        shaped, measured_ms = shaped[rows], data.measured_ms[rows]
        # The base estimator, as much slower or faster as the measurements say.
        prediction = shaped @ base
        expected = base * (measured_ms / prediction).median()
        weight = strength**0.5 * (shaped / measured_ms[:, None]).mean(0)
        return fit_coefficients(shaped, measured_ms, (torch.diag(weight), weight * expected), _REWEIGHTINGS)

    order = list(range(len(data.measured_ms)))
    random.Random(0).shuffle(order)
    num_folds = min(_FOLDS, len(order))
    best = None
    for share, strength in itertools.product(_FACTOR_SHARES, reversed(_PRIOR_STRENGTHS)):
        shaped = features(share)
        misfit = 0.0
        for fold in range(num_folds):
            tested = order[fold::num_folds]
            others = [row for row in order if row not in set(tested)]
            predicted = shaped[tested] @ fit(shaped, others, strength)
            misfit += (predicted.clamp(min=1e-9) / data.measured_ms[tested]).log().abs().sum().item()
        if best is None or misfit < best[0]:
            best = misfit, share, strength
    _, share, strength = best
    return fit(features(share), order, strength), scaled_units(share)


def fit_recalibration(
    base: LatencyEstimatorModel, profile: Dataset, num_folds: int = 4, seed: int = 42
) -> tuple[LatencyEstimatorModel, HeldOut]:
    """
    [`~latency.recalibration.recalibrate`] to all measurements of a profile, with the held-out error
    (`config.held_out`) and upper quantiles from cross-validation over settings and inputs that were not recalibrated
    with, see [`~latency.fitting.held_out_folds`]. Gives the estimator, and what was held out.
    """
    model = recalibrate(base, profile)
    folds = held_out_folds(profile, num_folds, seed)
    held_out = predict_held_out(profile, folds, [recalibrate(base, profile, train) for train, _ in folds])
    model.config.held_out = report_errors(held_out)
    model.config.upper_quantiles = calibrate_quantiles(held_out)
    return model, held_out


def recalibration_errors(
    base: LatencyEstimatorModel,
    profile: Dataset,
    sizes: Sequence[int] = RECALIBRATION_SIZES,
    draws: int = 10,
    seed: int = 42,
) -> dict[str, Any]:
    """
    The error of recalibration against the number of measurements, on measurements that share neither setting nor input
    with those that it was given; `draws` times for each of `sizes`.

    Returns:
        `dict[str, Any]`: `without`, the errors ([`~latency.held_out.errors`]) of the parts of [`~latency.held_out.HeldOut`]
        by the base estimator as it is, over the whole profile; `by_size`, for each number of measurements (a string)
        and each of the parts the mean of the draws' `mape`, the `largest_mape`, and `mape_without`: that of the base
        estimator on the same measurements. A number that leaves fewer than five measurements to test on has None in
        their place. `draws` and `num_measurements`.

    Raises:
        ValueError: As [`~latency.recalibration.recalibrate`], or if a number is below 2.
    """
    if min(sizes) < 2:
        raise ValueError(f"the recalibration sizes {list(sizes)} hold a number below 2.")
    base = _checked_base(base, estimator_config(profile, base.config.num_units))
    columns = profile_columns(profile)
    measured = measured_parts(columns, base)
    everything = list(range(len(profile)))
    without = predicted_parts(base, columns, everything)
    settings, inputs = profile_settings(profile), profile["sample_id"][:]
    generator = random.Random(seed)
    by_size: dict[str, Any] = {}
    for size in sizes:
        found: dict[str, list[tuple[float, float]]] = {part: [] for part in measured}
        for _ in range(draws):
            split = _split(settings, inputs, size, generator)
            if split is None:
                continue
            given, tested = split
            predicted = predicted_parts(recalibrate(base, profile, given), columns, tested)
            for part, values in predicted.items():
                mape = errors(measured[part][tested], values)["mape"]
                if mape is not None:
                    found[part].append((mape, errors(measured[part][tested], without[part][tested])["mape"]))
        by_size[str(size)] = {
            part: {
                "mape": sum(mape for mape, _ in pairs) / len(pairs) if pairs else None,
                "largest_mape": max(mape for mape, _ in pairs) if pairs else None,
                "mape_without": sum(mape for _, mape in pairs) / len(pairs) if pairs else None,
            }
            for part, pairs in found.items()
        }
    return {
        "without": {part: errors(measured[part], without[part]) for part in measured},
        "by_size": by_size,
        "draws": draws,
        "num_measurements": len(profile),
    }


def _split(
    settings: list, inputs: list[str], size: int, generator: random.Random
) -> tuple[list[int], list[int]] | None:
    """
    `size` rows to recalibrate with, and rows that share neither setting nor input with them; None if these are fewer than
    five. The rows to recalibrate with come from half of the settings and of the inputs, or from more where these are too few.
    """
    for share in (0.5, 2 / 3, 0.75, 0.85):
        kept = [
            set(generator.sample(sorted(set(values)), max(1, round(share * len(set(values))))))
            for values in (settings, inputs)
        ]
        sides = [(setting in kept[0], name in kept[1]) for setting, name in zip(settings, inputs, strict=True)]
        inside = [row for row, side in enumerate(sides) if all(side)]
        tested = [row for row, side in enumerate(sides) if not any(side)]
        if len(inside) >= size and len(tested) >= 5:
            return generator.sample(inside, size), tested
    return None
