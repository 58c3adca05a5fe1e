"""Accuracy at a latency budget: an answer that comes too late counts nothing."""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from joint_controller.evaluation.scoring import score_answer
from joint_controller.evaluation.summary import bootstrap_interval


_INPUTS_DESCRIPTION = """
Args:
    predictions (`list[str]`): Answers.
    references (`list[list[str]]`): For each answer the right answers, one or more.
    latencies_ms (`list[float]`): What each answer took, in ms.
    latency_budget_ms (`float`): What each may take, in ms.
    metric (`str`, *optional*, defaults to `"vqa_accuracy"`): Scores one answer: `"vqa_accuracy"`, `"anls"`,
        `"exact_count"`, `"multiple_choice"`, `"exact_match"` or `"cider"`.
    groups (`list`, *optional*): Group of each answer, e.g. its image: answers of a group are not independent of each other,
        and are drawn together for the intervals. By default each is a group of its own.
    seed (`int`, *optional*, defaults to 0): Seed of the intervals.

Returns:
    `dict[str, float]`: `accuracy_at_budget`, the mean score where an answer above the budget counts 0; `accuracy`, the mean
    score whatever the latency; `accuracy_at_budget_low`, `accuracy_at_budget_high`, `accuracy_low` and `accuracy_high`, the
    ends of their 95 % bootstrap intervals; `violations`, the share of answers above the budget.
"""


class AccuracyAtBudget(evaluate.Metric):
    """
    Accuracy of answers that have to be given within a latency budget: an answer that took longer counts 0. Intervals are 95 %
    percentile intervals of a bootstrap of 2,000 resamples.

    Example:

    ```python
    >>> metric = evaluate.load("joint_controller/evaluation/accuracy_at_budget")
    >>> metric.add_batch(predictions=["two", "red"], references=[["2"], ["red"]], latencies_ms=[18.0, 25.0])
    >>> result = metric.compute(latency_budget_ms=20.0)
    >>> result["accuracy_at_budget"], result["accuracy"], result["violations"]
    (0.5, 1.0, 0.5)
    ```
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=inspect.getdoc(type(self)),
            citation="",
            inputs_description=_INPUTS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.List(datasets.Value("string")),
                    "latencies_ms": datasets.Value("float64"),
                }
            ),
        )

    def _compute(
        self,
        predictions: list[str],
        references: list[list[str]],
        latencies_ms: list[float],
        latency_budget_ms: float | None = None,
        metric: str = "vqa_accuracy",
        groups: Sequence[Any] | None = None,
        seed: int = 0,
    ) -> dict[str, float]:
        if latency_budget_ms is None:
            raise ValueError("`latency_budget_ms` is missing: give the budget of each answer, in ms.")
        if not 0 < latency_budget_ms < math.inf:
            raise ValueError(f"`latency_budget_ms` is {latency_budget_ms}: give a finite number above 0.")
        taken_ms = np.array(latencies_ms, dtype=np.float64)
        bad = np.flatnonzero(~(np.isfinite(taken_ms) & (taken_ms >= 0)))
        if len(bad):
            raise ValueError(
                f"`latencies_ms` holds {latencies_ms[bad[0]]} in place {bad[0]}: give what each answer took, in ms."
            )
        groups = range(len(predictions)) if groups is None else groups
        if len(groups) != len(predictions):
            raise ValueError(f"`groups` has {len(groups)} values for {len(predictions)} answers: give one for each.")
        scores = np.array(
            [score_answer(metric, answer, right) for answer, right in zip(predictions, references, strict=True)]
        )
        is_late = taken_ms > latency_budget_ms
        result = {}
        for name, values in (("accuracy_at_budget", np.where(is_late, 0.0, scores)), ("accuracy", scores)):
            low, high = bootstrap_interval(values, groups, seed=seed)
            result |= {name: float(values.mean()), f"{name}_low": low, f"{name}_high": high}
        return {**result, "violations": float(is_late.mean())}
