"""The controller for one request at a time, as in serving: what it takes adds to every answer."""

from collections.abc import Callable

import torch

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

    Example:

    ```python
    >>> request_controller = RequestController(controller)
    >>> tier_index = request_controller.choose_tier(question_features, latency_budget_ms=200)
    >>> vision_features = executor.vision_features([request], tiers[tier_index])
    >>> top_k_index, num_blocks_index = request_controller.choose_depth(vision_features)
    ```
    """

    def __init__(self, controller: JointControllerModel):
        self.controller = controller.eval()
        place = {"device": controller.device}
        self._question = torch.zeros(1, controller.config.question_size, **place)
        self._vision = torch.zeros(1, controller.config.vision_size, **place)
        self._budget_ms = torch.full((1,), controller.config.latency_budget_max_ms, **place)
        self._tier_index = torch.zeros(1, dtype=torch.long, **place)
        self._depth = torch.zeros(2, dtype=torch.long, **place)
        is_on_gpu = controller.device.type == "cuda"
        self._run_stage1 = self._captured(self._stage1) if is_on_gpu else self._stage1
        self._run_stage2 = self._captured(self._stage2) if is_on_gpu else self._stage2

    def choose_tier(self, question_features: torch.Tensor | None, latency_budget_ms: float) -> int:
        """
        Stage 1 of a request.

        Args:
            question_features (`torch.Tensor` of shape `(1, question_size)`, *optional*):
                Mean of the executor's embeddings of the question's tokens. `None` for a controller that does not see it.
            latency_budget_ms (`float`):
                Budget in ms.

        Returns:
            `int`: Position of the tier in the knob space.
        """
        with torch.inference_mode():
            if question_features is not None:
                self._question.copy_(question_features)
            self._budget_ms.fill_(latency_budget_ms)
            self._run_stage1()
            return self._tier_index.item()

    def choose_depth(self, vision_features: torch.Tensor | None) -> tuple[int, int]:
        """
        Stage 2 of the request that [`~RequestController.choose_tier`] was last called for.

        Args:
            vision_features (`torch.Tensor` of shape `(1, vision_size)`, *optional*):
                Mean of the projected vision features of the image at the tier taken. `None` for a controller that does
                not see it.

        Returns:
            `tuple[int, int]`: Positions of top_k and num_blocks in the knob space.
        """
        with torch.inference_mode():
            if vision_features is not None:
                self._vision.copy_(vision_features)
            self._run_stage2()
            return tuple(self._depth.tolist())

    def _stage1(self) -> None:
        self._tier_index.copy_(self.controller.stage1(self._question, self._budget_ms).argmax(dim=-1))

    def _stage2(self) -> None:
        logits = self.controller.stage2(self._vision, self._question, self._budget_ms, self._tier_index)
        self._depth.copy_(torch.cat([knob.argmax(dim=-1) for knob in logits]))

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
        return graph.replay
