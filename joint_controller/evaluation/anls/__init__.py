"""ANLS of DocVQA and ST-VQA, as functions and as an `evaluate` metric."""

from .anls import Anls, anls_score, levenshtein_distance


__all__ = ["Anls", "anls_score", "levenshtein_distance"]
