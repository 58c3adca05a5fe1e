"""Runs an executor in the way that its latency estimator was measured in."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..executor import Executor, load_executor
from .latency_estimator import LatencyEstimator
from .way_of_running import WayOfRunning


MEASURE = (
    "measure it with `joint-controller profile` and `joint-controller fit-latency`, and give `latency_estimator_path`"
)
"""What to do where the executor is to run in another way, as errors say it."""


@contextmanager
def torch_threads(num_threads: int | None) -> Iterator[None]:
    """Lets torch use so many CPU threads an operation in the calling thread for a while; `None`: as many as it does."""
    before = torch.get_num_threads()
    if num_threads in (None, before):
        yield
        return
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def load_as_measured(
    latency_estimator: LatencyEstimator, model_path: str | Path, num_threads: int | None = None, **options: Any
) -> tuple[Executor, int | None]:
    """
    Loads an executor on a device of the type, in the mode and the precision that its latency estimator was measured with.

    Args:
        latency_estimator ([`LatencyEstimator`]):
            Says how. Where it does not know, the executor is loaded as is asked for.
        model_path (`str` or `Path`), options:
            As in [`~executor.load_executor`]. `device`, `dtype` and `mode` may be left out, and must not contradict the
            estimator.
        num_threads (`int`, *optional*):
            CPU threads an operation, likewise.

    Returns:
        `tuple[Executor, int | None]`: the executor, and how many threads it is to run with, see
        [`~latency.run_as_measured.torch_threads`]; `None` for as many as torch uses.

    Raises:
        ValueError: If the estimator was measured in another way than what is asked for, or on a device that is not here.
    """
    if latency_estimator.way is not None:
        num_threads, options = _as_measured(latency_estimator.way, num_threads, options)
    with torch_threads(num_threads):
        return load_executor(model_path, **options), num_threads


def check_runs_as_measured(latency_estimator: LatencyEstimator, executor: Executor) -> None:
    """Refuses (`ValueError`) an executor that runs in another way than its latency estimator was measured in. Threads are not
    looked at."""
    if latency_estimator.way is None:
        return
    with torch_threads(latency_estimator.way.num_threads):
        differing = latency_estimator.way.incomparable(WayOfRunning.of(executor))
    if differing:
        raise ValueError(
            f"the latency estimator is of another way of running the executor ({differing}): run it like that, or {MEASURE}."
        )


def _as_measured(
    way: WayOfRunning, num_threads: int | None, options: Mapping[str, Any]
) -> tuple[int | None, dict[str, Any]]:
    device, dtype = options.get("device"), options.get("dtype")
    asked = {
        "device": None if device is None else _device_type(device),
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "mode": options.get("mode"),
        "num_threads": num_threads,
    }
    measured = {
        "device": way.device_type,
        "dtype": way.executor_dtype,
        "mode": way.executor_mode,
        "num_threads": way.num_threads,
    }
    for name, value in asked.items():
        if value not in (None, measured[name]):
            raise ValueError(
                f"`{name}` is {value}, but the latency estimator is of {measured[name]}: leave `{name}` out, or, for the "
                f"executor to run like that, {MEASURE}."
            )
    if way.device_type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"the latency estimator is of a GPU ({way.device_name}), and there is none here: run where there is one, or, for "
            f"the executor to run here, {MEASURE}."
        )
    given = {name: value for name, value in options.items() if value is not None}
    return measured.pop("num_threads"), {**measured, **given}


def _device_type(device: str | torch.device) -> str:
    try:
        return torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"`device` is {device!r}: give one that torch knows, e.g. 'cpu' or 'cuda:0'.") from error
