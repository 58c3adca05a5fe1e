"""A latency estimator from wherever it is."""

from pathlib import Path

from transformers import AutoModel

from .modeling_latency_estimator import LatencyEstimatorModel
from .modeling_original_estimator import (
    OriginalLatencyEstimatorModel,
    read_original_latency_estimator,
)
from .shipped_estimators import SHIPPED_ESTIMATORS, shipped_estimator_names


def read_latency_estimator(path: str | Path) -> LatencyEstimatorModel | OriginalLatencyEstimatorModel:
    """
    Loads a latency estimator.

    Args:
        path (`str` or `Path`):
            Folder or Hub name of an estimator of this package, the name of one that ships with it (`"molmoe_1b_h200"`), or a
            `best_latency_estimator.pt` of the original scripts.

    Returns:
        [`LatencyEstimatorModel`] or [`OriginalLatencyEstimatorModel`]: both predict alike.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is something else.
    """
    if Path(path).is_file() or Path(path).suffix in (".pt", ".pth"):
        return read_original_latency_estimator(path)
    if not Path(path).is_dir() and str(path) in shipped_estimator_names():
        path = SHIPPED_ESTIMATORS / path
    if not Path(path).is_dir() and str(path).count("/") != 1:
        raise FileNotFoundError(
            f"latency estimator '{path}' does not exist: give the folder of an estimator, or the name of one that ships "
            f"({', '.join(shipped_estimator_names())})."
        )
    estimator = AutoModel.from_pretrained(path)
    if not isinstance(estimator, LatencyEstimatorModel | OriginalLatencyEstimatorModel):
        raise ValueError(f"'{path}' holds a {type(estimator).__name__}, which is no latency estimator.")
    return estimator
