"""Exact match of open answers: which ways of writing one thing are equal."""

import pytest

from joint_controller.evaluation.exact_match import match_score


@pytest.mark.parametrize(
    ("prediction", "reference"),
    [
        ("The  Nile.", "nile"),
        ('"A cell wall"', "cell wall"),
        ("1,200", "1200.0"),
        ("(2.5)", "2.50"),
        ("3.14159", "3.14"),
        ("-.5", "-0.5"),
        ("1e-1", "0.1"),
        ("2.", "2"),
        ("inf", "inf"),
    ],
)
def test_equal(prediction, reference):
    assert match_score(prediction, ["something else", reference]) == 1.0


@pytest.mark.parametrize(
    ("prediction", "reference"),
    [
        ("the river Nile", "nile"),
        ("2", "two"),
        ("1,20", "120"),
        ("3.14", "3.2"),
        ("-5", "5"),
        ("5 %", "5"),
        ("", "the"),
        ("1e999", "1e998"),
        ("theory", "ory"),
    ],
)
def test_different(prediction, reference):
    assert match_score(prediction, [reference]) == 0.0
