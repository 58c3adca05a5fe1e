"""
Times the executor against transformers' own modules, in the same run: single requests by stage, and batches.

```bash
joint-controller bench executor
```

By default, on a GPU the executor has the sizes of MolmoE-1B and random weights, which are made there; on a CPU it is the
one that ships with the package. Image processing is in the rows "by the clock" alone.
"""

import statistics
import sys
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers.hf_argparser import HfArg

from ..executor import EMBEDDED, ExecutorRequest, StageClock
from ..knobs import KnobSetting
from ..latency.profiling import path_to_measure
from ..molmo import MolmoConfig
from ..molmo.executor import MolmoExecutor
from ..molmo.shape import molmo_shape
from ..request_path import RequestPath
from ..scripts import ScriptParser, run_script
from .common import (
    ExecutorBenchArguments,
    answer_ms,
    check_at_least,
    first_token_ms,
    machine,
    make_table,
    open_executors,
    use_experts,
    use_threads,
    write_results,
)
from .executor_checks import (
    format_agreement,
    format_grid,
    format_memory,
    measure_agreement,
    measure_grid,
    measure_memory,
)
from .requests import RequestMaker, remember_images


BATCHED_RUNS = 3
"""Times that all requests are answered in batches; the median counts."""

FIRST_TOKEN, DECODE = "first token", "decode"
"""Stages of a request: from the vision tower to the first token, and each further token."""


@dataclass(frozen=True)
class Case:
    """A row of the table about single requests."""

    setting: KnobSetting
    num_crops: int
    num_tokens: int  # of the prompt, which its question fills up; 0: those of a question of five words
    stage: str

    def __str__(self) -> str:
        what, unit = ("decode", "ms/token") if self.stage == DECODE else ("image to first token", "ms")
        tokens = f", {self.num_tokens:,} tokens" if self.num_tokens else ""
        knobs = "top_k {top_k}, {num_blocks} blocks".format(**self.setting)
        return f"{what}, {knobs}, {1 + self.num_crops} views{tokens} ({unit})"


MOLMOE_CASES = tuple(
    Case(KnobSetting(tier=tier, top_k=top_k, num_blocks=num_blocks), num_crops, num_tokens, stage)
    for tier, top_k, num_blocks, num_crops, num_tokens, stage in (
        ("medium", 8, 16, 6, 1076, DECODE),
        ("medium", 4, 12, 6, 1076, DECODE),
        ("medium", 8, 16, 6, 1076, FIRST_TOKEN),
        ("high", 8, 16, 12, 1940, FIRST_TOKEN),
        ("low", 4, 12, 2, 500, FIRST_TOKEN),
    )
)
"""Single requests at the sizes of MolmoE-1B. The ratio between the last two is what the knobs can save."""


@dataclass(kw_only=True)
class BenchExecutorArguments(ExecutorBenchArguments):
    """
    Arguments of `joint-controller bench executor`.
    """

    repeats: int = HfArg(default=20, help="Times that a single request is measured; medians are shown.")
    stock_repeats: int = HfArg(default=5, help="The same, for transformers' own modules.")
    num_requests: int = HfArg(default=256, help="Requests of mixed settings that are answered in batches.")
    num_stock_requests: int | None = HfArg(
        default=None,
        help="How many of these transformers' modules answer one by one, each with as many tokens as the executor's "
        "answer has. Default: 8 on a GPU, 64 on a CPU.",
    )
    max_batch_tokens: int = HfArg(default=131072, help="Most prompt tokens in a batch.")
    max_new_tokens: int = HfArg(default=8, help="Tokens of an answer.")
    grid_repeats: int = HfArg(
        default=8,
        help="Times that every two neighbouring settings are measured in turn, to see that no knob's higher value is "
        "faster; up to eight times as often where that does not decide (fewer than 8 never do). 0: not.",
    )
    num_agreement: int = HfArg(
        default=0,
        help="Requests at random settings whose answers and scores are compared with those of transformers' modules, "
        "alone and in batches, and those of the modules with themselves, with other experts. 0: none.",
    )
    num_memory: int = HfArg(default=0, help="Requests at random settings over which memory is watched. 0: none.")


def main(args: BenchExecutorArguments) -> None:
    """Times the executor, and shows and writes what it took."""
    positive = ("num_workers", "repeats", "stock_repeats", "num_requests", "num_stock_requests", "batch_size")
    not_negative = ("grid_repeats", "num_agreement", "num_memory")
    least = dict.fromkeys((*positive, "max_batch_tokens"), 1) | dict.fromkeys(not_negative, 0)
    check_at_least(args, {**least, "max_new_tokens": 2})  # of 2 tokens, one is decoded
    device = args.torch_device()
    is_cuda = device.type == "cuda"
    args = replace(
        args,
        model_path=args.model_path or ("random:molmoe-1b" if is_cuda else EMBEDDED),
        batch_size=args.batch_size or (128 if is_cuda else 16),
        num_stock_requests=args.num_stock_requests or (8 if is_cuda else 64),
    )
    with use_threads(args.num_threads, device):
        _measure(args, device)


def _measure(args: BenchExecutorArguments, device: torch.device) -> None:
    console = Console()
    started = time.perf_counter()
    options = {name: vars(args)[name] for name in ("batch_size", "max_batch_tokens", "num_workers", "max_new_tokens")}
    executor, stock = open_executors(args.model_path, device, args.seed, options, options)
    console.print(f"{args.model_path} is on {device} after {time.perf_counter() - started:.0f} s.")
    bench = _Bench(args, executor, stock)
    results: dict[str, Any] = {
        **machine(device),
        "model_path": args.model_path,
        "mode": executor.mode,
        "precision": executor.dtype,
    }

    def keep(name: str, measured: Any, shown: Table | str) -> None:
        # Written at once: what comes next takes minutes, and may be interrupted.
        results[name] = measured
        write_results(results, args.json)
        console.print(shown)

    rows = bench.single_requests() + bench.batches()
    keep("rows", rows, _format_rows(rows, results))
    by_the_clock = bench.whole_requests()
    keep("whole_requests", by_the_clock, _format_whole_requests(by_the_clock))
    if args.grid_repeats:
        grid = measure_grid(executor, bench.maker, args.grid_repeats, args.max_new_tokens - 1)
        keep("grid", grid, format_grid(grid))
    if args.num_agreement:
        requests = bench.maker.mixed(args.num_agreement, 100, "agreement")
        agreement = measure_agreement(executor, stock, requests, args.seed)
        keep("agreement", agreement, format_agreement(agreement))
    if args.num_memory:
        memory = measure_memory(executor, bench.maker.mixed(args.num_memory, 40, "memory"))
        keep("memory", memory, format_memory(memory))
    if executor.mode == "captured":
        graphs = executor.inference.graphs
        captures = {"graphs": len(graphs), "mib": graphs.num_bytes / 2**20, "seconds": graphs.capture_seconds}
        shown = "Captured: {graphs} graphs, {mib:.0f} MiB, in {seconds:.1f} s.".format(**captures)
        keep("captures", captures, shown)


class _Bench:
    """Measures the rows of the first table. `stock` is the model of `executor` in the mode `"plain"`."""

    def __init__(self, args: BenchExecutorArguments, executor: MolmoExecutor, stock: MolmoExecutor):
        self.args = args
        self.executor = executor
        self.stock = stock
        self.maker = RequestMaker(executor, args.seed)
        self.is_cuda = executor.device.type == "cuda"
        self.is_molmoe = self.is_cuda and executor.shape == molmo_shape(MolmoConfig())
        space = executor.knob_space
        self.cases = (
            MOLMOE_CASES
            if self.is_molmoe
            else tuple(
                Case(setting, self.maker.crops_of(setting["tier"])[-1], 0, stage)
                for setting in (space.full, space.cheapest)
                for stage in (DECODE, FIRST_TOKEN)
            )
        )
        # Implementations of experts that suit a whole prompt; the better one counts.
        self.stock_experts = ("grouped_mm",) if self.is_cuda else ("grouped_mm", "eager")
        self._rates = self._measure_rates() if self.is_molmoe else None

    def _request(self, case: Case) -> ExecutorRequest:
        return self.maker.make("case/0", case.setting, case.num_crops, case.num_tokens, seed=0)

    # --- floors ---------------------------------------------------------------------------------------------------

    def _measure_rates(self) -> tuple[float, float]:
        """Operations (bfloat16 products) and bytes (copies, read and written) of the device in a millisecond."""
        side, size = 8192, 2**31
        place = {"device": self.executor.device}
        a, b = (torch.randn(side, side, dtype=torch.bfloat16, **place) for _ in range(2))
        one, other = (torch.empty(size, dtype=torch.uint8, **place) for _ in range(2))

        def median_ms(work) -> float:
            clock = StageClock(self.executor.device)
            for _ in range(8):
                work()
                clock.mark("work")
            return statistics.median(clock.stop("end")["work"][3:])

        return 2 * side**3 / median_ms(lambda: a @ b), 2 * size / median_ms(lambda: one.copy_(other))

    def _floor_ms(self, case: Case) -> float | None:
        """What arithmetic or memory take at least, whichever is more, stage by stage."""
        if self._rates is None:
            return None
        operations, num_bytes = self._rates
        text, vision = self.executor.model.config.text_config, self.executor.model.config.vision_config
        top_k, num_blocks = case.setting["top_k"], case.setting["num_blocks"]
        width, tokens = text.hidden_size, case.num_tokens
        expert, attention = 3 * width * text.intermediate_size, 4 * width**2
        if case.stage == DECODE:
            weights = num_blocks * (attention + top_k * expert + 2 * tokens * width)
            return 2 * (weights + text.vocab_size * width) / num_bytes
        patches = 1 + (vision.image_size // vision.patch_size) ** 2
        block = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
        rows = (1 + case.num_crops) * patches
        tower_blocks = self.executor.model.model.vision_tower.num_blocks_read
        tower = tower_blocks * rows * (2 * block + 4 * patches * vision.hidden_size)
        arithmetic = num_blocks * tokens * (2 * attention + 2 * top_k * expert + 2 * tokens * width)
        touched = min(text.num_experts, tokens * top_k)
        weights = 2 * num_blocks * (attention + touched * expert)
        return tower / operations + max(arithmetic / operations, weights / num_bytes)

    # --- single requests ------------------------------------------------------------------------------------------

    def _time(self, executor: MolmoExecutor, request: ExecutorRequest, repeats: int) -> dict[str, float]:
        times = RequestPath(executor).time(request, repeats, warmup=2, decode_steps=self.args.max_new_tokens - 1)
        return {FIRST_TOKEN: first_token_ms(times), DECODE: statistics.median(times.decode_ms)}

    def _time_stock(self, request: ExecutorRequest, repeats: int) -> dict[str, float]:
        """The best of transformers' implementations of experts, for each stage."""
        ways = []
        for implementation in self.stock_experts:
            with use_experts(self.stock, implementation):
                ways.append(self._time(self.stock, request, repeats))
        best = {stage: min(way[stage] for way in ways) for stage in (FIRST_TOKEN, DECODE)}
        if self.is_cuda:
            best[DECODE] = min(best[DECODE], self._time_stock_decode(request, repeats))
        return best

    def _time_stock_decode(self, request: ExecutorRequest, repeats: int) -> float:
        """Each further token with copies of the chosen experts' weights, which a whole prompt would be too much for."""
        encoded = self.stock.encode([request], request.setting["tier"])
        blocks = self.stock.active_blocks(request.setting["num_blocks"], request.sample_id)
        with use_experts(self.stock, "grouped_mm"):
            decoding = self.stock.start(encoded, request.setting["top_k"], blocks)
        clock = StageClock(self.stock.device)
        with use_experts(self.stock, "batched_mm"), torch.inference_mode():
            for _ in range(repeats * (self.args.max_new_tokens - 1) + 2):
                decoding.step()
                decoding.tokens.tolist()  # as in serving, a token is read before the next one
                clock.mark(DECODE)
        return statistics.median(clock.stop("end")[DECODE][2:])

    def _stock_answer_ms(self, request: ExecutorRequest, num_tokens: int) -> float:
        """An answer of a number of tokens by transformers' modules, with the better implementation of experts for it."""
        ways = []
        for implementation in self.stock_experts:
            with use_experts(self.stock, implementation):
                times = RequestPath(self.stock).time(request, 1, warmup=2, decode_steps=num_tokens - 1)
                ways.append(answer_ms(times))
        return min(ways)

    def single_requests(self) -> list[dict[str, Any]]:
        """Rows of the table about single requests."""
        rows = []
        for case in self.cases:
            request = self._request(case)
            ours = self._time(self.executor, request, self.args.repeats)[case.stage]
            theirs = self._time_stock(request, self.args.stock_repeats)[case.stage]
            rows.append(_row(str(case), theirs, ours, self._floor_ms(case)))
        if self.is_molmoe:
            most, least = rows[-2:]
            ratios = [most[column] / least[column] for column in ("stock", "ours", "floor")]
            rows.append(_row("knob authority: 13 views at full over 3 views", *ratios, higher=True))
        if self.executor.mode == "captured":
            rows.append(_row("change of setting between requests (ms)", None, self._time_change()))
        return rows

    def _time_change(self) -> float:
        """What a prefill takes longer if the one before it had another setting."""
        full, cheapest = self.executor.knob_space.full, self.executor.knob_space.cheapest
        [encoded] = self.executor.encode([self._request(self.cases[-1])], self.cases[-1].setting["tier"])
        # Each setting twice in a row: the first time after the other one, the second time after itself.
        times: dict[tuple[KnobSetting, bool], list[float]] = {}
        for turn in range(8 * self.args.repeats):
            setting = (full, cheapest)[turn // 2 % 2]
            blocks = self.executor.active_blocks(setting["num_blocks"])
            clock = StageClock(self.executor.device)
            self.executor.start([encoded], setting["top_k"], blocks)
            [prefill_ms] = clock.stop("prefill")["prefill"]
            if turn >= 4:  # before that, captures
                times.setdefault((setting, turn % 2 == 0), []).append(prefill_ms)
        return statistics.fmean(
            statistics.median(times[setting, True]) - statistics.median(times[setting, False])
            for setting in (full, cheapest)
        )

    def whole_requests(self) -> list[dict[str, Any]]:
        """
        Image to first token by the host's clock, all included (an untrained controller and the guardrail, too), and what
        of it is tower and prefill.
        """
        path = path_to_measure(self.executor)
        rows = []
        for case in dict.fromkeys(replace(case, stage=FIRST_TOKEN) for case in self.cases):
            request = self._request(case)
            measured: dict[str, list[float]] = {}
            for turn in range(2 + self.args.repeats):
                started = time.perf_counter()
                times = path.time(request, repeats=1, warmup=0, decode_steps=0)
                clock_ms = 1000 * (time.perf_counter() - started)
                if turn >= 2:  # before that, first uses
                    parts = {**times.stage_ms, "by the clock": clock_ms, "model": first_token_ms(times)}
                    for part, ms in parts.items():
                        measured.setdefault(part, []).append(ms)
            medians = {part: statistics.median(values) for part, values in measured.items()}
            what = "{views} views, top_k {top_k}, {num_blocks} blocks".format(views=1 + case.num_crops, **case.setting)
            rows.append({"what": what, **medians, "ratio": medians["by the clock"] / medians["model"]})
        return rows

    # --- batches --------------------------------------------------------------------------------------------------

    def batches(self) -> list[dict[str, Any]]:
        """Rows of the table about batches."""
        with remember_images(self.executor, self.stock):
            return self._batches()

    def _batches(self) -> list[dict[str, Any]]:
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
        what = f"mixed settings, up to {self.args.max_new_tokens} tokens (requests/s)"
        return [
            _row(f"batched answering, {what}", theirs, ours, higher=True),
            _row(f"one by one, {what}", theirs, loop, higher=True),
        ]

    def _answer_s(self, requests: list[ExecutorRequest]) -> float:
        """Seconds that requests take about images that have not been seen before."""
        self.executor.forget_images()
        started = time.perf_counter()
        self.executor.run(requests)
        if self.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started


def _row(
    what: str, stock: float | None, ours: float, floor: float | None = None, higher: bool = False
) -> dict[str, Any]:
    """A row of the table. `higher`: more is better."""
    return {"what": what, "stock": stock, "ours": ours, "floor": floor, "higher_is_better": higher}


def _format_rows(rows: list[dict[str, Any]], results: dict[str, Any]) -> Table:
    table = make_table(
        "{model_path} in {precision} on {device_name}, mode {mode}, {library_versions}".format(**results),
        ("", "transformers", "ours", "floor"),
        caption="floor: bytes or arithmetic alone, at the rates of this device",
    )
    for row in rows:
        table.add_row(
            row["what"], *("" if row[key] is None else f"{row[key]:.2f}" for key in ("stock", "ours", "floor"))
        )
    return table


def _format_whole_requests(rows: list[dict[str, Any]]) -> Table:
    columns = [column for column in rows[0] if column not in ("what", "model", "ratio")]
    headings = (column.replace("_", " ") for column in columns)
    table = make_table("Image in memory to first token (ms)", ("", *headings, "vision + prefill", "ratio"))
    for row in rows:
        table.add_row(row["what"], *(f"{row[key]:.2f}" for key in (*columns, "model", "ratio")))
    return table


def make_parser() -> ScriptParser:
    return ScriptParser([BenchExecutorArguments])


if __name__ == "__main__":
    sys.exit(run_script("bench executor", make_parser, main))
