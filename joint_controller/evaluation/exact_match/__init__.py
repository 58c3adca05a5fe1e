"""Exact match of open answers, as functions and as an `evaluate` metric."""

from .exact_match import ExactMatch, match_score, normalize_open_answer


__all__ = ["ExactMatch", "match_score", "normalize_open_answer"]
