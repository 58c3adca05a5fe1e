"""Counts: number words against their spelling, and what is not a count."""

import pytest

from joint_controller.evaluation.exact_count import count_score, parse_count


ONES = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"


def spell(number: int, hyphen: str, joint: str) -> str:
    """English words of a number below a million, by the school's rules."""
    if number < 20:
        return ["zero", *ONES.split()][number]
    if number < 100:
        tens = TENS.split()[number // 10 - 2]
        return tens if number % 10 == 0 else f"{tens}{hyphen}{spell(number % 10, hyphen, joint)}"
    size, word = (100, "hundred") if number < 1000 else (1000, "thousand")
    head = f"{spell(number // size, hyphen, joint)} {word}"
    rest = number % size
    return head if rest == 0 else f"{head} {joint if rest < 100 else ''}{spell(rest, hyphen, joint)}"


@pytest.mark.parametrize("hyphen", ["-", " "])
@pytest.mark.parametrize("joint", ["and ", ""])
def test_number_words_are_read_as_they_are_spelt(hyphen, joint):
    for number in [*range(1200), 2005, 3200, 12345, 20020, 100_000, 305_017, 999_999]:
        assert parse_count(f"There are {spell(number, hyphen, joint)} dogs.") == number
        assert parse_count(f"{number:,}") == parse_count(f" {number}. ") == number


@pytest.mark.parametrize(
    ("answer", "count"),
    [
        ("None", 0),
        ("No dogs", 0),
        ("No, there are 2", 2),
        ("two (2)", 2),
        ("a hundred", 100),
        ("Three dogs and a cat", 3),  # an article is not a number
        ("two or three", None),
        ("2-3", None),
        ("12, 13", None),
        ("2.5", None),
        ("-3", None),
        ("1,2", None),
        ("many", None),
        ("", None),
        ("someone", None),
    ],
)
def test_an_answer_gives_one_whole_number_or_none(answer, count):
    assert parse_count(answer) == count


def test_scores():
    assert count_score("There are two.", ["2"]) == 1.0
    assert count_score("3", ["two"]) == 0.0
    assert count_score("twelve", ["11", "12"]) == 1.0
    assert count_score("I cannot tell", ["0"]) == 0.0
    assert count_score("3", ["", "3", "a few"]) == 1.0
    assert count_score("a few", ["3", "a few"]) == 0.0
    with pytest.raises(ValueError, match="none of the references .'', 'a few'. is a count"):
        count_score("3", ["", "a few"])
