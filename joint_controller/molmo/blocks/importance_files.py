"""Files of block scores, and of sets of blocks, as `joint-controller importance` writes them and as they were published."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


_WHAT_IS_EXPECTED = 'expected block → score, e.g. {"0": 0.56, "1": 0.08}'


def load_importance(path: str | Path) -> dict[int, float]:
    """
    Scores of blocks, by block, in a JSON file: an object of block → score, as published with MolmoE-1B's profiling
    tables, or one with such an object under `"scores"`, as [`save_importance`] writes it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it does not hold scores of blocks.
    """
    table = _read_table(path)
    scores = table.get("scores", table)
    if not isinstance(scores, dict) or not scores:
        raise ValueError(f"importance file '{path}' holds no scores: {_WHAT_IS_EXPECTED}.")
    for block, score in scores.items():
        is_number = isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score)
        if not block.isdecimal() or not is_number:
            raise ValueError(f"importance file '{path}' has the entry {block!r}: {score!r}: {_WHAT_IS_EXPECTED}.")
    return {int(block): float(score) for block, score in scores.items()}


def load_block_sets(path: str | Path) -> dict[int, list[int]]:
    """
    Sets of blocks, by their size, that an importance file may hold besides its scores, under `"block_sets"`. Most have
    none.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If `"block_sets"` is something else.
    """
    block_sets = _read_table(path).get("block_sets", {})
    what_is_expected = 'expected number of blocks → blocks, e.g. {"4": [0, 1, 3, 4]}'
    if not isinstance(block_sets, dict):
        raise ValueError(f"importance file '{path}' has no object under 'block_sets': {what_is_expected}.")
    for count, blocks in block_sets.items():
        are_blocks = isinstance(blocks, list) and all(type(block) is int for block in blocks)
        if not count.isdecimal() or not are_blocks:
            raise ValueError(
                f"importance file '{path}' has the entry {count!r}: {blocks!r} under 'block_sets': {what_is_expected}."
            )
    return {int(count): blocks for count, blocks in block_sets.items()}


def _read_table(path: str | Path) -> dict[str, Any]:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"importance file '{path}' does not exist: measure it with `joint-controller importance`, or leave it out."
        )
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"importance file '{path}' is not valid JSON ({error}): {_WHAT_IS_EXPECTED}.") from error
    if not isinstance(table, dict):
        raise ValueError(f"importance file '{path}' holds no scores: {_WHAT_IS_EXPECTED}.")
    return table


def save_importance(
    path: str | Path,
    scores: Mapping[int, float],
    provenance: Mapping[str, Any],
    standard_errors: Mapping[int, float] | None = None,
    intervals: Mapping[int, tuple[float, float]] | None = None,
    block_sets: Mapping[int, Sequence[int]] | None = None,
) -> None:
    """Writes the score of each block, how sure it is (standard error, 95 % interval), and how it was measured, as
    JSON; and for some numbers of blocks, the set that runs instead of the blocks with the highest scores."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {
        "scores": scores,
        "standard_errors": standard_errors,
        "intervals_95": intervals,
        "block_sets": block_sets,
    }
    table = {
        name: {str(key): values[key] for key in sorted(values)}
        for name, values in columns.items()
        if values is not None
    }
    table["provenance"] = dict(provenance)
    path.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
