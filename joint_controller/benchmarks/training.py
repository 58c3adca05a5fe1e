"""
Times training: rollouts whose answers the executor has to give, and rollouts whose outcomes are known.

```bash
joint-controller bench training
```

Both parts run the same trainer from the same seed. By default, on a GPU the executor has the sizes of MolmoE-1B and random
weights, on a CPU it is the one that ships with the package. The baseline, in the same run, lets transformers' own modules
answer one request after the other.
"""

import sys
import tempfile
import time
from dataclasses import dataclass, replace

import torch
from datasets import Dataset
from rich.console import Console
from transformers import PrinterCallback
from transformers.hf_argparser import HfArg

from ..controller import JointControllerConfig, JointControllerModel
from ..data import load_vqa_datasets
from ..evaluation.scoring import score_answer
from ..executor import EMBEDDED, Executor
from ..latency import LatencyEstimatorModel, shipped_latency_estimators
from ..outcomes import OutcomeCollector, OutcomeStore
from ..scripts import ScriptParser, run_script
from ..trainer import JointGRPOConfig, JointGRPOTrainer
from ..trainer.latency_budgets import resolve_latency_budgets
from .common import (
    ExecutorBenchArguments,
    check_at_least,
    machine,
    make_table,
    open_executors,
    use_experts,
    use_threads,
    write_results,
)


BUDGET_FRACTIONS = (0.6, 1.0)
"""Training budgets, as shares of the full setting's latency. They matter to the rewards only, not to the work."""

PHOTOGRAPH_SIZE = (640, 480)
"""Width and height, in pixels, that images are scaled to for other executors than the embedded one, whose images are as small
as it is: those of COCO, which most VQA data sets ask about."""


@dataclass(kw_only=True)
class BenchTrainingArguments(ExecutorBenchArguments):
    """
    Arguments of `joint-controller bench training`. A latency estimator must ship for the executor's sizes.
    """

    num_questions: int = HfArg(default=64, help="Questions of a rollout, half of them of easy-vqa.")
    num_stock_questions: int | None = HfArg(
        default=None,
        help="Questions of a rollout of the baseline. Default: 2 on a GPU, where it gives about four answers a second, "
        "`num_questions` on a CPU.",
    )
    num_generations: int = HfArg(default=8, help="Settings that are tried for each question.")
    num_rollouts: int = HfArg(default=4, help="Rollouts, each with one optimiser step.")
    max_new_tokens: int | None = HfArg(
        default=None,
        help="Most tokens of an answer. Default: 2 for the embedded executor, whose answers are one word, else 8.",
    )


def main(args: BenchTrainingArguments) -> None:
    """Times trainings, and shows and writes what they took."""
    least = ("num_questions", "num_stock_questions", "num_rollouts", "max_new_tokens", "batch_size", "num_workers")
    check_at_least(args, {**dict.fromkeys(least, 1), "num_generations": 2})
    if args.num_stock_questions is not None and args.num_stock_questions > args.num_questions:
        raise ValueError(
            f"`num_stock_questions` is {args.num_stock_questions}, but a rollout has {args.num_questions}: give as many or "
            "fewer."
        )
    device = args.torch_device()
    is_cuda = device.type == "cuda"
    model_path = args.model_path or ("random:molmoe-1b" if is_cuda else EMBEDDED)
    args = replace(
        args,
        model_path=model_path,
        num_stock_questions=args.num_stock_questions or (2 if is_cuda else args.num_questions),
        max_new_tokens=args.max_new_tokens or (2 if model_path == EMBEDDED else 8),
        batch_size=args.batch_size or (64 if is_cuda else 16),
    )
    with use_threads(args.num_threads, device):
        options = {"max_new_tokens": args.max_new_tokens}
        executor, stock = open_executors(
            model_path,
            device,
            args.seed,
            {**options, "batch_size": args.batch_size, "num_workers": args.num_workers},
            {**options, "batch_size": 1},
        )
        estimators = shipped_latency_estimators(executor)
        if not estimators:
            raise ValueError(
                f"no latency estimator ships for an executor of the sizes of '{model_path}': give one of MolmoE-1B's sizes, "
                f"or `{EMBEDDED}`."
            )
        # Of any device: budgets are shares of what it predicts.
        estimator = LatencyEstimatorModel.from_pretrained(next(iter(estimators.values())))
        dataset = load_questions(args)
        stock_dataset = dataset.select(range(args.num_stock_questions * args.num_rollouts))
        stock_store, store = (OutcomeStore(None, one.fingerprint, one.knob_space) for one in (stock, executor))
        # The best of transformers' implementations for prompts and short answers; a model of ours begins with "eager".
        with use_experts(stock, "grouped_mm"):
            by_modules = _train(args, stock_dataset, OutcomeCollector(stock, stock_store, score_answer), estimator)
        collector = OutcomeCollector(executor, store, score_answer)
        results = {
            **machine(device),
            "model_path": model_path,
            "num_threads": torch.get_num_threads(),
            "num_workers": args.num_workers,
            "runs": {
                "one by one, transformers' modules": by_modules,
                f"batched, mode '{executor.mode}'": _train(args, dataset, collector, estimator),
                "outcomes known": _train(args, dataset, collector, estimator),
            },
        }
    write_results(results, args.json)
    rows = args.num_questions * args.num_generations
    title = f"{args.num_rollouts} rollouts of {rows} rows, {model_path} on {results['device_name']}"
    table = make_table(title, ("", "rows", "answers", "seconds", "answers/s", "rows/s"))
    for name, run in results["runs"].items():
        table.add_row(
            name,
            f"{run['num_rows']:,}",
            f"{run['num_executed']:,}",
            f"{run['seconds']:.2f}",
            f"{run['num_executed'] / run['seconds']:.1f}" if run["num_executed"] else "-",
            f"{run['num_rows'] / run['seconds']:,.0f}",
        )
    Console().print(table)


def load_questions(args: BenchTrainingArguments) -> Dataset:
    """Questions for all rollouts, about images of a size that the executor was made for."""
    num_samples = args.num_questions * args.num_rollouts
    dataset = load_vqa_datasets(["easy_vqa", "scenes"], "train", num_samples, seed=args.seed)
    if args.model_path == EMBEDDED:
        return dataset
    return dataset.map(lambda row: {"image": row["image"].resize(PHOTOGRAPH_SIZE)}, features=dataset.features)


def _train(
    args: BenchTrainingArguments,
    dataset: Dataset,
    collector: OutcomeCollector,
    latency_estimator: LatencyEstimatorModel,
) -> dict[str, float]:
    """
    Trains a new controller on all samples, in `num_rollouts` rollouts; gives the seconds of its steps, and the answers that
    the executor was asked for in them.
    """
    executor: Executor = collector.executor
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
                question_size=executor.question_size,
                vision_size=executor.vision_size,
                latency_budget_min_ms=budgets.minimum_ms,
                latency_budget_max_ms=budgets.maximum_ms,
            )
        )
        trainer = JointGRPOTrainer(
            model=controller,
            outcomes=collector,
            latency_estimator=latency_estimator,
            args=training_args,
            train_dataset=dataset,
            latency_budgets=budgets,
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
    return ScriptParser([BenchTrainingArguments])


if __name__ == "__main__":
    sys.exit(run_script("bench training", make_parser, main))
