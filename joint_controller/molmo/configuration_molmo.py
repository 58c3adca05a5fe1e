"""Configuration of Molmo with a mixture-of-experts language model (MolmoE)."""

from typing import Any

from transformers import CLIPVisionConfig, OlmoeConfig, PreTrainedConfig


# Settings of the published `config.json` that this implementation carries out in one way only: a checkpoint that asks
# for another is refused rather than run wrongly.
_PUBLISHED_CONSTANTS = {
    "activation_type": "swiglu",
    "alibi": False,
    "attention_layer_norm": True,
    "attn_logit_softcapping": None,
    "block_type": "moe",
    "clip_qkv": None,
    "final_logit_softcapping": None,
    "image_padding_embed": "pad_and_partial_pad",
    "image_pooling_2d": "attention-meanq",
    "image_projector": "mlp",
    "include_bias": False,
    "layer_norm_type": "rms",
    "moe_interleave": False,
    "moe_shared_expert": False,
    "norm_after": False,
    "qkv_bias": False,
    "rope": True,
    "scale_logits": False,
    "use_cls_feature": False,
    "use_col_tokens": True,
}


# Of `allenai/MolmoE-1B-0924` (its `config.json`), whose vision tower is CLIP ViT-L/14-336.
_DEFAULT_TEXT_CONFIG = {"vocab_size": 50304, "intermediate_size": 1024, "max_position_embeddings": 32768}
_DEFAULT_VISION_CONFIG = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}


class MolmoConfig(PreTrainedConfig):
    r"""
    Configuration of [`MolmoForConditionalGeneration`]: an OLMoE language model, a CLIP vision tower and the connector
    between them. The defaults are those of `allenai/MolmoE-1B-0924`. The flat `config.json` that is published with
    that checkpoint (`d_model`, `n_layers`, `moe_num_experts`, …) is read as it stands.

    Args:
        text_config (`OlmoeConfig` or `dict`, *optional*):
            Configuration of the language model. `vocab_size` counts the base vocabulary, which is what the model can
            output.
        vision_config (`CLIPVisionConfig` or `dict`, *optional*):
            Configuration of the vision tower. `image_size` is the side of one square view in pixels.
        additional_vocab_size (`int`, *optional*, defaults to 128):
            Rows of the embedding behind the base vocabulary: the tokens that stand for images, which are read but never
            written.
        vit_layers (`list[int]`, *optional*, defaults to `[-2, -9]`):
            Blocks of the vision tower whose outputs are concatenated, in this order, to a patch's features. Blocks
            behind the last of them do not run.
        pooling_size (`list[int]`, *optional*, defaults to `[2, 2]`):
            Patches (rows, columns) that are pooled into one vision token.
        projector_intermediate_size (`int`, *optional*, defaults to 1024):
            Inner width of the gated projection from the vision tower's width to the language model's.
        max_crops (`int`, *optional*, defaults to 12):
            Most crops that an image is cut into, the global view apart.
        overlap_margins (`list[int]`, *optional*, defaults to `[4, 4]`):
            Patches that a crop shares with its left (upper) and right (lower) neighbour.
        knob_space (`dict`, *optional*):
            Knob values that suit this checkpoint, as in `KnobSpace.to_dict()`. `None` leaves them to
            [`~molmo.knob_space.molmo_knob_space`].
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the connector's initial weights.

    Raises:
        ValueError: If the configuration asks for an architecture that this implementation does not have (for instance a
            dense Molmo), or `vit_layers` or `pooling_size` do not fit the vision tower.
    """

    model_type = "molmo"
    sub_configs_defaults = {"text_config": OlmoeConfig, "vision_config": CLIPVisionConfig}
    sub_configs = {"text_config": OlmoeConfig, "vision_config": CLIPVisionConfig}

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    additional_vocab_size: int = 128
    vit_layers: list[int] | None = None
    pooling_size: list[int] | None = None
    projector_intermediate_size: int = 1024
    max_crops: int = 12
    overlap_margins: list[int] | None = None
    knob_space: dict | None = None
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        if self.vit_layers is None:
            self.vit_layers = [-2, -9]
        if self.pooling_size is None:
            self.pooling_size = [2, 2]
        if self.overlap_margins is None:
            self.overlap_margins = [4, 4]
        if self.text_config is None:
            self.text_config = _DEFAULT_TEXT_CONFIG
        if isinstance(self.text_config, dict):
            self.text_config = OlmoeConfig(**self.text_config)
        if self.vision_config is None:
            self.vision_config = _DEFAULT_VISION_CONFIG
        if isinstance(self.vision_config, dict):
            self.vision_config = CLIPVisionConfig(**self.vision_config)
        super().__post_init__(**kwargs)

        num_vit_blocks = self.vision_config.num_hidden_layers
        wrong = [layer for layer in self.vit_layers if not -num_vit_blocks <= layer < num_vit_blocks]
        if wrong:
            raise ValueError(
                f"`vit_layers` names the blocks {wrong} but the vision tower has {num_vit_blocks} blocks."
            )
        grid = self.vision_config.image_size // self.vision_config.patch_size
        if any(grid % size for size in self.pooling_size):
            raise ValueError(
                f"`pooling_size` {list(self.pooling_size)} does not divide a view's {grid}×{grid} patches evenly."
            )

    @property
    def tokens_per_view(self) -> int:
        """Vision tokens that one view is pooled into, before the overlap between crops is dropped."""
        grid = self.vision_config.image_size // self.vision_config.patch_size
        return (grid // self.pooling_size[0]) * (grid // self.pooling_size[1])

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        if "d_model" in config_dict:
            config_dict = _from_published(config_dict)
        return super().from_dict(config_dict, **kwargs)


def _from_published(published: dict[str, Any]) -> dict[str, Any]:
    """Translates the flat `config.json` of the published checkpoints into this class's fields."""
    for name, expected in _PUBLISHED_CONSTANTS.items():
        if name in published and published[name] != expected:
            raise ValueError(
                f"config.json asks for `{name}` = {published[name]!r}, which this implementation does not have "
                f"(it has {expected!r}): use a MolmoE checkpoint such as allenai/MolmoE-1B-0924."
            )
    vision = published["vision_backbone"]
    # A gated unit of total width w has inner width w / 2 (gate and up); experts and projector share that width.
    intermediate_size = (published.get("mlp_hidden_size") or published["mlp_ratio"] * published["d_model"]) // 2
    text_config = {
        "vocab_size": published["embedding_size"],
        "hidden_size": published["d_model"],
        "intermediate_size": intermediate_size,
        "num_hidden_layers": published["n_layers"],
        "num_attention_heads": published["n_heads"],
        "num_key_value_heads": published.get("n_kv_heads"),
        "max_position_embeddings": published["max_position_embeddings"],
        "initializer_range": published["initializer_range"],
        "rms_norm_eps": published["layer_norm_eps"],
        "pad_token_id": published.get("pad_token_id"),
        "rope_parameters": {"rope_type": "default", "rope_theta": published["rope_theta"]},
        "num_experts": published["moe_num_experts"],
        "num_experts_per_tok": published["moe_top_k"],
        "norm_topk_prob": False,
    }
    vision_config = {
        "hidden_size": vision["image_emb_dim"],
        "intermediate_size": vision["image_mlp_dim"],
        "num_hidden_layers": vision["image_num_layers"],
        "num_attention_heads": vision["image_num_heads"],
        "image_size": vision["image_default_input_size"][0],
        "patch_size": vision["image_patch_size"],
        "hidden_act": vision["image_mlp_activations"],
        "layer_norm_eps": vision["image_norm_eps"],
        "initializer_range": vision["initializer_range"],
    }
    translated = {
        "text_config": text_config,
        "vision_config": vision_config,
        "additional_vocab_size": published["additional_vocab_size"],
        "vit_layers": list(published["vit_layers"]),
        "pooling_size": [published["image_pooling_h"], published["image_pooling_w"]],
        "projector_intermediate_size": intermediate_size,
        "max_crops": published["max_crops"],
        "overlap_margins": list(published["overlap_margins"]),
        "initializer_range": published["initializer_range"],
        "tie_word_embeddings": published["weight_tying"],
    }
    for name in ("dtype", "torch_dtype", "knob_space", "pad_token_id"):
        if name in published:
            translated[name] = published[name]
    return translated
