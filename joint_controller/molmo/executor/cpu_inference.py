"""
Molmo on a CPU, faster than its modules and with the same answers.

At the sizes that a CPU answers at, a request spends its time in three places that this file does without: matrix products
by a BLAS that does not use all of the processor's vector units (oneDNN, which comes with torch, does, and takes weights
that were laid out for it beforehand), calls for every expert and token where the tokens of an expert could be multiplied
together, and the modules' own bookkeeping, which outweighs the arithmetic of a decoded token. Prompts of a batch are laid
end to end, so that padding costs nothing and no prompt sees another.
"""

import itertools
import math
import operator
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from .. import MolmoForConditionalGeneration
from ..modeling_molmo import is_padding_view
from .inference import Inference


MIN_PACKED_MACS = 1_000_000
"""Multiplications below which oneDNN's call costs more than it saves (AMD EPYC, one thread: a product of (20, 192) and
(192, 128) takes 13 µs without it and 16 µs with it, one of (16, 192) and (192, 576) 44 and 28 µs)."""


MAX_GROUPED_ROWS = 1024
"""Rows of experts that are computed together: of 192 values each, less than a megabyte."""

CACHE_ROOM = 16
"""Positions that a cache has more than it needs, so that not every step copies it."""

SPARE_BYTES = 2**27
"""Most memory of ended answers that is kept for the caches of the next ones (the embedded executor's batch of 16: 40 MB)."""

QUICK_GELU = 1.702
"""Factor of CLIP's activation."""


class PackedLinear:
    """A linear layer whose float32 weight `(out, in)` is kept twice: as it is, for a few rows, and in oneDNN's layout,
    for many. With `has_silu` the output goes through SiLU, which oneDNN applies while it is in the cache."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, has_silu: bool = False):
        self.weight = weight.detach().contiguous()
        self.bias = None if bias is None else bias.detach()
        self.has_silu = has_silu
        # The number of rows is a hint only: the layout serves any.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, 128)

    @classmethod
    def of(cls, *layers: nn.Linear) -> "PackedLinear":
        """One layer that gives the outputs of several linear modules, one behind the other."""
        biases = [layer.bias for layer in layers]
        return cls(torch.cat([layer.weight for layer in layers]), None if biases[0] is None else torch.cat(biases))

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        if inputs.numel() * len(self.weight) < MIN_PACKED_MACS:
            outputs = F.linear(inputs, self.weight, self.bias)
            return F.silu(outputs, inplace=True) if self.has_silu else outputs
        activation = "swish" if self.has_silu else "none"
        return torch.ops.mkldnn._linear_pointwise(inputs, self._packed, self.bias, activation, [], "")


def _rounded(num_rows: int) -> int:
    """Rows that a product should have for at least that many. oneDNN compiles code for each number of rows that it
    meets and keeps it: where any number occurs, that costs more than the products themselves, and hundreds of
    megabytes."""
    step = 1 if num_rows <= 16 else 8 if num_rows <= 256 else 16 if num_rows <= 512 else 64
    return -(-num_rows // step) * step


class CpuInference(Inference):
    """
    Computes the stages of a request on a CPU, in float32 (see [`Inference`]). Takes the weights that the model has
    now; a copy of them in oneDNN's layout takes as much memory once more.

    Raises:
        ValueError: If the model is elsewhere or in another precision, or torch has no oneDNN.
    """

    mixes_settings = True
    prefers_same_settings = True

    def __init__(self, model: MolmoForConditionalGeneration):
        if not self.supports(model):
            raise ValueError(
                f"the model is on {model.device} in {model.dtype}: the mode 'onednn' is for float32 on a CPU, CLIP's "
                "'quick_gelu' and a build of torch that has oneDNN. Use the mode 'plain'."
            )
        self.model = model
        self.vision = _VisionEncoder(model)
        self.blocks = [_Block(layer) for layer in model.model.language_model.layers]
        self.norm = _RMSNorm.of(model.model.language_model.norm)
        self.lm_head = PackedLinear(model.lm_head.weight)
        self.spare_memory = _SpareMemory()
        self._rotations = self._make_rotations(1024)
        self._prepared: set[tuple[str, int]] = set()  # what was compiled for, by kind and number of rows

    @staticmethod
    def supports(model: MolmoForConditionalGeneration) -> bool:
        """Whether a model is where, and in the precision, that this file is for."""
        is_on_cpu = model.device.type == "cpu" and model.dtype == torch.float32
        has_clip_tower = model.config.vision_config.hidden_act == "quick_gelu"
        return is_on_cpu and has_clip_tower and torch.backends.mkldnn.is_available()

    @torch.inference_mode()
    def image_features(self, pixel_values: torch.Tensor, image_masks: torch.Tensor) -> torch.Tensor:
        return self.vision(pixel_values[0].float(), image_masks[0].float())

    @torch.inference_mode()
    def prepare(self, num_views: int, length: int, num_blocks: int) -> None:
        """Has oneDNN compile its products for the views, and for all rows that the blocks of such a prompt may have (see
        `_rounded`): each takes up to a millisecond, once a process."""
        if ("views", num_views) not in self._prepared:
            self._prepared.add(("views", num_views))
            config = self.model.config.vision_config
            patches = (config.image_size // config.patch_size) ** 2
            self.vision(torch.zeros(num_views, patches, 3 * config.patch_size**2), torch.ones(num_views, patches))
        block = self.blocks[0]
        if ("tokens", _rounded(length)) not in self._prepared:
            self._prepared.add(("tokens", _rounded(length)))
            for layer in (block.qkv, block.out):
                layer(torch.zeros(_rounded(length), layer.weight.shape[1]))
            # An expert may be sent any number of them.
            for rows in {_rounded(number) for number in range(1, length + 1)}:
                if ("expert", rows) not in self._prepared:
                    self._prepared.add(("expert", rows))
                    for layer in (block.gate_up[0], block.down[0]):
                        layer(torch.zeros(rows, layer.weight.shape[1]))

    @torch.inference_mode()
    def prefill(
        self,
        prompts: Mapping[str, torch.Tensor],
        top_k: int | Sequence[int],
        active_blocks: Sequence[int] | Sequence[Sequence[int]],
    ) -> "CpuDecoding":
        num_prompts = len(prompts["input_ids"])
        top_k = [top_k] * num_prompts if isinstance(top_k, int) else top_k
        active_blocks = [active_blocks] * num_prompts if isinstance(active_blocks[0], int) else active_blocks
        for number, blocks in zip(top_k, active_blocks, strict=True):
            self.model.model.check_knobs(blocks, number)
        return CpuDecoding(self, prompts, top_k, active_blocks)

    def rotations(self, length: int) -> torch.Tensor:
        """What rotary embeddings multiply pairs of channels by, as complex numbers: `(at least length, d / 2)`."""
        if len(self._rotations) < length:
            self._rotations = self._make_rotations(2 * length)
        return self._rotations

    @torch.inference_mode()
    def _make_rotations(self, length: int) -> torch.Tensor:
        rotary_emb = self.model.model.language_model.rotary_emb
        cos, sin = rotary_emb(self.norm.weight, torch.arange(length)[None])
        return torch.complex(*(table[0, :, : table.shape[-1] // 2] for table in (cos, sin)))


class _VisionEncoder:
    """Vision tower and connector."""

    def __init__(self, model: MolmoForConditionalGeneration):
        config = model.config.vision_config
        self.model = model.model
        self.tower = self.model.vision_tower
        self.num_heads = config.num_attention_heads
        self.patch_embedding = PackedLinear.of(self.tower.patch_embedding)
        self.blocks = [
            {
                "norm1": block.layer_norm1,
                "qkv": PackedLinear.of(block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj),
                "out": PackedLinear.of(block.self_attn.out_proj),
                "norm2": block.layer_norm2,
                # quick_gelu(x) = x · σ(1.702 x) = silu(1.702 x) / 1.702, with the factor in the weights.
                "fc1": PackedLinear(QUICK_GELU * block.mlp.fc1.weight, QUICK_GELU * block.mlp.fc1.bias, has_silu=True),
                "fc2": PackedLinear(block.mlp.fc2.weight / QUICK_GELU, block.mlp.fc2.bias),
            }
            for block in self.tower.encoder.layers[: self.tower.num_blocks_read]
        ]
        pooling, projector = self.model.connector.pooling, self.model.connector.projector
        self.query = PackedLinear.of(pooling.q_proj)
        self.key_value = PackedLinear.of(pooling.k_proj, pooling.v_proj)
        self.pooled = PackedLinear.of(pooling.o_proj)
        self.gate_up = PackedLinear.of(projector.gate_proj, projector.up_proj)
        self.down = PackedLinear.of(projector.down_proj)

    def __call__(self, views: torch.Tensor, image_masks: torch.Tensor) -> torch.Tensor:
        class_token = self.tower.class_embedding.expand(len(views), 1, -1)
        hidden = torch.cat([class_token, self.patch_embedding(views)], dim=1) + self.tower.position_embedding
        hidden = self.tower.pre_layernorm(hidden)  # (V, 1 + P, width)
        outputs = []
        for block in self.blocks:
            qkv = block["qkv"](block["norm1"](hidden)).unflatten(-1, (3, self.num_heads, -1))
            query, key, value = qkv.permute(2, 0, 3, 1, 4)  # (V, heads, 1 + P, d) each
            attended = F.scaled_dot_product_attention(query, key, value)
            hidden = block["out"](attended.transpose(1, 2).flatten(2)).add_(hidden)
            hidden = block["fc2"](block["fc1"](block["norm2"](hidden))).add_(hidden)
            outputs.append(hidden)
        features = torch.cat([outputs[layer][:, 1:] for layer in self.model.vit_layers], dim=-1)
        features = features.masked_fill(is_padding_view(views)[:, None, None], 0.0)
        windows = self.model.connector.windows(features, image_masks)  # (V · T, patches of a window, features)
        gate, up = self.gate_up(self._pool(windows)).chunk(2, dim=-1)
        return self.down(self.model.connector.projector.act_fn(gate) * up).unflatten(0, (len(views), -1))

    def _pool(self, windows: torch.Tensor) -> torch.Tensor:
        heads = (self.model.connector.pooling.num_heads, -1)
        query = self.query(windows.mean(dim=1, keepdim=True)).unflatten(-1, heads).transpose(1, 2)
        key, value = self.key_value(windows).unflatten(-1, (2, *heads)).permute(2, 0, 3, 1, 4)
        # Windows of a few patches: as products of small matrices this is a fraction of the call for attention.
        weights = (query * key).sum(-1, keepdim=True).mul_(key.shape[-1] ** -0.5).softmax(dim=2)
        return self.pooled((weights * value).sum(2).flatten(1))


class _RMSNorm:
    """An RMS norm in few passes over its input: x · w · √n / √(‖x‖² + n · ε), which is x · w / √(mean(x²) + ε). Its
    weights are `(n,)` or `(parts, n)`; inputs have the same last dimensions."""

    def __init__(self, weight: torch.Tensor, epsilon: float):
        size = weight.shape[-1]
        self.weight = weight.detach() * size**0.5
        self.epsilon = torch.tensor((size * epsilon) ** 0.5)

    @classmethod
    def of(cls, norm: nn.Module) -> "_RMSNorm":
        return cls(norm.weight, norm.variance_epsilon)

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        return states.div(self._lengths(states)).mul_(self.weight)

    def apply_(self, states: torch.Tensor) -> torch.Tensor:
        """As the call, but in place."""
        return states.div_(self._lengths(states)).mul_(self.weight)

    def _lengths(self, states: torch.Tensor) -> torch.Tensor:
        return torch.hypot(torch.linalg.vector_norm(states, dim=-1, keepdim=True), self.epsilon)


class _Block:
    """One block of the language model, on tokens of several prompts laid end to end."""

    def __init__(self, layer: nn.Module):
        attention, mlp = layer.self_attn, layer.mlp
        self.head_size = attention.head_dim
        self.clip_qkv = attention.config.clip_qkv
        self.input_norm = _RMSNorm.of(layer.input_layernorm)
        self.post_norm = _RMSNorm.of(layer.post_attention_layernorm)
        # Channels of queries and keys: the two that a rotary embedding rotates together side by side instead of half a
        # head apart, so that it is one product of complex numbers. Scores are the same in any order.
        self.sizes = [module.out_features for module in (attention.q_proj, attention.k_proj, attention.v_proj)]
        orders = [
            torch.arange(size).unflatten(0, (-1, 2, self.head_size // 2)).transpose(1, 2).flatten()
            for size in self.sizes[:2]
        ]
        weights = [
            norm.weight[order] for norm, order in zip((attention.q_norm, attention.k_norm), orders, strict=True)
        ]
        epsilon = attention.q_norm.variance_epsilon
        # One norm for both where they are of one size.
        is_same_size = self.sizes[0] == self.sizes[1]
        self.norms = [_RMSNorm(weight, epsilon) for weight in ([torch.stack(weights)] if is_same_size else weights)]
        qkv = PackedLinear.of(attention.q_proj, attention.k_proj, attention.v_proj)
        order = torch.cat([orders[0], self.sizes[0] + orders[1], torch.arange(sum(self.sizes[:2]), sum(self.sizes))])
        self.qkv = PackedLinear(qkv.weight[order], None if qkv.bias is None else qkv.bias[order])
        self.out = PackedLinear.of(attention.o_proj)
        self.gate = mlp.gate
        self.act_fn = mlp.experts.act_fn
        self.gate_up = [PackedLinear(weight) for weight in mlp.experts.gate_up_proj]
        self.down = [PackedLinear(weight) for weight in mlp.experts.down_proj]

    def project(self, hidden: torch.Tensor, rotations: torch.Tensor) -> torch.Tensor:
        """Queries, keys and values of tokens, side by side: `(tokens, width of all three)`. `rotations`
        `(tokens, 1, d / 2)` are those of their positions."""
        # In place from here on: a prompt's are megabytes, and memory that is new to the process costs more than a product.
        qkv = self.qkv(self.input_norm(hidden))
        query_key = qkv[:, : sum(self.sizes[:2])]
        if len(self.norms) == 1:
            self.norms[0].apply_(query_key.unflatten(-1, (2, -1)))
        else:
            for states, norm in zip(query_key.split(self.sizes[:2], dim=-1), self.norms, strict=True):
                norm.apply_(states)
        if self.clip_qkv is not None:
            qkv.clamp_(-self.clip_qkv, self.clip_qkv)
        torch.view_as_complex(query_key.unflatten(-1, (-1, self.head_size // 2, 2))).mul_(rotations)
        return qkv

    def query(self, qkv: torch.Tensor) -> torch.Tensor:
        """Queries by head, `(..., heads, d)`, of what [`project`] gives."""
        return qkv[..., : self.sizes[0]].unflatten(-1, (-1, self.head_size))

    def kept(self, qkv: torch.Tensor) -> torch.Tensor:
        """The part of what [`project`] gives that later tokens need: `(..., keys and values)`."""
        return qkv[..., self.sizes[0] :]

    def key_value(self, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values by head, `(..., heads, d)` each, of what is kept."""
        key, value = kept.split(self.sizes[1:], dim=-1)
        return key.unflatten(-1, (-1, self.head_size)), value.unflatten(-1, (-1, self.head_size))

    def finish(self, hidden: torch.Tensor, attended: torch.Tensor, top_k: int | torch.Tensor) -> torch.Tensor:
        """Adds the output of attention, `(tokens, width)`, and that of the experts to `hidden`, in place. `top_k` is
        one number for all tokens, or one for each, `(tokens,)`."""
        hidden.add_(self.out(attended))
        normed = self.post_norm(hidden)
        weights = F.linear(normed, self.gate.weight).softmax(dim=-1)
        most = top_k if isinstance(top_k, int) else int(top_k.max())
        weights, experts = weights.topk(most, dim=-1)  # (tokens, most)
        if not isinstance(top_k, int):
            is_spare = torch.arange(most) >= top_k[:, None]
            # The number behind the last expert's: sorting takes them to the end.
            weights, experts = weights.masked_fill(is_spare, 0.0), experts.masked_fill(is_spare, len(self.gate_up))
        if self.gate.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        if len(hidden) == 1:
            chosen = experts[0].tolist()
            gate_up = torch.cat([self.gate_up[expert](normed) for expert in chosen])
            parts = zip(chosen, self._activated(gate_up, weights[0]).split(1), strict=True)
            return hidden.add_(torch.cat([self.down[expert](part) for expert, part in parts]).sum(0, keepdim=True))
        # Sorted by expert, the tokens of each lie together. A few experts at a time, so that what is computed in between
        # stays in the processor's cache.
        experts, order = experts.flatten().sort()
        weights = weights.flatten().index_select(0, order)
        tokens, weights, counts = self._filled_up(experts, order // most, weights)
        for first, last, start, stop in _groups(counts):
            some = tokens[start:stop]
            parts = normed.index_select(0, some).split(counts[first:last])
            gate_up = [layer(part) for layer, part in zip(self.gate_up[first:last], parts, strict=True) if len(part)]
            activated = self._activated(torch.cat(gate_up), weights[start:stop])
            parts = activated.split(counts[first:last])
            down = [layer(part) for layer, part in zip(self.down[first:last], parts, strict=True) if len(part)]
            hidden.index_add_(0, some, torch.cat(down))
        return hidden

    def _filled_up(
        self, experts: torch.Tensor, tokens: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """Tokens and their weights, sorted by expert, with a token of weight zero where a product should have more
        rows; and the rows of each expert."""
        counts = torch.bincount(experts, minlength=len(self.gate_up))[: len(self.gate_up)].tolist()
        rounded = [_rounded(count) for count in counts]
        num_asked = sum(counts)
        if rounded == counts:
            return tokens[:num_asked], weights[:num_asked], counts
        shift = torch.tensor([0, *itertools.accumulate(map(operator.sub, rounded, counts))])
        places = torch.arange(num_asked) + shift.index_select(0, experts[:num_asked])
        filled = tokens.new_zeros(sum(rounded)).index_copy_(0, places, tokens[:num_asked])
        return filled, weights.new_zeros(sum(rounded)).index_copy_(0, places, weights[:num_asked]), rounded

    def _activated(self, gate_up: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Inputs of the experts' down projections, weighted: there are fewer of them than outputs."""
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate).mul_(up).mul_(weights[:, None])


class _SpareMemory:
    """Memory of answers that have ended, for the caches of others. Where it is handed back to the system instead, the
    first write to each page of it is a page fault: that was a tenth of a batch's time in the language model (embedded
    executor, AMD EPYC). For use by several threads."""

    def __init__(self):
        self._spare: list[torch.Tensor] = []

    def take(self, size: int) -> torch.Tensor:
        """So many numbers or more, with any values. What turns out to be too small is forgotten."""
        try:
            while len(memory := self._spare.pop(0)) < size:
                pass
            return memory
        except IndexError:  # Another thread may have taken the last one after any check.
            return torch.empty(size)

    def give_back(self, memory: torch.Tensor) -> None:
        """Keeps memory that nothing else refers to, if there is not too much already."""
        if memory.nbytes + sum(spare.nbytes for spare in self._spare) <= SPARE_BYTES:
            self._spare.append(memory)


@dataclass
class _BlockCache:
    """Keys and values of a block, side by side, `(rows, L, keys and values)`, and the rows of the batch that they are
    of, `(rows,)`: those whose answers the block takes part in. `rows` is `None` where these are all."""

    rows: torch.Tensor | None
    states: torch.Tensor

    def make_room(self, length: int) -> None:
        """Makes it hold at least `length` positions."""
        if self.states.shape[1] < length:
            # More than asked for, so that not every step copies the cache.
            self.states = F.pad(self.states, (0, 0, 0, length + length // 8 + CACHE_ROOM - self.states.shape[1]))

    def write(self, positions: torch.Tensor, states: torch.Tensor) -> None:
        """Writes keys and values of a token of each row, `(rows, keys and values)`, at its position, `(rows,)`."""
        if len(positions) == 1:
            self.states[0, int(positions)] = states[0]
        else:
            places = positions + torch.arange(len(positions)) * self.states.shape[1]
            self.states.flatten(0, 1).index_copy_(0, places, states)


class _Span:
    """
    What a block of a prefill runs on: the tokens of the prompts `rows`, ascending, of a batch whose prompts have
    `lengths` and lie end to end. Those in `ending` have this block as their last, so only their last token is computed
    to the end. `top_k` `(batch size,)` are the experts of each prompt of the batch.

    Attributes:
        inputs: Places of the prompts' tokens among all, then others' so that a product has the rows that it should have.
            `None` where they are all there are.
        written: Places of those of them that are computed to the end, filled up in the same way, or `None`.
        top_k: Experts of each of these, or of all of them.
    """

    def __init__(self, lengths: list[int], rows: tuple[int, ...], ending: frozenset[int], top_k: torch.Tensor):
        starts = list(itertools.accumulate(lengths, initial=0))
        self.rows = rows
        self.lengths = [lengths[row] for row in rows]
        self.is_ending = [row in ending for row in rows]
        self.num_inputs = sum(self.lengths)
        firsts = [starts[row + 1] - 1 if row in ending else starts[row] for row in rows]
        num_written = [starts[row + 1] - first for row, first in zip(rows, firsts, strict=True)]
        self.num_written = sum(num_written)
        is_all = len(rows) == len(lengths)
        self.inputs = None if is_all else _filled(_ranges([starts[row] for row in rows], self.lengths))
        self.written = None if is_all and not ending else _filled(_ranges(firsts, num_written))
        num_filled = _rounded(self.num_written) - self.num_written
        of_rows = top_k[list(rows)]
        self.top_k = _same(of_rows)
        if not isinstance(self.top_k, int):
            self.top_k = F.pad(of_rows.repeat_interleave(torch.tensor(num_written)), (0, num_filled), value=1)

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Causal attention within each prompt: of inputs, `(inputs, heads, d)` each, for what is written,
        `(written, width)`."""
        attended = []
        parts = (states[: self.num_inputs].split(self.lengths) for states in (query, key, value))
        for *states, is_ending in zip(*parts, self.is_ending, strict=True):
            one, keys, values = (part.transpose(0, 1)[None] for part in states)  # (1, heads, length, d)
            one = one[:, :, -1:] if is_ending else one
            # The last token sees all others.
            found = F.scaled_dot_product_attention(one, keys, values, is_causal=not is_ending, enable_gqa=True)
            attended.append(found[0].transpose(0, 1))
        attended.append(query.new_zeros(_rounded(self.num_written) - self.num_written, *query.shape[1:]))
        return torch.cat(attended).flatten(1)

    def cache(self, states: torch.Tensor, num_rows: int, spare: _SpareMemory) -> _BlockCache:
        """What is kept of inputs, `(inputs, keys and values)`, of a batch of `num_rows` prompts, in spare memory."""
        shape = len(self.rows), max(self.lengths) + CACHE_ROOM, states.shape[-1]
        memory = spare.take(math.prod(shape))
        kept = memory[: math.prod(shape)].view(shape)
        for row, some in zip(kept, states[: self.num_inputs].split(self.lengths), strict=True):
            row[: len(some)] = some
            row[len(some) :] = 0.0
        cache = _BlockCache(None if len(self.rows) == num_rows else torch.tensor(self.rows), kept)
        weakref.finalize(cache, spare.give_back, memory)
        return cache


class CpuDecoding:
    """A [`Decoding`] by [`CpuInference`]. Arguments are those of [`Inference.prefill`]."""

    def __init__(
        self,
        inference: CpuInference,
        prompts: Mapping[str, torch.Tensor],
        top_k: Sequence[int],
        active_blocks: Sequence[Sequence[int]],
    ):
        self.inference = inference
        self._lengths = prompts["attention_mask"].sum(dim=1)  # (B,)
        self._top_k = torch.tensor(top_k)  # (B,)
        self._cache: dict[int, _BlockCache] = {}
        model = inference.model.model
        embedded = model.language_model.embed_tokens(prompts["input_ids"])
        embedded = model.place_image_features(embedded, prompts["image_features"], prompts["image_input_idx"])
        # (tokens, width): prompts end to end, without padding, and a few more for a product's sake.
        (tokens,) = prompts["attention_mask"].flatten().nonzero(as_tuple=True)
        hidden = embedded.flatten(0, 1).index_select(0, _filled(tokens))
        lengths = self._lengths.tolist()
        positions = torch.cat([torch.arange(length) for length in lengths])
        positions = F.pad(positions, (0, len(hidden) - len(positions)))
        rotations = inference.rotations(max(lengths)).index_select(0, positions)[:, None]
        spans: dict[tuple, _Span] = {}
        for block in sorted(set().union(*active_blocks)):
            rows = tuple(row for row, blocks in enumerate(active_blocks) if block in blocks)
            ending = frozenset(row for row in rows if active_blocks[row][-1] == block)
            if (rows, ending) not in spans:
                spans[rows, ending] = _Span(lengths, rows, ending, self._top_k)
            span, layer = spans[rows, ending], inference.blocks[block]
            qkv = layer.project(_selected(hidden, span.inputs), _selected(rotations, span.inputs))
            kept = layer.kept(qkv)
            self._cache[block] = span.cache(kept, len(lengths), inference.spare_memory)
            attended = span.attend(layer.query(qkv), *layer.key_value(kept))
            outputs = layer.finish(_selected(hidden, span.written), attended, span.top_k)
            if span.written is not None:
                hidden.index_copy_(0, span.written[: span.num_written], outputs[: span.num_written])
        self._predict(hidden[self._lengths.cumsum(0) - 1])

    def _predict(self, hidden: torch.Tensor) -> None:
        self.logits = self.inference.lm_head(self.inference.norm(hidden))
        self.tokens = self.logits.argmax(dim=-1)

    @torch.inference_mode()
    def step(self) -> None:
        hidden = self.inference.model.get_input_embeddings()(self.tokens)  # (B, width)
        longest = int(self._lengths.max()) + 1
        rotations = self.inference.rotations(longest).index_select(0, self._lengths)[:, None]
        is_seen = torch.arange(longest) <= self._lengths[:, None]  # (B, longest)
        mask = None if bool(is_seen.all()) else is_seen[:, None, None]
        top_k = _same(self._top_k)
        for block, cache in self._cache.items():
            cache.make_room(longest)
            if (some := cache.rows) is None:
                hidden = self._step_block(block, hidden, rotations, mask, self._lengths, top_k)
            else:
                some_mask = None if mask is None else mask[some]
                hidden[some] = self._step_block(
                    block, hidden[some], rotations[some], some_mask, self._lengths[some], _same(self._top_k[some])
                )
        self._lengths = self._lengths + 1
        self._predict(hidden)

    def _step_block(
        self,
        block: int,
        hidden: torch.Tensor,
        rotations: torch.Tensor,
        mask: torch.Tensor | None,
        positions: torch.Tensor,
        top_k: int | torch.Tensor,
    ) -> torch.Tensor:
        layer, cache = self.inference.blocks[block], self._cache[block]
        qkv = layer.project(hidden, rotations)
        cache.write(positions, layer.kept(qkv))
        longest = int(positions.max()) + 1 if mask is None else mask.shape[-1]
        key, value = layer.key_value(cache.states[:, :longest])
        query, key, value = layer.query(qkv)[:, :, None], key.transpose(1, 2), value.transpose(1, 2)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
        return layer.finish(hidden, attended.flatten(1), top_k)

    def keep(self, rows: Sequence[int]) -> None:
        kept = torch.tensor(rows)
        place_of = {row: place for place, row in enumerate(rows)}
        for block, cache in list(self._cache.items()):
            if cache.rows is None:
                self._cache[block] = _BlockCache(None, cache.states.index_select(0, kept))
                continue
            entry_of = {row: entry for entry, row in enumerate(cache.rows.tolist()) if row in place_of}
            if not entry_of:
                del self._cache[block]
                continue
            # Entries follow the new order of the rows.
            ordered = sorted(entry_of, key=place_of.get)
            entries = torch.tensor([entry_of[row] for row in ordered])
            places = None if len(ordered) == len(rows) else torch.tensor([place_of[row] for row in ordered])
            self._cache[block] = _BlockCache(places, cache.states.index_select(0, entries))
        self._lengths, self._top_k = self._lengths[kept], self._top_k[kept]
        self.logits, self.tokens = self.logits[kept], self.tokens[kept]


def _groups(counts: list[int]) -> Iterator[tuple[int, int, int, int]]:
    """Neighbouring experts with at most `MAX_GROUPED_ROWS` rows together, or one with more: the first of them and the
    one behind the last, and the same of their rows."""
    first = start = stop = 0
    for expert, count in enumerate(counts):
        if stop > start and stop + count - start > MAX_GROUPED_ROWS:
            yield first, expert, start, stop
            first, start = expert, stop
        stop += count
    yield first, len(counts), start, stop


def _same(numbers: torch.Tensor) -> int | torch.Tensor:
    """The number that they all are, or the numbers."""
    most = int(numbers.max())
    return most if int(numbers.min()) == most else numbers


def _selected(states: torch.Tensor, places: torch.Tensor | None) -> torch.Tensor:
    """The states at the given places, or, where there are none, the states themselves."""
    return states if places is None else states.index_select(0, places)


def _ranges(starts: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
    """Ranges of numbers, one behind the other."""
    return torch.cat([torch.arange(start, start + n) for start, n in zip(starts, lengths, strict=True)])


def _filled(places: torch.Tensor) -> torch.Tensor:
    """The places, and the first of them again where a product should have more rows."""
    return F.pad(places, (0, _rounded(len(places)) - len(places)), value=int(places[0]))
