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
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..trainer import JointGRPOConfig
from . import ScriptParser, run_script
from .data_arguments import DataArguments, load_data_splits, open_skipped_rows
from .executor_arguments import FIT, ExecutorArguments, load_executor, load_latency_estimator


if TYPE_CHECKING:
    from datasets import Dataset

    from ..controller import JointControllerModel
    from ..evaluation.sweep import SweepRow
    from ..executor import MolmoExecutor
    from ..latency import LatencyEstimatorModel
    from ..outcomes import OutcomeCollector
    from ..trainer import JointGRPOTrainer


logger = logging.getLogger("joint_controller.train")

LOG_FILE = "joint_controller_training.log"
RESULTS_FILE = "sweep_results.json"

NUM_PROFILED_INPUTS = 12
"""Training samples that `--latency_estimator_path fit` measures with."""


@dataclass
class TrainArguments(ExecutorArguments, DataArguments):
    """
    Arguments of `joint-controller train`, beside those of [`JointGRPOConfig`].
    """

    max_static_samples: int = field(
        default=256,
        metadata={
            "help": "Training samples on which every static setting is tried, to find the best one of each budget."
        },
    )
    stage1_inputs: str = field(
        default="question_and_budget",
        metadata={
            "help": "What stage 1 decides the tier from.",
            "choices": ["question_and_budget", "budget"],
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
    sweep_budget_fractions: list[float] = field(
        default_factory=lambda: [0.35, 0.5, 0.7, 0.85, 1.0],
        metadata={"help": "Budgets of the table at the end, as fractions of the full setting's latency."},
    )


def main(script_args: TrainArguments, training_args: JointGRPOConfig):
    import torch
    from accelerate import PartialState
    from transformers import set_seed

    from ..controller import JointControllerConfig, JointControllerModel
    from ..evaluation.scoring import score_answer
    from ..outcomes import OutcomeCollector, OutcomeStore
    from ..trainer import JointGRPOTrainer
    from ..trainer.latency_budgets import resolve_latency_budgets

    # TRL asks transformers for a property under its old name, at every evaluation.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
    output_dir = Path(training_args.output_dir)
    resume = _resume_from(training_args)
    _check_output_dir(output_dir, resume)
    if script_args.streaming:
        training_args.check_streaming()
        if script_args.precompute_outcomes:
            raise ValueError(
                "`precompute_outcomes` answers all training samples, and a stream has no all: unset one of them."
            )
    # What can be refused is refused before anything is loaded, measured or written.
    executor = load_executor(script_args)
    skipped_rows = open_skipped_rows(script_args, output_dir)
    train_dataset, eval_dataset, test_dataset = load_data_splits(script_args, training_args.seed, skipped_rows)
    output_dir.mkdir(parents=True, exist_ok=True)
    is_main_process = PartialState().is_main_process
    _log_to_file(output_dir / LOG_FILE, is_main_process)
    logger.info(
        "Executor %s on %s: %d settings. Samples: %s train, %d validation, %d test.",
        script_args.model_path,
        executor.device,
        len(executor.knob_space),
        "a stream to" if script_args.streaming else len(train_dataset),
        len(eval_dataset),
        len(test_dataset),
    )
    if skipped_rows:
        logger.warning(skipped_rows.summary())
    if script_args.latency_estimator_path == FIT:
        latency_estimator = _fit_latency_estimator(executor, train_dataset, output_dir / "latency_estimator")
    else:
        latency_estimator = load_latency_estimator(script_args, executor)
    store = OutcomeStore(script_args.outcomes_dir or output_dir / "outcomes", executor.fingerprint)
    if len(store):
        logger.info("%d outcomes are known and will not be computed again.", len(store))
    collector = OutcomeCollector(executor, store, score=score_answer)

    set_seed(training_args.seed)
    budgets = resolve_latency_budgets(training_args, collector, latency_estimator, train_dataset)
    logger.info(
        "Budgets: %.1f to %.1f ms. Estimated latency: %.1f ms at the full setting, %.1f ms at the cheapest.",
        budgets.minimum_ms,
        budgets.maximum_ms,
        budgets.full_setting_ms,
        budgets.cheapest_setting_ms,
    )
    controller = JointControllerModel(
        JointControllerConfig(
            knob_space=executor.knob_space.to_dict(),
            question_size=executor.hidden_size,
            vision_size=executor.hidden_size,
            latency_budget_min_ms=budgets.minimum_ms,
            latency_budget_max_ms=budgets.maximum_ms,
            stage1_inputs=script_args.stage1_inputs,
        )
    )
    untrained = copy.deepcopy(controller)
    trainer = JointGRPOTrainer(
        model=controller,
        collector=collector,
        latency_estimator=latency_estimator,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        callbacks=[_log_metrics_callback()],
    )
    if script_args.precompute_outcomes:
        _precompute_outcomes(collector, train_dataset)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(output_dir))
    if script_args.streaming and skipped_rows:
        logger.warning(skipped_rows.summary())
    if is_main_process:
        latency_estimator.save_pretrained(output_dir / "latency_estimator")
        with torch.no_grad():
            rows = _sweep(script_args, training_args, trainer, untrained, train_dataset, test_dataset)
        _report(rows, output_dir, collector, script_args)
        store.compact()
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


def _fit_latency_estimator(
    executor: "MolmoExecutor", train_dataset: "Dataset", folder: Path
) -> "LatencyEstimatorModel":
    """Measures this machine and fits an estimator; a resumed run goes on with the latencies that it began with."""
    from ..data import take_rows
    from ..latency import LatencyEstimatorModel, fit_latency_estimator
    from ..latency.profiling import profile_executor

    if not (folder / "config.json").exists():
        logger.info("Measuring the executor on this machine to fit a latency estimator.")
        inputs = take_rows(train_dataset, NUM_PROFILED_INPUTS)
        estimator, report = fit_latency_estimator(profile_executor(executor, inputs, time_limit_s=45))
        errors = {stage: 100 * report[stage]["mape"] for stage in ("prefill", "decode")}
        logger.info("Held-out error of the estimator: prefill %(prefill).1f %%, decode %(decode).1f %%.", errors)
        if max(errors.values()) > 20:
            logger.warning("That is a lot: is the machine busy with something else?")
        estimator.save_pretrained(folder)
    estimator = LatencyEstimatorModel.from_pretrained(folder)
    estimator.check_executor(executor.model.config)
    return estimator


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

    state = PartialState()
    settings = list(collector.executor.knob_space)
    logger.info("Answering %d training samples at %d settings each.", len(train_dataset), len(settings))
    rows = list(range(state.process_index, len(train_dataset), state.num_processes))
    samples = [train_dataset[row] for row in rows]
    collector.collect(
        [sample for sample in samples for _ in settings], settings * len(samples), progress=state.is_main_process
    )
    state.wait_for_everyone()
    collector.store.reload()


def _sweep(
    script_args: TrainArguments,
    training_args: JointGRPOConfig,
    trainer: "JointGRPOTrainer",
    untrained: "JointControllerModel",
    train_dataset: "Dataset",
    test_dataset: "Dataset",
) -> "list[SweepRow]":
    from ..data import take_rows
    from ..evaluation.policies import ControllerPolicy
    from ..evaluation.sweep import baseline_policies, sweep_budgets

    executor = trainer.collector.executor
    controller = trainer.accelerator.unwrap_model(trainer.model)
    full_setting_ms = trainer.latency_budgets.full_setting_ms
    common = (trainer.collector, trainer.latency_estimator)
    logger.info("Trying every static setting on training samples, to find the best one of each budget.")
    static_samples = list(take_rows(train_dataset, script_args.max_static_samples))
    baselines = baseline_policies(
        *common,
        static_samples,
        [fraction * full_setting_ms for fraction in script_args.sweep_budget_fractions],
        training_args.reward_weights,
        training_args.seed,
        progress=True,
    )
    policies = [
        ControllerPolicy(controller, executor),
        *baselines,
        ControllerPolicy(untrained.to(controller.device), executor, "untrained"),
    ]
    logger.info("Evaluating on %d test samples.", len(test_dataset))
    return sweep_budgets(
        policies,
        *common,
        list(test_dataset),
        script_args.sweep_budget_fractions,
        full_setting_ms,
        training_args.reward_weights,
        progress=True,
    )


def _report(rows: "list[SweepRow]", output_dir: Path, collector: "OutcomeCollector", script_args: TrainArguments):
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
    results = {"eval_reward_mean_over_budgets": mean_rewards, "num_executed": collector.num_executed}
    (output_dir / RESULTS_FILE).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    shown = [row for row in rows if row.policy in ("controller", "best static", "full")]
    for console in (Console(), Console(file=(output_dir / LOG_FILE).open("a", encoding="utf-8"), width=160)):
        console.print(format_sweep_table(shown, f"{rows[0].num_samples} test samples by latency budget"))
        console.print(
            "Mean reward over budgets: " + ", ".join(f"{name} {value:.3f}" for name, value in mean_rewards.items())
        )
    (output_dir / "README.md").write_text(_model_card(format_sweep_markdown(rows), script_args), encoding="utf-8")
    logger.info("Controller, log, outcomes and sweep are in %s.", output_dir)


def _model_card(sweep_table: str, script_args: TrainArguments) -> str:
    return f"""---
library_name: joint-controller
pipeline_tag: visual-question-answering
tags:
- joint-controller
- grpo
---

# Controller for `{script_args.model_path}`

Sets three knobs of a frozen Molmo (image tier, experts per token, blocks that run) for each question, so that the answer
is as good as its latency budget allows. Trained by GRPO on {", ".join(script_args.dataset_names)}.

Latencies are estimates at batch 1. The best static setting of each budget was chosen on training samples.

{sweep_table}
"""


def make_parser() -> ScriptParser:
    return ScriptParser((TrainArguments, JointGRPOConfig))


if __name__ == "__main__":
    sys.exit(run_script("train", make_parser, main))
