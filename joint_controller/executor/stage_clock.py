"""Times the stages of a request between borders, at which the device is waited for."""

import time

import torch


class StageClock:
    """
    Takes the time at the borders between stages. On a CUDA device these are events in the current stream, so that the
    time in which the host is woken up counts for no stage.

    Args:
        device (`torch.device`):
            Device that the stages run on.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._borders: list[float | torch.cuda.Event] = []

    def mark(self) -> None:
        """A border: all work handed to the device so far belongs to the stage before it."""
        if self.device.type == "cuda":
            border = torch.cuda.Event(enable_timing=True)
            border.record(torch.cuda.current_stream(self.device))
            border.synchronize()
            self._borders.append(border)
        else:
            self._borders.append(time.perf_counter())

    def stages_ms(self) -> list[float]:
        """Milliseconds between each border and the next."""
        pairs = zip(self._borders[:-1], self._borders[1:], strict=True)
        if self.device.type == "cuda":
            return [start.elapsed_time(end) for start, end in pairs]
        return [1000.0 * (end - start) for start, end in pairs]
