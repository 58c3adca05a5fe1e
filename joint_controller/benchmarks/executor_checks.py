"""
What `joint-controller bench executor` looks at besides speed: whether its answers are those of transformers' modules, whether
each knob's higher value takes longer, and whether memory grows.
"""

import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from rich.table import Table
from tqdm.auto import tqdm

from ..executor import ExecutorRequest
from ..knobs import KnobSetting, KnobSpace
from ..molmo.executor import MolmoExecutor
from ..request_path import RequestPath
from .common import answer_ms, make_table, own_memory_mb, use_experts
from .requests import RequestMaker


NEAR_TIE = 2.0
"""Two scores are a near tie if they are closer than this many steps of the model's precision: rounding decides between
them."""

LARGEST_DIFFERENCE = 2e-2
"""Relative difference of scores whose share is shown."""

LEAST_RATIO = 0.98
"""Ratio between the latencies of neighbouring settings that a measurement cannot tell from 1."""

MOST_ROUNDS = 8
"""How many times as often as at first a pair of neighbours is measured at most, before its median is taken as it is."""

CERTAINTY = 0.99
"""How certain the side of `LEAST_RATIO` that a median is on must be for a pair not to be measured again. There are a hundred
pairs and more, each looked at many times."""


# --- agreement ----------------------------------------------------------------------------------------------------


class Comparison:
    """
    Counts how often one way of computing answers gives other tokens than another one, and whether rounding explains it.
    `step` is the relative step of the precision that scores are computed in.
    """

    def __init__(self, step: float):
        self.step = step
        self.num_requests = 0
        self.gaps: list[float] = []
        self.differences: list[float] = []

    def add(self, tokens: Sequence[int], others: Sequence[int], scores: torch.Tensor) -> None:
        """
        Compares the tokens of one answer with those of the other way, which chose by `scores` of shape `(n, vocab_size)`.
        Behind the first difference the other way would have gone on otherwise, so that nothing more is compared.
        """
        self.num_requests += 1
        place = next((place for place, token in enumerate(tokens) if token != others[place]), None)
        if place is not None:
            top = scores[place].max()
            self.gaps.append(((top - scores[place][tokens[place]]) / (self.step * top.abs())).item())

    def add_difference(self, scores: torch.Tensor, others: torch.Tensor) -> None:
        """Adds how far scores of one way, of shape `(n, vocab_size)`, are from those of the other, token by token."""
        self.differences += ((scores - others).norm(dim=-1) / others.norm(dim=-1)).tolist()

    def summary(self) -> dict[str, Any]:
        """
        Shares of the requests with the same tokens everywhere, and with these or a near tie where they first differ;
        how many differ by more; the gaps where they differ, in steps of the precision; and the relative difference of
        scores, if any were compared.
        """
        beyond = sum(gap > NEAR_TIE for gap in self.gaps)
        summary = {
            "same_tokens": 1 - len(self.gaps) / self.num_requests,
            "same_or_near_tie": 1 - beyond / self.num_requests,
            "beyond_near_tie": beyond,
            "largest_gap": max(self.gaps, default=0.0),
            "gaps_where_different": sorted(self.gaps),
        }
        if self.differences:
            ordered = sorted(self.differences)
            summary |= {
                "relative_difference_of_logits_median": statistics.median(ordered),
                "relative_difference_of_logits_p99": ordered[int(0.99 * (len(ordered) - 1))],
                "relative_difference_of_logits_max": ordered[-1],
                "share_within_2e-2": sum(value <= LARGEST_DIFFERENCE for value in ordered) / len(ordered),
            }
        return summary


def measure_agreement(
    executor: MolmoExecutor, stock: MolmoExecutor, requests: Sequence[ExecutorRequest], seed: int
) -> dict[str, Any]:
    """
    Compares answers and scores with those of transformers' modules. Where the two highest scores are within rounding
    of each other, any two correct ways may choose differently, so that the modules are compared with themselves, too
    (`"stock_..."`): with another implementation of the experts. `"batched_..."` compares the executor's batches with
    its answers alone.
    """
    step = torch.finfo(executor.model.dtype).eps
    alone, batched, control = (Comparison(step) for _ in range(3))
    answers = _tokens_in_batches(executor, requests, seed)
    executor.forget_images()  # those were encoded several at a time
    shown = tqdm(requests, desc="Comparing answers", unit="request", disable=None)
    for request, in_batch in zip(shown, answers, strict=True):
        tokens, logits = _tokens_and_logits(executor, request)
        grouped, eager = _stock_logits(stock, request, tokens)
        expected = grouped.argmax(dim=-1).tolist()
        alone.add(tokens, expected, grouped)
        alone.add_difference(logits, grouped)
        batched.add(in_batch, tokens, logits)
        control.add(eager.argmax(dim=-1).tolist(), expected, grouped)
        control.add_difference(eager, grouped)
    return {
        "requests": len(requests),
        "precision": executor.dtype,
        **alone.summary(),
        **{f"batched_{what}": value for what, value in batched.summary().items()},
        **{f"stock_{what}": value for what, value in control.summary().items()},
    }


@torch.inference_mode()
def _tokens_and_logits(executor: MolmoExecutor, request: ExecutorRequest) -> tuple[list[int], torch.Tensor]:
    """The tokens of an answer, and what they were chosen by."""
    encoded = executor.encode([request], request.setting["tier"])
    blocks = executor.active_blocks(request.setting["num_blocks"], request.sample_id)
    decoding = executor.start(encoded, request.setting["top_k"], blocks)
    tokens, logits = [], []
    while True:
        tokens.append(decoding.tokens.item())
        logits.append(decoding.logits[0].float().clone())
        if tokens[-1] == executor.processor.tokenizer.eos_token_id or len(tokens) == executor.max_new_tokens:
            return tokens, torch.stack(logits)
        decoding.step()


@torch.inference_mode()
def _stock_logits(
    stock: MolmoExecutor, request: ExecutorRequest, tokens: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    What transformers' modules give for the prompt and, one after the other, for the tokens of an answer, with their two
    implementations of experts that a whole prompt is not too much for.
    """
    [encoded] = stock.encode([request], request.setting["tier"])
    logits = []
    for implementation in ("grouped_mm", "eager"):
        with use_experts(stock, implementation):
            output = stock.model(
                input_ids=torch.cat([encoded.input_ids, encoded.input_ids.new_tensor(tokens[:-1])])[None],
                image_features=encoded.image_features[None, None],
                image_input_idx=encoded.image_input_idx[None, None],
                top_k=request.setting["top_k"],
                active_blocks=stock.active_blocks(request.setting["num_blocks"], request.sample_id),
                logits_to_keep=len(tokens),
            )
        logits.append(output.logits[0].float())
    return tuple(logits)


def _tokens_in_batches(executor: MolmoExecutor, requests: Sequence[ExecutorRequest], seed: int) -> list[list[int]]:
    """Answers of batches of mixed lengths and, where the executor can, of mixed settings."""
    mixes_settings, size = executor.inference.mixes_settings, executor.batch_size
    groups = [random.Random(seed).sample(range(len(requests)), len(requests))]
    if not mixes_settings:
        by_setting = sorted(groups[0], key=lambda p: str(requests[p].setting))
        groups = [list(group) for _, group in groupby(by_setting, key=lambda p: requests[p].setting)]
    batches = [group[start : start + size] for group in groups for start in range(0, len(group), size)]
    answers: dict[int, list[int]] = {}
    for batch in tqdm(batches, desc="Answering in batches", unit="batch", disable=None):
        prompts = {}
        for tier in executor.knob_space["tier"].values:
            members = [p for p in batch if requests[p].setting["tier"] == tier]
            prompts |= zip(members, executor.encode([requests[p] for p in members], tier), strict=True)
        top_k = [requests[p].setting["top_k"] for p in batch]
        blocks = [executor.active_blocks(requests[p].setting["num_blocks"], requests[p].sample_id) for p in batch]
        knobs = (top_k, blocks) if mixes_settings else (top_k[0], blocks[0])
        answers.update(zip(batch, executor.generate([prompts[p] for p in batch], *knobs), strict=True))
    return [answers[p] for p in range(len(requests))]


def format_agreement(results: Mapping[str, Any]) -> Table:
    """The table of [`measure_agreement`]."""
    table = make_table(
        f"Answers to {results['requests']:,} requests at random settings, {results['precision']}",
        ("", "alone", "in batches", "control"),
        caption="alone: one by one, against transformers' modules (grouped_mm experts). in batches: against those alone. "
        f"control: transformers' eager experts against its grouped_mm. A near tie: two scores within {NEAR_TIE:g} steps of "
        "the precision.",
    )
    for what, key, form in (
        ("same tokens", "same_tokens", "{:.2%}"),
        ("same tokens or a near tie", "same_or_near_tie", "{:.2%}"),
        ("requests that differ by more", "beyond_near_tie", "{:d}"),
        ("largest gap where different (steps)", "largest_gap", "{:.2f}"),
        ("relative difference of logits, median", "relative_difference_of_logits_median", "{:.2g}"),
        ("99th percentile", "relative_difference_of_logits_p99", "{:.2g}"),
        ("maximum", "relative_difference_of_logits_max", "{:.2g}"),
        (f"tokens within {LARGEST_DIFFERENCE:g}", "share_within_2e-2", "{:.2%}"),
    ):
        values = [results.get(f"{way}{key}") for way in ("", "batched_", "stock_")]
        table.add_row(what, *("" if value is None else form.format(value) for value in values))
    return table


# --- the grid of settings -----------------------------------------------------------------------------------------


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """
    Bounds of the median of what values were drawn from, with a certainty of at least `CERTAINTY`: two of the values, by
    the sign test, whatever the distribution. Too few values have infinite ones.
    """
    ordered, number = sorted(values), len(values)
    outside, cut = 0.5**number, 0
    while 2 * outside <= 1 - CERTAINTY:
        cut += 1
        outside += math.comb(number, cut) * 0.5**number
    return (ordered[cut - 1], ordered[-cut]) if cut else (-math.inf, math.inf)


def compare_neighbours(space: KnobSpace, time_ms: Callable[[KnobSetting], float], repeats: int) -> dict[str, Any]:
    """
    Whether each knob's next higher value takes longer with the others fixed, at every setting.

    A machine's clock wanders by more than what neighbours differ by. So the two of a pair are measured in turn (A B, B
    A, A B, ...), each ratio is that of two measurements within moments of each other, and the median of the ratios
    counts. A pair is measured `repeats` times, and then on until it is certain on which side of `LEAST_RATIO` its
    median is, or `MOST_ROUNDS` times as often; then it counts as undecided. `"cheapest_ms"` and `"full_ms"` are
    medians, too.
    """
    pairs = [
        (knob.name, lower, KnobSetting({**lower, knob.name: knob.values[index + 1]}))
        for lower in space
        for knob, index in zip(space.knobs, space.indices(lower), strict=True)
        if index + 1 < len(knob)
    ]
    times: dict[KnobSetting, list[float]] = {setting: [] for setting in space}

    def measure(setting: KnobSetting) -> float:
        times[setting].append(time_ms(setting))
        return times[setting][-1]

    for setting in space:  # alone, so that a space of one setting is measured, too
        measure(setting)
    medians: dict[str, list[float]] = {}
    undecided = dict.fromkeys(space.names, 0)
    below = []
    for knob, lower, higher in tqdm(pairs, desc="Comparing neighbouring settings", unit="pair", disable=None):
        ratios: list[float] = []
        is_decided = False
        while len(ratios) < repeats or (not is_decided and len(ratios) < MOST_ROUNDS * repeats):
            order = (lower, higher) if len(ratios) % 2 == 0 else (higher, lower)
            ms = {setting: measure(setting) for setting in order}
            ratios.append(ms[higher] / ms[lower])
            low, high = median_interval(ratios)
            is_decided = not low < LEAST_RATIO <= high
        median = statistics.median(ratios)
        medians.setdefault(knob, []).append(median)
        undecided[knob] += not is_decided
        if median < LEAST_RATIO:
            below.append(f"{lower} -> {higher}: {median:.3f}")
    return {
        "settings": len(space),
        "cheapest_ms": statistics.median(times[space.cheapest]),
        "full_ms": statistics.median(times[space.full]),
        "measurements": sum(map(len, times.values())),
        "smallest_ratio": min((ratio for ratios in medians.values() for ratio in ratios), default=None),
        "below_0.98": below,
        "knobs": {
            knob: {
                "neighbours": len(ratios),
                "smallest_ratio": min(ratios),
                "median_ratio": statistics.median(ratios),
                "below": sum(ratio < LEAST_RATIO for ratio in ratios),
                "undecided": undecided[knob],
            }
            for knob, ratios in medians.items()
        },
    }


def measure_grid(executor: MolmoExecutor, maker: RequestMaker, repeats: int, decode_steps: int) -> dict[str, Any]:
    """
    [`compare_neighbours`] of an executor: vision tower, prefill and `decode_steps` further tokens of one image, at each tier
    of as many crops as it allows.
    """
    requests = {}
    for tier in executor.knob_space["tier"].values:
        setting = KnobSetting({**executor.knob_space.full, "tier": tier})
        requests[tier] = maker.make(f"grid/{tier}", setting, maker.crops_of(tier)[-1], 0, seed=7)

    path = RequestPath(executor)

    def time_ms(setting: KnobSetting, warmup: int = 0) -> float:
        request = replace(requests[setting["tier"]], setting=setting)
        return answer_ms(path.time(request, repeats=1, warmup=warmup, decode_steps=decode_steps))

    for setting in executor.knob_space:
        time_ms(setting, warmup=1)
    return compare_neighbours(executor.knob_space, time_ms, repeats)


def format_grid(results: Mapping[str, Any]) -> Table:
    """The table of [`compare_neighbours`]."""
    table = make_table(
        f"A knob's next higher value over its lower one, {results['settings']} settings from "
        f"{results['cheapest_ms']:.1f} to {results['full_ms']:.1f} ms",
        ("", "pairs", "median ratio", "smallest ratio", f"below {LEAST_RATIO:g}", "undecided"),
        caption=f"Each pair measured in turn (A B, B A, ...), medians of the ratios, {results['measurements']:,} requests. "
        "Undecided: the median is as shown, but measuring on might have changed it.",
    )
    for knob, found in results["knobs"].items():
        cells = "{neighbours} {median_ratio:.3f} {smallest_ratio:.3f} {below} {undecided}".format(**found)
        table.add_row(knob, *cells.split())
    return table


# --- memory -------------------------------------------------------------------------------------------------------


def measure_memory(executor: MolmoExecutor, requests: Sequence[ExecutorRequest]) -> dict[str, Any]:
    """
    Memory before and after requests that are answered one by one, in MB: what the process has for itself
    (`"host_mb"`), and on a GPU all that is taken there (`"gpu_mb"`). Before, each image was answered once at its tier
    with each number of blocks, so that everything has been used.
    """
    kept = executor.vision_cache_bytes
    executor.vision_cache_bytes = 256 * 2**20
    first = {(one.sample_id, one.setting["tier"], one.setting["num_blocks"]): one for one in requests}

    def used_after(some: Sequence[ExecutorRequest], what: str) -> dict[str, float]:
        for request in tqdm(some, desc=what, unit="request", disable=None):
            executor.run([request])
        sizes = {"host_mb": own_memory_mb()}
        if executor.device.type == "cuda":
            torch.cuda.synchronize()
            free, total = torch.cuda.mem_get_info(executor.device)
            sizes["gpu_mb"] = (total - free) / 1e6
        return sizes

    before = used_after(list(first.values()), "Warming up")
    after = used_after(requests, "Watching memory")
    executor.vision_cache_bytes = kept
    growth = {f"growth_{name}": after[name] - before[name] for name in before}
    return {"requests": len(requests), **before, **growth}


def format_memory(results: Mapping[str, Any]) -> Table:
    """The table of [`measure_memory`]."""
    title = f"Memory over {results['requests']:,} requests at random settings (MB)"
    table = make_table(title, ("", "after warm-up", "growth"))
    for place, name in (("host_mb", "host"), ("gpu_mb", "GPU")):
        if place in results:
            table.add_row(name, f"{results[place]:,.0f}", f"{results[f'growth_{place}']:+,.1f}")
    return table
