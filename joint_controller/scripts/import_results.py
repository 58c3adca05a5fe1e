"""
Imports results that the original profiling scripts recorded: into outcomes that a controller can be trained on, and a
profile that a latency estimator can be fitted to.

```bash
joint-controller import-results --results_dir profiling_results --output_dir outputs/recorded
joint-controller fit-latency --profile outputs/recorded --output_dir outputs/latency
joint-controller train --results_dir outputs/recorded --device cpu --output_dir outputs/controller
```
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from . import ScriptParser, run_script


if TYPE_CHECKING:
    from rich.table import Table


@dataclass
class ImportResultsArguments:
    """
    Arguments of `joint-controller import-results`.
    """

    results_dir: str = field(
        metadata={
            "help": "Folder of the results: <dataset>/<dataset>_imgsizetier-<tier>_crops<n>_topk<k>_blocks<b>.json."
        }
    )
    output_dir: str = field(
        metadata={
            "help": "New folder for samples (samples.parquet), outcomes (outcomes/), times (profile.parquet) and what was "
            "odd (import_report.json, accuracy_differences.parquet)."
        }
    )
    dataset_names: list[str] | None = field(
        default=None,
        metadata={"help": "Data sets to import, e.g. `text_vqa coco_2014_vqa`. Default: all of the folder."},
    )
    model_path: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub name of the model that the results were recorded with: its sizes go into the profile, so "
            "that an estimator that is fitted to it is refused for another model. Default: unknown."
        },
    )
    device_name: str | None = field(
        default=None, metadata={"help": "Device that the results were recorded on, for the profile. Default: unknown."}
    )


def main(args: ImportResultsArguments):
    from rich.console import Console

    from ..latency import executor_shape
    from ..molmo import MolmoConfig
    from ..original_scripts import import_original_results, save_recorded_results

    machine = {}
    if args.device_name is not None:
        machine["device_name"] = args.device_name
    if args.model_path is not None:
        machine["executor_shape"] = json.dumps(
            executor_shape(MolmoConfig.from_pretrained(args.model_path)), sort_keys=True
        )
    results = import_original_results(args.results_dir, args.dataset_names, machine)
    report = save_recorded_results(results, args.output_dir)
    console = Console()
    console.print(_format_table(report))
    for line in _describe_oddities(report):
        console.print(line)
    space = report["knob_space"]
    console.print(
        f"{len(results.outcomes)} outcomes over tiers {', '.join(space['tier_crops'])}, top_k {space['top_k']} and "
        f"num_blocks {space['num_blocks']} are in {args.output_dir}."
    )


def _format_table(report: dict[str, Any]) -> "Table":
    from rich.table import Table

    table = Table(title="Imported results")
    for heading in ("data set", "samples", "outcomes", "recorded accuracy", "by the metric", "differ"):
        table.add_column(heading, justify="left" if heading == "data set" else "right")
    for name, counts in report["datasets"].items():
        table.add_row(
            name,
            str(counts["num_samples"]),
            str(counts["num_outcomes"]),
            f"{counts['recorded_accuracy']:.4f}",
            f"{counts['accuracy']:.4f}",
            str(counts["num_accuracy_differences"]),
        )
    return table


def _describe_oddities(report: dict[str, Any]) -> Iterator[str]:
    from ..original_scripts.recorded_results import DIFFERENCES_FILE, REPORT_FILE

    if report["datasets_without_results"]:
        yield f"No results of: {', '.join(report['datasets_without_results'])}."
    for name in report["unknown_datasets"]:
        metric = report["datasets"][name]["metric"]
        yield f"'{name}' is not a data set that this package knows: its answers are scored by {metric}."
    differences = sorted(
        (row for counts in report["datasets"].values() for row in counts["largest_accuracy_differences"]),
        key=lambda row: -abs(row["accuracy"] - row["recorded_accuracy"]),
    )
    if differences:
        count = sum(counts["num_accuracy_differences"] for counts in report["datasets"].values())
        yield (
            f"{count} recorded accuracies are not what the metric gives, which is kept; all are in {DIFFERENCES_FILE}, the "
            "largest differences are:"
        )
        for row in differences[:3]:
            yield (
                f"  {row['sample_id']} at tier={row['tier']} top_k={row['top_k']} num_blocks={row['num_blocks']}: answer "
                f"{row['answer']!r} was recorded with {row['recorded_accuracy']:.3f}, {row['metric']} gives "
                f"{row['accuracy']:.3f}"
            )
    incomplete = report["missing_settings"]
    if incomplete:
        sample_id, settings = next(iter(incomplete.items()))
        yield (
            f"{len(incomplete)} samples lack settings, e.g. '{sample_id}' lacks {settings[0]}; all are in {REPORT_FILE}. A "
            "controller is trained on the others, unless the knob values that lack are left out."
        )


def make_parser() -> ScriptParser:
    return ScriptParser((ImportResultsArguments,))


if __name__ == "__main__":
    sys.exit(run_script("import-results", make_parser, main))
