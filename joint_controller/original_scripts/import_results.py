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
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers.hf_argparser import HfArg

from ..executor import executor_shape
from ..scripts import ScriptParser, run_script
from .recorded_results import (
    EXECUTOR_TYPE,
    REPORT_FILE,
    RecordedResults,
    import_original_results,
    save_recorded_results,
)


@dataclass
class ImportResultsArguments:
    """Arguments of `joint-controller import-results`."""

    results_dir: str = HfArg(
        help="Folder of the results: <dataset>/<dataset>_imgsizetier-<tier>_crops<n>_topk<k>_blocks<b>.json."
    )
    output_dir: str = HfArg(
        help="New folder for samples (samples.parquet), outcomes (outcomes/), times (profile.parquet) and what was odd "
        "(import_report.json, accuracy_differences.parquet)."
    )
    dataset_names: list[str] | None = HfArg(
        default=None, help="Data sets to import, e.g. `text_vqa coco_2014_vqa`. Default: all of the folder."
    )
    model_path: str | None = HfArg(
        default=None,
        help="Folder or Hub name of the model that the results were recorded with: its sizes go into the profile, so that "
        "an estimator that is fitted to it is refused for another model. Default: unknown.",
    )
    device_name: str | None = HfArg(
        default=None, help="Device that the results were recorded on, for the profile. Default: unknown."
    )


def main(args: ImportResultsArguments):
    machine = {} if args.device_name is None else {"device_name": args.device_name}
    if args.model_path is not None:
        executor_type, shape = executor_shape(args.model_path)
        if executor_type != EXECUTOR_TYPE:
            raise ValueError(
                f"`model_path` '{args.model_path}' is a model of the type '{executor_type}', but the original scripts "
                f"measured one of the type '{EXECUTOR_TYPE}': give that one, or leave `model_path` out."
            )
        machine["executor_shape"] = json.dumps(shape, sort_keys=True)
    results = import_original_results(args.results_dir, args.dataset_names, machine)
    report = save_recorded_results(results, args.output_dir)
    table = Table("data set", title="Imported results")
    columns = {"samples": "num_samples", "outcomes": "num_outcomes", "recorded accuracy": "recorded_accuracy"}
    columns |= {"by the metric": "accuracy", "differ": "num_accuracy_differences"}
    for heading in columns:
        table.add_column(heading, justify="right")
    for name, counts in report["datasets"].items():
        values = (counts[column] for column in columns.values())
        table.add_row(name, *(f"{value:.4f}" if isinstance(value, float) else str(value) for value in values))
    console = Console()
    console.print(table)
    for line in _describe(results, report):
        console.print(line, markup=False)
    console.print(f"{len(results.outcomes)} outcomes over {results.knob_space} are in {args.output_dir}.")


def _describe(results: RecordedResults, report: dict[str, Any]) -> Iterator[str]:
    yield from results.oddities
    differences = [row for counts in report["datasets"].values() for row in counts["largest_accuracy_differences"]]
    differences.sort(key=lambda row: -abs(row["accuracy"] - row["recorded_accuracy"]))
    for row in differences[:3]:
        yield (
            f"  {row['sample_id']} at tier={row['tier']} top_k={row['top_k']} num_blocks={row['num_blocks']}: answer "
            f"{row['answer']!r} was recorded with {row['recorded_accuracy']:.3f}, {row['metric']} gives {row['accuracy']:.3f}"
        )
    if report["missing_settings"]:
        sample_id, settings = next(iter(report["missing_settings"].items()))
        yield (
            f"{len(report['missing_settings'])} samples lack settings, e.g. '{sample_id}' lacks {settings[0]}; all are in "
            f"{REPORT_FILE}. A controller is trained on the others, unless the knob values that are missing are left out."
        )


def make_parser() -> ScriptParser:
    return ScriptParser((ImportResultsArguments,))


if __name__ == "__main__":
    sys.exit(run_script("import-results", make_parser, main))
