"""Times the stages of a request."""

import time
from itertools import pairwise
from typing import ClassVar

import torch


class StageClock:
    """
    Takes the time of a request's stages. It starts when it is made.

    On a CUDA device borders are events in the current stream, which the host does not wait for: a stage ends when the device
    has done what was handed to it, and what the host prepares in the meantime costs nothing, as in serving without a clock.

    Args:
        device (`torch.device`):
            Device that the stages run on.

    Example:

    ```python
    >>> clock = StageClock(executor.device)
    >>> ids = tokenizer(question)
    >>> clock.mark("overhead")
    >>> clock.stop("overhead")
    {'overhead': [0.07, 0.01]}
    ```
    """

    # Events of each device that no clock uses now: to make one takes longer than to record it.
    _spare_events: ClassVar[dict[torch.device, list[torch.cuda.Event]]] = {}

    def __init__(self, device: torch.device):
        self.device = device
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []
        self._started_at = time.perf_counter()
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._start = self._border()

    def mark(self, stage: str) -> None:
        """A border: what came since the border before belongs to `stage`, all work that was handed to the device
        included."""
        self._marks.append((stage, self._border()))

    def stop(self, stage: str) -> dict[str, list[float]]:
        """
        Ends the last stage, whose name is given, and waits for the device.

        Returns:
            `dict[str, list[float]]`: ms of each mark of a stage, stages in the order of their first marks. Together they are
            the time by the host's clock from the start to now.
        """
        self.mark(stage)
        borders = [self._start, *(border for _, border in self._marks)]
        if self._stream is None:
            spans = [1000.0 * (end - start) for start, end in pairwise(borders)]
        else:
            borders[-1].synchronize()
            total_ms = 1000.0 * (time.perf_counter() - self._started_at)
            spans = [start.elapsed_time(end) for start, end in pairwise(borders)]
            # What the host was late for at the first border, or took after the last, which no event sees.
            spans[-1] += max(0.0, total_ms - sum(spans))
            self._spare_events.setdefault(self.device, []).extend(borders)
        times: dict[str, list[float]] = {}
        for (name, _), span in zip(self._marks, spans, strict=True):
            times.setdefault(name, []).append(span)
        return times

    def _border(self) -> "float | torch.cuda.Event":
        if self._stream is None:
            return time.perf_counter()
        try:
            border = self._spare_events[self.device].pop()
        except (KeyError, IndexError):
            border = torch.cuda.Event(enable_timing=True)
        border.record(self._stream)
        return border
