"""ANLS of DocVQA and ST-VQA, as a function and as an `evaluate` metric."""

from .anls import Anls, anls_score


__all__ = ["Anls", "anls_score"]
