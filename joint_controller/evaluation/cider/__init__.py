"""CIDEr of captions, as functions and as an `evaluate` metric."""

from .cider import CaptionCorpus, Cider, cider_score, tokenize_caption


__all__ = ["CaptionCorpus", "Cider", "cider_score", "tokenize_caption"]
