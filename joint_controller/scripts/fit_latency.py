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
        metadata={"help": "Folder for the estimator, its card (README.md) and its error (fit_report.json)."}
    )
    num_folds: int = field(
        default=4,
        metadata={"help": "Parts that settings and inputs are divided in to measure the error on unseen ones."},
    )
    seed: int = field(default=42, metadata={"help": "Seed of that division."})


def main(args: FitLatencyArguments):
    from rich.console import Console
    from rich.table import Table

    from ..latency import fit_latency_estimator, format_model_card, load_profile

    output_dir = Path(args.output_dir)
    if output_dir.is_file():
        raise ValueError(f"`output_dir` '{output_dir}' is a file: name a folder.")
    model, report = fit_latency_estimator(load_profile(args.profile_path), args.num_folds, args.seed)
    model.save_pretrained(output_dir)
    (output_dir / "README.md").write_text(format_model_card(model), encoding="utf-8")
    (output_dir / "fit_report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")

    table = Table(title=f"Error on {report['num_held_out']} held-out measurements (settings and inputs unseen)")
    for heading in ("", "MAE (ms)", "MAPE", "R²"):
        table.add_column(heading, justify="right" if heading else "left")
    for label, stage in (("prefill_ms", "prefill"), ("decode_ms_per_token", "decode")):
        errors = report[stage]
        table.add_row(label, f"{errors['mae_ms']:.3f}", f"{errors['mape']:.1%}", f"{errors['r2']:.3f}")
    Console().print(table)
    print(f"Latency estimator written to {output_dir}.")


def make_parser() -> ScriptParser:
    return ScriptParser((FitLatencyArguments,))


if __name__ == "__main__":
    sys.exit(run_script("fit-latency", make_parser, main))
