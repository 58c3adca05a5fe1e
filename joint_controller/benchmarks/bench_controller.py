"""
Times the controller's two stages for single requests, as serving calls them, beside the plain call of its modules.

```bash
joint-controller bench controller
```

On a GPU its inputs have the width of MolmoE-1B's features; on a CPU those of the executor that ships with the package, whose
latency at the full setting is measured in the same run. Features are given: the table holds the controller alone, its answer
read back to the host.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..scripts import ScriptParser, run_script


if TYPE_CHECKING:
    import torch

    from ..controller import JointControllerModel


MOLMOE_HIDDEN_SIZE = 2048
"""Width of MolmoE-1B's language model, and so of its features."""

LIMIT_ON_GPU_MS = 0.2
LIMIT_ON_CPU = 0.01
"""What both stages may take: in ms on a GPU, and as a share of the full setting's latency on a CPU."""


@dataclass
class BenchControllerArguments:
    """
    Arguments of `joint-controller bench controller`.
    """

    device: str | None = field(default=None, metadata={"help": "Device. Default: cuda where there is one, else cpu."})
    num_requests: int = field(default=500, metadata={"help": "Requests that are timed; medians are shown."})
    num_threads: int = field(default=1, metadata={"help": "Threads that share one operation on the CPU."})
    seed: int = field(default=42, metadata={"help": "Seed of weights and features."})
    json: str | None = field(default=None, metadata={"help": "File to write the results to, too."})


def main(args: BenchControllerArguments):
    if args.num_requests < 1:
        raise ValueError(f"`num_requests` is {args.num_requests}: give 1 or more.")
    if args.num_threads < 1:
        raise ValueError(f"`num_threads` is {args.num_threads}: give 1 or more.")
    import torch
    from rich.console import Console
    from rich.table import Table

    from ..latency.profiling import device_name

    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    num_threads = torch.get_num_threads()
    torch.set_num_threads(args.num_threads)
    try:
        full_setting_ms = None if device.type == "cuda" else _full_setting_ms(args.seed)
        times_ms = _time(args, device)
    finally:
        torch.set_num_threads(num_threads)
    limit_ms = LIMIT_ON_GPU_MS if full_setting_ms is None else LIMIT_ON_CPU * full_setting_ms
    results = {
        "device_name": device_name(device),
        "torch_version": torch.__version__,
        "num_requests": args.num_requests,
        "ms": times_ms,
        "full_setting_ms": full_setting_ms,
        "limit_ms": limit_ms,
    }
    if args.json is not None:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    table = Table(title=f"Controller, one request at a time, on {results['device_name']} (ms, medians)")
    for heading in ("", "modules", "request controller"):
        table.add_column(heading, justify="right" if heading else "left")
    for stage in ("stage 1", "stage 2", "both stages"):
        table.add_row(stage, *(f"{times_ms[way][stage]:.3f}" for way in ("modules", "request controller")))
    console = Console()
    console.print(table)
    share = "" if full_setting_ms is None else f" (1 % of the full setting's {full_setting_ms:.1f} ms)"
    console.print(f"Both stages may take {limit_ms:.3f} ms{share}.")


def _full_setting_ms(seed: int) -> float:
    from ..data import load_vqa_dataset
    from ..executor import ExecutorRequest
    from ..molmo.executor import MolmoExecutor

    executor = MolmoExecutor.from_pretrained("embedded", max_new_tokens=2, device="cpu")
    [sample] = load_vqa_dataset("scenes", "test", 1, seed)
    times = executor.time_request(ExecutorRequest.of(sample, executor.knob_space.full))
    return times.vision_ms + times.llm_prefill_ms + sum(times.decode_ms)


def _controller(device: "torch.device", seed: int) -> "JointControllerModel":
    import torch

    from ..controller import JointControllerConfig, JointControllerModel
    from ..knobs import KnobSpace
    from ..molmo import MolmoConfig
    from ..molmo.executor import embedded_executor_path

    config = MolmoConfig.from_pretrained(embedded_executor_path())
    width = MOLMOE_HIDDEN_SIZE if device.type == "cuda" else config.text_config.hidden_size
    torch.manual_seed(seed)
    controller = JointControllerModel(
        JointControllerConfig(
            knob_space=KnobSpace.from_executor_config(config).to_dict(),
            question_size=width,
            vision_size=width,
            latency_budget_min_ms=10.0,
            latency_budget_max_ms=100.0,
        )
    )
    return controller.to(device).eval()


def _time(args: BenchControllerArguments, device: "torch.device") -> dict[str, dict[str, float]]:
    """Milliseconds of each stage, by each way: request by request in turn, so that both see the same machine."""
    import torch

    from ..controller import RequestController

    controller = _controller(device, args.seed)
    request_controller = RequestController(controller)
    question = torch.randn(1, controller.config.question_size, device=device)
    vision = torch.randn(1, controller.config.vision_size, device=device)

    def stage1() -> int:
        with torch.inference_mode():
            return controller.stage1(question, torch.tensor([50.0], device=device)).argmax(dim=-1).item()

    def stage2(tier_index: int) -> list[int]:
        with torch.inference_mode():
            tier = torch.tensor([tier_index], device=device)
            logits = controller.stage2(vision, question, torch.tensor([50.0], device=device), tier)
            return torch.cat([knob.argmax(dim=-1) for knob in logits]).tolist()

    ways: dict[str, tuple[Callable, Callable]] = {
        "modules": (stage1, stage2),
        "request controller": (
            lambda: request_controller.choose_tier(question, 50.0),
            lambda tier_index: request_controller.choose_depth(vision),
        ),
    }
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    num_warm_ups = max(10, args.num_requests // 10)
    for number in range(num_warm_ups + args.num_requests):
        for way, (first, second) in ways.items():
            started = time.perf_counter()
            tier_index = first()
            between = time.perf_counter()
            second(tier_index)
            ended = time.perf_counter()
            if number >= num_warm_ups:
                times[way].append((1000 * (between - started), 1000 * (ended - between)))
    return {
        way: {
            "stage 1": statistics.median(first for first, _ in pairs),
            "stage 2": statistics.median(second for _, second in pairs),
            "both stages": statistics.median(first + second for first, second in pairs),
        }
        for way, pairs in times.items()
    }


def make_parser() -> ScriptParser:
    return ScriptParser((BenchControllerArguments,))


if __name__ == "__main__":
    sys.exit(run_script("bench controller", make_parser, main))
