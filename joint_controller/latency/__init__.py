"""What a request costs: profiling the executor, and an estimator fitted to the measurements."""

from transformers import AutoConfig, AutoModel

from .configuration_latency_estimator import LatencyEstimatorConfig, executor_shape
from .fit_report import format_model_card, plot_fit, report_errors
from .fitting import cross_validate, fit_latency_estimator
from .guardrail import Guardrail, settings_that_fit
from .loading import read_latency_estimator
from .modeling_latency_estimator import LatencyEstimatorModel, LatencyEstimatorOutput
from .modeling_original_estimator import (
    OriginalLatencyEstimatorConfig,
    OriginalLatencyEstimatorModel,
)
from .profile_inputs import make_profile_inputs
from .profile_report import repeatability, write_profile_report
from .profile_table import load_profile, make_profile, save_profile
from .profiling import profile_executor
from .recalibration import fit_recalibration, plot_recalibration, recalibrate, recalibration_errors
from .shipped_estimators import embedded_latency_estimator_path, shipped_estimator_names, shipped_latency_estimators


AutoConfig.register(LatencyEstimatorConfig.model_type, LatencyEstimatorConfig)
AutoModel.register(LatencyEstimatorConfig, LatencyEstimatorModel)
AutoConfig.register(OriginalLatencyEstimatorConfig.model_type, OriginalLatencyEstimatorConfig)
AutoModel.register(OriginalLatencyEstimatorConfig, OriginalLatencyEstimatorModel)

__all__ = [
    "Guardrail",
    "LatencyEstimatorConfig",
    "LatencyEstimatorModel",
    "LatencyEstimatorOutput",
    "OriginalLatencyEstimatorConfig",
    "OriginalLatencyEstimatorModel",
    "cross_validate",
    "embedded_latency_estimator_path",
    "executor_shape",
    "fit_latency_estimator",
    "fit_recalibration",
    "format_model_card",
    "load_profile",
    "make_profile",
    "make_profile_inputs",
    "plot_fit",
    "plot_recalibration",
    "profile_executor",
    "read_latency_estimator",
    "recalibrate",
    "recalibration_errors",
    "repeatability",
    "report_errors",
    "save_profile",
    "settings_that_fit",
    "shipped_estimator_names",
    "shipped_latency_estimators",
    "write_profile_report",
]
