"""Answer visual questions inside a latency budget: a GRPO-trained controller for the knobs of a frozen Molmo."""

import importlib
from typing import TYPE_CHECKING

from .version import __version__


# Public names and the submodule that defines each: imported on first use, so that `import joint_controller` stays cheap.
_SUBMODULE_OF = {
    "JointControllerConfig": ".controller",
    "JointControllerModel": ".controller",
    "JointGRPOConfig": ".trainer",
    "JointGRPOTrainer": ".trainer",
    "JointPipeline": ".pipeline",
    "KnobSetting": ".knobs",
    "KnobSpace": ".knobs",
    "LatencyEstimatorConfig": ".latency",
    "LatencyEstimatorModel": ".latency",
    "MolmoConfig": ".molmo",
    "MolmoForConditionalGeneration": ".molmo",
    "MolmoImageProcessor": ".molmo",
    "MolmoProcessor": ".molmo",
}

__all__ = [
    "JointControllerConfig",
    "JointControllerModel",
    "JointGRPOConfig",
    "JointGRPOTrainer",
    "JointPipeline",
    "KnobSetting",
    "KnobSpace",
    "LatencyEstimatorConfig",
    "LatencyEstimatorModel",
    "MolmoConfig",
    "MolmoForConditionalGeneration",
    "MolmoImageProcessor",
    "MolmoProcessor",
    "__version__",
]

if TYPE_CHECKING:
    from .controller import JointControllerConfig, JointControllerModel
    from .knobs import KnobSetting, KnobSpace
    from .latency import LatencyEstimatorConfig, LatencyEstimatorModel
    from .molmo import MolmoConfig, MolmoForConditionalGeneration, MolmoImageProcessor, MolmoProcessor
    from .pipeline import JointPipeline
    from .trainer import JointGRPOConfig, JointGRPOTrainer


def __getattr__(name: str):
    if name not in _SUBMODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_SUBMODULE_OF[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
