"""ANLS: an answer that was read off an image counts as far as its letters agree with a reference."""

from collections.abc import Sequence

import datasets
import evaluate


_DESCRIPTION = """
Average normalised Levenshtein similarity (ANLS), the metric of ST-VQA and DocVQA. With the normalised distance
NL(a, p) = edits from reference a to prediction p / length of the longer one, a prediction scores
max over references of (1 - NL if NL < 0.5, else 0). Case and repeated white space do not count.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[str]`): Answers.
    references (`list[list[str]]`): For each answer the right answers, one or more.
    per_sample (`bool`, *optional*, defaults to `False`): Whether to return the score of each prediction, too.

Returns:
    `dict`: `anls` (`float`), the mean score, from 0 to 1; with `per_sample` also `scores` (`list[float]`).

Examples:
    >>> metric = evaluate.load("joint_controller/evaluation/anls")
    >>> metric.compute(predictions=["Coca Cola"], references=[["coca-cola", "the coca cola company"]])
    {'anls': 0.8888888888888888}
"""

_CITATION = """
@inproceedings{biten2019scene,
    title = {Scene Text Visual Question Answering},
    author = {Biten, Ali Furkan and Tito, Rub{\\`e}n and Mafla, Andres and Gomez, Lluis and Rusi{\\~n}ol, Mar{\\c{c}}al and Valveny, Ernest and Jawahar, C. V. and Karatzas, Dimosthenis},
    booktitle = {ICCV},
    year = {2019},
}
@inproceedings{mathew2021docvqa,
    title = {{DocVQA}: A Dataset for {VQA} on Document Images},
    author = {Mathew, Minesh and Karatzas, Dimosthenis and Jawahar, C. V.},
    booktitle = {WACV},
    year = {2021},
}
"""

_THRESHOLD = 0.5
"""Normalised distance from which an answer is wrong and not misread (tau in both papers)."""


def levenshtein_distance(first: str, second: str) -> int:
    """
    Fewest insertions, deletions and replacements of one character that make one string of the other.

    Args:
        first (`str`), second (`str`):
            The strings.
    """
    distances = list(range(len(second) + 1))  # from the empty start of `first` to each start of `second`
    for row, character in enumerate(first, start=1):
        diagonal, distances[0] = distances[0], row
        for column, other in enumerate(second, start=1):
            diagonal, distances[column] = (
                distances[column],
                min(distances[column] + 1, distances[column - 1] + 1, diagonal + (character != other)),
            )
    return distances[-1]


def anls_score(prediction: str, references: Sequence[str]) -> float:
    """
    The score of one answer: over the references the largest 1 - NL where the normalised Levenshtein distance NL is below
    0.5, and 0 where none is.

    Args:
        prediction (`str`):
            The answer.
        references (`Sequence[str]`):
            The right answers.

    Returns:
        `float`: 0, or above 0.5 and up to 1.

    Raises:
        ValueError: If there is no reference, or `references` is one string.
    """
    if isinstance(references, str):
        raise ValueError(f"`references` is the string {references!r}: give a list of answers.")
    if len(references) == 0:
        raise ValueError(f"there is no reference for the answer {prediction!r}: give at least one.")
    prediction = " ".join(prediction.lower().split())
    best = 0.0
    for reference in references:
        reference = " ".join(reference.lower().split())
        # Two empty strings are equal.
        distance = levenshtein_distance(reference, prediction) / max(len(reference), len(prediction), 1)
        if distance < _THRESHOLD:
            best = max(best, 1 - distance)
    return best


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class Anls(evaluate.Metric):
    """Mean of [`anls_score`] over a data set."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
            ),
            reference_urls=["https://arxiv.org/abs/1905.13648", "https://arxiv.org/abs/2007.00398"],
        )

    def _compute(
        self, predictions: list[str], references: list[list[str]], per_sample: bool = False
    ) -> dict[str, float | list[float]]:
        scores = [anls_score(prediction, answers) for prediction, answers in zip(predictions, references, strict=True)]
        result: dict[str, float | list[float]] = {"anls": sum(scores) / len(scores)}
        if per_sample:
            result["scores"] = scores
        return result
