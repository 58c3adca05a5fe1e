"""Importance: a block's score, from what leaving it out costs. The blocks that matter least are the first to be saved."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from .requests import ExecutorRequest


if TYPE_CHECKING:
    from .molmo_executor import MolmoExecutor


def load_importance(path: str | Path) -> dict[int, float]:
    """
    Reads the scores of blocks from a JSON file.

    Args:
        path (`str` or `Path`):
            File with an object of block → score, as published with MolmoE-1B's profiling tables, or with such an object
            under `"scores"`, as [`save_importance`] writes it.

    Returns:
        `dict[int, float]`: Score of each block that the file lists.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it does not hold scores of blocks.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"importance file '{path}' does not exist: measure it with `joint-controller importance`, or leave it out."
        )
    what_is_expected = 'expected block → score, e.g. {"0": 0.56, "1": 0.08}'
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"importance file '{path}' is not valid JSON ({error}): {what_is_expected}.") from error
    scores = table.get("scores", table) if isinstance(table, dict) else None
    if not isinstance(scores, dict) or not scores:
        raise ValueError(f"importance file '{path}' holds no scores: {what_is_expected}.")
    for block, score in scores.items():
        is_number = isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score)
        if not block.isdecimal() or not is_number:
            raise ValueError(f"importance file '{path}' has the entry {block!r}: {score!r}: {what_is_expected}.")
    return {int(block): float(score) for block, score in scores.items()}


def save_importance(path: str | Path, scores: Mapping[int, float], provenance: Mapping[str, Any]) -> None:
    """
    Writes the scores of blocks, and where they come from, as JSON.

    Args:
        path (`str` or `Path`):
            File to write; its folder is created.
        scores (`dict[int, float]`):
            Score of each block.
        provenance (`dict[str, Any]`):
            How they were measured: data, seed, executor.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {"scores": {str(block): scores[block] for block in sorted(scores)}, "provenance": dict(provenance)}
    path.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def measure_importance(
    executor: "MolmoExecutor",
    samples: Sequence[Mapping[str, Any]],
    score: Callable[[str, str, Sequence[str]], float],
    progress: bool = False,
) -> tuple[dict[int, float], float]:
    """
    Scores every block by the accuracy that is lost when it alone is left out, the other knobs being full. Block 0 is
    scored too, though it always runs.

    Args:
        executor ([`MolmoExecutor`]):
            Executor to measure. Its own importance scores are not used.
        samples (`Sequence[dict]`):
            Rows with the columns `sample_id`, `image`, `question`, `answers`, `style` and `metric`: held-out training
            data.
        score (`Callable[[str, str, Sequence[str]], float]`):
            Accuracy of an answer, given the row's metric, the answer and the reference answers, e.g.
            [`~joint_controller.evaluation.scoring.score_answer`].
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.

    Returns:
        `tuple[dict[int, float], float]`: Score of each block, and the accuracy with all blocks.

    Raises:
        ValueError: If there are no samples, or one has no reference answers.
    """
    if len(samples) == 0:
        raise ValueError("there are no samples to measure importance on: give at least one.")
    num_blocks = executor.model.config.text_config.num_hidden_layers
    setting = executor.knob_space.full
    left_out = [None, *range(num_blocks)]
    correct = dict.fromkeys(left_out, 0.0)
    with tqdm(
        total=len(samples) * len(left_out), desc="Importance", unit="answer", disable=None if progress else True
    ) as bar:
        for start in range(0, len(samples), executor.batch_size):
            rows = [samples[index] for index in range(start, min(start + executor.batch_size, len(samples)))]
            for row in rows:
                if not row["answers"]:
                    raise ValueError(f"sample '{row['sample_id']}' has no reference answers: leave it out.")
            encoded = executor.encode(
                [
                    ExecutorRequest(row["sample_id"], row["image"], row["question"], row["style"], setting)
                    for row in rows
                ],
                setting.tier,
            )
            for block in left_out:
                active_blocks = [other for other in range(num_blocks) if other != block]
                answers = executor.generate(encoded, setting.top_k, active_blocks)
                for row, tokens in zip(rows, answers, strict=True):
                    correct[block] += score(row["metric"], executor.decode(tokens), row["answers"])
                bar.update(len(rows))
    full_accuracy = correct[None] / len(samples)
    return {block: full_accuracy - correct[block] / len(samples) for block in range(num_blocks)}, full_accuracy
