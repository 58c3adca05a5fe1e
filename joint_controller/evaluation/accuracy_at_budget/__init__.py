"""Accuracy at a latency budget, as an `evaluate` metric."""

from .accuracy_at_budget import AccuracyAtBudget


__all__ = ["AccuracyAtBudget"]
