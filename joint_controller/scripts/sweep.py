"""
Evaluates a trained controller over latency budgets, compared with static and random settings.

```bash
joint-controller sweep --controller_path outputs/easy_vqa --output_dir outputs/sweep
```
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg

from . import ScriptParser, run_script
from .data_arguments import DatasetArguments, load_split, open_skipped_rows
from .executor_arguments import FIT, ExecutorArguments, load_executor_from, load_latency_estimator


STATIC_SPLIT = "train"
"""Split that static settings are chosen on."""


@dataclass
class SweepArguments(ExecutorArguments, DatasetArguments):
    """
    Arguments of `joint-controller sweep`. Knobs are the controller's.
    """

    controller_path: str = HfArg(default="", help="Folder or Hub name of the controller. Required.")
    output_dir: str = HfArg(default="", help="New folder for the table (sweep.parquet). Required.")
    dataset_split: str = HfArg(default="test", help="Split that is evaluated.")
    max_samples: int | None = HfArg(default=None, help="Samples in all. Default: all.")
    max_static_samples: int = HfArg(
        default=256, help="Training samples on which the best static setting of each budget is chosen."
    )
    outcomes_dir: str | None = HfArg(
        default=None,
        help="Folder of executor outcomes, e.g. that of the training; what it holds is not run again. Default: `outcomes` "
        "in the output folder.",
    )
    reward_funcs: list[str] | None = HfArg(
        default=None,
        help="Reward functions, as in `joint-controller train`. Default: those that the controller was trained for.",
    )
    reward_weights: list[float] | None = HfArg(
        default=None, help="Weight of each reward function. Default: those that the controller was trained for."
    )
    budgets_ms: list[float] | None = HfArg(
        default=None, help="Budgets, in ms. Default: fractions of the full setting's latency."
    )
    budget_fractions: list[float] = HfArg(
        default_factory=lambda: [0.35, 0.5, 0.7, 0.85, 1.0],
        help="Budgets as fractions of the full setting's latency, where none are given in ms.",
    )
    guardrail_quantile: float | None = HfArg(
        default=None,
        help="Evaluate the controller with the guardrail, too (policy `guarded`): it then chooses among the settings "
        "whose latency is predicted to stay below the budget on this share of requests (0.9, 0.95 or 0.99), with an "
        "answer of `max_new_tokens`.",
    )
    seed: int = HfArg(default=42, help="Seed of the samples and of the random settings.")

    def __post_init__(self):
        for name in ("budgets_ms", "budget_fractions"):
            budgets = getattr(self, name)
            if budgets is not None and not (budgets and all(0 < budget < math.inf for budget in budgets)):
                raise ValueError(f"`{name}` is {budgets}: give one or more finite numbers above 0.")
        if self.max_static_samples < 1:
            raise ValueError(f"`max_static_samples` is {self.max_static_samples}: give 1 or more.")


def main(args: SweepArguments):
    from rich.console import Console

    from ..controller import find_controller_folder, load_controller
    from ..data import SplitPart, read_samples
    from ..evaluation.plots import SWEEP_PICTURE_FILE, plot_sweep
    from ..evaluation.policies import ControllerPolicy
    from ..evaluation.scoring import score_answer
    from ..evaluation.sweep import (
        SWEEP_FILE,
        baseline_policies,
        format_sweep_table,
        sweep_budgets,
        sweep_to_dataset,
    )
    from ..latency import Guardrail, read_latency_estimator
    from ..latency.latency_estimator import SCOPE_IN_WORDS
    from ..outcomes import OutcomeCollector, OutcomeStore
    from ..rewards import resolve_rewards
    from ..trainer.joint_grpo_trainer import LATENCY_ESTIMATOR_FOLDER

    for name in ("controller_path", "output_dir"):
        if not getattr(args, name):
            raise ValueError(f"`--{name}` is missing.")
    if args.latency_estimator_path == FIT:
        raise ValueError(
            "a sweep takes the latency estimator that the controller was trained with: leave `latency_estimator_path` out, or "
            "give the folder of another one."
        )
    if SplitPart.parse(args.dataset_split).overlaps(SplitPart.parse(STATIC_SPLIT)):
        raise ValueError(
            f"`dataset_split` is '{args.dataset_split}', but static settings are chosen on '{STATIC_SPLIT}': evaluate on other "
            "samples."
        )
    output_file = Path(args.output_dir) / SWEEP_FILE
    if output_file.exists():
        raise FileExistsError(f"'{output_file}' exists already: name another `output_dir`, or delete the file.")
    folder = find_controller_folder(args.controller_path)
    controller = load_controller(folder)
    if args.reward_funcs is None and controller.config.rewards is not None:
        weights = args.reward_weights or list(controller.config.rewards.values())
        rewards = resolve_rewards(list(controller.config.rewards), weights)
    else:
        rewards = resolve_rewards(args.reward_funcs, args.reward_weights)
    trained_with = folder / LATENCY_ESTIMATOR_FOLDER
    if trained_with.is_dir():
        args.latency_estimator_path = args.latency_estimator_path or str(trained_with)
        args.latency_scope = args.latency_scope or read_latency_estimator(trained_with).latency_scope
    executor = load_executor_from(args, knob_space=controller.knob_space)
    latency_estimator = load_latency_estimator(args, executor)
    controllers = [ControllerPolicy(controller.to(executor.device), executor)]
    if args.guardrail_quantile is not None:
        guardrail = Guardrail(latency_estimator, executor, args.guardrail_quantile)
        controllers.append(ControllerPolicy(controller, executor, "guarded", guardrail))
    skipped_rows = open_skipped_rows(args, args.output_dir)
    samples = read_samples(load_split(args, args.dataset_split, args.max_samples, args.seed, skipped_rows))
    train_samples = read_samples(load_split(args, STATIC_SPLIT, args.max_static_samples, args.seed, skipped_rows))
    store = OutcomeStore(
        args.outcomes_dir or Path(args.output_dir) / "outcomes", executor.fingerprint, executor.knob_space
    )
    outcomes = OutcomeCollector(executor, store, score_answer)

    full_outcomes = outcomes.collect(train_samples, [executor.knob_space.full] * len(train_samples), progress=True)
    full_setting_ms = latency_estimator.latency_ms(full_outcomes).mean().item()
    budgets_ms = args.budgets_ms or [fraction * full_setting_ms for fraction in args.budget_fractions]
    baselines = baseline_policies(
        outcomes, latency_estimator, train_samples, budgets_ms, rewards, args.seed, progress=True
    )
    policies = [*controllers, *baselines]
    rows = sweep_budgets(
        policies, outcomes, latency_estimator, samples, budgets_ms, full_setting_ms, rewards, progress=True
    )
    sweep_to_dataset(rows).to_parquet(output_file)
    plot_sweep(rows, output_file.parent / SWEEP_PICTURE_FILE)
    console = Console()
    if skipped_rows:
        console.print(skipped_rows.summary())
    scope = SCOPE_IN_WORDS[latency_estimator.latency_scope]
    title = f"{len(samples)} samples of {', '.join(args.dataset_names)}; latencies of {scope}"
    console.print(format_sweep_table(rows, title))
    console.print(f"The table is in {output_file}, the picture in {SWEEP_PICTURE_FILE} next to it.")


def make_parser() -> ScriptParser:
    return ScriptParser((SweepArguments,))


if __name__ == "__main__":
    sys.exit(run_script("sweep", make_parser, main))
