"""What a Molmo does before its first request, so that none waits for code that is compiled or graphs that are captured."""

import time
from itertools import product
from typing import TYPE_CHECKING

from PIL import Image
from tqdm.auto import tqdm

from ...executor.costs import OVERHEAD
from ...executor.requests import ExecutorRequest
from ...executor.stage_clock import StageClock
from ...knobs import KnobSetting
from ..knob_space import tier_crops_of


if TYPE_CHECKING:
    from .molmo_executor import MolmoExecutor


TEXT_TOKENS = range(8, 129)
"""Lengths of the text of prompts that are prepared for: questions of VQA data sets have 10 to 60 tokens with their format. A
longer one is answered all the same, and may be the first of its length."""

MOST_CPU_SECONDS = 15.0
"""Time after which a CPU is left as warm as it is: where requests take seconds, what their first time costs on top does not
matter."""

QUESTION = "what color is the object left of a small red circle and how many are there in this image ?"


def warm_up(executor: "MolmoExecutor", progress: bool) -> None:
    """Prepares an executor for all views, lengths of prompts and blocks that its knob space may ask for, see
    [`Executor.warm_up`]."""
    space, image_processor = executor.knob_space, executor.processor.image_processor
    tiers = {}  # of each tiling
    for tier in tier_crops_of(space):
        fewest, most = image_processor.tier_range(tier, tier_crops_of(space))
        for tiling in product(range(1, most + 1), repeat=2):
            if fewest <= tiling[0] * tiling[1] <= most:
                tiers[tiling] = tier
    settings = {
        tier: [setting for setting in space if setting["tier"] == tier and setting["top_k"] == space.full["top_k"]]
        for tier in set(tiers.values())
    }
    # The largest first, so that memory is asked for once.
    tilings = sorted(tiers, key=lambda tiling: -tiling[0] * tiling[1])
    started = time.perf_counter()
    with tqdm(tilings, desc="Warming up", disable=None if progress else True, leave=False) as bar:
        for number, tiling in enumerate(bar):
            if number and executor.device.type == "cpu" and time.perf_counter() - started > MOST_CPU_SECONDS:
                break
            # Whatever the blocks, lengths and views are prepared once.
            setting = settings[tiers[tiling]][number % len(settings[tiers[tiling]])]
            num_views, vision_tokens = 1 + tiling[0] * tiling[1], image_processor.count_image_tokens(tiling)
            for text_tokens in reversed(TEXT_TOKENS):
                if vision_tokens + text_tokens <= executor.max_prompt_tokens:
                    executor.inference.prepare(num_views, vision_tokens + text_tokens, setting["num_blocks"])
            _answer_once(executor, tiling, setting)
    for num_blocks in space["num_blocks"].values:
        executor.inference.prepare(num_views, vision_tokens + TEXT_TOKENS[0], num_blocks)


def _answer_once(executor: "MolmoExecutor", tiling: tuple[int, int], setting: KnobSetting) -> None:
    """Answers a question about an image that is cut in about that way."""
    rows, columns = tiling
    side = executor.processor.image_processor.base_image_input_size[0]
    request = ExecutorRequest("warm-up", Image.new("RGB", (side * columns, side * rows)), QUESTION, "vqa2", setting)
    clock = StageClock(executor.device)
    opened = executor.open(request, clock)
    opened.question_features([QUESTION])
    opened.vision_features([request])
    opened.answer(setting, decode_steps=1)
    clock.stop(OVERHEAD)
