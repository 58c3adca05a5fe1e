"""The sizes of a Molmo that its latency depends on."""

from typing import Any

from .configuration_molmo import MolmoConfig


# Weights are not among them: an executor that is trained further keeps its latency estimator.
_FIELDS = {
    "text_config": (
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_experts",
        "num_hidden_layers",
        "num_key_value_heads",
        "vocab_size",
    ),
    "vision_config": (
        "hidden_size",
        "image_size",
        "intermediate_size",
        "num_attention_heads",
        "num_hidden_layers",
        "patch_size",
    ),
}
_CONNECTOR_FIELDS = ("pooling_size", "projector_intermediate_size", "vit_layers")


def molmo_shape(config: MolmoConfig) -> dict[str, Any]:
    """The size of each field that the latency depends on, e.g. `{"text_config.hidden_size": 2048, ...}`;
    JSON-friendly."""
    shape = {
        f"{part}.{field}": getattr(getattr(config, part), field)
        for part, fields in _FIELDS.items()
        for field in fields
    }
    shape.update({field: getattr(config, field) for field in _CONNECTOR_FIELDS})
    return {field: list(value) if isinstance(value, tuple) else value for field, value in shape.items()}
