"""Fits the latency estimator to a profile of the executor, and measures how well it does on what it has not seen."""

import itertools
import json
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from datasets import Dataset
from torch.nn import functional as F

from ..executor import DECODE, MODEL_SCOPE, REQUEST_SCOPE
from .configuration_latency_estimator import LatencyEstimatorConfig
from .held_out import HeldOut, conformal_quantile, report_errors
from .modeling_latency_estimator import LatencyEstimatorModel, learned_factor
from .profile_table import (
    PROVENANCE_COLUMNS,
    SINGLE_TIMES,
    UNKNOWN,
    ProfileSchema,
    check_one_machine,
    check_profile,
    profile_settings,
    time_column,
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
_SMALL_INPUT = 1e-3
_LBFGS_ITERATIONS = 100
_NNLS_ITERATIONS = 1000
_TINY = torch.finfo(torch.float64).tiny
_LBFGS_ROUNDS = 2


def fit_coefficients(
    features: torch.Tensor,
    measured_ms: torch.Tensor,
    prior: tuple[torch.Tensor, torch.Tensor] | None = None,
    reweightings: int = 20,
) -> torch.Tensor:
    """
    Non-negative coefficients, in ms per unit of each feature (float64), with a small relative error, in which single
    outliers count little (Huber's loss, by iterative reweighting): other processes disturb a measurement now and then,
    and only ever make it longer. `features` have the shape (n, k); `prior` holds further equations for the
    coefficients, which count in full: a matrix of shape (m, k), and what it is to give, of shape (m,), in the measure
    of relative errors.
    """
    from scipy.optimize import nnls  # imported here: what only predicts need not wait for it

    measured_ms = measured_ms.double()
    relative_features = features.double() / measured_ms[:, None]
    weights = torch.ones_like(measured_ms)
    prior_matrix, prior_target = prior or (features.new_zeros(0, features.shape[1]), features.new_zeros(0))
    for _ in range(reweightings):
        root = weights.sqrt()
        matrix = torch.cat([root[:, None] * relative_features, prior_matrix.double()])
        target = torch.cat([root, prior_target.double()])
        # To one scale: features differ by many orders of magnitude.
        scale = matrix.amax(0).clamp(min=_TINY)
        solution, _ = nnls((matrix / scale).numpy(), target.numpy(), maxiter=_NNLS_ITERATIONS)
        coefficients = torch.from_numpy(solution) / scale
        residuals = (relative_features @ coefficients - 1).abs()
        threshold = _HUBER_THRESHOLD * _MAD_TO_STANDARD_DEVIATION * residuals.median()
        weights = torch.where(residuals > threshold, threshold / residuals, 1.0)
    return coefficients


def fit_units(features: torch.Tensor, inputs: torch.Tensor, measured_ms: torch.Tensor, num_units: int) -> torch.Tensor:
    """
    The units of [`~latency.modeling_latency_estimator.learned_factor`], float64, with a small relative error, fitted
    together with the physical coefficients; those that go with them are what [`~latency.fitting.fit_coefficients`]
    gives for the features times the factor. Deterministic: units start as steps at even quantiles of one input each.
    `features` (n, k) are the physical ones, `inputs` (n, j) are what the factor sees, not negative.
    """
    features, inputs, log_ms = features.double(), inputs.double(), measured_ms.double().log()
    num_rows, num_inputs = inputs.shape
    scale = inputs.amax(0).clamp(min=_TINY)
    scaled = inputs / scale
    physical = fit_coefficients(features, measured_ms)
    # No coefficient starts at zero, where it would stay.
    smallest = 0.01 * (features @ physical).mean() / features.mean(0)
    weights = torch.full((num_units, num_inputs), _SMALL_WEIGHT, dtype=torch.float64)
    for unit in range(num_units):
        watched = unit % num_inputs
        quantile = (unit // num_inputs + 0.5) / math.ceil(num_units / num_inputs)
        weights[unit, watched] = 1 / scaled[:, watched].quantile(quantile).clamp(min=_SMALL_INPUT)
    first_log_weights = weights.log()
    log_steps = torch.full((num_units,), math.log(_SMALL_STEP), dtype=torch.float64)
    # One flat tensor, of which the others are views, and a gradient by hand: the tensors are so small that autograd, and
    # an optimizer of several parameters, would take longer than the arithmetic.
    starts = (torch.maximum(physical, smallest).log(), first_log_weights.flatten(), log_steps)
    parameters = torch.cat(starts)
    log_coefficients, log_weights, log_steps = parameters.split([len(start) for start in starts])
    log_weights = log_weights.view_as(first_log_weights)
    share = 1 / num_rows
    shares = torch.full_like(log_ms, share)

    def soft_steps(weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # `learned_factor`, for all units at once: x, its powers and 1 / (1 + x^8).
        x = scaled @ weights.T
        x_2 = x.square()
        x_4 = x_2.square()
        return x, x_2, x_4, x_4.square().add_(1).reciprocal_()

    def residuals() -> torch.Tensor:
        factor = 1 + (1 - soft_steps(log_weights.exp())[-1]) @ log_steps.exp()
        return (features @ log_coefficients.exp() * factor).log() - log_ms

    for fit_round in range(_LBFGS_ROUNDS):
        # What the noise is, is known better after the first round.
        misfit = residuals() if fit_round else (features @ physical).log() - log_ms
        noise = _MAD_TO_STANDARD_DEVIATION * misfit.abs().median() + 1e-6
        optimizer = torch.optim.LBFGS(
            [parameters], max_iter=_LBFGS_ITERATIONS, history_size=30, line_search_fn="strong_wolfe"
        )
        best_loss, best = math.inf, parameters.clone()

        def loss(noise=noise) -> torch.Tensor:
            nonlocal best_loss, best
            coefficients, weights, steps = log_coefficients.exp(), log_weights.exp(), log_steps.exp()
            x, x_2, x_4, below = soft_steps(weights)
            above = 1 - below
            factor = 1 + above @ steps
            physical_ms = features @ coefficients
            predicted_ms = physical_ms * factor
            deviation = (predicted_ms.log() - log_ms) / noise
            size = deviation.abs()
            # log(cosh(x)), quadratic for small residuals and linear for outliers.
            misfit = (size + F.softplus(-2 * size) - math.log(2)).sum()
            far_steps, far_weights = steps / _STEP_DEVIATION, (log_weights - first_log_weights) / _LOG_WEIGHT_DEVIATION
            total = (misfit + (far_steps.square().sum() / 2 + far_weights.square().sum() / 2)) / num_rows

            by_size = share - 2 * torch.ops.aten.softplus_backward(shares, -2 * size, 1, 20)
            by_predicted = by_size * deviation.sgn() / noise / predicted_ms
            by_factor = by_predicted * physical_ms
            # Each of the three squares gives a 2.
            by_x = torch.outer(8 * by_factor, steps).mul_(below.square()).mul_(x_4).mul_(x_2).mul_(x)
            by_weights = by_x.T @ scaled * weights + far_weights * share / _LOG_WEIGHT_DEVIATION
            by_steps = above.T @ by_factor * steps + far_steps * share / _STEP_DEVIATION * steps
            by_coefficients = features.T @ (by_predicted * factor) * coefficients
            parameters.grad = torch.cat([by_coefficients, by_weights.flatten(), by_steps])
            if total.item() < best_loss:
                best_loss, best = total.item(), parameters.clone()
            return total

        optimizer.step(loss)
        # Where the loss is flat, a step may be so long that exponentials overflow, and what follows is not a number.
        if not parameters.isfinite().all():
            parameters.copy_(best)
    return torch.cat([log_weights.exp() / scale, log_steps.exp()[:, None]], dim=1)


def held_out_folds(profile: Dataset, num_folds: int = 4, seed: int = 42) -> list[tuple[list[int], list[int]]]:
    """
    Splits a profile by setting and by input at once: settings and inputs are each divided in `num_folds` parts (fewer
    if there are fewer of them), and each pair of parts is a fold of its own. What a fold tests on shares neither a
    setting nor an input with what it trains on; measurements that share only one of the two are left out of that fold.
    Every measurement is tested on once.

    Returns:
        `list[tuple[list[int], list[int]]]`: row numbers to train on and to test on, by fold, without folds that would
        have nothing to train or to test on.

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
    What a stage is fitted to: physical features (n, k), what the learned factor sees (n, j), and measured times (n,).
    """

    features: torch.Tensor
    inputs: torch.Tensor
    measured_ms: torch.Tensor


def profile_columns(profile: Dataset) -> dict[str, torch.Tensor]:
    """The numbers of a profile: what its cost model looks at, and all times, float64; NaN where they are null."""
    schema = ProfileSchema.of(profile)
    names = (*schema.costs.knob_names, *schema.cost_model.count_names, "output_tokens", *schema.time_columns)
    return {
        name: torch.tensor([math.nan if value is None else value for value in profile[name]], dtype=torch.float64)
        for name in names
    }


def stage_data(
    columns: dict[str, torch.Tensor], rows: list[int], model: LatencyEstimatorModel
) -> dict[str, StageData]:
    """
    What each stage of an estimator is fitted to, from rows of a profile. Those without a decode step are left out of
    that stage.
    """
    data = {}
    for stage in model.costs.stages:
        measured_ms = columns[time_column(stage)][rows]
        known = ~measured_ms.isnan()
        terms = model.costs.terms(stage, {name: values[rows][known] for name, values in columns.items()})
        features, inputs = (
            torch.stack(torch.broadcast_tensors(*values, measured_ms[known])[:-1], dim=-1)
            for values in (terms.features, terms.inputs)
        )
        data[stage] = StageData(features, inputs, measured_ms[known])
    return data


def _fit_model(
    columns: dict[str, torch.Tensor], rows: list[int], config: LatencyEstimatorConfig, learned_stages: Collection[str]
) -> LatencyEstimatorModel:
    """With a learned factor in some stages."""
    model = LatencyEstimatorModel(config)
    for stage, data in stage_data(columns, rows, model).items():
        if stage in learned_stages:
            units = fit_units(data.features, data.inputs, data.measured_ms, config.num_units)
        else:
            units = torch.ones(config.num_units, data.inputs.shape[1] + 1, dtype=torch.float64)
            units[:, -1] = 0
        factor = learned_factor(units, data.inputs.unbind(1))
        coefficients = fit_coefficients(data.features * factor[:, None], data.measured_ms)
        model.set_stage_parameters(stage, coefficients, units)
    return model


def measured_parts(columns: dict[str, torch.Tensor], model: LatencyEstimatorModel) -> dict[str, torch.Tensor]:
    """
    `"preparation"` (in the scope of requests), `"prefill"`, `"decode"` (per token) and `"total"` of each measurement, in ms,
    over the stages of an estimator.
    """
    stages = model.costs.stages
    of_scope = {
        scope: sum(columns[time_column(stage)] for stage in stages if stage != DECODE and stages[stage].scope == scope)
        for scope in (REQUEST_SCOPE, MODEL_SCOPE)
    }
    return _parts(model, of_scope[REQUEST_SCOPE], of_scope[MODEL_SCOPE], columns[time_column(DECODE)], columns)


def predicted_parts(
    model: LatencyEstimatorModel, columns: dict[str, torch.Tensor], rows: list[int]
) -> dict[str, torch.Tensor]:
    """What an estimator says of the times that [`~latency.fitting.measured_parts`] gives."""
    names = (*model.costs.knob_names, *model.costs.count_names, "output_tokens")
    columns = {name: columns[name][rows] for name in names}
    estimate = model(**columns)
    parts = (estimate.preparation_ms, estimate.prefill_ms, estimate.decode_ms_per_token)
    return _parts(model, *(values.double() for values in parts), columns)


def _parts(
    model: LatencyEstimatorModel,
    preparation_ms: torch.Tensor,
    prefill_ms: torch.Tensor,
    decode_ms: torch.Tensor,
    columns: dict[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    total_ms = preparation_ms + prefill_ms + decode_ms.nan_to_num() * (columns["output_tokens"] - 1)
    parts = {"preparation": preparation_ms, "prefill": prefill_ms, "decode": decode_ms, "total": total_ms}
    if model.latency_scope == MODEL_SCOPE:
        del parts["preparation"]
    return parts


def cross_validate(profile: Dataset, num_folds: int = 4, seed: int = 42, num_units: int = 16) -> HeldOut:
    """
    Predicts measurements by estimators that have seen neither their setting nor their input. A stage has a learned factor
    where it is predicted better with one. Arguments and errors are those of [`~latency.fitting.fit_latency_estimator`].
    """
    config = estimator_config(profile, num_units)
    columns = profile_columns(profile)
    folds = held_out_folds(profile, num_folds, seed)
    stages = ProfileSchema.of(profile).costs.stages
    models = [_fit_model(columns, train, config, ()) for train, _ in folds]
    physical = predict_held_out(profile, folds, models)
    learned = [_fit_model(columns, train, config, stages) for train, _ in folds]
    misfits, learned_misfits = (_stage_misfits(columns, folds, one) for one in (models, learned))
    learned_stages = tuple(stage for stage in stages if learned_misfits[stage] < misfits[stage])
    for model, other in zip(models, learned, strict=True):
        for stage in learned_stages:
            model.set_stage_parameters(stage, *other.stage_parameters(stage))
    held_out = predict_held_out(profile, folds, models)
    return replace(held_out, physical_ms=physical.predicted_ms, learned_stages=learned_stages)


def _stage_misfits(
    columns: dict[str, torch.Tensor],
    folds: Sequence[tuple[list[int], list[int]]],
    models: Sequence[LatencyEstimatorModel],
) -> dict[str, float]:
    """The mean relative error of each stage on what the model of each fold has not seen."""
    misfits: dict[str, list[torch.Tensor]] = {}
    for model, (_, test) in zip(models, folds, strict=True):
        for stage, data in stage_data(columns, test, model).items():
            coefficients, units = (values.double() for values in model.stage_parameters(stage))
            predicted_ms = data.features @ coefficients * learned_factor(units, data.inputs.unbind(1))
            misfits.setdefault(stage, []).append((predicted_ms / data.measured_ms - 1).abs())
    return {stage: torch.cat(parts).mean().item() for stage, parts in misfits.items()}


def predict_held_out(
    profile: Dataset, folds: Sequence[tuple[list[int], list[int]]], models: Sequence[LatencyEstimatorModel]
) -> HeldOut:
    """
    Predicts what each fold ([`~latency.fitting.held_out_folds`]) tests on by the estimator that was made of the rows it
    trains on.
    """
    columns = profile_columns(profile)
    tested = [row for _, test in folds for row in test]
    by_fold = [predicted_parts(model, columns, test) for model, (_, test) in zip(models, folds, strict=True)]
    measured_ms = {part: values[tested] for part, values in measured_parts(columns, models[0]).items()}
    predicted_ms = {part: torch.cat([values[part] for values in by_fold]) for part in measured_ms}
    return HeldOut(
        rows=tested,
        folds=[number for number, (_, test) in enumerate(folds) for _ in test],
        measured_ms=measured_ms,
        predicted_ms=predicted_ms,
        physical_ms=None,
        learned_stages=(),
        single_ratios=_single_ratios(profile, tested, measured_ms, predicted_ms),
        profile=profile,
    )


def _single_ratios(
    profile: Dataset, rows: list[int], measured_ms: dict[str, torch.Tensor], predicted_ms: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """[`HeldOut.single_ratios`]. Where a profile does not know its single repeats, the measurement is taken for one."""
    preparation = "preparation" in measured_ms
    ratios = {}
    for scope in (REQUEST_SCOPE, MODEL_SCOPE) if preparation else (MODEL_SCOPE,):
        measured, predicted = (
            parts["total"] - (parts["preparation"] if preparation and scope == MODEL_SCOPE else 0.0)
            for parts in (measured_ms, predicted_ms)
        )
        column = profile[SINGLE_TIMES[scope]][:]
        singles = [column[row] or [value] for row, value in zip(rows, measured.tolist(), strict=True)]
        most = max(map(len, singles))
        padded = torch.tensor([one + [math.nan] * (most - len(one)) for one in singles], dtype=torch.float64)
        ratios[scope] = padded / predicted[:, None]
    return ratios


def calibrate_quantiles(held_out: HeldOut) -> dict[str, dict[str, float]]:
    """The upper quantiles of [`LatencyEstimatorConfig`], from the errors on what was held out."""
    return {
        scope: {str(quantile): conformal_quantile(ratios.flatten(), quantile) for quantile in UPPER_QUANTILES}
        for scope, ratios in held_out.single_ratios.items()
    }


def estimator_config(profile: Dataset, num_units: int) -> LatencyEstimatorConfig:
    """
    Configuration of an estimator that is fitted to a profile. Refuses a table that is not a profile, mixes executors
    or machines, or has no decode step.
    """
    schema = check_profile(profile)
    check_one_machine(profile)
    if set(profile[time_column(DECODE)]) == {None}:
        raise ValueError("the profile has no measurement with a decode step: decode at least one token in each.")
    machine = profile[0]
    machine["num_threads"] = int(machine["num_threads"]) if machine["num_threads"].isdigit() else None
    measured = {name: set(profile[name]) for name in schema.knob_space.names}
    return LatencyEstimatorConfig(
        executor_type=machine["executor_type"],
        executor_shape=None if machine["executor_shape"] == UNKNOWN else json.loads(machine["executor_shape"]),
        prefill_lengths=machine["prefill_lengths"],
        latency_scope=machine["latency_scope"],
        num_units=num_units,
        fitted_knobs={
            name: [value for value in values if value in measured[name]]
            for name, values in schema.knob_space.values.items()
        },
        fitted_counts={name: [min(profile[name]), max(profile[name])] for name in schema.costs.count_names},
        **{name: machine[name] for name in PROVENANCE_COLUMNS},
    )


def fit_latency_estimator(
    profile: Dataset, num_folds: int = 4, seed: int = 42, num_units: int = 16, held_out: HeldOut | None = None
) -> tuple[LatencyEstimatorModel, dict[str, Any]]:
    """
    Fits a latency estimator to a profile. The error is measured by cross-validation over settings and inputs that a fit
    did not see; the estimator that is returned is fitted to all measurements, and its upper quantiles to the held-out
    errors of single requests.

    Args:
        profile ([`~datasets.Dataset`]):
            Measurements of one executor on one machine, see [`~latency.profiling.profile_executor`].
        num_folds (`int`, *optional*, defaults to 4):
            Parts of settings and of inputs in the cross-validation.
        seed (`int`, *optional*, defaults to 42):
            Seed of the division into folds.
        num_units (`int`, *optional*, defaults to 16):
            Units of the learned factor of each stage.
        held_out ([`~latency.held_out.HeldOut`], *optional*):
            Result of [`~latency.fitting.cross_validate`] with the same arguments, if it is there already.

    Returns:
        `tuple[LatencyEstimatorModel, dict[str, Any]]`: the estimator, and its held-out error, which is also kept in
        `config.held_out`, see [`~latency.held_out.report_errors`].

    Raises:
        ValueError: If the profile lacks columns, is empty, mixes executors or machines, holds times that are not
            positive or no decode step, or has too few settings or inputs.
    """
    config = estimator_config(profile, num_units)
    if held_out is None:
        held_out = cross_validate(profile, num_folds, seed, num_units)
    config.held_out = report_errors(held_out)
    config.upper_quantiles = calibrate_quantiles(held_out)
    rows = list(range(len(profile)))
    return _fit_model(profile_columns(profile), rows, config, held_out.learned_stages), config.held_out
