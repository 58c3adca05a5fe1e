r"""
What a knob setting is worth: TRL reward functions and their weighted sum, an objective. Two objectives come with the package;
a recipe may put together others, with reward functions of its own named by their dotted path.

With accuracy \\(a\\), latency \\(l\\) and budget \\(b\\) in milliseconds, \\(r = l / b\\), \\(k_i\\) the knobs on a scale
from 0 (cheapest value) to 1 (highest value), the objective `accuracy_within_budget` counts an answer that comes in time, and
pays \(p\), the `time_price`, for the share of the budget that is not spent:

$$ R = a\,[r \le 1] + p\,\max(0, 1 - r) $$

and the objective `original` has the five terms and weights of the research code that this package replaces:

$$ R = a - 0.5\,\sigma(10(r - 1)) - 10\max(0, r - 1)^2 + 0.1\,\max(0, 1 - r) - 0.05\,\overline{k} $$

Each function returns its term with its sign but without its weight, so that TRL's `reward_weights` alone sets how much a
term counts, and `rewards/<name>/mean` in the logs keeps its scale when a recipe changes a weight.
"""

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .knobs import KnobSpace


if TYPE_CHECKING:
    from .outcomes import Outcome


RewardFunction = Callable[..., list[float]]
"""A reward function as TRL calls it: columns of a batch by keyword, one reward a row."""


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


def accuracy_in_time_reward(
    accuracy: Sequence[float], latency_ms: Sequence[float], latency_budget_ms: Sequence[float], **kwargs: Any
) -> list[float]:
    r"""
    \(a\) where \(r \le 1\), else 0: score of the executor's answer, if it comes in time.

    Args:
        accuracy (`list[float]`):
            Score of each answer, from 0 to 1.
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
    is_in_time = _latency_ratio(latency_ms, latency_budget_ms) <= 1.0
    return (np.asarray(accuracy, dtype=np.float64) * is_in_time).tolist()


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
    \\(-\overline{k}\\), the mean over knobs: 0 at the cheapest setting, -1 at the full one.

    Args:
        normalized_knobs (`list[tuple[float, ...]]`):
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


DEFAULT_TIME_PRICE = 0.01
"""Accuracy that the whole budget's time is worth by default: a point."""

DEFAULT_REWARDS: dict[RewardFunction, float] = {
    accuracy_in_time_reward: 1.0,
    efficiency_reward: DEFAULT_TIME_PRICE,
}
"""The objective `accuracy_within_budget` at the default price of time."""

ORIGINAL_REWARDS: dict[RewardFunction, float] = {
    accuracy_reward: 1.0,
    latency_reward: 0.5,
    budget_violation_reward: 10.0,
    efficiency_reward: 0.1,
    complexity_reward: 0.05,
}
"""The objective `original`."""

OBJECTIVES: dict[str, dict[RewardFunction, float]] = {
    "accuracy_within_budget": DEFAULT_REWARDS,
    "original": ORIGINAL_REWARDS,
}
"""Objectives by the name that recipes know them under: reward functions and their weights."""

REWARD_FUNCTIONS: dict[str, RewardFunction] = {
    function.__name__: function for functions in OBJECTIVES.values() for function in functions
}
"""The reward functions of this package by the name that recipes and logs know them under."""


def objective_rewards(
    objective: str = "accuracy_within_budget", time_price: float | None = None
) -> dict[RewardFunction, float]:
    """
    The table of reward functions and their weights of an objective.

    Args:
        objective (`str`, *optional*, defaults to `"accuracy_within_budget"`):
            A name of `OBJECTIVES`.
        time_price (`float`, *optional*):
            Of `"accuracy_within_budget"`: accuracy that may be given up to save the time of the whole budget. With 0, of two
            settings of equal accuracy neither is better. Defaults to `DEFAULT_TIME_PRICE`.

    Raises:
        ValueError: If there is no such objective, or the price is not a finite number of 0 or more, or of no use.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"there is no objective '{objective}': choose from {', '.join(map(repr, OBJECTIVES))}.")
    rewards = dict(OBJECTIVES[objective])
    if time_price is not None:
        if objective != "accuracy_within_budget":
            raise ValueError(
                f"`time_price` is of the objective 'accuracy_within_budget', but `objective` is '{objective}': leave it out."
            )
        if not 0 <= time_price < math.inf:
            raise ValueError(f"`time_price` is {time_price}: give a finite number of 0 or more.")
        rewards[efficiency_reward] = time_price
    return rewards


def resolve_rewards(
    names: Sequence[str] | None = None,
    weights: Sequence[float] | None = None,
    objective: str | None = None,
    time_price: float | None = None,
) -> dict[RewardFunction, float]:
    """
    The table of reward functions and their weights that a recipe asks for.

    Args:
        names (`Sequence[str]`, *optional*):
            Names of `REWARD_FUNCTIONS`, or dotted paths of TRL reward functions (`"my_package.rewards.short_answer"`).
            Defaults to those of the objective.
        weights (`Sequence[float]`, *optional*):
            Weight of each. By default those of the objective; of functions that are named, those of `"original"`, and 1 where it
            has none.
        objective (`str`, *optional*), time_price (`float`, *optional*):
            As in [`objective_rewards`].

    Raises:
        ValueError: If a name is not that of a function or is given twice, there is not one finite weight for each, or both
            names and an objective are given.
    """
    if names is not None and (objective is not None or time_price is not None):
        raise ValueError(
            "`reward_funcs` is an objective of its own: give it, or `objective` and `time_price`, but not both."
        )
    of_objective = objective_rewards(objective or "accuracy_within_budget", time_price)
    functions = list(of_objective)
    if names is not None:
        if not names:
            raise ValueError("`reward_funcs` is empty: name at least one reward function.")
        functions = [REWARD_FUNCTIONS.get(name) or _import_function(name) for name in names]
        of_objective = ORIGINAL_REWARDS
    if len(set(functions)) < len(functions):
        raise ValueError(f"`reward_funcs` names a function twice: {names}. Name each once, and give it its weight.")
    if weights is None:
        weights = [of_objective.get(function, 1.0) for function in functions]
    if len(weights) != len(functions):
        listed = ", ".join(function.__name__ for function in functions)
        raise ValueError(f"`reward_weights` has {len(weights)} values: give one for each of {listed}.")
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"`reward_weights` is {list(weights)}: all must be finite numbers.")
    return dict(zip(functions, map(float, weights), strict=True))


def _import_function(path: str) -> RewardFunction:
    module, _, name = path.rpartition(".")
    known = f"choose from {', '.join(REWARD_FUNCTIONS)}, or give a dotted path (my_package.module.function)"
    if not module:
        raise ValueError(f"there is no reward function '{path}': {known}.")
    try:
        function = vars(importlib.import_module(module)).get(name)
    except ModuleNotFoundError as error:
        raise ValueError(f"reward function '{path}' cannot be imported ({error}): {known}.") from error
    if not callable(function):
        raise ValueError(f"reward function '{path}' is not a function of '{module}': {known}.")
    return function


def reward_names(rewards: Mapping[RewardFunction, float]) -> dict[str, float]:
    """The table as configurations keep it: weights by name or dotted path, read back by [`resolve_rewards`]."""
    return {
        function.__name__
        if REWARD_FUNCTIONS.get(function.__name__) is function
        else f"{function.__module__}.{function.__qualname__}": weight
        for function, weight in rewards.items()
    }


def reward_columns(
    knob_space: KnobSpace,
    samples: Sequence[Mapping[str, Any]],
    outcomes: "Sequence[Outcome]",
    latency_ms: Sequence[float],
    latency_budgets_ms: Sequence[float],
) -> dict[str, list[Any]]:
    """
    What reward functions are given for each request, in training and in evaluation.

    Args:
        knob_space ([`KnobSpace`]):
            The knob space.
        samples (`Sequence[dict]`):
            Rows that were answered.
        outcomes (`Sequence[Outcome]`):
            What the executor did with each.
        latency_ms (`Sequence[float]`):
            What each took, in ms.
        latency_budgets_ms (`Sequence[float]`):
            Budget of each, in ms.

    Returns:
        `dict[str, list]`: The columns of the rows but their images, and `accuracy`, `latency_ms`, `latency_budget_ms`,
        `normalized_knobs`, `answer` and `setting`.
    """
    settings = [outcome.setting for outcome in outcomes]
    return {
        **{name: [sample[name] for sample in samples] for name in samples[0] if name != "image"},
        "accuracy": [outcome.accuracy for outcome in outcomes],
        "latency_ms": list(latency_ms),
        "latency_budget_ms": list(latency_budgets_ms),
        "normalized_knobs": [knob_space.normalized(setting) for setting in settings],
        "answer": [outcome.answer for outcome in outcomes],
        "setting": settings,
    }


def total_reward(rewards: Mapping[RewardFunction, float], columns: Mapping[str, Sequence[Any]]) -> np.ndarray:
    """
    Weighted sum of reward functions: what the trainer maximises, for evaluation outside it.

    Args:
        rewards (`Mapping[RewardFunction, float]`):
            Weight of each function, see [`resolve_rewards`].
        columns (`Mapping[str, Sequence]`):
            What [`reward_columns`] gives.

    Returns:
        `np.ndarray`: Rewards of shape (n,).

    Raises:
        ValueError: If a budget is not positive.
    """
    terms = np.array([function(**columns) for function in rewards])  # (functions, n)
    return np.array(list(rewards.values())) @ terms
