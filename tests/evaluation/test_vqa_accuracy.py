import itertools
import json
from pathlib import Path

import evaluate
import pytest

from joint_controller.evaluation import vqa_accuracy as vqa_accuracy_package
from joint_controller.evaluation.vqa_accuracy import normalize_answer, vqa_score


def test_official_cases(shared_dir):
    cases = json.loads((shared_dir / "vqa_accuracy_cases.json").read_text())
    assert len(cases) == 150
    for case in cases:
        assert normalize_answer(case["prediction"]) == case["normalized"], case
        assert vqa_score(case["prediction"], case["references"]) == pytest.approx(case["score"], abs=1e-6), case


@pytest.mark.parametrize(
    ("answer", "normal_form"),
    [
        ("The Red Star.", "red star"),
        ("two", "2"),
        ("None", "0"),
        ("eleven", "eleven"),
        ("dont", "don't"),
        ("a", ""),
        ("t-shirt", "t shirt"),
        ("yes, it is", "yes it is"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("e.g. this", "eg this"),
        ("new\nyork\t", "new york"),
        ("what?", "what"),
    ],
)
def test_normal_form(answer, normal_form):
    assert normalize_answer(answer) == normal_form


@pytest.mark.parametrize("num_equal", range(6))
@pytest.mark.parametrize("num_references", [2, 3, 5, 10])
def test_score_is_the_mean_over_all_references_but_one(num_equal, num_references):
    references = (["yes"] * num_equal + ["no"] * num_references)[:num_references]
    subsets = list(itertools.combinations(references, num_references - 1))
    expected = sum(min(subset.count("yes") / 3, 1) for subset in subsets) / len(subsets)
    assert vqa_score("Yes!", references) == pytest.approx(expected)


def test_one_reference_asks_for_an_exact_match():
    assert vqa_score("The two", ["2"]) == 1.0
    assert vqa_score("3", ["2"]) == 0.0


@pytest.mark.parametrize(("references", "message"), [([], "no reference"), ("yes", "give a list of answers")])
def test_bad_references_are_refused(references, message):
    with pytest.raises(ValueError, match=message):
        vqa_score("yes", references)


def test_metric_loads_offline_and_averages_scores(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    metric = evaluate.load(str(Path(vqa_accuracy_package.__file__).parent))
    predictions, references = ["two", "red", "no"], [["2", "2", "two", "3"], ["Red."], ["yes"]]
    assert metric.compute(predictions=predictions, references=references) == {"vqa_accuracy": pytest.approx(1.75 / 3)}
    result = metric.compute(predictions=predictions, references=references, per_sample=True)
    assert result == {"vqa_accuracy": pytest.approx(1.75 / 3), "scores": [pytest.approx(0.75), 1.0, 0.0]}
