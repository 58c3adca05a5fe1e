"""The executor and its latency estimator, as the arguments of several scripts name them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import torch

    from ..knobs import KnobSpace
    from ..latency import LatencyEstimatorModel, OriginalLatencyEstimatorModel
    from ..molmo import MolmoConfig, MolmoProcessor
    from ..molmo.executor import MolmoExecutor


FIT = "fit"
"""Value of `latency_estimator_path` that asks for a measurement of this machine."""


@dataclass
class ExecutorArguments:
    """
    Arguments that choose the executor, the values of its knobs, and the estimator of its latency.
    """

    model_path: str = field(
        default="embedded",
        metadata={"help": "Executor: a folder or Hub name of a Molmo, or `embedded` for the one that ships."},
    )
    importance_path: dict | str | None = field(
        default=None,
        metadata={
            "help": "JSON of block importance scores, or of searched sets of blocks, that `joint-controller importance` writes. "
            "In a recipe also one for each data set, by the beginning of its sample ids, and one for all others: "
            "`{easy_vqa: a.json, default: b.json}`. By default importance.json in the model folder; without one, the first "
            "blocks run."
        },
    )
    latency_estimator_path: str | None = field(
        default=None,
        metadata={
            "help": "Folder, Hub name or shipped name of a latency estimator, or a best_latency_estimator.pt of the original "
            "scripts; `fit` measures the executor on this machine and fits one first (about a minute). By default the one "
            "that ships with the package: for the embedded executor (measured on one thread of a CPU), and for MolmoE-1B on a "
            "GPU that it was measured on (NVIDIA H200)."
        },
    )
    tiers: list[str] | None = field(
        default=None,
        metadata={
            "help": "Values of the knob `tier`, cheapest first. Default: those of the executor's configuration."
        },
    )
    top_k_values: list[int] | None = field(
        default=None,
        metadata={"help": "Values of the knob `top_k`, ascending. Default: those of the executor's configuration."},
    )
    num_blocks_values: list[int] | None = field(
        default=None,
        metadata={
            "help": "Values of the knob `num_blocks`, ascending. Default: those of the executor's configuration."
        },
    )
    max_new_tokens: int = field(default=16, metadata={"help": "Most tokens of an answer, its end included."})
    executor_batch_size: int | None = field(
        default=None,
        metadata={"help": "Most requests that go through the executor together. Default: 64 on a GPU, 16 on a CPU."},
    )
    executor_workers: int = field(
        default=1,
        metadata={"help": "Batches that the executor answers at the same time, each by a thread of its own (CPU)."},
    )
    num_threads: int | None = field(
        default=None,
        metadata={
            "help": "Threads that share one operation on the CPU. 1 is best for the embedded executor, whose operations "
            "are small. Default: torch's."
        },
    )


def set_num_threads(args: ExecutorArguments) -> None:
    """
    Lets torch use as many threads as are asked for.

    Raises:
        ValueError: If these are fewer than one.
    """
    import torch

    if args.num_threads is not None:
        if args.num_threads < 1:
            raise ValueError(f"`num_threads` is {args.num_threads}: give 1 or more.")
        torch.set_num_threads(args.num_threads)


def load_executor(args: ExecutorArguments, device: str | None = None) -> "MolmoExecutor":
    """
    Loads the executor with the knob values that are asked for.

    Args:
        args ([`ExecutorArguments`]):
            Names it.
        device (`str`, *optional*):
            Where to put it. Defaults to the best device that there is.

    Raises:
        FileNotFoundError: If the model cannot be found.
        ValueError: If the checkpoint is incomplete or lacks a knob value.
    """
    from ..molmo.executor import MolmoExecutor

    set_num_threads(args)
    if isinstance(args.importance_path, dict):
        for dataset, path in args.importance_path.items():
            if not isinstance(path, str):
                raise ValueError(
                    f"`importance_path` gives {path!r} for data set '{dataset}': give the path of a JSON file."
                )
    executor = MolmoExecutor.from_pretrained(
        args.model_path,
        device=device,
        importance=args.importance_path,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.executor_batch_size,
        num_workers=args.executor_workers,
    )
    executor.knob_space = knob_space_of(args, executor.model.config)
    return executor


def open_executor(
    model_path: str,
    device: "str | torch.device | None" = None,
    importance: str | None = None,
    seed: int = 42,
    **kwargs: Any,
) -> "MolmoExecutor":
    """
    Loads an executor, or makes one with random weights, for what asks how long it takes rather than what it answers.

    Args:
        model_path (`str`):
            A folder or Hub name of a Molmo, `embedded`, or `random:` and one of `RANDOM_CONFIGS`, e.g.
            `random:molmoe-1b`.
        device (`str` or `torch.device`, *optional*):
            Where to put it. Defaults to the best device that there is.
        importance (`str`, *optional*):
            JSON of block importance scores.
        seed (`int`, *optional*, defaults to 42):
            Seed of random weights.
        kwargs:
            Further arguments of [`MolmoExecutor`].

    Raises:
        FileNotFoundError: If the model cannot be found.
        ValueError: If there are no such sizes, or random weights are given importance scores.
    """
    from ..molmo.executor import MolmoExecutor
    from ..molmo.executor.random_executor import RANDOM_CONFIGS, random_executor

    kind, _, name = model_path.partition(":")
    if kind != "random":
        return MolmoExecutor.from_pretrained(model_path, device=device, importance=importance, **kwargs)
    if name not in RANDOM_CONFIGS:
        raise ValueError(f"`model_path` '{model_path}' is unknown: choose random:{', random:'.join(RANDOM_CONFIGS)}.")
    if importance is not None:
        raise ValueError(
            f"`importance_path` '{importance}' scores blocks of a trained model, but the weights of '{model_path}' are "
            "random: leave it out."
        )
    return random_executor(RANDOM_CONFIGS[name](), device, seed=seed, **kwargs)


def load_executor_inputs(args: ExecutorArguments) -> "tuple[MolmoConfig, MolmoProcessor, KnobSpace]":
    """
    Loads what tells how long the executor's inputs are: its configuration, its processor and its knob space. No weights.

    Raises:
        FileNotFoundError: If the model cannot be found.
        ValueError: If the checkpoint lacks a knob value.
    """
    from ..molmo import MolmoConfig, MolmoProcessor
    from ..molmo.executor import embedded_executor_path

    path = embedded_executor_path() if args.model_path == "embedded" else Path(args.model_path)
    if not path.is_dir() and str(args.model_path).count("/") != 1:
        raise FileNotFoundError(
            f"`model_path` '{args.model_path}' does not exist: give a model folder, the name of a Hub repository "
            "(org/name), or 'embedded'."
        )
    config = MolmoConfig.from_pretrained(path)
    return config, MolmoProcessor.from_pretrained(path), knob_space_of(args, config)


def knob_space_of(args: ExecutorArguments, config: "MolmoConfig") -> "KnobSpace":
    """
    The knob space of an executor with the values that the fields `tiers`, `top_k_values` and `num_blocks_values` ask for.

    Raises:
        ValueError: If the executor lacks a value.
    """
    from ..knobs import DEFAULT_TIER_CROPS, KnobSpace

    tier_crops = None
    if args.tiers is not None:
        known = {**DEFAULT_TIER_CROPS, **KnobSpace.from_executor_config(config).tier_crops}
        unknown = [tier for tier in args.tiers if tier not in known]
        if unknown:
            raise ValueError(f"knob `tier` has unknown values {unknown}: choose from {list(known)}.")
        tier_crops = {tier: known[tier] for tier in args.tiers}
    return KnobSpace.from_executor_config(config, tier_crops, args.top_k_values, args.num_blocks_values)


def load_latency_estimator(
    args: ExecutorArguments, executor: "MolmoExecutor"
) -> "LatencyEstimatorModel | OriginalLatencyEstimatorModel":
    """
    Loads the latency estimator that `latency_estimator_path` names (any value but `fit`).

    Raises:
        FileNotFoundError: If it cannot be found.
        ValueError: If there is none, or it was fitted on an executor of other sizes or on other knob values.
    """
    from ..latency import (
        embedded_latency_estimator_path,
        read_latency_estimator,
        shipped_estimator_names,
        shipped_latency_estimators,
    )
    from ..latency.profiling import device_name

    path = args.latency_estimator_path
    if path is None and args.model_path == "embedded":
        path = embedded_latency_estimator_path()
    elif path is None:
        shipped = shipped_latency_estimators(executor.model.config)
        device = device_name(executor.device)
        if device not in shipped:
            what_ships = f"one ships for {', '.join(shipped)}; " if shipped else ""
            raise ValueError(
                f"no latency estimator for the executor '{args.model_path}' on {device}: {what_ships}give "
                f"`--latency_estimator_path {FIT}` to measure this machine first, or the folder of an estimator."
            )
        path = shipped[device]
    elif not Path(path).exists() and "/" not in str(path) and path not in shipped_estimator_names():
        raise FileNotFoundError(
            f"`latency_estimator_path` '{path}' does not exist: give the folder of an estimator, or `{FIT}`."
        )
    estimator = read_latency_estimator(path)
    estimator.check_executor(executor.model.config)
    return estimator
