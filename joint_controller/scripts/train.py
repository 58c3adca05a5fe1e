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
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..trainer import JointGRPOConfig
from . import ScriptParser, run_script


if TYPE_CHECKING:
    from datasets import Dataset

    from ..evaluation.sweep import SweepRow
    from ..executor import MolmoExecutor
    from ..latency import LatencyEstimatorModel
    from ..outcomes import OutcomeCollector
    from ..trainer import JointGRPOTrainer


logger = logging.getLogger("joint_controller.train")

LOG_FILE = "joint_controller_training.log"
SWEEP_FILE = "sweep.parquet"
RESULTS_FILE = "sweep_results.json"


@dataclass
class TrainArguments:
    """
    Arguments of `joint-controller train`, beside those of [`JointGRPOConfig`].
    """

    model_path: str = field(
        default="embedded",
        metadata={"help": "Executor: a folder or Hub name of a Molmo, or `embedded` for the one that ships."},
    )
    importance_path: str | None = field(
        default=None,
        metadata={
            "help": "JSON of block importance scores. By default importance.json in the model folder; without one, the "
            "first blocks run."
        },
    )
    latency_estimator_path: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub name of a latency estimator; `fit` measures the executor on this machine and fits one "
            "first (about a minute). By default the one that ships for the embedded executor, which was measured on two "
            "CPU cores."
        },
    )
    dataset_names: list[str] = field(
        default_factory=lambda: ["easy_vqa", "scenes"],
        metadata={"help": "Data sets: `easy_vqa`, `scenes`, a folder or Parquet files."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Training samples in all. Default: all."})
    max_eval_samples: int | None = field(
        default=None,
        metadata={"help": "Validation samples in all, on which the best controller is chosen. Default: all."},
    )
    max_test_samples: int | None = field(
        default=None, metadata={"help": "Test samples in all, for the table at the end. Default: all."}
    )
    max_static_samples: int = field(
        default=256,
        metadata={
            "help": "Training samples on which every static setting is tried, to find the best one of each budget."
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
    executor_batch_size: int = field(default=32, metadata={"help": "Most requests that the executor answers at once."})
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
    from ..data import load_vqa_datasets
    from ..evaluation.vqa_accuracy.vqa_accuracy import vqa_score
    from ..outcomes import OutcomeCollector, OutcomeStore
    from ..trainer import JointGRPOTrainer
    from ..trainer.latency_budgets import resolve_latency_budgets

    output_dir = Path(training_args.output_dir)
    resume = _resume_from(training_args)
    _check_output_dir(output_dir, resume)
    # What can be refused is refused before anything is loaded, measured or written.
    executor = _load_executor(script_args)
    train_dataset, eval_dataset, test_dataset = (
        load_vqa_datasets(script_args.dataset_names, split, max_samples, training_args.seed)
        for split, max_samples in (
            ("train", script_args.max_train_samples),
            ("validation", script_args.max_eval_samples),
            ("test", script_args.max_test_samples),
        )
    )
    output_dir.mkdir(parents=True, exist_ok=True)
    is_main_process = PartialState().is_main_process
    _log_to_file(output_dir / LOG_FILE, is_main_process)
    logger.info(
        "Executor %s on %s: %d settings. Samples: %d train, %d validation, %d test.",
        script_args.model_path,
        executor.device,
        len(executor.knob_space),
        len(train_dataset),
        len(eval_dataset),
        len(test_dataset),
    )
    latency_estimator = _load_latency_estimator(script_args, executor, train_dataset, output_dir)
    store = OutcomeStore(script_args.outcomes_dir or output_dir / "outcomes", executor.fingerprint)
    if len(store):
        logger.info("%d outcomes are known and will not be computed again.", len(store))
    collector = OutcomeCollector(executor, store, score=vqa_score)

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


def _load_executor(script_args: TrainArguments) -> "MolmoExecutor":
    from ..executor import MolmoExecutor
    from ..knobs import DEFAULT_TIER_CROPS, KnobSpace

    executor = MolmoExecutor.from_pretrained(
        script_args.model_path,
        importance=script_args.importance_path,
        max_new_tokens=script_args.max_new_tokens,
        batch_size=script_args.executor_batch_size,
    )
    tier_crops = None
    if script_args.tiers is not None:
        known = {**DEFAULT_TIER_CROPS, **executor.knob_space.tier_crops}
        unknown = [tier for tier in script_args.tiers if tier not in known]
        if unknown:
            raise ValueError(f"knob `tier` has unknown values {unknown}: choose from {list(known)}.")
        tier_crops = {tier: known[tier] for tier in script_args.tiers}
    executor.knob_space = KnobSpace.from_executor_config(
        executor.model.config, tier_crops, script_args.top_k_values, script_args.num_blocks_values
    )
    return executor


def _load_latency_estimator(
    script_args: TrainArguments, executor: "MolmoExecutor", train_dataset: "Dataset", output_dir: Path
) -> "LatencyEstimatorModel":
    from ..latency import LatencyEstimatorModel, embedded_latency_estimator_path, fit_latency_estimator
    from ..latency.profiling import profile_executor

    path = script_args.latency_estimator_path
    if path == "fit":
        fitted = output_dir / "latency_estimator"
        if (fitted / "config.json").exists():  # a resumed run goes on with the latencies that it began with
            path = fitted
        else:
            logger.info("Measuring the executor on this machine to fit a latency estimator.")
            profile = profile_executor(executor, train_dataset, time_limit_s=45)
            estimator, report = fit_latency_estimator(profile)
            logger.info(
                "Held-out error of the latency estimator: prefill %.1f %%, decode %.1f %%.",
                100 * report["prefill"]["mape"],
                100 * report["decode"]["mape"],
            )
            estimator.save_pretrained(fitted)
            return estimator
    elif path is None:
        if script_args.model_path != "embedded":
            raise ValueError(
                f"no latency estimator for the executor '{script_args.model_path}': give `--latency_estimator_path fit` "
                "to measure this machine first, or the folder of an estimator."
            )
        path = embedded_latency_estimator_path()
    elif not Path(path).is_dir() and "/" not in str(path):
        raise FileNotFoundError(
            f"`latency_estimator_path` '{path}' does not exist: give the folder of an estimator, or `fit`."
        )
    estimator = LatencyEstimatorModel.from_pretrained(path)
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
    untrained,
    train_dataset: "Dataset",
    test_dataset: "Dataset",
) -> "list[SweepRow]":
    from ..evaluation.policies import ControllerPolicy, RandomPolicy, StaticPolicy
    from ..evaluation.sweep import StaticSettings, sweep_budgets

    collector, latency_estimator = trainer.collector, trainer.latency_estimator
    full_setting_ms = trainer.latency_budgets.full_setting_ms
    budgets = [fraction * full_setting_ms for fraction in script_args.sweep_budget_fractions]
    weights = training_args.reward_weights
    logger.info("Trying every static setting on training samples, to find the best one of each budget.")
    static_samples = list(train_dataset.select(range(min(script_args.max_static_samples, len(train_dataset)))))
    static_settings = StaticSettings(collector, latency_estimator, static_samples, weights, progress=True)
    best_static = {budget: static_settings.best(budget) for budget in budgets}
    executor = collector.executor
    controller = trainer.accelerator.unwrap_model(trainer.model)
    policies = [
        ControllerPolicy(controller, executor),
        StaticPolicy(best_static, "best static"),
        StaticPolicy(executor.knob_space.full, "full"),
        ControllerPolicy(untrained.to(controller.device), executor, "untrained"),
        RandomPolicy(executor.knob_space, training_args.seed),
    ]
    logger.info("Evaluating on %d test samples.", len(test_dataset))
    return sweep_budgets(
        policies,
        collector,
        latency_estimator,
        list(test_dataset),
        script_args.sweep_budget_fractions,
        full_setting_ms,
        weights,
        progress=True,
    )


def _report(rows: "list[SweepRow]", output_dir: Path, collector: "OutcomeCollector", script_args: TrainArguments):
    from rich.console import Console

    from ..evaluation.sweep import format_sweep_markdown, format_sweep_table, mean_over_budgets, sweep_to_dataset

    sweep_to_dataset(rows).to_parquet(output_dir / SWEEP_FILE)
    policies = list(dict.fromkeys(row.policy for row in rows))
    mean_rewards = {policy: mean_over_budgets(rows, policy) for policy in policies}
    results = {"eval_reward_mean_over_budgets": mean_rewards, "num_executed": collector.num_executed}
    (output_dir / RESULTS_FILE).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    shown = [row for row in rows if row.policy in ("controller", "best static", "full")]
    for console in (Console(), Console(file=(output_dir / LOG_FILE).open("a", encoding="utf-8"), width=160)):
        console.print(format_sweep_table(shown, f"{rows[0].num_samples} test samples under five latency budgets"))
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
