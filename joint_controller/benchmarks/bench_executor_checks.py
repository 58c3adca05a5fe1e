"""
What `joint-controller bench executor` checks beside measuring: that its answers are those of transformers' modules, that no
knob's higher value is faster, and that memory does not grow.
"""

import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from ..executor import ExecutorRequest
    from ..knobs import KnobSetting, KnobSpace
    from ..molmo.executor import MolmoExecutor
    from .bench_requests import RequestMaker


NEAR_TIE = 2.0
"""Two scores are a near tie if they are closer than this many steps of the model's precision: rounding decides between
them."""

LARGEST_DIFFERENCE = 2e-2
"""What scores may differ by, relative to their norm."""

LEAST_RATIO = 0.98
"""Least ratio between the latencies of neighbouring settings: what a measurement cannot tell from 1."""

MOST_ROUNDS = 8
"""How many times as often as at first a pair of neighbours is measured at most, before its median is taken as it is."""

CERTAINTY = 0.99
"""How certain the side of `LEAST_RATIO` that a median is on must be for a pair not to be measured again. There are a hundred
pairs and more, each looked at many times."""


# --- agreement ----------------------------------------------------------------------------------------------------


class Comparison:
    """
    Counts how often one way of computing answers gives other tokens than another one, and whether rounding explains it.

    Args:
        step (`float`):
            Relative step of the precision that scores are computed in.
    """

    def __init__(self, step: float):
        self.step = step
        self.num_requests = 0
        self.num_same = 0
        self.gaps: list[float] = []
        self.differences: list[float] = []

    def add(self, tokens: Sequence[int], others: Sequence[int], scores: "torch.Tensor") -> None:
        """
        Compares the tokens of one answer. Behind the first difference the other way would have gone on otherwise, so that
        nothing more is compared.

        Args:
            tokens, others (`Sequence[int]`):
                Tokens of this way and of the other one. Neither ends before a difference unless both do.
            scores (`torch.Tensor` of shape `(n, vocab_size)`):
                What the other way chose by.
        """
        self.num_requests += 1
        place = next((place for place, token in enumerate(tokens) if token != others[place]), None)
        if place is None:
            self.num_same += 1
            return
        top = scores[place].max()
        self.gaps.append(((top - scores[place][tokens[place]]) / (self.step * top.abs())).item())

    def add_difference(self, scores: "torch.Tensor", others: "torch.Tensor") -> None:
        """Adds how far scores of one way, of shape `(n, vocab_size)`, are from those of the other, token by token."""
        self.differences += ((scores - others).norm(dim=-1) / others.norm(dim=-1)).tolist()

    def summary(self) -> dict[str, Any]:
        """
        Shares of the requests with the same tokens everywhere, and with these or a near tie where they first differ; how
        many differ by more; the gaps where they differ, in steps of the precision; and the relative difference of scores,
        if any were compared.
        """
        beyond = sum(gap > NEAR_TIE for gap in self.gaps)
        summary = {
            "same_tokens": self.num_same / self.num_requests,
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
    executor: "MolmoExecutor",
    stock: "MolmoExecutor",
    requests: Sequence["ExecutorRequest"],
    seed: int,
) -> dict[str, Any]:
    """
    Compares answers and scores with those of transformers' modules. Where the two highest scores are within rounding of
    each other, any two correct ways may choose differently, so that the modules are compared with themselves, too: with
    another implementation of the experts.

    Args:
        executor ([`MolmoExecutor`]):
            The executor.
        stock ([`MolmoExecutor`]):
            The same model in the mode `"plain"`.
        requests (`Sequence[ExecutorRequest]`):
            Requests, whose answers are compared up to their ends.
        seed (`int`):
            Seed of the batches.

    Returns:
        `dict`: `"requests"`, `"precision"`, and the [`Comparison.summary`] of the executor with the modules, of its batches
        with its answers alone (`"batched_..."`) and of the modules with themselves (`"stock_..."`).
    """
    import torch
    from tqdm.auto import tqdm

    step = torch.finfo(executor.model.dtype).eps
    alone, batched, control = (Comparison(step) for _ in range(3))
    answers = _tokens_in_batches(executor, requests, seed)
    executor.forget_images()  # those were encoded several at a time
    for request, in_batch in zip(
        tqdm(requests, desc="Comparing answers", unit="request", disable=None), answers, strict=True
    ):
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
        "precision": str(executor.model.dtype).removeprefix("torch."),
        **alone.summary(),
        **{f"batched_{what}": value for what, value in batched.summary().items()},
        **{f"stock_{what}": value for what, value in control.summary().items()},
    }


def _tokens_and_logits(executor: "MolmoExecutor", request: "ExecutorRequest") -> tuple[list[int], "torch.Tensor"]:
    """The tokens of an answer, and what they were chosen by."""
    import torch

    encoded = executor.encode([request], request.setting.tier)
    blocks = executor.active_blocks(request.setting.num_blocks, request.sample_id)
    decoding = executor.start(encoded, request.setting.top_k, blocks)
    tokens, logits = [decoding.tokens.item()], [decoding.logits[0].float().clone()]
    while tokens[-1] != executor.processor.tokenizer.eos_token_id and len(tokens) < executor.max_new_tokens:
        with torch.inference_mode():
            decoding.step()
        tokens.append(decoding.tokens.item())
        logits.append(decoding.logits[0].float().clone())
    return tokens, torch.stack(logits)


def _stock_logits(
    stock: "MolmoExecutor", request: "ExecutorRequest", tokens: list[int]
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """
    What transformers' modules give for the prompt and, one after the other, for the tokens of an answer, with their two
    implementations of experts that a whole prompt is not too much for.
    """
    import torch

    config = stock.model.config.text_config
    usual = config._experts_implementation
    with torch.inference_mode():
        [encoded] = stock.encode([request], request.setting.tier)
        ids = torch.cat([encoded.input_ids, torch.tensor(tokens[:-1], dtype=torch.long, device=stock.device)])
        logits = []
        for implementation in ("grouped_mm", "eager"):
            # `set_experts_implementation` does not reach the language model's configuration.
            config._experts_implementation = implementation
            output = stock.model(
                input_ids=ids[None],
                image_features=encoded.image_features[None, None],
                image_input_idx=encoded.image_input_idx[None, None],
                top_k=request.setting.top_k,
                active_blocks=stock.active_blocks(request.setting.num_blocks, request.sample_id),
                logits_to_keep=len(tokens),
            )
            logits.append(output.logits[0].float())
    config._experts_implementation = usual
    return tuple(logits)


def _tokens_in_batches(executor: "MolmoExecutor", requests: Sequence["ExecutorRequest"], seed: int) -> list[list[int]]:
    """Answers of batches of mixed lengths and, where the executor can, of mixed settings."""
    from tqdm.auto import tqdm

    order = random.Random(seed).sample(range(len(requests)), len(requests))
    if not executor.inference.mixes_settings:
        order.sort(key=lambda position: str(requests[position].setting))
    batches: list[list[int]] = []
    for position in order:
        is_full = not batches or len(batches[-1]) == executor.batch_size
        setting = requests[position].setting
        if is_full or not (executor.inference.mixes_settings or requests[batches[-1][0]].setting == setting):
            batches.append([])
        batches[-1].append(position)
    answers: dict[int, list[int]] = {}
    for batch in tqdm(batches, desc="Answering in batches", unit="batch", disable=None):
        prompts = {}
        for tier in executor.knob_space.tier_crops:
            members = [position for position in batch if requests[position].setting.tier == tier]
            prompts |= zip(members, executor.encode([requests[p] for p in members], tier), strict=True)
        settings = [requests[position].setting for position in batch]
        top_k = [setting.top_k for setting in settings]
        blocks = [executor.active_blocks(requests[p].setting.num_blocks, requests[p].sample_id) for p in batch]
        if not executor.inference.mixes_settings:
            top_k, blocks = top_k[0], blocks[0]
        answers.update(zip(batch, executor.generate([prompts[p] for p in batch], top_k, blocks), strict=True))
    return [answers[position] for position in range(len(requests))]


def format_agreement(results: Mapping[str, Any]) -> "Table":
    """The table of [`measure_agreement`]."""
    from rich.table import Table

    table = Table(
        title=f"Answers to {results['requests']:,} requests at random settings, {results['precision']}",
        title_justify="left",
        caption="alone: one by one, against transformers' modules (grouped_mm experts). in batches: against those alone. "
        f"control: transformers' eager experts against its grouped_mm. A near tie: two scores within {NEAR_TIE:g} steps of "
        "the precision.",
        caption_justify="left",
    )
    for name in ("", "alone", "in batches", "control"):
        table.add_column(name, justify="right" if name else "left")
    rows: list[tuple[str, str, Callable[[Any], str]]] = [
        ("same tokens", "same_tokens", "{:.2%}".format),
        ("same tokens or a near tie", "same_or_near_tie", "{:.2%}".format),
        ("requests that differ by more", "beyond_near_tie", "{:d}".format),
        ("largest gap where different (steps)", "largest_gap", "{:.2f}".format),
        ("relative difference of logits, median", "relative_difference_of_logits_median", "{:.2g}".format),
        ("99th percentile", "relative_difference_of_logits_p99", "{:.2g}".format),
        ("maximum", "relative_difference_of_logits_max", "{:.2g}".format),
        (f"tokens within {LARGEST_DIFFERENCE:g}", "share_within_2e-2", "{:.2%}".format),
    ]
    for what, key, form in rows:
        values = [results.get(f"{way}{key}") for way in ("", "batched_", "stock_")]
        table.add_row(what, *("" if value is None else form(value) for value in values))
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


def compare_neighbours(space: "KnobSpace", time_ms: Callable[["KnobSetting"], float], repeats: int) -> dict[str, Any]:
    """
    Whether each knob's next higher value takes longer with the others fixed, at every setting.

    A machine's clock wanders by more than what neighbours differ by. So the two of a pair are measured in turn (A B, B A,
    A B, ...), each ratio is that of two measurements within moments of each other, and the median of the ratios counts. A
    pair is measured `repeats` times, and then on until it is certain on which side of `LEAST_RATIO` its median is, or
    `MOST_ROUNDS` times as often.

    Args:
        space ([`KnobSpace`]):
            The settings.
        time_ms (`Callable[[KnobSetting], float]`):
            Measures a request at a setting.
        repeats (`int`):
            Measurements of each pair at first.

    Returns:
        `dict`: `"settings"`; `"cheapest_ms"` and `"full_ms"`, medians; `"measurements"`, `"smallest_ratio"` and
        `"below_0.98"`, the pairs whose median is; `"knobs"`, with `"neighbours"`, `"smallest_ratio"`, `"median_ratio"`,
        `"below"` and `"undecided"` (measured as often as allowed) of each knob that has more than one value.
    """
    from tqdm.auto import tqdm

    pairs = []
    for lower in space:
        indices = space.indices(lower)
        for place, (knob, values) in enumerate(space.values.items()):
            if indices[place] + 1 < len(values):
                pairs.append((knob, lower, replace(lower, **{knob: values[indices[place] + 1]})))
    times: dict[KnobSetting, list[float]] = {setting: [] for setting in space}

    def measure(setting: "KnobSetting") -> float:
        times[setting].append(time_ms(setting))
        return times[setting][-1]

    knobs: dict[str, dict[str, Any]] = {}
    below = []
    for setting in space:  # alone, so that a space of one setting is measured, too
        measure(setting)
    for knob, lower, higher in tqdm(pairs, desc="Comparing neighbouring settings", unit="pair", disable=None):
        ratios: list[float] = []
        while True:
            if len(ratios) % 2 == 0:
                lower_ms, higher_ms = measure(lower), measure(higher)
            else:
                higher_ms, lower_ms = measure(higher), measure(lower)
            ratios.append(higher_ms / lower_ms)
            low, high = median_interval(ratios)
            is_decided = not low < LEAST_RATIO <= high
            if len(ratios) >= repeats and (is_decided or len(ratios) >= MOST_ROUNDS * repeats):
                break
        found = knobs.setdefault(knob, {"ratios": [], "undecided": 0})
        found["ratios"].append(statistics.median(ratios))
        found["undecided"] += not is_decided
        if found["ratios"][-1] < LEAST_RATIO:
            below.append(f"{lower} -> {higher}: {found['ratios'][-1]:.3f}")
    return {
        "settings": len(space),
        "cheapest_ms": statistics.median(times[space.cheapest]),
        "full_ms": statistics.median(times[space.full]),
        "measurements": sum(len(measured) for measured in times.values()),
        "smallest_ratio": min((ratio for found in knobs.values() for ratio in found["ratios"]), default=None),
        "below_0.98": below,
        "knobs": {
            knob: {
                "neighbours": len(found["ratios"]),
                "smallest_ratio": min(found["ratios"]),
                "median_ratio": statistics.median(found["ratios"]),
                "below": sum(ratio < LEAST_RATIO for ratio in found["ratios"]),
                "undecided": found["undecided"],
            }
            for knob, found in knobs.items()
        },
    }


def measure_grid(executor: "MolmoExecutor", maker: "RequestMaker", repeats: int, decode_steps: int) -> dict[str, Any]:
    """
    [`compare_neighbours`] of an executor: vision tower, prefill and decode of one image, at each tier of as many crops as
    it allows.

    Args:
        executor ([`MolmoExecutor`]):
            The executor.
        maker ([`RequestMaker`]):
            Makes the request.
        repeats (`int`):
            Measurements of each pair of neighbours at first.
        decode_steps (`int`):
            Tokens after the first.
    """
    requests = {}
    for setting in executor.knob_space:
        if setting.tier not in requests:
            crops = maker.crops_of(setting.tier)[-1]
            requests[setting.tier] = maker.make(f"grid/{setting.tier}", setting, crops, 0, seed=7)

    def time_ms(setting: "KnobSetting", warmup: int = 0) -> float:
        request = replace(requests[setting.tier], setting=setting)
        times = executor.time_request(request, repeats=1, warmup=warmup, decode_steps=decode_steps)
        return times.vision_ms + times.llm_prefill_ms + sum(times.decode_ms)

    for setting in executor.knob_space:
        time_ms(setting, warmup=1)
    return compare_neighbours(executor.knob_space, time_ms, repeats)


def format_grid(results: Mapping[str, Any]) -> "Table":
    """The table of [`compare_neighbours`]."""
    from rich.table import Table

    table = Table(
        title=f"A knob's next higher value over its lower one, {results['settings']} settings from "
        f"{results['cheapest_ms']:.1f} to {results['full_ms']:.1f} ms",
        title_justify="left",
        caption=f"Each pair measured in turn (A B, B A, ...), medians of the ratios, {results['measurements']:,} requests. "
        "Undecided: the median is as shown, but measuring on might have changed it.",
        caption_justify="left",
    )
    for name in ("", "pairs", "median ratio", "smallest ratio", f"below {LEAST_RATIO:g}", "undecided"):
        table.add_column(name, justify="right" if name else "left")
    for knob, found in results["knobs"].items():
        table.add_row(
            knob,
            str(found["neighbours"]),
            f"{found['median_ratio']:.3f}",
            f"{found['smallest_ratio']:.3f}",
            str(found["below"]),
            str(found["undecided"]),
        )
    return table


# --- memory -------------------------------------------------------------------------------------------------------


def measure_memory(executor: "MolmoExecutor", requests: Sequence["ExecutorRequest"]) -> dict[str, Any]:
    """
    Memory before and after requests that are answered one by one. Before, each image was answered once at its tier with
    each number of blocks, so that everything has been used.

    Args:
        executor ([`MolmoExecutor`]):
            The executor.
        requests (`Sequence[ExecutorRequest]`):
            Requests.

    Returns:
        `dict`: `"requests"`; `"host_mb"`, what the process has for itself, and `"growth_host_mb"`; on a GPU also `"gpu_mb"`
        and `"growth_gpu_mb"`, of all that is taken there.
    """
    import torch
    from tqdm.auto import tqdm

    from .bench_data import own_memory_mb

    kept = executor.vision_cache_bytes
    executor.vision_cache_bytes = 256 * 2**20
    first = {(one.sample_id, one.setting.tier, one.setting.num_blocks): one for one in requests}

    def used() -> dict[str, float]:
        sizes = {"host_mb": own_memory_mb()}
        if executor.device.type == "cuda":
            torch.cuda.synchronize()
            free, total = torch.cuda.mem_get_info(executor.device)
            sizes["gpu_mb"] = (total - free) / 1e6
        return sizes

    for request in tqdm(first.values(), desc="Warming up", unit="request", disable=None):
        executor.run([request])
    before = used()
    for request in tqdm(requests, desc="Watching memory", unit="request", disable=None):
        executor.run([request])
    after = used()
    executor.vision_cache_bytes = kept
    growth = {f"growth_{name}": after[name] - before[name] for name in before}
    return {"requests": len(requests), **before, **growth}


def format_memory(results: Mapping[str, Any]) -> "Table":
    """The table of [`measure_memory`]."""
    from rich.table import Table

    table = Table(title=f"Memory over {results['requests']:,} requests at random settings (MB)", title_justify="left")
    for name in ("", "after warm-up", "growth"):
        table.add_column(name, justify="right" if name else "left")
    for place, name in (("host_mb", "host"), ("gpu_mb", "GPU")):
        if place in results:
            table.add_row(name, f"{results[place]:,.0f}", f"{results[f'growth_{place}']:+,.1f}")
    return table
