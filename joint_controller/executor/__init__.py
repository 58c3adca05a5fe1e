"""The executor: a frozen Molmo that answers questions at a knob setting."""

from .importance import load_importance, measure_importance, save_importance
from .molmo_executor import MolmoExecutor, embedded_executor_path
from .requests import ExecutorOutput, ExecutorRequest, StageTimes


__all__ = [
    "ExecutorOutput",
    "ExecutorRequest",
    "MolmoExecutor",
    "StageTimes",
    "embedded_executor_path",
    "load_importance",
    "measure_importance",
    "save_importance",
]
