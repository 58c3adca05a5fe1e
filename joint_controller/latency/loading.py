"""A latency estimator from wherever it is, and those that ship, so that whoever owns their hardware starts without profiling."""

from importlib import import_module
from pathlib import Path

from transformers import CONFIG_MAPPING, AutoModel, PreTrainedConfig

from ..executor import Executor
from .configuration_latency_estimator import LatencyEstimatorConfig
from .latency_estimator import LatencyEstimator


SHIPPED_ESTIMATORS = Path(__file__).parents[1] / "assets" / "latency"
"""Folder of the estimators that ship with the package, each in a folder of its own with its card and its profile."""


def shipped_estimator_names() -> list[str]:
    """Names of the estimators that ship with the package, which stand for their folders: `"embedded_cpu"`, …"""
    return sorted(path.parent.name for path in SHIPPED_ESTIMATORS.glob("*/config.json"))


def embedded_latency_estimator_path() -> Path:
    """
    Folder of the latency estimator of the embedded executor on a CPU (`FileNotFoundError` where the installed package
    lacks it).
    """
    path = SHIPPED_ESTIMATORS / "embedded_cpu"
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"the embedded executor's latency estimator is missing from '{path}': install the package again, or measure "
            "this machine with `--latency_estimator_path fit`."
        )
    return path


def shipped_latency_estimators(executor: Executor) -> dict[str, Path]:
    """
    Folders of the estimators that ship with the package for an executor of this family and these sizes, each by the
    name of the device that it was fitted on, e.g. `"NVIDIA H100 80GB HBM3"`.
    """
    folders = [SHIPPED_ESTIMATORS / name for name in shipped_estimator_names()]
    configs = {folder: LatencyEstimatorConfig.from_pretrained(folder) for folder in folders}
    return {
        config.device_name: folder
        for folder, config in configs.items()
        if (config.executor_type, config.executor_shape) == (executor.model_type, executor.shape)
    }


def read_latency_estimator(path: str | Path, latency_scope: str | None = None) -> LatencyEstimator:
    """
    Loads a latency estimator.

    Args:
        path (`str` or `Path`):
            Folder or Hub name of an estimator, the name of one that ships with the package (e.g. `"embedded_cpu"`), or a
            `best_latency_estimator.pt` of the original scripts.
        latency_scope (`str`, *optional*):
            What latencies are to be of: `"request"`, all that a request costs by the clock, or `"model"`, the stages of the
            model alone. By default that of the estimator.

    Returns:
        [`LatencyEstimator`]: of whatever class is registered with `AutoModel` for it.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is something else, or knows less than the scope that is asked for.
    """
    estimator = _read(path)
    return estimator if latency_scope is None else estimator.in_scope(latency_scope)


def _read(path: str | Path) -> LatencyEstimator:
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
