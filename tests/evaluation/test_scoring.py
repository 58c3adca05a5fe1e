"""Scores by the metric of a row; and what all metrics have in common as `evaluate` modules."""

import sys
from importlib.util import find_spec
from pathlib import Path

import evaluate
import pytest

from joint_controller import evaluation
from joint_controller.data import VQA_DATASETS
from joint_controller.evaluation.scoring import SCORES, check_metrics, score_answer


# Two answers with their references, and the score of each by hand.
EXAMPLES = {
    "vqa_accuracy": (["two", "red"], [["2", "2", "two", "3"], ["blue"]], [0.75, 0.0]),
    "anls": (["hous", "cat"], [["house"], ["dog"]], [0.8, 0.0]),
    "exact_count": (["There are two.", "3"], [["2"], ["4"]], [1.0, 0.0]),
    "multiple_choice": (["(B)", "a cat"], [["B", "a dog"], ["A", "a dog"]], [1.0, 0.0]),
    "exact_match": (["The Nile.", "2"], [["nile"], ["3"]], [1.0, 0.0]),
    # Equal captions of two words have equal n-grams for n = 1 and 2, and none for 3 and 4.
    "cider": (["a dog", "two cars"], [["a dog"], ["one street"]], [5.0, 0.0]),
}


@pytest.fixture(params=list(SCORES))
def metric_name(request):
    if request.param == "cider" and find_spec("pycocoevalcap") is None:
        pytest.skip('needs `pip install "joint-controller[captions]"`')
    return request.param


def load(name):
    return evaluate.load(str(Path(evaluation.__file__).parent / name))


def test_a_row_is_scored_by_the_metric_that_it_names(metric_name):
    predictions, references, scores = EXAMPLES[metric_name]
    assert [score_answer(metric_name, *pair) for pair in zip(predictions, references, strict=True)] == scores


def test_each_metric_loads_offline_and_averages_its_scores(metric_name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    predictions, references, scores = EXAMPLES[metric_name]
    metric = load(metric_name)
    assert metric.compute(predictions=predictions, references=references) == {metric_name: sum(scores) / 2}
    result = metric.compute(predictions=predictions, references=references, per_sample=True)
    assert result == {metric_name: sum(scores) / 2, "scores": scores}


def test_all_metrics_combine():
    names = [name for name in SCORES if name != "cider" or find_spec("pycocoevalcap") is not None]
    combined = evaluate.combine([load(name) for name in names])
    result = combined.compute(predictions=["2", "3"], references=[["2"], ["4"]])
    # CIDEr-D of two equal captions of one word: their n-grams agree for one n of four, times 10.
    assert result == {name: 1.25 if name == "cider" else 0.5 for name in names}


def test_every_published_data_set_has_a_metric_that_exists():
    assert {dataset.metric for dataset in VQA_DATASETS.values()} <= set(SCORES)


@pytest.mark.parametrize(("references", "message"), [([], "no reference"), ("yes", "give a list of answers")])
def test_bad_references_are_refused(metric_name, references, message):
    with pytest.raises(ValueError, match=message):
        score_answer(metric_name, "yes", references)


def test_an_unknown_metric_is_refused_with_those_that_there_are():
    with pytest.raises(ValueError, match="there is no metric 'vqa'.*'vqa_accuracy', 'anls'.*'cider'"):
        score_answer("vqa", "yes", ["yes"])


def test_metrics_are_checked_before_the_first_answer(monkeypatch):
    names = [name for name in SCORES if name != "cider"]
    check_metrics(names * 2, map(str, range(2 * len(names))))
    with pytest.raises(ValueError, match="sample 'b', column 'metric': there is no metric 'accuracy'"):
        check_metrics(["anls", "accuracy", "anls"], ["a", "b", "c"])
    monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider_scorer", None)
    with pytest.raises(ModuleNotFoundError, match="captions"):
        check_metrics(["anls", "cider"], ["a", "b"])
