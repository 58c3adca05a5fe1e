"""What each stage of a request takes."""

import statistics
from dataclasses import replace
from typing import TYPE_CHECKING

from ...executor.requests import ExecutorRequest, StageTimes
from ...executor.stage_clock import StageClock


if TYPE_CHECKING:
    from ...controller import RequestController
    from .molmo_executor import MolmoExecutor


STAGE_NAMES = ("image_processing", "vision", "llm_prefill")
"""Stages up to the first output token: cutting the image and tokenizing the prompt; tower and connector; language model."""


def time_request(
    executor: "MolmoExecutor",
    request: ExecutorRequest,
    repeats: int,
    warmup: int,
    decode_steps: int | None,
    controller: "RequestController | None",
) -> StageTimes:
    """Times a request, see [`Executor.time_request`]."""
    if repeats < 1 or warmup < 0:
        raise ValueError(f"`repeats` is {repeats} and `warmup` is {warmup}: give 1 or more and 0 or more.")
    # Reading the image's file is not part of the request, nor is what is still to be captured.
    request = replace(request, image=request.load_image())
    counts = {name: count for name, [count] in executor.count_inputs(request, [request.setting]).items()}
    prompt_length = counts["vision_tokens"] + counts["text_tokens"]
    executor.inference.prepare(counts["num_views"], prompt_length, request.setting["num_blocks"])
    runs = [_time_once(executor, request, decode_steps, controller) for _ in range(warmup + repeats)][warmup:]
    return replace(
        runs[0],
        controller_ms=None if controller is None else statistics.median(run.controller_ms for run in runs),
        stage_ms={stage: statistics.median(run.stage_ms[stage] for run in runs) for stage in STAGE_NAMES},
        decode_ms=[statistics.median(step) for step in zip(*(run.decode_ms for run in runs), strict=True)],
    )


def _time_once(
    executor: "MolmoExecutor",
    request: ExecutorRequest,
    decode_steps: int | None,
    controller: "RequestController | None",
) -> StageTimes:
    clock = StageClock(executor.device)
    clock.mark()
    if controller is not None:
        sees_question = controller.controller.sees_question
        question = executor.question_features([request.question]) if sees_question else None
        controller.choose_stage1(question, controller.controller.config.latency_budget_max_ms)
    clock.mark()
    inputs = executor.encoder.process(request, request.image, request.setting["tier"])
    clock.mark()
    encoded = executor.encoder.encode_inputs(inputs)
    clock.mark()
    if controller is not None:
        controller.choose_stage2(encoded.vision_features[None] if controller.controller.sees_image else None)
    clock.mark()
    encoded, top_k, blocks = executor.apply_setting(request, encoded)
    decoding = executor.start([encoded], top_k, blocks)
    clock.mark()
    for _ in range(executor.max_new_tokens - 1 if decode_steps is None else decode_steps):
        if decode_steps is None and decoding.tokens.item() == executor.processor.tokenizer.eos_token_id:
            break
        decoding.step()
        clock.mark()
    stage1_ms, image_processing_ms, vision_ms, stage2_ms, llm_prefill_ms, *decode_ms = clock.stages_ms()
    return StageTimes(
        controller_ms=None if controller is None else stage1_ms + stage2_ms,
        stage_ms=dict(zip(STAGE_NAMES, (image_processing_ms, vision_ms, llm_prefill_ms), strict=True)),
        decode_ms=decode_ms,
        counts=encoded.counts,
        output_tokens=1 + len(decode_ms),
    )
