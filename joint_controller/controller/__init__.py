"""The controller: a two-stage policy over the knobs of an executor."""

from transformers import AutoConfig, AutoModel

from .configuration_joint_controller import JointControllerConfig
from .modeling_joint_controller import JointControllerModel, JointControllerOutput
from .request_controller import RequestController, likeliest_depth, likeliest_tier


__all__ = [
    "JointControllerConfig",
    "JointControllerModel",
    "JointControllerOutput",
    "RequestController",
    "likeliest_depth",
    "likeliest_tier",
]

AutoConfig.register("joint_controller", JointControllerConfig)
AutoModel.register(JointControllerConfig, JointControllerModel)
