"""
Times training: rollouts whose answers the executor has to give, and rollouts whose outcomes are known.

```bash
joint-controller bench training
```

Both parts run the same trainer from the same seed on the embedded executor. The baseline, in the same run, lets transformers'
own modules answer one request after the other.
"""

import json
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from . import ScriptParser, run_script


if TYPE_CHECKING:
    from datasets import Dataset

    from ..executor import MolmoExecutor
    from ..outcomes import OutcomeStore


MIN_BUDGET_MS, MAX_BUDGET_MS = 50.0, 120.0
"""Training budgets. They matter to the rewards only, not to the work."""


@dataclass
class BenchTrainingArguments:
    """
    Arguments of `joint-controller bench training`.
    """

    num_questions: int = field(default=64, metadata={"help": "Questions of a rollout, half of them of easy-vqa."})
    num_generations: int = field(default=8, metadata={"help": "Settings that are tried for each question."})
    num_rollouts: int = field(default=4, metadata={"help": "Rollouts, each with one optimiser step."})
    batch_size: int = field(default=16, metadata={"help": "Most requests that the executor answers together."})
    num_workers: int = field(default=2, metadata={"help": "Batches that are answered at the same time (CPU)."})
    num_threads: int = field(default=1, metadata={"help": "Threads that share one operation on the CPU."})
    seed: int = field(default=42, metadata={"help": "Seed of the questions and of the run."})
    json: str | None = field(default=None, metadata={"help": "File to write the results to, too."})


def main(args: BenchTrainingArguments):
    for name in ("num_questions", "num_rollouts", "batch_size", "num_workers", "num_threads"):
        if getattr(args, name) < 1:
            raise ValueError(f"`{name}` is {getattr(args, name)}: give 1 or more.")
    if args.num_generations < 2:
        raise ValueError(f"`num_generations` is {args.num_generations}: a group needs 2 settings or more.")
    import torch
    from rich.console import Console
    from rich.table import Table

    from ..data import load_vqa_datasets
    from ..executor import MolmoExecutor
    from ..latency.profiling import device_name
    from ..outcomes import OutcomeStore

    num_samples = args.num_questions * args.num_rollouts
    dataset = load_vqa_datasets(["easy_vqa", "scenes"], "train", num_samples, seed=args.seed)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(args.num_threads)
    try:
        plain = MolmoExecutor.from_pretrained("embedded", max_new_tokens=2, batch_size=1, mode="plain")
        batched = MolmoExecutor.from_pretrained(
            "embedded", max_new_tokens=2, batch_size=args.batch_size, num_workers=args.num_workers
        )
        store = OutcomeStore(None, batched.fingerprint)
        runs = {
            "one by one, transformers' modules": _train(args, dataset, plain, OutcomeStore(None, plain.fingerprint)),
            f"batched, mode '{batched.mode}'": _train(args, dataset, batched, store),
            "outcomes known": _train(args, dataset, batched, store),
        }
    finally:
        torch.set_num_threads(num_threads)
    results = {
        "device_name": device_name(batched.device),
        "torch_version": torch.__version__,
        "num_threads": args.num_threads,
        "num_workers": args.num_workers,
        "runs": runs,
    }
    if args.json is not None:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    rows = args.num_questions * args.num_generations
    table = Table(title=f"{args.num_rollouts} rollouts of {rows} rows on {results['device_name']}")
    for heading in ("", "answers", "seconds", "answers/s", "rows/s"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, run in runs.items():
        table.add_row(
            name,
            f"{run['num_executed']:,}",
            f"{run['seconds']:.2f}",
            f"{run['num_executed'] / run['seconds']:.1f}" if run["num_executed"] else "-",
            f"{args.num_rollouts * rows / run['seconds']:,.0f}",
        )
    Console().print(table)


def _train(
    args: BenchTrainingArguments, dataset: "Dataset", executor: "MolmoExecutor", store: "OutcomeStore"
) -> dict[str, float]:
    """Trains a new controller; gives the seconds of its steps and the answers that the executor was asked for in them."""
    import torch

    from ..controller import JointControllerConfig, JointControllerModel
    from ..evaluation.scoring import score_answer
    from ..latency import LatencyEstimatorModel, embedded_latency_estimator_path
    from ..outcomes import OutcomeCollector
    from ..trainer import JointGRPOConfig, JointGRPOTrainer

    torch.manual_seed(args.seed)
    controller = JointControllerModel(
        JointControllerConfig(
            knob_space=executor.knob_space.to_dict(),
            question_size=executor.hidden_size,
            vision_size=executor.hidden_size,
            latency_budget_min_ms=MIN_BUDGET_MS,
            latency_budget_max_ms=MAX_BUDGET_MS,
        )
    )
    collector = OutcomeCollector(executor, store, score_answer)
    with tempfile.TemporaryDirectory() as folder:
        trainer = JointGRPOTrainer(
            model=controller,
            collector=collector,
            latency_estimator=LatencyEstimatorModel.from_pretrained(embedded_latency_estimator_path()),
            args=JointGRPOConfig(
                output_dir=folder,
                seed=args.seed,
                latency_budget_min_ms=MIN_BUDGET_MS,
                latency_budget_max_ms=MAX_BUDGET_MS,
                per_device_train_batch_size=args.num_questions * args.num_generations,
                num_generations=args.num_generations,
                max_steps=args.num_rollouts,
                eval_strategy="no",
                save_strategy="no",
                load_best_model_at_end=False,
                logging_strategy="no",
                disable_tqdm=True,
                use_cpu=executor.device.type == "cpu",
            ),
            train_dataset=dataset,
        )
        # The samples that budgets are checked on were answered by now.
        num_before = collector.num_executed
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "num_executed": collector.num_executed - num_before}


def make_parser() -> ScriptParser:
    return ScriptParser((BenchTrainingArguments,))


if __name__ == "__main__":
    sys.exit(run_script("bench training", make_parser, main))
