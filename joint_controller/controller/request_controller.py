"""The controller for one request at a time, as in serving: what it takes adds to every answer."""

import torch

from ..knobs import KnobSetting
from .captured_stages import CapturedStages
from .host_stages import HostStages
from .modeling_joint_controller import JointControllerModel
from .setting_fit import RequestFit, SettingFit


class RequestController:
    """
    Takes the likeliest decisions for single requests: on a CUDA device by [`CapturedStages`], else by [`HostStages`].

    Args:
        controller ([`JointControllerModel`]):
            The controller, on its device. Its weights must not be replaced afterwards.

    Attributes:
        sees_question, sees_image (`bool`):
            As in [`JointControllerModel`].

    Example: see [`~joint_controller.decisions.decide_one`].
    """

    def __init__(self, controller: JointControllerModel):
        self.controller = controller.eval()
        self.sees_question, self.sees_image = controller.sees_question, controller.sees_image
        self._positions: list[list[int]] = controller.table.positions.tolist()
        self._stages = (CapturedStages if controller.device.type == "cuda" else HostStages)(controller)

    def choose_stage1(
        self,
        question_features: torch.Tensor | None,
        latency_budget_ms: float,
        fit: RequestFit | SettingFit | None = None,
    ) -> int:
        """
        Stage 1 of a request.

        Args:
            question_features (`torch.Tensor` of shape `(1, question_size)`, *optional*):
                As in [`JointControllerModel.score_stage1`]. `None` for a controller that does not see it.
            latency_budget_ms (`float`):
                Budget in ms.
            fit ([`RequestFit`], or [`SettingFit`] of one request, *optional*):
                Settings to choose from in both stages, see [`~latency.Guardrail`]. By default all.

        Returns:
            `int`: position among the choices of the stage, see [`StageTable`].

        Raises:
            ValueError: If the controller sees what fits and it is not given.
        """
        self.controller.check_fit(fit)
        if isinstance(fit, SettingFit):
            fit = fit.of_one()
        return self._stages.choose_stage1(question_features, latency_budget_ms, fit)

    def choose_stage2(self, vision_features: torch.Tensor | None) -> int:
        """
        Stage 2 of the request that [`~RequestController.choose_stage1`] was last called for.

        Args:
            vision_features (`torch.Tensor` of shape `(1, vision_size)`, *optional*):
                As in [`JointControllerModel.score_stage2`]. `None` for a controller that does not see it.

        Returns:
            `int`: position among the choices of the stage.
        """
        return self._stages.choose_stage2(vision_features)

    def setting(self, first: int, second: int) -> KnobSetting:
        """The setting of a pair of choices."""
        return self.controller.knob_space.settings[self._positions[first][second]]
