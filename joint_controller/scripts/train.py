"""
Trains a controller by GRPO: for each question and latency budget, what to spend.

```bash
joint-controller train --config recipes/easy_vqa/grpo.yaml
```

or, on several devices:

```bash
accelerate launch -m joint_controller.scripts.train --config recipes/easy_vqa/grpo.yaml
```
"""

import copy
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..original_scripts.original_arguments import OriginalArguments, TrainParser
from ..trainer import JointGRPOConfig
from . import run_script
from .data_arguments import DataArguments
from .executor_arguments import ExecutorArguments
from .training_setup import TrainingSetup, set_up_from_executor, set_up_from_results


if TYPE_CHECKING:
    from datasets import Dataset

    from ..controller import JointControllerModel
    from ..evaluation.policies import Policy
    from ..evaluation.sweep import SweepRow
    from ..outcomes import OutcomeCollector
    from ..trainer import JointGRPOTrainer, LatencyBudgetRange


logger = logging.getLogger("joint_controller.train")

LOG_FILE = "joint_controller_training.log"
RESULTS_FILE = "sweep_results.json"

DEFAULT_SWEEP_BUDGET_FRACTIONS = (0.35, 0.5, 0.7, 0.85, 1.0)
NUM_SPREAD_BUDGETS = 5


@dataclass
class TrainArguments(OriginalArguments, ExecutorArguments, DataArguments):
    """
    Arguments of `joint-controller train`, beside those of [`JointGRPOConfig`].
    """

    given: frozenset[str] = field(init=False, default=frozenset())
    """Fields that flags or recipe named."""

    model_path: str | None = field(
        default=None,
        metadata={
            "help": "Executor: a folder or Hub name of a Molmo, or `embedded` for the one that ships. Default: embedded; with "
            "results_dir, none."
        },
    )
    max_static_samples: int = field(
        default=256,
        metadata={
            "help": "Training samples on which every static setting is tried, to find the best one of each budget."
        },
    )
    stage1_inputs: str | None = field(
        default=None,
        metadata={
            "help": "What stage 1 decides the tier from. Default: question_and_budget; without a model_path, budget.",
            "choices": ["question_and_budget", "budget"],
        },
    )
    stage2_inputs: str | None = field(
        default=None,
        metadata={
            "help": "What stage 2 decides top_k and num_blocks from, beside the tier. Default: image_question_and_budget; for "
            "recorded results, what there is of it.",
            "choices": ["image_question_and_budget", "question_and_budget", "budget"],
        },
    )
    precompute_outcomes: bool = field(
        default=False,
        metadata={
            "help": "Answer every training sample at every setting before training. The executor then gets large batches "
            "of one setting, which is faster where training would come across most of these outcomes anyway: few "
            "samples, many epochs, cheap answers."
        },
    )
    outcomes_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of executor outcomes; what it holds is not run again. Default: `outcomes` in the output folder."
        },
    )
    sweep_budget_fractions: list[float] | None = field(
        default=None,
        metadata={
            "help": "Budgets of the table at the end, as fractions of the full setting's latency. Default: 0.35 0.5 0.7 0.85 "
            "1.0; for recorded results, five from the lowest to the highest training budget."
        },
    )

    def __post_init__(self):
        if self.model_path is None and self.results_dir is None:
            self.model_path = "embedded"


def main(script_args: TrainArguments, training_args: JointGRPOConfig):
    import torch
    from accelerate import PartialState
    from transformers import set_seed

    from ..controller import JointControllerConfig, JointControllerModel
    from ..trainer import JointGRPOTrainer
    from ..trainer.latency_budgets import resolve_latency_budgets

    # TRL asks transformers for a property under its old name, at every evaluation.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
    output_dir = Path(training_args.output_dir)
    resume = _resume_from(training_args)
    _check_output_dir(output_dir, resume)
    if script_args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("`device` is 'cuda', but there is no CUDA device here: give `--device cpu`.")
    if script_args.streaming:
        training_args.check_streaming()
        if script_args.precompute_outcomes:
            raise ValueError(
                "`precompute_outcomes` answers all training samples, and a stream has no all: unset one of them."
            )
    is_main_process = PartialState().is_main_process

    def open_output_dir():
        output_dir.mkdir(parents=True, exist_ok=True)
        _log_to_file(output_dir / LOG_FILE, is_main_process)

    # What can be refused is refused before anything is loaded, measured or written.
    from_results = script_args.results_dir is not None
    set_up = set_up_from_results if from_results else set_up_from_executor
    setup = set_up(script_args, training_args, open_output_dir)
    collector, latency_estimator, features = setup.collector, setup.latency_estimator, setup.collector.feature_source

    set_seed(training_args.seed)
    budgets = resolve_latency_budgets(training_args, collector, latency_estimator, setup.train_dataset)
    logger.info(
        "Budgets: %.1f to %.1f ms. Latency: %.1f ms at the full setting, %.1f ms at the cheapest.",
        budgets.minimum_ms,
        budgets.maximum_ms,
        budgets.full_setting_ms,
        budgets.cheapest_setting_ms,
    )
    if script_args.sweep_budget_fractions is None:
        script_args.sweep_budget_fractions = (
            list(_spread_fractions(budgets)) if from_results else list(DEFAULT_SWEEP_BUDGET_FRACTIONS)
        )
    # Recorded outcomes cost nothing to look at: a budget that no setting fits is refused before training.
    baselines = _baselines(script_args, training_args, setup, budgets) if from_results else None
    sizes = {} if features is None else {"question_size": features.hidden_size, "vision_size": features.hidden_size}
    controller = JointControllerModel(
        JointControllerConfig(
            knob_space=collector.knob_space.to_dict(),
            latency_budget_min_ms=budgets.minimum_ms,
            latency_budget_max_ms=budgets.maximum_ms,
            stage1_inputs=setup.stage1_inputs,
            stage2_inputs=setup.stage2_inputs,
            **sizes,
        )
    )
    untrained = copy.deepcopy(controller)
    trainer = JointGRPOTrainer(
        model=controller,
        collector=collector,
        latency_estimator=latency_estimator,
        args=training_args,
        train_dataset=setup.train_dataset,
        eval_dataset=setup.eval_dataset,
        callbacks=[_log_metrics_callback()],
    )
    if script_args.precompute_outcomes:
        _precompute_outcomes(collector, setup.train_dataset)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(output_dir))
    if script_args.streaming and setup.skipped_rows:
        logger.warning(setup.skipped_rows.summary())
    if is_main_process:
        if latency_estimator is not None:
            latency_estimator.save_pretrained(output_dir / "latency_estimator")
        with torch.no_grad():
            if baselines is None:
                baselines = _baselines(script_args, training_args, setup, budgets)
            rows = _sweep(script_args, training_args, setup, trainer, untrained, baselines)
        _report(rows, output_dir, setup)
        if not from_results:
            collector.store.compact()
    PartialState().wait_for_everyone()


def _resume_from(training_args: JointGRPOConfig) -> str | bool:
    """`--resume_from_checkpoint` is a path, or true or false in words."""
    value = training_args.resume_from_checkpoint
    if value is None or str(value).lower() == "false":
        return False
    return True if str(value).lower() == "true" else value


def _check_output_dir(output_dir: Path, resume: str | bool):
    if output_dir.is_file():
        raise ValueError(f"`output_dir` '{output_dir}' is a file: name a folder.")
    if not resume and (output_dir / LOG_FILE).exists():
        raise ValueError(
            f"`output_dir` '{output_dir}' holds another run ({LOG_FILE}): give `--resume_from_checkpoint true` to go on "
            "with it, or name another folder."
        )


def _log_to_file(path: Path, is_main_process: bool):
    handlers: list[logging.Handler] = [logging.StreamHandler()] if is_main_process else []
    if is_main_process:
        handlers.append(logging.FileHandler(path, encoding="utf-8"))
    formatter = logging.Formatter("%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    for handler in handlers:
        handler.setFormatter(formatter)
    logger.handlers = handlers
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _log_metrics_callback():
    from transformers import TrainerCallback

    class LogMetrics(TrainerCallback):
        """Writes every entry of the trainer's log to the log file, as JSON."""

        def on_log(self, args, state, control, logs=None, **kwargs):
            if state.is_world_process_zero:
                for handler in logger.handlers:
                    if isinstance(handler, logging.FileHandler):
                        entry = json.dumps({"step": state.global_step, **logs}, default=float)
                        handler.emit(logger.makeRecord(logger.name, logging.INFO, __file__, 0, entry, (), None))

    return LogMetrics()


def _precompute_outcomes(collector: "OutcomeCollector", train_dataset: "Dataset"):
    """Fills the store; every process answers its share of the samples."""
    from accelerate import PartialState

    from ..data import read_samples

    state = PartialState()
    settings = list(collector.knob_space)
    logger.info("Answering %d training samples at %d settings each.", len(train_dataset), len(settings))
    rows = list(range(state.process_index, len(train_dataset), state.num_processes))
    samples = read_samples(train_dataset.select(rows))
    collector.collect(
        [sample for sample in samples for _ in settings], settings * len(samples), progress=state.is_main_process
    )
    state.wait_for_everyone()
    collector.store.reload()


def _spread_fractions(budgets: "LatencyBudgetRange") -> Iterator[float]:
    """Budgets from the lowest to the highest that are trained on, as fractions of the full setting's latency."""
    step_ms = (budgets.maximum_ms - budgets.minimum_ms) / (NUM_SPREAD_BUDGETS - 1)
    for number in range(NUM_SPREAD_BUDGETS):
        # A hair above: rounding must not put the lowest budget below the latency that it stands for.
        yield (budgets.minimum_ms + number * step_ms) / budgets.full_setting_ms * (1 + 1e-9)


def _baselines(
    script_args: TrainArguments, training_args: JointGRPOConfig, setup: TrainingSetup, budgets: "LatencyBudgetRange"
) -> "list[Policy]":
    from ..data import read_samples, take_rows
    from ..evaluation.sweep import baseline_policies

    logger.info("Trying every static setting on training samples, to find the best one of each budget.")
    return baseline_policies(
        setup.collector,
        setup.latency_estimator,
        read_samples(take_rows(setup.train_dataset, script_args.max_static_samples)),
        [fraction * budgets.full_setting_ms for fraction in script_args.sweep_budget_fractions],
        training_args.reward_weights,
        training_args.seed,
        progress=True,
    )


def _sweep(
    script_args: TrainArguments,
    training_args: JointGRPOConfig,
    setup: TrainingSetup,
    trainer: "JointGRPOTrainer",
    untrained: "JointControllerModel",
    baselines: "list[Policy]",
) -> "list[SweepRow]":
    from ..data import read_samples
    from ..evaluation.policies import ControllerPolicy
    from ..evaluation.sweep import sweep_budgets

    controller = trainer.accelerator.unwrap_model(trainer.model)
    features = setup.collector.feature_source
    policies = [
        ControllerPolicy(controller, features),
        *baselines,
        ControllerPolicy(untrained.to(controller.device), features, "untrained"),
    ]
    logger.info("Evaluating on %d test samples.", len(setup.test_dataset))
    return sweep_budgets(
        policies,
        setup.collector,
        setup.latency_estimator,
        read_samples(setup.test_dataset),
        script_args.sweep_budget_fractions,
        trainer.latency_budgets.full_setting_ms,
        training_args.reward_weights,
        progress=True,
    )


def _report(rows: "list[SweepRow]", output_dir: Path, setup: TrainingSetup):
    from rich.console import Console

    from ..evaluation.sweep import (
        SWEEP_FILE,
        format_sweep_markdown,
        format_sweep_table,
        mean_over_budgets,
        sweep_to_dataset,
    )

    sweep_to_dataset(rows).to_parquet(output_dir / SWEEP_FILE)
    policies = list(dict.fromkeys(row.policy for row in rows))
    mean_rewards = {policy: mean_over_budgets(rows, policy) for policy in policies}
    results = {"eval_reward_mean_over_budgets": mean_rewards, "num_executed": setup.collector.num_executed}
    (output_dir / RESULTS_FILE).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    shown = [row for row in rows if row.policy in ("controller", "best static", "full")]
    for console in (Console(), Console(file=(output_dir / LOG_FILE).open("a", encoding="utf-8"), width=160)):
        console.print(format_sweep_table(shown, f"{rows[0].num_samples} test samples by latency budget"))
        console.print(
            "Mean reward over budgets: " + ", ".join(f"{name} {value:.3f}" for name, value in mean_rewards.items())
        )
    (output_dir / "README.md").write_text(_model_card(format_sweep_markdown(rows), setup), encoding="utf-8")
    logger.info("Controller, log, outcomes and sweep are in %s.", output_dir)


def _model_card(sweep_table: str, setup: TrainingSetup) -> str:
    latencies = "as they were recorded" if setup.latency_estimator is None else "estimates"
    return f"""---
library_name: joint-controller
pipeline_tag: visual-question-answering
tags:
- joint-controller
- grpo
---

# Controller for {setup.source}

Sets three knobs of a frozen Molmo (image tier, experts per token, blocks that run) for each question, so that the answer
is as good as its latency budget allows. Trained by GRPO on {", ".join(setup.dataset_names)}.

Latencies are {latencies}, at batch 1. The best static setting of each budget was chosen on training samples.

{sweep_table}
"""


def make_parser() -> TrainParser:
    return TrainParser((TrainArguments, JointGRPOConfig))


if __name__ == "__main__":
    sys.exit(run_script("train", make_parser, main))
