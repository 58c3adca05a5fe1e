"""
Molmo with a mixture-of-experts language model, composed of what transformers has: OLMoE decoder layers and a CLIP
encoder. What is Molmo's own is the connector between them and the way image features enter the sequence.

A forward pass, with B samples of V views (the global view first, then crops), P patches a view, T vision tokens a view
and L tokens a sequence:

    pixel_values (B, V, P, 3·patch²) → vision tower → two blocks' outputs (B, V, P, 2·vision width)
        → connector: padding embeddings, 2×2 attention pooling, gated projection → image features (B, V, T, width)
    input_ids (B, L) → embeddings (B, L, width) + image features at `image_input_idx` → decoder blocks → logits
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Unpack

import torch
import torch.nn.functional as F
import transformers
from packaging.version import Version
from torch import nn
from transformers import Cache, CLIPVisionConfig, DynamicCache, GenerationMixin, OlmoeConfig, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.models.clip.modeling_clip import CLIPEncoder
from transformers.models.olmoe.modeling_olmoe import OlmoeModel, OlmoePreTrainedModel
from transformers.utils.generic import TransformersKwargs, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_molmo import MolmoConfig


# What the KV cache is called by transformers' layers, masks and outputs, and by `generate` when it calls the model.
CACHE_NAME = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"


class MolmoPreTrainedModel(PreTrainedModel):
    """Base of Molmo's modules: weight initialisation and what the attention backends support."""

    config_class = MolmoConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["OlmoeDecoderLayer", "CLIPEncoderLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, MolmoVisionTower):
            init.normal_(module.class_embedding, mean=0.0, std=std)
            init.normal_(module.position_embedding, mean=0.0, std=std)
        elif isinstance(module, MolmoConnector):
            init.zeros_(module.pad_embedding)


class MolmoEmbedding(nn.Module):
    """Token embedding in two tables: the base vocabulary, and behind it the additional tokens that stand for images.
    Two parameters as in the published checkpoints, so that the output layer's vocabulary equals the base table."""

    def __init__(self, vocab_size: int, additional_vocab_size: int, hidden_size: int):
        super().__init__()
        self.vocab_size = vocab_size
        self.base_embedding = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.additional_embedding = nn.Parameter(torch.empty(additional_vocab_size, hidden_size))

    def forward(self, input_ids: torch.LongTensor) -> torch.Tensor:
        is_base = input_ids < self.vocab_size
        base = F.embedding(torch.where(is_base, input_ids, 0), self.base_embedding)
        additional = F.embedding(torch.where(is_base, 0, input_ids - self.vocab_size), self.additional_embedding)
        return torch.where(is_base[..., None], base, additional)


class MolmoVisionTower(MolmoPreTrainedModel):
    """CLIP's vision transformer on flattened patches. It equals `CLIPVisionModel` up to its last block, but takes
    patches instead of images (the patch embedding is a linear layer, CLIP's convolution with its axes permuted), stops
    at the last block that is read, and has no final layer norm."""

    config_class = CLIPVisionConfig
    main_input_name = "pixel_values"

    def __init__(self, config: CLIPVisionConfig, num_blocks_read: int):
        super().__init__(config)
        num_patches = (config.image_size // config.patch_size) ** 2
        self.num_blocks_read = num_blocks_read
        self.class_embedding = nn.Parameter(torch.empty(config.hidden_size))
        self.position_embedding = nn.Parameter(torch.empty(num_patches + 1, config.hidden_size))
        self.patch_embedding = nn.Linear(3 * config.patch_size**2, config.hidden_size, bias=False)
        self.pre_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = CLIPEncoder(config)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """The output of each block that runs, `(views, 1 + patches, width)`, the class token first, for the patches of
        each view, `(views, patches, 3·patch²)`, their pixels in (row, column, channel) order."""
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        class_token = self.class_embedding.to(patches.dtype).expand(patches.shape[0], 1, -1)
        hidden_states = torch.cat([class_token, patches], dim=1) + self.position_embedding
        hidden_states = self.pre_layernorm(hidden_states)
        outputs = []
        for block in self.encoder.layers[: self.num_blocks_read]:
            hidden_states = block(hidden_states, attention_mask=None)
            outputs.append(hidden_states)
        return outputs


class MolmoAttentionPooling(nn.Module):
    """Pools a window of patches into one vector by multi-head attention, with the window's mean as the query."""

    def __init__(self, input_size: int, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(input_size, hidden_size)
        self.k_proj = nn.Linear(input_size, hidden_size)
        self.v_proj = nn.Linear(input_size, hidden_size)
        self.o_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        """Pools `windows` of shape `(n, patches in a window, input_size)` to `(n, hidden_size)`."""
        query = self.q_proj(windows.mean(dim=1, keepdim=True))
        query, key, value = (
            states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for states in (query, self.k_proj(windows), self.v_proj(windows))
        )
        pooled = F.scaled_dot_product_attention(query, key, value)  # (n, heads, 1, head size)
        return self.o_proj(pooled.flatten(1))


class MolmoProjector(nn.Module):
    """Gated linear unit from the vision tower's width to the language model's."""

    def __init__(self, input_size: int, intermediate_size: int, output_size: int, hidden_act: str):
        super().__init__()
        self.gate_proj = nn.Linear(input_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(input_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, output_size, bias=False)
        self.act_fn = ACT2FN[hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class MolmoConnector(nn.Module):
    """Turns patch features of the vision tower into vision tokens of the language model."""

    def __init__(self, config: MolmoConfig):
        super().__init__()
        vision_config = config.vision_config
        feature_size = len(config.vit_layers) * vision_config.hidden_size
        self.grid = vision_config.image_size // vision_config.patch_size
        self.pooling_size = tuple(config.pooling_size)
        self.pad_embedding = nn.Parameter(torch.empty(2, feature_size))
        self.pooling = MolmoAttentionPooling(
            feature_size, vision_config.hidden_size, vision_config.num_attention_heads
        )
        self.projector = MolmoProjector(
            vision_config.hidden_size,
            config.projector_intermediate_size,
            config.text_config.hidden_size,
            config.text_config.hidden_act,
        )

    def forward(self, features: torch.Tensor, image_masks: torch.Tensor | None) -> torch.Tensor:
        """Vision tokens `(views, tokens, width of the language model)` of `features` `(views, patches, feature_size)`,
        the concatenated outputs of the tower's blocks. `image_masks` `(views, patches)` are the share of each patch
        that is not padding, `None` if nothing is padded."""
        windows = self.windows(features, image_masks)
        pooled = self.pooling(windows)
        return self.projector(pooled).unflatten(0, (features.shape[0], -1))

    def windows(self, features: torch.Tensor, image_masks: torch.Tensor | None) -> torch.Tensor:
        """Marks patches that are padding and cuts views into the windows that are pooled:
        `(views · tokens, patches in a window, feature_size)`. Arguments are those of [`~MolmoConnector.forward`]."""
        if image_masks is not None:
            all_padding = image_masks == 0
            # Masks below 0 count as partly padded: the reference writes -1 for views that it could not line up.
            partly_padding = (image_masks < 1) & ~all_padding
            features = features + self.pad_embedding[0] * all_padding[..., None]
            features = features + self.pad_embedding[1] * partly_padding[..., None]
        rows, columns = self.pooling_size
        # (views, grid, grid, f) → (views · windows, patches in a window, f)
        windows = features.unflatten(1, (self.grid // rows, rows, self.grid // columns, columns))
        return windows.transpose(2, 3).flatten(3, 4).flatten(0, 2)


class MolmoTextModel(OlmoeModel):
    """OLMoE with Molmo's split embedding, where each call chooses the blocks that run and the experts per token."""

    def __init__(self, config: OlmoeConfig, additional_vocab_size: int):
        super().__init__(config)
        self.embed_tokens = MolmoEmbedding(config.vocab_size, additional_vocab_size, config.hidden_size)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        OlmoePreTrainedModel._init_weights(self, module)
        if isinstance(module, MolmoEmbedding):
            init.normal_(module.base_embedding, mean=0.0, std=self.config.initializer_range)
            init.normal_(module.additional_embedding, mean=0.0, std=self.config.initializer_range)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        active_blocks: Sequence[int] | None = None,
        top_k: int | None = None,
        **kwargs,
    ) -> MoeModelOutputWithPast:
        """
        Runs the active blocks; hidden states are `(B, L, width)`. Arguments are those of
        [`MolmoForConditionalGeneration.forward`].

        Raises:
            RuntimeError: If a decoder layer ran without adding to the cache.
        """
        if active_blocks is None:
            active_blocks = range(self.config.num_hidden_layers)
        if use_cache and cache is None:
            cache = DynamicCache()
        if position_ids is None:
            position_ids = _position_ids(inputs_embeds, attention_mask, cache)
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE_NAME: cache},
        )
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)
        block_cache = None if cache is None else _ActiveBlockCache(cache, active_blocks)
        hidden_states = inputs_embeds
        with self.experts_per_token(top_k):
            for block in active_blocks:
                hidden_states = self.layers[block](
                    hidden_states,
                    attention_mask=causal_mask,
                    position_ids=position_ids,
                    use_cache=use_cache,
                    position_embeddings=position_embeddings,
                    **{CACHE_NAME: block_cache},
                    **kwargs,
                )
        if block_cache is not None:
            block_cache.check_use()
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **{CACHE_NAME: cache})

    @contextmanager
    def experts_per_token(self, top_k: int | None) -> Iterator[None]:
        """Routes every token to `top_k` experts while the context lasts (`None` changes nothing)."""
        routers = [] if top_k is None else [layer.mlp.gate for layer in self.layers]
        usual = [router.top_k for router in routers]
        for router in routers:
            router.top_k = top_k
        try:
            yield
        finally:
            for router, number in zip(routers, usual, strict=True):
                router.top_k = number


class _ActiveBlockCache:
    """What attention sees of the KV cache: the active blocks take the cache's first slots in their order, so that the
    cache holds no entry for a block that does not run and its first slot is always in use."""

    def __init__(self, cache: Cache, active_blocks: Sequence[int]):
        self._cache = cache
        self._slots = {block: slot for slot, block in enumerate(active_blocks)}
        self._unused = set(active_blocks)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._unused.discard(layer_idx)
        return self._cache.update(key_states, value_states, self._slots[layer_idx], *args, **kwargs)

    def check_use(self):
        """Refuses, by a `RuntimeError`, that an active block did not update the cache. A decoder layer swallows
        arguments that it does not know. One that did not take the cache has attended to nothing but the tokens of this
        call, and every later token would be wrong without any other sign of it."""
        if self._unused:
            raise RuntimeError(
                f"decoder blocks {sorted(self._unused)} did not use the KV cache that they were given as "
                f"`{CACHE_NAME}`: transformers {transformers.__version__} is not supported, or gradient checkpointing "
                "is on, which excludes a cache."
            )


def _position_ids(
    inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None, cache: Cache | None
) -> torch.LongTensor:
    """Positions that count real tokens only, so that left padding changes nothing: shape `(B or 1, L)`."""
    length = inputs_embeds.shape[1]
    if attention_mask is not None and attention_mask.dim() == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
    past = 0 if cache is None else cache.get_seq_length()
    return torch.arange(past, past + length, device=inputs_embeds.device)[None]


def is_padding_view(views: torch.Tensor) -> torch.Tensor:
    """
    Which of `views` `(n, patches, 3·patch²)` are there only to fill the batch: their features count as zero.

    The reference implementation takes a float32 view for padding as soon as one value is exactly -1, and so do we
    (the image processor never writes -1 into a real view). In half precision real values round to -1, so there all
    values must be -1.
    """
    is_minus_one = (views == -1).flatten(1)
    return is_minus_one.any(dim=1) if views.dtype == torch.float32 else is_minus_one.all(dim=1)


class MolmoModel(MolmoPreTrainedModel):
    """Vision tower, connector and language model, without the output layer."""

    def __init__(self, config: MolmoConfig):
        super().__init__(config)
        num_vit_blocks = config.vision_config.num_hidden_layers
        self.vit_layers = [layer % num_vit_blocks for layer in config.vit_layers]
        self.vision_tower = MolmoVisionTower(config.vision_config, num_blocks_read=max(self.vit_layers) + 1)
        self.connector = MolmoConnector(config)
        self.language_model = MolmoTextModel(config.text_config, config.additional_vocab_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.embed_tokens

    def get_image_features(self, pixel_values: torch.Tensor, image_masks: torch.Tensor | None = None) -> torch.Tensor:
        """
        Encodes views: vision tokens `(B, V, T, width of the language model)`. Those of a view do not depend on other
        views or samples.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, V, P, 3·patch²)`):
                Patches of each view, as [`MolmoProcessor`] gives them. A view of -1 is padding.
            image_masks (`torch.Tensor` of shape `(B, V, P)`, *optional*):
                Share of each patch that is not padding.
        """
        batch_size, num_views = pixel_values.shape[:2]
        views = pixel_values.flatten(0, 1)
        outputs = self.vision_tower(views)
        # The class token comes first and is not used.
        features = torch.cat([outputs[layer][:, 1:] for layer in self.vit_layers], dim=-1)
        features = features.masked_fill(is_padding_view(views)[:, None, None], 0.0)
        masks = None if image_masks is None else image_masks.flatten(0, 1)
        return self.connector(features, masks).unflatten(0, (batch_size, num_views))

    def place_image_features(
        self, inputs_embeds: torch.Tensor, image_features: torch.Tensor, image_input_idx: torch.LongTensor
    ) -> torch.Tensor:
        """Adds image features `(B, V, T, width)` to the embeddings `(B, L, width)` of the tokens that stand for them,
        at the positions `image_input_idx` `(B, V, T)`; a negative one drops the feature."""
        length = inputs_embeds.shape[1]
        positions = image_input_idx.flatten(1).long()
        # Dropped features go to an extra position behind the sequence: no boolean indexing, so no device sync.
        positions = torch.where(positions < 0, length, positions)
        placed = F.pad(inputs_embeds, (0, 0, 0, 1)).scatter_add(
            1,
            positions[..., None].expand(-1, -1, inputs_embeds.shape[-1]),
            image_features.flatten(1, 2).to(inputs_embeds.dtype),
        )
        return placed[:, :length]

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_masks: torch.Tensor | None = None,
        image_input_idx: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        active_blocks: Sequence[int] | None = None,
        top_k: int | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeModelOutputWithPast:
        """Arguments are those of [`MolmoForConditionalGeneration.forward`]; returns hidden states instead of logits."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of `input_ids` and `inputs_embeds`.")
        if pixel_values is not None and image_features is not None:
            raise ValueError("give at most one of `pixel_values` and `image_features` (which replace the former).")
        # Layers ignore what they do not know: a cache under a name of its own would be lost in silence.
        unknown = kwargs.keys() - TransformersKwargs.__optional_keys__ - {"return_dict"}
        if unknown:
            raise TypeError(f"the model does not take the arguments {sorted(unknown)}.")
        self.check_knobs(active_blocks, top_k)
        if inputs_embeds is None:
            inputs_embeds = self.language_model.embed_tokens(input_ids)
        if cache is None and attention_mask is not None and attention_mask.dim() == 2:
            num_tokens, covered = inputs_embeds.shape[1], attention_mask.shape[1]
            if num_tokens != covered:
                raise ValueError(
                    f"`attention_mask` covers {covered} tokens, but {num_tokens} are given and no `cache` that holds "
                    "the others."
                )
        if pixel_values is not None:
            image_features = self.get_image_features(pixel_values, image_masks)
        if image_features is not None:
            if image_input_idx is None:
                raise ValueError("`image_input_idx` is missing: it says where each image feature enters the sequence.")
            inputs_embeds = self.place_image_features(inputs_embeds, image_features, image_input_idx)
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            use_cache=use_cache,
            active_blocks=active_blocks,
            top_k=top_k,
            **kwargs,
        )

    def check_knobs(self, active_blocks: Sequence[int] | None, top_k: int | None):
        """Refuses `active_blocks` and `top_k` outside what the model has, by a `ValueError`."""
        num_blocks = self.config.text_config.num_hidden_layers
        num_experts = self.config.text_config.num_experts
        if active_blocks is not None:
            blocks = list(active_blocks)
            if not blocks or blocks != sorted(set(blocks)) or not 0 <= blocks[0] <= blocks[-1] < num_blocks:
                raise ValueError(
                    f"`active_blocks` is {blocks}: list at least one block, each once and in ascending order, from 0 "
                    f"to {num_blocks - 1}."
                )
        if top_k is not None and not 1 <= top_k <= num_experts:
            raise ValueError(f"`top_k` is {top_k}: a token can go to 1 to {num_experts} experts of this model.")


class MolmoForConditionalGeneration(MolmoPreTrainedModel, GenerationMixin):
    """
    Molmo that answers: [`MolmoModel`] and an output layer over the base vocabulary.

    Example:

    ```python
    >>> from joint_controller.molmo import MolmoForConditionalGeneration, MolmoProcessor

    >>> model = MolmoForConditionalGeneration.from_pretrained("path/to/MolmoE-1B-0924")
    >>> processor = MolmoProcessor.from_pretrained("path/to/MolmoE-1B-0924")
    >>> inputs = processor(images=image, text="What is on the table?", tier="low")
    >>> model.generate(**inputs, active_blocks=[0, 1, 2, 5, 8, 9], top_k=4, max_new_tokens=16)
    ```
    """

    _tied_weights_keys = {}

    def __init__(self, config: MolmoConfig):
        super().__init__(config)
        self.model = MolmoModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, output_loading_info: bool = False, **kwargs):
        """
        Loads a checkpoint: a folder or Hub repository in the layout of `allenai/MolmoE-1B-0924` (which is also what
        `save_pretrained` writes). Arguments are those of
        [`~transformers.PreTrainedModel.from_pretrained`].

        Raises:
            ValueError: If the checkpoint lacks a tensor of the model, has one that the model lacks, or has one of
                another shape; the message names them.
        """
        model, info = super().from_pretrained(
            pretrained_model_name_or_path,
            *model_args,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **kwargs,
        )
        mismatched = [
            f"{name} is {tuple(found)} but should be {tuple(expected)}"
            for name, found, expected in sorted(info["mismatched_keys"])
        ]
        found = {
            "missing tensors: ": sorted(info["missing_keys"]),
            "unexpected tensors: ": sorted(info["unexpected_keys"]),
            "tensors of another shape: ": mismatched,
            "": list(info["error_msgs"]),
        }
        problems = [what + _shorten(names) for what, names in found.items() if names]
        if problems:
            raise ValueError(
                f"'{pretrained_model_name_or_path}' is not a complete Molmo checkpoint: {'; '.join(problems)}. "
                "Fetch the checkpoint again, or check that its config.json belongs to its weights."
            )
        return (model, info) if output_loading_info else model

    @torch.no_grad()
    def generate(self, *args, active_blocks: Sequence[int] | None = None, top_k: int | None = None, **kwargs):
        """
        Generates as [`~transformers.GenerationMixin.generate`] does, with the given knobs for the whole answer.

        Args:
            active_blocks (`Sequence[int]`, *optional*):
                Indices of the decoder blocks that run, ascending. Default: all.
            top_k (`int`, *optional*):
                Experts per token; not the sampling parameter of that name, which goes into a `generation_config`.
                Default: the checkpoint's.
        """
        self.model.check_knobs(active_blocks, top_k)
        if active_blocks is not None:
            kwargs["active_blocks"] = list(active_blocks)
        with self.model.language_model.experts_per_token(top_k):
            return super().generate(*args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_image_features(self, pixel_values: torch.Tensor, image_masks: torch.Tensor | None = None) -> torch.Tensor:
        """See [`MolmoModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, image_masks)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_masks: torch.Tensor | None = None,
        image_input_idx: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        active_blocks: Sequence[int] | None = None,
        top_k: int | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeCausalLMOutputWithPast:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(B, L)`, *optional*):
                Tokens: BOS, image tokens, prompt. Exactly one of `input_ids` and `inputs_embeds` is given.
            pixel_values (`torch.Tensor` of shape `(B, V, P, 3·patch²)`, *optional*):
                Patches of each view, the global view first, pixels in (row, column, channel) order; a view that is
                only there to fill the batch is -1 everywhere.
            image_masks (`torch.Tensor` of shape `(B, V, P)`, *optional*):
                Share of each patch that is not padding.
            image_input_idx (`torch.LongTensor` of shape `(B, V, T)`, *optional*):
                Position in the sequence of each pooled patch; -100 drops it.
            attention_mask (`torch.Tensor`, *optional*):
                0 for padding tokens, of shape `(B, past + L)`; or a ready 4D mask of shape `(B, 1, L, past + L)`.
            position_ids (`torch.LongTensor` of shape `(B, L)`, *optional*):
                Positions; by default real tokens are counted from 0.
            cache ([`~transformers.Cache`], *optional*):
                Keys and values of earlier tokens. Holds entries of the active blocks only, so it belongs to one choice
                of `active_blocks`.
            inputs_embeds (`torch.Tensor` of shape `(B, L, width)`, *optional*):
                Token embeddings in place of `input_ids`.
            image_features (`torch.Tensor` of shape `(B, V, T, width)`, *optional*):
                Output of [`~MolmoForConditionalGeneration.get_image_features`] in place of `pixel_values`, for images
                that were encoded before.
            active_blocks (`Sequence[int]`, *optional*):
                Indices of the decoder blocks that run, ascending; the others pass their input through. Default: all.
            top_k (`int`, *optional*):
                Experts per token. Routing weights are not renormalised. Default: the checkpoint's.
            labels (`torch.LongTensor` of shape `(B, L)`, *optional*):
                Tokens to predict, -100 where none is; gives a loss.
            use_cache (`bool`, *optional*):
                Whether to keep keys and values, and to return them as `cache` (before transformers 5.24, as
                `past_key_values`).
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                Compute logits of that many last positions only (0: of all), or of the positions given.
            past_key_values ([`~transformers.Cache`], *optional*):
                The name of `cache` before transformers 5.24, whose `generate` uses it.

        Returns:
            [`~transformers.modeling_outputs.MoeCausalLMOutputWithPast`] with logits of shape `(B, kept, vocab_size)`.

        Raises:
            ValueError: If `active_blocks` or `top_k` are outside what the model has, or inputs contradict each other.
            TypeError: If there are arguments that the model does not know.
        """
        if past_key_values is not None:
            if cache is not None:
                raise ValueError("give at most one of `cache` and `past_key_values` (the former's older name).")
            cache = past_key_values
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_masks=image_masks,
            image_input_idx=image_input_idx,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            image_features=image_features,
            active_blocks=active_blocks,
            top_k=top_k,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.text_config.vocab_size)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )

    def prepare_inputs_for_generation(
        self, *args, use_cache: bool = True, is_first_iteration: bool = False, **kwargs
    ) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(
            *args, use_cache=use_cache, is_first_iteration=is_first_iteration, **kwargs
        )
        if use_cache and not is_first_iteration:
            if inputs.get(CACHE_NAME) is None:
                raise RuntimeError(
                    f"`generate` did not hand the model its KV cache as `{CACHE_NAME}`: transformers "
                    f"{transformers.__version__} is not supported."
                )
            # The images are in the cache from the first step on.
            for name in ("pixel_values", "image_masks", "image_input_idx", "image_features"):
                inputs.pop(name, None)
        return inputs


def _shorten(names: list[str], most: int = 5) -> str:
    """The first names of a long list, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
