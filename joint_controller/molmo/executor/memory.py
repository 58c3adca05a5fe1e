"""What to do with work that does not fit in a device's memory."""

import warnings
from collections.abc import Callable
from typing import Any

import torch


def do_or_split(work: Callable[[list], list], batch: list, what: str, device: torch.device) -> list[Any]:
    """What `work` gives for each member of a batch, in two parts if the batch does not fit in the device's memory, or
    an `OutOfMemoryError` if a single member does not. `what` names the members in the warning."""
    try:
        return work(batch)
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
    # Out of the handler, which holds on to the tensors of the attempt.
    torch.cuda.empty_cache()
    warnings.warn(
        f"a batch of {len(batch)} {what} did not fit in the memory of {device}: it is done in two parts. A smaller "
        "`batch_size`, `max_batch_tokens` or `vision_cache_bytes` saves the time of trying."
    )
    middle = len(batch) // 2
    return [part for half in (batch[:middle], batch[middle:]) for part in do_or_split(work, half, what, device)]
