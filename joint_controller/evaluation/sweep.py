"""The budget sweep: what policies choose under each of several latency budgets, and what comes of it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset

from ..knobs import KnobSpace
from ..latency import LatencyEstimator
from ..outcomes import Outcome, OutcomeSource, collect_shares
from ..rewards import DEFAULT_REWARDS, RewardFunction, reward_columns, total_reward
from .baselines import (
    BestStaticPolicy,
    CeilingPolicy,
    FitsPolicy,
    Forecast,
    KnownOutcomes,
    LookUpPolicy,
    QuestionTypePolicy,
    RandomPolicy,
    StaticPolicy,
    TrainingOutcomes,
)
from .policies import Policy
from .request_table import NOT_TRAINED, Choices, build_request_table


BASELINES = ("full", "static", "static by reward", "fits", "look-up", "per question type", "random", "ceiling")
"""Names of the policies that are not trained, in the order of tables."""

NEED_FORECAST = ("fits", "look-up", "per question type")
"""Those that have to know beforehand what a request takes at each setting."""


def baseline_policies(
    training: TrainingOutcomes,
    knob_space: KnobSpace,
    budgets_ms: Sequence[float],
    names: Sequence[str] | None = None,
    forecast: Forecast | None = None,
    known: KnownOutcomes | None = None,
    seed: int = 42,
) -> list[Policy]:
    """
    What a controller is compared with. `docs/sweep.md` says what each policy does.

    Args:
        training ([`TrainingOutcomes`]):
            What settings are chosen on.
        knob_space ([`KnobSpace`]):
            The settings.
        budgets_ms (`Sequence[float]`):
            Budgets of the sweep, in ms.
        names (`Sequence[str]`, *optional*):
            Names from `BASELINES`. By default all but the ceiling, and without a forecast none that needs one.
        forecast ([`Forecast`], *optional*):
            Says which settings fit a request.
        known ([`KnownOutcomes`], *optional*):
            Outcomes of the samples that are to be evaluated, for the ceiling.
        seed (`int`, *optional*, defaults to 42):
            Draws the random settings.

    Returns:
        `list[Policy]`: in the order of the names.

    Raises:
        ValueError: If a name is unknown, a policy needs what is not given, or no setting keeps a budget.
    """
    if names is None:
        names = [name for name in BASELINES if name != "ceiling" and (forecast or name not in NEED_FORECAST)]
    unknown = [name for name in names if name not in BASELINES]
    if unknown:
        raise ValueError(f"there is no policy '{unknown[0]}': choose from {', '.join(map(repr, BASELINES))}.")
    for name in names:
        if name in NEED_FORECAST and forecast is None:
            raise ValueError(
                f"policy '{name}' has to know what requests will take, and nothing predicts it here: leave it out, or give a "
                "guardrail."
            )
        if name == "ceiling" and known is None:
            raise ValueError("policy 'ceiling' has to know the outcomes of all samples: leave it out, or give them.")
    for budget in budgets_ms:
        training.best_static(budget)  # a budget that nothing fits is refused here
    make = {
        "full": lambda: StaticPolicy(knob_space.full, "full"),
        "static": lambda: BestStaticPolicy(training),
        "static by reward": lambda: BestStaticPolicy(training, by_reward=True),
        "fits": lambda: FitsPolicy(training, forecast),
        "look-up": lambda: LookUpPolicy(training, forecast),
        "per question type": lambda: QuestionTypePolicy(training, forecast),
        "random": lambda: RandomPolicy(knob_space, seed),
        "ceiling": lambda: CeilingPolicy(known),
    }
    return [make[name]() for name in names]


def sweep_budgets(
    policies: Sequence[Policy],
    outcomes: OutcomeSource,
    latency_estimator: LatencyEstimator,
    samples: Sequence[Mapping[str, Any]],
    budgets_ms: Sequence[float],
    full_setting_ms: float,
    rewards: Mapping[RewardFunction, float] = DEFAULT_REWARDS,
    seeds: Sequence[int] | None = None,
    forecast: Forecast | None = None,
    together: bool = False,
    progress: bool = False,
) -> Dataset:
    """
    Runs every policy under every budget.

    Args:
        policies (`Sequence[Policy]`):
            What to compare.
        outcomes ([`OutcomeSource`]):
            Gives outcomes; each pair of sample and setting runs once, whichever policies choose it.
        latency_estimator ([`LatencyEstimator`]):
            Gives latencies.
        samples (`Sequence[dict]`):
            Held-out samples.
        budgets_ms (`Sequence[float]`):
            Budgets, in ms.
        full_setting_ms (`float`):
            Mean latency of the full setting, in ms, for `budget_fraction`.
        rewards (`Mapping[RewardFunction, float]`, *optional*, defaults to `DEFAULT_REWARDS`):
            Reward functions and their weights.
        seeds (`Sequence[int]`, *optional*):
            Seed of the training of each policy; -1 for one that was not trained, the default.
        forecast ([`Forecast`], *optional*):
            If it gives upper quantiles, they are the column `upper_latency_ms`.
        together (`bool`, *optional*, defaults to `False`):
            Whether all processes call this at once, each with all samples: each then answers its share.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar (of one process).

    Returns:
        `datasets.Dataset`: the request table, budget by budget and policy by policy, see
        [`~evaluation.request_table.request_features`].

    Raises:
        ValueError: If there is nothing to compare, two policies have one name and seed, or a policy does not choose one
            setting for each sample.
    """
    seeds = [NOT_TRAINED] * len(policies) if seeds is None else list(seeds)
    _check(policies, seeds, samples, budgets_ms)
    space = outcomes.knob_space
    positions = _choose(policies, space, samples, budgets_ms, together)  # (budgets, policies, samples)
    # All at once, so that the executor gets large batches of equal settings.
    is_chosen = np.zeros((len(samples), len(space)), dtype=bool)
    is_chosen[np.arange(len(samples)), positions] = True
    rows, columns = np.nonzero(is_chosen)
    asked = [samples[row] for row in rows], [space.settings[column] for column in columns]
    collected = collect_shares(outcomes, *asked) if together else outcomes.collect(*asked, progress=progress)
    accuracy, latency_ms = (np.full(is_chosen.shape, np.nan) for _ in range(2))
    accuracy[rows, columns] = [outcome.accuracy for outcome in collected]
    latency_ms[rows, columns] = latency_estimator.latency_ms(collected).double().numpy()
    outcome_of: dict[tuple[int, int], Outcome] = dict(
        zip(zip(rows.tolist(), columns.tolist(), strict=True), collected, strict=True)
    )
    choices = []
    for budget, of_budget in zip(budgets_ms, positions, strict=True):
        for policy, seed, chosen in zip(policies, seeds, of_budget, strict=True):
            chosen_outcomes = [outcome_of[key] for key in enumerate(chosen.tolist())]
            chosen_ms = latency_ms[np.arange(len(samples)), chosen].tolist()
            given = reward_columns(space, samples, chosen_outcomes, chosen_ms, [budget] * len(samples))
            reward = total_reward(rewards, given)
            choices.append(Choices(policy.name, seed, budget / full_setting_ms, budget, chosen, reward))
    has_upper = forecast is not None and forecast.is_upper
    upper_ms = forecast.latency_ms(samples) if has_upper else None
    return build_request_table(space, samples, choices, accuracy, latency_ms, upper_ms)


def _check(
    policies: Sequence[Policy],
    seeds: Sequence[int],
    samples: Sequence[Mapping[str, Any]],
    budgets_ms: Sequence[float],
) -> None:
    for name, values in (("policies", policies), ("samples", samples), ("budgets_ms", budgets_ms)):
        if not len(values):
            raise ValueError(f"`{name}` is empty: give at least one.")
    if len(seeds) != len(policies):
        raise ValueError(f"`seeds` has {len(seeds)} values for {len(policies)} policies: give one for each.")
    keys = [(policy.name, seed) for policy, seed in zip(policies, seeds, strict=True)]
    for name, seed in keys:
        if keys.count((name, seed)) > 1:
            raise ValueError(f"two policies are named '{name}' and have the seed {seed}: give each a name of its own.")


def _choose(
    policies: Sequence[Policy],
    space: KnobSpace,
    samples: Sequence[Mapping[str, Any]],
    budgets_ms: Sequence[float],
    together: bool,
) -> np.ndarray:
    """Positions of the settings that policies choose, of shape `(budgets, policies, samples)`."""
    state = PartialState()
    shares = state.num_processes if together else 1
    mine = range(state.process_index if together else 0, len(samples), shares)
    asked = [samples[row] for row in mine]
    chosen = np.empty((len(budgets_ms), len(policies), len(asked)), dtype=np.int32)
    for number, budget in enumerate(budgets_ms):
        for column, policy in enumerate(policies):
            settings = policy.choose(asked, budget) if asked else []
            if len(settings) != len(asked):
                raise ValueError(
                    f"policy '{policy.name}' chose {len(settings)} settings for {len(asked)} samples: it must choose one for "
                    "each."
                )
            chosen[number, column] = [space.index(setting) for setting in settings]
    if shares == 1:
        return chosen
    positions = np.empty((*chosen.shape[:2], len(samples)), dtype=np.int32)
    for index, share in enumerate(gather_object([chosen])):
        positions[..., index::shares] = share
    return positions
