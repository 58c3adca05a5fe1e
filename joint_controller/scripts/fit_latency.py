"""
Fits a latency estimator to a profile, or adapts one to it that was fitted on other hardware.

```bash
joint-controller fit-latency --profile outputs/profile --output_dir outputs/latency
```
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from transformers.hf_argparser import HfArg

from . import ScriptParser, run_script


if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class FitLatencyArguments:
    """
    Arguments of `joint-controller fit-latency`.
    """

    profile: str = HfArg(
        help="Profile to fit to: the folder that `joint-controller profile` wrote, or its Parquet file."
    )
    output_dir: str = HfArg(
        help="Folder for the estimator, its card (README.md) and its error (fit_report.json, predicted.png, "
        "error_by_knob.png; recalibration.png)."
    )
    base_estimator: str | None = HfArg(
        default=None,
        help="Estimator of the same executor on other hardware: a folder, a Hub name, or the name of one that ships. It "
        "is adapted to the profile, for which a few measurements are enough, in place of fitting a new one.",
    )
    recalibration_sizes: list[int] = HfArg(
        default_factory=lambda: [10, 25, 50],
        help="Numbers of measurements for which the error of adapting `base_estimator` is reported, next to the error of "
        "using it as it is.",
    )
    num_folds: int = HfArg(
        default=4, help="Parts that settings and inputs are divided in to measure the error on unseen ones."
    )
    num_units: int = HfArg(
        default=16, help="Units of the learned factor of each stage. A `base_estimator` keeps its own."
    )
    seed: int = HfArg(default=42, help="Seed of that division.")


def main(args: FitLatencyArguments):
    from ..latency.fit_report import ERROR_HEADINGS, REPORT_FILE, format_error_rows, format_model_card, plot_fit
    from ..latency.fitting import cross_validate, fit_latency_estimator
    from ..latency.profile_table import load_profile

    output_dir = Path(args.output_dir)
    if output_dir.is_file():
        raise ValueError(f"`output_dir` '{output_dir}' is a file: name a folder.")
    profile = load_profile(args.profile)
    if args.base_estimator is None:
        held_out = cross_validate(profile, args.num_folds, args.seed, args.num_units)
        model, report = fit_latency_estimator(profile, held_out=held_out, num_units=args.num_units)
        card = format_model_card(model)
    else:
        model, held_out, report, card = _recalibrate(args, profile, output_dir)
    model.save_pretrained(output_dir)
    (output_dir / "README.md").write_text(card, encoding="utf-8")
    (output_dir / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    plot_fit(held_out, output_dir)

    title = f"Error on {report['num_held_out']} held-out measurements (settings and inputs unseen)"
    _print_table(title, ERROR_HEADINGS, format_error_rows(report))
    print(f"Latency estimator written to {output_dir}.")


def _recalibrate(args: FitLatencyArguments, profile: "Dataset", output_dir: Path):
    from ..latency import LatencyEstimatorModel, read_latency_estimator
    from ..latency.fit_report import (
        format_markdown_table,
        format_model_card,
        format_recalibration_rows,
        plot_recalibration,
    )
    from ..latency.recalibration import fit_recalibration, recalibration_errors

    base = read_latency_estimator(args.base_estimator)
    if not isinstance(base, LatencyEstimatorModel):
        raise ValueError(
            f"`base_estimator` '{args.base_estimator}' holds a {type(base).__name__}: give one that this command fitted."
        )
    model, held_out = fit_recalibration(base, profile, args.num_folds, args.seed)
    errors = recalibration_errors(base, profile, args.recalibration_sizes, seed=args.seed)
    headings, *rows = format_recalibration_rows(errors)
    plot_recalibration(errors, output_dir)
    _print_table("Error after recalibration, by measurements used", headings, rows)
    if any("-" in row for row in rows):
        print("-: too few other measurements are left to measure the error on. Profile more.")
    section = f"""
## Recalibration

The estimator of {base.config.device_name}, as it is (none) and adapted with some of the measurements, on measurements that
share neither setting nor input with those: mean over {errors["draws"]} draws, the largest in brackets.

{format_markdown_table(headings, rows)}
"""
    report = {**model.config.held_out, "recalibration": errors}
    return model, held_out, report, format_model_card(model, section)


def _print_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]):
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, box=SIMPLE, padding=(0, 1, 0, 0))
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def make_parser() -> ScriptParser:
    return ScriptParser((FitLatencyArguments,))


if __name__ == "__main__":
    sys.exit(run_script("fit-latency", make_parser, main))
