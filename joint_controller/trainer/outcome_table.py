"""Outcomes of training samples at all settings, as tensors: with them, the expectation over settings is a sum."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..controller import JointControllerModel
from ..executor import ExecutorRequest, FeatureSource
from ..knobs import KnobSpace
from ..latency import FitCache, LatencyEstimator
from ..outcomes import OutcomeSource
from ..rewards import REWARD_FUNCTIONS, RewardFunction, reward_columns, total_reward


FEATURE_BATCH_SIZE = 256
"""Samples whose features are computed together."""


def possible_settings(
    knob_space: KnobSpace,
    samples: Sequence[Mapping[str, Any]],
    fits: FitCache | None = None,
    highest_budget_ms: float | None = None,
) -> tuple[list[int], list[int]]:
    """
    Pairs of a sample and a setting that may be chosen in a training at all: those that fit the highest budget, and the
    cheapest setting, which is taken where nothing fits. Where the guardrail promises nothing, those that the executor can
    run. Arguments are those of [`OutcomeTable`].

    Returns:
        `tuple[list[int], list[int]]`: positions of samples and of settings.
    """
    is_possible = torch.ones(len(samples), len(knob_space), dtype=torch.bool)
    if fits is not None and highest_budget_ms is not None:
        _, fit = fits.fit(samples, torch.full((len(samples),), highest_budget_ms))
        is_possible = fit.fits
        if fits.guardrail.quantile is not None:
            is_possible[:, 0] = True
    rows, columns = is_possible.nonzero(as_tuple=True)
    return rows.tolist(), columns.tolist()


class OutcomeTable:
    """
    What n training samples gain and take at each setting, and what a controller sees of them.

    Args:
        outcomes ([`OutcomeSource`]):
            Gives outcomes. Those that it does not know are computed: at all settings or, with `fits`, at those that may be
            chosen at all.
        latency_estimator ([`LatencyEstimator`]):
            Gives their latencies.
        samples (`Sequence[dict]`):
            The samples.
        controller ([`JointControllerModel`]):
            Says which features are needed.
        features ([`FeatureSource`], *optional*):
            Gives them.
        fits ([`FitCache`], *optional*):
            Predicts latencies before anything is run.
        highest_budget_ms (`float`, *optional*):
            Highest budget of the training, in ms: a setting that does not even fit this one is never chosen.
        shrinkage (`float`, *optional*, defaults to 0.0):
            How far the accuracies that rewards are made of are moved towards the mean of all samples at the same setting, from 0
            to 1.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar over the answers that are missing.

    Attributes:
        accuracy, latency_ms (`torch.Tensor` of shape `(n, settings)`):
            Accuracies, and estimated latencies in ms; 0 and infinite for settings that are never chosen.
        typical_ms (`torch.Tensor` of shape `(n, settings)`, *optional*):
            Predicted latencies in ms.
        question_features (`torch.Tensor` of shape `(n, question_size)`, *optional*):
            Question features.
        vision_features (`torch.Tensor` of shape `(n, choices of stage 1, vision_size)`, *optional*):
            Vision features of the images as each choice of stage 1 encodes them.
    """

    def __init__(
        self,
        outcomes: OutcomeSource,
        latency_estimator: LatencyEstimator,
        samples: Sequence[Mapping[str, Any]],
        controller: JointControllerModel,
        features: FeatureSource | None,
        fits: FitCache | None = None,
        highest_budget_ms: float | None = None,
        shrinkage: float = 0.0,
        progress: bool = False,
    ):
        self.samples = samples
        self.knob_space = space = outcomes.knob_space
        settings = space.settings
        self.typical_ms = None if fits is None else fits.typical_ms(samples)
        rows, columns = possible_settings(space, samples, fits, highest_budget_ms)
        asked = [samples[row] for row in rows], [settings[column] for column in columns]
        collected = outcomes.collect(*asked, progress=progress)
        self.accuracy = torch.zeros(len(samples), len(settings))
        self.latency_ms = torch.full((len(samples), len(settings)), torch.inf)
        self.accuracy[rows, columns] = torch.tensor([outcome.accuracy for outcome in collected])
        self.latency_ms[rows, columns] = latency_estimator.latency_ms(collected).float()
        is_known = self.latency_ms.isfinite()
        means = self.accuracy.sum(dim=0) / is_known.sum(dim=0).clamp(min=1)
        self._shrunk_accuracy = self.accuracy + shrinkage * (means - self.accuracy)
        # For reward functions that look at more than numbers.
        self._outcomes = dict(zip(zip(rows, columns, strict=True), collected, strict=True))
        self._normalized = np.array([space.normalized(setting) for setting in settings])
        self.question_features = self.vision_features = None
        if controller.sees_question:
            questions = [sample["question"] for sample in samples]
            self.question_features = torch.cat(
                [
                    features.question_features(questions[start : start + FEATURE_BATCH_SIZE])
                    for start in range(0, len(questions), FEATURE_BATCH_SIZE)
                ]
            )
        if controller.sees_image:
            self.vision_features = self._see_images(controller, features)

    def _see_images(self, controller: JointControllerModel, features: FeatureSource) -> torch.Tensor:
        seen = []
        for second_free in controller.table.positions[:, 0].tolist():
            setting = self.knob_space.settings[second_free]
            requests = [ExecutorRequest.of(sample, setting) for sample in self.samples]
            batches = [
                features.vision_features(requests[start : start + FEATURE_BATCH_SIZE])
                for start in range(0, len(requests), FEATURE_BATCH_SIZE)
            ]
            seen.append(torch.cat(batches))
        return torch.stack(seen, dim=1)

    def __len__(self) -> int:
        return len(self.samples)

    def rewards(
        self, rows: Sequence[int], latency_budget_ms: torch.Tensor, rewards: Mapping[RewardFunction, float]
    ) -> torch.Tensor:
        """
        What each setting is worth for some samples.

        Args:
            rows (`Sequence[int]`):
                m samples, by their positions.
            latency_budget_ms (`torch.Tensor` of shape `(m,)`):
                Their budgets, in ms.
            rewards (`Mapping[RewardFunction, float]`):
                Weight of each reward function.

        Returns:
            `torch.Tensor` of shape `(m, settings)`; -inf for settings that are never chosen.

        Raises:
            ValueError: If a reward is not finite.
        """
        num_settings = len(self.knob_space)
        accuracy, latency_ms = self._shrunk_accuracy[rows], self.latency_ms[rows]
        is_known = latency_ms.isfinite()
        budgets = latency_budget_ms[:, None].expand_as(latency_ms)
        if set(rewards) <= set(REWARD_FUNCTIONS.values()):
            columns = {
                "accuracy": accuracy[is_known].double().numpy(),
                "latency_ms": latency_ms[is_known].double().numpy(),
                "latency_budget_ms": budgets[is_known].double().numpy(),
                "normalized_knobs": np.broadcast_to(self._normalized, (len(rows), *self._normalized.shape))[
                    is_known.numpy()
                ],
            }
        else:
            pairs = [(rows[row], column) for row, column in is_known.nonzero().tolist()]
            columns = reward_columns(
                self.knob_space,
                [self.samples[row] for row, _ in pairs],
                [self._outcomes[pair] for pair in pairs],
                latency_ms[is_known].tolist(),
                budgets[is_known].tolist(),
            )
            columns["accuracy"] = accuracy[is_known].tolist()
        known = total_reward(rewards, columns)
        if not np.isfinite(known).all():
            names = ", ".join(function.__name__ for function in rewards)
            raise ValueError(
                f"the weighted sum of {names} is not finite for a request: let each return finite numbers."
            )
        values = torch.full((len(rows), num_settings), -torch.inf)
        values[is_known] = torch.from_numpy(known).float()
        return values
