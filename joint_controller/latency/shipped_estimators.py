"""The latency estimators that ship with the package, so that whoever owns their hardware starts without profiling."""

from pathlib import Path

from ..executor import Executor
from .configuration_latency_estimator import LatencyEstimatorConfig


SHIPPED_ESTIMATORS = Path(__file__).parents[1] / "assets" / "latency"
"""Folder of the estimators that ship with the package, each in a folder of its own with its card and its profile."""


def shipped_estimator_names() -> list[str]:
    """Names of the estimators that ship with the package, which stand for their folders: `"embedded_cpu"`, …"""
    return sorted(path.parent.name for path in SHIPPED_ESTIMATORS.glob("*/config.json"))


def embedded_latency_estimator_path() -> Path:
    """
    Folder of the latency estimator of the embedded executor on a CPU.

    Raises:
        FileNotFoundError: If the installed package has no such folder.
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
    The estimators that ship with the package for an executor of this family and these sizes.

    Args:
        executor ([`Executor`]):
            The executor.

    Returns:
        `dict[str, Path]`: folder of the estimator, by the name of the device that it was fitted on, e.g. `"NVIDIA H200"`.
    """
    folders = [SHIPPED_ESTIMATORS / name for name in shipped_estimator_names()]
    configs = {folder: LatencyEstimatorConfig.from_pretrained(folder) for folder in folders}
    return {
        config.device_name: folder
        for folder, config in configs.items()
        if (config.executor_type, config.executor_shape) == (executor.model_type, executor.shape)
    }
