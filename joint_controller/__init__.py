"""Answer visual questions inside a latency budget: a GRPO-trained controller for the knobs of a frozen model."""

import importlib
from typing import TYPE_CHECKING

from .version import __version__


# Public names and the submodule that defines each: imported on first use, so that `import joint_controller` stays cheap.
_SUBMODULE_OF = {
    "Executor": ".executor",
    "JointControllerConfig": ".controller",
    "JointControllerModel": ".controller",
    "JointGRPOConfig": ".trainer",
    "JointGRPOTrainer": ".trainer",
    "JointPipeline": ".pipeline",
    "Knob": ".knobs",
    "KnobSetting": ".knobs",
    "KnobSpace": ".knobs",
    "LatencyEstimatorConfig": ".latency",
    "LatencyEstimatorModel": ".latency",
    "load_executor": ".executor",
    "register_executor_family": ".executor",
}

__all__ = [
    "Executor",
    "JointControllerConfig",
    "JointControllerModel",
    "JointGRPOConfig",
    "JointGRPOTrainer",
    "JointPipeline",
    "Knob",
    "KnobSetting",
    "KnobSpace",
    "LatencyEstimatorConfig",
    "LatencyEstimatorModel",
    "__version__",
    "load_executor",
    "register_executor_family",
]

if TYPE_CHECKING:
    from .controller import JointControllerConfig, JointControllerModel
    from .executor import Executor, load_executor, register_executor_family
    from .knobs import Knob, KnobSetting, KnobSpace
    from .latency import LatencyEstimatorConfig, LatencyEstimatorModel
    from .pipeline import JointPipeline
    from .trainer import JointGRPOConfig, JointGRPOTrainer


def __getattr__(name: str):
    if name not in _SUBMODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_SUBMODULE_OF[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
