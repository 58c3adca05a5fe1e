"""What an executor is: its interface, what it is asked and answers, and how the one of a checkpoint is found."""

from .costs import DECODE, CostModel, StageCost, StageTerms
from .executor import Executor, FeatureSource, InputCounter
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


__all__ = [
    "DECODE",
    "EMBEDDED",
    "RANDOM_PREFIX",
    "CostModel",
    "Executor",
    "ExecutorFamily",
    "ExecutorOutput",
    "ExecutorRequest",
    "FeatureSource",
    "InputCounter",
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
