"""The controller: a two-stage policy over the knobs of an executor."""

from transformers import AutoConfig, AutoModel

from .choosing import BatchController
from .configuration_joint_controller import JointControllerConfig
from .loading import find_controller_folder, load_controller
from .modeling_joint_controller import JointControllerModel, JointControllerOutput
from .request_controller import RequestController


__all__ = [
    "BatchController",
    "JointControllerConfig",
    "JointControllerModel",
    "JointControllerOutput",
    "RequestController",
    "find_controller_folder",
    "load_controller",
]

AutoConfig.register("joint_controller", JointControllerConfig)
AutoModel.register(JointControllerConfig, JointControllerModel)
