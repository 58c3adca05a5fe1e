"""Exact match: an open answer counts if it says what a reference says, up to how text and numbers are written."""

import math
import re
from collections.abc import Sequence

from joint_controller.evaluation.answer_metric import AnswerMetric, check_references


_NUMBER = re.compile(r"[+-]?(\d{1,3}(,\d{3})+|\d+)?(\.\d*)?(e[+-]?\d+)?")
_AROUND = " .,:;!?\"'`()[]{}"
_ARTICLES = ("a ", "an ", "the ")
_DECIMALS = 2


def normalize_open_answer(answer: str) -> str | float:
    """
    The normal form in which open answers are compared: of a number its value, rounded to two decimals; otherwise the
    answer in lower case, with single spaces, without punctuation around it and without an article in front.
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
    """As [`AnswerMetric.score`]: 1.0 if the answer's normal form is that of a reference, otherwise 0.0."""
    check_references(f"the answer {prediction!r}", references)
    prediction_form = normalize_open_answer(prediction)
    return float(any(normalize_open_answer(reference) == prediction_form for reference in references))


class ExactMatch(AnswerMetric):
    """
    Exact match of open answers, as for the open questions of MMMU. Two answers are equal if their normal forms are: lower
    case, white space collapsed, no quotation marks, brackets or stops (. , : ; ! ?) around it, no article in front; numbers
    ("1,000", "2.50", "-.5", "1e-3") by their value, rounded to two decimals as in MMMU's own evaluation. That evaluation
    also looks for the reference inside longer answers; this metric does not. The score is 1 if the prediction equals one of
    the references and 0 otherwise.

    Example:

    ```python
    >>> metric = evaluate.load("joint_controller/evaluation/exact_match")
    >>> metric.compute(predictions=["The Nile.", "1,200"], references=[["nile"], ["1200.0"]])
    {'exact_match': 1.0}
    ```
    """

    metric_name = "exact_match"
    bibtex = """
    @inproceedings{yue2024mmmu,
        title = {{MMMU}: A Massive Multi-discipline Multimodal Understanding and Reasoning Benchmark for Expert {AGI}},
        author = {Yue, Xiang and Ni, Yuansheng and Zhang, Kai and Zheng, Tianyu and Liu, Ruoqi and Zhang, Ge and others},
        booktitle = {CVPR},
        year = {2024},
    }
    """
    urls = ["https://arxiv.org/abs/2311.16502"]
    score = staticmethod(match_score)
