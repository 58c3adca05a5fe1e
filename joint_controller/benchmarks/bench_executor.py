"""
Times the executor beside transformers' own modules, in the same run: single requests by stage, and batches.

```bash
joint-controller bench executor
```

By default, on a GPU the executor has the sizes of MolmoE-1B and random weights, which are made there; on a CPU it is the
one that ships with the package. Image processing is not in any number.
"""

import json
import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..scripts import ScriptParser, run_script
from ..scripts.executor_arguments import open_executor
from .bench_executor_checks import (
    format_agreement,
    format_grid,
    format_memory,
    measure_agreement,
    measure_grid,
    measure_memory,
)
from .bench_requests import RememberingProcessor, RequestMaker


if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from ..executor import ExecutorRequest
    from ..knobs import KnobSetting
    from ..molmo.executor import MolmoExecutor


BATCHED_RUNS = 3
"""Times that all requests are answered in batches; the median counts."""


@dataclass(frozen=True)
class Case:
    """
    A row of the table about single requests.

    Args:
        tier (`str`), top_k (`int`), num_blocks (`int`):
            The setting.
        num_crops (`int`):
            Crops of the image.
        num_tokens (`int`):
            Tokens of the prompt, which its question fills up. 0: those of a question of five words.
        stage (`str`):
            `"first token"` (vision tower to first token) or `"decode"` (each further token).
        limit_ms (`float`, *optional*):
            What must be reached on an H100; where `None`, 0.7 times what transformers' modules take on a CPU.
    """

    tier: str
    top_k: int
    num_blocks: int
    num_crops: int
    num_tokens: int
    stage: str
    limit_ms: float | None

    def __str__(self) -> str:
        where = f"top_k {self.top_k}, {self.num_blocks} blocks"
        tokens = f", {self.num_tokens:,} tokens" if self.num_tokens else ""
        if self.stage == "decode":
            return f"decode, {where}, {1 + self.num_crops} views{tokens} (ms/token)"
        return f"image to first token, {where}, {1 + self.num_crops} views{tokens} (ms)"


MOLMOE_CASES = (
    Case("medium", 8, 16, 6, 1076, "decode", 1.5),
    Case("medium", 4, 12, 6, 1076, "decode", 0.95),
    Case("medium", 8, 16, 6, 1076, "first token", 17.0),
    Case("high", 8, 16, 12, 1940, "first token", 27.0),
    Case("low", 4, 12, 2, 500, "first token", 9.5),
)
"""Single requests at the sizes of MolmoE-1B."""

MOLMOE_AUTHORITY = 2.2
"""Least ratio between the last two of `MOLMOE_CASES`: what the knobs can save."""

MOLMOE_REQUESTS_PER_S = 45.0
"""Batched answers that must be reached on an H100."""


@dataclass
class BenchExecutorArguments:
    """
    Arguments of `joint-controller bench executor`.
    """

    model_path: str | None = field(
        default=None,
        metadata={
            "help": "Executor to measure: a folder or Hub name of a Molmo, `embedded` for the one that ships, or "
            "`random:molmoe-1b` for random weights of MolmoE-1B's sizes, made on the device: they cost the same. Default: "
            "random:molmoe-1b on a GPU, embedded on a CPU."
        },
    )
    device: str | None = field(default=None, metadata={"help": "Device. Default: cuda where there is one, else cpu."})
    repeats: int = field(default=20, metadata={"help": "Times that a single request is measured; medians are shown."})
    stock_repeats: int = field(default=5, metadata={"help": "The same, for transformers' own modules."})
    num_requests: int = field(
        default=256, metadata={"help": "Requests of mixed settings that are answered in batches."}
    )
    num_stock_requests: int | None = field(
        default=None,
        metadata={
            "help": "How many of these transformers' modules answer one by one, each with as many tokens as the executor's "
            "answer has. Default: 8 on a GPU, 64 on a CPU."
        },
    )
    batch_size: int | None = field(
        default=None, metadata={"help": "Most requests in a batch. Default: 128 on a GPU, 16 on a CPU."}
    )
    max_batch_tokens: int = field(default=131072, metadata={"help": "Most prompt tokens in a batch."})
    num_workers: int = field(
        default=2, metadata={"help": "Batches that are answered at the same time, each by a thread of its own (CPU)."}
    )
    num_threads: int | None = field(
        default=None,
        metadata={
            "help": "Threads that share one operation on the CPU. Default: torch's for a GPU's host, else 1, as the recipes "
            "have it: operations of the embedded executor are too small to share."
        },
    )
    max_new_tokens: int = field(default=8, metadata={"help": "Tokens of an answer."})
    grid_repeats: int = field(
        default=8,
        metadata={
            "help": "Times that every two neighbouring settings are measured in turn, to see that no knob's higher value is "
            "faster; up to eight times as often where that does not decide (fewer than 8 never do). 0: not."
        },
    )
    num_agreement: int = field(
        default=0,
        metadata={
            "help": "Requests at random settings whose answers and scores are compared with those of transformers' "
            "modules, alone and in batches, and those of the modules with themselves, with other experts. 0: none."
        },
    )
    num_memory: int = field(
        default=0, metadata={"help": "Requests at random settings over which memory is watched. 0: none."}
    )
    seed: int = field(default=42, metadata={"help": "Seed of weights, images, questions and settings."})
    json: str | None = field(default=None, metadata={"help": "File to write the results to, too."})


def main(args: BenchExecutorArguments):
    _check(args)
    import torch
    from rich.console import Console

    from ..latency.profiling import device_name

    console = Console()
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    is_cuda = device.type == "cuda"
    args = replace(
        args,
        model_path=args.model_path or ("random:molmoe-1b" if is_cuda else "embedded"),
        batch_size=args.batch_size or (128 if is_cuda else 16),
        num_stock_requests=args.num_stock_requests or (8 if is_cuda else 64),
    )
    if args.num_threads is not None or not is_cuda:
        torch.set_num_threads(args.num_threads or 1)
    started = time.perf_counter()
    executor, stock = _open_executors(args, device)
    console.print(f"{args.model_path} is on {device} after {time.perf_counter() - started:.0f} s.")
    bench = _Bench(args, executor, stock)
    results: dict[str, Any] = {
        "device_name": device_name(device),
        "torch_version": torch.__version__,
        "model_path": args.model_path,
        "mode": executor.mode,
        "precision": str(executor.model.dtype).removeprefix("torch."),
    }
    results["rows"] = bench.single_requests() + bench.batches()
    results["captures"] = bench.captures()
    _write(results, args.json)
    console.print(bench.format_table(results))
    if args.grid_repeats:
        results["grid"] = measure_grid(executor, bench.maker, args.grid_repeats, args.max_new_tokens - 1)
        _write(results, args.json)
        console.print(format_grid(results["grid"]))
    if args.num_agreement:
        requests = bench.maker.mixed(args.num_agreement, 100, "agreement")
        results["agreement"] = measure_agreement(executor, stock, requests, args.seed)
        _write(results, args.json)
        console.print(format_agreement(results["agreement"]))
    if args.num_memory:
        results["memory"] = measure_memory(executor, bench.maker.mixed(args.num_memory, 40, "memory"))
        console.print(format_memory(results["memory"]))
    results["captures_at_the_end"] = bench.captures()
    _write(results, args.json)
    if results["captures"]:
        what = "{graphs} graphs, {mib:.0f} MiB, captured in {seconds:.1f} s"
        first, last = (what.format(**results[when]) for when in ("captures", "captures_at_the_end"))
        console.print(f"After the first table: {first}. At the end: {last}.")


def _write(results: dict[str, Any], path: str | None):
    """Writes what has been measured so far: the checks take minutes, and may be interrupted."""
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def _open_executors(args: BenchExecutorArguments, device: "torch.device") -> "tuple[MolmoExecutor, MolmoExecutor]":
    """The executor in its fastest mode, and in the mode `"plain"`."""
    from ..molmo.executor import MolmoExecutor

    options = {
        "batch_size": args.batch_size,
        "max_batch_tokens": args.max_batch_tokens,
        "num_workers": args.num_workers,
        "max_new_tokens": args.max_new_tokens,
    }
    executor = open_executor(args.model_path, device, seed=args.seed, **options)
    if args.model_path.startswith("random:"):  # not a second time: the weights may be most of the memory
        return executor, MolmoExecutor(
            executor.model, executor.processor, executor.knob_space, mode="plain", **options
        )
    return executor, open_executor(args.model_path, device, mode="plain", **options)


def _check(args: BenchExecutorArguments):
    if args.num_threads is not None and args.num_threads < 1:
        raise ValueError(f"`num_threads` is {args.num_threads}: give 1 or more.")
    for name in (
        "num_workers",
        "repeats",
        "stock_repeats",
        "num_requests",
        "num_stock_requests",
        "batch_size",
        "max_batch_tokens",
    ):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"`{name}` is {getattr(args, name)}: give 1 or more.")
    if args.max_new_tokens < 2:
        raise ValueError(f"`max_new_tokens` is {args.max_new_tokens}: give 2 or more, so that something is decoded.")
    for name in ("grid_repeats", "num_agreement", "num_memory"):
        if getattr(args, name) < 0:
            raise ValueError(f"`{name}` is {getattr(args, name)}: give 0 (not at all) or more.")


def _cases_of(maker: RequestMaker) -> tuple[Case, ...]:
    """The highest and the cheapest setting, as an executor of other sizes than MolmoE-1B's is asked."""
    return tuple(
        Case(setting.tier, setting.top_k, setting.num_blocks, maker.crops_of(setting.tier)[-1], 0, stage, None)
        for setting in (maker.knob_space.full, maker.knob_space.cheapest)
        for stage in ("decode", "first token")
    )


class _Bench:
    """
    Measures an executor.

    Args:
        args ([`BenchExecutorArguments`]):
            Arguments of the command.
        executor ([`MolmoExecutor`]):
            The executor, in its fastest mode.
        stock ([`MolmoExecutor`]):
            The same model in the mode `"plain"`.
    """

    def __init__(self, args: BenchExecutorArguments, executor: "MolmoExecutor", stock: "MolmoExecutor"):
        from ..latency import executor_shape
        from ..molmo import MolmoConfig

        self.args = args
        self.executor = executor
        self.stock = stock
        self.executor.processor = self.stock.processor = RememberingProcessor(executor.processor)
        self.maker = RequestMaker(executor, args.seed)
        self.is_cuda = executor.device.type == "cuda"
        self.is_molmoe = self.is_cuda and executor_shape(executor.model.config) == executor_shape(MolmoConfig())
        self.cases = MOLMOE_CASES if self.is_molmoe else _cases_of(self.maker)
        self._rates = self._measure_rates() if self.is_molmoe else None

    def _request(self, case: Case) -> "ExecutorRequest":
        from ..knobs import KnobSetting

        setting = KnobSetting(case.tier, case.top_k, case.num_blocks)
        return self.maker.make("case/0", setting, case.num_crops, case.num_tokens, seed=0)

    # --- floors ---------------------------------------------------------------------------------------------------

    def _measure_rates(self) -> tuple[float, float]:
        """Operations (bfloat16 products) and bytes (copies, read and written) of the device in a millisecond."""
        import torch

        side, size = 8192, 2**31
        a, b = (torch.randn(side, side, device=self.executor.device, dtype=torch.bfloat16) for _ in range(2))
        one, other = (torch.empty(size, dtype=torch.uint8, device=self.executor.device) for _ in range(2))
        times = []
        for work in (lambda: a @ b, lambda: one.copy_(other)):
            for turn in range(8):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                work()
                end.record()
                end.synchronize()
                times.append((turn, start.elapsed_time(end)))
        products, copies = times[:8], times[8:]
        return (
            2 * side**3 / statistics.median(elapsed for turn, elapsed in products if turn > 2),
            2 * size / statistics.median(elapsed for turn, elapsed in copies if turn > 2),
        )

    def _floor_ms(self, case: Case) -> float | None:
        """What arithmetic or memory take at least, whichever is more, stage by stage."""
        if self._rates is None:
            return None
        operations, num_bytes = self._rates
        text, vision = self.executor.model.config.text_config, self.executor.model.config.vision_config
        width, tokens = text.hidden_size, case.num_tokens
        expert, attention = 3 * width * text.intermediate_size, 4 * width**2
        if case.stage == "decode":
            weights = case.num_blocks * (attention + case.top_k * expert + 2 * tokens * width)
            return 2 * (weights + text.vocab_size * width) / num_bytes
        patches = 1 + (vision.image_size // vision.patch_size) ** 2
        block = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
        rows = (1 + case.num_crops) * patches
        tower_blocks = self.executor.model.model.vision_tower.num_blocks_read
        tower = tower_blocks * rows * (2 * block + 4 * patches * vision.hidden_size)
        arithmetic = case.num_blocks * tokens * (2 * attention + 2 * case.top_k * expert + 2 * tokens * width)
        touched = min(text.num_experts, tokens * case.top_k)
        weights = 2 * case.num_blocks * (attention + touched * expert)
        return tower / operations + max(arithmetic / operations, weights / num_bytes)

    # --- single requests ------------------------------------------------------------------------------------------

    def _time(self, executor: "MolmoExecutor", request: "ExecutorRequest", repeats: int) -> dict[str, float]:
        times = executor.time_request(request, repeats, warmup=2, decode_steps=self.args.max_new_tokens - 1)
        return {
            "first token": times.vision_ms + times.llm_prefill_ms,
            "decode": statistics.median(times.decode_ms),
        }

    def _time_stock(self, request: "ExecutorRequest", repeats: int) -> dict[str, float]:
        """The best of transformers' implementations of experts, for each stage."""
        config = self.stock.model.config.text_config
        usual = config._experts_implementation
        best: dict[str, float] = {}
        for implementation in ("grouped_mm", "batched_mm") if self.is_cuda else ("grouped_mm", "eager"):
            # `set_experts_implementation` does not reach the language model's configuration.
            config._experts_implementation = implementation
            if implementation == "batched_mm":
                times = {"decode": self._time_stock_decode(request, repeats)}
            else:
                times = self._time(self.stock, request, repeats)
            best = {stage: min(ms, best.get(stage, ms)) for stage, ms in {**best, **times}.items()}
        config._experts_implementation = usual
        return best

    def _stock_answer_ms(self, request: "ExecutorRequest", num_tokens: int) -> float:
        """An answer of so many tokens by transformers' modules, with the better implementation of experts for it."""
        config = self.stock.model.config.text_config
        usual = config._experts_implementation
        answer_ms = []
        for implementation in ("grouped_mm",) if self.is_cuda else ("grouped_mm", "eager"):
            config._experts_implementation = implementation
            times = self.stock.time_request(request, 1, warmup=2, decode_steps=num_tokens - 1)
            answer_ms.append(times.vision_ms + times.llm_prefill_ms + sum(times.decode_ms))
        config._experts_implementation = usual
        return min(answer_ms)

    def _time_stock_decode(self, request: "ExecutorRequest", repeats: int) -> float:
        """Each further token with copies of the chosen experts' weights, which a whole prompt would be too much for."""
        import torch

        from ..executor.stage_clock import StageClock

        config = self.stock.model.config.text_config
        encoded = self.stock.encode([request], request.setting.tier)
        config._experts_implementation = "grouped_mm"
        blocks = self.stock.active_blocks(request.setting.num_blocks, request.sample_id)
        decoding = self.stock.start(encoded, request.setting.top_k, blocks)
        config._experts_implementation = "batched_mm"
        clock = StageClock(self.stock.device)
        for _ in range(repeats * (self.args.max_new_tokens - 1) + 2):
            clock.mark()
            with torch.inference_mode():
                decoding.step()
        clock.mark()
        return statistics.median(clock.stages_ms()[2:])

    def single_requests(self) -> list[dict[str, Any]]:
        """Rows of the table about single requests."""
        rows = []
        for case in self.cases:
            request = self._request(case)
            ours = self._time(self.executor, request, self.args.repeats)[case.stage]
            theirs = self._time_stock(request, self.args.stock_repeats)[case.stage]
            limit = case.limit_ms
            if limit is None and not self.is_cuda:
                limit = 0.7 * theirs
            rows.append(_row(str(case), theirs, limit, ours, self._floor_ms(case)))
        if self.executor.mode == "captured":
            rows.append(_row("change of setting between requests (ms)", None, 0.1, self._time_change(), None))
        if self.is_molmoe:
            most, least = rows[3:5]
            ratios = [most[column] / least[column] for column in ("stock", "ours", "floor")]
            rows.append(
                _row(
                    "knob authority: 13 views at full over 3 views",
                    ratios[0],
                    MOLMOE_AUTHORITY,
                    *ratios[1:],
                    higher=True,
                )
            )
        return rows

    def _time_change(self) -> float:
        """What a prefill takes longer if the one before it had another setting."""

        from ..executor.stage_clock import StageClock

        space = self.executor.knob_space
        full, cheapest = space.full, space.cheapest
        [encoded] = self.executor.encode([self._request(self.cases[-1])], self.cases[-1].tier)

        # Each setting twice in a row: the first time after the other one, the second time after itself.
        times: dict[tuple[KnobSetting, bool], list[float]] = {}
        for turn in range(8 * self.args.repeats):
            setting = (full, cheapest)[turn // 2 % 2]
            blocks = self.executor.active_blocks(setting.num_blocks)
            clock = StageClock(self.executor.device)
            clock.mark()
            self.executor.start([encoded], setting.top_k, blocks)
            clock.mark()
            if turn >= 4:  # before that, captures
                times.setdefault((setting, turn % 2 == 0), []).extend(clock.stages_ms())
        return statistics.fmean(
            statistics.median(times[setting, True]) - statistics.median(times[setting, False])
            for setting in (full, cheapest)
        )

    # --- batches --------------------------------------------------------------------------------------------------

    def batches(self) -> list[dict[str, Any]]:
        """The table's row about batches."""
        requests = self.maker.mixed(self.args.num_requests, self.args.num_requests, "batched")
        outputs = self.executor.run(requests)  # first uses
        stock = range(0, len(requests), max(1, len(requests) // self.args.num_stock_requests))
        batched_s, stock_ms = [], []
        for turn in range(BATCHED_RUNS):  # both in turn: a machine's clock wanders
            batched_s.append(self._answer_s(requests))
            stock_ms += [
                self._stock_answer_ms(requests[i], outputs[i].output_tokens) for i in stock[turn::BATCHED_RUNS]
            ]
        ours = len(requests) / statistics.median(batched_s)
        theirs = 1000 * len(stock_ms) / sum(stock_ms)
        alone = requests[: max(32, self.args.num_stock_requests)]
        for request in alone:
            self._answer_s([request])
        loop = len(alone) / sum(self._answer_s([request]) for request in alone)
        limit = None if self.is_cuda else 4 * theirs
        if self.is_molmoe:
            limit = max(MOLMOE_REQUESTS_PER_S, 20 * theirs)
        what = f"mixed settings, up to {self.args.max_new_tokens} tokens (requests/s)"
        return [
            _row(f"batched answering, {what}", theirs, limit, ours, None, higher=True),
            _row(f"one by one, {what}", theirs, None, loop, None, higher=True),
        ]

    def _answer_s(self, requests: "list[ExecutorRequest]") -> float:
        """Seconds that requests take about images that have not been seen before."""
        import torch

        self.executor.forget_images()
        started = time.perf_counter()
        self.executor.run(requests)
        if self.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def captures(self) -> dict[str, Any] | None:
        """Graphs and their memory, where there are any."""
        if self.executor.mode != "captured":
            return None
        graphs = self.executor.inference.graphs
        return {"graphs": len(graphs), "mib": graphs.num_bytes / 2**20, "seconds": graphs.capture_seconds}

    def format_table(self, results: dict[str, Any]) -> "Table":
        """The table of single requests and batches."""
        from rich.table import Table

        table = Table(
            title="{model_path} in {precision} on {device_name}, torch {torch_version}, mode {mode}".format(**results),
            title_justify="left",
        )
        # What a GPU must reach is set for an H100, a CPU's limits are shares of the baseline.
        for name in ("", "stock", "required (H100)" if self.is_cuda else "required", "ours", "floor"):
            table.add_column(name, justify="right" if name else "left")
        for row in results["rows"]:
            stock, limit, floor = (
                "" if row[key] is None else f"{row[key]:.2f}" for key in ("stock", "limit", "floor")
            )
            if limit:
                limit = f"{'≥' if row['higher_is_better'] else '≤'} {limit}"
            table.add_row(row["what"], stock, limit, f"{row['ours']:.2f}", floor)
        return table


def _row(
    what: str, stock: float | None, limit: float | None, ours: float, floor: float | None, higher: bool = False
) -> dict[str, Any]:
    """A row of the table. `higher`: more is better."""
    return {"what": what, "stock": stock, "limit": limit, "ours": ours, "floor": floor, "higher_is_better": higher}


def make_parser() -> ScriptParser:
    return ScriptParser((BenchExecutorArguments,))


if __name__ == "__main__":
    sys.exit(run_script("bench executor", make_parser, main))
