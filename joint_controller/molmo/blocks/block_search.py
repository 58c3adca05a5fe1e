"""A search for the blocks that can be left out together at the least cost."""

import math
from collections.abc import Sequence

from .block_accuracy import BlockSetAccuracies


def search_blocks(
    accuracies: BlockSetAccuracies, counts: Sequence[int], beam_width: int = 4
) -> dict[int, tuple[int, ...]]:
    """
    Searches for the most accurate set of each size in `counts` by leaving out one block after another, never block 0:
    all sets that lack one block more than a set of the beam are measured, and the best `beam_width` of them make the
    next beam. A width of 1 is a greedy search; a width of the number of all sets of a size tries them all. Judge what
    is found, blocks ascending, on other samples than these.

    Scores of single blocks say what leaving out *one* block costs. Blocks that stand in for one another cost little
    each and much together, which only a search over sets sees.

    Equally accurate sets are ordered by their blocks, the set with the earlier blocks first, so that a search repeats.

    Raises:
        ValueError: If `beam_width` is less than 1 or a number is not one of 1 to the executor's blocks.
    """
    if beam_width < 1:
        raise ValueError(f"`beam_width` is {beam_width}: give 1 (a greedy search) or more.")
    if not counts:
        raise ValueError("there is no number of blocks to search for: give at least one.")
    for count in counts:
        if not 1 <= count <= accuracies.num_layers:
            raise ValueError(f"there is no set of {count} blocks: the executor has 1 to {accuracies.num_layers}.")
    beam = [accuracies.all_blocks]
    best = {accuracies.num_layers: beam[0]}
    for count in range(accuracies.num_layers - 1, min(counts) - 1, -1):
        candidates = sorted(
            {tuple(other for other in blocks if other != block) for blocks in beam for block in blocks if block != 0}
        )
        measured = accuracies.measure(candidates, title=f"Searching sets of {count}")
        # Rounded exactly: sets that answer as many samples right tie, whatever the order of the samples.
        means = [math.fsum(row) / len(row) for row in measured]
        # Stable: among equals, the candidates' own order.
        ranked = sorted(zip(candidates, means, strict=True), key=lambda pair: -pair[1])
        beam = [blocks for blocks, _ in ranked[:beam_width]]
        best[count] = beam[0]
    return {count: best[count] for count in counts}


def max_sets_searched(num_layers: int, smallest_count: int, beam_width: int) -> int:
    """The most sets that [`search_blocks`] measures down to the smallest size: for each size, as many as the beam has
    neighbours, and no more than there are."""
    total, beam = 0, 1
    for count in range(num_layers - 1, smallest_count - 1, -1):
        sets = min(beam * count, math.comb(num_layers - 1, count - 1))
        total, beam = total + sets, min(beam_width, sets)
    return total
