"""ANLS: an answer that was read off an image counts as far as its letters agree with a reference."""

from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

from joint_controller.evaluation.answer_metric import AnswerMetric, check_references


_THRESHOLD = 0.5
"""Similarity up to which an answer is wrong rather than misread (1 - tau in both papers)."""


def anls_score(prediction: str, references: Sequence[str]) -> float:
    """
    As [`AnswerMetric.score`]: over the references the largest 1 - NL where the normalised Levenshtein distance NL is
    below 0.5, and 0 where none is.
    """
    check_references(f"the answer {prediction!r}", references)
    first, *others = [" ".join(text.lower().split()) for text in (prediction, *references)]
    best = max(Levenshtein.normalized_similarity(first, other) for other in others)
    return best if best > _THRESHOLD else 0.0


class Anls(AnswerMetric):
    """
    Average normalised Levenshtein similarity (ANLS), the metric of ST-VQA and DocVQA. With the normalised distance
    NL(a, p) = edits from reference a to prediction p / length of the longer one, a prediction scores
    max over references of (1 - NL if NL < 0.5, else 0). Case and repeated white space do not count.

    Example:

    ```python
    >>> metric = evaluate.load("joint_controller/evaluation/anls")
    >>> metric.compute(predictions=["Coca Cola"], references=[["coca-cola", "the coca cola company"]])
    {'anls': 0.8888888888888888}
    ```
    """

    metric_name = "anls"
    bibtex = """
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
    urls = ["https://arxiv.org/abs/1905.13648", "https://arxiv.org/abs/2007.00398"]
    score = staticmethod(anls_score)
