"""What an executor is: its interface, what it is asked and answers, and how the one of a checkpoint is found."""

from .costs import (
    CONTROLLER,
    DECODE,
    LATENCY_SCOPES,
    MODEL_SCOPE,
    OVERHEAD,
    REQUEST_SCOPE,
    CostModel,
    StageCost,
    StageTerms,
)
from .executor import Executor, FeatureSource, InputCounter, OpenRequest
from .families import (
    EMBEDDED,
    RANDOM_PREFIX,
    ExecutorFamily,
    embedded_executor_path,
    executor_family,
    executor_shape,
    find_model_folder,
    load_executor,
    load_input_counter,
    register_executor_family,
)
from .requests import ExecutorOutput, ExecutorRequest, StageTimes
from .stage_clock import StageClock


__all__ = [
    "CONTROLLER",
    "DECODE",
    "EMBEDDED",
    "LATENCY_SCOPES",
    "MODEL_SCOPE",
    "OVERHEAD",
    "RANDOM_PREFIX",
    "REQUEST_SCOPE",
    "CostModel",
    "Executor",
    "ExecutorFamily",
    "ExecutorOutput",
    "ExecutorRequest",
    "FeatureSource",
    "InputCounter",
    "OpenRequest",
    "StageClock",
    "StageCost",
    "StageTerms",
    "StageTimes",
    "embedded_executor_path",
    "executor_family",
    "executor_shape",
    "find_model_folder",
    "load_executor",
    "load_input_counter",
    "register_executor_family",
]
