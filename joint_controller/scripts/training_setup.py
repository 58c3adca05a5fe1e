"""What a controller is trained on: an executor that answers, or results that were recorded before."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .data_arguments import load_data_splits, open_skipped_rows
from .executor_arguments import FIT, load_executor, load_latency_estimator, set_num_threads


if TYPE_CHECKING:
    import torch
    from datasets import Dataset, IterableDataset

    from ..data import SkippedRows
    from ..knobs import KnobSpace
    from ..latency import LatencyEstimatorModel, OriginalLatencyEstimatorModel, RecordedResults
    from ..molmo.executor import MolmoExecutor
    from ..outcomes import OutcomeCollector, RecordedOutcomes
    from ..trainer import JointGRPOConfig
    from .train import TrainArguments


logger = logging.getLogger("joint_controller.train")

NUM_PROFILED_INPUTS = 12
"""Training samples that `--latency_estimator_path fit` measures with."""

LARGE_ERROR = 0.2
"""Relative error of a latency estimator that is worth a warning."""

BUDGET_FIELDS = (
    *("latency_budget_min_ms", "latency_budget_max_ms"),
    *("latency_budget_min_fraction", "latency_budget_max_fraction"),
)


@dataclass
class TrainingSetup:
    """
    What a controller is trained on.

    Args:
        collector ([`OutcomeCollector`] or [`RecordedOutcomes`]):
            Gives outcomes, and the features that the controller sees.
        latency_estimator ([`LatencyEstimatorModel`] or [`OriginalLatencyEstimatorModel`], *optional*):
            Gives latencies. `None` takes those that were recorded with the outcomes.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Training samples.
        eval_dataset ([`~datasets.Dataset`]):
            Validation samples.
        test_dataset ([`~datasets.Dataset`]):
            Test samples.
        stage1_inputs, stage2_inputs (`str`):
            What the stages see, as in [`JointControllerConfig`].
        source (`str`):
            What the outcomes come from, in words.
        dataset_names (`list[str]`):
            Data sets that the samples are of.
        skipped_rows ([`SkippedRows`], *optional*):
            Bad rows that were left out.
    """

    collector: "OutcomeCollector | RecordedOutcomes"
    latency_estimator: "LatencyEstimatorModel | OriginalLatencyEstimatorModel | None"
    train_dataset: "Dataset | IterableDataset"
    eval_dataset: "Dataset"
    test_dataset: "Dataset"
    stage1_inputs: str
    stage2_inputs: str
    source: str
    dataset_names: list[str]
    skipped_rows: "SkippedRows | None" = None


def set_up_from_executor(
    args: "TrainArguments", training_args: "JointGRPOConfig", open_output_dir: Callable[[], None]
) -> TrainingSetup:
    """
    Loads executor and data sets, and measures the executor where that is asked for.

    Args:
        args ([`TrainArguments`]):
            Names executor, data sets and latency estimator.
        training_args ([`JointGRPOConfig`]):
            Gives seed and output folder.
        open_output_dir (`Callable[[], None]`):
            Makes the output folder and its log. Called when what can be refused has been.
    """
    from ..evaluation.scoring import score_answer
    from ..outcomes import OutcomeCollector, OutcomeStore

    output_dir = Path(training_args.output_dir)
    executor = load_executor(args, device="cpu" if training_args.use_cpu else None)
    skipped_rows = open_skipped_rows(args, output_dir)
    train_dataset, eval_dataset, test_dataset = load_data_splits(args, training_args.seed, skipped_rows)
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
    else:
        latency_estimator = load_latency_estimator(args, executor)
    store = OutcomeStore(args.outcomes_dir or output_dir / "outcomes", executor.fingerprint)
    if len(store):
        logger.info("%d outcomes are known and will not be computed again.", len(store))
    return TrainingSetup(
        collector=OutcomeCollector(executor, store, score=score_answer),
        latency_estimator=latency_estimator,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        test_dataset=test_dataset,
        stage1_inputs=args.stage1_inputs or "question_and_budget",
        stage2_inputs=args.stage2_inputs or "image_question_and_budget",
        source=f"`{args.model_path}`",
        dataset_names=args.dataset_names,
        skipped_rows=skipped_rows,
    )


def _measure_executor(
    executor: "MolmoExecutor", train_dataset: "Dataset | IterableDataset", folder: Path
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
        if max(errors.values()) > 100 * LARGE_ERROR:
            logger.warning("That is a lot: is the machine busy with something else?")
        estimator.save_pretrained(folder)
    estimator = LatencyEstimatorModel.from_pretrained(folder)
    estimator.check_executor(executor.model.config)
    return estimator


def set_up_from_results(
    args: "TrainArguments", training_args: "JointGRPOConfig", open_output_dir: Callable[[], None]
) -> TrainingSetup:
    """
    Reads recorded results, and fits the batch size, the latency budgets and what the controller sees to them, as far as
    `args.given` leaves that open. The log says what came of it.

    Args:
        args ([`TrainArguments`]):
            Names results, data sets, model, images and latency estimator.
        training_args ([`JointGRPOConfig`]):
            Its batch size and budget range are changed where they do not fit.
        open_output_dir (`Callable[[], None]`):
            As in [`set_up_from_executor`].

    Raises:
        FileNotFoundError: If results, images, model or estimator do not exist.
        ValueError: If they are broken or do not fit each other.
    """
    from ..original_scripts import load_recorded_results
    from ..outcomes import RecordedOutcomes

    inputs = _resolve_inputs(args)
    set_num_threads(args)
    results = load_recorded_results(args.results_dir, args.dataset_names or None)
    space = _restrict(results.knob_space, args)
    skipped_rows = open_skipped_rows(args, training_args.output_dir)
    splits, missing_settings = _choose_samples(results, space, args, skipped_rows)
    feature_source = _load_feature_source(args, training_args, space, inputs)
    latency_estimator = _load_latencies(args, results)
    collector = RecordedOutcomes(results.outcomes, space, feature_source)
    setup = TrainingSetup(
        collector=collector,
        latency_estimator=latency_estimator,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        test_dataset=splits["test"],
        source="recorded results",
        dataset_names=results.dataset_names,
        skipped_rows=skipped_rows,
        **inputs,
    )
    open_output_dir()
    logger.info(
        "Recorded results of %s from %s: %d settings. Samples: %d train, %d validation, %d test, divided by the hash of "
        "their id. No executor will run.",
        ", ".join(results.dataset_names),
        args.results_dir,
        len(space),
        *(len(split) for split in splits.values()),
    )
    if results.missing_datasets:
        logger.warning(
            "There are no results of %s in %s: training goes on without.",
            ", ".join(results.missing_datasets),
            args.results_dir,
        )
    for name in results.unknown_datasets:
        logger.warning("'%s' is not a data set that this package knows: its answers are scored by vqa_accuracy.", name)
    if missing_settings:
        logger.warning(
            "%d samples were not recorded at all settings and are left out: %s.",
            len(missing_settings),
            "; ".join(f"{sample_id} lacks {len(lacking)}" for sample_id, lacking in missing_settings.items()),
        )
    if skipped_rows:
        logger.warning(skipped_rows.summary())
    if len(results.accuracy_differences):
        logger.warning(
            "%d recorded accuracies are not what the metric gives, which is used: `joint-controller import-results` lists "
            "them.",
            len(results.accuracy_differences),
        )
    _log_inputs(args, setup)
    _log_latencies(setup)
    _fit_batch(training_args, len(setup.train_dataset))
    _fit_budgets(args, training_args, setup)
    return setup


def _restrict(space: "KnobSpace", args: "TrainArguments") -> "KnobSpace":
    """The values that were asked for among those that were recorded."""
    from ..knobs import KnobSpace

    chosen: dict[str, Any] = {}
    for knob, name in (("tier", "tiers"), ("top_k", "top_k_values"), ("num_blocks", "num_blocks_values")):
        recorded = list(space.values[knob])
        chosen[knob] = recorded if getattr(args, name) is None else getattr(args, name)
        unknown = [value for value in chosen[knob] if value not in recorded]
        if unknown:
            raise ValueError(
                f"`{name}` has {unknown}, but the results were recorded over {recorded}: use values of these."
            )
    return KnobSpace({tier: space.tier_crops[tier] for tier in chosen["tier"]}, chosen["top_k"], chosen["num_blocks"])


def _choose_samples(
    results: "RecordedResults", space: "KnobSpace", args: "TrainArguments", skipped_rows: "SkippedRows | None"
) -> tuple[dict[str, "Dataset"], dict[str, list]]:
    """The splits of the samples that have all settings, with their images if asked for; and what the others lack."""
    from ..data.row_checks import keep_good_rows
    from ..original_scripts import find_images, split_samples

    missing_settings = results.missing_settings(space)
    ids = results.samples["sample_id"][:]
    samples = results.samples.select([row for row, sample_id in enumerate(ids) if sample_id not in missing_settings])
    if len(samples) == 0:
        sample_id, lacking = next(iter(missing_settings.items()))
        raise ValueError(
            f"no sample was recorded at all {len(space)} settings, e.g. '{sample_id}' lacks {lacking[0]}: record what lacks, "
            "or leave out knob values with `tiers`, `top_k_values` and `num_blocks_values`."
        )
    if args.image_dir is not None:
        samples = keep_good_rows(find_images(samples, args.image_dir), "recorded results", "all", skipped=skipped_rows)
    splits = split_samples(samples)
    limits = {"train": args.max_train_samples, "validation": args.max_eval_samples, "test": args.max_test_samples}
    for split, limit in limits.items():
        if limit is not None:
            splits[split] = splits[split].select(range(min(limit, len(splits[split]))))
    return splits, missing_settings


def _resolve_inputs(args: "TrainArguments") -> dict[str, str]:
    """What the stages see: what is asked for, or as much as there is."""
    if args.model_path is None and args.image_dir is not None:
        raise ValueError(
            "`image_dir` is of no use without a model that looks at the images: give `model_path` with it."
        )
    if args.model_path is None:
        inputs = {"stage1_inputs": "budget", "stage2_inputs": "budget"}
    else:
        image = "" if args.image_dir is None else "image_"
        inputs = {"stage1_inputs": "question_and_budget", "stage2_inputs": f"{image}question_and_budget"}
    for name in inputs:
        asked = getattr(args, name)
        if asked is None:
            continue
        for part, field_name in (("question", "model_path"), ("image", "image_dir")):
            if part in asked and getattr(args, field_name) is None:
                raise ValueError(
                    f"`{name}` is '{asked}', but nothing gives features of the {part}: give `{field_name}`."
                )
        inputs[name] = asked
    return inputs


def _load_feature_source(
    args: "TrainArguments", training_args: "JointGRPOConfig", space: "KnobSpace", inputs: dict[str, str]
) -> "MolmoExecutor | None":
    """What gives the features of questions and images, if a stage sees any."""
    from ..knobs import KnobSpace
    from ..molmo.executor import MolmoExecutor

    if all(seen == "budget" for seen in inputs.values()):
        return None
    executor = MolmoExecutor.from_pretrained(args.model_path, device="cpu" if training_args.use_cpu else None)
    if "image" in inputs["stage2_inputs"]:
        # Images are cut as they were when the results were recorded, as far as the model can.
        executor.knob_space = KnobSpace(space.tier_crops, executor.knob_space.top_k, executor.knob_space.num_blocks)
    return executor


def _load_latencies(
    args: "TrainArguments", results: "RecordedResults"
) -> "LatencyEstimatorModel | OriginalLatencyEstimatorModel | None":
    from ..latency import fit_latency_estimator, read_latency_estimator

    if args.latency_estimator_path is None:
        return None
    if args.latency_estimator_path == FIT:
        return fit_latency_estimator(results.profile)[0]
    return read_latency_estimator(args.latency_estimator_path)


def _log_inputs(args: "TrainArguments", setup: TrainingSetup):
    if setup.collector.feature_source is None:
        why = "there is no `model_path`" if args.model_path is None else "`stage1_inputs` and `stage2_inputs` say so"
        logger.info("The controller sees the latency budget alone, neither question nor image: %s.", why)
        return
    seen = {"image": "the image", "question": "the question"}
    images = "" if args.image_dir is not None else " There is no `image_dir`, so no stage sees the image."
    logger.info(
        "%s gives features and answers nothing. Stage 1 sees %s, stage 2 %s.%s",
        args.model_path,
        *(
            ", ".join([words for part, words in seen.items() if part in inputs] + ["the budget"])
            for inputs in (setup.stage1_inputs, setup.stage2_inputs)
        ),
        images,
    )


def _log_latencies(setup: TrainingSetup):
    """Says where latencies come from, and how far an estimator is from those that were recorded."""
    if setup.latency_estimator is None:
        logger.info("Latencies are those that were recorded with each answer.")
        return
    recorded = _latencies(setup, recorded=True)
    error = ((_latencies(setup) - recorded).abs() / recorded).mean().item()
    logger.log(
        logging.WARNING if error > LARGE_ERROR else logging.INFO,
        "Latencies are estimated. The estimates are off the recorded latencies by %.1f %% in the mean.",
        100 * error,
    )


def _fit_batch(training_args: "JointGRPOConfig", num_samples: int):
    """Makes the batch smaller where it would hold more samples than there are: TRL trains on full batches only."""
    per_sample = training_args.num_generations
    num_shares = training_args.generation_batch_size // training_args.per_device_train_batch_size
    in_batch = training_args.generation_batch_size // per_sample
    if in_batch > num_samples:
        if num_samples < num_shares:
            raise ValueError(
                f"{num_samples} training sample(s) cannot be shared out to {num_shares} batches a rollout (processes times "
                "`steps_per_generation`): lower these."
            )
        training_args.per_device_train_batch_size = num_samples // num_shares * per_sample
        training_args.generation_batch_size = training_args.per_device_train_batch_size * num_shares
        logger.warning(
            "A batch of %d samples is more than the %d there are: it is lowered to %d.",
            in_batch,
            num_samples,
            training_args.generation_batch_size // per_sample,
        )
        in_batch = training_args.generation_batch_size // per_sample
    left_over = num_samples % in_batch
    logger.info(
        "Batches of %d samples, %d settings of each.%s",
        in_batch,
        per_sample,
        f" {left_over} samples, others in each epoch, make no full batch and wait." if left_over else "",
    )


def _fit_budgets(args: "TrainArguments", training_args: "JointGRPOConfig", setup: TrainingSetup):
    """
    Where no range of budgets is given: from what the cheapest setting takes at most, so that every budget can be met, to
    what the slowest setting takes at most, on the training samples.
    """
    if args.given.intersection(BUDGET_FIELDS):
        return
    space = setup.collector.knob_space
    latency_ms = _latencies(setup).amax(0)  # (settings,)
    minimum_ms, maximum_ms = latency_ms[list(space).index(space.cheapest)].item(), latency_ms.max().item()
    if not 0 < minimum_ms < maximum_ms:
        raise ValueError(
            f"the cheapest setting takes up to {minimum_ms:.3f} ms and the slowest {maximum_ms:.3f} ms, which leaves no range "
            "of budgets: check the latency estimator, or give `latency_budget_min_ms` and `latency_budget_max_ms`."
        )
    training_args.latency_budget_min_fraction = training_args.latency_budget_max_fraction = None
    training_args.latency_budget_min_ms, training_args.latency_budget_max_ms = minimum_ms, maximum_ms


def _latencies(setup: TrainingSetup, recorded: bool = False) -> "torch.Tensor":
    """Latency of every training sample at every setting, in ms, of shape (samples, settings); as recorded, if asked for."""
    from ..outcomes import predict_latency_ms

    samples = list(setup.train_dataset.remove_columns("image"))
    settings = list(setup.collector.knob_space)
    outcomes = setup.collector.collect([sample for sample in samples for _ in settings], settings * len(samples))
    latency_ms = predict_latency_ms(None if recorded else setup.latency_estimator, outcomes)
    return latency_ms.reshape(len(samples), len(settings))
