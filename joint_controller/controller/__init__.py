"""The controller: a two-stage policy over the knobs of an executor."""

from transformers import AutoConfig, AutoModel

from .choosing import BatchController
from .configuration_joint_controller import JointControllerConfig
from .loading import find_controller_folder, load_controller
from .modeling_joint_controller import JointControllerModel, JointControllerOutput
from .request_controller import RequestController
from .setting_fit import RequestFit, SettingFit
from .stage_table import StageTable, knob_log_probs


__all__ = [
    "BatchController",
    "JointControllerConfig",
    "JointControllerModel",
    "JointControllerOutput",
    "RequestController",
    "RequestFit",
    "SettingFit",
    "StageTable",
    "find_controller_folder",
    "knob_log_probs",
    "load_controller",
]

AutoConfig.register("joint_controller", JointControllerConfig)
AutoModel.register(JointControllerConfig, JointControllerModel)
