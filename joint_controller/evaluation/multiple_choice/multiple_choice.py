"""Multiple choice: an answer counts if it names the right option, by its letter or by its text."""

import re
from collections.abc import Sequence

from joint_controller.evaluation.answer_metric import AnswerMetric, check_references


_ANNOUNCEMENT = re.compile(r"\banswer(?:\s+is\s*:?|\s*:)", re.IGNORECASE)
_ALONE = re.compile(r"[(\[]?([A-Za-z])[)\].:]*")
_AT_THE_BEGINNING = re.compile(r"(?:[(\[]([A-Za-z])[)\]]|([A-Za-z])[).:](?=\s|$))")
_NAMED = re.compile(r"\b(?:[Oo]ption|[Cc]hoice)\s+[(\[]?([A-Z])\b")
_AROUND = " .,:;!?\"'`()[]{}"


def extract_choice(prediction: str) -> tuple[str | None, str]:
    """
    The option that an answer names, by the rules of the metric: its letter in upper case, or `None` where the answer
    names no letter; and the text in its normal form.
    """
    answer = _ANNOUNCEMENT.split(prediction)[-1].strip()
    text = _normalize_text(answer)
    if match := _ALONE.fullmatch(answer):
        return match[1].upper(), text
    if match := _AT_THE_BEGINNING.match(answer):
        return (match[1] or match[2]).upper(), text
    if match := _NAMED.search(answer):
        return match[1], text
    return None, text


def _normalize_text(text: str) -> str:
    return " ".join(text.lower().split()).strip(_AROUND)


def choice_score(prediction: str, references: Sequence[str]) -> float:
    """As [`AnswerMetric.score`]: 1.0 if the answer names the right option, otherwise 0.0."""
    check_references(f"the answer {prediction!r}", references)
    letter, text = extract_choice(prediction)
    right_letter = references[0].strip().upper()
    if letter is not None and re.fullmatch("[A-Z]", right_letter):
        return float(letter == right_letter)
    return float(any(_normalize_text(reference) == text for reference in references))


class MultipleChoice(AnswerMetric):
    """
    Accuracy of multiple choice, as reported for ScienceQA and MMMU: the share of answers that name the right option. The
    references of a question are the letter of the right option, then its text (either may be missing; a single letter that
    comes first is the letter). What an answer names is decided by these rules, the first that applies:
    1. If it says "answer is" or "answer:" (any case, "is" and ":" may follow each other), only what follows the last of
       these counts, for the rules below.
    2. One letter, alone, in brackets or before a stop or colon, is a letter: "B", "b", "(B)", "B.", "B)".
    3. One letter in brackets or before ".", ")" or ":" at the beginning is a letter, whatever follows: "(B) a cat",
       "B. a cat". Before a space it is not: "A cat" is a text.
    4. "option B", "choice (B)": a capital letter after these words is a letter.
    5. Anything else is a text.
    A letter is right if it is the reference's letter, even where the text behind it belongs to another option. A text is
    right if it equals the reference's text in lower case, white space collapsed and punctuation around it left out; a text
    that merely contains the right one is wrong.

    Example:

    ```python
    >>> metric = evaluate.load("joint_controller/evaluation/multiple_choice")
    >>> metric.compute(predictions=["(B)", "A cat."], references=[["B", "a dog"], ["C", "a cat"]])
    {'multiple_choice': 1.0}
    ```
    """

    metric_name = "multiple_choice"
    references = "For each answer the letter of the right option, its text, or both in this order."
    bibtex = """
    @inproceedings{lu2022learn,
        title = {Learn to Explain: Multimodal Reasoning via Thought Chains for Science Question Answering},
        author = {Lu, Pan and Mishra, Swaroop and Xia, Tony and Qiu, Liang and Chang, Kai-Wei and Zhu, Song-Chun and Tafjord, Oyvind and Clark, Peter and Kalyan, Ashwin},
        booktitle = {NeurIPS},
        year = {2022},
    }
    @inproceedings{yue2024mmmu,
        title = {{MMMU}: A Massive Multi-discipline Multimodal Understanding and Reasoning Benchmark for Expert {AGI}},
        author = {Yue, Xiang and Ni, Yuansheng and Zhang, Kai and Zheng, Tianyu and Liu, Ruoqi and Zhang, Ge and others},
        booktitle = {CVPR},
        year = {2024},
    }
    """
    urls = ["https://arxiv.org/abs/2209.09513", "https://arxiv.org/abs/2311.16502"]
    score = staticmethod(choice_score)
