"""Importance: a block's score, from what leaving it out costs. The blocks that matter least are the first to be saved."""

import json
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F
from tqdm.auto import tqdm


if TYPE_CHECKING:
    from ..executor.molmo_executor import EncodedSample, MolmoExecutor
    from .block_accuracy import BlockSetAccuracies


NUM_RESAMPLES = 2000
"""Resamples of a bootstrap interval."""

CONFIDENCE = 0.95
"""Share of the resampled means that an interval covers."""


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
    Reads the sets of blocks that an importance file may hold beside its scores, under `"block_sets"`.

    Args:
        path (`str` or `Path`):
            File that [`load_importance`] reads.

    Returns:
        `dict[int, list[int]]`: For each number of blocks that has a set of its own, that set. Empty for most files.

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


_WHAT_IS_EXPECTED = 'expected block → score, e.g. {"0": 0.56, "1": 0.08}'


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
    """
    Writes the scores of blocks, how sure they are, and where they come from, as JSON.

    Args:
        path (`str` or `Path`):
            File to write; its folder is created.
        scores (`dict[int, float]`):
            Score of each block.
        provenance (`dict[str, Any]`):
            How they were measured: data, seed, executor.
        standard_errors (`dict[int, float]`, *optional*):
            Standard error of each score.
        intervals (`dict[int, tuple[float, float]]`, *optional*):
            Interval of each score that has 95 % confidence.
        block_sets (`dict[int, Sequence[int]]`, *optional*):
            For some numbers of blocks, the set that runs instead of the blocks with the highest scores.
    """
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


class BlockScores:
    """
    Scores of blocks, which are means over samples, and how sure they are.

    Args:
        values (`numpy.ndarray` of shape `(samples, blocks)`):
            What each sample says about each block.
        seed (`int`, *optional*, defaults to 42):
            Seed of the bootstrap.

    Attributes:
        scores (`dict[int, float]`):
            Score of each block.
        standard_errors (`dict[int, float]`):
            Standard error of each score: the standard deviation over samples (with n - 1) over √n.
        intervals (`dict[int, tuple[float, float]]`):
            Interval of each score that has 95 % confidence, see [`bootstrap_intervals`].

    Raises:
        ValueError: If there are fewer than 2 samples, which say nothing about confidence.
    """

    def __init__(self, values: np.ndarray, seed: int = 42):
        self.values = values
        self.seed = seed
        self.intervals = dict(enumerate(map(tuple, bootstrap_intervals(values, seed).tolist())))
        self.scores = dict(enumerate(values.mean(axis=0).tolist()))
        errors = values.std(axis=0, ddof=1) / math.sqrt(len(values))
        self.standard_errors = dict(enumerate(errors.tolist()))

    def of_samples(self, rows: Sequence[int]) -> "BlockScores":
        """The scores by some of the samples alone, e.g. those of one data set."""
        return BlockScores(self.values[list(rows)], self.seed)


def bootstrap_intervals(values: np.ndarray, seed: int = 42, num_resamples: int = NUM_RESAMPLES) -> np.ndarray:
    """
    Intervals of means that have 95 % confidence, by the percentile bootstrap (Efron and Tibshirani, An Introduction to the
    Bootstrap, 1993, chapter 13): samples are drawn with replacement, and the interval covers the middle 95 % of the means.
    Paired: a drawn sample counts in all columns, so that columns can be compared by their differences.

    Args:
        values (`numpy.ndarray` of shape `(samples, n)`):
            Numbers of each sample.
        seed (`int`, *optional*, defaults to 42):
            Seed of the draws.
        num_resamples (`int`, *optional*, defaults to 2000):
            How often samples are drawn.

    Returns:
        `numpy.ndarray` of shape `(n, 2)`: Lower and upper end of each column's interval.

    Raises:
        ValueError: If there are fewer than 2 samples.
    """
    num_samples = len(values)
    if num_samples < 2:
        raise ValueError(f"confidence needs 2 samples or more of each data set, but there is {num_samples}.")
    means = _draws(num_samples, seed, num_resamples) @ values / num_samples  # (resamples, n)
    tail = (1 - CONFIDENCE) / 2
    return np.quantile(means, (tail, 1 - tail), axis=0).T


@lru_cache(maxsize=8)
def _draws(num_samples: int, seed: int, num_resamples: int) -> np.ndarray:
    """
    How often each sample is drawn in each resample, instead of which ones are, so that one matrix product gives all means:
    shape `(resamples, samples)`. Kept: a report has many intervals over the same samples.
    """
    generator = np.random.default_rng(seed)
    return generator.multinomial(num_samples, [1 / num_samples] * num_samples, size=num_resamples).astype(np.float64)


def measure_accuracy_drop(accuracies: "BlockSetAccuracies", seed: int = 42) -> BlockScores:
    """
    Scores every block by the accuracy that is lost when it alone is left out, the other knobs being full. Block 0 is scored
    too, though it always runs.

    Args:
        accuracies ([`BlockSetAccuracies`]):
            Measures the sets of blocks, on held-out training data.
        seed (`int`, *optional*, defaults to 42):
            Seed of the bootstrap.

    Returns:
        [`BlockScores`]: A score is the mean over samples of accuracy(all blocks) − accuracy(all but the block).
    """
    every_block = accuracies.all_blocks
    left_out = [tuple(other for other in every_block if other != block) for block in every_block]
    with_all, *without = accuracies.measure([every_block, *left_out], title="Leaving out each block")
    return BlockScores((with_all - np.stack(without)).T, seed)


@torch.inference_mode()
def measure_hidden_change(
    executor: "MolmoExecutor", encoded: "Sequence[EncodedSample]", seed: int = 42, progress: bool = False
) -> BlockScores:
    """
    Scores every block by how much it changes the hidden state, which one prefill of each sample tells, with all blocks and
    the other knobs full: a proxy for the accuracy drop that needs no answers. It is the block influence of ShortGPT (Men et
    al., 2024, arXiv:2403.03853, eq. 1), with every sample weighing the same:

        score of block i = mean over samples of the mean over tokens t of 1 − x[i, t] · x[i+1, t] / (|x[i, t]| |x[i+1, t]|)

    where x[i, t] is the hidden state of token t that enters block i, and x[i+1, t] the one that leaves it.

    Args:
        executor ([`MolmoExecutor`]):
            Executor to measure. Its modules run as they are, whatever its mode, one prompt at a time.
        encoded (`Sequence[EncodedSample]`):
            Prompts with their images, as [`MolmoExecutor.encode`] or [`BlockSetAccuracies.encoded`] gives them.
        seed (`int`, *optional*, defaults to 42):
            Seed of the bootstrap.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar (never where the output is not a terminal).

    Returns:
        [`BlockScores`]

    Raises:
        ValueError: If there are fewer than 2 samples.
    """
    changes: list[float] = []

    def measure(layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        similarity = F.cosine_similarity(inputs[0].float(), output.float(), dim=-1)  # (1, L)
        changes.append(1 - similarity.mean().item())

    layers = executor.model.model.language_model.layers
    hooks = [layer.register_forward_hook(measure) for layer in layers]
    try:
        for sample in tqdm(encoded, desc="Prefilling", unit="sample", disable=None if progress else True):
            executor.model(
                input_ids=sample.input_ids[None],
                image_features=sample.image_features[None, None],
                image_input_idx=sample.image_input_idx[None, None],
                top_k=executor.knob_space.full.top_k,
                use_cache=False,
                logits_to_keep=1,
            )
    finally:
        for hook in hooks:
            hook.remove()
    return BlockScores(np.array(changes).reshape(len(encoded), len(layers)), seed)
