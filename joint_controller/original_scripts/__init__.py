"""
The original scripts' formats and flags: their profiling results, which a controller and a latency estimator can learn
from without an executor, their latency estimator, and the command line of their training script.
"""

from transformers import AutoConfig, AutoModel

from .modeling_original_estimator import (
    OriginalLatencyEstimatorConfig,
    OriginalLatencyEstimatorModel,
    read_original_latency_estimator,
)
from .recorded_results import RecordedResults, import_original_results, load_recorded_results, save_recorded_results
from .samples import find_images, split_samples


AutoConfig.register(OriginalLatencyEstimatorConfig.model_type, OriginalLatencyEstimatorConfig)
AutoModel.register(OriginalLatencyEstimatorConfig, OriginalLatencyEstimatorModel)

__all__ = [
    "OriginalLatencyEstimatorConfig",
    "OriginalLatencyEstimatorModel",
    "RecordedResults",
    "find_images",
    "import_original_results",
    "load_recorded_results",
    "read_original_latency_estimator",
    "save_recorded_results",
    "split_samples",
]
