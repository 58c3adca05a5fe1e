"""Which blocks of a Molmo can be left out: importance scores, a search over sets, and their comparison."""

from .block_accuracy import BLOCK_ACCURACY_FEATURES, BlockSetAccuracies
from .block_search import max_sets_searched, search_blocks
from .block_selection import BlockSelection, random_block_sets
from .importance import (
    BlockScores,
    bootstrap_intervals,
    load_block_sets,
    load_importance,
    measure_accuracy_drop,
    measure_hidden_change,
    save_importance,
)


__all__ = [
    "BLOCK_ACCURACY_FEATURES",
    "BlockScores",
    "BlockSelection",
    "BlockSetAccuracies",
    "bootstrap_intervals",
    "load_block_sets",
    "load_importance",
    "max_sets_searched",
    "measure_accuracy_drop",
    "measure_hidden_change",
    "random_block_sets",
    "save_importance",
    "search_blocks",
]
