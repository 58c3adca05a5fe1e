"""The accuracy of VQA v2, as functions and as an `evaluate` metric."""

from .vqa_accuracy import VqaAccuracy, normalize_answer, vqa_score


__all__ = ["VqaAccuracy", "normalize_answer", "vqa_score"]
