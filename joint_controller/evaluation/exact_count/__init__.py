"""Exact count of TallyQA, as functions and as an `evaluate` metric."""

from .exact_count import ExactCount, count_score, parse_count


__all__ = ["ExactCount", "count_score", "parse_count"]
