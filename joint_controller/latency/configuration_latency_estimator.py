"""Configuration of the latency estimator: what it was fitted on, and how well it does there."""

from typing import Any

from transformers import PreTrainedConfig


# The sizes of an executor that its latency depends on. Its weights are not among them: an executor that is trained
# further keeps its estimator.
_SHAPE_FIELDS = {
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
_CONNECTOR_SHAPE_FIELDS = ("pooling_size", "projector_intermediate_size", "vit_layers")


def executor_shape(config: PreTrainedConfig) -> dict[str, Any]:
    """
    The sizes of an executor that its latency depends on.

    Args:
        config ([`MolmoConfig`]):
            Configuration of the executor's model.

    Returns:
        `dict[str, Any]`: size of each named field, e.g. `{"text_config.hidden_size": 2048, ...}`; JSON-friendly.
    """
    shape = {
        f"{part}.{field}": getattr(getattr(config, part), field)
        for part, fields in _SHAPE_FIELDS.items()
        for field in fields
    }
    shape.update({field: getattr(config, field) for field in _CONNECTOR_SHAPE_FIELDS})
    return {field: list(value) if isinstance(value, tuple) else value for field, value in shape.items()}


class LatencyEstimatorConfig(PreTrainedConfig):
    r"""
    Configuration of [`LatencyEstimatorModel`]: its formula, and where its coefficients come from, so that they are not used
    for something else.

    Args:
        > Parameters of the formula

        formula_version (`int`, *optional*, defaults to 1):
            1: a sum of physical terms; decode steps cost what the first one does. 2: a sum of physical terms, the experts
            that a prefill touches among them, times a learned factor for each stage; decode steps cost more the later
            they are. Folders that do not say are of version 1; new fits are of version 2.
        num_units (`int`, *optional*, defaults to 16):
            Units of the learned factor of each stage (version 2).
        prefill_lengths (`list[int]`, *optional*):
            Lengths, ascending, that the executor pads prompts to before it prefills them: a prompt costs what the next
            one costs. By default prompts are not padded; nor are those longer than the last length.
        upper_quantiles (`dict[str, dict[str, float]]`, *optional*):
            For `"prefill"`, `"decode"` and `"total"`, by quantile (e.g. `"0.95"`): what an estimate is multiplied with so
            that this share of measurements lies below.

        > Parameters that say what was measured

        fitted_knobs (`dict[str, list]`, *optional*):
            Values of each knob (`tier`, `top_k`, `num_blocks`) that were measured, cheapest first.
        fitted_counts (`dict[str, list[int]]`, *optional*):
            Smallest and largest `num_views`, `vision_tokens` and `text_tokens` that were measured.
        executor_shape (`dict[str, Any]`, *optional*):
            Sizes of the measured executor, see [`~latency.executor_shape`].
        executor_fingerprint (`str`, *optional*):
            Fingerprint of the measured executor: provenance, not compared.
        executor_dtype (`str`, *optional*):
            Data type that the executor computed in, e.g. `"float32"`.
        device_name (`str`, *optional*):
            Device that the executor ran on, with the number of threads for a CPU.
        torch_version (`str`, *optional*):
            Version of torch that it was measured with.
        driver_version (`str`, *optional*):
            Version of the GPU's driver; `"none"` for a CPU, `"unknown"` where nobody knows.
        executor_mode (`str`, *optional*):
            How the executor computed, e.g. `"plain"`.
        executor_revision (`str`, *optional*):
            Version of the executor's code.
        recalibrated_from (`dict[str, Any]`, *optional*):
            Machine and executor of the estimator that this one was adapted from, see [`~latency.recalibrate`].
        held_out (`dict[str, Any]`, *optional*):
            Error on settings and inputs that the fit did not see, see [`~latency.fit_latency_estimator`].

    Raises:
        ValueError: If the version of the formula is unknown, or `num_units` is not positive.
    """

    model_type = "latency_estimator"

    formula_version: int = 1
    num_units: int = 16
    prefill_lengths: list[int] | None = None
    upper_quantiles: dict[str, dict[str, float]] | None = None
    fitted_knobs: dict[str, list] | None = None
    fitted_counts: dict[str, list[int]] | None = None
    executor_shape: dict[str, Any] | None = None
    executor_fingerprint: str | None = None
    executor_dtype: str | None = None
    device_name: str | None = None
    torch_version: str | None = None
    driver_version: str | None = None
    executor_mode: str | None = None
    executor_revision: str | None = None
    recalibrated_from: dict[str, Any] | None = None
    held_out: dict[str, Any] | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.formula_version not in (1, 2):
            raise ValueError(
                f"the latency estimator has the formula version {self.formula_version}, this package knows 1 and 2: use a "
                "newer version of joint-controller."
            )
        if self.num_units < 1:
            raise ValueError(f"`num_units` is {self.num_units}: give 1 or more.")
