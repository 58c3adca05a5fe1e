"""
Compares a latency estimator with the clock of this machine, and adapts it where it is off.

```bash
joint-controller check-latency --controller_path outputs/easy_vqa
```
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from transformers.hf_argparser import HfArg

from . import ScriptParser, run_script


if TYPE_CHECKING:
    from rich.table import Table

    from ..latency.clock_check import LatencyCheck


@dataclass
class CheckLatencyArguments:
    """
    Arguments of `joint-controller check-latency`.
    """

    controller_path: str | None = HfArg(
        default=None,
        help="Folder or Hub name of a controller, whose decisions are measured, too. Default: an untrained one, which takes as "
        "long.",
    )
    model_path: str = HfArg(
        default="embedded",
        help="Executor: a folder or Hub name of a model, `embedded` for the one that ships, or `random:` and the name of sizes.",
    )
    latency_estimator_path: str | None = HfArg(
        default=None,
        help="Folder, Hub name or shipped name of the latency estimator. Default: the controller's, or the one that ships for "
        "the embedded executor.",
    )
    latency_scope: str | None = HfArg(
        default=None,
        help="What latencies are of: `request`, all that a request costs by the clock, or `model`, the stages of the model "
        "alone. Default: what the estimator is of.",
        metadata={"choices": ["request", "model"]},
    )
    num_requests: int = HfArg(default=96, help="Most requests to measure.")
    time_limit_s: float = HfArg(default=10.0, help="Most seconds that they may take, after a warm-up.")
    recalibrate: str = HfArg(
        default="auto",
        help="Whether to adapt the estimator to what was measured, for pipelines on this machine: `auto`, if it is off; `always`; "
        "or `never`.",
        metadata={"choices": ["auto", "always", "never"]},
    )
    json: str | None = HfArg(default=None, help="File for the numbers, as JSON.")
    seed: int = HfArg(default=42, help="Seed of the inputs and of the order of settings.")


def main(args: CheckLatencyArguments):
    from rich.console import Console

    from ..controller import RequestController, find_controller_folder, load_controller
    from ..executor import EMBEDDED
    from ..latency import (
        Guardrail,
        LatencyEstimatorModel,
        embedded_latency_estimator_path,
        read_latency_estimator,
    )
    from ..latency.clock_check import ClockChecker
    from ..latency.profiling import path_to_measure
    from ..latency.run_as_measured import load_as_measured, torch_threads
    from ..request_path import RequestPath

    controller, options, estimator_path = None, {}, args.latency_estimator_path
    if args.controller_path is not None:
        folder = find_controller_folder(args.controller_path)
        controller = load_controller(folder)
        options = {"knob_space": controller.knob_space, "max_new_tokens": controller.config.max_new_tokens}
        if estimator_path is None and (folder / "latency_estimator").is_dir():
            estimator_path = folder / "latency_estimator"
    if estimator_path is None:
        if args.model_path != EMBEDDED:
            raise ValueError(
                f"give `--latency_estimator_path`: the estimator of '{args.model_path}' that is to be checked."
            )
        estimator_path = embedded_latency_estimator_path()
    base = read_latency_estimator(estimator_path, args.latency_scope)
    if not isinstance(base, LatencyEstimatorModel):
        raise ValueError(
            f"'{estimator_path}' holds a {type(base).__name__}: give an estimator that `joint-controller fit-latency` fitted."
        )
    executor, num_threads = load_as_measured(
        base, args.model_path, **{name: value for name, value in options.items() if value is not None}
    )
    base.check_executor(executor)
    with torch_threads(num_threads):
        if controller is None:
            path = path_to_measure(executor)
        else:
            request_controller = RequestController(controller.to(executor.device))
            path = RequestPath(executor, request_controller, Guardrail(base, executor, None))
        path.warm_up(progress=True)
        checker = ClockChecker(base, executor)
        kept = checker.kept()
        _, check = checker.check(
            path,
            None if kept is None else kept[0],
            args.num_requests,
            args.time_limit_s,
            args.recalibrate,
            args.seed,
        )
    console = Console()
    console.print(_table(check))
    console.print(check.summary(), highlight=False, soft_wrap=True)
    if check.is_kept:
        before = "for the first time" if kept is None else "in place of what an earlier check found"
        console.print(f"Kept {before}: {checker.folder}", highlight=False, soft_wrap=True)
    else:
        console.print("Nothing was kept.")
    if args.json is not None:
        file = Path(args.json)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asdict(check), indent=2) + "\n", encoding="utf-8")


def _table(check: "LatencyCheck") -> "Table":
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(title="Medians over all requests, ms", box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("stage", no_wrap=True)
    for heading in ("predicted", "measured", "ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    for stage, ratio in check.ratios.items():
        name = "decode, a token" if stage == "decode" else stage
        table.add_row(name, f"{check.predicted_ms[stage]:.2f}", f"{check.measured_ms[stage]:.2f}", f"{ratio:.2f}")
    return table


def make_parser() -> ScriptParser:
    return ScriptParser((CheckLatencyArguments,))


if __name__ == "__main__":
    sys.exit(run_script("check-latency", make_parser, main))
