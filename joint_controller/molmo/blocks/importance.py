"""Importance: a block's score, from what leaving it out costs. The blocks that matter least are the first to be left out."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy.stats import bootstrap
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..executor import MolmoExecutor
from ..executor.encoding import EncodedSample
from .block_accuracy import BlockSetAccuracies


NUM_RESAMPLES = 2000
"""Resamples of a bootstrap interval."""

CONFIDENCE = 0.95
"""Share of the resampled means that an interval covers."""


class BlockScores:
    """
    Scores of blocks, which are means over samples, and how sure they are.

    Args:
        values (`numpy.ndarray` of shape `(samples, blocks)`):
            What each of 2 or more samples says about each block.
        seed (`int`, *optional*, defaults to 42):
            Seed of the bootstrap.

    Attributes:
        scores (`dict[int, float]`):
            Score of each block.
        standard_errors (`dict[int, float]`):
            Standard error of each score: the standard deviation over samples (with n - 1) over √n.
        intervals (`dict[int, tuple[float, float]]`):
            Interval of each score that has 95 % confidence, see [`bootstrap_intervals`].
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
    """Intervals of the means of each column of `values` `(samples, n)` that have 95 % confidence: `(n, 2)`. By the
    percentile bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13): samples are drawn
    with replacement, and the interval covers the middle 95 % of the means. Paired: a drawn sample counts in all
    columns, so that columns can be compared by their differences. A `ValueError` tells of fewer than 2 samples."""
    if len(values) < 2:
        raise ValueError(f"confidence needs 2 samples or more of each data set, but there is {len(values)}.")
    interval = bootstrap(
        (values,),
        np.mean,
        axis=0,
        n_resamples=num_resamples,
        batch=max(1, 2**18 // values.size),  # what is drawn at once stays in the processor's cache
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=seed,
    ).confidence_interval
    return np.stack([interval.low, interval.high], axis=1)


def measure_accuracy_drop(accuracies: BlockSetAccuracies, seed: int = 42) -> BlockScores:
    """Scores every block by the mean over samples of accuracy(all blocks) − accuracy(all but the block), the other
    knobs being full. Block 0 is scored too, though it always runs. The samples are held-out training data."""
    every_block = accuracies.all_blocks
    left_out = [tuple(other for other in every_block if other != block) for block in every_block]
    with_all, *without = accuracies.measure([every_block, *left_out], title="Leaving out each block")
    return BlockScores((with_all - np.stack(without)).T, seed)


@torch.inference_mode()
def measure_hidden_change(
    executor: MolmoExecutor, encoded: Sequence[EncodedSample], seed: int = 42, progress: bool = False
) -> BlockScores:
    """
    Scores every block by how much it changes the hidden state, which one prefill of each sample tells, with all blocks
    and the other knobs full: a proxy for the accuracy drop that needs no answers. It is the block influence of
    ShortGPT (Men et al., 2024, arXiv:2403.03853, eq. 1), with every sample weighing the same:

        score of block i = mean over samples of the mean over tokens t of 1 − x[i, t] · x[i+1, t] / (|x[i, t]| |x[i+1, t]|)

    where x[i, t] is the hidden state of token t that enters block i, and x[i+1, t] the one that leaves it. The model's
    modules run as they are, whatever the executor's mode, one prompt at a time.
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
                top_k=executor.knob_space.full["top_k"],
                use_cache=False,
                logits_to_keep=1,
            )
    finally:
        for hook in hooks:
            hook.remove()
    return BlockScores(np.array(changes).reshape(len(encoded), len(layers)), seed)
