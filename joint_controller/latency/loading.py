"""A latency estimator from wherever it is."""

from importlib import import_module
from pathlib import Path

from transformers import CONFIG_MAPPING, AutoModel, PreTrainedConfig

from .latency_estimator import LatencyEstimator
from .shipped_estimators import SHIPPED_ESTIMATORS, shipped_estimator_names


def read_latency_estimator(path: str | Path) -> LatencyEstimator:
    """
    Loads a latency estimator.

    Args:
        path (`str` or `Path`):
            Folder or Hub name of an estimator, the name of one that ships with the package (e.g. `"embedded_cpu"`), or a
            `best_latency_estimator.pt` of the original scripts.

    Returns:
        [`LatencyEstimator`]: of whatever class is registered with `AutoModel` for it.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is something else.
    """
    if Path(path).is_file() or Path(path).suffix in (".pt", ".pth"):
        from ..original_scripts.modeling_original_estimator import read_original_latency_estimator

        return read_original_latency_estimator(path)
    if not Path(path).is_dir() and str(path) in shipped_estimator_names():
        path = SHIPPED_ESTIMATORS / path
    if not Path(path).is_dir() and str(path).count("/") != 1:
        raise FileNotFoundError(
            f"latency estimator '{path}' does not exist: give the folder of an estimator, or the name of one that ships "
            f"({', '.join(shipped_estimator_names())})."
        )
    if PreTrainedConfig.get_config_dict(path)[0].get("model_type") not in CONFIG_MAPPING:
        import_module("..original_scripts", __package__)  # registers its estimators with the Auto classes
    estimator = AutoModel.from_pretrained(path)
    if not isinstance(estimator, LatencyEstimator):
        raise ValueError(f"'{path}' holds a {type(estimator).__name__}, which predicts no latencies.")
    return estimator
