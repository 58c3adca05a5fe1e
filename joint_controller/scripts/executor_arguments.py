"""The executor and its latency estimator, as the arguments of several scripts name them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers.hf_argparser import HfArg


if TYPE_CHECKING:
    from pathlib import Path

    from ..executor import Executor
    from ..knobs import KnobSpace
    from ..latency import LatencyEstimator


FIT = "fit"
"""Value of `latency_estimator_path` that asks for a measurement of this machine."""


@dataclass
class ExecutorArguments:
    """Arguments that choose the executor, the values of its knobs, and the estimator of its latency."""

    model_path: str = HfArg(
        default="embedded", help="Executor: a folder or Hub name of a model, or `embedded` for the one that ships."
    )
    importance_path: dict | str | None = HfArg(
        default=None,
        help="JSON of block importance scores, or of searched sets of blocks, that `joint-controller importance` writes. "
        "In a recipe also one for each data set, by the beginning of its sample ids, and one for all others: "
        "`{easy_vqa: a.json, default: b.json}`. By default importance.json in the model folder; without one, the "
        "first blocks run.",
    )
    latency_estimator_path: str | None = HfArg(
        default=None,
        help="Folder, Hub name or shipped name of a latency estimator, or a best_latency_estimator.pt of the original "
        "scripts; `fit` measures the executor on this machine and fits one first (about a minute). By default the "
        "one that ships with the package for this executor, this device and this way of running it; that of the embedded "
        "executor, measured on one thread of a CPU, is taken however it runs here.",
    )
    latency_scope: str | None = HfArg(
        default=None,
        help="What budgets and latencies are of: `request`, all that a request costs by the clock, from the image in memory "
        "to the answer, or `model`, the stages of the model alone, as earlier versions counted. Default: request; for "
        "recorded results, which know no other, model; in a sweep, what the controller was trained for.",
        metadata={"choices": ["request", "model"]},
    )
    knob_values: dict | str | list[str] | None = HfArg(
        default=None,
        help="Values of knobs, cheapest first: `--knob_values tier=low,high depth=4,8`, in a recipe also `{tier: [low, "
        "high], depth: [4, 8]}`. By default those that the executor's checkpoint gives.",
        metadata={"nargs": "+", "metavar": "KNOB=VALUE,VALUE"},
    )
    max_new_tokens: int = HfArg(default=16, help="Most tokens of an answer, its end included.")
    executor_batch_size: int | None = HfArg(
        default=None, help="Most requests that go through the executor together. Default: 64 on a GPU, 16 on a CPU."
    )
    executor_workers: int = HfArg(
        default=1, help="Batches that the executor answers at the same time, each by a thread of its own (CPU)."
    )
    num_threads: int | None = HfArg(
        default=None,
        help="Threads that share one operation on the CPU. 1 is best for the embedded executor, whose operations are "
        "small. Default: torch's.",
    )


def set_num_threads(args: ExecutorArguments) -> None:
    """Lets torch use as many threads as are asked for, one at least."""
    import torch

    if args.num_threads is not None:
        if args.num_threads < 1:
            raise ValueError(f"`num_threads` is {args.num_threads}: give 1 or more.")
        torch.set_num_threads(args.num_threads)


def load_executor_from(
    args: ExecutorArguments, device: str | None = None, knob_space: "KnobSpace | None" = None
) -> "Executor":
    """
    Loads the executor with the knob values that are asked for, or with a `knob_space`, e.g. that of a controller; the
    arguments must then ask for no values. Without a device, it goes to the best one that there is.
    """
    from ..executor import load_executor
    from ..knobs import parse_knob_values

    set_num_threads(args)
    if isinstance(args.importance_path, dict):
        for dataset, path in args.importance_path.items():
            if not isinstance(path, str):
                raise ValueError(
                    f"`importance_path` gives {path!r} for data set '{dataset}': give the path of a JSON file."
                )
    options = {
        "importance": args.importance_path,
        "max_new_tokens": args.max_new_tokens,
        "batch_size": args.executor_batch_size,
        "num_workers": args.executor_workers,
    }
    return load_executor(
        args.model_path,
        device=device,
        knob_values=parse_knob_values(args.knob_values),
        knob_space=knob_space,
        # A family need not know an option that was not asked for.
        **{name: value for name, value in options.items() if value is not None},
    )


def load_latency_estimator(args: ExecutorArguments, executor: "Executor") -> "LatencyEstimator":
    """
    Loads the latency estimator that `latency_estimator_path` names (any value but `fit`), by default the one that ships
    for the executor, in the scope that is asked for, and checks that it is of this executor.
    """
    from ..executor import EMBEDDED, REQUEST_SCOPE
    from ..latency import embedded_latency_estimator_path, read_latency_estimator

    path = args.latency_estimator_path
    if path is None:
        is_embedded = args.model_path == EMBEDDED
        path = embedded_latency_estimator_path() if is_embedded else _find_shipped(args.model_path, executor)
    estimator = read_latency_estimator(path, args.latency_scope or REQUEST_SCOPE)
    estimator.check_executor(executor)
    return estimator


def _find_shipped(model_path: str, executor: "Executor") -> "Path":
    """Folder of the estimator that ships for an executor as it runs here."""
    from ..latency import read_latency_estimator, shipped_latency_estimators
    from ..latency.way_of_running import WayOfRunning

    here, shipped = WayOfRunning.of(executor), shipped_latency_estimators(executor)
    problem = f"one ships for {', '.join(shipped)}; " if shipped else ""
    if here.device_name in shipped:
        differing = read_latency_estimator(shipped[here.device_name]).way.incomparable(here)
        if not differing:
            return shipped[here.device_name]
        problem = f"the one that ships is of another way of running ({differing}); "
    raise ValueError(
        f"no latency estimator for the executor '{model_path}' on {here.device_name}: {problem}give "
        f"`--latency_estimator_path {FIT}` to measure this machine first, or the folder of an estimator."
    )
