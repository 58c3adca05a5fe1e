"""ANLS, against the definition of the edit distance, and examples worked out by hand."""

import functools
import random

import pytest

from joint_controller.evaluation.anls import anls_score


def test_scores_are_those_of_the_recursive_definition_of_the_distance():
    @functools.cache
    def distance(first, second):
        if not first or not second:
            return len(first) + len(second)
        if first[0] == second[0]:
            return distance(first[1:], second[1:])
        return 1 + min(distance(first[1:], second), distance(first, second[1:]), distance(first[1:], second[1:]))

    generator = random.Random(0)
    for _ in range(300):
        first, second = ("".join(generator.choices("abc", k=generator.randrange(8))) for _ in range(2))
        share = distance(first, second) / max(len(first), len(second), 1)
        assert anls_score(first, [second]) == (1 - share if share < 0.5 else 0.0), (first, second)
    assert anls_score("kitten", ["sitting"]) == 1 - 3 / 7


@pytest.mark.parametrize(
    ("prediction", "references", "score"),
    [
        ("Coca  Cola", ["coca cola"], 1.0),  # case and white space do not count
        ("coca cola", ["Coca-Cola"], 1 - 1 / 9),
        ("hous", ["house"], 1 - 1 / 5),
        ("house", ["hous"], 1 - 1 / 5),  # the longer one divides, whichever it is
        ("1991", ["1990", "1891", "91"], 1 - 1 / 4),  # the best reference
        ("abc", ["axc"], 1 - 1 / 3),
        ("abcd", ["abxy"], 0.0),  # a distance of exactly one half is too far
        ("abcde", ["abcxy"], 1 - 2 / 5),
        ("cat", ["dog"], 0.0),
        ("", ["dog"], 0.0),
        ("12.30 p.m.", ["12:30 pm"], 1 - 3 / 10),
    ],
)
def test_scores_by_hand(prediction, references, score):
    assert anls_score(prediction, references) == pytest.approx(score)
