"""Fits the latency estimator to a profile of the executor, and measures how well it does on what it has not seen."""

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from datasets import Dataset
from torch.nn import functional as F

from ..knobs import TIERS
from .configuration_latency_estimator import LatencyEstimatorConfig
from .fit_report import conformal_quantile, report_errors
from .modeling_latency_estimator import (
    LatencyEstimatorModel,
    decode_features,
    decode_inputs,
    learned_factor,
    llm_prefill_features,
    llm_prefill_inputs,
    mean_context,
    pad_lengths,
    vision_features,
)
from .profile_table import (
    COUNT_COLUMNS,
    MACHINE_COLUMNS,
    STAGE_COLUMNS,
    UNKNOWN,
    check_one_machine,
    check_profile,
    profile_settings,
)


UPPER_QUANTILES = (0.9, 0.95, 0.99)
"""Quantiles that every estimator is fitted for."""

# Residuals beyond 1.345 standard deviations weigh less (Huber's constant: 95 % efficient if errors are normal after
# all); 1.4826 turns a median absolute deviation into a standard deviation.
_HUBER_THRESHOLD = 1.345
_MAD_TO_STANDARD_DEVIATION = 1.4826

# The learned factor is the most likely one under a normal prior: steps of about half the physical terms, weights within
# a factor of e of where they start. Chosen on formulas with kinks and steps, 30 to 300 measurements and 1 to 5 % noise:
# never worse there than the physical terms alone.
_STEP_DEVIATION = 0.5
_LOG_WEIGHT_DEVIATION = 1.0
_SMALL_STEP = 0.02
_SMALL_WEIGHT = 0.05
_LBFGS_ITERATIONS = 100
_LBFGS_ROUNDS = 2


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
    scale = matrix.abs().amax(0).clamp(min=torch.finfo(torch.float64).tiny)
    # The triangular factor stands for all rows, however many were measured.
    triangular = torch.linalg.qr(torch.cat([matrix / scale, target[:, None]], dim=1), mode="r").R
    columns, reduced_target = triangular[:, :-1], triangular[:, -1]
    subsets = _column_subsets(matrix.shape[1])  # (subsets, k), 1 where a column is in
    # The normal equations of each subset, those of the columns that are out being x = 0. The small diagonal lets columns
    # depend on each other, as when only one value of a knob was measured; the second step takes out what it adds.
    gram = columns.T @ columns
    diagonal = torch.where(subsets > 0, 1e-14 * gram.diagonal().max(), 1.0)
    systems = gram * subsets[:, :, None] * subsets[:, None, :] + torch.diag_embed(diagonal)
    solutions = torch.zeros_like(subsets)
    for _ in range(2):
        residuals = reduced_target[:, None] - columns @ solutions.T  # (rows, subsets)
        solutions = solutions + torch.linalg.solve(systems, (subsets * (columns.T @ residuals).T)[..., None])[..., 0]
    errors = (columns @ solutions.T - reduced_target[:, None]).square().sum(0)
    errors[(solutions < 0).any(1)] = math.inf
    error_of_zero = reduced_target.square().sum()
    tolerance = 1e-12 * error_of_zero
    best = errors.min()
    if not best < error_of_zero - tolerance:
        return torch.zeros_like(scale)
    return solutions[(errors <= best + tolerance).nonzero()[0, 0]] / scale


@lru_cache
def _column_subsets(num_columns: int) -> torch.Tensor:
    """All subsets of columns but the empty one, as rows of ones and zeros, the smallest subsets first."""
    subsets = [
        [float(column in chosen) for column in range(num_columns)]
        for size in range(1, num_columns + 1)
        for chosen in itertools.combinations(range(num_columns), size)
    ]
    return torch.tensor(subsets, dtype=torch.float64)


def fit_coefficients(
    features: torch.Tensor,
    measured_ms: torch.Tensor,
    prior: tuple[torch.Tensor, torch.Tensor] | None = None,
    reweightings: int = 20,
) -> torch.Tensor:
    """
    Non-negative coefficients with a small relative error, in which single outliers count little (Huber's loss, by
    iterative reweighting): other processes disturb a measurement now and then, and only ever make it longer.

    Args:
        features (`torch.Tensor` of shape (n, k)):
            Non-negative features of each measurement.
        measured_ms (`torch.Tensor` of shape (n,)):
            Measured times, positive.
        prior (`tuple[torch.Tensor, torch.Tensor]`, *optional*):
            Further equations for the coefficients, which count in full: a matrix of shape (m, k), and what it is to give,
            of shape (m,), in the measure of relative errors.
        reweightings (`int`, *optional*, defaults to 20):
            Iterations.

    Returns:
        `torch.Tensor` of shape (k,): milliseconds per unit of each feature, float64.
    """
    measured_ms = measured_ms.double()
    relative_features = features.double() / measured_ms[:, None]
    weights = torch.ones_like(measured_ms)
    prior_matrix, prior_target = prior or (features.new_zeros(0, features.shape[1]), features.new_zeros(0))
    for _ in range(reweightings):
        root = weights.sqrt()
        coefficients = nonnegative_least_squares(
            torch.cat([root[:, None] * relative_features, prior_matrix.double()]),
            torch.cat([root, prior_target.double()]),
        )
        residuals = (relative_features @ coefficients - 1).abs()
        threshold = _HUBER_THRESHOLD * _MAD_TO_STANDARD_DEVIATION * residuals.median()
        weights = torch.where(residuals > threshold, threshold / residuals, 1.0)
    return coefficients


def fit_units(features: torch.Tensor, inputs: torch.Tensor, measured_ms: torch.Tensor, num_units: int) -> torch.Tensor:
    """
    The units of [`~latency.modeling_latency_estimator.learned_factor`] with a small relative error, fitted together with
    the physical coefficients. Deterministic: the units start as steps at even quantiles of one input each.

    Args:
        features (`torch.Tensor` of shape (n, k)):
            Physical features of each measurement.
        inputs (`torch.Tensor` of shape (n, j)):
            What the factor sees, positive.
        measured_ms (`torch.Tensor` of shape (n,)):
            Measured times, positive.
        num_units (`int`):
            Units.

    Returns:
        `torch.Tensor` of shape (num_units, j + 1): float64. The physical coefficients that go with them are those that
        [`~latency.fitting.fit_coefficients`] gives for the features times the factor.
    """
    features, inputs, log_ms = features.double(), inputs.double(), measured_ms.double().log()
    num_rows, num_inputs = inputs.shape
    scale = inputs.amax(0)
    scaled = inputs / scale
    physical = fit_coefficients(features, measured_ms)
    # No coefficient starts at zero, where it would stay.
    smallest = 0.01 * (features @ physical).mean() / features.mean(0)
    weights = torch.full((num_units, num_inputs), _SMALL_WEIGHT, dtype=torch.float64)
    for unit in range(num_units):
        watched = unit % num_inputs
        quantile = (unit // num_inputs + 0.5) / math.ceil(num_units / num_inputs)
        weights[unit, watched] = 1 / scaled[:, watched].quantile(quantile)
    first_log_weights = weights.log()
    log_steps = torch.full((num_units,), math.log(_SMALL_STEP), dtype=torch.float64)
    parameters = [torch.maximum(physical, smallest).log(), first_log_weights.clone(), log_steps]
    for parameter in parameters:
        parameter.requires_grad_()

    def residuals() -> torch.Tensor:
        # `learned_factor`, for all units at once.
        z = (scaled @ parameters[1].exp().T).square().square().square()
        factor = 1 + (1 - 1 / (1 + z)) @ parameters[2].exp()
        return (features @ parameters[0].exp() * factor).log() - log_ms

    with torch.enable_grad():
        for fit_round in range(_LBFGS_ROUNDS):
            with torch.no_grad():
                # What the noise is, is known better after the first round.
                misfit = residuals() if fit_round else (features @ physical).log() - log_ms
                noise = _MAD_TO_STANDARD_DEVIATION * misfit.abs().median() + 1e-6
            optimizer = torch.optim.LBFGS(
                parameters, max_iter=_LBFGS_ITERATIONS, history_size=30, line_search_fn="strong_wolfe"
            )

            best_loss, best = math.inf, [parameter.detach().clone() for parameter in parameters]

            def loss(noise=noise, optimizer=optimizer) -> torch.Tensor:
                nonlocal best_loss, best
                optimizer.zero_grad()
                size = (residuals() / noise).abs()
                # log(cosh(x)), quadratic for small residuals and linear for outliers.
                misfit = (size + F.softplus(-2 * size) - math.log(2)).sum()
                prior = (parameters[2].exp() / _STEP_DEVIATION).square().sum() / 2
                prior = prior + ((parameters[1] - first_log_weights) / _LOG_WEIGHT_DEVIATION).square().sum() / 2
                total = (misfit + prior) / num_rows
                total.backward()
                if total.item() < best_loss:
                    best_loss, best = total.item(), [parameter.detach().clone() for parameter in parameters]
                return total

            optimizer.step(loss)
            # Where the loss is flat, a step may be so long that exponentials overflow, and what follows is not a number.
            if not all(parameter.isfinite().all() for parameter in parameters):
                with torch.no_grad():
                    for parameter, value in zip(parameters, best, strict=True):
                        parameter.copy_(value)
    return torch.cat([parameters[1].detach().exp() / scale, parameters[2].detach().exp()[:, None]], dim=1)


def held_out_folds(profile: Dataset, num_folds: int = 4, seed: int = 42) -> list[tuple[list[int], list[int]]]:
    """
    Splits a profile by setting and by input at once: settings and inputs are each divided in `num_folds` parts, and each
    pair of parts is a fold of its own. What a fold tests on shares neither a setting nor an input with what it trains on;
    measurements that share only one of the two are left out of that fold. Every measurement is tested on once.

    Args:
        profile ([`~datasets.Dataset`]):
            Measurements, see [`~latency.profile_executor`].
        num_folds (`int`, *optional*, defaults to 4):
            Parts that settings and inputs are each divided in; fewer if there are fewer settings or inputs.
        seed (`int`, *optional*, defaults to 42):
            Seed of the division.

    Returns:
        `list[tuple[list[int], list[int]]]`: row numbers to train on and to test on, by fold: `num_folds` squared, less
        those that would have nothing to train or to test on.

    Raises:
        ValueError: If the profile has fewer than two settings or two inputs, or no fold has rows on both sides.
    """
    settings = profile_settings(profile)
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
    for fold in itertools.product(range(num_folds), repeat=2):
        train = [row for row, parts in enumerate(pairs) if parts[0] != fold[0] and parts[1] != fold[1]]
        test = [row for row, parts in enumerate(pairs) if parts == fold]
        if train and test:
            folds.append((train, test))
    if not folds:
        raise ValueError(
            f"the profile's {len(pairs)} measurement(s) of {num_settings} settings and {num_inputs} inputs leave nothing "
            "to test on. Profile more."
        )
    return folds


@dataclass(frozen=True)
class StageData:
    """
    What a stage of the estimator is fitted to.

    Args:
        features (`torch.Tensor` of shape (n, k)):
            Physical features.
        inputs (`torch.Tensor` of shape (n, j)):
            What the learned factor sees.
        measured_ms (`torch.Tensor` of shape (n,)):
            Measured times.
    """

    features: torch.Tensor
    inputs: torch.Tensor
    measured_ms: torch.Tensor


def profile_columns(profile: Dataset) -> dict[str, torch.Tensor]:
    """The numbers of a profile that fitting looks at, float64; NaN where the decode time is null."""
    names = ("top_k", "num_blocks", "output_tokens", *COUNT_COLUMNS, *STAGE_COLUMNS)
    return {
        name: torch.tensor([math.nan if value is None else value for value in profile[name]], dtype=torch.float64)
        for name in names
    }


def stage_data(
    columns: dict[str, torch.Tensor], rows: list[int], model: LatencyEstimatorModel
) -> dict[str, StageData]:
    """
    What each stage (`"vision"`, `"llm_prefill"`, `"decode"`) of an estimator of version 2 is fitted to.

    Args:
        columns (`dict[str, torch.Tensor]`):
            The profile, see [`~latency.fitting.profile_columns`].
        rows (`list[int]`):
            Measurements to take. Those without a decode step are left out of that stage.
        model ([`LatencyEstimatorModel`]):
            The estimator: it knows the executor's experts and how prompts are padded.
    """
    columns = {name: values[rows] for name, values in columns.items()}
    num_tokens = columns["vision_tokens"] + columns["text_tokens"]
    knobs = columns["top_k"], columns["num_blocks"]
    padded_tokens = pad_lengths(num_tokens, model.config.prefill_lengths)
    context = mean_context(num_tokens, columns["output_tokens"])
    views = columns["num_views"]
    decoded = ~columns["decode_ms_per_token"].isnan()
    return {
        "vision": StageData(
            torch.stack(vision_features(views), dim=-1), torch.stack([views], dim=-1), columns["vision_ms"]
        ),
        "llm_prefill": StageData(
            torch.stack(llm_prefill_features(padded_tokens, *knobs, model.num_experts), dim=-1),
            torch.stack(llm_prefill_inputs(padded_tokens, *knobs), dim=-1),
            columns["llm_prefill_ms"],
        ),
        "decode": StageData(
            torch.stack(decode_features(context, *knobs), dim=-1)[decoded],
            torch.stack(decode_inputs(context, *knobs), dim=-1)[decoded],
            columns["decode_ms_per_token"][decoded],
        ),
    }


def _fit_model(
    columns: dict[str, torch.Tensor], rows: list[int], config: LatencyEstimatorConfig, learned: bool = True
) -> LatencyEstimatorModel:
    model = LatencyEstimatorModel(config)
    for stage, data in stage_data(columns, rows, model).items():
        if learned:
            units = fit_units(data.features, data.inputs, data.measured_ms, config.num_units)
        else:
            units = torch.ones_like(model.get_parameter(f"{stage}_units"), dtype=torch.float64)
            units[:, -1] = 0
        factor = learned_factor(units, data.inputs.unbind(1))
        coefficients = fit_coefficients(data.features * factor[:, None], data.measured_ms)
        model.get_parameter(f"{stage}_coefficients").copy_(coefficients)
        model.get_parameter(f"{stage}_units").copy_(units)
    return model


@dataclass(frozen=True)
class HeldOut:
    """
    Measurements that were predicted by an estimator which had seen neither their setting nor their input.

    Args:
        rows (`list[int]`):
            Rows of the profile.
        folds (`list[int]`):
            Fold of each of them.
        measured_ms, predicted_ms (`dict[str, torch.Tensor]`):
            `"prefill"`, `"decode"` (per token) and `"total"` of each row, float64. NaN where nothing was decoded.
        physical_ms (`dict[str, torch.Tensor]` or `None`):
            What the physical terms alone predict, if that was asked.
        profile ([`~datasets.Dataset`]):
            The profile.
    """

    rows: list[int]
    folds: list[int]
    measured_ms: dict[str, torch.Tensor]
    predicted_ms: dict[str, torch.Tensor]
    physical_ms: dict[str, torch.Tensor] | None
    profile: Dataset


def measured_parts(columns: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`"prefill"`, `"decode"` (per token) and `"total"` of each measurement, in ms."""
    prefill_ms = columns["vision_ms"] + columns["llm_prefill_ms"]
    decode_ms = columns["decode_ms_per_token"]
    total_ms = prefill_ms + decode_ms.nan_to_num() * (columns["output_tokens"] - 1)
    return {"prefill": prefill_ms, "decode": decode_ms, "total": total_ms}


def predicted_parts(
    model: LatencyEstimatorModel, columns: dict[str, torch.Tensor], rows: list[int]
) -> dict[str, torch.Tensor]:
    """What an estimator says of the times that [`~latency.fitting.measured_parts`] gives."""
    names = (*COUNT_COLUMNS, "top_k", "num_blocks", "output_tokens")
    estimate = model(**{name: columns[name][rows] for name in names})
    prefill_ms, decode_ms = estimate.prefill_ms.double(), estimate.decode_ms_per_token.double()
    return {
        "prefill": prefill_ms,
        "decode": decode_ms,
        "total": prefill_ms + decode_ms * (columns["output_tokens"][rows] - 1),
    }


def cross_validate(profile: Dataset, num_folds: int = 4, seed: int = 42, num_units: int = 16) -> HeldOut:
    """
    Predicts measurements by estimators that have seen neither their setting nor their input.

    Args:
        profile ([`~datasets.Dataset`]):
            Measurements of one executor on one machine, see [`~latency.profile_executor`].
        num_folds (`int`, *optional*, defaults to 4):
            Parts of settings and of inputs, see [`~latency.fitting.held_out_folds`].
        seed (`int`, *optional*, defaults to 42):
            Seed of the division into folds.
        num_units (`int`, *optional*, defaults to 16):
            Units of the learned factors.

    Raises:
        ValueError: As [`~latency.fit_latency_estimator`].
    """
    config = estimator_config(profile, num_units)
    columns = profile_columns(profile)
    folds = held_out_folds(profile, num_folds, seed)
    physical = predict_held_out(profile, folds, lambda rows: _fit_model(columns, rows, config, learned=False))
    held_out = predict_held_out(profile, folds, lambda rows: _fit_model(columns, rows, config))
    return replace(held_out, physical_ms=physical.predicted_ms)


def predict_held_out(
    profile: Dataset, folds: Sequence[tuple[list[int], list[int]]], fit: Callable[[list[int]], LatencyEstimatorModel]
) -> HeldOut:
    """
    Predicts what each fold tests on by the estimator that `fit` makes of the rows it trains on.

    Args:
        profile ([`~datasets.Dataset`]):
            The profile.
        folds (`Sequence[tuple[list[int], list[int]]]`):
            Rows to train on and to test on, see [`~latency.fitting.held_out_folds`].
        fit (`Callable[[list[int]], LatencyEstimatorModel]`):
            Makes an estimator of rows of the profile.
    """
    columns = profile_columns(profile)
    tested = [row for _, test in folds for row in test]
    predicted = [predicted_parts(fit(train), columns, test) for train, test in folds]
    return HeldOut(
        rows=tested,
        folds=[number for number, (_, test) in enumerate(folds) for _ in test],
        measured_ms={part: values[tested] for part, values in measured_parts(columns).items()},
        predicted_ms={part: torch.cat([values[part] for values in predicted]) for part in predicted[0]},
        physical_ms=None,
        profile=profile,
    )


def calibrate_quantiles(held_out: HeldOut) -> dict[str, dict[str, float]]:
    """The upper quantiles of [`LatencyEstimatorConfig`], from the errors on what was held out."""
    return {
        part: {
            str(quantile): conformal_quantile(held_out.measured_ms[part] / held_out.predicted_ms[part], quantile)
            for quantile in UPPER_QUANTILES
        }
        for part in held_out.measured_ms
    }


def estimator_config(profile: Dataset, num_units: int) -> LatencyEstimatorConfig:
    """
    Configuration of an estimator that is fitted to a profile: what was measured on what.

    Raises:
        ValueError: If the profile is none, mixes executors or machines, or has no decode step.
    """
    check_profile(profile)
    check_one_machine(profile)
    if set(profile["decode_ms_per_token"]) == {None}:
        raise ValueError("the profile has no measurement with a decode step: decode at least one token in each.")
    machine = {name: profile[name][0] for name in MACHINE_COLUMNS}
    shape = machine.pop("executor_shape")
    return LatencyEstimatorConfig(
        formula_version=2,
        num_units=num_units,
        prefill_lengths=profile["prefill_lengths"][0],
        fitted_knobs={
            "tier": [tier for tier in TIERS if tier in set(profile["tier"])],
            "top_k": sorted(set(profile["top_k"])),
            "num_blocks": sorted(set(profile["num_blocks"])),
        },
        fitted_counts={name: [min(profile[name]), max(profile[name])] for name in COUNT_COLUMNS},
        executor_shape=None if shape == UNKNOWN else json.loads(shape),
        **machine,
    )


def fit_latency_estimator(
    profile: Dataset, num_folds: int = 4, seed: int = 42, num_units: int = 16, held_out: HeldOut | None = None
) -> tuple[LatencyEstimatorModel, dict[str, Any]]:
    """
    Fits a latency estimator to a profile. The error is measured by cross-validation over settings and inputs that a fit
    did not see; the estimator that is returned is fitted to all measurements, and its upper quantiles to the held-out
    errors.

    Args:
        profile ([`~datasets.Dataset`]):
            Measurements of one executor on one machine, see [`~latency.profile_executor`].
        num_folds (`int`, *optional*, defaults to 4):
            Parts of settings and of inputs in the cross-validation.
        seed (`int`, *optional*, defaults to 42):
            Seed of the division into folds.
        num_units (`int`, *optional*, defaults to 16):
            Units of the learned factor of each stage.
        held_out ([`~latency.fitting.HeldOut`], *optional*):
            Result of [`~latency.cross_validate`] with the same arguments, if it is there already.

    Returns:
        `tuple[LatencyEstimatorModel, dict[str, Any]]`: the estimator, and its held-out error, which is also kept in
        `config.held_out`, see [`~latency.fit_report.report_errors`].

    Raises:
        ValueError: If the profile lacks columns, is empty, mixes executors or machines, holds times that are not
            positive or no decode step, or has too few settings or inputs.
    """
    config = estimator_config(profile, num_units)
    if held_out is None:
        held_out = cross_validate(profile, num_folds, seed, num_units)
    config.held_out = report_errors(held_out)
    config.upper_quantiles = calibrate_quantiles(held_out)
    return _fit_model(profile_columns(profile), list(range(len(profile))), config), config.held_out
