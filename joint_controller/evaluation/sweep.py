"""The budget sweep: how good policies are under each of several latency budgets."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from rich.table import Table

from ..knobs import KnobSetting
from ..latency import LatencyEstimatorModel
from ..outcomes import OutcomeCollector, RecordedOutcomes, predict_latency_ms
from ..rewards import DEFAULT_REWARD_WEIGHTS, total_reward
from .policies import Policy, RandomPolicy, StaticPolicy


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
        latency_budget_ms (`float`):
            Budget of every request, in ms.
        budget_fraction (`float`):
            Budget as a fraction of the full setting's mean latency.
        reward (`float`):
            Mean reward.
        accuracy (`float`):
            Mean accuracy.
        latency_ms (`float`):
            Mean estimated latency, in ms.
        budget_violation_rate (`float`):
            Share of requests whose estimated latency exceeds the budget.
        most_common_setting (`str`):
            Setting that was chosen most often.
        most_common_share (`float`):
            How often.
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
    Outcomes of every setting on the same samples, from which the best static setting of a budget is picked.

    Args:
        collector ([`OutcomeCollector`] or [`RecordedOutcomes`]):
            Gives the outcomes.
        latency_estimator ([`LatencyEstimatorModel`], *optional*):
            Gives their latencies. `None` takes those that were measured with the outcomes.
        samples (`Sequence[dict]`):
            Training samples: a setting is chosen on these and judged on others.
        reward_weights (`Sequence[float]`, *optional*, defaults to `DEFAULT_REWARD_WEIGHTS`):
            Weights of the reward's terms.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.
    """

    def __init__(
        self,
        collector: OutcomeCollector | RecordedOutcomes,
        latency_estimator: LatencyEstimatorModel | None,
        samples: Sequence[Mapping[str, Any]],
        reward_weights: Sequence[float] = DEFAULT_REWARD_WEIGHTS,
        progress: bool = False,
    ):
        space = collector.knob_space
        self.settings = list(space)
        self.reward_weights = reward_weights
        outcomes = collector.collect(
            [sample for sample in samples for _ in self.settings], self.settings * len(samples), progress=progress
        )
        shape = (len(samples), len(self.settings))
        self.accuracy = np.array([outcome.accuracy for outcome in outcomes]).reshape(shape)
        self.latency_ms = predict_latency_ms(latency_estimator, outcomes).double().numpy().reshape(shape)
        self.normalized_knobs = [space.normalized(setting) for setting in self.settings]

    def mean_rewards(self, latency_budget_ms: float) -> np.ndarray:
        """Mean reward of each setting under a budget in ms, of shape `(settings,)`."""
        return np.array(
            [
                total_reward(
                    self.accuracy[:, column],
                    self.latency_ms[:, column],
                    np.full(len(self.accuracy), latency_budget_ms),
                    [knobs] * len(self.accuracy),
                    self.reward_weights,
                ).mean()
                for column, knobs in enumerate(self.normalized_knobs)
            ]
        )

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
        return self.settings[int(np.where(fits, self.mean_rewards(latency_budget_ms), -np.inf).argmax())]


def baseline_policies(
    collector: OutcomeCollector | RecordedOutcomes,
    latency_estimator: LatencyEstimatorModel | None,
    samples: Sequence[Mapping[str, Any]],
    budgets_ms: Sequence[float],
    reward_weights: Sequence[float] = DEFAULT_REWARD_WEIGHTS,
    seed: int = 42,
    progress: bool = False,
) -> list[Policy]:
    """
    What a controller is compared with: the best static setting of each budget (`"best static"`), the full setting
    (`"full"`) and random settings (`"random"`).

    Args:
        collector, latency_estimator, samples:
            As in [`StaticSettings`]: the static settings are chosen on training samples.
        budgets_ms (`Sequence[float]`):
            Budgets, in ms.
        reward_weights (`Sequence[float]`, *optional*, defaults to `DEFAULT_REWARD_WEIGHTS`):
            Weights of the reward's terms.
        seed (`int`, *optional*, defaults to 42):
            Seed of the random settings.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.
    """
    space = collector.knob_space
    static_settings = StaticSettings(collector, latency_estimator, samples, reward_weights, progress)
    return [
        StaticPolicy({budget: static_settings.best(budget) for budget in budgets_ms}, "best static"),
        StaticPolicy(space.full, "full"),
        RandomPolicy(space, seed),
    ]


def sweep_budgets(
    policies: Sequence[Policy],
    collector: OutcomeCollector | RecordedOutcomes,
    latency_estimator: LatencyEstimatorModel | None,
    samples: Sequence[Mapping[str, Any]],
    budget_fractions: Sequence[float],
    full_setting_ms: float,
    reward_weights: Sequence[float] = DEFAULT_REWARD_WEIGHTS,
    progress: bool = False,
) -> list[SweepRow]:
    """
    Runs every policy under every budget.

    Args:
        policies (`Sequence[Policy]`):
            What to compare.
        collector ([`OutcomeCollector`] or [`RecordedOutcomes`]):
            Gives outcomes; each pair of sample and setting runs once, whichever policies choose it.
        latency_estimator ([`LatencyEstimatorModel`], *optional*):
            Gives latencies. `None` takes those that were measured with the outcomes.
        samples (`Sequence[dict]`):
            Held-out samples.
        budget_fractions (`Sequence[float]`):
            Budgets as fractions of `full_setting_ms`.
        full_setting_ms (`float`):
            Mean latency of the full setting, in ms.
        reward_weights (`Sequence[float]`, *optional*, defaults to `DEFAULT_REWARD_WEIGHTS`):
            Weights of the reward's terms.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.

    Returns:
        `list[SweepRow]`: One for each budget and policy, budget by budget.
    """
    space = collector.knob_space
    budgets = [fraction * full_setting_ms for fraction in budget_fractions]
    choices = {(policy.name, budget): policy.choose(samples, budget) for budget in budgets for policy in policies}
    # All at once, so that the executor gets large batches of equal settings.
    pairs = {(row, setting): None for settings in choices.values() for row, setting in enumerate(settings)}
    outcomes = dict(
        zip(
            pairs,
            collector.collect(
                [samples[row] for row, _ in pairs], [setting for _, setting in pairs], progress=progress
            ),
            strict=True,
        )
    )
    latencies = dict(zip(pairs, predict_latency_ms(latency_estimator, list(outcomes.values())).tolist(), strict=True))
    rows = []
    for fraction, budget in zip(budget_fractions, budgets, strict=True):
        for policy in policies:
            settings = choices[policy.name, budget]
            keys = list(enumerate(settings))
            accuracy = np.array([outcomes[key].accuracy for key in keys])
            latency_ms = np.array([latencies[key] for key in keys])
            reward = total_reward(
                accuracy,
                latency_ms,
                np.full(len(keys), budget),
                [space.normalized(setting) for setting in settings],
                reward_weights,
            )
            most_common = max(set(settings), key=lambda setting: (settings.count(setting), setting))
            rows.append(
                SweepRow(
                    policy=policy.name,
                    latency_budget_ms=budget,
                    budget_fraction=fraction,
                    reward=float(reward.mean()),
                    accuracy=float(accuracy.mean()),
                    latency_ms=float(latency_ms.mean()),
                    budget_violation_rate=float((latency_ms > budget).mean()),
                    most_common_setting=str(most_common),
                    most_common_share=settings.count(most_common) / len(settings),
                    num_samples=len(settings),
                )
            )
    return rows


def mean_over_budgets(rows: Sequence[SweepRow], policy: str, metric: str = "reward") -> float:
    """Mean of a metric of a policy over all budgets of a sweep."""
    return float(np.mean([getattr(row, metric) for row in rows if row.policy == policy]))


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
