"""Which blocks run when a number of them do: by importance, by a search, the first ones, or random ones."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from .importance_files import load_block_sets, load_importance


class BlockSelection:
    """
    Chooses the blocks that run when `num_blocks` of them do.

    - `block_sets` has a set for the number: that one. Sets of different sizes need not contain each other.
    - There are `scores`: block 0 and the blocks without a score, then those with the highest scores, the earlier one on a
      tie.
    - Neither: the first ones.

    Args:
        num_layers (`int`):
            Blocks of the model.
        scores (`dict[int, float]`, *optional*):
            Score of each block, higher for blocks that matter more. Blocks without a score always run (tables that come
            with published checkpoints leave out the first and the last block, which are always kept).
        block_sets (`dict[int, Sequence[int]]`, *optional*):
            Blocks that run when as many as the key do, e.g. those that [`search_blocks`] finds.

    Attributes:
        num_required (`int`):
            Blocks that always run, as far as scores decide.
        counts (`list[int]`):
            Numbers of blocks that can run, ascending.

    Raises:
        ValueError: If scores or sets name a block that the model does not have, or a set is not of the size that its key
            says, leaves block 0 out, or names a block twice.
    """

    def __init__(
        self,
        num_layers: int,
        scores: Mapping[int, float] | None = None,
        block_sets: Mapping[int, Sequence[int]] | None = None,
    ):
        self.num_layers = num_layers
        if scores is None:
            self._ranking, self.num_required = list(range(num_layers)), 1
        else:
            self._check_range(scores, "importance scores name")
            required = [block for block in range(num_layers) if block == 0 or block not in scores]
            optional = [block for block in range(num_layers) if block not in required]
            optional.sort(key=lambda block: (-scores[block], block))
            self._ranking, self.num_required = required + optional, len(required)
        self._block_sets = {} if block_sets is None else {n: sorted(blocks) for n, blocks in block_sets.items()}
        for num_blocks, blocks in self._block_sets.items():
            self._check_range(blocks, f"block set of {num_blocks} names")
            if len(set(blocks)) != len(blocks) or len(blocks) != num_blocks or 0 not in blocks:
                raise ValueError(
                    f"the block set of {num_blocks} is {blocks}: name {num_blocks} blocks, each once, block 0 among them."
                )
        self.counts = sorted({*range(self.num_required, num_layers + 1), *self._block_sets})

    @classmethod
    def from_file(cls, path: str | Path, num_layers: int) -> "BlockSelection":
        """The selection of an importance file, see [`load_importance`] and [`load_block_sets`], of a model with
        `num_layers` blocks."""
        return cls(num_layers, load_importance(path), load_block_sets(path))

    def _check_range(self, blocks: Mapping[int, float] | Sequence[int], what: str) -> None:
        unknown = sorted(block for block in blocks if not 0 <= block < self.num_layers)
        if unknown:
            raise ValueError(
                f"the {what} the blocks {unknown} but the executor has the blocks 0 to {self.num_layers - 1}: use those "
                "of this checkpoint."
            )

    @property
    def required_blocks(self) -> list[int]:
        """Block 0 and the blocks without a score, ascending."""
        return sorted(self._ranking[: self.num_required])

    def active_blocks(self, num_blocks: int) -> list[int]:
        """Blocks that run when `num_blocks` do, ascending. A `ValueError` tells of a number that cannot."""
        if num_blocks not in self.counts:
            raise ValueError(
                f"`num_blocks` is {num_blocks}, but the executor can run {self.num_required} to {self.num_layers} blocks."
            )
        return self._block_sets.get(num_blocks) or sorted(self._ranking[:num_blocks])


def random_block_sets(num_layers: int, num_blocks: int, num_sets: int, seed: int = 42) -> list[tuple[int, ...]]:
    """Draws sets of blocks, each independently and uniformly from all sets of its size that contain block 0, blocks
    ascending; the same set may come more than once. The first sets do not depend on how many are drawn."""
    generator = random.Random(f"{seed}/{num_layers}/{num_blocks}")
    return [(0, *sorted(generator.sample(range(1, num_layers), num_blocks - 1))) for _ in range(num_sets)]
