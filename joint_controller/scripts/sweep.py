"""
Evaluates a trained controller over latency budgets, beside static and random settings.

```bash
joint-controller sweep --controller_path outputs/easy_vqa --output_dir outputs/sweep
```
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from . import ScriptParser, run_script
from .data_arguments import DatasetArguments, load_split, open_skipped_rows
from .executor_arguments import FIT, ExecutorArguments, load_executor, load_latency_estimator


@dataclass
class SweepArguments(ExecutorArguments, DatasetArguments):
    """
    Arguments of `joint-controller sweep`. Knob values are the controller's.
    """

    controller_path: str = field(default="", metadata={"help": "Folder or Hub name of the controller. Required."})
    output_dir: str = field(default="", metadata={"help": "New folder for the table (sweep.parquet). Required."})
    dataset_split: str = field(default="test", metadata={"help": "Split that is evaluated."})
    max_samples: int | None = field(default=None, metadata={"help": "Samples in all. Default: all."})
    max_static_samples: int = field(
        default=256, metadata={"help": "Training samples on which the best static setting of each budget is chosen."}
    )
    outcomes_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of executor outcomes, e.g. that of the training; what it holds is not run again. Default: "
            "`outcomes` in the output folder."
        },
    )
    budgets_ms: list[float] | None = field(
        default=None, metadata={"help": "Budgets, in ms. Default: fractions of the full setting's latency."}
    )
    budget_fractions: list[float] = field(
        default_factory=lambda: [0.35, 0.5, 0.7, 0.85, 1.0],
        metadata={"help": "Budgets as fractions of the full setting's latency, where none are given in ms."},
    )
    guardrail_quantile: float | None = field(
        default=None,
        metadata={
            "help": "Evaluate the controller with the guardrail, too (policy `guarded`): it then chooses among the settings "
            "whose latency is predicted to stay below the budget on this share of requests (0.9, 0.95 or 0.99), with an "
            "answer of `max_new_tokens`."
        },
    )
    seed: int = field(default=42, metadata={"help": "Seed of the samples and of the random settings."})


def main(args: SweepArguments):
    from rich.console import Console

    from ..controller import JointControllerModel
    from ..data import read_samples
    from ..evaluation.policies import ControllerPolicy
    from ..evaluation.scoring import score_answer
    from ..evaluation.sweep import SWEEP_FILE, baseline_policies, format_sweep_table, sweep_budgets, sweep_to_dataset
    from ..latency import Guardrail
    from ..outcomes import OutcomeCollector, OutcomeStore, predict_latency_ms

    for name in ("controller_path", "output_dir"):
        if not getattr(args, name):
            raise ValueError(f"`--{name}` is missing.")
    if args.latency_estimator_path == FIT:
        raise ValueError(
            "a sweep takes the latency estimator that the controller was trained with: give its folder, e.g. "
            "`latency_estimator` in the output folder of the training."
        )
    output_file = Path(args.output_dir) / SWEEP_FILE
    if output_file.exists():
        raise FileExistsError(f"'{output_file}' exists already: name another `output_dir`, or delete the file.")
    if not (Path(args.controller_path) / "config.json").is_file() and args.controller_path.count("/") != 1:
        raise FileNotFoundError(f"`controller_path` '{args.controller_path}' is not the folder of a controller.")
    controller = JointControllerModel.from_pretrained(args.controller_path)
    space = controller.knob_space
    args.tiers = list(space.tier_crops)
    args.top_k_values, args.num_blocks_values = list(space.top_k), list(space.num_blocks)
    executor = load_executor(args)
    latency_estimator = load_latency_estimator(args, executor)
    controllers = [ControllerPolicy(controller.to(executor.device), executor)]
    if args.guardrail_quantile is not None:
        guardrail = Guardrail(latency_estimator, executor, args.guardrail_quantile)
        controllers.append(ControllerPolicy(controller, executor, "guarded", guardrail))
    skipped_rows = open_skipped_rows(args, args.output_dir)
    samples = read_samples(load_split(args, args.dataset_split, args.max_samples, args.seed, skipped_rows))
    train_samples = read_samples(load_split(args, "train", args.max_static_samples, args.seed, skipped_rows))
    store = OutcomeStore(args.outcomes_dir or Path(args.output_dir) / "outcomes", executor.fingerprint)
    collector = OutcomeCollector(executor, store, score_answer)

    full_outcomes = collector.collect(train_samples, [space.full] * len(train_samples), progress=True)
    full_setting_ms = predict_latency_ms(latency_estimator, full_outcomes).mean().item()
    fractions = args.budget_fractions
    if args.budgets_ms is not None:
        fractions = [budget / full_setting_ms for budget in args.budgets_ms]
    baselines = baseline_policies(
        collector,
        latency_estimator,
        train_samples,
        [fraction * full_setting_ms for fraction in fractions],
        seed=args.seed,
        progress=True,
    )
    policies = [*controllers, *baselines]
    rows = sweep_budgets(policies, collector, latency_estimator, samples, fractions, full_setting_ms, progress=True)
    sweep_to_dataset(rows).to_parquet(output_file)
    console = Console()
    if skipped_rows:
        console.print(skipped_rows.summary())
    console.print(format_sweep_table(rows, f"{len(samples)} samples of {', '.join(args.dataset_names)}"))
    console.print(f"The table is in {output_file}.")


def make_parser() -> ScriptParser:
    return ScriptParser((SweepArguments,))


if __name__ == "__main__":
    sys.exit(run_script("sweep", make_parser, main))
