"""The budget sweep: how good policies are under each of several latency budgets."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from rich.table import Table

from ..knobs import KnobSetting
from ..latency import LatencyEstimator
from ..outcomes import OutcomeSource
from ..rewards import DEFAULT_REWARDS, RewardFunction, reward_columns, total_reward
from .policies import BestStaticPolicy, Policy, RandomPolicy, StaticPolicy


SWEEP_FILE = "sweep.parquet"
"""Name of a sweep's table in an output folder."""

MAX_VIOLATION_RATE = 0.05
"""A static setting fits a budget if it exceeds the budget on at most this share of the samples."""


@dataclass(frozen=True)
class SweepRow:
    """
    What one policy achieved under one budget.

    Args:
        policy (`str`):
            Name of the policy.
        latency_budget_ms, budget_fraction (`float`):
            Budget of every request, in ms and as a fraction of the full setting's mean latency.
        reward, accuracy, latency_ms (`float`):
            Means over the requests; the latency is estimated.
        budget_violation_rate (`float`):
            Share of requests whose estimated latency exceeds the budget.
        most_common_setting (`str`), most_common_share (`float`):
            Setting that was chosen most often, and how often.
        num_samples (`int`):
            Requests.
    """

    policy: str
    latency_budget_ms: float
    budget_fraction: float
    reward: float
    accuracy: float
    latency_ms: float
    budget_violation_rate: float
    most_common_setting: str
    most_common_share: float
    num_samples: int


class StaticSettings:
    """
    Outcomes of every setting on the same samples, from which the best static setting of a budget is picked: a setting
    is chosen on training samples and judged on others. Arguments are as in [`sweep_budgets`].
    """

    def __init__(
        self,
        outcomes: OutcomeSource,
        latency_estimator: LatencyEstimator,
        samples: Sequence[Mapping[str, Any]],
        rewards: Mapping[RewardFunction, float] = DEFAULT_REWARDS,
        progress: bool = False,
    ):
        self.settings = outcomes.knob_space.settings
        self.rewards = rewards
        every_sample = [sample for sample in samples for _ in self.settings]
        collected = outcomes.collect(every_sample, list(self.settings) * len(samples), progress=progress)
        latency_ms = latency_estimator.latency_ms(collected)
        budgets = [float("nan")] * len(collected)  # each is asked for later
        self._columns = reward_columns(outcomes.knob_space, every_sample, collected, latency_ms.tolist(), budgets)
        self.latency_ms = latency_ms.double().numpy().reshape(len(samples), len(self.settings))

    def best(self, latency_budget_ms: float) -> KnobSetting:
        """
        The setting with the highest mean reward among those that fit a budget in ms.

        Raises:
            ValueError: If no setting fits.
        """
        fits = (self.latency_ms > latency_budget_ms).mean(axis=0) <= MAX_VIOLATION_RATE
        if not fits.any():
            raise ValueError(
                f"no setting fits a budget of {latency_budget_ms:.3f} ms: the cheapest takes "
                f"{self.latency_ms.mean(axis=0).min():.3f} ms. Raise the budget."
            )
        budgets = [latency_budget_ms] * self.latency_ms.size
        rewards = total_reward(self.rewards, {**self._columns, "latency_budget_ms": budgets})
        mean_rewards = rewards.reshape(self.latency_ms.shape).mean(axis=0)
        return self.settings[int(np.where(fits, mean_rewards, -np.inf).argmax())]


def baseline_policies(
    outcomes: OutcomeSource,
    latency_estimator: LatencyEstimator,
    samples: Sequence[Mapping[str, Any]],
    budgets_ms: Sequence[float],
    rewards: Mapping[RewardFunction, float] = DEFAULT_REWARDS,
    seed: int = 42,
    progress: bool = False,
) -> list[Policy]:
    """
    What a controller is compared with: the best static setting of each budget (`"best static"`), the full setting
    (`"full"`) and random settings (`"random"`, drawn by `seed`).

    Args:
        outcomes, latency_estimator, budgets_ms, rewards, progress:
            As in [`sweep_budgets`].
        samples (`Sequence[dict]`):
            Training samples, on which the static settings are chosen.

    Raises:
        ValueError: If no setting fits a budget.
    """
    space = outcomes.knob_space
    static_settings = StaticSettings(outcomes, latency_estimator, samples, rewards, progress)
    for budget in budgets_ms:
        static_settings.best(budget)  # a budget that nothing fits is refused here
    return [BestStaticPolicy(static_settings.best), StaticPolicy(space.full, "full"), RandomPolicy(space, seed)]


def sweep_budgets(
    policies: Sequence[Policy],
    outcomes: OutcomeSource,
    latency_estimator: LatencyEstimator,
    samples: Sequence[Mapping[str, Any]],
    budgets_ms: Sequence[float],
    full_setting_ms: float,
    rewards: Mapping[RewardFunction, float] = DEFAULT_REWARDS,
    progress: bool = False,
) -> list[SweepRow]:
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
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.

    Returns:
        `list[SweepRow]`: One for each budget and policy, budget by budget.
    """
    # Settings of all samples, budget by budget and policy by policy.
    choices = [[policy.choose(samples, budget) for policy in policies] for budget in budgets_ms]
    # All at once, so that the executor gets large batches of equal settings.
    pairs = {
        (row, setting): None for of_budget in choices for settings in of_budget for row, setting in enumerate(settings)
    }
    collected = outcomes.collect(
        [samples[row] for row, _ in pairs], [setting for _, setting in pairs], progress=progress
    )
    outcome_of = dict(zip(pairs, collected, strict=True))
    latency_of = dict(zip(pairs, latency_estimator.latency_ms(collected).tolist(), strict=True))
    rows = []
    for budget, of_budget in zip(budgets_ms, choices, strict=True):
        for policy, settings in zip(policies, of_budget, strict=True):
            chosen = [outcome_of[key] for key in enumerate(settings)]
            latency_ms = [latency_of[key] for key in enumerate(settings)]
            columns = reward_columns(outcomes.knob_space, samples, chosen, latency_ms, [budget] * len(settings))
            most_common = max(set(settings), key=lambda setting: (settings.count(setting), setting))
            rows.append(
                SweepRow(
                    policy=policy.name,
                    latency_budget_ms=budget,
                    budget_fraction=budget / full_setting_ms,
                    reward=float(total_reward(rewards, columns).mean()),
                    accuracy=float(np.mean([outcome.accuracy for outcome in chosen])),
                    latency_ms=float(np.mean(latency_ms)),
                    budget_violation_rate=float(np.mean(np.array(latency_ms) > budget)),
                    most_common_setting=str(most_common),
                    most_common_share=settings.count(most_common) / len(settings),
                    num_samples=len(settings),
                )
            )
    return rows


def mean_over_budgets(rows: Sequence[SweepRow], policy: str) -> float:
    """Mean reward of a policy over all budgets of a sweep."""
    return float(np.mean([row.reward for row in rows if row.policy == policy]))


def sweep_to_dataset(rows: Sequence[SweepRow]) -> Dataset:
    """The sweep as a table with one row a budget and policy, its columns named as the fields of [`SweepRow`]."""
    return Dataset.from_list([asdict(row) for row in rows])


def format_sweep_table(rows: Sequence[SweepRow], title: str) -> Table:
    """The sweep as a table for the console."""
    table = Table(title=title)
    for heading in ("budget", "policy", "reward", "accuracy", "latency", "violations"):
        table.add_column(heading, justify="left" if heading == "policy" else "right", no_wrap=True)
    previous = None
    for row in rows:
        if previous is not None and row.latency_budget_ms != previous:
            table.add_section()
        budget = f"{row.budget_fraction:.2f} = {row.latency_budget_ms:.1f} ms"
        table.add_row(
            budget if row.latency_budget_ms != previous else "",
            row.policy,
            f"{row.reward:.3f}",
            f"{row.accuracy:.3f}",
            f"{row.latency_ms:.1f} ms",
            f"{row.budget_violation_rate:.1%}",
        )
        previous = row.latency_budget_ms
    return table


def format_sweep_markdown(rows: Sequence[SweepRow]) -> str:
    """The sweep as a Markdown table for a model card."""
    lines = [
        "| budget (ms) | of full | policy | reward | accuracy | latency (ms) | violation rate |",
        "| ---: | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row.latency_budget_ms:.1f} | {row.budget_fraction:.2f} | {row.policy} | {row.reward:.3f} | "
        f"{row.accuracy:.3f} | {row.latency_ms:.1f} | {row.budget_violation_rate:.1%} |"
        for row in rows
    ]
    return "\n".join(lines)
