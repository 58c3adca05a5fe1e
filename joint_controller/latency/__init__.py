"""
What a request costs: profiling executors, and estimators fitted to the measurements. What commands alone need is imported
from its module: `profiling`, `recalibration`, and the two that draw, `profile_report` and `fit_report`.
"""

from transformers import AutoConfig, AutoModel

from .configuration_latency_estimator import LatencyEstimatorConfig
from .fit_cache import FitCache
from .fitting import fit_latency_estimator
from .guardrail import Guardrail
from .latency_estimator import LatencyEstimator, RecordedLatencies
from .loading import (
    embedded_latency_estimator_path,
    read_latency_estimator,
    shipped_estimator_names,
    shipped_latency_estimators,
)
from .modeling_latency_estimator import LatencyEstimatorModel, LatencyEstimatorOutput
from .profile_table import load_profile, make_profile, save_profile


AutoConfig.register(LatencyEstimatorConfig.model_type, LatencyEstimatorConfig)
AutoModel.register(LatencyEstimatorConfig, LatencyEstimatorModel)

__all__ = [
    "FitCache",
    "Guardrail",
    "LatencyEstimator",
    "LatencyEstimatorConfig",
    "LatencyEstimatorModel",
    "LatencyEstimatorOutput",
    "RecordedLatencies",
    "embedded_latency_estimator_path",
    "fit_latency_estimator",
    "load_profile",
    "make_profile",
    "read_latency_estimator",
    "save_profile",
    "shipped_estimator_names",
    "shipped_latency_estimators",
]
