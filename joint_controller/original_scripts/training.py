"""What a controller is trained on where results were recorded before: no executor runs."""

import itertools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from datasets import Dataset

from ..data import SkippedRows
from ..data.row_checks import keep_good_rows
from ..executor import MODEL_SCOPE, REQUEST_SCOPE, FeatureSource, load_executor
from ..knobs import KnobSetting, KnobSpace, parse_knob_values
from ..latency import LatencyEstimator, RecordedLatencies, fit_latency_estimator, read_latency_estimator
from ..outcomes import RecordedOutcomes
from ..scripts.data_arguments import open_skipped_rows
from ..scripts.executor_arguments import FIT, set_num_threads
from ..scripts.training_setup import LARGE_ERROR, TrainingSetup
from ..trainer import JointGRPOConfig
from .arguments import OriginalArguments
from .recorded_results import RecordedResults, load_recorded_results
from .samples import find_images, split_samples


if TYPE_CHECKING:
    from ..scripts.train import TrainArguments


logger = logging.getLogger("joint_controller.train")

_BUDGET_FIELDS = {f"latency_budget_{end}_{unit}" for end in ("min", "max") for unit in ("ms", "fraction")}


def set_up_from_results(
    args: "TrainArguments",
    training_args: JointGRPOConfig,
    original_args: OriginalArguments,
    open_output_dir: Callable[[], None],
) -> TrainingSetup:
    """
    Reads recorded results, and fits the batch size, the latency budgets and what the controller sees to them, as far as
    `original_args.given` leaves that open; `training_args` are changed to it. The log says what came of it. `open_output_dir`,
    which makes the output folder and its log, is called when what can be refused has been.
    """
    inputs = _resolve_inputs(args, original_args)
    if args.latency_scope == REQUEST_SCOPE:
        raise ValueError(
            f"recorded results say what the model's stages took, not whole requests: leave `latency_scope` {REQUEST_SCOPE} out."
        )
    if args.mask:
        raise ValueError(
            "`mask` needs to predict what a request will take, and without an executor nothing counts its inputs: leave it out."
        )
    set_num_threads(args)
    results = load_recorded_results(original_args.results_dir, args.dataset_names or None)
    chosen = parse_knob_values(args.knob_values)
    results.knob_space.check_names(chosen)
    knobs = {name: [results.knob_space[name].parse(str(value)) for value in chosen[name]] for name in chosen}
    space = results.knob_space.restrict(knobs)
    skipped_rows = open_skipped_rows(args, training_args.output_dir)
    splits, missing_settings = _choose_samples(results, space, args, original_args, skipped_rows)
    features = _load_features(args, training_args, space, inputs)
    setup = TrainingSetup(
        outcomes=RecordedOutcomes(results.outcomes, space, features),
        latency_estimator=_load_latencies(args, results),
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        test_dataset=splits["test"],
        heads=args.heads or "independent",
        mask=False,
        source="recorded results",
        dataset_names=results.dataset_names,
        latencies="as they were recorded" if args.latency_estimator_path is None else "estimated",
        outcomes_are_known=True,
        skipped_rows=skipped_rows,
        **inputs,
    )
    open_output_dir()
    logger.info(
        "Recorded results of %s from %s: %d settings. Samples: %d train, %d validation, %d test, divided by the hash of "
        "their id. No executor will run.",
        ", ".join(results.dataset_names),
        original_args.results_dir,
        len(space),
        *map(len, splits.values()),
    )
    for oddity in results.oddities:
        logger.warning(oddity)
    if missing_settings:
        logger.warning(
            "%d samples were not recorded at all settings and are left out: %s.",
            len(missing_settings),
            "; ".join(f"{sample_id} lacks {len(lacking)}" for sample_id, lacking in missing_settings.items()),
        )
    if skipped_rows:
        logger.warning(skipped_rows.summary())
    _log_inputs(args, original_args, setup)
    latency_ms = _latency_ms(setup, setup.latency_estimator)
    if args.latency_estimator_path is None:
        logger.info("Latencies are those that were recorded with each answer.")
    else:
        recorded_ms = _latency_ms(setup, RecordedLatencies())
        error = ((latency_ms - recorded_ms).abs() / recorded_ms).mean().item()
        logger.log(
            logging.WARNING if error > LARGE_ERROR else logging.INFO,
            "Latencies are estimated. The estimates are off the recorded latencies by %.1f %% in the mean.",
            100 * error,
        )
    _fit_batch(training_args, len(setup.train_dataset))
    if not original_args.given & _BUDGET_FIELDS:
        _fit_budgets(training_args, latency_ms, space.index(space.cheapest))
    return setup


def _resolve_inputs(args: "TrainArguments", original_args: OriginalArguments) -> dict[str, str]:
    """What the stages see: what is asked for, or as much as there is."""
    sources = {"question": ("model_path", args.model_path), "image": ("image_dir", original_args.image_dir)}
    if args.model_path is None and original_args.image_dir is not None:
        raise ValueError(
            "`image_dir` is of no use without a model that looks at the images: give `model_path` with it."
        )
    asked = {"stage1_inputs": args.stage1_inputs, "stage2_inputs": args.stage2_inputs}
    for name, inputs in asked.items():
        for part, (field, source) in sources.items():
            if part in (inputs or "") and source is None:
                raise ValueError(f"`{name}` is '{inputs}', but nothing gives features of the {part}: give `{field}`.")
    question = "" if args.model_path is None else "question_and_"
    image = "" if original_args.image_dir is None else "image_"
    return {
        "stage1_inputs": args.stage1_inputs or f"{question}budget",
        "stage2_inputs": args.stage2_inputs or f"{image}{question}budget",
    }


def _choose_samples(
    results: RecordedResults,
    space: KnobSpace,
    args: "TrainArguments",
    original_args: OriginalArguments,
    skipped_rows: SkippedRows | None,
) -> tuple[dict[str, Dataset], dict[str, list[KnobSetting]]]:
    """The splits of the samples that have all settings, with their images if asked for; and what the others lack."""
    missing_settings = results.missing_settings(space)
    ids = results.samples["sample_id"][:]
    samples = results.samples.select([row for row, sample_id in enumerate(ids) if sample_id not in missing_settings])
    if len(samples) == 0:
        sample_id, lacking = next(iter(missing_settings.items()))
        raise ValueError(
            f"no sample was recorded at all {len(space)} settings, e.g. '{sample_id}' lacks {lacking[0]}: record what is "
            "missing, or leave out knob values with `knob_values`."
        )
    if original_args.image_dir is not None:
        samples = find_images(samples, original_args.image_dir)
        samples = keep_good_rows(samples, "recorded results", "all", skipped=skipped_rows)
    splits = split_samples(samples)
    limits = {"train": args.max_train_samples, "validation": args.max_eval_samples, "test": args.max_test_samples}
    for split, limit in limits.items():
        if limit is not None:
            splits[split] = splits[split].select(range(min(limit, len(splits[split]))))
    return splits, missing_settings


def _load_features(
    args: "TrainArguments", training_args: JointGRPOConfig, space: KnobSpace, inputs: dict[str, str]
) -> FeatureSource | None:
    """What gives the features of questions and images, if a stage sees any."""
    if set(inputs.values()) == {"budget"}:
        return None
    executor = load_executor(args.model_path, device="cpu" if training_args.use_cpu else None)
    if "image" in inputs["stage2_inputs"]:
        # Images are cut as they were when the results were recorded, as far as the model can.
        executor.knob_space = KnobSpace(
            [space[knob.name] if knob.stage == 1 else knob for knob in executor.knob_space.knobs]
        )
    return executor


def _load_latencies(args: "TrainArguments", results: RecordedResults) -> LatencyEstimator:
    if args.latency_estimator_path is None:
        return RecordedLatencies()
    if args.latency_estimator_path == FIT:
        return fit_latency_estimator(results.profile)[0]
    return read_latency_estimator(args.latency_estimator_path, MODEL_SCOPE)


def _log_inputs(args: "TrainArguments", original_args: OriginalArguments, setup: TrainingSetup):
    if setup.outcomes.features is None:
        why = "there is no `model_path`" if args.model_path is None else "`stage1_inputs` and `stage2_inputs` say so"
        logger.info("The controller sees the latency budget alone, neither question nor image: %s.", why)
        return

    def seen(inputs: str) -> str:
        return ", ".join([f"the {part}" for part in ("image", "question") if part in inputs] + ["the budget"])

    logger.info(
        "%s gives features and answers nothing. Stage 1 sees %s, stage 2 %s.%s",
        args.model_path,
        seen(setup.stage1_inputs),
        seen(setup.stage2_inputs),
        "" if original_args.image_dir is not None else " There is no `image_dir`, so no stage sees the image.",
    )


def _fit_batch(training_args: JointGRPOConfig, num_samples: int):
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
        asked_for, in_batch = in_batch, num_samples // num_shares * num_shares
        training_args.per_device_train_batch_size = num_samples // num_shares * per_sample
        training_args.generation_batch_size = in_batch * per_sample
        logger.warning(
            "A batch of %d samples is more than the %d there are: it is lowered to %d.",
            asked_for,
            num_samples,
            in_batch,
        )
    left_over = num_samples % in_batch
    logger.info(
        "Batches of %d samples, %d settings of each.%s",
        in_batch,
        per_sample,
        f" {left_over} samples, others in each epoch, make no full batch and wait." if left_over else "",
    )


def _fit_budgets(training_args: JointGRPOConfig, latency_ms: torch.Tensor, cheapest: int):
    """
    Budgets go from what the cheapest setting takes at most, so that every budget can be met, to what the slowest setting
    takes at most, on the training samples.
    """
    minimum_ms, maximum_ms = latency_ms[:, cheapest].max().item(), latency_ms.max().item()
    if not 0 < minimum_ms < maximum_ms:
        raise ValueError(
            f"the cheapest setting takes up to {minimum_ms:.3f} ms and the slowest {maximum_ms:.3f} ms, which leaves no range "
            "of budgets: check the latency estimator, or give `latency_budget_min_ms` and `latency_budget_max_ms`."
        )
    training_args.latency_budget_min_fraction = training_args.latency_budget_max_fraction = None
    training_args.latency_budget_min_ms, training_args.latency_budget_max_ms = minimum_ms, maximum_ms


def _latency_ms(setup: TrainingSetup, latency_estimator: LatencyEstimator) -> torch.Tensor:
    """Latency of every training sample at every setting, in ms, of shape (samples, settings)."""
    samples = list(setup.train_dataset.remove_columns("image"))
    settings = setup.outcomes.knob_space.settings
    pairs = list(itertools.product(samples, settings))
    outcomes = setup.outcomes.collect([sample for sample, _ in pairs], [setting for _, setting in pairs])
    return latency_estimator.latency_ms(outcomes).reshape(len(samples), len(settings))
