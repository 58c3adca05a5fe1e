"""
Which requests share a pass of the model, and in what order.

Images are encoded in windows, as many as the cache keeps, and answered at all their settings before the next ones are
encoded. The prompts of a window are answered in batches.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from ...executor.requests import ExecutorOutput, ExecutorRequest
from ..knob_space import tier_crops_of
from .encoding import EncodedSample
from .memory import do_or_split


if TYPE_CHECKING:
    from .molmo_executor import MolmoExecutor


def answer_requests(
    executor: "MolmoExecutor", requests: Sequence[ExecutorRequest]
) -> Iterator[dict[int, ExecutorOutput]]:
    """Answers requests, all at settings of the knob space, and yields the outputs of each batch as soon as it is done,
    by the request's position."""
    for window in _windows(executor, requests):
        yield from _answer_window(executor, requests, window)


def _windows(executor: "MolmoExecutor", requests: Sequence[ExecutorRequest]) -> Iterator[dict[str, list[int]]]:
    """Positions of the requests of each window, by tier: as many images as fit in the cache."""
    by_tier: dict[str, dict[str, list[int]]] = {}
    for position, request in enumerate(requests):
        by_tier.setdefault(request.setting["tier"], {}).setdefault(request.sample_id, []).append(position)
    config, tier_crops = executor.model.config, tier_crops_of(executor.knob_space)
    # Work for all threads, in any case: two batches each, so that none waits long for another.
    at_least = executor.batch_size * (1 if executor.device.type == "cuda" else 2 * executor.num_workers)
    window: dict[str, list[int]] = {}
    num_images = num_bytes = 0
    for tier, positions_of in by_tier.items():
        num_views = 1 + min(tier_crops[tier][1], config.max_crops)
        image_bytes = num_views * config.tokens_per_view * executor.vision_size * executor.model.dtype.itemsize
        for positions in positions_of.values():
            if num_images >= at_least and num_bytes + image_bytes > executor.vision_cache_bytes:
                yield window
                window, num_images, num_bytes = {}, 0, 0
            window.setdefault(tier, []).extend(positions)
            num_images += 1
            num_bytes += image_bytes
    if window:
        yield window


def _answer_window(
    executor: "MolmoExecutor", requests: Sequence[ExecutorRequest], window: Mapping[str, list[int]]
) -> Iterator[dict[int, ExecutorOutput]]:
    """Answers the requests at a window's positions and yields the outputs of each batch."""
    encoded: dict[int, EncodedSample] = {}
    top_k: dict[int, int] = {}
    blocks: dict[int, tuple[int, ...]] = {}
    for tier, positions in window.items():
        for p, sample in zip(positions, executor.encode([requests[p] for p in positions], tier), strict=True):
            encoded[p], top_k[p], blocks[p] = executor.apply_setting(requests[p], sample)
    mixes_settings = executor.inference.mixes_settings

    def answer(batch: list[int]) -> list[list[int]]:
        prompts = [encoded[p] for p in batch]
        if mixes_settings:
            return executor.generate(prompts, [top_k[p] for p in batch], [blocks[p] for p in batch])
        return executor.generate(prompts, top_k[batch[0]], blocks[batch[0]])

    # What shares a batch: prompts of similar length, or first of all those of the same blocks and experts.
    def neighbours(p: int) -> tuple:
        return (blocks[p], top_k[p]) if executor.inference.prefers_same_settings else (), len(encoded[p].input_ids)

    groups: dict[Hashable, list[int]] = {}
    for p in sorted(encoded, key=neighbours):
        groups.setdefault(None if mixes_settings else (requests[p].setting, blocks[p]), []).append(p)
    rounds: dict[int | None, list[list[int]]] = {}
    for members in groups.values():
        its_top_k = None if mixes_settings else top_k[members[0]]
        rounds.setdefault(its_top_k, []).extend(_batches(executor, members, encoded))
    for its_top_k, batches in rounds.items():
        # The longest first, so that at the end no thread is left alone with one.
        batches.sort(key=lambda batch: -sum(len(blocks[p]) * len(encoded[p].input_ids) for p in batch))
        # The modules' routers keep their number of experts as an attribute, so threads work on one `top_k` at a time.
        with (
            executor.model.model.language_model.experts_per_token(its_top_k),
            ThreadPoolExecutor(executor.num_workers) as pool,
        ):
            work = map if executor.num_workers == 1 else pool.map
            answers = work(lambda batch: do_or_split(answer, batch, "requests", executor.device), batches)
            for batch, its_answers in zip(batches, answers, strict=True):
                outputs = {}
                for p, tokens in zip(batch, its_answers, strict=True):
                    about = requests[p].sample_id, requests[p].setting
                    outputs[p] = ExecutorOutput(*about, executor.decode(tokens), encoded[p].counts, len(tokens))
                yield outputs


def _batches(
    executor: "MolmoExecutor", positions: Sequence[int], encoded: Mapping[int, EncodedSample]
) -> list[list[int]]:
    """The positions in batches, in order, of at most `batch_size` prompts and `max_batch_tokens` tokens."""
    batches: list[list[int]] = []
    num_tokens = 0
    for position in positions:
        length = len(encoded[position].input_ids)
        num_tokens += length
        if not batches or len(batches[-1]) == executor.batch_size or num_tokens > executor.max_batch_tokens:
            batches.append([])
            num_tokens = length
        batches[-1].append(position)
    return batches
