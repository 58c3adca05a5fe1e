"""What the `evaluate` metrics of this package share: an answer has a score, and a data set has their mean."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence

import datasets
import evaluate


_INPUTS_DESCRIPTION = """
Args:
    predictions (`list[str]`): Answers.
    references (`list[list[str]]`): {references}{options}
    per_sample (`bool`, *optional*, defaults to `False`): Whether to return the score of each prediction, too.

Returns:
    `dict`: `{name}` (`float`), the mean score, from 0 to {highest}; with `per_sample` also `scores` (`list[float]`).
"""


class AnswerMetric(evaluate.Metric, ABC):
    """
    A metric is a subclass of this in a module of its own, which `evaluate.load` finds because this one is abstract. Its
    docstring is the metric's description.

    Attributes:
        metric_name (`str`):
            The module's name, and the key of the mean score.
        highest (`int`, defaults to 1):
            Highest score.
        references (`str`):
            What the references of an answer are.
        options (`str`, defaults to `""`):
            Further arguments of `compute`, for its help.
        bibtex (`str`):
            What to cite.
        urls (`list[str]`):
            Where the metric is defined.
    """

    metric_name: str
    highest = 1
    references = "For each answer the right answers, one or more."
    options = ""
    bibtex: str
    urls: list[str]

    @staticmethod
    @abstractmethod
    def score(prediction: str, references: Sequence[str]) -> float:
        """
        The score of one answer.

        Args:
            prediction (`str`):
                The answer.
            references (`Sequence[str]`):
                What the metric compares it with (`AnswerMetric.references` of its class).

        Returns:
            `float`: From 0 to `highest`.

        Raises:
            ValueError: If there is no reference, or `references` is one string.
        """

    def scores(self, predictions: list[str], references: list[list[str]]) -> list[float]:
        """The scores of several answers."""
        return [self.score(prediction, answers) for prediction, answers in zip(predictions, references, strict=True)]

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=inspect.getdoc(type(self)),
            citation=self.bibtex,
            inputs_description=_INPUTS_DESCRIPTION.format(
                name=self.metric_name, highest=self.highest, references=self.references, options=self.options
            ),
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
            ),
            reference_urls=self.urls,
        )

    def _compute(
        self, predictions: list[str], references: list[list[str]], per_sample: bool = False, **options
    ) -> dict[str, float | list[float]]:
        scores = self.scores(predictions, references, **options)
        result: dict[str, float | list[float]] = {self.metric_name: sum(scores) / len(scores)}
        if per_sample:
            result["scores"] = scores
        return result


def check_references(owner: str, references: Sequence[str]) -> None:
    """
    Refuses references that an answer cannot be scored by: none, or one string. `owner` is what they are for, in the
    message.
    """
    if isinstance(references, str):
        raise ValueError(f"`references` is the string {references!r}: give a list of answers.")
    if len(references) == 0:
        raise ValueError(f"there is no reference for {owner}: give at least one.")
