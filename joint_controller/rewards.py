r"""
What a knob setting is worth: five TRL reward functions and their weighted sum.

With accuracy \\(a\\), latency \\(l\\) and budget \\(b\\) in milliseconds, \\(r = l / b\\), \\(k_i\\) the knobs on a scale
from 0 (cheapest value) to 1 (highest value), and the default weights:

$$ R = a - 0.5\,\sigma(10(r - 1)) - 10\max(0, r - 1)^2 + 0.1\,\max(0, 1 - r) - 0.05\,\tfrac{1}{3}\textstyle\sum_i k_i $$

Each function returns its term with its sign but without its weight, so that TRL's `reward_weights` alone sets how much a
term counts, and `rewards/<name>/mean` in the logs keeps its scale when a recipe changes a weight.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def accuracy_reward(accuracy: Sequence[float], **kwargs: Any) -> list[float]:
    r"""
    \\(a\\): score of the executor's answer.

    Args:
        accuracy (`list[float]`):
            Score of each answer, from 0 to 1.
        **kwargs:
            Other columns of the batch, as TRL passes them.

    Returns:
        `list[float]`: One term per row.
    """
    return [float(value) for value in accuracy]


def latency_reward(latency_ms: Sequence[float], latency_budget_ms: Sequence[float], **kwargs: Any) -> list[float]:
    r"""
    \\(-\sigma(10(r - 1))\\): near 0 well inside the budget, -0.5 at the budget, near -1 well above it.

    Args:
        latency_ms (`list[float]`):
            Latency of each request, in ms.
        latency_budget_ms (`list[float]`):
            Budget of each request, in ms.
        **kwargs:
            Other columns of the batch, as TRL passes them.

    Returns:
        `list[float]`: One term per row.

    Raises:
        ValueError: If a budget is not positive.
    """
    ratio = _latency_ratio(latency_ms, latency_budget_ms)
    return (-1.0 / (1.0 + np.exp(-10.0 * (ratio - 1.0)))).tolist()


def budget_violation_reward(
    latency_ms: Sequence[float], latency_budget_ms: Sequence[float], **kwargs: Any
) -> list[float]:
    r"""
    \\(-\max(0, r - 1)^2\\): grows with the square of what the latency exceeds the budget by.

    Args:
        latency_ms (`list[float]`):
            Latency of each request, in ms.
        latency_budget_ms (`list[float]`):
            Budget of each request, in ms.
        **kwargs:
            Other columns of the batch, as TRL passes them.

    Returns:
        `list[float]`: One term per row.

    Raises:
        ValueError: If a budget is not positive.
    """
    ratio = _latency_ratio(latency_ms, latency_budget_ms)
    return (-(np.maximum(0.0, ratio - 1.0) ** 2)).tolist()


def efficiency_reward(latency_ms: Sequence[float], latency_budget_ms: Sequence[float], **kwargs: Any) -> list[float]:
    r"""
    \\(1 - r\\) where \\(r \le 1\\), else 0: the share of the budget that was not spent.

    Args:
        latency_ms (`list[float]`):
            Latency of each request, in ms.
        latency_budget_ms (`list[float]`):
            Budget of each request, in ms.
        **kwargs:
            Other columns of the batch, as TRL passes them.

    Returns:
        `list[float]`: One term per row.

    Raises:
        ValueError: If a budget is not positive.
    """
    ratio = _latency_ratio(latency_ms, latency_budget_ms)
    return np.maximum(0.0, 1.0 - ratio).tolist()


def complexity_reward(normalized_knobs: Sequence[Sequence[float]], **kwargs: Any) -> list[float]:
    r"""
    \\(-\tfrac{1}{3}\sum_i k_i\\): 0 at the cheapest setting, -1 at the full one.

    Args:
        normalized_knobs (`list[tuple[float, float, float]]`):
            Each row's knobs from 0 to 1, as [`KnobSpace.normalized`] gives them.
        **kwargs:
            Other columns of the batch, as TRL passes them.

    Returns:
        `list[float]`: One term per row.
    """
    return (-np.asarray(normalized_knobs, dtype=np.float64).mean(axis=-1)).tolist()


def _latency_ratio(latency_ms: Sequence[float], latency_budget_ms: Sequence[float]) -> np.ndarray:
    budgets = np.asarray(latency_budget_ms, dtype=np.float64)
    if (budgets <= 0).any():
        raise ValueError(f"`latency_budget_ms` holds {budgets.min():g}: a budget must be above 0 ms.")
    return np.asarray(latency_ms, dtype=np.float64) / budgets


REWARD_FUNCTIONS: dict[str, Callable[..., list[float]]] = {
    function.__name__: function
    for function in (accuracy_reward, latency_reward, budget_violation_reward, efficiency_reward, complexity_reward)
}
"""The reward functions by the name that they are logged under, in the order of `reward_weights`."""

DEFAULT_REWARD_WEIGHTS = (1.0, 0.5, 10.0, 0.1, 0.05)
"""Weight of each of `REWARD_FUNCTIONS` in the default reward."""


def total_reward(
    accuracy: Sequence[float],
    latency_ms: Sequence[float],
    latency_budget_ms: Sequence[float],
    normalized_knobs: Sequence[Sequence[float]],
    reward_weights: Sequence[float] = DEFAULT_REWARD_WEIGHTS,
) -> np.ndarray:
    """
    Weighted sum of all reward functions: what the trainer maximises, for evaluation outside it.

    Args:
        accuracy (`Sequence[float]`):
            Score of each answer, from 0 to 1.
        latency_ms (`Sequence[float]`):
            Latency of each request, in ms.
        latency_budget_ms (`Sequence[float]`):
            Budget of each request, in ms.
        normalized_knobs (`Sequence[tuple[float, float, float]]`):
            Each row's knobs from 0 to 1, as [`KnobSpace.normalized`] gives them.
        reward_weights (`Sequence[float]`, *optional*, defaults to `DEFAULT_REWARD_WEIGHTS`):
            Weight of each of `REWARD_FUNCTIONS`.

    Returns:
        `np.ndarray`: Rewards of shape (n,).

    Raises:
        ValueError: If a budget is not positive, or there is not one weight for each reward function.
    """
    if len(reward_weights) != len(REWARD_FUNCTIONS):
        raise ValueError(
            f"`reward_weights` has {len(reward_weights)} values: give one for each of {', '.join(REWARD_FUNCTIONS)}."
        )
    columns = {
        "accuracy": accuracy,
        "latency_ms": latency_ms,
        "latency_budget_ms": latency_budget_ms,
        "normalized_knobs": normalized_knobs,
    }
    terms = np.array([function(**columns) for function in REWARD_FUNCTIONS.values()])  # (functions, n)
    return np.asarray(reward_weights, dtype=np.float64) @ terms
