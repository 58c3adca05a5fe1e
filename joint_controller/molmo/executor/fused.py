"""
The stages of [`MolmoForConditionalGeneration`] in few, large kernels: the same weights and the same answers, faster.

Nothing here waits for the device, and every shape is known on the host: each function can be captured as a CUDA graph.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from ..modeling_molmo import MolmoForConditionalGeneration, is_padding_view
from . import kernels


DECODE_SPLITS = 16
"""Parts into which the attention of a new token cuts the positions before it: with 16 heads, 256 programs read them."""


@dataclass
class KeyValueCache:
    """
    Keys and values of every block, for a fixed number of sequences and positions.

    Args:
        num_blocks (`int`):
            Blocks of the language model.
        num_rows (`int`):
            Sequences.
        heads (`int`):
            Attention heads.
        capacity (`int`):
            Positions of a sequence.
        head_size (`int`):
            Width of a head.
        dtype (`torch.dtype`), device (`torch.device`):
            Of the entries.
    """

    num_blocks: int
    num_rows: int
    heads: int
    capacity: int
    head_size: int
    dtype: torch.dtype
    device: torch.device
    keys: torch.Tensor = field(init=False)
    values: torch.Tensor = field(init=False)

    def __post_init__(self):
        shape = (self.num_blocks, self.num_rows, self.heads, self.capacity, self.head_size)
        self.keys, self.values = (torch.empty(shape, dtype=self.dtype, device=self.device) for _ in range(2))


class DecodeState:
    """
    What one token needs on its way through the language model: everything on the device, at fixed addresses.

    Attributes:
        setting (`torch.IntTensor` of shape `(2 + num_blocks,)`):
            The three that follow, as one tensor.
        position (`torch.IntTensor` of shape `(1,)`):
            Tokens in the cache.
        top_k (`torch.IntTensor` of shape `(1,)`):
            Experts that work.
        blocks (`torch.IntTensor` of shape `(num_blocks,)`):
            Indices of the blocks that run, first the first.
        x (`torch.Tensor` of shape `(width,)`):
            The hidden state.
        token (`torch.LongTensor` of shape `(1,)`):
            The newest token.
        logits (`torch.Tensor` of shape `(vocab_size,)`):
            The scores that it was chosen by.
    """

    def __init__(self, molmo: "FusedMolmo", most_experts: int):
        config = molmo.config
        place = {"device": molmo.device}
        values = {"device": molmo.device, "dtype": molmo.dtype}
        heads, head_size = config.num_attention_heads, molmo.head_size
        # One tensor, so that one copy from the host sets them all.
        self.setting = torch.zeros(2 + config.num_hidden_layers, dtype=torch.int32, **place)
        self.position, self.top_k, self.blocks = self.setting[:1], self.setting[1:2], self.setting[2:]
        self.token = torch.zeros(1, dtype=torch.long, **place)
        self.row = torch.zeros(1, dtype=torch.int32, **place)
        self.x = torch.zeros(config.hidden_size, **values)
        self.qkv = torch.zeros(3 * config.hidden_size, **values)
        self.partial = torch.zeros(1, heads, DECODE_SPLITS, head_size, **place)
        self.stats = torch.zeros(1, heads, DECODE_SPLITS, 2, **place)
        self.routing = torch.zeros(config.num_experts, **values)
        self.activated = torch.zeros(most_experts, config.intermediate_size, **values)
        self.logits = torch.zeros(config.vocab_size, **values)


class FusedMolmo:
    """
    The fast path through a Molmo's weights.

    Query, key and value projections are laid side by side in memory, which the model's own parameters then are views of:
    the model works as before and nothing is stored twice.

    Args:
        model ([`MolmoForConditionalGeneration`]):
            The model, frozen, on its device and in its precision.

    Raises:
        ValueError: If the model has something that the fast path lacks: fewer key than query heads, biases in the
            language model's attention, normalised routing weights, clipped projections, an activation other than SiLU in
            the experts or other than quick GELU in the vision tower.
    """

    def __init__(self, model: MolmoForConditionalGeneration):
        unknown = self.unknown_parts(model)
        if unknown:
            raise ValueError(f"the fast path does not know this model's {unknown}: use the mode 'plain'.")
        self.config = model.config.text_config
        self.model = model
        self.device = model.device
        self.dtype = model.dtype
        self.head_size = self.config.hidden_size // self.config.num_attention_heads
        self.eps = self.config.rms_norm_eps
        language_model = model.model.language_model
        self.layers = language_model.layers
        self._qkv = [_lay_together(_projections(layer), "weight") for layer in self.layers]
        tower = model.model.vision_tower
        self._tower_blocks = tower.encoder.layers[: tower.num_blocks_read]
        self._tower_qkv = [
            tuple(_lay_together(_projections(block), name) for name in ("weight", "bias"))
            for block in self._tower_blocks
        ]
        self._tables = {
            "input_norm": self._table(layer.input_layernorm.weight for layer in self.layers),
            "qkv": self._table(self._qkv),
            "query_norm": self._table(layer.self_attn.q_norm.weight for layer in self.layers),
            "key_norm": self._table(layer.self_attn.k_norm.weight for layer in self.layers),
            "attention_output": self._table(layer.self_attn.o_proj.weight for layer in self.layers),
            "experts_norm": self._table(layer.post_attention_layernorm.weight for layer in self.layers),
            "router": self._table(layer.mlp.gate.weight for layer in self.layers),
            "gate_up": self._table(layer.mlp.experts.gate_up_proj for layer in self.layers),
            "down": self._table(layer.mlp.experts.down_proj for layer in self.layers),
            "final_norm": self._table([language_model.norm.weight]),
            "output": self._table([model.lm_head.weight]),
        }
        self._numbers = torch.arange(len(self.layers), dtype=torch.int32, device=self.device)

    @staticmethod
    def unknown_parts(model: MolmoForConditionalGeneration) -> list[str]:
        """Fields of a model's configuration that ask for what the fast path does not have."""
        config = model.config.text_config
        asks = {
            "num_key_value_heads": config.num_key_value_heads != config.num_attention_heads,
            "attention_bias": config.attention_bias,
            "norm_topk_prob": config.norm_topk_prob,
            "clip_qkv": config.clip_qkv is not None,
            "hidden_act": config.hidden_act != "silu",
            "vision_config.hidden_act": model.config.vision_config.hidden_act != "quick_gelu",
        }
        return [name for name, is_unknown in asks.items() if is_unknown]

    def _table(self, weights) -> torch.Tensor:
        """Addresses of weights, for kernels."""
        return torch.tensor([weight.data_ptr() for weight in weights], dtype=torch.long, device=self.device)

    def new_cache(self, num_rows: int, capacity: int) -> KeyValueCache:
        """A cache for `num_rows` sequences of up to `capacity` tokens."""
        return KeyValueCache(
            len(self.layers),
            num_rows,
            self.config.num_attention_heads,
            capacity,
            self.head_size,
            self.dtype,
            self.device,
        )

    def rotary(self, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of the positions below `capacity`: `(capacity, head size / 2)` each."""
        positions = torch.arange(capacity, device=self.device)[None]
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        return tuple(
            table[0, :, : self.head_size // 2].contiguous()
            for table in self.model.model.language_model.rotary_emb(like, positions)
        )

    # --- vision ---------------------------------------------------------------------------------------------------

    def image_features(self, views: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """
        Encodes views.

        Args:
            views (`torch.Tensor` of shape `(views, patches, 3·patch²)`):
                Patches. A view of -1 is padding.
            masks (`torch.Tensor` of shape `(views, patches)`):
                Share of each patch that is not padding.

        Returns:
            `torch.Tensor` of shape `(views, tokens, width of the language model)`.
        """
        molmo = self.model.model
        tower = molmo.vision_tower
        patches = tower.patch_embedding(views)
        class_token = tower.class_embedding.to(self.dtype).expand(len(views), 1, -1)
        x = tower.pre_layernorm(torch.cat([class_token, patches], dim=1) + tower.position_embedding)
        shape, width = x.shape, x.shape[-1]
        heads = tower.config.num_attention_heads
        x = x.flatten(0, 1)
        normed = self._tower_blocks[0].layer_norm1(x)
        outputs = []
        for number, block in enumerate(self._tower_blocks):
            weight, bias = self._tower_qkv[number]
            qkv = F.linear(normed, weight, bias).view(*shape[:2], 3, heads, width // heads)
            query, key, value = qkv.permute(2, 0, 3, 1, 4)
            attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(-1, width)
            normed = self._add_layer_norm(x, block.self_attn.out_proj(attended), block.layer_norm2)
            inner = kernels.quick_gelu_(block.mlp.fc1(normed))
            change = block.mlp.fc2(inner)
            if number + 1 < len(self._tower_blocks):
                normed = self._add_layer_norm(x, change, self._tower_blocks[number + 1].layer_norm1)
            else:
                x += change
            # Blocks write into `x`: what is read is copied.
            outputs.append(x.view(shape)[:, 1:].clone() if number in molmo.vit_layers else None)
        features = torch.cat([outputs[layer] for layer in molmo.vit_layers], dim=-1)
        return molmo.connector(features.masked_fill(is_padding_view(views)[:, None, None], 0.0), masks)

    @staticmethod
    def _add_layer_norm(x: torch.Tensor, change: torch.Tensor, norm: nn.LayerNorm) -> torch.Tensor:
        return kernels.add_layer_norm(x, change, norm.weight, norm.bias, norm.eps)

    # --- many tokens ----------------------------------------------------------------------------------------------

    def run_block(
        self,
        block: int,
        x: torch.Tensor,
        top_k: torch.Tensor,
        most_experts: int,
        attend: Callable[[int, torch.Tensor], torch.Tensor],
    ) -> None:
        """
        One block of the language model on tokens, in place.

        Args:
            block (`int`):
                The block.
            x (`torch.Tensor` of shape `(tokens, width)`):
                Hidden states.
            top_k (`torch.IntTensor` of shape `(tokens,)`):
                Experts of each token; 0 for padding.
            most_experts (`int`):
                The largest number in `top_k`.
            attend (`Callable[[int, torch.Tensor], torch.Tensor]`):
                Attention of a block, from the projections `(tokens, 3 · width)` to `(tokens, width)`, e.g.
                [`~FusedMolmo.attend_prompts`].
        """
        layer = self.layers[block]
        qkv = F.linear(kernels.rms_norm(x, layer.input_layernorm.weight, self.eps), self._qkv[block])
        x += F.linear(attend(block, qkv), layer.self_attn.o_proj.weight)
        normed = kernels.rms_norm(x, layer.post_attention_layernorm.weight, self.eps)
        logits = F.linear(normed, layer.mlp.gate.weight)
        experts = layer.mlp.experts
        kernels.add_experts_(x, normed, logits, top_k, most_experts, experts.gate_up_proj, experts.down_proj)

    def attend_prompts(
        self,
        block: int,
        qkv: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        cache: KeyValueCache,
        rows: torch.Tensor,
        positions: torch.Tensor,
        prompts: Sequence[tuple[int, int]],
    ) -> torch.Tensor:
        """
        Causal attention within prompts that are laid end to end.

        Args:
            block (`int`):
                The block.
            qkv (`torch.Tensor` of shape `(tokens, 3 · width)`):
                Projections.
            rotary (`tuple[torch.Tensor, torch.Tensor]`):
                Output of [`~FusedMolmo.rotary`].
            cache ([`KeyValueCache`]):
                Where keys and values go.
            rows, positions (`torch.IntTensor` of shape `(tokens,)`):
                Row of the cache and position of each token.
            prompts (`Sequence[tuple[int, int]]`):
                Row of the cache, and number of tokens, of each prompt.

        Returns:
            `torch.Tensor` of shape `(tokens, width)`.
        """
        layer = self.layers[block].self_attn
        keys, values = cache.keys[block], cache.values[block]
        queries = kernels.rotate_and_store(
            qkv, layer.q_norm.weight, layer.k_norm.weight, rotary, rows, positions, keys, values, self.eps
        )
        queries = queries.unflatten(1, (self.config.num_attention_heads, -1)).transpose(0, 1)  # (heads, tokens, size)
        attended = []
        parts = queries.split([length for _, length in prompts], dim=1)
        for (row, length), part in zip(prompts, parts, strict=True):
            one = F.scaled_dot_product_attention(
                part[None], keys[row : row + 1, :, :length], values[row : row + 1, :, :length], is_causal=True
            )
            attended.append(one[0].transpose(0, 1).flatten(1))
        return attended[0] if len(attended) == 1 else torch.cat(attended)

    def attend_new_tokens(
        self,
        block: int,
        qkv: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        cache: KeyValueCache,
        rows: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """As [`~FusedMolmo.attend_prompts`], for one new token of each row, at `positions`."""
        num_rows, heads = len(qkv), self.config.num_attention_heads
        partial = torch.empty((num_rows, heads, DECODE_SPLITS, self.head_size), device=self.device)
        stats = torch.empty((num_rows, heads, DECODE_SPLITS, 2), device=self.device)
        kernels.decode_attention(
            qkv,
            self._tables["query_norm"],
            self._tables["key_norm"],
            rotary,
            cache.keys,
            cache.values,
            rows,
            positions,
            self._numbers,  # block numbers are their own places in this list
            block,
            partial,
            stats,
            self.eps,
        )
        return kernels.merge_splits(partial, stats, self.dtype)

    def output_logits(self, x: torch.Tensor) -> torch.Tensor:
        """Scores of the next token, `(tokens, vocab_size)`, of hidden states `(tokens, width)`."""
        return F.linear(
            kernels.rms_norm(x, self.model.model.language_model.norm.weight, self.eps), self.model.lm_head.weight
        )

    # --- one token ------------------------------------------------------------------------------------------------

    def decode(
        self,
        state: DecodeState,
        num_blocks: int,
        rotary: tuple[torch.Tensor, torch.Tensor],
        cache: KeyValueCache,
    ) -> None:
        """
        Runs the token in `state.x` through the first `num_blocks` of `state.blocks`, and chooses the next one.

        Args:
            state ([`DecodeState`]):
                Read and written.
            num_blocks (`int`):
                Blocks that run.
            rotary (`tuple[torch.Tensor, torch.Tensor]`):
                Output of [`~FusedMolmo.rotary`].
            cache ([`KeyValueCache`]):
                A cache of one row, which takes the token's keys and values.
        """
        tables, blocks = self._tables, state.blocks
        for slot in range(num_blocks):
            kernels.norm_linear(state.x, tables["input_norm"], tables["qkv"], blocks, slot, state.qkv, self.eps)
            kernels.decode_attention(
                state.qkv[None],
                tables["query_norm"],
                tables["key_norm"],
                rotary,
                cache.keys,
                cache.values,
                state.row,
                state.position,
                blocks,
                slot,
                state.partial,
                state.stats,
                self.eps,
            )
            kernels.attention_output(state.partial, state.stats, state.x, tables["attention_output"], blocks, slot)
            kernels.norm_linear(
                state.x, tables["experts_norm"], tables["router"], blocks, slot, state.routing, self.eps, block_out=1
            )
            kernels.gate_up(
                state.x,
                tables["experts_norm"],
                state.routing,
                state.top_k,
                tables["gate_up"],
                blocks,
                slot,
                state.activated,
                self.eps,
            )
            kernels.down(state.activated, state.routing, state.top_k, tables["down"], blocks, slot, state.x)
        self.choose_token(state)

    def choose_token(self, state: DecodeState) -> None:
        """Chooses the token after the hidden state in `state.x`, puts its embedding there, and raises the position."""
        kernels.norm_linear(
            state.x, self._tables["final_norm"], self._tables["output"], self._numbers, 0, state.logits, self.eps
        )
        embedding = self.model.get_input_embeddings().base_embedding
        kernels.next_token(state.logits, embedding, state.token, state.position, state.x)


def _projections(layer: nn.Module) -> list[nn.Linear]:
    attention = layer.self_attn
    return [attention.q_proj, attention.k_proj, attention.v_proj]


def _lay_together(linears: list[nn.Linear], name: str) -> torch.Tensor:
    """One tensor of the parameters `name` of linear layers, one below the other, which become views of it."""
    parameters = [getattr(linear, name) for linear in linears]
    together = torch.cat([parameter.data for parameter in parameters])
    for parameter, part in zip(parameters, together.split([len(parameter) for parameter in parameters]), strict=True):
        parameter.data = part
    return together
