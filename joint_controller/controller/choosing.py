"""From scores to decisions: the likeliest choices or sampled ones, among the settings that fit."""

import torch

from .modeling_joint_controller import JointControllerModel
from .setting_fit import SettingFit


class BatchController:
    """
    Takes the decisions of a controller for a batch of requests, stage by stage. See [`~joint_controller.decisions.decide`].

    Args:
        controller ([`JointControllerModel`]):
            The controller.
        noise (`torch.Tensor` of shape `(n, choices of stage 1 + choices of stage 2)`, *optional*):
            Gumbel noise, with which decisions are sampled from the softmax of scores. By default the likeliest are taken.
        temperature (`float`, *optional*, defaults to 1.0):
            What scores are divided by before noise is added.
    """

    def __init__(self, controller: JointControllerModel, noise: torch.Tensor | None = None, temperature: float = 1.0):
        self.controller = controller
        self._noise = None
        if noise is not None:
            self._noise = noise.to(controller.device).split(controller.table.num_choices, dim=-1)
        self._temperature = temperature

    def choose_stage1(
        self, question_features: torch.Tensor | None, latency_budget_ms: torch.Tensor, fit: SettingFit | None = None
    ) -> torch.Tensor:
        """
        Stage 1 of n requests.

        Args:
            question_features (`torch.Tensor` of shape `(n, question_size)`, *optional*):
                As in [`JointControllerModel.score_stage1`]. `None` for a controller that does not see it.
            latency_budget_ms (`torch.Tensor` of shape `(n,)`):
                Budgets in ms.
            fit ([`SettingFit`], *optional*):
                Settings to choose from in both stages, see [`~latency.Guardrail`]. By default all.

        Returns:
            `torch.LongTensor` of shape `(n,)`: positions among the choices of the stage, see [`StageTable`].
        """
        self._question, self._budgets = question_features, latency_budget_ms
        self._fit = None if fit is None else fit.to(self.controller.device)
        scores = self.controller.score_stage1(question_features, latency_budget_ms, self._fit)
        self._first = self._choose(0, scores)
        return self._first

    def choose_stage2(self, vision_features: torch.Tensor | None) -> torch.Tensor:
        """
        Stage 2 of the requests that [`~BatchController.choose_stage1`] was last called for.

        Args:
            vision_features (`torch.Tensor` of shape `(n, vision_size)`, *optional*):
                As in [`JointControllerModel.score_stage2`]. `None` for a controller that does not see it.

        Returns:
            `torch.LongTensor` of shape `(n,)`: positions among the choices of the stage.
        """
        scores = self.controller.score_stage2(vision_features, self._question, self._budgets, self._first, self._fit)
        return self._choose(1, scores)

    def _choose(self, stage: int, scores: torch.Tensor) -> torch.Tensor:
        if self._noise is not None:
            scores = scores / self._temperature + self._noise[stage]
        return scores.argmax(dim=-1)
