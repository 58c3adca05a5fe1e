"""CIDEr-D: the formula written out a second time, and the package's own way of scoring a corpus."""

import math
import sys
from collections import Counter
from importlib.util import find_spec

import evaluate
import pytest

from joint_controller.evaluation import cider as cider_package
from joint_controller.evaluation.cider import CaptionCorpus, cider_score, tokenize_caption


REFERENCES = [
    ["A man's dog runs on the beach.", "the dog is running along a beach", "A brown dog, running."],
    ["Two red cars parked in a street.", "red cars in the street"],
    ["A plate of food on a table.", "the food is on a white plate", "A plate with food on it, on a table"],
    ["A man is standing on the beach with a surfboard."],
]
PREDICTIONS = ["a dog runs on the beach", "two cars", "A plate of food on a table.", "the the the the the"]


needs_package = pytest.mark.skipif(
    find_spec("pycocoevalcap") is None, reason='needs `pip install "joint-controller[captions]"`'
)


def n_grams(caption, n):
    words = tokenize_caption(caption)
    return Counter(tuple(words[start : start + n]) for start in range(len(words) - n + 1))


def formula(prediction, references, corpus=None):
    """CIDEr-D (Vedantam et al. 2015, section 4 and the reference code's clipping), straight from the definition."""

    def weights(caption, n):
        if corpus is None:
            return dict(n_grams(caption, n))
        frequency = {
            gram: sum(any(gram in n_grams(other, n) for other in captions) for captions in corpus)
            for gram in n_grams(caption, n)
        }
        return {
            gram: count * math.log(len(corpus) / max(1, frequency[gram]))
            for gram, count in n_grams(caption, n).items()
        }

    def length(caption):
        return max(len(tokenize_caption(caption)) - 1, 0)  # the reference code counts bigrams

    total = 0.0
    for reference in references:
        penalty = math.exp(-((length(prediction) - length(reference)) ** 2) / 72)
        for n in range(1, 5):
            mine, theirs = weights(prediction, n), weights(reference, n)
            norm = math.hypot(*mine.values()) * math.hypot(*theirs.values())
            overlap = sum(min(weight, theirs.get(gram, 0)) * theirs.get(gram, 0) for gram, weight in mine.items())
            total += penalty * overlap / norm if norm else 0.0
    return 10 * total / 4 / len(references)


@pytest.fixture(scope="module")
def metric():
    return evaluate.load(str(cider_package.__path__[0]))


@needs_package
def test_metric_is_the_formula_over_the_corpus_of_the_references(metric):
    expected = [formula(*pair, REFERENCES) for pair in zip(PREDICTIONS, REFERENCES, strict=True)]
    result = metric.compute(predictions=PREDICTIONS, references=REFERENCES, per_sample=True)
    assert result["scores"] == pytest.approx(expected)
    assert result["cider"] == pytest.approx(sum(expected) / 4)
    assert min(expected[:3]) > 0.5 and expected[3] < 0.5


@needs_package
def test_metric_is_what_the_package_gives_for_the_same_tokens(metric):
    from pycocoevalcap.cider.cider import Cider

    def join(captions):
        return [" ".join(tokenize_caption(caption)) for caption in captions]

    mean, scores = Cider().compute_score(
        {index: join(captions) for index, captions in enumerate(REFERENCES)},
        {index: join([prediction]) for index, prediction in enumerate(PREDICTIONS)},
    )
    result = metric.compute(predictions=PREDICTIONS, references=REFERENCES, per_sample=True)
    assert result["cider"] == pytest.approx(mean)
    assert result["scores"] == pytest.approx(list(scores))


@needs_package
def test_with_a_corpus_a_caption_scores_the_same_in_any_company(metric):
    corpus = CaptionCorpus(REFERENCES)
    for prediction, references in zip(PREDICTIONS, REFERENCES, strict=True):
        expected = formula(prediction, references, REFERENCES)
        assert cider_score(prediction, references, corpus) == pytest.approx(expected)
        alone = metric.compute(predictions=[prediction], references=[references], corpus=REFERENCES)
        assert alone["cider"] == pytest.approx(expected)
    assert corpus.num_images == 4 and corpus.document_frequency["beach",] == 2
    assert all(corpus.document_frequency.values()), "scoring has added n-grams to the corpus"


@needs_package
def test_without_a_corpus_all_n_grams_weigh_the_same():
    for prediction, references in zip(PREDICTIONS, REFERENCES, strict=True):
        assert cider_score(prediction, references) == pytest.approx(formula(prediction, references))
    assert cider_score("red cars in the street", ["Red cars in the street."]) == pytest.approx(10.0)
    assert cider_score("", REFERENCES[0]) == 0.0


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        # what the Java tokeniser of the official evaluation gives
        ("A man's dog, well-fed, doesn't run.", "a man 's dog well-fed does n't run"),
        ('Two T-shirts & a $5 bill: "cheap"!', "two t-shirts & a $ 5 bill cheap"),
        ("People can't stop; they're happy - really!", "people ca n't stop they 're happy really"),
        ("3.5 inches of snow, 1,000 people", "3.5 inches of snow 1,000 people"),
        ("half-eaten pizza w/ cheese and 50% off", "half-eaten pizza w / cheese and 50 % off"),
        ("A cat's tail; the girls' room", "a cat 's tail the girls room"),
        ("It’s a “nice” day…", "it 's a nice day"),
        ("dog,cat and\nmouse", "dog cat and mouse"),
        ("", ""),
    ],
)
def test_tokens(caption, tokens):
    assert tokenize_caption(caption) == tokens.split()


@needs_package
def test_bad_input_is_refused(metric):
    with pytest.raises(ValueError, match="a corpus of 1 images gives no n-gram a weight"):
        metric.compute(predictions=["a dog"], references=[["a dog"]])
    with pytest.raises(ValueError, match="there is no reference for the corpus"):
        CaptionCorpus([["a dog"], []])
    with pytest.raises(ValueError, match="no reference for the answer 'a dog'"):
        cider_score("a dog", [])


def test_a_missing_package_is_named_with_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider_scorer", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "joint-controller\[captions\]"'):
        cider_score("a dog", ["a dog"])
