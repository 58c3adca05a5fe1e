"""Recorded results as this package's tables: samples, outcomes, profile."""

import itertools
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
from datasets import Dataset, Features, Value
from pyarrow import parquet

from ..data.registry import VQA_DATASETS
from ..data.schema import FEATURES
from ..executor import MODEL_SCOPE
from ..knobs import KnobSetting, KnobSpace
from ..latency.profile_table import MACHINE_COLUMNS, UNKNOWN, load_profile, make_profile, save_profile
from ..outcomes import Outcome, OutcomeStore
from .layout import dataset_name_of, find_dataset_folders, metric_of, read_original_results


EXECUTOR_TYPE = "molmo"
"""Model type of the executor that the original scripts measured."""
COUNT_NAMES = ("num_views", "vision_tokens", "text_tokens")
"""Counts that they recorded: all that the stages of the model depend on."""
STAGE_COLUMNS = ("vision_ms", "llm_prefill_ms", "decode_ms_per_token")
"""Columns of the profile with the stages that the original scripts measured."""

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
    """Results that were recorded over knob settings."""

    samples: Dataset  # with the columns of `SAMPLE_FEATURES`; `image` is null as long as no images were found
    outcomes: OutcomeStore  # with the measured latency, for each sample and setting that was recorded
    profile: Dataset  # times of the stages, as `fit_latency_estimator` takes them
    knob_space: KnobSpace  # all values that occur
    accuracy_differences: Dataset  # answers whose recorded accuracy differs from the metric's, which outcomes have
    missing_datasets: list[str] = field(default_factory=list)  # known ones that were asked for and have no results

    @property
    def dataset_names(self) -> list[str]:
        """Data sets that there are samples of."""
        return list(dict.fromkeys(map(dataset_name_of_sample, self.samples["sample_id"][:])))

    @property
    def unknown_datasets(self) -> list[str]:
        """Data sets that this package does not know: `vqa_accuracy` and the style `vqa2` were taken for them."""
        return [name for name in self.dataset_names if name not in VQA_DATASETS]

    @property
    def oddities(self) -> list[str]:
        """What is worth a warning, in words."""
        lines = [
            f"'{name}' is not a data set that this package knows: its answers are scored by {metric_of(name)}."
            for name in self.unknown_datasets
        ]
        if self.missing_datasets:
            lines.insert(0, f"There are no results of {', '.join(self.missing_datasets)}.")
        if len(self.accuracy_differences):
            lines.append(
                f"{len(self.accuracy_differences)} recorded accuracies are not what the metric gives, which is used: "
                f"`joint-controller import-results` lists them in {DIFFERENCES_FILE}."
            )
        return lines

    def known_outcomes(self) -> list[Outcome]:
        """The outcomes that were recorded, sample by sample."""
        pairs = itertools.product(self.samples["sample_id"][:], self.knob_space)
        return [self.outcomes.get(*pair) for pair in pairs if pair in self.outcomes]

    def missing_settings(self, knob_space: KnobSpace | None = None) -> dict[str, list[KnobSetting]]:
        """
        The settings of a knob space, by default that of the results, that were not recorded, by sample id; complete samples
        are not in it.
        """
        missing: dict[str, list[KnobSetting]] = {}
        for sample_id, setting in itertools.product(self.samples["sample_id"][:], knob_space or self.knob_space):
            if (sample_id, setting) not in self.outcomes:
                missing.setdefault(sample_id, []).append(setting)
        return missing


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

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If a data set is unknown, none of them has results, or the results are broken (see
            [`read_original_results`]) or were imported by an earlier version.
    """
    path = Path(path)
    if (path / REPORT_FILE).is_file():
        return _load_imported(path, dataset_names)
    return import_original_results(path, dataset_names)


def import_original_results(
    results_dir: str | Path, dataset_names: Sequence[str] | None = None, machine: Mapping[str, str] | None = None
) -> RecordedResults:
    """
    Reads a folder in the layout of the original scripts. Accuracies are computed again, by the metric of each data set.

    Args:
        results_dir (`str` or `Path`), dataset_names (`Sequence[str]`, *optional*):
            As in [`load_recorded_results`].
        machine (`Mapping[str, str]`, *optional*):
            What is known of the machine and the executor: machine columns of the profile. The results themselves do not
            tell.
    """
    folders = find_dataset_folders(results_dir)
    chosen, missing = _choose_datasets(results_dir, list(folders), dataset_names)
    rows, space, digest = read_original_results({name: folders[name] for name in chosen})
    store = OutcomeStore(None, f"recorded-{digest}", space)
    store.add(
        [
            Outcome(
                setting=KnobSetting({name: row[name] for name in space.names}),
                counts={name: row[name] for name in COUNT_NAMES},
                **{name: row[name] for name in ("sample_id", "answer", "accuracy", "output_tokens", "latency_ms")},
            )
            for row in rows
        ]
    )
    of_all = {
        **dict.fromkeys(MACHINE_COLUMNS, UNKNOWN),
        "executor_type": EXECUTOR_TYPE,
        "executor_fingerprint": store.executor_fingerprint,
        "knob_space": json.dumps(space.to_dict()),
        "latency_scope": MODEL_SCOPE,
        "num_repeats": 1,
        **(machine or {}),
    }
    columns = ("sample_id", *space.names, *COUNT_NAMES, "output_tokens", *STAGE_COLUMNS)
    profile = [{name: row[name] for name in columns} | of_all for row in rows]
    differing = [row for row in rows if abs(row["accuracy"] - row["recorded_accuracy"]) > ACCURACY_TOLERANCE]
    return RecordedResults(
        samples=_to_dataset({row["sample_id"]: row for row in rows}.values(), SAMPLE_FEATURES),
        outcomes=store,
        profile=make_profile(profile, "the recorded profile"),
        knob_space=space,
        accuracy_differences=_to_dataset(differing, DIFFERENCE_FEATURES),
        missing_datasets=missing,
    )


def _choose_datasets(path: str | Path, there: list[str], wanted: Sequence[str] | None) -> tuple[list[str], list[str]]:
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


def _to_dataset(rows: Collection[Mapping[str, Any]], features: Features) -> Dataset:
    return Dataset.from_dict({column: [row[column] for row in rows] for column in features}, features=features)


def save_recorded_results(results: RecordedResults, output_dir: str | Path) -> dict[str, Any]:
    """
    Writes recorded results as tables into a new or empty folder: `samples.parquet`, `profile.parquet`, the folder `outcomes`,
    `accuracy_differences.parquet` where there are differences, and `import_report.json`. Returns that report.
    """
    output_dir = Path(output_dir)
    if output_dir.exists() and (output_dir.is_file() or any(output_dir.iterdir())):
        raise FileExistsError(f"`output_dir` '{output_dir}' is not empty: name another folder, or delete it.")
    output_dir.mkdir(parents=True, exist_ok=True)
    results.samples.to_parquet(output_dir / SAMPLES_FILE)
    save_profile(results.profile, output_dir)
    fingerprint = results.outcomes.executor_fingerprint
    OutcomeStore(output_dir / OUTCOMES_FOLDER, fingerprint, results.knob_space).add(results.known_outcomes())
    if len(results.accuracy_differences):
        results.accuracy_differences.to_parquet(output_dir / DIFFERENCES_FILE)
    report = make_report(results)
    (output_dir / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def make_report(results: RecordedResults) -> dict[str, Any]:
    """What there is and what is odd about it, as JSON."""
    datasets: dict[str, dict[str, Any]] = {}
    num_samples = Counter(map(dataset_name_of_sample, results.samples["sample_id"][:]))
    outcomes = results.known_outcomes()
    for name in results.dataset_names:
        accuracies = [outcome.accuracy for outcome in outcomes if dataset_name_of_sample(outcome.sample_id) == name]
        differences = [row for row in results.accuracy_differences if dataset_name_of_sample(row["sample_id"]) == name]
        differences.sort(key=lambda row: -abs(row["accuracy"] - row["recorded_accuracy"]))
        excess = sum(row["accuracy"] - row["recorded_accuracy"] for row in differences)
        accuracy = sum(accuracies) / len(accuracies)
        datasets[name] = {
            "metric": metric_of(name),
            "num_samples": num_samples[name],
            "num_outcomes": len(accuracies),
            "accuracy": accuracy,
            "recorded_accuracy": accuracy - excess / len(accuracies),
            "num_accuracy_differences": len(differences),
            "largest_accuracy_differences": differences[:5],
        }
    return {
        "knob_space": results.knob_space.to_dict(),
        "executor_fingerprint": results.outcomes.executor_fingerprint,
        "datasets": datasets,
        "datasets_without_results": results.missing_datasets,
        "unknown_datasets": results.unknown_datasets,
        "missing_settings": {
            sample_id: list(map(str, settings)) for sample_id, settings in results.missing_settings().items()
        },
    }


def _load_imported(path: Path, dataset_names: Sequence[str] | None) -> RecordedResults:
    try:
        report = json.loads((path / REPORT_FILE).read_text(encoding="utf-8"))
        space = KnobSpace.from_dict(report["knob_space"])
        fingerprint, there = report["executor_fingerprint"], list(report["datasets"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"'{path / REPORT_FILE}' is damaged or was written by an earlier version of this package ({error}): import the "
            "results again."
        ) from error
    chosen, missing = _choose_datasets(path, there, dataset_names)

    def of_chosen(table: Dataset) -> Dataset:
        names = map(dataset_name_of_sample, table["sample_id"][:])
        return table.select([row for row, name in enumerate(names) if name in chosen])

    differences = _to_dataset([], DIFFERENCE_FEATURES)
    if (path / DIFFERENCES_FILE).is_file():
        differences = of_chosen(_read_table(path / DIFFERENCES_FILE, DIFFERENCE_FEATURES))
    profile = of_chosen(load_profile(path))
    return RecordedResults(
        samples=of_chosen(_read_table(path / SAMPLES_FILE, SAMPLE_FEATURES)),
        outcomes=OutcomeStore(path / OUTCOMES_FOLDER, fingerprint, space),
        profile=profile,
        knob_space=space.restrict({name: profile.unique(name) for name in space.names}),
        accuracy_differences=differences,
        missing_datasets=missing,
    )


def _read_table(file: Path, features: Features) -> Dataset:
    try:
        # Read as it is: `Dataset.from_parquet` keeps a second copy in a cache and has no word for an empty table.
        return Dataset(parquet.read_table(file).cast(features.arrow_schema))
    except (ValueError, pyarrow.ArrowException, FileNotFoundError) as error:
        raise ValueError(f"'{file}' cannot be read ({error}): import the results again.") from error
