"""
Molmo on a CPU, faster than its modules and with the same answers.

At the sizes that a CPU answers at, a request spends its time in three places that this file does without: matrix products
by a BLAS that does not use all of the processor's vector units (oneDNN, which comes with torch, does, and takes weights
that were laid out for it beforehand), calls for every expert and token where the tokens of an expert could be multiplied
together, and the modules' own bookkeeping, which outweighs the arithmetic of a decoded token. Prompts of a batch are laid
end to end, so that padding costs nothing and no prompt sees another.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from ..molmo import MolmoForConditionalGeneration
from ..molmo.modeling_molmo import is_padding_view


MIN_PACKED_MACS = 1_000_000
"""Multiplications below which oneDNN's call costs more than it saves (AMD EPYC, one thread: a product of (20, 192) and
(192, 128) takes 13 µs without it and 16 µs with it, one of (16, 192) and (192, 576) 44 and 28 µs)."""


MAX_GROUPED_ROWS = 1024
"""Rows of experts that are computed together: of 192 values each, less than a megabyte."""

QUICK_GELU = 1.702
"""Factor of CLIP's activation."""


class PackedLinear:
    """
    A linear layer whose weight is kept twice: as it is, for a few rows, and in oneDNN's layout, for many.

    Args:
        weight (`torch.Tensor` of shape `(out, in)`):
            Weight, in float32.
        bias (`torch.Tensor` of shape `(out,)`, *optional*):
            Bias.
        has_silu (`bool`, *optional*, defaults to `False`):
            Whether the output goes through SiLU, which oneDNN applies while it is in the cache.
        rounds_rows (`bool`, *optional*, defaults to `False`):
            Whether to fill up the inputs with rows of zeros to one of a few numbers of rows. oneDNN compiles code for each
            number of rows that it meets and keeps it: where any number occurs, that costs more than the product itself, and
            hundreds of megabytes.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        has_silu: bool = False,
        rounds_rows: bool = False,
    ):
        self.weight = weight.detach().contiguous()
        self.bias = None if bias is None else bias.detach()
        self.has_silu = has_silu
        self.rounds_rows = rounds_rows
        # The number of rows is a hint only: the layout serves any.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, 128)

    @classmethod
    def of(cls, *layers: nn.Linear, rounds_rows: bool = False) -> "PackedLinear":
        """One layer that gives the outputs of several linear modules, one behind the other."""
        biases = [layer.bias for layer in layers]
        bias = None if biases[0] is None else torch.cat(biases)
        return cls(torch.cat([layer.weight for layer in layers]), bias, rounds_rows=rounds_rows)

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        if inputs.numel() * len(self.weight) < MIN_PACKED_MACS:
            outputs = F.linear(inputs, self.weight, self.bias)
            return F.silu(outputs, inplace=True) if self.has_silu else outputs
        activation = "swish" if self.has_silu else "none"
        num_rows = len(inputs)
        if self.rounds_rows:
            inputs = F.pad(inputs, (0, 0, 0, _rounded(num_rows) - num_rows))
            outputs = torch.ops.mkldnn._linear_pointwise(inputs, self._packed, self.bias, activation, [], "")
            return outputs[:num_rows]
        return torch.ops.mkldnn._linear_pointwise(inputs, self._packed, self.bias, activation, [], "")


def _rounded(num_rows: int) -> int:
    """The next number of rows that code is compiled for."""
    step = 1 if num_rows <= 128 else 64 if num_rows <= 1024 else 256
    return -(-num_rows // step) * step


class CpuInference:
    """
    Computes the stages of a request on a CPU, in float32 (see [`Inference`]). Takes the weights that the model has now;
    a copy of them in oneDNN's layout takes as much memory once more.

    Args:
        model ([`MolmoForConditionalGeneration`]):
            The model, in float32 on a CPU.

    Raises:
        ValueError: If the model is elsewhere or in another precision, or torch has no oneDNN.
    """

    prefill_lengths = None
    mixes_settings = True

    def __init__(self, model: MolmoForConditionalGeneration):
        if not self.supports(model):
            raise ValueError(
                f"the model is on {model.device} in {model.dtype}: the mode 'onednn' is for float32 on a CPU, CLIP's "
                "'quick_gelu' and a build of torch that has oneDNN. Use the mode 'plain'."
            )
        self.model = model
        self.vision = _VisionEncoder(model)
        self.blocks = [_Block(layer) for layer in model.model.language_model.layers]
        self.norm = model.model.language_model.norm
        self.lm_head = PackedLinear(model.lm_head.weight)

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
        return self.down(self._gated(self._pool(windows))).unflatten(0, (len(views), -1))

    def _pool(self, windows: torch.Tensor) -> torch.Tensor:
        heads = (self.model.connector.pooling.num_heads, -1)
        query = self.query(windows.mean(dim=1, keepdim=True)).unflatten(-1, heads).transpose(1, 2)
        key, value = self.key_value(windows).unflatten(-1, (2, *heads)).permute(2, 0, 3, 1, 4)
        # Windows of a few patches: as products of small matrices this is a fraction of the call for attention.
        weights = (query * key).sum(-1, keepdim=True).mul_(key.shape[-1] ** -0.5).softmax(dim=2)
        return self.pooled((weights * value).sum(2).flatten(1))

    def _gated(self, pooled: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(pooled).chunk(2, dim=-1)
        return self.model.connector.projector.act_fn(gate) * up


class _Block:
    """One block of the language model, on tokens of several prompts laid end to end."""

    def __init__(self, layer: nn.Module):
        attention, mlp = layer.self_attn, layer.mlp
        self.head_size = attention.head_dim
        self.clip_qkv = attention.config.clip_qkv
        self.input_norm, self.post_norm = layer.input_layernorm, layer.post_attention_layernorm
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm
        self.qkv = PackedLinear.of(attention.q_proj, attention.k_proj, attention.v_proj, rounds_rows=True)
        self.qkv_sizes = [attention.q_proj.out_features, attention.k_proj.out_features, attention.v_proj.out_features]
        self.out = PackedLinear.of(attention.o_proj, rounds_rows=True)
        self.gate = mlp.gate
        self.act_fn = mlp.experts.act_fn
        self.gate_up = [PackedLinear(weight, rounds_rows=True) for weight in mlp.experts.gate_up_proj]
        self.down = [PackedLinear(weight, rounds_rows=True) for weight in mlp.experts.down_proj]

    def project(
        self, hidden: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values of tokens, `(tokens, heads, d)` each."""
        query, key, value = self.qkv(_rms_norm(hidden, self.input_norm)).split(self.qkv_sizes, dim=-1)
        query, key = _rms_norm(query, self.q_norm), _rms_norm(key, self.k_norm)
        if self.clip_qkv is not None:
            query, key, value = (states.clamp(-self.clip_qkv, self.clip_qkv) for states in (query, key, value))
        query, key, value = (states.unflatten(-1, (-1, self.head_size)) for states in (query, key, value))
        return _rotate(query, *rotary), _rotate(key, *rotary), value

    def finish(self, hidden: torch.Tensor, attended: torch.Tensor, top_k: int | torch.Tensor) -> torch.Tensor:
        """
        What follows attention, whose result is `attended` `(tokens, width)`. `top_k` is one number for all tokens, or one
        for each, `(tokens,)`.
        """
        hidden = self.out(attended).add_(hidden)
        return self._experts(_rms_norm(hidden, self.post_norm), top_k).add_(hidden)

    def _experts(self, hidden: torch.Tensor, top_k: int | torch.Tensor) -> torch.Tensor:
        weights = F.linear(hidden, self.gate.weight).softmax(dim=-1)
        most = top_k if isinstance(top_k, int) else int(top_k.max())
        weights, experts = weights.topk(most, dim=-1)  # (tokens, most)
        if isinstance(top_k, int):
            tokens = torch.arange(len(hidden)).repeat_interleave(most)
        else:
            is_asked = torch.arange(most) < top_k[:, None]
            weights, experts = weights.where(is_asked, 0.0), experts[is_asked]
            tokens = torch.arange(len(hidden)).repeat_interleave(top_k)
        if self.gate.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        if len(hidden) == 1:
            experts = experts.flatten().tolist()
            return self._experts_of_token(hidden, experts, weights[0, : len(experts)])
        weights = weights.flatten() if isinstance(top_k, int) else weights[is_asked]
        # Sorted by expert, the tokens of each lie together. A few experts at a time, so that what is computed in between
        # stays in the processor's cache.
        experts, order = experts.flatten().sort()
        tokens, weights = tokens[order], weights[order]
        counts = torch.bincount(experts, minlength=len(self.gate_up)).tolist()
        outputs = torch.zeros_like(hidden)
        for first, last, start, stop in _groups(counts):
            some = tokens[start:stop]
            parts = hidden[some].split(counts[first:last])
            gate_up = [layer(part) for layer, part in zip(self.gate_up[first:last], parts, strict=True) if len(part)]
            activated = self._activated(torch.cat(gate_up), weights[start:stop])
            parts = activated.split(counts[first:last])
            down = [layer(part) for layer, part in zip(self.down[first:last], parts, strict=True) if len(part)]
            outputs.index_add_(0, some, torch.cat(down))
        return outputs

    def _experts_of_token(self, hidden: torch.Tensor, experts: list[int], weights: torch.Tensor) -> torch.Tensor:
        activated = self._activated(torch.cat([self.gate_up[expert](hidden) for expert in experts]), weights)
        parts = zip(experts, activated.split(1), strict=True)
        return torch.cat([self.down[expert](part) for expert, part in parts]).sum(0, keepdim=True)

    def _activated(self, gate_up: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Inputs of the experts' down projections, weighted: there are fewer of them than outputs."""
        gate, up = gate_up.chunk(2, dim=-1)
        return (self.act_fn(gate) * up).mul_(weights[:, None])


@dataclass
class _BlockCache:
    """
    Keys and values of a block, `(rows, heads, L, d)`, and the rows of the batch that they are of, `(rows,)`: those whose
    answers the block takes part in. `rows` is `None` where these are all.
    """

    rows: torch.Tensor | None
    keys: torch.Tensor
    values: torch.Tensor

    def make_room(self, length: int) -> None:
        """Makes it hold at least `length` positions."""
        if self.keys.shape[2] < length:
            # More than asked for, so that not every step copies the cache.
            room = (0, 0, 0, 16 + length // 8)
            self.keys, self.values = F.pad(self.keys, room), F.pad(self.values, room)


class CpuDecoding:
    """
    A [`Decoding`] by [`CpuInference`]. Arguments are those of [`Inference.prefill`].
    """

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
        self._prefill(prompts, active_blocks)

    def _prefill(self, prompts: Mapping[str, torch.Tensor], active_blocks: Sequence[Sequence[int]]) -> None:
        model = self.inference.model.model
        embedded = model.language_model.embed_tokens(prompts["input_ids"])
        embedded = model.place_image_features(embedded, prompts["image_features"], prompts["image_input_idx"])
        hidden = embedded[prompts["attention_mask"].bool()]  # (tokens, width): prompts end to end, without padding
        cos, sin = self._rotary(torch.cat([torch.arange(length) for length in self._lengths.tolist()]))
        row_of_token = torch.arange(len(self._lengths)).repeat_interleave(self._lengths)
        for block in sorted(set().union(*active_blocks)):
            rows = _where([block in blocks for blocks in active_blocks])
            if rows is None:
                hidden = self._prefill_block(block, rows, hidden, cos, sin, row_of_token)
            else:
                (tokens,) = torch.isin(row_of_token, rows).nonzero(as_tuple=True)
                hidden[tokens] = self._prefill_block(
                    block, rows, hidden[tokens], cos[tokens], sin[tokens], row_of_token[tokens]
                )
        self._predict(hidden[self._lengths.cumsum(0) - 1])

    def _prefill_block(
        self,
        block: int,
        rows: torch.Tensor | None,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        row_of_token: torch.Tensor,
    ) -> torch.Tensor:
        layer = self.inference.blocks[block]
        lengths = (self._lengths if rows is None else self._lengths[rows]).tolist()
        states = layer.project(hidden, (cos, sin))
        # (length, heads, d) → (1, heads, length, d), for each prompt
        prompts = [
            tuple(part.transpose(0, 1)[None] for part in parts)
            for parts in zip(*(state.split(lengths) for state in states), strict=True)
        ]
        attended = [
            F.scaled_dot_product_attention(*prompt, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
            for prompt in prompts
        ]
        _, keys, values = zip(*prompts, strict=True)
        self._cache[block] = _BlockCache(rows, _pad(keys), _pad(values))
        return layer.finish(hidden, torch.cat(attended).flatten(1), self._top_k_of(row_of_token))

    def _top_k_of(self, rows: torch.Tensor) -> int | torch.Tensor:
        """Experts of tokens that belong to the given rows."""
        first = self._top_k[0]
        return int(first) if bool((self._top_k == first).all()) else self._top_k[rows]

    def _rotary(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of positions, `(tokens, 1, d)` each."""
        rotary_emb = self.inference.model.model.language_model.rotary_emb
        return tuple(table[0, :, None] for table in rotary_emb(self.inference.norm.weight, positions[None]))

    def _predict(self, hidden: torch.Tensor) -> None:
        self.logits = self.inference.lm_head(_rms_norm(hidden, self.inference.norm))
        self.tokens = self.logits.argmax(dim=-1)

    @torch.inference_mode()
    def step(self) -> None:
        hidden = self.inference.model.get_input_embeddings()(self.tokens)  # (B, width)
        cos, sin = self._rotary(self._lengths)
        longest = int(self._lengths.max()) + 1
        is_seen = torch.arange(longest) <= self._lengths[:, None]  # (B, longest)
        mask = None if bool(is_seen.all()) else is_seen[:, None, None]
        every = torch.arange(len(hidden))
        for block, cache in self._cache.items():
            cache.make_room(longest)
            if cache.rows is None:
                hidden = self._step_block(block, hidden, cos, sin, mask, every)
            else:
                some = cache.rows
                hidden[some] = self._step_block(
                    block, hidden[some], cos[some], sin[some], None if mask is None else mask[some], some
                )
        self._lengths = self._lengths + 1
        self._predict(hidden)

    def _step_block(
        self,
        block: int,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: torch.Tensor | None,
        rows: torch.Tensor,
    ) -> torch.Tensor:
        layer, cache = self.inference.blocks[block], self._cache[block]
        query, key, value = layer.project(hidden, (cos, sin))
        places, longest = self._lengths[rows], int(self._lengths.max()) + 1
        cache.keys[torch.arange(len(rows)), :, places] = key
        cache.values[torch.arange(len(rows)), :, places] = value
        attended = F.scaled_dot_product_attention(
            query[:, :, None],
            cache.keys[:, :, :longest],
            cache.values[:, :, :longest],
            attn_mask=mask,
            enable_gqa=True,
        )
        return layer.finish(hidden, attended.flatten(1), self._top_k_of(rows))

    def keep(self, rows: Sequence[int]) -> None:
        kept = torch.tensor(rows)
        place_of = {row: place for place, row in enumerate(rows)}
        for block, cache in list(self._cache.items()):
            if cache.rows is None:
                self._cache[block] = _BlockCache(None, cache.keys[kept], cache.values[kept])
                continue
            entry_of = {row: entry for entry, row in enumerate(cache.rows.tolist()) if row in place_of}
            if not entry_of:
                del self._cache[block]
                continue
            # Entries follow the new order of the rows.
            ordered = sorted(entry_of, key=place_of.get)
            entries = torch.tensor([entry_of[row] for row in ordered])
            new_rows = _where([row in entry_of for row in rows])
            self._cache[block] = _BlockCache(new_rows, cache.keys[entries], cache.values[entries])
        self._lengths, self._top_k = self._lengths[kept], self._top_k[kept]
        self.logits, self.tokens = self.logits[kept], self.tokens[kept]


def _groups(counts: list[int]) -> Iterator[tuple[int, int, int, int]]:
    """
    Neighbouring experts with at most `MAX_GROUPED_ROWS` rows together, or one with more: the first of them and the one behind
    the last, and the same of their rows.
    """
    first = start = stop = 0
    for expert, count in enumerate(counts):
        if stop > start and stop + count - start > MAX_GROUPED_ROWS:
            yield first, expert, start, stop
            first, start = expert, stop
        stop += count
    yield first, len(counts), start, stop


def _where(is_in: list[bool]) -> torch.Tensor | None:
    """Positions that are true, or `None` for all."""
    return None if all(is_in) else torch.tensor(is_in).nonzero().flatten()


def _pad(states: Sequence[torch.Tensor]) -> torch.Tensor:
    """States `(1, heads, length, d)` of several prompts as `(B, heads, longest, d)`, padded behind."""
    longest = max(state.shape[2] for state in states)
    return torch.cat([F.pad(state, (0, 0, 0, longest - state.shape[2])) for state in states])


def _rms_norm(states: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    return F.rms_norm(states, (states.shape[-1],), norm.weight, norm.variance_epsilon)


def _rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-second, first], dim=-1) * sin
