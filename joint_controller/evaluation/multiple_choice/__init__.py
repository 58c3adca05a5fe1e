"""Multiple choice by letter or text, as functions and as an `evaluate` metric."""

from .multiple_choice import MultipleChoice, choice_score, extract_choice


__all__ = ["MultipleChoice", "choice_score", "extract_choice"]
