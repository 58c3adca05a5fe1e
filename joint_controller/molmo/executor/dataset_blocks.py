"""The choice of the blocks that run, perhaps another one for each data set."""

from collections.abc import Mapping
from pathlib import Path

from ..blocks.block_selection import BlockSelection


IMPORTANCE_FILE = "importance.json"
"""Name of the importance scores in a model folder."""

DEFAULT_DATASET = "default"
"""Stands for all other data sets, and for requests that are of none, where blocks are chosen by data set."""


def read_importance(
    importance: Mapping[int, float] | str | Path | Mapping[str, str | Path] | None, folder: Path, num_layers: int
) -> Mapping[int, float] | BlockSelection | Mapping[str, BlockSelection] | None:
    """
    What [`DatasetBlocks`] takes, of scores, a file of them, or a file for each data set. Defaults to `importance.json`
    in the model's folder, if there is one.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a file does not hold scores of this model, or a data set is given something else.
    """
    if importance is None:
        if not (folder / IMPORTANCE_FILE).is_file():
            return None
        importance = folder / IMPORTANCE_FILE
    if isinstance(importance, str | Path):
        return BlockSelection.from_file(importance, num_layers)
    wrong = [key for key, value in importance.items() if isinstance(key, str) and not isinstance(value, str | Path)]
    if wrong:
        raise ValueError(
            f"`importance` gives {importance[wrong[0]]!r} for data set '{wrong[0]}': give the path of a JSON file."
        )
    return {
        key: BlockSelection.from_file(value, num_layers) if isinstance(value, str | Path) else value
        for key, value in importance.items()
    }


class DatasetBlocks:
    """Says which blocks run for a sample, by the `importance` that [`MolmoExecutor`] takes. A `ValueError` tells of
    scores that name a block that the model does not have."""

    def __init__(
        self,
        importance: Mapping[int, float] | BlockSelection | Mapping[str, BlockSelection] | None,
        num_layers: int,
    ):
        if importance is None or isinstance(importance, BlockSelection):
            self._selections = {DEFAULT_DATASET: importance or BlockSelection(num_layers)}
        elif importance and all(isinstance(selection, BlockSelection) for selection in importance.values()):
            self._selections = dict(importance)
        else:
            self._selections = {DEFAULT_DATASET: BlockSelection(num_layers, importance)}

    def active_blocks(self, num_blocks: int, sample_id: str | None = None) -> list[int]:
        """
        Blocks that run when `num_blocks` do, ascending: see [`BlockSelection`]. The sample only makes a difference
        where blocks are chosen by data set.

        Raises:
            ValueError: If that many cannot run, or there is no choice of blocks for the sample.
        """
        dataset = DEFAULT_DATASET if sample_id is None else sample_id.split("/")[0]
        selection = self._selections.get(dataset) or self._selections.get(DEFAULT_DATASET)
        if selection is None:
            raise ValueError(
                f"blocks are chosen for samples of {list(self._selections)}, and "
                f"{'none is named' if sample_id is None else repr(sample_id) + ' is of none of them'}: give importance "
                f"scores for '{DEFAULT_DATASET}', too."
            )
        return selection.active_blocks(num_blocks)

    def check_counts(self, counts: tuple[int, ...]) -> None:
        """Refuses numbers of blocks that a data set needs more blocks than, by a `ValueError`."""
        for selection in self._selections.values():
            unavailable = [count for count in counts if count not in selection.counts]
            if unavailable:
                required = selection.required_blocks
                raise ValueError(
                    f"the blocks {required} always run (block 0, and blocks without an importance score), so `num_blocks` "
                    f"cannot be {unavailable[0]}: score more blocks, or use values of {len(required)} or more."
                )

    def all_blocks(self) -> dict[str, list[list[int]]] | list[list[int]]:
        """The blocks of each number that can run, for each data set where there are several; JSON-friendly."""
        blocks = {
            dataset: [selection.active_blocks(count) for count in selection.counts]
            for dataset, selection in self._selections.items()
        }
        return blocks[DEFAULT_DATASET] if list(blocks) == [DEFAULT_DATASET] else blocks
