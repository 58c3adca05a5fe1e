"""Policies that are not trained: what a controller is compared with. All but the ceiling look at training outcomes alone."""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from ..data.schema import DEFAULT_QUESTION_TYPE
from ..knobs import KnobSetting, KnobSpace
from ..latency import FitCache, Guardrail, LatencyEstimator
from ..outcomes import OutcomeSource
from ..rewards import DEFAULT_REWARDS, RewardFunction, reward_columns, total_reward


MAX_VIOLATION_RATE = 0.01
"""A setting keeps a budget if it exceeds the budget on at most this share of the training samples."""

NUM_SIZE_BINS = 5
"""Bins of the look-up by predicted latency at the full setting, with about as many training samples each."""

MIN_BIN_SAMPLES = 20
"""Training samples of a bin of the look-up without which it takes the static setting."""

# Means of the same numbers may differ in their last digits; settings whose scores differ by less are equally good.
_DECIMALS = 9


class Forecast(Protocol):
    """
    What requests are expected to take at each setting before they are answered.

    Attributes:
        is_upper (`bool`):
            Whether it is an upper quantile, that most requests stay below.
    """

    is_upper: bool

    def latency_ms(self, samples: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Of n samples, in ms, of shape `(n, settings)`, in the order of the knob space."""


class PredictedLatencies:
    """
    A [`Forecast`] from what a guardrail predicts.

    Args:
        guardrail ([`~latency.Guardrail`]):
            Predicts upper quantiles.

    Raises:
        ValueError: If the guardrail promises no quantile, so that every setting would fit every budget.
    """

    is_upper = True

    def __init__(self, guardrail: Guardrail):
        if guardrail.quantile is None:
            raise ValueError("the guardrail promises no quantile: give it one (0.5, 0.9, 0.95 or 0.99).")
        self.guardrail = guardrail
        self._fits = FitCache(guardrail)

    def latency_ms(self, samples: Sequence[Mapping[str, Any]]) -> np.ndarray:
        if not samples:
            return np.empty((0, len(self.guardrail.executor.knob_space)))
        return self._fits.typical_ms(samples).double().numpy() * self.guardrail.upper_ratio


class KnownOutcomes:
    """
    Samples whose outcomes at all settings are asked for: what they took is a [`Forecast`] where nothing can be predicted.

    Args:
        outcomes ([`OutcomeSource`]):
            Gives the outcomes. Those that it does not know are computed, at every setting.
        latency_estimator ([`LatencyEstimator`]):
            Gives their latencies.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar over the answers that are missing.
    """

    is_upper = False

    def __init__(self, outcomes: OutcomeSource, latency_estimator: LatencyEstimator, progress: bool = False):
        self.progress = progress
        self.outcomes = outcomes
        self.latency_estimator = latency_estimator
        self._known: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def latency_ms(self, samples: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Estimated latencies of n samples, in ms, of shape `(n, settings)`."""
        return self._of(samples, 1)

    def accuracy(self, samples: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Accuracies of n samples, of shape `(n, settings)`."""
        return self._of(samples, 0)

    def _of(self, samples: Sequence[Mapping[str, Any]], which: int) -> np.ndarray:
        settings = self.outcomes.knob_space.settings
        new = list(
            {sample["sample_id"]: sample for sample in samples if sample["sample_id"] not in self._known}.values()
        )
        if new:
            collected = self.outcomes.collect(
                [sample for sample in new for _ in settings], list(settings) * len(new), progress=self.progress
            )
            accuracy = np.array([outcome.accuracy for outcome in collected], dtype=np.float64)
            latency_ms = self.latency_estimator.latency_ms(collected).double().numpy()
            arrays = zip(accuracy.reshape(len(new), -1), latency_ms.reshape(len(new), -1), strict=True)
            self._known.update(zip((sample["sample_id"] for sample in new), arrays, strict=True))
        return np.array([self._known[sample["sample_id"]][which] for sample in samples]).reshape(-1, len(settings))


@dataclass(frozen=True, eq=False)
class TrainingOutcomes:
    """
    What n training samples took and gained at each setting: baselines are chosen on these and judged on others.

    Args:
        settings (`tuple[KnobSetting, ...]`):
            The settings, in the order of the knob space.
        accuracy, latency_ms (`np.ndarray` of shape `(n, settings)`):
            Accuracies, and estimated latencies in ms.
        upper_ms (`np.ndarray` of shape `(n, settings)`, *optional*):
            Latencies that were predicted not to be exceeded, in ms. `None` where nothing was predicted.
        question_types (`list[str]`):
            Question type of each sample.
        reward_of (`Callable[[float], np.ndarray]`, *optional*):
            Rewards, of shape `(n, settings)`, under a budget in ms.

    Raises:
        ValueError: If there are no samples, or shapes differ.
    """

    settings: tuple[KnobSetting, ...]
    accuracy: np.ndarray
    latency_ms: np.ndarray
    upper_ms: np.ndarray | None
    question_types: list[str]
    reward_of: Callable[[float], np.ndarray] | None = None

    def __post_init__(self):
        if not self.question_types:
            raise ValueError("there are no training samples to choose settings on: give at least one.")
        shape = (len(self.question_types), len(self.settings))
        for name in ("accuracy", "latency_ms", "upper_ms"):
            values = getattr(self, name)
            if values is not None and values.shape != shape:
                raise ValueError(f"`{name}` has the shape {values.shape}: {shape} is one value a sample and setting.")

    @classmethod
    def collect(
        cls,
        outcomes: OutcomeSource,
        latency_estimator: LatencyEstimator,
        samples: Sequence[Mapping[str, Any]],
        rewards: Mapping[RewardFunction, float] = DEFAULT_REWARDS,
        forecast: Forecast | None = None,
        progress: bool = False,
    ) -> "TrainingOutcomes":
        """
        Answers samples at every setting, as far as their outcomes are not known.

        Args:
            outcomes ([`OutcomeSource`]):
                Gives outcomes.
            latency_estimator ([`LatencyEstimator`]):
                Gives latencies.
            samples (`Sequence[dict]`):
                Training samples.
            rewards (`Mapping[RewardFunction, float]`, *optional*, defaults to `DEFAULT_REWARDS`):
                Reward functions and their weights.
            forecast ([`Forecast`], *optional*):
                Gives upper quantiles, if there are any.
            progress (`bool`, *optional*, defaults to `False`):
                Whether to show a progress bar.
        """
        settings = outcomes.knob_space.settings
        every_sample = [sample for sample in samples for _ in settings]
        collected = outcomes.collect(every_sample, list(settings) * len(samples), progress=progress)
        latency_ms = latency_estimator.latency_ms(collected).tolist()
        shape = (len(samples), len(settings))
        # Budgets are asked for later.
        columns = reward_columns(
            outcomes.knob_space, every_sample, collected, latency_ms, [float("nan")] * len(collected)
        )

        def reward_of(latency_budget_ms: float) -> np.ndarray:
            budgets = [latency_budget_ms] * len(collected)
            return total_reward(rewards, {**columns, "latency_budget_ms": budgets}).reshape(shape)

        has_upper = forecast is not None and forecast.is_upper
        return cls(
            settings=settings,
            accuracy=np.array([outcome.accuracy for outcome in collected], dtype=np.float64).reshape(shape),
            latency_ms=np.array(latency_ms, dtype=np.float64).reshape(shape),
            upper_ms=forecast.latency_ms(samples) if has_upper else None,
            question_types=[question_type_of(sample) for sample in samples],
            reward_of=reward_of,
        )

    @cached_property
    def mean_latency_ms(self) -> np.ndarray:
        """Mean latency of each setting, in ms, of shape `(settings,)`: by it, ties are broken."""
        return self.latency_ms.mean(axis=0)

    def keeps(self, latency_budget_ms: float, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """
        The settings that exceed a budget on at most `MAX_VIOLATION_RATE` of the samples, or of some rows.

        Returns:
            `np.ndarray` of shape `(settings,)`: booleans.
        """
        return (self.latency_ms[rows] > latency_budget_ms).mean(axis=0) <= MAX_VIOLATION_RATE

    def best_static(self, latency_budget_ms: float, by_reward: bool = False) -> int:
        """
        Position of the setting with the best mean accuracy, or reward, among those that keep a budget in ms; of equally
        good ones the faster.

        Raises:
            ValueError: If no setting keeps the budget, or rewards are asked for and not known.
        """
        keeps = self.keeps(latency_budget_ms)
        if not keeps.any():
            share = (self.latency_ms > latency_budget_ms).mean(axis=0).min()
            raise ValueError(
                f"no setting fits a budget of {latency_budget_ms:.3f} ms: each exceeds it on {share:.1%} of the training samples "
                f"or more, {MAX_VIOLATION_RATE:.0%} are allowed, and the cheapest takes {self.mean_latency_ms.min():.3f} ms "
                "on average. Raise the budget."
            )
        if by_reward and self.reward_of is None:
            raise ValueError("these training outcomes come without rewards: give `reward_of`.")
        scores = self.reward_of(latency_budget_ms) if by_reward else self.accuracy
        return int(best_allowed(scores.mean(axis=0), self.mean_latency_ms, keeps))


def question_type_of(sample: Mapping[str, Any]) -> str:
    """Question type of a sample; `"unknown"` where it has none."""
    return sample.get("question_type", DEFAULT_QUESTION_TYPE)


def best_allowed(scores: np.ndarray, latency_ms: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """
    The best of those settings that are allowed; of equally good ones the faster.

    Args:
        scores, latency_ms (`np.ndarray` of shape `(settings,)` or `(n, settings)`):
            What is to be high, and what decides between equal scores by being low.
        allowed (`np.ndarray` of shape `(settings,)` or `(n, settings)`):
            Which may be taken; at least one.

    Returns:
        `np.ndarray` of shape `()` or `(n,)`: positions of settings.
    """
    scores = np.where(allowed, np.round(scores, _DECIMALS), -np.inf)
    is_best = scores == scores.max(axis=-1, keepdims=True)
    return np.where(is_best, latency_ms, np.inf).argmin(axis=-1)


class StaticPolicy:
    """
    One setting for all requests, whatever their budgets.

    Args:
        setting ([`KnobSetting`]):
            The setting.
        name (`str`):
            Name in tables.
    """

    def __init__(self, setting: KnobSetting, name: str):
        self.setting = setting
        self.name = name

    def choose(self, samples: Sequence[Mapping[str, Any]], latency_budget_ms: float) -> list[KnobSetting]:
        return [self.setting] * len(samples)


class BestStaticPolicy:
    """
    One setting for all requests of a budget, chosen on training samples: that with the best mean accuracy, or reward, among
    those that exceed the budget on at most 1 % of them. `"static"` is the baseline that a controller has to beat.

    Args:
        training ([`TrainingOutcomes`]):
            What it is chosen on.
        by_reward (`bool`, *optional*, defaults to `False`):
            Whether the mean reward counts, in place of the accuracy.
    """

    def __init__(self, training: TrainingOutcomes, by_reward: bool = False):
        self.training = training
        self.by_reward = by_reward
        self.name = "static by reward" if by_reward else "static"

    def choose(self, samples: Sequence[Mapping[str, Any]], latency_budget_ms: float) -> list[KnobSetting]:
        best = self.training.best_static(latency_budget_ms, self.by_reward)
        return [self.training.settings[best]] * len(samples)


class FitsPolicy:
    """
    For each request the setting with the best mean training accuracy among those that fit the request itself, as its image
    and question are; of equally good ones the faster, and where none fits the cheapest.

    Args:
        training ([`TrainingOutcomes`]):
            What settings are judged by.
        forecast ([`Forecast`]):
            Says what fits.
    """

    name = "fits"

    def __init__(self, training: TrainingOutcomes, forecast: Forecast):
        self.training = training
        self.forecast = forecast

    def scores(self, samples: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Mean training accuracy that each setting is judged by, for each sample or for all: `(n, settings)` or `(settings,)`."""
        return self.training.accuracy.mean(axis=0)

    def choose(self, samples: Sequence[Mapping[str, Any]], latency_budget_ms: float) -> list[KnobSetting]:
        fits = self.forecast.latency_ms(samples) <= latency_budget_ms
        fits[:, 0] |= ~fits.any(axis=1)
        best = best_allowed(self.scores(samples), self.training.mean_latency_ms, fits)
        return [self.training.settings[position] for position in best]


class QuestionTypePolicy(FitsPolicy):
    """
    As [`FitsPolicy`], but settings are judged by their mean accuracy on the training samples of the request's question
    type; for types that training samples do not have, by that on all.
    """

    name = "per question type"

    def scores(self, samples: Sequence[Mapping[str, Any]]) -> np.ndarray:
        types = np.array(self.training.question_types)
        means = {name: self.training.accuracy[types == name].mean(axis=0) for name in np.unique(types)}
        of_all = super().scores(samples)
        return np.array([means.get(question_type_of(sample), of_all) for sample in samples]).reshape(-1, len(of_all))


class LookUpPolicy:
    """
    A table by budget and input size. Training samples are put into five bins of equal shares by what they are predicted to
    take at the full setting, and in each the setting with the best mean accuracy is taken, among those that exceed the budget
    on at most 1 % of the bin's samples; of equally good ones the faster. In a bin of fewer than `MIN_BIN_SAMPLES` samples, or
    where no setting keeps the budget, it is that of [`BestStaticPolicy`]. A request takes the setting of its own bin.

    Args:
        training ([`TrainingOutcomes`]):
            What settings are chosen on. Without predictions, its estimated latencies are taken for sizes.
        forecast ([`Forecast`]):
            Gives the sizes of requests: predictions if `training` has them, otherwise estimated latencies.

    Raises:
        ValueError: If sizes of training samples and of requests are not of one kind.
    """

    name = "look-up"

    def __init__(self, training: TrainingOutcomes, forecast: Forecast):
        if forecast.is_upper != (training.upper_ms is not None):
            raise ValueError(
                "training samples and requests would be measured differently: give the training outcomes the same forecast."
            )
        self.training = training
        self.forecast = forecast
        sizes = (training.latency_ms if training.upper_ms is None else training.upper_ms)[:, -1]
        self.edges = np.quantile(sizes, np.arange(1, NUM_SIZE_BINS) / NUM_SIZE_BINS)
        self._bin_of_row = self._bins(sizes)

    def _bins(self, sizes: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.edges, sizes, side="left")

    def best_of_bin(self, number: int, latency_budget_ms: float) -> int:
        """Position of the setting that requests of a bin (0 to 4) take under a budget in ms."""
        rows = self._bin_of_row == number
        if rows.sum() >= MIN_BIN_SAMPLES:
            keeps = self.training.keeps(latency_budget_ms, rows)
            if keeps.any():
                means = self.training.accuracy[rows].mean(axis=0)
                return int(best_allowed(means, self.training.latency_ms[rows].mean(axis=0), keeps))
        return self.training.best_static(latency_budget_ms)

    def choose(self, samples: Sequence[Mapping[str, Any]], latency_budget_ms: float) -> list[KnobSetting]:
        bins = self._bins(self.forecast.latency_ms(samples)[:, -1])
        best = {number: self.best_of_bin(number, latency_budget_ms) for number in Counter(bins.tolist())}
        return [self.training.settings[best[number]] for number in bins.tolist()]


class RandomPolicy:
    """
    A random setting for each request, all equally likely. A sample gets the same setting under every budget, so that budgets
    are compared on equal terms, and whatever other samples there are.

    Args:
        space ([`KnobSpace`]):
            Settings to draw from.
        seed (`int`, *optional*, defaults to 42):
            Draws.
    """

    name = "random"

    def __init__(self, space: KnobSpace, seed: int = 42):
        self.settings = space.settings
        self.seed = seed

    def choose(self, samples: Sequence[Mapping[str, Any]], latency_budget_ms: float) -> list[KnobSetting]:
        digests = [hashlib.sha256(f"{self.seed} {sample['sample_id']}".encode()).digest() for sample in samples]
        return [self.settings[int.from_bytes(digest[:8], "big") % len(self.settings)] for digest in digests]


class CeilingPolicy:
    """
    What could be reached by who knew all answers beforehand: for each request the setting with the best accuracy among those
    whose estimated latency keeps the budget, of equally good ones the fastest; where none keeps it, the fastest of all. No
    policy can do this: it says how much there is to gain.

    Args:
        known ([`KnownOutcomes`]):
            Answers each request at every setting.
    """

    name = "ceiling"

    def __init__(self, known: KnownOutcomes):
        self.known = known

    def choose(self, samples: Sequence[Mapping[str, Any]], latency_budget_ms: float) -> list[KnobSetting]:
        accuracy, latency_ms = self.known.accuracy(samples), self.known.latency_ms(samples)
        keeps = latency_ms <= latency_budget_ms
        keeps |= ~keeps.any(axis=1, keepdims=True) & (latency_ms == latency_ms.min(axis=1, keepdims=True))
        settings = self.known.outcomes.knob_space.settings
        return [settings[position] for position in best_allowed(accuracy, latency_ms, keeps)]
