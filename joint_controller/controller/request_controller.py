"""The controller for one request at a time, as in serving: what it takes adds to every answer."""

from collections.abc import Callable

import torch

from .choosing import StageTable, likeliest, penalty_of
from .modeling_joint_controller import JointControllerModel


NUM_WARM_UPS = 3
"""Calls of a stage before it is captured, in which CUDA libraries allocate what they need."""


class RequestController:
    """
    Takes the likeliest decisions for single requests. On a CUDA device each stage is one captured graph: its two dozen
    small kernels take less time than the host needs to launch them one by one.

    Args:
        controller ([`JointControllerModel`]):
            The controller, on its device. Its weights must not be replaced afterwards.

    Example: see [`~joint_controller.decisions.decide`].
    """

    def __init__(self, controller: JointControllerModel):
        self.controller = controller.eval()
        place = {"device": controller.device}
        self._table = StageTable(controller.knob_space)
        num_first, num_second = self._table.positions.shape
        self._first_values = self._table.values[0].to(controller.device)
        self._question = torch.zeros(1, controller.config.question_size, **place)
        self._vision = torch.zeros(1, controller.config.vision_size, **place)
        # In float32, also where the configuration has whole milliseconds.
        self._budget_ms = torch.full((1,), float(controller.config.latency_budget_max_ms), **place)
        self._penalty = torch.zeros(num_first, num_second, dtype=torch.float64, **place)
        self._has_penalty = False
        self._first_on_device = torch.zeros(1, dtype=torch.long, **place)
        # Decisions as places among the choices of a stage, where the host can read them as soon as the device is done.
        is_on_gpu = controller.device.type == "cuda"
        self._first, self._second = (torch.zeros(1, dtype=torch.long, pin_memory=is_on_gpu) for _ in range(2))
        self._run_stage1 = self._captured(self._stage1) if is_on_gpu else self._stage1
        self._run_stage2 = self._captured(self._stage2) if is_on_gpu else self._stage2

    def choose_stage1(
        self, question_features: torch.Tensor | None, latency_budget_ms: float, fits: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Stage 1 of a request.

        Args:
            question_features (`torch.Tensor` of shape `(1, question_size)`, *optional*):
                As in [`JointControllerModel.forward`]. `None` for a controller that does not see it.
            latency_budget_ms (`float`):
                Budget in ms.
            fits (`torch.BoolTensor` of shape `(1, settings)`, *optional*):
                Settings to choose from in both stages, at least one, on the CPU, see [`~latency.Guardrail`]. By default
                all.

        Returns:
            `torch.LongTensor` of shape `(1, knobs of stage 1)`: positions of values, on the CPU.
        """
        with torch.inference_mode():
            if question_features is not None:
                self._question.copy_(question_features)
            self._budget_ms.fill_(latency_budget_ms)
            if fits is not None:
                # Copies from ordinary memory are safe without waiting.
                self._penalty.copy_(penalty_of(fits[0][self._table.positions]), non_blocking=True)
            elif self._has_penalty:
                self._penalty.fill_(0.0)
            self._has_penalty = fits is not None
            self._run_stage1()
            return self._table.values[0].index_select(0, self._first)

    def choose_stage2(self, vision_features: torch.Tensor | None) -> torch.Tensor:
        """
        Stage 2 of the request that [`~RequestController.choose_stage1`] was last called for.

        Args:
            vision_features (`torch.Tensor` of shape `(1, vision_size)`, *optional*):
                As in [`JointControllerModel.forward`]. `None` for a controller that does not see it.

        Returns:
            `torch.LongTensor` of shape `(1, knobs of stage 2)`: positions of values, on the CPU.
        """
        with torch.inference_mode():
            if vision_features is not None:
                self._vision.copy_(vision_features)
            self._run_stage2()
            return self._table.values[1].index_select(0, self._second)

    def _stage1(self) -> None:
        logits = self.controller.stage1(self._question, self._budget_ms)
        if logits:
            self._first_on_device.copy_(likeliest(logits, self._penalty.amax(dim=-1)[None]))
            self._first.copy_(self._first_on_device, non_blocking=True)

    def _stage2(self) -> None:
        # Of a single knob, choices are values: a kernel less.
        is_single = self._first_values.shape[1] == 1
        values = self._first_on_device[:, None] if is_single else self._first_values[self._first_on_device]
        logits = self.controller.stage2(self._vision, self._question, self._budget_ms, values)
        if logits:
            penalty = self._penalty.index_select(0, self._first_on_device)
            self._second.copy_(likeliest(logits, penalty), non_blocking=True)

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
