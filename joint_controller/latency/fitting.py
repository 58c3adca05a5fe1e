"""Fits the latency estimator to a profile of the executor, and measures how well it does on what it has not seen."""

import json
import math
from typing import Any

import torch
from datasets import Dataset

from ..knobs import TIERS
from .configuration_latency_estimator import LatencyEstimatorConfig
from .modeling_latency_estimator import (
    DECODE_FEATURES,
    LLM_PREFILL_FEATURES,
    VISION_FEATURES,
    LatencyEstimatorModel,
    decode_features,
    llm_prefill_features,
    vision_features,
)
from .profile_table import (
    COUNT_COLUMNS,
    KNOB_COLUMNS,
    MACHINE_COLUMNS,
    STAGE_COLUMNS,
    UNKNOWN,
    check_one_machine,
    check_profile,
)


# Residuals beyond 1.345 standard deviations weigh less (Huber's constant: 95 % efficient if errors are normal after
# all); 1.4826 turns a median absolute deviation into a standard deviation.
_HUBER_THRESHOLD = 1.345
_MAD_TO_STANDARD_DEVIATION = 1.4826
_REWEIGHTINGS = 20


def nonnegative_least_squares(matrix: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """
    Minimises `||matrix @ x - target||` over x >= 0, exactly: the minimum is the plain least squares solution on the
    columns where it is positive, and with a handful of columns every subset of them can be tried. Of columns that
    explain the same, the first are used.

    Args:
        matrix (`torch.Tensor` of shape (n, k)):
            One row an observation; k is small, as 2^k subsets are tried.
        target (`torch.Tensor` of shape (n,)):
            What the columns are to add up to.

    Returns:
        `torch.Tensor` of shape (k,): float64.
    """
    matrix, target = matrix.double(), target.double()
    num_columns = matrix.shape[1]
    scale = matrix.abs().amax(0).clamp(min=torch.finfo(torch.float64).tiny)
    # The triangular factor stands for all rows: the subsets are solved on k + 1 rows, however many were measured.
    triangular = torch.linalg.qr(torch.cat([matrix / scale, target[:, None]], dim=1), mode="r").R
    columns, reduced_target = triangular[:, :-1], triangular[:, -1]
    best, best_error = torch.zeros(num_columns, dtype=torch.float64), reduced_target.square().sum()
    tolerance = 1e-12 * best_error
    for size in range(1, num_columns + 1):
        subsets = torch.combinations(torch.arange(num_columns), size)  # (subsets, size)
        chosen = columns[:, subsets].transpose(0, 1)  # (subsets, rows, size)
        targets = reduced_target.expand(len(subsets), -1)[..., None]
        # "gelsd" copes with columns that depend on each other, as when only one value of a knob was measured.
        solutions = torch.linalg.lstsq(chosen, targets, driver="gelsd").solution
        errors = (chosen @ solutions - targets).square().sum((1, 2))
        errors[(solutions < 0).any(1)[:, 0]] = math.inf
        smallest = errors.argmin()
        if errors[smallest] < best_error - tolerance:
            best_error = errors[smallest]
            best = torch.zeros(num_columns, dtype=torch.float64)
            best[subsets[smallest]] = solutions[smallest, :, 0]
    return best / scale


def fit_coefficients(features: torch.Tensor, measured_ms: torch.Tensor) -> torch.Tensor:
    """
    Non-negative coefficients with a small relative error, in which single outliers count little (Huber's loss, by
    iterative reweighting): other processes disturb a measurement now and then, and only ever make it longer.

    Args:
        features (`torch.Tensor` of shape (n, k)):
            Non-negative features of each measurement.
        measured_ms (`torch.Tensor` of shape (n,)):
            Measured times, positive.

    Returns:
        `torch.Tensor` of shape (k,): milliseconds per unit of each feature, float64.
    """
    measured_ms = measured_ms.double()
    relative_features = features.double() / measured_ms[:, None]
    weights = torch.ones_like(measured_ms)
    for _ in range(_REWEIGHTINGS):
        root = weights.sqrt()
        coefficients = nonnegative_least_squares(root[:, None] * relative_features, root)
        residuals = (relative_features @ coefficients - 1).abs()
        threshold = _HUBER_THRESHOLD * _MAD_TO_STANDARD_DEVIATION * residuals.median()
        weights = torch.where(residuals > threshold, threshold / residuals, 1.0)
    return coefficients


def _settings(profile: Dataset) -> list[tuple]:
    return list(zip(*(profile[knob] for knob in KNOB_COLUMNS), strict=True))


def held_out_folds(profile: Dataset, num_folds: int = 4, seed: int = 42) -> list[tuple[list[int], list[int]]]:
    """
    Splits a profile by setting and by input at once: what a fold tests on shares neither a setting nor an input with
    what it trains on. Measurements that share only one of the two are left out of that fold.

    Args:
        profile ([`~datasets.Dataset`]):
            Measurements, see [`~latency.profile_executor`].
        num_folds (`int`, *optional*, defaults to 4):
            Parts that settings and inputs are each divided in; fewer if there are fewer settings or inputs.
        seed (`int`, *optional*, defaults to 42):
            Seed of the division.

    Returns:
        `list[tuple[list[int], list[int]]]`: row numbers to train on and to test on, by fold.

    Raises:
        ValueError: If the profile has fewer than two settings or two inputs, or no fold has rows on both sides.
    """
    settings = _settings(profile)
    inputs = list(profile["sample_id"])
    num_settings, num_inputs = len(set(settings)), len(set(inputs))
    num_folds = min(num_folds, num_settings, num_inputs)
    if num_folds < 2:
        raise ValueError(
            f"the profile has {num_settings} setting(s) and {num_inputs} input(s): at least two of each are needed to "
            "measure the error on unseen ones. Profile more."
        )
    generator = torch.Generator().manual_seed(seed)

    def assign(names: list) -> dict:
        distinct = sorted(set(names))
        order = torch.randperm(len(distinct), generator=generator).tolist()
        return {distinct[index]: position % num_folds for position, index in enumerate(order)}

    fold_of_setting, fold_of_input = assign(settings), assign(inputs)
    pairs = [(fold_of_setting[setting], fold_of_input[name]) for setting, name in zip(settings, inputs, strict=True)]
    folds = []
    for fold in range(num_folds):
        train = [row for row, parts in enumerate(pairs) if fold not in parts]
        test = [row for row, parts in enumerate(pairs) if parts == (fold, fold)]
        if train and test:
            folds.append((train, test))
    if not folds:
        raise ValueError(
            f"the profile's {len(pairs)} measurement(s) of {num_settings} settings and {num_inputs} inputs leave nothing "
            "to test on. Profile more."
        )
    return folds


def _fit_model(columns: dict[str, torch.Tensor], rows: list[int], config: LatencyEstimatorConfig):
    columns = {name: values[rows] for name, values in columns.items()}
    num_tokens = columns["vision_tokens"] + columns["text_tokens"]
    knobs = columns["top_k"], columns["num_blocks"]
    stages = {
        "vision": (vision_features(columns["num_views"]), columns["vision_ms"]),
        "llm_prefill": (llm_prefill_features(num_tokens, *knobs), columns["llm_prefill_ms"]),
        "decode": (decode_features(num_tokens, *knobs), columns["decode_ms_per_token"]),
    }
    model = LatencyEstimatorModel(config)
    for stage, (features, measured_ms) in stages.items():
        coefficients = fit_coefficients(torch.stack(features, dim=-1), measured_ms)
        model.get_parameter(f"{stage}_coefficients").copy_(coefficients)
    return model


def _errors(predicted_ms: torch.Tensor, measured_ms: torch.Tensor) -> dict[str, float]:
    predicted_ms, measured_ms = predicted_ms.double(), measured_ms.double()
    error = predicted_ms - measured_ms
    total = (measured_ms - measured_ms.mean()).square().sum()
    return {
        "mae_ms": error.abs().mean().item(),
        "mape": (error.abs() / measured_ms).mean().item(),
        "r2": (1 - error.square().sum() / total).item() if total > 0 else math.nan,
    }


def fit_latency_estimator(
    profile: Dataset, num_folds: int = 4, seed: int = 42
) -> tuple[LatencyEstimatorModel, dict[str, Any]]:
    """
    Fits a latency estimator to a profile. The error is measured by cross-validation over settings and inputs that a fit
    did not see ([`~latency.fitting.held_out_folds`]); the estimator that is returned is fitted to all measurements.

    Args:
        profile ([`~datasets.Dataset`]):
            Measurements of one executor on one machine, see [`~latency.profile_executor`].
        num_folds (`int`, *optional*, defaults to 4):
            Folds of the cross-validation.
        seed (`int`, *optional*, defaults to 42):
            Seed of the division into folds.

    Returns:
        `tuple[LatencyEstimatorModel, dict[str, Any]]`: the estimator, and its held-out error, which is also kept in
        `config.held_out`: `{"prefill": {"mae_ms", "mape", "r2"}, "decode": {...}, "num_measurements", "num_settings",
        "num_inputs", "num_held_out"}`. `mape` is a share (0.05 is 5 %), `decode` is per token.

    Raises:
        ValueError: If the profile lacks columns, is empty, mixes executors or machines, holds times that are not
            positive, or has too few settings or inputs.
    """
    check_profile(profile)
    check_one_machine(profile)
    if None in profile["decode_ms_per_token"][:]:
        raise ValueError("the profile has measurements without a decode step: leave them out.")
    number_columns = ("top_k", "num_blocks", *COUNT_COLUMNS, *STAGE_COLUMNS)
    columns = {name: torch.tensor(profile[name][:], dtype=torch.float64) for name in number_columns}
    measured_ms = {
        "prefill": columns["vision_ms"] + columns["llm_prefill_ms"],
        "decode": columns["decode_ms_per_token"],
    }
    machine = {name: profile[name][0] for name in MACHINE_COLUMNS}
    executor_shape = machine.pop("executor_shape")
    config = LatencyEstimatorConfig(
        fitted_knobs={
            "tier": [tier for tier in TIERS if tier in set(profile["tier"])],
            "top_k": sorted(set(profile["top_k"])),
            "num_blocks": sorted(set(profile["num_blocks"])),
        },
        fitted_counts={name: [int(columns[name].min()), int(columns[name].max())] for name in COUNT_COLUMNS},
        executor_shape=None if executor_shape == UNKNOWN else json.loads(executor_shape),
        **machine,
    )

    held_out = {"prefill": [], "decode": []}
    tested = []
    for train, test in held_out_folds(profile, num_folds, seed):
        model = _fit_model(columns, train, config)
        estimate = model(**{name: columns[name][test] for name in (*COUNT_COLUMNS, "top_k", "num_blocks")})
        held_out["prefill"].append(estimate.prefill_ms)
        held_out["decode"].append(estimate.decode_ms_per_token)
        tested.extend(test)
    report = {stage: _errors(torch.cat(parts), measured_ms[stage][tested]) for stage, parts in held_out.items()}
    report["num_measurements"] = len(profile)
    report["num_settings"] = len(set(_settings(profile)))
    report["num_inputs"] = len(set(profile["sample_id"]))
    report["num_held_out"] = len(tested)

    config.held_out = report
    return _fit_model(columns, list(range(len(profile))), config), report


def format_model_card(model: LatencyEstimatorModel) -> str:
    """
    The README of a fitted estimator's folder: what was measured, how large the error is, and the coefficients.

    Args:
        model ([`LatencyEstimatorModel`]):
            A fitted estimator.

    Returns:
        `str`: Markdown.
    """
    config = model.config
    report = config.held_out
    errors = "\n".join(
        f"| {label} | {report[stage]['mae_ms']:.3f} | {report[stage]['mape']:.1%} | {report[stage]['r2']:.3f} |"
        for stage, label in (("prefill", "`prefill_ms`"), ("decode", "`decode_ms_per_token`"))
    )
    coefficients = "\n".join(
        f"| {stage} | {feature} | {value:.3e} |"
        for stage, names, values in (
            ("vision tower and connector", VISION_FEATURES, model.vision_coefficients),
            ("language model, prefill", LLM_PREFILL_FEATURES[config.formula_version], model.llm_prefill_coefficients),
            ("language model, decode step", DECODE_FEATURES, model.decode_coefficients),
        )
        for feature, value in zip(names, values.tolist(), strict=True)
    )
    knobs = ", ".join(f"`{knob}` {values}" for knob, values in config.fitted_knobs.items())
    counts = ", ".join(f"`{name}` {low} to {high}" for name, (low, high) in config.fitted_counts.items())
    return f"""---
library_name: transformers
tags:
- joint-controller
- latency
---

# Latency estimator

Predicts how long a Molmo executor takes for one request (batch 1) from its knob setting and token counts.

| | |
| --- | --- |
| device | {config.device_name} |
| torch, data type | {config.torch_version}, {config.executor_dtype} |
| executor | fingerprint `{config.executor_fingerprint}` |
| knobs measured | {knobs} |
| counts measured | {counts} |
| measurements | {report["num_measurements"]}: {report["num_settings"]} settings, {report["num_inputs"]} inputs |

## Error

On {report["num_held_out"]} measurements whose setting and whose input the fit had not seen (cross-validation; the
coefficients below are then fitted to all measurements).

| | MAE (ms) | MAPE | R² |
| --- | --- | --- | --- |
{errors}

## Coefficients

| stage | feature | ms per unit |
| --- | --- | --- |
{coefficients}

```python
from joint_controller import KnobSetting, LatencyEstimatorModel

model = LatencyEstimatorModel.from_pretrained("path/to/this/folder")
model.predict_latency_ms(
    [KnobSetting("low", top_k={config.fitted_knobs["top_k"][0]}, num_blocks={config.fitted_knobs["num_blocks"][0]})],
    num_views=[2],
    vision_tokens=[40],
    text_tokens=[12],
    output_tokens=[2],
)
```
"""
