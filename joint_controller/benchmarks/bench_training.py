"""
Times training: rollouts whose answers the executor has to give, and rollouts whose outcomes are known.

```bash
joint-controller bench training
```

Both parts run the same trainer from the same seed. By default, on a GPU the executor has the sizes of MolmoE-1B and random
weights, on a CPU it is the one that ships with the package. The baseline, in the same run, lets transformers' own modules
answer one request after the other.
"""

import json
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..scripts import ScriptParser, run_script
from ..scripts.executor_arguments import open_executor


if TYPE_CHECKING:
    import torch
    from datasets import Dataset

    from ..latency import LatencyEstimatorModel
    from ..molmo import MolmoConfig
    from ..molmo.executor import MolmoExecutor
    from ..outcomes import OutcomeStore


BUDGET_FRACTIONS = (0.6, 1.0)
"""Training budgets, as shares of the full setting's latency. They matter to the rewards only, not to the work."""

PHOTOGRAPH_SIZE = (640, 480)
"""Width and height, in pixels, that images are scaled to for other executors than the embedded one, whose images are as small
as it is: those of COCO, which most VQA data sets ask about."""


@dataclass
class BenchTrainingArguments:
    """
    Arguments of `joint-controller bench training`.
    """

    model_path: str | None = field(
        default=None,
        metadata={
            "help": "Executor to train with: a folder or Hub name of a Molmo that a latency estimator ships for, `embedded`, or "
            "`random:molmoe-1b` for random weights of MolmoE-1B's sizes, made on the device. Default: random:molmoe-1b on a "
            "GPU, embedded on a CPU."
        },
    )
    device: str | None = field(default=None, metadata={"help": "Device. Default: cuda where there is one, else cpu."})
    num_questions: int = field(default=64, metadata={"help": "Questions of a rollout, half of them of easy-vqa."})
    num_stock_questions: int | None = field(
        default=None,
        metadata={
            "help": "Questions of a rollout of the baseline. Default: 2 on a GPU, where it gives about four answers a second, "
            "`num_questions` on a CPU."
        },
    )
    num_generations: int = field(default=8, metadata={"help": "Settings that are tried for each question."})
    num_rollouts: int = field(default=4, metadata={"help": "Rollouts, each with one optimiser step."})
    max_new_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Most tokens of an answer. Default: 2 for the embedded executor, whose answers are one word, else 8."
        },
    )
    batch_size: int | None = field(
        default=None,
        metadata={"help": "Most requests that the executor answers together. Default: 64 on a GPU, 16 on a CPU."},
    )
    num_workers: int = field(default=2, metadata={"help": "Batches that are answered at the same time (CPU)."})
    num_threads: int | None = field(
        default=None,
        metadata={
            "help": "Threads that share one operation on the CPU. Default: 1 where the executor is on the CPU, else torch's: "
            "they cut images."
        },
    )
    seed: int = field(default=42, metadata={"help": "Seed of the questions and of the run."})
    json: str | None = field(default=None, metadata={"help": "File to write the results to, too."})


def main(args: BenchTrainingArguments):
    _check(args)
    import torch
    from rich.console import Console
    from rich.table import Table

    from ..latency.profiling import device_name
    from ..outcomes import OutcomeStore

    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    is_cuda = device.type == "cuda"
    model_path = args.model_path or ("random:molmoe-1b" if is_cuda else "embedded")
    args = replace(
        args,
        model_path=model_path,
        num_stock_questions=args.num_stock_questions or (2 if is_cuda else args.num_questions),
        max_new_tokens=args.max_new_tokens or (2 if model_path == "embedded" else 8),
        batch_size=args.batch_size or (64 if is_cuda else 16),
        num_threads=args.num_threads or (torch.get_num_threads() if is_cuda else 1),
    )
    num_threads = torch.get_num_threads()
    torch.set_num_threads(args.num_threads)
    try:
        fast, stock = _open_executors(args, device)
        estimator = _load_latency_estimator(args, fast.model.config)
        dataset = load_questions(args)
        stock_dataset = dataset.select(range(args.num_stock_questions * args.num_rollouts))
        stock_store, store = (OutcomeStore(None, executor.fingerprint) for executor in (stock, fast))
        runs = {
            "one by one, transformers' modules": _train(args, stock_dataset, stock, stock_store, estimator),
            f"batched, mode '{fast.mode}'": _train(args, dataset, fast, store, estimator),
            "outcomes known": _train(args, dataset, fast, store, estimator),
        }
    finally:
        torch.set_num_threads(num_threads)
    results = {
        "device_name": device_name(device),
        "torch_version": torch.__version__,
        "model_path": args.model_path,
        "num_threads": args.num_threads,
        "num_workers": args.num_workers,
        "runs": runs,
    }
    if args.json is not None:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    rows = args.num_questions * args.num_generations
    table = Table(
        title=f"{args.num_rollouts} rollouts of {rows} rows, {args.model_path} on {results['device_name']}",
        title_justify="left",
    )
    for heading in ("", "rows", "answers", "seconds", "answers/s", "rows/s"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, run in runs.items():
        table.add_row(
            name,
            f"{run['num_rows']:,}",
            f"{run['num_executed']:,}",
            f"{run['seconds']:.2f}",
            f"{run['num_executed'] / run['seconds']:.1f}" if run["num_executed"] else "-",
            f"{run['num_rows'] / run['seconds']:,.0f}",
        )
    Console().print(table)


def _check(args: BenchTrainingArguments):
    for name in (
        "num_questions",
        "num_stock_questions",
        "num_rollouts",
        "max_new_tokens",
        "batch_size",
        "num_workers",
        "num_threads",
    ):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"`{name}` is {getattr(args, name)}: give 1 or more.")
    if args.num_generations < 2:
        raise ValueError(f"`num_generations` is {args.num_generations}: a group needs 2 settings or more.")
    if args.num_stock_questions is not None and args.num_stock_questions > args.num_questions:
        raise ValueError(
            f"`num_stock_questions` is {args.num_stock_questions}, but a rollout has {args.num_questions}: give as many or "
            "fewer."
        )


def _open_executors(args: BenchTrainingArguments, device: "torch.device") -> "tuple[MolmoExecutor, MolmoExecutor]":
    """The executor in its fastest mode, and one that answers one by one in the mode `"plain"`."""
    from ..molmo.executor import MolmoExecutor

    options = {"max_new_tokens": args.max_new_tokens}
    one_by_one = {**options, "mode": "plain", "batch_size": 1}
    fast = open_executor(
        args.model_path, device, seed=args.seed, batch_size=args.batch_size, num_workers=args.num_workers, **options
    )
    if args.model_path.startswith("random:"):  # not a second time: the weights may be most of the memory
        stock = MolmoExecutor(fast.model, fast.processor, fast.knob_space, **one_by_one)
    else:
        stock = open_executor(args.model_path, device, **one_by_one)
    # The best of transformers' implementations for prompts and short answers; a model of ours begins with "eager".
    # `set_experts_implementation` does not reach the language model's configuration.
    stock.model.config.text_config._experts_implementation = "grouped_mm"
    return fast, stock


def load_questions(args: BenchTrainingArguments) -> "Dataset":
    """Questions for all rollouts, about images of a size that the executor was made for."""
    from ..data import load_vqa_datasets

    num_samples = args.num_questions * args.num_rollouts
    dataset = load_vqa_datasets(["easy_vqa", "scenes"], "train", num_samples, seed=args.seed)
    if args.model_path == "embedded":
        return dataset
    return dataset.map(lambda row: {"image": row["image"].resize(PHOTOGRAPH_SIZE)}, features=dataset.features)


def _load_latency_estimator(args: BenchTrainingArguments, config: "MolmoConfig") -> "LatencyEstimatorModel":
    """The estimator that ships for the executor's sizes, of any device: budgets are shares of what it predicts."""
    from ..latency import LatencyEstimatorModel, shipped_latency_estimators

    estimators = shipped_latency_estimators(config)
    if not estimators:
        raise ValueError(
            f"no latency estimator ships for an executor of the sizes of '{args.model_path}': give one of MolmoE-1B's sizes, "
            "or `embedded`."
        )
    return LatencyEstimatorModel.from_pretrained(next(iter(estimators.values())))


def _train(
    args: BenchTrainingArguments,
    dataset: "Dataset",
    executor: "MolmoExecutor",
    store: "OutcomeStore",
    latency_estimator: "LatencyEstimatorModel",
) -> dict[str, float]:
    """
    Trains a new controller on all samples, in `num_rollouts` rollouts; gives the seconds of its steps, and the answers that
    the executor was asked for in them.
    """
    import torch
    from transformers import PrinterCallback

    from ..controller import JointControllerConfig, JointControllerModel
    from ..evaluation.scoring import score_answer
    from ..outcomes import OutcomeCollector
    from ..trainer import JointGRPOConfig, JointGRPOTrainer
    from ..trainer.latency_budgets import resolve_latency_budgets

    collector = OutcomeCollector(executor, store, score_answer)
    num_rows = len(dataset) // args.num_rollouts * args.num_generations
    with tempfile.TemporaryDirectory() as folder:
        training_args = JointGRPOConfig(
            output_dir=folder,
            seed=args.seed,
            latency_budget_min_fraction=BUDGET_FRACTIONS[0],
            latency_budget_max_fraction=BUDGET_FRACTIONS[1],
            per_device_train_batch_size=num_rows,
            num_generations=args.num_generations,
            max_steps=args.num_rollouts,
            eval_strategy="no",
            save_strategy="no",
            load_best_model_at_end=False,
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=executor.device.type == "cpu",
        )
        # Answers some of the samples, in no time that counts: first uses are behind the executor then.
        budgets = resolve_latency_budgets(training_args, collector, latency_estimator, dataset)
        torch.manual_seed(args.seed)
        controller = JointControllerModel(
            JointControllerConfig(
                knob_space=executor.knob_space.to_dict(),
                question_size=executor.hidden_size,
                vision_size=executor.hidden_size,
                latency_budget_min_ms=budgets.minimum_ms,
                latency_budget_max_ms=budgets.maximum_ms,
            )
        )
        trainer = JointGRPOTrainer(
            model=controller,
            collector=collector,
            latency_estimator=latency_estimator,
            args=training_args,
            train_dataset=dataset,
        )
        trainer.remove_callback(PrinterCallback)  # it logs at the end, whatever the strategy
        num_before = collector.num_executed
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "num_rows": args.num_rollouts * num_rows,
        "num_executed": collector.num_executed - num_before,
    }


def make_parser() -> ScriptParser:
    return ScriptParser((BenchTrainingArguments,))


if __name__ == "__main__":
    sys.exit(run_script("bench training", make_parser, main))
