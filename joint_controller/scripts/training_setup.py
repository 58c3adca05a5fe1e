"""What a controller is trained on: outcomes, latencies and samples."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from datasets import Dataset, IterableDataset

from ..data import SkippedRows, take_rows
from ..evaluation.scoring import score_answer
from ..executor import REQUEST_SCOPE, Executor
from ..latency import LatencyEstimator, LatencyEstimatorModel, fit_latency_estimator
from ..latency.profiling import profile_executor
from ..outcomes import OutcomeCollector, OutcomeSource, OutcomeStore
from ..trainer import JointGRPOConfig
from .data_arguments import load_data_splits, open_skipped_rows
from .executor_arguments import FIT, load_executor_from, load_latency_estimator


if TYPE_CHECKING:
    from .train import TrainArguments


logger = logging.getLogger("joint_controller.train")

NUM_PROFILED_INPUTS = 12
"""Training samples that `--latency_estimator_path fit` measures with."""

LARGE_ERROR = 0.2
"""Relative error of a latency estimator that is worth a warning."""


@dataclass
class TrainingSetup:
    """What a controller is trained on."""

    outcomes: OutcomeSource
    latency_estimator: LatencyEstimator
    train_dataset: Dataset | IterableDataset
    eval_dataset: Dataset
    test_dataset: Dataset
    stage1_inputs: str  # as in `JointControllerConfig`
    stage2_inputs: str
    heads: str
    mask: bool  # whether only settings are chosen that are predicted to fit
    source: str  # what the outcomes come from, in words
    dataset_names: list[str]
    latencies: str = "estimated"  # where they come from, in words
    max_new_tokens: int | None = None  # what answers are limited to, where an executor gives them
    outcomes_are_known: bool = (
        False  # whether every one can be looked up, so that looking at all of them costs nothing
    )
    skipped_rows: SkippedRows | None = None


def set_up_from_executor(
    args: "TrainArguments", training_args: JointGRPOConfig, open_output_dir: Callable[[], None]
) -> TrainingSetup:
    """
    Loads executor and data sets, and measures the executor where that is asked for. `open_output_dir`, which makes the
    output folder and its log, is called when what can be refused has been.
    """
    output_dir = Path(training_args.output_dir)
    executor = load_executor_from(args, device="cpu" if training_args.use_cpu else None)
    skipped_rows = open_skipped_rows(args, output_dir)
    # Trainings with other seeds can share their samples, and so be compared.
    data_seed = training_args.seed if training_args.data_seed is None else training_args.data_seed
    train_dataset, eval_dataset, test_dataset = load_data_splits(args, data_seed, skipped_rows)
    open_output_dir()
    logger.info(
        "Executor %s on %s: %d settings. Samples: %s train, %d validation, %d test.",
        args.model_path,
        executor.device,
        len(executor.knob_space),
        "a stream to" if args.streaming else len(train_dataset),
        len(eval_dataset),
        len(test_dataset),
    )
    if skipped_rows:
        logger.warning(skipped_rows.summary())
    if args.latency_estimator_path == FIT:
        latency_estimator = _measure_executor(executor, train_dataset, output_dir / "latency_estimator")
        latency_estimator = latency_estimator.in_scope(args.latency_scope or REQUEST_SCOPE)
    else:
        latency_estimator = load_latency_estimator(args, executor)
    folder = args.outcomes_dir or output_dir / "outcomes"
    store = OutcomeStore(folder, executor.fingerprint, executor.knob_space, args.known_outcomes or ())
    if len(store):
        logger.info("%d outcomes are known and will not be computed again.", len(store))
    return TrainingSetup(
        outcomes=OutcomeCollector(executor, store, score=score_answer),
        latency_estimator=latency_estimator,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        test_dataset=test_dataset,
        stage1_inputs=args.stage1_inputs or "question_and_budget",
        stage2_inputs=args.stage2_inputs or "image_question_and_budget",
        heads=args.heads or "joint",
        mask=args.mask is not False,
        source=f"`{args.model_path}`",
        dataset_names=args.dataset_names,
        max_new_tokens=executor.max_new_tokens,
        skipped_rows=skipped_rows,
    )


def _measure_executor(
    executor: Executor, train_dataset: Dataset | IterableDataset, folder: Path
) -> LatencyEstimatorModel:
    """Measures this machine and fits an estimator; a resumed run keeps the latencies that it began with."""
    if not (folder / "config.json").exists():
        logger.info("Measuring the executor on this machine to fit a latency estimator.")
        inputs = take_rows(train_dataset, NUM_PROFILED_INPUTS)
        estimator, report = fit_latency_estimator(profile_executor(executor, inputs, time_limit_s=45))
        error = report["total"]["mape"]
        logger.info("Held-out error of the estimator: %.1f %% of whole requests.", 100 * error)
        if error > LARGE_ERROR:
            logger.warning("That is a lot: is the machine busy with something else?")
        estimator.save_pretrained(folder)
    estimator = LatencyEstimatorModel.from_pretrained(folder)
    estimator.check_executor(executor)
    return estimator
