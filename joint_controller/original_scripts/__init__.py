"""Results that were recorded elsewhere: what a controller and a latency estimator can learn from without an executor."""

from .original_layout import RecordedMeasurement, read_original_results
from .recorded_results import RecordedResults, import_original_results, load_recorded_results, save_recorded_results
from .samples import find_images, split_samples


__all__ = [
    "RecordedMeasurement",
    "RecordedResults",
    "find_images",
    "import_original_results",
    "load_recorded_results",
    "read_original_results",
    "save_recorded_results",
    "split_samples",
]
