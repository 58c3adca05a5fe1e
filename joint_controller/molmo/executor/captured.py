"""
A Molmo on a GPU as CUDA graphs: the host hands over a stage with a few launches, and the device never waits for it.

One request at a time (batch 1) runs graphs only: the tower's for its number of views, then for each active block that
block's prefill graph for the length of the prompt, rounded up, then for each token the decode graph for the number of
active blocks. Which blocks run, and how many experts, are numbers on the device: no setting needs a graph of its own.
Batches run the same kernels without graphs, whose launches are few compared to the work; each of their rows has a
setting of its own.
"""

import time
from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Mapping, Sequence

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import MolmoForConditionalGeneration
from .fused import DecodeState, FusedMolmo, KeyValueCache


LENGTH_STEP = 64
"""Prompts are padded to multiples of this many tokens, those of more than `SHORT_LENGTH` tokens to multiples of twice as
many."""

SHORT_LENGTH = 1024
"""Where the steps between lengths double: a graph is a block's work for one length, and few lengths are few graphs."""

VIEWS_AT_ONCE = 40
"""Most views that go through the tower together when several images are encoded."""

UPLOADS_AHEAD = 8
"""Images that the host may have uploaded ahead of the tower."""

ANY_SHAPE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Attention where lengths vary freely: cuDNN's is a little faster, but prepares itself for each new length, which takes many
times what it saves."""


def padded_lengths(capacity: int) -> list[int]:
    """
    Lengths, ascending, that the prompt of a single request is padded to.

    Args:
        capacity (`int`):
            The longest of them: a multiple of `2 * LENGTH_STEP`, as `SHORT_LENGTH` is.
    """
    short = range(LENGTH_STEP, min(capacity, SHORT_LENGTH) + 1, LENGTH_STEP)
    return [*short, *range(SHORT_LENGTH + 2 * LENGTH_STEP, capacity + 1, 2 * LENGTH_STEP)]


class GraphPool:
    """
    CUDA graphs by name, captured when first asked for. Between requests those that were used least recently are dropped,
    where all take more memory than the limit.

    All graphs share one pool of memory, since they never run at the same time.

    Args:
        device (`torch.device`):
            The GPU.
        limit_bytes (`int`):
            Memory for graphs and what they compute in between.

    Attributes:
        num_bytes (`int`):
            Memory taken, as the device reports it.
        capture_seconds (`float`):
            Time spent on captures.
    """

    def __init__(self, device: torch.device, limit_bytes: int):
        self.device = device
        self.limit_bytes = limit_bytes
        self.num_bytes = 0
        self.capture_seconds = 0.0
        self._graphs: OrderedDict[Hashable, list[torch.cuda.CUDAGraph]] = OrderedDict()
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def __len__(self) -> int:
        """Graphs that are kept."""
        return sum(len(graphs) for graphs in self._graphs.values())

    def __contains__(self, name: Hashable) -> bool:
        return name in self._graphs

    def get(self, name: Hashable, work: Sequence[Callable[[], None]]) -> list[torch.cuda.CUDAGraph]:
        """
        The graphs of a name, one for each piece of work.

        Args:
            name (`Hashable`):
                Name.
            work (`Sequence[Callable]`):
                What the graphs do, if they are still to be captured. The first piece is run once before that, and must
                call every kernel that the others do: compiling cannot be captured.
        """
        if name not in self._graphs:
            self._capture(name, work)
        self._graphs.move_to_end(name)
        return self._graphs[name]

    def _capture(self, name: Hashable, work: Sequence[Callable[[], None]]) -> None:
        started = time.perf_counter()
        graphs = []
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            work[0]()
            # After the first run: the code of kernels and the libraries' workspaces stay, with or without graphs.
            free = self._free_bytes()
            for piece in work:
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    piece()
                finally:
                    graph.capture_end()
                graphs.append(graph)
        torch.cuda.current_stream(self.device).wait_stream(self._stream)
        self._graphs[name] = graphs
        self.num_bytes += free - self._free_bytes()
        self.capture_seconds += time.perf_counter() - started

    def trim(self) -> None:
        """Drops graphs, the least recently used first, until the rest is within the limit. For between two requests."""
        while self.num_bytes > self.limit_bytes and self._graphs:
            free = self._free_bytes()
            for graph in self._graphs.popitem(last=False)[1]:
                graph.reset()
            self.num_bytes += free - self._free_bytes()
        if not self._graphs:
            self.clear()

    def _free_bytes(self) -> int:
        """What is left of the device's memory once torch has handed back what it does not use."""
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]

    def clear(self) -> None:
        """Drops all graphs, and with the last of them the memory that they shared, which no new graph may name."""
        while self._graphs:
            for graph in self._graphs.popitem()[1]:
                graph.reset()
        self.num_bytes = 0
        self._pool = torch.cuda.graph_pool_handle()


class CapturedInference:
    """
    Computes a Molmo as CUDA graphs. One decoding of a single request goes on at a time; of batches, any number.

    Args:
        model ([`MolmoForConditionalGeneration`]):
            The model, on a GPU. Its weights must not change afterwards.
        graph_bytes (`int`, *optional*, defaults to 2 GiB):
            Memory for graphs.

    Attributes:
        capacity (`int`):
            Tokens that the prompt and the answer of a single request may have. A longer prompt makes it grow.
        prefill_lengths (`list[int]`):
            Lengths, ascending, that the prompt of a single request is padded to.

    Raises:
        ImportError: If Triton is missing.
        ValueError: If the model is not on a GPU, or has something that [`~molmo.executor.fused.FusedMolmo`] lacks.
    """

    mixes_settings = True
    prefers_same_settings = False
    shares_passes = True

    def __init__(self, model: MolmoForConditionalGeneration, graph_bytes: int = 2 * 2**30):
        if model.device.type != "cuda":
            raise ValueError(f"the mode 'captured' needs a CUDA device, but the model is on '{model.device}'.")
        self.model = model
        self.fused = FusedMolmo(model)
        self.graphs = GraphPool(model.device, graph_bytes)
        vision = model.config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        most_views = 1 + model.config.max_crops
        place = {"device": model.device, "dtype": model.dtype}
        self._views = torch.zeros(most_views, patches, 3 * vision.patch_size**2, **place)
        self._masks = torch.zeros(most_views, patches, **place)
        self._features = torch.zeros(
            most_views, model.config.tokens_per_view, model.config.text_config.hidden_size, **place
        )
        # Uploads to a GPU are fast from pinned memory only; half precision halves them.
        # Several of each, so that the host fills the next ones while the device works on what was uploaded before.
        self._pinned = {
            buffer.shape[1:]: deque(
                (torch.empty(buffer.shape, dtype=buffer.dtype, pin_memory=True), torch.cuda.Event())
                for _ in range(UPLOADS_AHEAD)
            )
            for buffer in (self._views, self._masks)
        }
        self._most_experts = model.config.text_config.num_experts_per_tok
        # Crops overlap, but rows of tokens end with a column token; the rest is for the question and the answer.
        self._allocate(most_views * model.config.tokens_per_view * 9 // 8 + 512)

    @staticmethod
    def supports(model: MolmoForConditionalGeneration) -> bool:
        """Whether a model is where this file computes, and made of parts that it knows."""
        return model.device.type == "cuda" and not FusedMolmo.unknown_parts(model)

    def _allocate(self, capacity: int) -> None:
        """Makes room for prompts and answers of `capacity` tokens; what was captured before is captured anew."""
        self.graphs.clear()
        self.capacity = -(-capacity // (2 * LENGTH_STEP)) * 2 * LENGTH_STEP
        self.prefill_lengths = padded_lengths(self.capacity)
        self._rotary = self.fused.rotary(self.capacity)
        self._cache = self.fused.new_cache(1, self.capacity)
        self._state = DecodeState(self.fused, self._most_experts)
        place = {"dtype": torch.int32, "device": self.model.device}
        self._x = torch.zeros(
            self.capacity,
            self.model.config.text_config.hidden_size,
            dtype=self.model.dtype,
            device=self.model.device,
        )
        self._rows = torch.zeros(self.capacity, **place)
        self._positions = torch.arange(self.capacity, **place)
        self._top_k = torch.zeros(self.capacity, **place)
        self._current: CapturedDecoding | None = None

    # --- vision ---------------------------------------------------------------------------------------------------

    def image_features(self, pixel_values: torch.Tensor, image_masks: torch.Tensor) -> torch.Tensor:
        num_views = pixel_values.shape[1]
        self.graphs.trim()
        (graph,) = self._vision_graph(num_views)
        self._upload(pixel_values[0], self._views[:num_views])
        self._upload(image_masks[0], self._masks[:num_views])
        graph.replay()
        return self._features[:num_views].clone()

    def _upload(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copies views or masks to the device, in the model's precision, without waiting for what goes on there."""
        if source.device == target.device:
            target.copy_(source)
            return
        buffers = self._pinned[target.shape[1:]]
        most = len(buffers[0][0])
        for part, place in zip(source.split(most), target.split(most), strict=True):
            pinned, is_read = buffers[0]
            buffers.rotate(-1)
            is_read.synchronize()
            place.copy_(pinned[: len(part)].copy_(part), non_blocking=True)
            is_read.record()

    def _vision_graph(self, num_views: int) -> list[torch.cuda.CUDAGraph]:
        def encode() -> None:
            features = self.fused.image_features(self._views[:num_views], self._masks[:num_views])
            self._features[:num_views].copy_(features)

        return self.graphs.get(("vision", num_views), [encode])

    def features_of_images(self, images: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
        """As [`Inference.features_of_images`], in few passes of the tower."""
        counts = [pixels.shape[1] for pixels, _ in images]
        views, masks = (
            torch.empty(sum(counts), *one.shape[1:], dtype=one.dtype, device=one.device)
            for one in (self._views, self._masks)
        )
        # The tower works on the first views while the next are uploaded.
        features, start, done = [], 0, 0
        for (pixels, image_masks), count in zip(images, counts, strict=True):
            self._upload(pixels[0], views[start : start + count])
            self._upload(image_masks[0], masks[start : start + count])
            start += count
            while start - done >= VIEWS_AT_ONCE or (start == len(views) and done < start):
                chunk = slice(done, min(done + VIEWS_AT_ONCE, start))
                features.append(self.fused.image_features(views[chunk], masks[chunk]))
                done = chunk.stop
        return list(torch.cat(features).split(counts))

    # --- language model -------------------------------------------------------------------------------------------

    def prefill(
        self,
        prompts: Mapping[str, torch.Tensor],
        top_k: int | Sequence[int],
        active_blocks: Sequence[int] | Sequence[Sequence[int]],
    ) -> "CapturedDecoding | BatchDecoding":
        """
        As [`Inference.prefill`], and each row of a batch may have a `top_k` and `active_blocks` of its own.
        """
        num_prompts = len(prompts["input_ids"])
        top_k = [top_k] * num_prompts if isinstance(top_k, int) else list(top_k)
        if isinstance(active_blocks[0], int):
            active_blocks = [active_blocks] * num_prompts
        for blocks, number in zip(active_blocks, top_k, strict=True):
            self.model.model.check_knobs(blocks, number)
        if max(top_k) > self._most_experts:
            self._most_experts = max(top_k)
            self._allocate(self.capacity)
        if prompts["input_ids"].shape[1] >= self.capacity:
            self._allocate(prompts["input_ids"].shape[1] + 512)
        if num_prompts == 1:
            return CapturedDecoding(self, prompts, top_k[0], active_blocks[0])
        return BatchDecoding(self, prompts, top_k, active_blocks)

    def prepare(self, num_views: int, length: int, num_blocks: int) -> None:
        """Captures what a request needs, see [`Inference.prepare`]."""
        if length >= self.capacity:
            self._allocate(length + 512)
        self._vision_graph(num_views)
        self._prefill_graphs(length)
        self._decode_graph(num_blocks)
        self._choose_graph()

    def embed(self, prompts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Embeddings of prompts with their image features: `(B, L, hidden)`."""
        embeddings = self.model.get_input_embeddings()(prompts["input_ids"])
        return self.model.model.place_image_features(embeddings, prompts["image_features"], prompts["image_input_idx"])

    def _prefill_graphs(self, length: int) -> list[torch.cuda.CUDAGraph]:
        """A graph for each block, on the first rows of `_x`: as many as prompts of about that length are padded to."""
        length = self.prefill_lengths[bisect_left(self.prefill_lengths, length)]

        def attend(block: int, qkv: torch.Tensor) -> torch.Tensor:
            # Padding follows the prompt: no token of the prompt sees it.
            rows, positions = self._rows[:length], self._positions[:length]
            return self.fused.attend_prompts(block, qkv, self._rotary, self._cache, rows, positions, [(0, length)])

        def run(block: int) -> None:
            self.fused.run_block(block, self._x[:length], self._top_k[:length], self._most_experts, attend)

        work = [lambda block=block: run(block) for block in range(len(self.fused.layers))]
        return self.graphs.get(("prefill", length), work)

    def _decode_graph(self, num_blocks: int) -> torch.cuda.CUDAGraph:
        def decode() -> None:
            self.fused.decode(self._state, num_blocks, self._rotary, self._cache)

        return self.graphs.get(("decode", num_blocks), [decode])[0]

    def _choose_graph(self) -> torch.cuda.CUDAGraph:
        return self.graphs.get("choose", [lambda: self.fused.choose_token(self._state)])[0]

    def start(
        self, decoding: "CapturedDecoding", prompts: Mapping[str, torch.Tensor], top_k: int, blocks: Sequence[int]
    ) -> None:
        """Runs one prompt; the decoding that went on before ends."""
        length = prompts["input_ids"].shape[1]
        self.graphs.trim()
        # Captures work on the same memory, so they come before anything that stays there.
        graphs, choose = self._prefill_graphs(length), self._choose_graph()
        self._decode_graph(len(blocks))
        self._current = decoding
        self._x[:length].copy_(self.embed(prompts)[0])
        self._top_k[:length].fill_(top_k)
        self._top_k[length:].zero_()
        state = self._state
        setting = torch.tensor([length - 1, top_k, *blocks], dtype=torch.int32)
        state.setting[: len(setting)].copy_(setting, non_blocking=True)
        for block in blocks:
            graphs[block].replay()
        state.x.copy_(self._x[length - 1])
        choose.replay()

    def next(self, decoding: "CapturedDecoding", num_blocks: int) -> None:
        """One more token of the decoding that goes on."""
        if self._current is not decoding:
            raise RuntimeError("another request was started since: requests in captured mode are decoded one by one.")
        self._decode_graph(num_blocks).replay()

    @property
    def state(self) -> DecodeState:
        """Where the single request's token and logits stand."""
        return self._state

    @property
    def rotary(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotary embedding of all positions, see [`~molmo.executor.fused.FusedMolmo.rotary`]."""
        return self._rotary

    @property
    def most_experts(self) -> int:
        """Most experts of a token."""
        return self._most_experts


class CapturedDecoding:
    """
    A [`Decoding`] of one request by graphs. The next step overwrites `logits` and `tokens`.

    Args:
        inference ([`CapturedInference`]):
            What computes.
        prompts, top_k, active_blocks:
            As in [`Inference.prefill`], for one prompt.
    """

    def __init__(
        self,
        inference: CapturedInference,
        prompts: Mapping[str, torch.Tensor],
        top_k: int,
        active_blocks: Sequence[int],
    ):
        self._inference = inference
        self._num_blocks = len(active_blocks)
        self._left = inference.capacity - prompts["input_ids"].shape[1]
        inference.start(self, prompts, top_k, active_blocks)
        self.logits = inference.state.logits[None]
        self.tokens = inference.state.token

    def step(self) -> None:
        if self._left == 0:
            raise ValueError(
                f"the answer has reached position {self._inference.capacity}, where the cache ends: ask for fewer new "
                "tokens."
            )
        self._left -= 1
        self._inference.next(self, self._num_blocks)

    def keep(self, rows: Sequence[int]) -> None:
        if list(rows) != [0]:
            raise ValueError(f"the rows {list(rows)} are to go on, but there is one row.")


class BatchDecoding:
    """
    A [`Decoding`] of a batch, each row with its own setting. Prompts are laid end to end, without padding; each
    block runs on the tokens of the rows that it is active in.

    Args:
        inference ([`CapturedInference`]):
            What computes.
        prompts (`dict[str, torch.Tensor]`):
            As in [`Inference.prefill`].
        top_k (`Sequence[int]`):
            Experts per token of each row.
        active_blocks (`Sequence[Sequence[int]]`):
            Blocks of each row.
    """

    def __init__(
        self,
        inference: CapturedInference,
        prompts: Mapping[str, torch.Tensor],
        top_k: Sequence[int],
        active_blocks: Sequence[Sequence[int]],
    ):
        self._inference = inference
        self._fused = inference.fused
        num_rows = len(top_k)
        # Where blocks are chosen by one ranking, those that run a block then are the first rows, which need no copy.
        self._order = sorted(range(num_rows), key=lambda row: -len(active_blocks[row]))
        self._blocks = [set(active_blocks[row]) for row in self._order]
        device = inference.model.device
        mask = prompts["attention_mask"][self._order].bool()
        self._length = mask.shape[1]  # of the longest row
        lengths = mask.sum(dim=1).tolist()
        place = {"dtype": torch.int32, "device": device}
        self._rows = torch.arange(num_rows, **place)
        repeats = torch.tensor(lengths).to(device, non_blocking=True)
        self._positions = repeats.int()
        self._top_k = torch.tensor([top_k[row] for row in self._order], dtype=torch.int32).to(
            device, non_blocking=True
        )
        self._cache = self._fused.new_cache(num_rows, -(-(self._length + LENGTH_STEP) // LENGTH_STEP) * LENGTH_STEP)

        x = inference.embed(prompts)[self._order][mask]  # (tokens, hidden)
        ends = repeats.cumsum(0)
        rows = self._rows.repeat_interleave(repeats, output_size=len(x))
        positions = (torch.arange(len(x), device=device) - (ends - repeats)[rows]).int()
        experts = self._top_k.repeat_interleave(repeats, output_size=len(x))
        for block, active in self._runs():
            chosen = self._selection(active, rows, sum(lengths[row] for row in active))
            parts = [(row, lengths[row]) for row in active]
            block_rows, block_positions = rows[chosen], positions[chosen]

            def attend(
                block: int, qkv: torch.Tensor, rows=block_rows, positions=block_positions, parts=parts
            ) -> torch.Tensor:
                return self._fused.attend_prompts(block, qkv, inference.rotary, self._cache, rows, positions, parts)

            with sdpa_kernel(ANY_SHAPE):
                self._run_block(block, x, chosen, experts, attend)
        self._choose(x[ends - 1])

    def _runs(self) -> list[tuple[int, list[int]]]:
        """Blocks that run, ascending, and the rows that run each."""
        return [
            (block, [row for row, blocks in enumerate(self._blocks) if block in blocks])
            for block in sorted(set().union(*self._blocks))
        ]

    def _selection(self, active: list[int], rows: torch.Tensor, count: int) -> slice | torch.Tensor:
        """The entries of the active rows among entries whose rows are `rows`: the first `count`, or those at a list."""
        if active == list(range(len(active))):
            return slice(count)
        is_active = torch.zeros(len(self._blocks), dtype=torch.bool)
        is_active[active] = True
        order = is_active.to(rows.device)[rows].logical_not().argsort(stable=True)
        return order[:count]

    def _run_block(
        self,
        block: int,
        x: torch.Tensor,
        chosen: slice | torch.Tensor,
        experts: torch.Tensor,
        attend: Callable[[int, torch.Tensor], torch.Tensor],
    ) -> None:
        some = x[chosen]
        self._fused.run_block(block, some, experts[chosen], self._inference.most_experts, attend)
        if not isinstance(chosen, slice):
            x[chosen] = some

    def _choose(self, x: torch.Tensor) -> None:
        back = torch.tensor(sorted(range(len(self._order)), key=self._order.__getitem__), device=x.device)
        self.logits = self._fused.output_logits(x)[back]
        self.tokens = self.logits.argmax(dim=-1)

    def step(self) -> None:
        if self._length >= self._cache.capacity:
            self._grow()
        self._length += 1
        x = self._inference.model.get_input_embeddings()(self.tokens[self._order])
        places = torch.arange(len(self._order), device=x.device)
        for block, active in self._runs():
            chosen = self._selection(active, places, len(active))
            block_rows, block_positions = self._rows[chosen], self._positions[chosen]

            def attend(block: int, qkv: torch.Tensor, rows=block_rows, positions=block_positions) -> torch.Tensor:
                return self._fused.attend_new_tokens(block, qkv, self._inference.rotary, self._cache, rows, positions)

            self._run_block(block, x, chosen, self._top_k, attend)
        self._positions += 1
        self._choose(x)

    def keep(self, rows: Sequence[int]) -> None:
        # Rows that have ended stay in the cache, unread.
        number = {row: place for place, row in enumerate(rows)}
        kept = [place for place, row in enumerate(self._order) if row in number]
        self._order = [number[self._order[place]] for place in kept]
        self._blocks = [self._blocks[place] for place in kept]
        self._rows, self._positions, self._top_k = (
            values[kept] for values in (self._rows, self._positions, self._top_k)
        )
        self.logits, self.tokens = self.logits[list(rows)], self.tokens[list(rows)]

    def _grow(self) -> None:
        old = self._cache
        capacity = old.capacity + 2 * LENGTH_STEP
        if capacity > self._inference.capacity:
            raise ValueError(
                f"an answer has reached position {old.capacity}, near where the rotary table ends: ask for fewer new "
                "tokens."
            )
        self._cache: KeyValueCache = self._fused.new_cache(old.num_rows, capacity)
        for new, filled in ((self._cache.keys, old.keys), (self._cache.values, old.values)):
            new[:, :, :, : old.capacity] = filled
