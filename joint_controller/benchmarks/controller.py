"""
Times the controller's two stages for single requests, as serving calls them, against the plain call of its modules.

```bash
joint-controller bench controller
```

On a GPU its inputs have the width of MolmoE-1B's features; on a CPU those of the executor that ships with the package, whose
latency at the full setting is measured in the same run. Features are given, and so is which settings fit and how much of the
budget each would leave, which the controller sees as in serving: the table holds the controller alone, its answer read back to
the host.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from transformers.hf_argparser import HfArg

from ..controller import JointControllerConfig, JointControllerModel, RequestController, SettingFit
from ..data import load_vqa_dataset
from ..executor import EMBEDDED, ExecutorRequest, executor_shape, load_executor, load_input_counter
from ..request_path import RequestPath
from ..scripts import ScriptParser, run_script
from .common import DeviceBenchArguments, check_at_least, machine, make_table, use_threads, write_results


MOLMOE_HIDDEN_SIZE = 2048
"""Width of MolmoE-1B's language model, and so of its features."""

BUDGET_MS = 50.0

LATENCY_RANGE = (0.25, 1.25)
"""Latency of the cheapest and of the full setting as multiples of the budget, which most settings keep."""


@dataclass(kw_only=True)
class BenchControllerArguments(DeviceBenchArguments):
    """
    Arguments of `joint-controller bench controller`.
    """

    num_requests: int = HfArg(default=500, help="Requests that are timed; medians are shown.")


def main(args: BenchControllerArguments) -> None:
    """Times the controller, and shows and writes what it took."""
    check_at_least(args, {"num_requests": 1})
    device = args.torch_device()
    with use_threads(args.num_threads, device):
        results = {
            **machine(device),
            "num_requests": args.num_requests,
            "full_setting_ms": None if device.type == "cuda" else _full_setting_ms(args.seed),
            "ms": _time(args, device),
        }
    write_results(results, args.json)
    ways = results["ms"]
    title = f"Controller, one request at a time, on {results['device_name']} (ms, medians)"
    table = make_table(title, ("", *ways))
    for stage in ("stage 1", "stage 2", "both stages"):
        table.add_row(stage, *(f"{times[stage]:.3f}" for times in ways.values()))
    console = Console()
    console.print(table)
    if results["full_setting_ms"] is not None:
        share = ways["request controller"]["both stages"] / results["full_setting_ms"]
        console.print(f"Both stages are {share:.2%} of the full setting's {results['full_setting_ms']:.1f} ms.")


def _full_setting_ms(seed: int) -> float:
    executor = load_executor(EMBEDDED, "cpu", max_new_tokens=2)
    [sample] = load_vqa_dataset("scenes", "test", 1, seed)
    return RequestPath(executor).time(ExecutorRequest.of(sample, executor.knob_space.full)).total_ms


@torch.inference_mode()
def _time(args: BenchControllerArguments, device: torch.device) -> dict[str, dict[str, float]]:
    """Milliseconds of each stage, by each way: request by request in turn, so that both see the same machine."""
    _, shape = executor_shape(EMBEDDED)
    width = MOLMOE_HIDDEN_SIZE if device.type == "cuda" else shape["text_config.hidden_size"]
    config = JointControllerConfig(
        knob_space=load_input_counter(EMBEDDED).knob_space.to_dict(),
        question_size=width,
        vision_size=width,
        latency_budget_min_ms=0.2 * BUDGET_MS,
        latency_budget_max_ms=2 * BUDGET_MS,
        sees_slack=True,
    )
    torch.manual_seed(args.seed)
    controller = JointControllerModel(config).to(device).eval()
    request_controller = RequestController(controller)
    question, vision = (torch.randn(1, width, device=device) for _ in range(2))
    # On the CPU, where a guardrail predicts.
    fit = SettingFit.of(BUDGET_MS * torch.linspace(*LATENCY_RANGE, len(controller.knob_space))[None], BUDGET_MS)

    def budget() -> torch.Tensor:
        return torch.tensor([BUDGET_MS], device=device)

    def stage1() -> list[int]:
        return controller.score_stage1(question, budget(), fit.to(device)).argmax(dim=-1).tolist()

    def stage2(first: list[int]) -> list[int]:
        taken = torch.tensor(first, device=device)
        return controller.score_stage2(vision, question, budget(), taken, fit.to(device)).argmax(dim=-1).tolist()

    ways: dict[str, tuple[Callable, Callable]] = {
        "modules": (stage1, stage2),
        "request controller": (
            lambda: request_controller.choose_stage1(question, BUDGET_MS, fit),
            lambda first: request_controller.choose_stage2(vision),
        ),
    }
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    num_warm_ups = max(10, args.num_requests // 10)
    for number in range(num_warm_ups + args.num_requests):
        for way, (first, second) in ways.items():
            started = time.perf_counter()
            chosen = first()
            between = time.perf_counter()
            second(chosen)
            ended = time.perf_counter()
            if number >= num_warm_ups:
                times[way].append((1000 * (between - started), 1000 * (ended - between)))
    stages = {"stage 1": lambda pair: pair[0], "stage 2": lambda pair: pair[1], "both stages": sum}
    return {
        way: {stage: statistics.median(map(ms_of, pairs)) for stage, ms_of in stages.items()}
        for way, pairs in times.items()
    }


def make_parser() -> ScriptParser:
    return ScriptParser([BenchControllerArguments])


if __name__ == "__main__":
    sys.exit(run_script("bench controller", make_parser, main))
