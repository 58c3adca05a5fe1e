"""Exact count: the answer to "how many" counts if it is the right number, in digits or in words."""

import re
from collections.abc import Sequence

from joint_controller.evaluation.answer_metric import AnswerMetric, check_references


_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_SMALL = {word: number for number, word in enumerate(_UNITS)} | {
    word: number for number, word in zip(range(20, 100, 10), _TENS, strict=True)
}
_LARGE = {"hundred": 100, "thousand": 1000}
_ZERO = {"no", "none"}
# A number with its sign and decimals, so that neither is mistaken for a number of its own; or a word.
_TOKEN = re.compile(r"(?:(?<!\S)[-−])?\d+(?:[.,]\d+)*|[a-z]+")
_WHOLE = re.compile(r"\d+|\d{1,3}(?:,\d{3})+")


def parse_count(answer: str) -> int | None:
    """
    The number that an answer gives, e.g. 21 of `"There are twenty-one."`; `None` where it gives no whole number, or
    two that differ.
    """
    counts: set[int | None] = set()
    words: list[str] = []
    is_zero = False
    for token in [*_TOKEN.findall(answer.lower()), ""]:
        if token in _SMALL or token in _LARGE or (token == "and" and words and words[-1] in _LARGE):
            words.append(token)
            continue
        counts |= set(_read_words(words))
        words = []
        is_zero = is_zero or token in _ZERO
        if token and not token.isalpha():
            counts.add(int(token.replace(",", "")) if _WHOLE.fullmatch(token) else None)
    if not counts and is_zero:
        return 0
    return counts.pop() if len(counts) == 1 else None


def _read_words(words: list[str]) -> list[int]:
    """The numbers that a row of number words spells: `["two", "hundred", "five"]` is one, `["two", "three"]` are two."""
    numbers: list[int] = []
    total = group = 0  # thousands that are complete, and what was read since
    last = None  # the word before
    for word in words:
        if word == "and":
            continue
        if word in _LARGE:
            if word == "hundred":
                group = max(group, 1) * 100
            else:
                total, group = max(group, 1) * 1000, 0
        else:
            value = _SMALL[word]
            continues = last in _LARGE or (last in _TENS and 0 < value < 10)
            if last is not None and not continues:
                numbers.append(total + group)
                total = group = 0
            group += value
        last = word
    return numbers if last is None else [*numbers, total + group]


def count_score(prediction: str, references: Sequence[str]) -> float:
    """
    As [`AnswerMetric.score`]: 1.0 if the answer's number is that of a reference, otherwise 0.0. References none of
    which is a count are refused (`ValueError`), too.
    """
    check_references(f"the answer {prediction!r}", references)
    counts = {parse_count(reference) for reference in references} - {None}
    if not counts:
        raise ValueError(
            f"none of the references {list(references)} is a count: give a whole number, in digits or words."
        )
    return float(parse_count(prediction) in counts)


class ExactCount(AnswerMetric):
    """
    Accuracy of counting, as reported for TallyQA: the share of answers whose number is that of the reference. The number of
    an answer is read as follows:
    - digits, with or without commas between thousands ("12", "1,200"), and number words below a million ("three",
      "twenty-one", "two hundred and five") are whole numbers; "no" and "none" are 0 where there is no other number;
    - an answer may say more than the number ("There are 3 dogs."), but must say one number only: an answer without a number,
      or with two that differ, is wrong;
    - a fraction ("2.5") or a negative number is not a count: an answer with one is wrong. "a" and "an" are not read as 1.

    Example:

    ```python
    >>> metric = evaluate.load("joint_controller/evaluation/exact_count")
    >>> metric.compute(predictions=["There are two.", "4"], references=[["2"], ["5"]])
    {'exact_count': 0.5}
    ```
    """

    metric_name = "exact_count"
    references = (
        "For each answer the right count, in digits or words. Any of several will do; those that are not counts are left "
        "out, but one must be."
    )
    bibtex = """
    @inproceedings{acharya2019tallyqa,
        title = {{TallyQA}: Answering Complex Counting Questions},
        author = {Acharya, Manoj and Kafle, Kushal and Kanan, Christopher},
        booktitle = {AAAI},
        year = {2019},
    }
    """
    urls = ["https://arxiv.org/abs/1810.12440"]
    score = staticmethod(count_score)
