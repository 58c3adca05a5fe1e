"""Configuration of the latency estimator: what it was fitted on, and how well it does there."""

from typing import Any

from transformers import PreTrainedConfig

from ..executor import LATENCY_SCOPES, REQUEST_SCOPE
from .request_costs import check_latency_scope


class LatencyEstimatorConfig(PreTrainedConfig):
    r"""
    Configuration of [`LatencyEstimatorModel`]: whose costs it predicts, and where its coefficients come from, so that they
    are not used for something else.

    Args:
        > Parameters of the formula

        executor_type (`str`, *optional*):
            Family of the measured executor ([`Executor.model_type`]), whose [`~executor.CostModel`] says what stages there
            are and what their times are explained by.
        executor_shape (`dict[str, Any]`, *optional*):
            Sizes of the measured executor ([`Executor.shape`]); `None` where they are unknown.
        prefill_lengths (`list[int]`, *optional*):
            Lengths, ascending, that the executor pads prompts to before it prefills them. By default prompts are not
            padded.
        latency_scope (`str`, *optional*, defaults to `"request"`):
            What is predicted: `"request"`, all that a request costs by the clock, or `"model"`, the stages of the model alone.
        num_units (`int`, *optional*, defaults to 16):
            Units of the learned factor of each stage.
        upper_quantiles (`dict[str, dict[str, float]]`, *optional*):
            By latency scope, and then by quantile (e.g. `"0.95"`): what an estimate is multiplied with so that this share of
            single requests lies below.

        > Parameters that say what was measured

        fitted_knobs (`dict[str, list]`, *optional*):
            Values of each knob that were measured, cheapest first.
        fitted_counts (`dict[str, list[int]]`, *optional*):
            Smallest and largest value of each count that was measured.
        executor_fingerprint, executor_dtype, executor_mode, executor_revision (`str`, *optional*):
            The measured executor ([`Executor`]), and the version of its code. Provenance: the fingerprint is not compared.
        device_type, device_name, driver_version, library_versions (`str`, *optional*), num_threads (`int`, *optional*):
            How it was run, see [`~latency.way_of_running.WayOfRunning`].
        recalibrated_from (`dict[str, Any]`, *optional*):
            Machine and executor of the estimator that this one was adapted from, see
            [`~latency.recalibration.recalibrate`].
        held_out (`dict[str, Any]`, *optional*):
            Error on settings and inputs that the fit did not see, see [`~latency.fitting.fit_latency_estimator`].

    Raises:
        ValueError: If `num_units` is not positive, or there is no such scope.
    """

    model_type = "latency_estimator"

    executor_type: str | None = None
    executor_shape: dict[str, Any] | None = None
    prefill_lengths: list[int] | None = None
    latency_scope: str = REQUEST_SCOPE
    num_units: int = 16
    upper_quantiles: dict[str, dict[str, float]] | None = None
    fitted_knobs: dict[str, list] | None = None
    fitted_counts: dict[str, list[int]] | None = None
    executor_fingerprint: str | None = None
    executor_dtype: str | None = None
    device_type: str | None = None
    device_name: str | None = None
    driver_version: str | None = None
    num_threads: int | None = None
    library_versions: str | None = None
    executor_mode: str | None = None
    executor_revision: str | None = None
    recalibrated_from: dict[str, Any] | None = None
    held_out: dict[str, Any] | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.num_units < 1:
            raise ValueError(f"`num_units` is {self.num_units}: give 1 or more.")
        check_latency_scope(self.latency_scope)
        if not set(self.upper_quantiles or {}) <= set(LATENCY_SCOPES):
            raise ValueError(
                f"`upper_quantiles` are of {', '.join(self.upper_quantiles)} rather than of {' and '.join(LATENCY_SCOPES)}: the "
                "latency estimator is of an earlier version. Make it anew with `joint-controller profile` and "
                "`joint-controller fit-latency`."
            )
