"""Latency budgets for training: drawn so that everybody who asks about the same sample gets the same one."""

import hashlib


def draw_budget(seed: int, epoch: int, sample_id: str, minimum_ms: float, maximum_ms: float) -> float:
    """
    Draws the latency budget of a sample in an epoch, uniformly from a range.

    The draw is a function of its arguments alone: all members of a group, all ranks and a resumed run get the same
    budget, and it does not matter in which order samples come. It is the leading 53 bits (a float's mantissa) of the
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
