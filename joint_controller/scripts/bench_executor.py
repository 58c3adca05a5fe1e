"""
Times the executor beside transformers' own modules, in the same run: single requests by stage, and batches.

```bash
joint-controller bench executor
```

On a GPU the executor has the sizes of MolmoE-1B and random weights, which are made there; on a CPU it is the one that ships
with the package. Image processing is not in any number.
"""

import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import ScriptParser, run_script


if TYPE_CHECKING:
    import torch

    from ..executor import ExecutorRequest, MolmoExecutor
    from ..knobs import KnobSetting


NEAR_TIE = 2.0
"""Two scores are a near tie if they are closer than this many steps of the model's precision: rounding decides between
them."""

LONGER_SIDE = 640
"""Longer side of the images, in pixels, as photographs of VQA data sets have it."""


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
            What must be reached on an H100; where `None`, 0.7 times what transformers' modules take.
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

    device: str | None = field(default=None, metadata={"help": "Device. Default: cuda where there is one, else cpu."})
    repeats: int = field(default=20, metadata={"help": "Times that a single request is measured; medians are shown."})
    stock_repeats: int = field(default=5, metadata={"help": "The same, for transformers' own modules."})
    num_requests: int = field(
        default=256, metadata={"help": "Requests of mixed settings that are answered in batches."}
    )
    num_stock_requests: int = field(
        default=8, metadata={"help": "Requests of mixed settings that transformers' modules answer one by one."}
    )
    batch_size: int | None = field(
        default=None, metadata={"help": "Most requests in a batch. Default: 64 on a GPU, 16 on a CPU."}
    )
    max_batch_tokens: int = field(default=65536, metadata={"help": "Most prompt tokens in a batch."})
    num_workers: int = field(
        default=2, metadata={"help": "Batches that are answered at the same time, each by a thread of its own (CPU)."}
    )
    num_threads: int | None = field(
        default=None, metadata={"help": "Threads that share one operation on the CPU. Default: torch's."}
    )
    max_new_tokens: int = field(default=8, metadata={"help": "Tokens of an answer."})
    grid_repeats: int = field(
        default=3,
        metadata={
            "help": "Times that every setting is measured, to see that no knob's higher value is faster. 0: not."
        },
    )
    num_agreement: int = field(
        default=0,
        metadata={
            "help": "Requests at random settings whose answers and scores are compared with those of transformers' "
            "modules, alone and in batches."
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

    from ..executor import MolmoExecutor
    from ..executor.random_executor import RANDOM_CONFIGS, random_executor
    from ..latency.profiling import device_name

    console = Console()
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    if args.batch_size is None:
        args = replace(args, batch_size=64 if device.type == "cuda" else 16)
    options = {
        "batch_size": args.batch_size,
        "max_batch_tokens": args.max_batch_tokens,
        "num_workers": args.num_workers,
        "max_new_tokens": args.max_new_tokens,
        "vision_cache_bytes": 0,
    }
    if device.type == "cuda":
        started = time.perf_counter()
        executor = random_executor(RANDOM_CONFIGS["molmoe-1b"](), device, seed=args.seed, **options)
        console.print(f"MolmoE-1B with random weights: {time.perf_counter() - started:.0f} s.")
        stock = MolmoExecutor(executor.model, executor.processor, executor.knob_space, mode="plain", **options)
        cases = MOLMOE_CASES
    else:
        executor, stock = (
            MolmoExecutor.from_pretrained("embedded", device="cpu", mode=mode, **options) for mode in (None, "plain")
        )
        cases = _cases_of(executor)
    bench = _Bench(args, executor, stock, cases)
    results: dict[str, Any] = {
        "device_name": device_name(device),
        "torch_version": torch.__version__,
        "mode": executor.mode,
    }
    results["rows"] = bench.single_requests()
    results["rows"] += bench.batches()
    results["captures"] = bench.captures()
    console.print(_format_table(results))
    if results["captures"]:
        console.print("{graphs} graphs, {mib:.0f} MiB, captured in {seconds:.1f} s.".format(**results["captures"]))
    sections: list[tuple[str, int, Callable[[], dict[str, Any]]]] = [
        ("grid", args.grid_repeats, bench.grid),
        ("agreement", args.num_agreement, bench.agreement),
        ("memory", args.num_memory, bench.memory),
    ]
    for name, amount, measure in sections:
        if amount:
            results[name] = measure()
            console.print(f"{name}: " + ", ".join(f"{what} {_short(value)}" for what, value in results[name].items()))
    if args.json is not None:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


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


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cases_of(executor: "MolmoExecutor") -> tuple[Case, ...]:
    """The highest and the cheapest setting, as the executor that ships with the package is asked."""
    cases = []
    for setting in (executor.knob_space.full, executor.knob_space.cheapest):
        _, num_crops = executor.knob_space.tier_crops[setting.tier]
        num_crops = min(num_crops, executor.model.config.max_crops)
        cases += [
            Case(setting.tier, setting.top_k, setting.num_blocks, num_crops, 0, stage, None)
            for stage in ("decode", "first token")
        ]
    return tuple(cases)


class _Remembered:
    """A processor that processes each image once: what it takes is in no number here."""

    def __init__(self, processor):
        self._processor = processor
        self._inputs: dict[tuple, Any] = {}

    def __getattr__(self, name: str):
        return getattr(self._processor, name)

    def __call__(self, images, text, tier, **kwargs):
        key = (id(images), text, tier)
        if key not in self._inputs:
            self._inputs[key] = self._processor(images=images, text=text, tier=tier, **kwargs)
        return self._inputs[key]


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
        cases (`Sequence[Case]`):
            Single requests to measure.
    """

    def __init__(
        self, args: BenchExecutorArguments, executor: "MolmoExecutor", stock: "MolmoExecutor", cases: Sequence[Case]
    ):
        self.args = args
        self.executor = executor
        self.stock = stock
        self.cases = cases
        self.executor.processor = self.stock.processor = _Remembered(executor.processor)
        self._vocabulary = sorted(word for word in executor.processor.tokenizer.get_vocab() if word.isalnum())
        self.is_cuda = executor.device.type == "cuda"
        self._rates = self._measure_rates() if self.is_cuda else None

    # --- requests -------------------------------------------------------------------------------------------------

    def _request(self, case: Case, number: int = 0) -> "ExecutorRequest":
        from ..knobs import KnobSetting

        setting = KnobSetting(case.tier, case.top_k, case.num_blocks)
        return self._make_request(f"case/{number}", setting, case.num_crops, case.num_tokens, seed=number)

    def _make_request(
        self, sample_id: str, setting: "KnobSetting", num_crops: int, num_tokens: int, seed: int
    ) -> "ExecutorRequest":
        """A request whose image has `num_crops` crops, and whose question fills the prompt up to `num_tokens`."""
        import numpy as np
        from PIL import Image

        from ..executor import ExecutorRequest

        height, width = self._size_with(num_crops, setting.tier)
        pixels = np.random.default_rng([self.args.seed, seed]).integers(0, 256, (height, width, 3), dtype=np.uint8)
        words = random.Random(f"{self.args.seed}/{seed}")
        processor = self.executor.processor
        # A question of one word, and then as many more as are missing.
        tokens = processor.count_vision_tokens(height, width, tier=setting.tier, **self._tiers)
        prompt = processor.tokenizer(processor.format_prompt("a", "vqa2"), add_special_tokens=False)["input_ids"]
        count = 1 + max(num_tokens - 1 - tokens - len(prompt), 4 if num_tokens == 0 else 0)
        question = " ".join(words.choices(self._vocabulary, k=count))
        return ExecutorRequest(sample_id, Image.fromarray(pixels), question, "vqa2", setting)

    @property
    def _tiers(self) -> dict[str, Any]:
        return {"tier_crops": self.executor.knob_space.tier_crops}

    def _size_with(self, num_crops: int, tier: str) -> tuple[int, int]:
        """Height and width of an image that is cut into that many crops."""
        processor = self.executor.processor.image_processor
        for rows in range(1, num_crops + 1):
            columns = num_crops // rows
            size = tuple(LONGER_SIDE * side // max(rows, columns) for side in (rows, columns))
            if rows * columns == num_crops and max(size) <= 4 * min(size):
                tiling = processor.choose_tiling(*size, tier=tier, **self._tiers)
                if tiling[0] * tiling[1] == num_crops:
                    return size
        raise ValueError(f"no image has {num_crops} crops at tier '{tier}'.")

    def _mixed_requests(self, count: int, num_samples: int, name: str) -> list["ExecutorRequest"]:
        """Requests of random settings about random images, of as many crops as their tiers allow."""
        draw = random.Random(f"{self.args.seed}/{name}")
        settings = list(self.executor.knob_space)
        crops: dict[str, list[int]] = {}
        for tier, (fewest, most) in self.executor.knob_space.tier_crops.items():
            for number in range(fewest, min(most, self.executor.model.config.max_crops) + 1):
                try:
                    self._size_with(number, tier)
                except ValueError:
                    continue
                crops.setdefault(tier, []).append(number)
        made: dict[tuple, ExecutorRequest] = {}
        requests = []
        for _ in range(count):
            setting, sample = draw.choice(settings), draw.randrange(num_samples)
            key = (sample, setting.tier)
            if key not in made:
                number = draw.choice(crops[setting.tier])
                made[key] = self._make_request(f"{name}/{sample}", setting, number, 0, seed=1000 + sample)
            one = made[key]
            requests.append(type(one)(one.sample_id, one.image, one.question, one.style, setting))
        for request in requests:
            self.executor.processor(
                images=request.image,
                text=request.question,
                style=request.style,
                tier=request.setting.tier,
                **self._tiers,
            )
        return requests

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
            "answer": times.vision_ms + times.llm_prefill_ms + sum(times.decode_ms),
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
            limit = 0.7 * theirs if case.limit_ms is None else case.limit_ms
            rows.append(_row(str(case), theirs, limit, ours, self._floor_ms(case)))
        if self.executor.mode == "captured":
            rows.append(_row("change of setting between requests (ms)", None, 0.1, self._time_change(), None))
        if self.cases is MOLMOE_CASES:
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
        import torch

        requests = self._mixed_requests(self.args.num_requests, self.args.num_requests, "batched")
        self.executor.run(requests)  # first uses
        started = time.perf_counter()
        self.executor.run(requests)
        if self.is_cuda:
            torch.cuda.synchronize()
        ours = len(requests) / (time.perf_counter() - started)
        stock = requests[: self.args.num_stock_requests]
        theirs = 1000 * len(stock) / sum(self._time_stock(request, 1)["answer"] for request in stock)
        alone = requests[: max(32, self.args.num_stock_requests)]
        for request in alone:
            self.executor.run([request])
        started = time.perf_counter()
        for request in alone:
            self.executor.run([request])
        loop = len(alone) / (time.perf_counter() - started)
        limit = max(MOLMOE_REQUESTS_PER_S, 20 * theirs) if self.cases is MOLMOE_CASES else 4 * theirs
        what = f"mixed settings, {self.args.max_new_tokens} tokens (requests/s)"
        return [
            _row(f"batched answering, {what}", theirs, limit, ours, None, higher=True),
            _row(f"one by one, {what}", theirs, float("nan"), loop, None, higher=True),
        ]

    def captures(self) -> dict[str, Any] | None:
        """Graphs and their memory, where there are any."""
        if self.executor.mode != "captured":
            return None
        graphs = self.executor.inference.graphs
        return {"graphs": len(graphs), "mib": graphs.num_bytes / 2**20, "seconds": graphs.capture_seconds}

    # --- checks ---------------------------------------------------------------------------------------------------

    def grid(self) -> dict[str, Any]:
        """Whether each knob's next higher value takes longer with the others fixed, at every setting."""
        space = self.executor.knob_space
        crops = {
            tier: next(
                number
                for number in range(min(most, self.executor.model.config.max_crops), 0, -1)
                if self._has_size(number, tier)
            )
            for tier, (_, most) in space.tier_crops.items()
        }
        requests = {
            setting: self._make_request(f"grid/{setting.tier}", setting, crops[setting.tier], 0, seed=7)
            for setting in space
        }
        times: dict[KnobSetting, list[float]] = {setting: [] for setting in space}
        for turn in range(1 + self.args.grid_repeats):
            for setting, request in requests.items():
                measured = self._time(self.executor, request, 1)["answer"]
                if turn:
                    times[setting].append(measured)
        answer_ms = {space.indices(setting): statistics.median(values) for setting, values in times.items()}
        worst, below = float("inf"), []
        for indices, ms in answer_ms.items():
            for knob in range(3):
                higher = tuple(index + (position == knob) for position, index in enumerate(indices))
                if higher in answer_ms:
                    ratio = answer_ms[higher] / ms
                    worst = min(worst, ratio)
                    if ratio < 0.98:
                        below.append(str(space.setting(higher)))
        return {
            "settings": len(answer_ms),
            "cheapest_ms": answer_ms[(0, 0, 0)],
            "full_ms": answer_ms[max(answer_ms)],
            "smallest_ratio_of_neighbours": worst,
            "below_0.98": below,
        }

    def _has_size(self, num_crops: int, tier: str) -> bool:
        try:
            self._size_with(num_crops, tier)
        except ValueError:
            return False
        return True

    def agreement(self) -> dict[str, Any]:
        """Compares answers and scores with those of transformers' modules."""
        import torch

        config = self.stock.model.config.text_config
        usual, config._experts_implementation = config._experts_implementation, "grouped_mm"
        requests = self._mixed_requests(self.args.num_agreement, 100, "agreement")
        step = torch.finfo(self.executor.model.dtype).eps
        same, ties, differences, gaps = 0, 0, [], []
        batched_same, batched_ties = 0, 0
        in_batches = self._tokens_in_batches(requests)
        for request, batched in zip(requests, in_batches, strict=True):
            tokens, logits = self._tokens_and_logits(request)
            expected = self._expected_logits(request, tokens)
            errors = (logits - expected).norm(dim=-1) / expected.norm(dim=-1)
            differences += errors.tolist()
            chosen = expected.argmax(dim=-1)
            is_same = chosen == torch.tensor(tokens, device=chosen.device)
            same += bool(is_same.all())
            # Behind the first difference the plain way would have gone on otherwise.
            first = int(is_same.logical_not().float().argmax()) if not is_same.all() else None
            if first is not None:
                gap = (expected[first].max() - expected[first][tokens[first]]).item()
                ties += gap <= NEAR_TIE * step * expected[first].max().abs().item()
                gaps.append(gap)
            # A batch's answer ends with its end.
            different = [place for place, token in enumerate(batched) if token != tokens[place]]
            batched_same += not different
            if different:
                place = different[0]
                gap = (logits[place].max() - logits[place][batched[place]]).item()
                batched_ties += gap <= NEAR_TIE * step * logits[place].max().abs().item()
        config._experts_implementation = usual
        differences.sort()
        count = len(requests)
        return {
            "requests": count,
            "same_tokens": same / count,
            "same_or_near_tie": (same + ties) / count,
            "gaps_where_different": gaps,
            "relative_difference_of_logits_median": statistics.median(differences),
            "relative_difference_of_logits_p99": differences[int(0.99 * (len(differences) - 1))],
            "relative_difference_of_logits_max": differences[-1],
            "share_within_2e-2": sum(value <= 2e-2 for value in differences) / len(differences),
            "batched_same_tokens": batched_same / count,
            "batched_same_or_near_tie": (batched_same + batched_ties) / count,
        }

    def _tokens_and_logits(self, request: "ExecutorRequest") -> tuple[list[int], "torch.Tensor"]:
        import torch

        encoded = self.executor.encode([request], request.setting.tier)
        blocks = self.executor.active_blocks(request.setting.num_blocks, request.sample_id)
        decoding = self.executor.start(encoded, request.setting.top_k, blocks)
        tokens, logits = [], []
        for step in range(self.args.max_new_tokens):
            if step:
                with torch.inference_mode():
                    decoding.step()
            logits.append(decoding.logits[0].float().clone())
            tokens.append(decoding.tokens.item())
        return tokens, torch.stack(logits)

    def _expected_logits(self, request: "ExecutorRequest", tokens: list[int]) -> "torch.Tensor":
        """What transformers' modules give for the prompt and, one after the other, for the tokens of an answer."""
        import torch

        with torch.inference_mode():
            [encoded] = self.stock.encode([request], request.setting.tier)
            ids = torch.cat([encoded.input_ids, torch.tensor(tokens[:-1], device=self.stock.device)])
            output = self.stock.model(
                input_ids=ids[None],
                image_features=encoded.image_features[None, None],
                image_input_idx=encoded.image_input_idx[None, None],
                top_k=request.setting.top_k,
                active_blocks=self.stock.active_blocks(request.setting.num_blocks, request.sample_id),
                logits_to_keep=len(tokens),
            )
            return output.logits[0].float()

    def _tokens_in_batches(self, requests: Sequence["ExecutorRequest"]) -> list[list[int]]:
        """Answers of batches of mixed settings and lengths."""
        order = random.Random(self.args.seed).sample(range(len(requests)), len(requests))
        answers: dict[int, list[int]] = {}
        for start in range(0, len(order), self.args.batch_size):
            batch = order[start : start + self.args.batch_size]
            encoded = []
            for tier in self.executor.knob_space.tier_crops:
                members = [position for position in batch if requests[position].setting.tier == tier]
                encoded += zip(members, self.executor.encode([requests[p] for p in members], tier), strict=True)
            prompts = dict(encoded)
            settings = [requests[position].setting for position in batch]
            if self.executor.mode == "captured":
                blocks = [self.executor.active_blocks(s.num_blocks, requests[0].sample_id) for s in settings]
                found = self.executor.generate(
                    [prompts[position] for position in batch], [s.top_k for s in settings], blocks
                )
            else:
                found = [
                    self.executor.generate(
                        [prompts[p]], s.top_k, self.executor.active_blocks(s.num_blocks, requests[0].sample_id)
                    )[0]
                    for p, s in zip(batch, settings, strict=True)
                ]
            answers.update(zip(batch, found, strict=True))
        return [answers[position] for position in range(len(requests))]

    def memory(self) -> dict[str, Any]:
        """Memory before and after many requests, one by one, at random settings."""
        import torch

        from .bench_data import own_memory_mb

        requests = self._mixed_requests(self.args.num_memory, 40, "memory")
        kept = self.executor.vision_cache_bytes
        self.executor.vision_cache_bytes = 256 * 2**20
        for request in {(r.sample_id, r.setting.tier, r.setting.num_blocks): r for r in requests}.values():
            self.executor.run([request])

        def used() -> dict[str, float]:
            sizes = {"host_mb": own_memory_mb()}
            if self.is_cuda:
                torch.cuda.synchronize()
                free, total = torch.cuda.mem_get_info(self.executor.device)
                sizes["gpu_mb"] = (total - free) / 1e6
            return sizes

        before = used()
        for request in requests:
            self.executor.run([request])
        after = used()
        self.executor.vision_cache_bytes = kept
        growth = {f"growth_{name}": after[name] - before[name] for name in before}
        return {"requests": len(requests), **before, **growth}


def _row(
    what: str, stock: float | None, limit: float, ours: float, floor: float | None, higher: bool = False
) -> dict[str, Any]:
    """A row of the table. `higher`: more is better."""
    return {"what": what, "stock": stock, "limit": limit, "ours": ours, "floor": floor, "higher_is_better": higher}


def _format_table(results: dict):
    from rich.table import Table

    table = Table(
        title=f"{results['device_name']}, torch {results['torch_version']}, mode {results['mode']}",
        title_justify="left",
    )
    # What a GPU must reach is set for an H100, a CPU's limits are shares of the baseline.
    required = "required (H100)" if results["captures"] else "required"
    for name in ("", "stock", required, "ours", "floor"):
        table.add_column(name, justify="right" if name else "left")
    for row in results["rows"]:
        limit = "" if row["limit"] != row["limit"] else f"{'≥' if row['higher_is_better'] else '≤'} {row['limit']:.2f}"
        floor = "" if row["floor"] is None else f"{row['floor']:.2f}"
        table.add_row(
            row["what"], "" if row["stock"] is None else f"{row['stock']:.2f}", limit, f"{row['ours']:.2f}", floor
        )
    return table


def make_parser() -> ScriptParser:
    return ScriptParser((BenchExecutorArguments,))


if __name__ == "__main__":
    sys.exit(run_script("bench executor", make_parser, main))
