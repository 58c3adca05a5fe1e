"""
Trains a controller by GRPO: for each question and latency budget, what to spend.

```bash
joint-controller train --config recipes/easy_vqa/train.yaml
```

or, on several devices:

```bash
accelerate launch -m joint_controller.scripts.train --config recipes/easy_vqa/train.yaml
```
"""

import copy
import json
import logging
import math
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from transformers.hf_argparser import HfArg

from ..original_scripts.arguments import OriginalArguments, TrainParser
from ..rewards import DEFAULT_TIME_PRICE, OBJECTIVES
from ..trainer import JointGRPOConfig
from . import run_script
from .data_arguments import DataArguments, check_splits
from .executor_arguments import ExecutorArguments
from .training_setup import TrainingSetup, set_up_from_executor


if TYPE_CHECKING:
    from collections.abc import Mapping

    from datasets import Dataset

    from ..controller import JointControllerModel
    from ..evaluation.policies import Policy
    from ..outcomes import OutcomeSource
    from ..rewards import RewardFunction
    from ..trainer import JointGRPOTrainer, LatencyBudgetRange


logger = logging.getLogger("joint_controller.train")

LOG_FILE = "joint_controller_training.log"
RESULTS_FILE = "sweep_results.json"

DEFAULT_SWEEP_BUDGET_FRACTIONS = (0.35, 0.5, 0.7, 0.85, 1.0)
NUM_SPREAD_BUDGETS = 5


@dataclass
class TrainArguments(ExecutorArguments, DataArguments):
    """
    Arguments of `joint-controller train`, besides those of [`JointGRPOConfig`].
    """

    model_path: str | None = HfArg(
        default=None,
        help="Executor: a folder or Hub name of a model, or `embedded` for the one that ships. Default: embedded; with "
        "results_dir, none.",
    )
    max_static_samples: int = HfArg(
        default=256,
        help="Training samples on which every static setting is tried, to find the best one of each budget.",
    )
    stage1_inputs: str | None = HfArg(
        default=None,
        help="What stage 1 decides its knobs from. Default: question_and_budget; without a model_path, budget.",
        metadata={"choices": ["question_and_budget", "budget"]},
    )
    stage2_inputs: str | None = HfArg(
        default=None,
        help="What stage 2 decides its knobs from, besides the choice of stage 1. Default: image_question_and_budget; for "
        "recorded results, what there is of it.",
        metadata={"choices": ["image_question_and_budget", "question_and_budget", "budget"]},
    )
    heads: str | None = HfArg(
        default=None,
        help="How stage 2 scores combinations of its knobs' values: each on its own (joint), or as the sum of a score for each "
        "value (independent). Default: joint; with results_dir, independent.",
        metadata={"choices": ["joint", "independent"]},
    )
    mask: bool | None = HfArg(
        default=None,
        help="Whether settings that are predicted not to fit a request are out, in training and in the table at the end, and the "
        "controller sees how much of the budget each setting would leave. Default: true; with results_dir, false.",
    )
    precompute_outcomes: bool = HfArg(
        default=False,
        help="Answer every training sample at every setting before training. The executor then gets large batches of one "
        "setting, which is faster where training would come across most of these outcomes anyway: few samples, many "
        "epochs, cheap answers.",
    )
    outcomes_dir: str | None = HfArg(
        default=None,
        help="Folder of executor outcomes; what it holds is not run again. Default: `outcomes` in the output folder.",
    )
    known_outcomes: list[str] | None = HfArg(
        default=None,
        help="Further folders of executor outcomes that are looked up but not written to, or names of those that ship: "
        "`embedded`, the training samples of recipes/easy_vqa/train.yaml at all settings. Those of another executor are not used.",
    )
    objective: str | None = HfArg(
        default=None,
        help="What is maximised: accuracy_within_budget, or original, the five terms of the original scripts. Default: "
        "accuracy_within_budget; with results_dir, original.",
        metadata={"choices": list(OBJECTIVES)},
    )
    time_price: float | None = HfArg(
        default=None,
        help="With accuracy_within_budget: accuracy that may be given up to save the time of the whole budget (0: none). "
        f"Default: {DEFAULT_TIME_PRICE}.",
    )
    reward_funcs: list[str] | None = HfArg(
        default=None,
        help="Reward functions in place of an objective: names of this package's, or dotted paths of TRL reward functions "
        "(my_package.rewards.short_answer). `reward_weights` has a weight for each.",
    )
    sweep_budget_fractions: list[float] | None = HfArg(
        default=None,
        help="Budgets of the table at the end, as fractions of the full setting's latency. Default: 0.35 0.5 0.7 0.85 "
        "1.0; for recorded results, five from the lowest to the highest training budget.",
    )

    def __post_init__(self):
        if self.max_static_samples < 1:
            raise ValueError(f"`max_static_samples` is {self.max_static_samples}: give 1 or more.")
        fractions = self.sweep_budget_fractions
        if fractions is not None and not (fractions and all(0 < one < math.inf for one in fractions)):
            raise ValueError(f"`sweep_budget_fractions` is {fractions}: give one or more finite numbers above 0.")


def main(script_args: TrainArguments, training_args: JointGRPOConfig, original_args: OriginalArguments):
    import torch
    from accelerate import PartialState
    from transformers import PrinterCallback, ProgressCallback, set_seed

    from ..controller import JointControllerConfig, JointControllerModel
    from ..executor import EMBEDDED
    from ..latency import Guardrail
    from ..latency.guardrail import TYPICAL_QUANTILE
    from ..latency.latency_estimator import SCOPE_IN_WORDS
    from ..rewards import resolve_rewards, reward_names
    from ..trainer import JointGRPOTrainer
    from ..trainer.latency_budgets import resolve_latency_budgets
    from .training_console import MetricsLog, TrainingConsole

    # TRL asks transformers for a property under its old name, at every evaluation.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
    output_dir = Path(training_args.output_dir)
    resume = _resume_from(training_args)
    _check_output_dir(output_dir, resume)
    if original_args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("`device` is 'cuda', but there is no CUDA device here: give `--device cpu`.")
    if script_args.reward_funcs is None and script_args.objective is None and original_args.results_dir is not None:
        script_args.objective = "original"
    rewards = resolve_rewards(
        script_args.reward_funcs, training_args.reward_weights, script_args.objective, script_args.time_price
    )
    training_args.reward_weights = list(rewards.values())
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
    if original_args.results_dir is not None:
        from ..original_scripts.training import set_up_from_results

        setup = set_up_from_results(script_args, training_args, original_args, open_output_dir)
    else:
        check_splits(script_args)
        script_args.model_path = script_args.model_path or EMBEDDED
        setup = set_up_from_executor(script_args, training_args, open_output_dir)
    outcomes, latency_estimator = setup.outcomes, setup.latency_estimator

    set_seed(training_args.seed)
    budgets = resolve_latency_budgets(training_args, outcomes, latency_estimator, setup.train_dataset)
    logger.info(
        "Latencies are those of %s. Budgets: %.1f to %.1f ms. Latency: %.1f ms at the full setting, %.1f ms at the cheapest.",
        SCOPE_IN_WORDS[latency_estimator.latency_scope],
        budgets.minimum_ms,
        budgets.maximum_ms,
        budgets.full_setting_ms,
        budgets.cheapest_setting_ms,
    )
    budgets_ms = _sweep_budgets(script_args.sweep_budget_fractions, budgets, setup)
    baselines = None
    if setup.outcomes_are_known:
        # Outcomes cost nothing to look at: a budget that no setting fits is refused before training.
        baselines = _baselines(script_args, training_args, setup, budgets_ms, rewards)
    guardrail = None
    if setup.mask:
        guardrail = Guardrail(latency_estimator, outcomes.executor, TYPICAL_QUANTILE)
    features = outcomes.features
    sizes = {} if features is None else {name: getattr(features, name) for name in ("question_size", "vision_size")}
    controller = JointControllerModel(
        JointControllerConfig(
            knob_space=outcomes.knob_space.to_dict(),
            latency_budget_min_ms=budgets.minimum_ms,
            latency_budget_max_ms=budgets.maximum_ms,
            stage1_inputs=setup.stage1_inputs,
            stage2_inputs=setup.stage2_inputs,
            heads=setup.heads,
            sees_slack=setup.mask,
            training_seed=training_args.seed,
            max_new_tokens=setup.max_new_tokens,
            rewards=reward_names(rewards),
            **sizes,
        )
    )
    untrained = copy.deepcopy(controller)
    trainer = JointGRPOTrainer(
        model=controller,
        outcomes=outcomes,
        latency_estimator=latency_estimator,
        args=training_args,
        train_dataset=setup.train_dataset,
        eval_dataset=setup.eval_dataset,
        reward_funcs=list(rewards),
        latency_budgets=budgets,
        guardrail=guardrail,
        callbacks=[MetricsLog(logger)],
    )
    # In place of raw dictionaries between broken progress bars.
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(TrainingConsole(trainer))
    if script_args.precompute_outcomes:
        precompute_outcomes(outcomes, setup.train_dataset)
    trainer.train(resume_from_checkpoint=resume)
    # Not pushed to the Hub before there are results to show.
    trainer.save_model(str(output_dir), _internal_call=True)
    if script_args.streaming and setup.skipped_rows:
        logger.warning(setup.skipped_rows.summary())
    if is_main_process:
        with torch.no_grad():
            if baselines is None:
                baselines = _baselines(script_args, training_args, setup, budgets_ms, rewards)
            rows = _sweep(setup, trainer, untrained, baselines, budgets_ms, rewards)
        _report(rows, output_dir, setup, trainer)
        outcomes.finish()
    PartialState().wait_for_everyone()
    if training_args.push_to_hub:
        trainer.push_to_hub()


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


def precompute_outcomes(outcomes: "OutcomeSource", train_dataset: "Dataset"):
    """Fills the store; every process answers its share of the samples."""
    from ..data import read_samples
    from ..outcomes import collect_shares

    settings = list(outcomes.knob_space)
    logger.info("Answering %d training samples at %d settings each.", len(train_dataset), len(settings))
    samples = read_samples(train_dataset)
    every_sample = [sample for sample in samples for _ in settings]
    collect_shares(outcomes, every_sample, settings * len(samples), progress=True)


def _sweep_budgets(
    fractions: Sequence[float] | None, budgets: "LatencyBudgetRange", setup: TrainingSetup
) -> list[float]:
    """Budgets of the table at the end, in ms."""
    if fractions is None and setup.outcomes_are_known:
        # From the lowest to the highest that are trained on, so that all can be met.
        step_ms = (budgets.maximum_ms - budgets.minimum_ms) / (NUM_SPREAD_BUDGETS - 1)
        return [budgets.minimum_ms + number * step_ms for number in range(NUM_SPREAD_BUDGETS)]
    fractions = DEFAULT_SWEEP_BUDGET_FRACTIONS if fractions is None else fractions
    return [fraction * budgets.full_setting_ms for fraction in fractions]


def _baselines(
    script_args: TrainArguments,
    training_args: JointGRPOConfig,
    setup: TrainingSetup,
    budgets_ms: Sequence[float],
    rewards: "Mapping[RewardFunction, float]",
) -> "list[Policy]":
    from ..data import read_samples, take_rows
    from ..evaluation.baselines import KnownOutcomes, PredictedLatencies, TrainingOutcomes
    from ..evaluation.sweep import baseline_policies
    from ..latency import Guardrail
    from ..latency.guardrail import TYPICAL_QUANTILE

    outcomes, latency_estimator = setup.outcomes, setup.latency_estimator
    if setup.outcomes_are_known:
        forecast = KnownOutcomes(outcomes, latency_estimator)
    else:
        # Typical latencies, as those that the table at the end judges by.
        forecast = PredictedLatencies(Guardrail(latency_estimator, outcomes.executor, TYPICAL_QUANTILE))
    logger.info("Trying every static setting on training samples, to find the best one of each budget.")
    samples = read_samples(take_rows(setup.train_dataset, script_args.max_static_samples))
    training = TrainingOutcomes.collect(outcomes, latency_estimator, samples, rewards, forecast, progress=True)
    # Where each is answered on all test samples, some are left to `joint-controller sweep`.
    names = None if setup.outcomes_are_known else ["full", "static", "static by reward", "fits"]
    return baseline_policies(training, outcomes.knob_space, budgets_ms, names, forecast, seed=training_args.seed)


def _sweep(
    setup: TrainingSetup,
    trainer: "JointGRPOTrainer",
    untrained: "JointControllerModel",
    baselines: "list[Policy]",
    budgets_ms: Sequence[float],
    rewards: "Mapping[RewardFunction, float]",
) -> "Dataset":
    from ..data import read_samples
    from ..evaluation.baselines import FitsPolicy, PredictedLatencies
    from ..evaluation.policies import ControllerPolicy
    from ..evaluation.request_table import NOT_TRAINED
    from ..evaluation.sweep import sweep_budgets

    controller = trainer.accelerator.unwrap_model(trainer.model)
    features = trainer.features
    forecast = next((policy.forecast for policy in baselines if isinstance(policy, FitsPolicy)), None)
    seed = trainer.args.seed
    guardrail = forecast.guardrail if isinstance(forecast, PredictedLatencies) and setup.mask else None
    trained = [ControllerPolicy(controller, features, guardrail=guardrail)]
    policies = [*trained, *baselines]
    if setup.outcomes_are_known:
        policies.append(ControllerPolicy(untrained.to(controller.device), features, "untrained", guardrail))
    logger.info("Evaluating on %d test samples.", len(setup.test_dataset))
    return sweep_budgets(
        policies,
        setup.outcomes,
        setup.latency_estimator,
        read_samples(setup.test_dataset),
        budgets_ms,
        trainer.latency_budgets.full_setting_ms,
        rewards,
        [seed] * len(trained) + [NOT_TRAINED] * (len(policies) - len(trained)),
        forecast,
        progress=True,
    )


def _report(requests: "Dataset", output_dir: Path, setup: TrainingSetup, trainer: "JointGRPOTrainer"):
    from rich.console import Console

    from ..data import read_samples
    from ..evaluation.plots import plot_sweep_pictures
    from ..evaluation.request_table import REQUESTS_FILE, write_request_table
    from ..evaluation.summary import (
        format_headline_markdown,
        format_summary_markdown,
        format_summary_table,
        mean_over_budgets,
        summarize,
        write_summary,
    )
    from ..latency.latency_estimator import SCOPE_IN_WORDS
    from ..trainer.model_card import format_model_card

    write_request_table(requests, output_dir / REQUESTS_FILE)
    summary = summarize(requests)
    write_summary(summary, output_dir)
    # Recorded results may be without images.
    with_images = [sample for sample in read_samples(setup.test_dataset) if sample.image_id is not None]
    pictures = plot_sweep_pictures(requests, output_dir, with_images or None)
    policies = list(dict.fromkeys(summary["policy"]))
    mean_rewards = {policy: mean_over_budgets(summary, "reward", policy) for policy in policies}
    results = {"eval_reward_mean_over_budgets": mean_rewards, "num_executed": setup.outcomes.num_executed}
    (output_dir / RESULTS_FILE).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    title = f"{summary[0]['num_samples']} test samples by latency budget"
    shown = ["controller", "static", "full"]
    with (output_dir / LOG_FILE).open("a", encoding="utf-8") as log:
        for console in (Console(), Console(file=log, width=160)):
            console.print(format_summary_table(summary, title, shown))
            console.print(
                "Accuracy ± half of its 95 % interval. static: the most accurate fixed setting that keeps the budget. saved: of its "
                "mean latency.",
                highlight=False,
            )
            console.print(
                "Mean reward over budgets: " + ", ".join(f"{name} {value:.3f}" for name, value in mean_rewards.items())
            )
    shown_pictures = "\n".join(
        f"![{Path(picture).stem.replace('_', ' ')}]({Path(picture).relative_to(output_dir).as_posix()})"
        for picture in pictures
        if Path(picture).suffix == ".png"
    )
    trainer.model_card = format_model_card(
        setup.outcomes.knob_space,
        setup.source,
        setup.dataset_names,
        f"those of {SCOPE_IN_WORDS[setup.latency_estimator.latency_scope]}, {setup.latencies}",
        "`static` is the fixed setting with the best accuracy on training samples among those that exceed the budget on at most "
        "1 % of them. Accuracy within the budget, and the latency at which `static` would be as accurate:\n\n"
        f"{format_headline_markdown(summary)}\n\n"
        f"All policies, with 95 % intervals over images:\n\n{format_summary_markdown(summary)}\n\n{shown_pictures}",
    )
    trainer.create_model_card()
    logger.info("Controller, log, outcomes and sweep are in %s.", output_dir)


def make_parser() -> TrainParser:
    return TrainParser((TrainArguments, JointGRPOConfig, OriginalArguments))


if __name__ == "__main__":
    sys.exit(run_script("train", make_parser, main))
