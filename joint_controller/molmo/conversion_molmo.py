"""
How the tensors of a published Molmo checkpoint map onto this implementation's modules.

The mapping is declared to transformers, which applies it tensor by tensor while it loads (so that the weights are held
once) and backwards while it saves: a saved folder has the published parameter names again.
"""

from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, Concatenate, MergeModulelist, WeightConverter, WeightRenaming


_NAMES = {
    # language model
    "model.transformer.wte.embedding": "model.language_model.embed_tokens.base_embedding",
    "model.transformer.wte.new_embedding": "model.language_model.embed_tokens.additional_embedding",
    "model.transformer.ln_f.": "model.language_model.norm.",
    "model.transformer.blocks.": "model.language_model.layers.",
    ".attn.attn_norm.": ".input_layernorm.",
    ".mlp.ff_norm.": ".post_attention_layernorm.",
    ".attn.attn_out.": ".self_attn.o_proj.",
    ".attn.q_norm.": ".self_attn.q_norm.",
    ".attn.k_norm.": ".self_attn.k_norm.",
    # vision tower
    "model.vision_backbone.image_vit.class_embedding": "model.vision_tower.class_embedding",
    "model.vision_backbone.image_vit.positional_embedding": "model.vision_tower.position_embedding",
    "model.vision_backbone.image_vit.patch_embedding.": "model.vision_tower.patch_embedding.",
    "model.vision_backbone.image_vit.pre_ln.": "model.vision_tower.pre_layernorm.",
    "model.vision_backbone.image_vit.transformer.resblocks.": "model.vision_tower.encoder.layers.",
    ".attention.wq.": ".self_attn.q_proj.",
    ".attention.wk.": ".self_attn.k_proj.",
    ".attention.wv.": ".self_attn.v_proj.",
    ".attention.wo.": ".self_attn.out_proj.",
    ".attention_norm.": ".layer_norm1.",
    ".ffn_norm.": ".layer_norm2.",
    ".feed_forward.w1.": ".mlp.fc1.",
    ".feed_forward.w2.": ".mlp.fc2.",
    # connector
    "model.vision_backbone.pad_embed": "model.connector.pad_embedding",
    "model.vision_backbone.image_pooling_2d.wq.": "model.connector.pooling.q_proj.",
    "model.vision_backbone.image_pooling_2d.wk.": "model.connector.pooling.k_proj.",
    "model.vision_backbone.image_pooling_2d.wv.": "model.connector.pooling.v_proj.",
    "model.vision_backbone.image_pooling_2d.wo.": "model.connector.pooling.o_proj.",
    "model.vision_backbone.image_projector.w1.": "model.connector.projector.gate_proj.",
    "model.vision_backbone.image_projector.w2.": "model.connector.projector.down_proj.",
    "model.vision_backbone.image_projector.w3.": "model.connector.projector.up_proj.",
}

_CONVERTERS = [
    WeightConverter(
        "attn.att_proj.weight",
        ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"],
        operations=[Chunk(dim=0)],
    ),
    WeightConverter(
        ["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
        "mlp.experts.gate_up_proj",
        operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
    ),
    WeightConverter("mlp.experts.*.down_proj.weight", "mlp.experts.down_proj", operations=[MergeModulelist(dim=0)]),
]


def register_molmo_conversion() -> None:
    """Tells transformers how published Molmo tensors are named, split and stacked. Called once, when `molmo/` loads."""
    renamings = [WeightRenaming(source, target) for source, target in _NAMES.items()]
    register_checkpoint_conversion_mapping("molmo", renamings, overwrite=True)
    # Scoped to the language model, because the vision tower's attention has parameters of the same names.
    register_checkpoint_conversion_mapping("MolmoTextModel", _CONVERTERS, overwrite=True)
