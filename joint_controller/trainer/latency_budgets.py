"""The range that training budgets are drawn from, and whether the executor can meet it."""

from dataclasses import dataclass

import torch
from datasets import Dataset, IterableDataset

from ..data import read_samples, take_rows
from ..latency import LatencyEstimator
from ..outcomes import OutcomeSource
from .joint_grpo_config import JointGRPOConfig


NUM_PROBES = 64
"""Training samples, evenly spaced (of a stream the first), that the latency of a setting is looked at on."""


@dataclass(frozen=True)
class LatencyBudgetRange:
    """
    Budgets in ms, and what they relate to.

    Args:
        minimum_ms (`float`):
            Lowest training budget.
        maximum_ms (`float`):
            Highest training budget.
        full_setting_ms (`float`):
            Estimated latency of the full setting: the mean over the probed training samples. Fractions refer to it.
        cheapest_setting_ms (`float`):
            Estimated latency of the cheapest setting: the highest over the probed training samples, so that a budget of
            this size can be met for each of them.
    """

    minimum_ms: float
    maximum_ms: float
    full_setting_ms: float
    cheapest_setting_ms: float


def resolve_latency_budgets(
    args: JointGRPOConfig,
    outcomes: OutcomeSource,
    latency_estimator: LatencyEstimator,
    train_dataset: Dataset | IterableDataset,
) -> LatencyBudgetRange:
    """
    Turns the budget range of a configuration into ms and checks that it can be met. Runs the executor on 64 training
    samples at the full and at the cheapest setting, where their outcomes are not known yet.

    Args:
        args ([`JointGRPOConfig`]):
            Gives the range in ms or as fractions of the full setting's estimated latency.
        outcomes ([`OutcomeSource`]):
            Gives what the executor did with the samples at a setting.
        latency_estimator ([`LatencyEstimator`]):
            Gives its latency.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Training samples, in the schema of `load_vqa_dataset`. Of a stream, the first 64 are looked at.

    Returns:
        [`LatencyBudgetRange`]

    Raises:
        ValueError: If the lowest budget is below what the cheapest setting takes on a probed sample.
    """
    if isinstance(train_dataset, IterableDataset):
        probes = read_samples(take_rows(train_dataset, NUM_PROBES))
    else:
        num_probes = min(NUM_PROBES, len(train_dataset))
        rows = [row * len(train_dataset) // num_probes for row in range(num_probes)]
        probes = read_samples(train_dataset.select(rows))

    def probed_ms(setting) -> torch.Tensor:
        return latency_estimator.latency_ms(outcomes.collect_together(probes, [setting] * len(probes)))

    space = outcomes.knob_space
    full_setting_ms = probed_ms(space.full).mean().item()
    cheapest_setting_ms = probed_ms(space.cheapest).max().item()
    if args.latency_budget_min_ms is not None:
        minimum_ms, maximum_ms = args.latency_budget_min_ms, args.latency_budget_max_ms
    else:
        minimum_ms = args.latency_budget_min_fraction * full_setting_ms
        maximum_ms = args.latency_budget_max_fraction * full_setting_ms
    if minimum_ms < cheapest_setting_ms:
        raise ValueError(
            f"the lowest latency budget is {minimum_ms:.3f} ms, but the cheapest setting ({space.cheapest}) takes up to "
            f"{cheapest_setting_ms:.3f} ms on the training samples, so no setting can meet it: raise "
            f"`latency_budget_min_ms` to {cheapest_setting_ms:.3f} or more (`latency_budget_min_fraction` to "
            f"{cheapest_setting_ms / full_setting_ms:.3f} or more), or add cheaper knob values."
        )
    return LatencyBudgetRange(minimum_ms, maximum_ms, full_setting_ms, cheapest_setting_ms)
