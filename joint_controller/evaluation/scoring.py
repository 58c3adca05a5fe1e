"""The score of one answer, by the metric that its row names."""

from collections.abc import Callable, Iterable, Sequence

from .anls import anls_score
from .cider import cider_score
from .exact_count import count_score
from .exact_match import match_score
from .multiple_choice import choice_score
from .vqa_accuracy import vqa_score


SCORES: dict[str, Callable[[str, Sequence[str]], float]] = {
    "vqa_accuracy": vqa_score,
    "anls": anls_score,
    "exact_count": count_score,
    "multiple_choice": choice_score,
    "exact_match": match_score,
    "cider": cider_score,
}
"""Metrics that a row's column `metric` may name, and the score of one answer by each."""


def score_answer(metric: str, prediction: str, answers: Sequence[str]) -> float:
    """
    The score of one answer, from what its row holds and nothing else: an outcome is kept and shared between runs.

    Args:
        metric (`str`):
            Column `metric` of the row: `"vqa_accuracy"`, `"anls"`, `"exact_count"`, `"multiple_choice"`,
            `"exact_match"` or `"cider"`.
        prediction (`str`):
            The answer.
        answers (`Sequence[str]`):
            Column `answers` of the row: the reference answers.

    Returns:
        `float`: From 0 to 1. For `"cider"` from 0 to 10, with all n-grams weighing the same (see
        [`~joint_controller.evaluation.cider.cider_score`]): the weights of a corpus would change with the rows of a run.

    Raises:
        ValueError: If the metric is unknown, or there are no answers.
        ModuleNotFoundError: If the metric needs a package that is not installed.
    """
    if metric not in SCORES:
        raise ValueError(f"there is no metric '{metric}': the column 'metric' takes {', '.join(map(repr, SCORES))}.")
    return SCORES[metric](prediction, answers)


def check_metrics(metrics: Iterable[str], sample_ids: Iterable[str]) -> None:
    """
    Refuses rows that cannot be scored because of their metric, so that a run fails before its first answer: the metric
    is unknown (`ValueError`), or needs a package that is not installed (`ModuleNotFoundError`). `metrics` and
    `sample_ids` are columns of the rows.
    """
    for metric, sample_id in dict(zip(metrics, sample_ids, strict=True)).items():
        try:
            score_answer(metric, "0", ["0"])
        except (ValueError, ModuleNotFoundError) as error:
            raise type(error)(f"sample '{sample_id}', column 'metric': {error}") from error
