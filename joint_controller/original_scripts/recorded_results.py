"""Recorded results as this package's tables: samples, outcomes, profile."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
from datasets import Dataset, Features, Value
from pyarrow import parquet

from ..data.registry import VQA_DATASETS
from ..data.schema import DEFAULT_METRIC, DEFAULT_QUESTION_TYPE, DEFAULT_STYLE, FEATURES
from ..evaluation.scoring import score_answer
from ..knobs import KnobSetting, KnobSpace
from ..latency import load_profile, make_profile, save_profile
from ..latency.profile_table import MACHINE_COLUMNS, UNKNOWN
from ..outcomes import Outcome, OutcomeStore
from .original_layout import (
    RecordedMeasurement,
    dataset_name_of,
    find_dataset_folders,
    read_original_results,
    tier_crops_of,
)


SAMPLES_FILE = "samples.parquet"
OUTCOMES_FOLDER = "outcomes"
DIFFERENCES_FILE = "accuracy_differences.parquet"
REPORT_FILE = "import_report.json"
"""Written last: a folder that has it is whole."""

ACCURACY_TOLERANCE = 1e-3
"""Recorded accuracies are written with few digits: closer ones count as equal."""

SAMPLE_FEATURES = Features({**FEATURES, "image_id": Value("string")})
"""Columns of the recorded samples: those of every data set, and what the data set calls the image, where it is known."""

DIFFERENCE_FEATURES = Features(
    {
        "sample_id": Value("string"),
        "tier": Value("string"),
        "top_k": Value("int32"),
        "num_blocks": Value("int32"),
        "metric": Value("string"),
        "answer": Value("string"),
        "recorded_accuracy": Value("float64"),
        "accuracy": Value("float64"),
    }
)
"""Columns of the table of answers whose recorded accuracy is not what the metric gives."""


@dataclass
class RecordedResults:
    """
    Results that were recorded over knob settings.

    Args:
        samples ([`~datasets.Dataset`]):
            The samples, with the columns of `SAMPLE_FEATURES`. `image` is null as long as no images were found.
        outcomes ([`OutcomeStore`]):
            An outcome, with its measured latency, for each sample and setting that was recorded.
        profile ([`~datasets.Dataset`]):
            Times of the stages, as [`~latency.fit_latency_estimator`] takes them.
        knob_space ([`KnobSpace`]):
            All values that occur.
        accuracy_differences ([`~datasets.Dataset`]):
            Answers whose recorded accuracy differs from the metric's, which is the one that outcomes have.
        missing_datasets (`list[str]`, *optional*):
            Known data sets that were asked for and have no results.
    """

    samples: Dataset
    outcomes: OutcomeStore
    profile: Dataset
    knob_space: KnobSpace
    accuracy_differences: Dataset
    missing_datasets: list[str] = field(default_factory=list)

    @property
    def unknown_datasets(self) -> list[str]:
        """Data sets that this package does not know: `vqa_accuracy` and the style `vqa2` were taken for them."""
        return [name for name in self.dataset_names if name not in VQA_DATASETS]

    @property
    def dataset_names(self) -> list[str]:
        """Data sets that there are samples of."""
        return list(dict.fromkeys(dataset_name_of_sample(sample_id) for sample_id in self.samples["sample_id"][:]))

    def missing_settings(self, knob_space: KnobSpace | None = None) -> dict[str, list[KnobSetting]]:
        """
        What samples lack.

        Args:
            knob_space ([`KnobSpace`], *optional*, defaults to that of the results):
                Settings that a sample should have.

        Returns:
            `dict[str, list[KnobSetting]]`: The settings that were not recorded, by sample id; complete samples are not in
            it.
        """
        settings = list(self.knob_space if knob_space is None else knob_space)
        missing = {
            sample_id: [setting for setting in settings if (sample_id, setting) not in self.outcomes]
            for sample_id in self.samples["sample_id"][:]
        }
        return {sample_id: lacking for sample_id, lacking in missing.items() if lacking}


def dataset_name_of_sample(sample_id: str) -> str:
    """Data set of a recorded sample: `"text_vqa"` of `"text_vqa/recorded/17"`."""
    return sample_id.split("/", 1)[0]


def load_recorded_results(path: str | Path, dataset_names: Sequence[str] | None = None) -> RecordedResults:
    """
    Reads recorded results: a folder in the layout of the original scripts, or one that `joint-controller import-results`
    wrote.

    Args:
        path (`str` or `Path`):
            The folder.
        dataset_names (`Sequence[str]`, *optional*, defaults to all that are there):
            Data sets to read, with underscores or dashes. A known data set without results is left out and listed in
            `missing_datasets`; an unknown name is an error.

    Returns:
        [`RecordedResults`]

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If a data set is unknown, none of them has results, or the results are broken (see
            [`read_original_results`]).
    """
    path = Path(path)
    if (path / REPORT_FILE).is_file():
        return _load_imported(path, dataset_names)
    return import_original_results(path, dataset_names)


def import_original_results(
    results_dir: str | Path, dataset_names: Sequence[str] | None = None, machine: Mapping[str, str] | None = None
) -> RecordedResults:
    """
    Reads a folder in the layout of the original scripts.

    Args:
        results_dir (`str` or `Path`), dataset_names (`Sequence[str]`, *optional*):
            As in [`load_recorded_results`].
        machine (`Mapping[str, str]`, *optional*):
            What is known of the machine and the executor: values of `MACHINE_COLUMNS` for the profile. The results
            themselves do not tell.

    Returns:
        [`RecordedResults`]
    """
    folders = find_dataset_folders(results_dir)
    chosen, missing = _choose_datasets(results_dir, list(folders), dataset_names)
    measurements, digest = read_original_results({name: folders[name] for name in chosen})
    results = tabulate(measurements, f"recorded-{digest}", machine)
    results.missing_datasets = missing
    return results


def _choose_datasets(path: Path, there: list[str], wanted: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Which of the data sets that are there to read, and which known ones are missing."""
    if wanted is None:
        return there, []
    wanted = [dataset_name_of(name) for name in wanted]
    missing = [name for name in wanted if name not in there]
    unknown = [name for name in missing if name not in VQA_DATASETS]
    chosen = [name for name in dict.fromkeys(wanted) if name in there]
    if unknown or not chosen:
        raise ValueError(
            f"there are no results of {', '.join(map(repr, unknown or missing))} in '{path}', which has results of "
            f"{', '.join(map(repr, there))}: name those."
        )
    return chosen, missing


def tabulate(
    measurements: Sequence[RecordedMeasurement], fingerprint: str, machine: Mapping[str, str] | None = None
) -> RecordedResults:
    """
    Turns measurements into tables. The accuracy of each answer is computed anew, by the metric of its data set.

    Args:
        measurements (`Sequence[RecordedMeasurement]`):
            At least one.
        fingerprint (`str`):
            Stands for the executor that nobody knows: outcomes of other results must have another one.
        machine (`Mapping[str, str]`, *optional*):
            As in [`import_original_results`].

    Returns:
        [`RecordedResults`]
    """
    space = KnobSpace(
        tier_crops_of(measurements),
        top_k=tuple(sorted({measurement.setting.top_k for measurement in measurements})),
        num_blocks=tuple(sorted({measurement.setting.num_blocks for measurement in measurements})),
    )
    metrics = {name: _metric_of(name) for name in dict.fromkeys(m.dataset_name for m in measurements)}
    samples: dict[str, dict[str, Any]] = {}
    outcomes: list[Outcome] = []
    profile_rows: list[dict[str, Any]] = []
    differences: list[dict[str, Any]] = []
    machine = {**dict.fromkeys(MACHINE_COLUMNS, UNKNOWN), **(machine or {}), "executor_fingerprint": fingerprint}
    for measurement in measurements:
        sample_id = f"{measurement.dataset_name}/recorded/{measurement.sample_number}"
        entry = VQA_DATASETS.get(measurement.dataset_name)
        samples.setdefault(
            sample_id,
            {
                "sample_id": sample_id,
                "image": None,
                "question": measurement.question,
                "answers": list(measurement.answers),
                "style": DEFAULT_STYLE if entry is None else entry.style,
                "metric": metrics[measurement.dataset_name],
                "question_type": DEFAULT_QUESTION_TYPE,
                "image_id": measurement.image_id,
            },
        )
        accuracy = score_answer(metrics[measurement.dataset_name], measurement.answer, measurement.answers)
        counts = {
            "num_views": measurement.num_crops + 1,  # the crops and the global view
            "vision_tokens": measurement.vision_tokens,
            "text_tokens": measurement.text_tokens,
            "output_tokens": measurement.output_tokens,
        }
        outcomes.append(
            Outcome(
                sample_id=sample_id,
                setting=measurement.setting,
                answer=measurement.answer,
                accuracy=accuracy,
                latency_ms=measurement.total_ms,
                **counts,
            )
        )
        profile_rows.append(
            {
                "sample_id": sample_id,
                **measurement.setting.to_dict(),
                **counts,
                "vision_ms": measurement.vision_ms,
                "llm_prefill_ms": measurement.llm_prefill_ms,
                "decode_ms_per_token": measurement.decode_ms_per_token,
                "num_repeats": 1,
                **machine,
            }
        )
        if abs(accuracy - measurement.accuracy) > ACCURACY_TOLERANCE:
            differences.append(
                {
                    "sample_id": sample_id,
                    **measurement.setting.to_dict(),
                    "metric": metrics[measurement.dataset_name],
                    "answer": measurement.answer,
                    "recorded_accuracy": measurement.accuracy,
                    "accuracy": accuracy,
                }
            )
    store = OutcomeStore(None, fingerprint)
    store.add(outcomes)
    return RecordedResults(
        samples=_to_dataset(list(samples.values()), SAMPLE_FEATURES),
        outcomes=store,
        profile=make_profile(profile_rows, "the recorded profile"),
        knob_space=space,
        accuracy_differences=_to_dataset(differences, DIFFERENCE_FEATURES),
    )


def _metric_of(dataset_name: str) -> str:
    return VQA_DATASETS[dataset_name].metric if dataset_name in VQA_DATASETS else DEFAULT_METRIC


def _to_dataset(rows: list[dict[str, Any]], features: Features) -> Dataset:
    return Dataset.from_dict({column: [row[column] for row in rows] for column in features}, features=features)


def save_recorded_results(results: RecordedResults, output_dir: str | Path) -> dict[str, Any]:
    """
    Writes recorded results as tables: `samples.parquet`, `profile.parquet`, the folder `outcomes`,
    `accuracy_differences.parquet` where there are differences, and `import_report.json`.

    Args:
        results ([`RecordedResults`]):
            What to write.
        output_dir (`str` or `Path`):
            New or empty folder.

    Returns:
        `dict[str, Any]`: The report.

    Raises:
        FileExistsError: If there is something in the folder already.
    """
    output_dir = Path(output_dir)
    if output_dir.exists() and (output_dir.is_file() or any(output_dir.iterdir())):
        raise FileExistsError(f"`output_dir` '{output_dir}' is not empty: name another folder, or delete it.")
    output_dir.mkdir(parents=True, exist_ok=True)
    results.samples.to_parquet(output_dir / SAMPLES_FILE)
    save_profile(results.profile, output_dir)
    store = OutcomeStore(output_dir / OUTCOMES_FOLDER, results.outcomes.executor_fingerprint)
    ids = results.samples["sample_id"][:]
    known = [results.outcomes.get(sample_id, setting) for sample_id in ids for setting in results.knob_space]
    store.add([outcome for outcome in known if outcome is not None])
    if len(results.accuracy_differences):
        results.accuracy_differences.to_parquet(output_dir / DIFFERENCES_FILE)
    report = make_report(results)
    (output_dir / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def make_report(results: RecordedResults) -> dict[str, Any]:
    """
    What there is and what is odd about it, as JSON: knob space and fingerprint; for each data set `num_samples`,
    `num_outcomes`, `metric`, `accuracy`, and the number of and largest among the `accuracy_differences`; the settings
    that samples lack (`missing_settings`); the data sets without results; the data sets that are not known.
    """
    datasets: dict[str, dict[str, Any]] = {}
    accuracies: dict[str, list[float]] = {}
    for sample in results.samples.remove_columns("image"):
        name = dataset_name_of_sample(sample["sample_id"])
        counts = datasets.setdefault(name, {"metric": sample["metric"], "num_samples": 0, "num_outcomes": 0})
        counts["num_samples"] += 1
        known = [results.outcomes.get(sample["sample_id"], setting) for setting in results.knob_space]
        accuracies.setdefault(name, []).extend(outcome.accuracy for outcome in known if outcome is not None)
    for name, counts in datasets.items():
        differences = [row for row in results.accuracy_differences if dataset_name_of_sample(row["sample_id"]) == name]
        differences.sort(key=lambda row: -abs(row["accuracy"] - row["recorded_accuracy"]))
        counts["num_outcomes"] = len(accuracies[name])
        counts["accuracy"] = sum(accuracies[name]) / len(accuracies[name])
        counts["recorded_accuracy"] = counts["accuracy"] - sum(
            row["accuracy"] - row["recorded_accuracy"] for row in differences
        ) / len(accuracies[name])
        counts["num_accuracy_differences"] = len(differences)
        counts["largest_accuracy_differences"] = differences[:5]
    return {
        "knob_space": results.knob_space.to_dict(),
        "executor_fingerprint": results.outcomes.executor_fingerprint,
        "datasets": datasets,
        "datasets_without_results": results.missing_datasets,
        "unknown_datasets": results.unknown_datasets,
        "missing_settings": {
            sample_id: [str(setting) for setting in settings]
            for sample_id, settings in results.missing_settings().items()
        },
    }


def _load_imported(path: Path, dataset_names: Sequence[str] | None) -> RecordedResults:
    report = json.loads((path / REPORT_FILE).read_text(encoding="utf-8"))
    chosen, missing = _choose_datasets(path, list(report["datasets"]), dataset_names)

    def of_chosen(table: Dataset) -> Dataset:
        ids = table["sample_id"][:]
        return table.select([row for row, name in enumerate(map(dataset_name_of_sample, ids)) if name in chosen])

    differences = _to_dataset([], DIFFERENCE_FEATURES)
    if (path / DIFFERENCES_FILE).is_file():
        differences = of_chosen(_read_parquet(path / DIFFERENCES_FILE, DIFFERENCE_FEATURES))
    profile = of_chosen(load_profile(path))
    return RecordedResults(
        samples=of_chosen(_read_parquet(path / SAMPLES_FILE, SAMPLE_FEATURES)),
        outcomes=OutcomeStore(path / OUTCOMES_FOLDER, report["executor_fingerprint"]),
        profile=profile,
        knob_space=_space_of(profile, report["knob_space"]["tier_crops"]),
        accuracy_differences=differences,
        missing_datasets=missing,
    )


def _space_of(profile: Dataset, tier_crops: dict[str, Sequence[int]]) -> KnobSpace:
    tiers = profile.unique("tier")
    return KnobSpace(
        {tier: crops for tier, crops in tier_crops.items() if tier in tiers},
        top_k=tuple(sorted(profile.unique("top_k"))),
        num_blocks=tuple(sorted(profile.unique("num_blocks"))),
    )


def _read_parquet(file: Path, features: Features) -> Dataset:
    try:
        # Read as it is: `Dataset.from_parquet` keeps a second copy in a cache and has no word for an empty table.
        table = parquet.read_table(file)
    except (pyarrow.ArrowInvalid, FileNotFoundError) as error:
        raise ValueError(f"'{file}' cannot be read ({error}): import the results again.") from error
    if set(table.column_names) != set(features):
        raise ValueError(
            f"'{file}' has the columns {table.column_names} where {list(features)} were written: import the results again."
        )
    return Dataset(table.select(list(features)).replace_schema_metadata(None)).cast(features)
