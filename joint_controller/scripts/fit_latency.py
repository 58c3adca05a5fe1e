"""
Fits a latency estimator to a profile.

```bash
joint-controller fit-latency --profile_path outputs/profile --output_dir outputs/latency
```
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from . import ScriptParser, run_script


@dataclass
class FitLatencyArguments:
    """
    Arguments of `joint-controller fit-latency`.
    """

    profile_path: str = field(
        metadata={"help": "Profile to fit to: the folder that `joint-controller profile` wrote, or its Parquet file."}
    )
    output_dir: str = field(
        metadata={
            "help": "Folder for the estimator, its card (README.md) and its error (fit_report.json, predicted.png, "
            "error_by_knob.png)."
        }
    )
    num_folds: int = field(
        default=4,
        metadata={"help": "Parts that settings and inputs are divided in to measure the error on unseen ones."},
    )
    seed: int = field(default=42, metadata={"help": "Seed of that division."})


def main(args: FitLatencyArguments):
    from rich.console import Console
    from rich.table import Table

    from ..latency import cross_validate, fit_latency_estimator, format_model_card, load_profile, plot_fit
    from ..latency.fit_report import ERROR_HEADINGS, REPORT_FILE, format_error_rows

    output_dir = Path(args.output_dir)
    if output_dir.is_file():
        raise ValueError(f"`output_dir` '{output_dir}' is a file: name a folder.")
    profile = load_profile(args.profile_path)
    held_out = cross_validate(profile, args.num_folds, args.seed)
    model, report = fit_latency_estimator(profile, held_out=held_out)
    model.save_pretrained(output_dir)
    (output_dir / "README.md").write_text(format_model_card(model), encoding="utf-8")
    (output_dir / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    plot_fit(held_out, output_dir)

    table = Table(title=f"Error on {report['num_held_out']} held-out measurements (settings and inputs unseen)")
    for heading in ERROR_HEADINGS:
        table.add_column(heading, justify="right" if heading else "left")
    for row in format_error_rows(report):
        table.add_row(*row)
    Console().print(table)
    print(f"Latency estimator written to {output_dir}.")


def make_parser() -> ScriptParser:
    return ScriptParser((FitLatencyArguments,))


if __name__ == "__main__":
    sys.exit(run_script("fit-latency", make_parser, main))
