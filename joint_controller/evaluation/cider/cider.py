"""CIDEr: a caption counts as far as its n-grams are those of the references, rare n-grams most."""

import re
from collections import Counter
from collections.abc import Sequence

from joint_controller.evaluation.answer_metric import AnswerMetric, check_references


_CLITIC = re.compile(r"(?<=[a-z])(n't|'(?:s|re|ve|ll|d|m))\b")
# A clitic; a word, with the marks inside it that Penn Treebank leaves there; or another mark, unless it is dropped.
_TOKEN = re.compile(
    r"n't\b|'(?:s|re|ve|ll|d|m)\b|\w+(?:(?:[-./:&']|(?<=\d),(?=\d))\w+)*|[^\w\s.,:;!?'\"`()\[\]{}\-–—“”‘…]"
)


def tokenize_caption(caption: str) -> list[str]:
    """
    The tokens that n-grams of a caption are made of.

    Example:

    ```python
    >>> tokenize_caption("A man's dog, well-fed, doesn't run.")
    ['a', 'man', "'s", 'dog', 'well-fed', 'does', "n't", 'run']
    ```
    """
    return _TOKEN.findall(_CLITIC.sub(r" \1", caption.lower().replace("’", "'")))


class CaptionCorpus:
    """
    In how many images of a corpus each n-gram occurs (`document_frequency`), and how many images that has
    (`num_images`).

    Args:
        references (`Sequence[Sequence[str]]`):
            Reference captions of each image.

    Raises:
        ValueError: If there are fewer than two images, or one has no reference captions.
        ModuleNotFoundError: If `pycocoevalcap` is not installed.
    """

    def __init__(self, references: Sequence[Sequence[str]]):
        if len(references) < 2:
            raise ValueError(
                f"a corpus of {len(references)} images gives no n-gram a weight: give the reference captions of two "
                "images or more."
            )
        scorer = _make_scorer()
        for captions in references:
            check_references("the corpus", captions)
            scorer.cook_append("", [" ".join(tokenize_caption(caption)) for caption in captions])
        scorer.compute_doc_freq()
        self.num_images = len(references)
        self.document_frequency = Counter(scorer.document_frequency)


def cider_score(prediction: str, references: Sequence[str], corpus: CaptionCorpus | None = None) -> float:
    """
    As [`AnswerMetric.score`], of one caption; from 0 to 10.

    Args:
        corpus ([`CaptionCorpus`], *optional*):
            Where the n-grams' weights come from. Without one, all n-grams weigh the same, as if each occurred in no
            other image: the score then depends on nothing but prediction and references, so that it may be kept and
            compared between runs; but "a" counts as much as "surfboard", and scores lie higher than those that are
            reported for a corpus.

    Raises:
        ModuleNotFoundError: If `pycocoevalcap` is not installed.
    """
    check_references(f"the answer {prediction!r}", references)
    scorer = _make_scorer()
    # The package takes N from the number of images that it was given, so it is given as many; it scores the first only,
    # since there is one prediction. Without a corpus any N above 1 gives the same score.
    num_images = 2 if corpus is None else corpus.num_images
    if corpus is not None:
        scorer.document_frequency = corpus.document_frequency
    scorer.cook_append(
        " ".join(tokenize_caption(prediction)), [" ".join(tokenize_caption(caption)) for caption in references]
    )
    scorer.crefs += [None] * (num_images - 1)
    return float(scorer.compute_cider()[0])


def _make_scorer():
    try:
        from pycocoevalcap.cider.cider_scorer import CiderScorer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "captions are scored with the package `pycocoevalcap`, which is not installed: install it with "
            '`pip install "joint-controller[captions]"` (104 MB).'
        ) from error
    return CiderScorer()


class Cider(AnswerMetric):
    """
    CIDEr-D, the form of CIDEr that is reported for COCO captions, computed by `pycocoevalcap` (extra `captions`). An n-gram
    w weighs g(w) = tf(w) · (log N - log max(1, df(w))), where tf is its count in the caption, df the number of images that
    have it in a reference, and N the number of images. Per n from 1 to 4 and per reference,
    similarity = exp(-(l_c - l_r)² / (2 · 6²)) · Σ_w min(g_c(w), g_r(w)) · g_r(w) / (|g_c| |g_r|) with the captions'
    lengths l; the score of a caption is 10 times the mean over n and references: from 0 to 10, about 1 for a caption that a
    person would write.

    df and N come from the references that are given with the predictions, as in the official evaluation, or from a corpus
    of captions that is given apart: then the score of one caption does not depend on the other predictions.

    Captions are tokenised in Python, without the Java of the official evaluation, after the rules of its tokeniser (Penn
    Treebank) that matter here: lower case, punctuation dropped, clitics apart ("man's": "man", "'s"; "don't": "do", "n't").

    Example:

    ```python
    >>> metric = evaluate.load("joint_controller/evaluation/cider")
    >>> references = [["a dog runs", "the dog is running"], ["two red cars", "cars in a street"]]
    >>> metric.compute(predictions=["a dog runs", "a cat"], references=references)
    {'cider': 2.092923043720018}
    ```
    """

    metric_name = "cider"
    references = "For each image its reference captions, one or more (five in COCO)."
    bibtex = """
    @inproceedings{vedantam2015cider,
        title = {{CIDEr}: Consensus-based Image Description Evaluation},
        author = {Vedantam, Ramakrishna and Zitnick, C. Lawrence and Parikh, Devi},
        booktitle = {CVPR},
        year = {2015},
    }
    """
    urls = ["https://arxiv.org/abs/1411.5726", "https://github.com/salaniz/pycocoevalcap"]
    highest = 10
    options = """
    corpus (`list[list[str]]`, *optional*): Reference captions of each image of the corpus that df and N come from.
        Defaults to `references`, which then need two images or more: in a corpus of one image every weight is 0."""
    score = staticmethod(cider_score)

    def scores(
        self, predictions: list[str], references: list[list[str]], corpus: list[list[str]] | None = None
    ) -> list[float]:
        captions = CaptionCorpus(references if corpus is None else corpus)
        return [cider_score(*pair, captions) for pair in zip(predictions, references, strict=True)]
