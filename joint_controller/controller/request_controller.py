"""The controller for one request at a time, as in serving: what it takes adds to every answer."""

import math
from collections.abc import Callable

import torch

from .modeling_joint_controller import JointControllerModel


NUM_WARM_UPS = 3
"""Calls of a stage before it is captured, in which CUDA libraries allocate what they need."""


def likeliest_tier(tier_logits: torch.Tensor, fits: torch.Tensor | None = None) -> torch.Tensor:
    """
    The likeliest decision of stage 1.

    Args:
        tier_logits (`torch.Tensor` of shape `(n, tiers)`):
            What stage 1 gives.
        fits (`torch.BoolTensor` of shape `(n, tiers, top_k values, num_blocks values)`, *optional*):
            Settings to choose from, at least one for each request: tiers without any are out. By default all.

    Returns:
        `torch.LongTensor` of shape `(n,)`: positions in the knob space.
    """
    return tier_logits.argmax(dim=-1) if fits is None else _likeliest_tier(tier_logits, _penalty(fits))


def likeliest_depth(
    top_k_logits: torch.Tensor, num_blocks_logits: torch.Tensor, fits: torch.Tensor | None = None
) -> torch.Tensor:
    """
    The likeliest decisions of stage 2, taken together: some pairs may be out while each of their values is in others.

    Args:
        top_k_logits (`torch.Tensor` of shape `(n, top_k values)`):
            What stage 2 gives.
        num_blocks_logits (`torch.Tensor` of shape `(n, num_blocks values)`):
            What stage 2 gives.
        fits (`torch.BoolTensor` of shape `(n, top_k values, num_blocks values)`, *optional*):
            Pairs to choose from, at least one for each request. By default all.

    Returns:
        `torch.LongTensor` of shape `(n, 2)`: positions of top_k and num_blocks in the knob space.
    """
    penalty = top_k_logits.new_zeros(1, 1, 1, dtype=torch.float64) if fits is None else _penalty(fits)
    best, num_values = _likeliest_pair(top_k_logits, num_blocks_logits, penalty), num_blocks_logits.shape[-1]
    return torch.stack([best // num_values, best % num_values], dim=-1)


def _penalty(fits: torch.Tensor) -> torch.Tensor:
    """What the logits of settings change by: 0, or -inf for those that are out."""
    return torch.zeros_like(fits, dtype=torch.float64).masked_fill_(~fits, -math.inf)


def _likeliest_tier(tier_logits: torch.Tensor, penalty: torch.Tensor) -> torch.Tensor:
    return (tier_logits + penalty.flatten(2).amax(dim=-1)).argmax(dim=-1)


def _likeliest_pair(
    top_k_logits: torch.Tensor, num_blocks_logits: torch.Tensor, penalty: torch.Tensor
) -> torch.Tensor:
    """The place of each likeliest pair among all, `(n,)`, those of a top_k beside one another."""
    # The two are independent: the logarithm of a pair's probability is the sum of its logits and a constant. In float64,
    # as penalties are, whose rounding makes no ties, so that the likeliest of all pairs is that of the likeliest values.
    pairs = top_k_logits[:, :, None] + (num_blocks_logits[:, None, :] + penalty)
    return pairs.flatten(1).argmax(dim=-1)


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
        self._penalty = torch.zeros(1, *controller.knob_space.sizes, dtype=torch.float64, **place)
        self._has_penalty = False
        self._tier_index = torch.zeros(1, dtype=torch.long, **place)
        # Decisions, where the host can read them as soon as the device is done: the pair of top_k and num_blocks is its
        # place among all.
        is_on_gpu = controller.device.type == "cuda"
        self._tier, self._pair = (torch.zeros(1, dtype=torch.long, pin_memory=is_on_gpu) for _ in range(2))
        self._run_stage1 = self._captured(self._stage1) if is_on_gpu else self._stage1
        self._run_stage2 = self._captured(self._stage2) if is_on_gpu else self._stage2

    def choose_tier(
        self, question_features: torch.Tensor | None, latency_budget_ms: float, fits: torch.Tensor | None = None
    ) -> int:
        """
        Stage 1 of a request.

        Args:
            question_features (`torch.Tensor` of shape `(1, question_size)`, *optional*):
                Mean of the executor's embeddings of the question's tokens. `None` for a controller that does not see it.
            latency_budget_ms (`float`):
                Budget in ms.
            fits (`torch.BoolTensor` of shape `(tiers, top_k values, num_blocks values)`, *optional*):
                Settings to choose from in both stages, at least one, on the CPU, see [`~latency.Guardrail`]. By default
                all.

        Returns:
            `int`: Position of the tier in the knob space.
        """
        with torch.inference_mode():
            if question_features is not None:
                self._question.copy_(question_features)
            self._budget_ms.fill_(latency_budget_ms)
            if fits is not None:
                # Copies from ordinary memory are safe without waiting.
                self._penalty.copy_(_penalty(fits[None]), non_blocking=True)
            elif self._has_penalty:
                self._penalty.fill_(0.0)
            self._has_penalty = fits is not None
            self._run_stage1()
            return self._tier.item()

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
            return divmod(self._pair.item(), self._penalty.shape[-1])

    def _stage1(self) -> None:
        logits = self.controller.stage1(self._question, self._budget_ms)
        self._tier_index.copy_(_likeliest_tier(logits, self._penalty))
        self._tier.copy_(self._tier_index, non_blocking=True)

    def _stage2(self) -> None:
        logits = self.controller.stage2(self._vision, self._question, self._budget_ms, self._tier_index)
        penalty = self._penalty[0].index_select(0, self._tier_index)
        self._pair.copy_(_likeliest_pair(*logits, penalty), non_blocking=True)

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
