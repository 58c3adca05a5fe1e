"""The two stages of a controller on a CUDA device, for one request at a time."""

from collections.abc import Callable

import torch

from .modeling_joint_controller import JointControllerModel
from .setting_fit import RequestFit, SettingFit


NUM_WARM_UPS = 3
"""Calls of a stage before it is captured, in which CUDA libraries allocate what they need."""


class CapturedStages:
    """
    Takes the choices that [`JointControllerModel.score_stage1`] and [`JointControllerModel.score_stage2`] score highest. Each
    stage is one captured graph: its two dozen small kernels take less time than the host needs to launch them one by one.

    Args:
        controller ([`JointControllerModel`]):
            The controller, on its device. Its weights must not be replaced afterwards.
    """

    def __init__(self, controller: JointControllerModel):
        self.controller = controller
        place = {"device": controller.device}
        num_settings = len(controller.knob_space)
        self._question = torch.zeros(1, controller.config.question_size, **place)
        self._vision = torch.zeros(1, controller.config.vision_size, **place)
        # In float32, also where the configuration has whole milliseconds.
        self._budget_ms = torch.full((1,), float(controller.config.latency_budget_max_ms), **place)
        # One copy to the device for both.
        self._fit = torch.ones(2, num_settings, **place)
        self._fit_on_host = torch.ones(2, num_settings, pin_memory=True)
        self._is_masked = False
        self._first_on_device = torch.zeros(1, dtype=torch.long, **place)
        # Decisions as places among the choices of a stage, where the host can read them as soon as the device is done.
        self._first, self._second = (torch.zeros(1, dtype=torch.long, pin_memory=True) for _ in range(2))
        self._run_stage1, self._run_stage2 = self._captured(self._stage1), self._captured(self._stage2)

    def choose_stage1(
        self, question_features: torch.Tensor | None, latency_budget_ms: float, fit: RequestFit | None = None
    ) -> int:
        """As [`RequestController.choose_stage1`]."""
        with torch.inference_mode():
            if question_features is not None:
                self._question.copy_(question_features)
            self._budget_ms.fill_(latency_budget_ms)
            if fit is not None:
                self._fit_on_host.copy_(torch.tensor([fit.fits, fit.slack]))
                # What the last request copied from there has been waited for.
                self._fit.copy_(self._fit_on_host, non_blocking=True)
            elif self._is_masked:
                self._fit.fill_(1.0)
            self._is_masked = fit is not None
            self._run_stage1()
            return self._first.item()

    def choose_stage2(self, vision_features: torch.Tensor | None) -> int:
        """As [`RequestController.choose_stage2`]."""
        with torch.inference_mode():
            if vision_features is not None:
                self._vision.copy_(vision_features)
            self._run_stage2()
            return self._second.item()

    def _setting_fit(self) -> SettingFit:
        fits = self._fit[:1] > 0
        return SettingFit(fits, self._fit[1:], fits[:, 0])

    def _stage1(self) -> None:
        scores = self.controller.score_stage1(self._question, self._budget_ms, self._setting_fit())
        self._first_on_device.copy_(scores.argmax(dim=-1))
        self._first.copy_(self._first_on_device, non_blocking=True)

    def _stage2(self) -> None:
        scores = self.controller.score_stage2(
            self._vision, self._question, self._budget_ms, self._first_on_device, self._setting_fit()
        )
        self._second.copy_(scores.argmax(dim=-1), non_blocking=True)

    @torch.inference_mode()
    def _captured(self, stage: Callable[[], None]) -> Callable[[], None]:
        stream = torch.cuda.Stream(self.controller.device)
        stream.wait_stream(torch.cuda.current_stream(self.controller.device))
        with torch.cuda.stream(stream):
            for _ in range(NUM_WARM_UPS):
                stage()
        torch.cuda.current_stream(self.controller.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            stage()

        def run() -> None:
            graph.replay()
            torch.cuda.current_stream(self.controller.device).synchronize()

        return run
