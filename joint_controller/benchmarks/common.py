"""What the benchmarks share: arguments and their checks, executors, results, tables."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.table import Table
from transformers.hf_argparser import HfArg

from ..executor import RANDOM_PREFIX, StageTimes, load_executor
from ..latency.way_of_running import device_name, library_versions
from ..molmo.executor import MolmoExecutor


@dataclass(kw_only=True)
class BenchArguments:
    """
    Arguments of all benchmarks.
    """

    num_threads: int | None = HfArg(
        default=None,
        help="Threads that share one operation on the CPU. Default: torch's for the host of a GPU, else 1: operations of "
        "the embedded executor are too small to share.",
    )
    json: str | None = HfArg(default=None, help="File to write the results to, too.")


@dataclass(kw_only=True)
class DeviceBenchArguments(BenchArguments):
    """
    Arguments of the benchmarks that run on a device of choice.
    """

    device: str | None = HfArg(default=None, help="Device. Default: cuda where there is one, else cpu.")
    seed: int = HfArg(default=42, help="Seed of everything that is drawn: weights, images, questions, settings.")

    def torch_device(self) -> torch.device:
        """The device that is asked for."""
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))


@dataclass(kw_only=True)
class ExecutorBenchArguments(DeviceBenchArguments):
    """
    Arguments of the benchmarks that run an executor of choice.
    """

    model_path: str | None = HfArg(
        default=None,
        help="Executor: a folder or Hub name of a Molmo, `embedded` for the one that ships, or `random:molmoe-1b` for "
        "random weights of MolmoE-1B's sizes, made on the device: they cost the same. Default: random:molmoe-1b on a "
        "GPU, embedded on a CPU.",
    )
    batch_size: int | None = HfArg(
        default=None,
        help="Most requests that the executor answers together. Default: on a GPU 128, or 64 in training; 16 on a "
        "CPU.",
    )
    num_workers: int = HfArg(
        default=2, help="Batches that are answered at the same time, each by a thread of its own (CPU)."
    )


def check_at_least(args: BenchArguments, least: Mapping[str, int]) -> None:
    """Refuses a field that is less than its least value; one that is `None` is left to its default."""
    for name, minimum in {**least, "num_threads": 1}.items():
        value = vars(args)[name]
        if value is not None and value < minimum:
            raise ValueError(f"`{name}` is {value}: give {minimum} or more.")


@contextmanager
def use_threads(num_threads: int | None, device: torch.device) -> Iterator[None]:
    """Lets torch share an operation among this many threads; `None` means the default of [`BenchArguments`]."""
    usual = torch.get_num_threads()
    torch.set_num_threads(num_threads or (usual if device.type == "cuda" else 1))
    try:
        yield
    finally:
        torch.set_num_threads(usual)


@contextmanager
def use_experts(executor: MolmoExecutor, implementation: str) -> Iterator[None]:
    """Lets transformers' modules run experts by one of their implementations, e.g. `"grouped_mm"`."""
    # `set_experts_implementation` does not reach the language model's configuration.
    config = executor.model.config.text_config
    usual = config._experts_implementation
    config._experts_implementation = implementation
    try:
        yield
    finally:
        config._experts_implementation = usual


def open_executors(
    model_path: str, device: torch.device, seed: int, options: Mapping[str, Any], stock_options: Mapping[str, Any]
) -> tuple[MolmoExecutor, MolmoExecutor]:
    """
    The executor in its fastest mode, and in the mode `"plain"`, which runs transformers' modules. Arguments are those of
    [`load_executor`], with options for either.
    """
    executor = load_executor(model_path, device, seed=seed, **options)
    if model_path.startswith(RANDOM_PREFIX):  # not a second time: the weights may be most of the memory
        stock = MolmoExecutor(executor.model, executor.processor, executor.knob_space, mode="plain", **stock_options)
    else:
        stock = load_executor(model_path, device, mode="plain", **stock_options)
    return executor, stock


def first_token_ms(times: StageTimes) -> float:
    """From the cut image to the first token: tower and prefill."""
    return times.stage_ms["vision"] + times.stage_ms["llm_prefill"]


def answer_ms(times: StageTimes) -> float:
    """From the cut image to the end of the answer."""
    return first_token_ms(times) + sum(times.decode_ms)


def machine(device: torch.device) -> dict[str, str]:
    """What numbers were measured on, for the results."""
    return {"device_name": device_name(device), "library_versions": library_versions()}


def own_memory_mb() -> float:
    """
    Resident memory of this process, in MB, without what it shares with the system's cache of files: a table on disk is
    mapped into memory as it is read, and those pages are given back whenever another needs them.
    """
    memory = psutil.Process().memory_info()
    # Only Linux tells what is shared.
    return (memory.rss - getattr(memory, "shared", 0)) / 1e6


def write_results(results: Mapping[str, Any], path: str | None) -> None:
    """Writes results as JSON, if a file is given."""
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def make_table(title: str, headings: tuple[str, ...], caption: str | None = None) -> Table:
    """A table for the console whose first column is text, and whose others are numbers."""
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="right" if place else "left")
    return table
