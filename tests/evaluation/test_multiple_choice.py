"""Multiple choice: what an answer names, rule by rule."""

import pytest

from joint_controller.evaluation.multiple_choice import choice_score, extract_choice


@pytest.mark.parametrize(
    ("prediction", "letter"),
    [
        # alone
        ("B", "B"),
        ("b", "B"),
        (" (b) ", "B"),
        ("B.", "B"),
        ("B)", "B"),
        ("[B]", "B"),
        ("B:", "B"),
        # at the beginning
        ("B. a dog", "B"),
        ("(B) a dog", "B"),
        ("B) a dog", "B"),
        ("B: a dog", "B"),
        # announced
        ("The answer is B", "B"),
        ("Cats purr. So the answer is: (B) a dog.", "B"),
        ("A is wrong. Answer: B", "B"),
        ("The answer is A? No, the answer is B.", "B"),
        # named
        ("I choose option B because dogs bark", "B"),
        ("It must be choice (B)", "B"),
        # a text
        ("A dog", None),
        ("a dog", None),
        ("B a dog", None),
        ("Bones", None),
        ("B.C. 300", None),
        ("I think that dogs bark", None),
        ("an optional b", None),
        ("the option a dog", None),
        ("", None),
    ],
)
def test_letter_of_an_answer(prediction, letter):
    assert extract_choice(prediction)[0] == letter


@pytest.mark.parametrize(
    ("prediction", "references", "score"),
    [
        ("B", ["B", "a dog"], 1.0),
        ("A", ["B", "a dog"], 0.0),
        ("A dog.", ["B", "a dog"], 1.0),
        ("the answer is a dog", ["B", "a dog"], 1.0),
        ("a dog and a cat", ["B", "a dog"], 0.0),
        ("A. a dog", ["B", "a dog"], 0.0),  # the letter decides
        ("C", ["B", "C"], 0.0),  # the text of the right option reads like another one's letter
        ("b", ["B"], 1.0),
        ("-2  m", ["-2 m"], 1.0),
        ("B", ["carbon"], 0.0),
        ("", ["B", "a dog"], 0.0),
    ],
)
def test_scores(prediction, references, score):
    assert choice_score(prediction, references) == score
