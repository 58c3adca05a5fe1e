"""
What is drawn at random in training: latency budgets, and the noise that decisions are sampled with. Each draw is a function
of seed, epoch and sample id alone: all members of a group, all ranks and a resumed run get the same, in whatever order
samples come.
"""

import hashlib

import torch


def draw_budget(seed: int, epoch: int, sample_id: str, minimum_ms: float, maximum_ms: float) -> float:
    """
    Draws the latency budget of a sample in an epoch, uniformly from a range: the leading 53 bits (a float's mantissa) of the
    SHA-256 of seed, epoch and sample id, read as a number in [0, 1).

    Args:
        seed (`int`):
            Seed of the run.
        epoch (`int`):
            Epoch, counted from 0: each draws anew.
        sample_id (`str`):
            Id of the sample, as in the column `sample_id`.
        minimum_ms (`float`):
            Smallest budget in milliseconds.
        maximum_ms (`float`):
            Largest budget in milliseconds.

    Returns:
        `float`: The budget in milliseconds, in [minimum_ms, maximum_ms].

    Raises:
        ValueError: If the range is not 0 < minimum_ms <= maximum_ms.
    """
    if not 0 < minimum_ms <= maximum_ms < float("inf"):
        raise ValueError(
            f"the budget range is {minimum_ms} ms to {maximum_ms} ms: give a positive minimum and a finite maximum "
            "that is not below it."
        )
    digest = hashlib.sha256(f"{seed}/{epoch}/{sample_id}".encode()).digest()
    share = (int.from_bytes(digest[:8], "big") >> 11) / 2**53
    return minimum_ms + share * (maximum_ms - minimum_ms)


def draw_action_noise(seed: int, epoch: int, sample_id: str, num_generations: int, num_logits: int) -> torch.Tensor:
    """
    Draws Gumbel noise for the decisions of a group: the argmax of logits plus this noise is a sample from their softmax.

    Args:
        seed (`int`):
            Seed of the run.
        epoch (`int`):
            Epoch, counted from 0.
        sample_id (`str`):
            Id of the group's sample.
        num_generations (`int`):
            Members of the group.
        num_logits (`int`):
            Values of all knobs together.

    Returns:
        `torch.Tensor`: Noise of shape (num_generations, num_logits).
    """
    digest = hashlib.sha256(f"actions/{seed}/{epoch}/{sample_id}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    return -torch.empty(num_generations, num_logits).exponential_(generator=generator).log()
