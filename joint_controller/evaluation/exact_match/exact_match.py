"""Exact match: an open answer counts if it says what a reference says, up to how text and numbers are written."""

import math
import re
from collections.abc import Sequence

import datasets
import evaluate


_DESCRIPTION = """
Exact match of open answers, as for the open questions of MMMU. Two answers are equal if their normal forms are: lower
case, white space collapsed, no quotation marks, brackets or stops (. , : ; ! ?) around it, no article in front; numbers
("1,000", "2.50", "-.5", "1e-3") by their value, rounded to two decimals as in MMMU's own evaluation. That evaluation
also looks for the reference inside longer answers; this metric does not. The score is 1 if the prediction equals one of
the references and 0 otherwise.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[str]`): Answers.
    references (`list[list[str]]`): For each answer the right answers, one or more.
    per_sample (`bool`, *optional*, defaults to `False`): Whether to return the score of each prediction, too.

Returns:
    `dict`: `exact_match` (`float`), the share of right answers; with `per_sample` also `scores` (`list[float]`).

Examples:
    >>> metric = evaluate.load("joint_controller/evaluation/exact_match")
    >>> metric.compute(predictions=["The Nile.", "1,200"], references=[["nile"], ["1200.0"]])
    {'exact_match': 1.0}
"""

_CITATION = """
@inproceedings{yue2024mmmu,
    title = {{MMMU}: A Massive Multi-discipline Multimodal Understanding and Reasoning Benchmark for Expert {AGI}},
    author = {Yue, Xiang and Ni, Yuansheng and Zhang, Kai and Zheng, Tianyu and Liu, Ruoqi and Zhang, Ge and others},
    booktitle = {CVPR},
    year = {2024},
}
"""

_NUMBER = re.compile(r"[+-]?(\d{1,3}(,\d{3})+|\d+)?(\.\d*)?(e[+-]?\d+)?")
_AROUND = " .,:;!?\"'`()[]{}"
_ARTICLES = ("a ", "an ", "the ")
_DECIMALS = 2


def normalize_open_answer(answer: str) -> str | float:
    """
    The normal form in which open answers are compared.

    Args:
        answer (`str`):
            An answer.

    Returns:
        `float` for a number, rounded to two decimals, otherwise `str`: the answer in lower case, single spaces, without
        punctuation around it and without an article in front.
    """
    text = " ".join(answer.lower().split())
    for candidate in (text, text.strip(_AROUND)):
        if any(character.isdecimal() for character in candidate) and _NUMBER.fullmatch(candidate):
            try:
                number = float(candidate.replace(",", ""))
            except ValueError:  # digits in the exponent only
                break
            # A number too large for a float is compared as text.
            return round(number, _DECIMALS) if math.isfinite(number) else candidate
    text = text.strip(_AROUND)
    for article in _ARTICLES:
        if text.startswith(article):
            return text.removeprefix(article)
    return text


def match_score(prediction: str, references: Sequence[str]) -> float:
    """
    The score of one answer: 1.0 if its normal form is that of a reference, otherwise 0.0.

    Args:
        prediction (`str`):
            The answer.
        references (`Sequence[str]`):
            The right answers.

    Raises:
        ValueError: If there is no reference, or `references` is one string.
    """
    if isinstance(references, str):
        raise ValueError(f"`references` is the string {references!r}: give a list of answers.")
    if len(references) == 0:
        raise ValueError(f"there is no reference for the answer {prediction!r}: give at least one.")
    prediction_form = normalize_open_answer(prediction)
    return float(any(normalize_open_answer(reference) == prediction_form for reference in references))


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class ExactMatch(evaluate.Metric):
    """Mean of [`match_score`] over a data set."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
            ),
            reference_urls=["https://arxiv.org/abs/2311.16502"],
        )

    def _compute(
        self, predictions: list[str], references: list[list[str]], per_sample: bool = False
    ) -> dict[str, float | list[float]]:
        scores = [
            match_score(prediction, answers) for prediction, answers in zip(predictions, references, strict=True)
        ]
        result: dict[str, float | list[float]] = {"exact_match": sum(scores) / len(scores)}
        if per_sample:
            result["scores"] = scores
        return result
