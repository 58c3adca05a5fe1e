"""How large the inputs of a request are, told without any weights."""

from collections.abc import Mapping, Sequence

from ...executor.requests import ExecutorRequest
from ...images import oriented_size
from ...knobs import KnobSetting, KnobSpace
from .. import MolmoConfig, MolmoProcessor
from ..knob_space import tier_crops_of


COUNT_NAMES = ("image_pixels", "num_views", "vision_tokens", "text_tokens")
"""
Pixels of the image as it was given. Views that the tower encodes: the global one and the crops. Tokens that stand for the
image: start, patch, column and end tokens. The other tokens of the prompt: the beginning-of-sequence token and the question.
"""


def count_inputs(
    processor: MolmoProcessor,
    tier_crops: Mapping[str, tuple[int, int]],
    request: ExecutorRequest,
    settings: Sequence[KnobSetting],
) -> dict[str, list[int]]:
    """Counts of a request at each of some settings, see [`InputCounter.count_inputs`]."""
    size = oriented_size(request.load_image())
    prompt_ids = processor.prompt_ids(request.question, request.style)
    return count_prompt(processor, tier_crops, size, len(prompt_ids), settings)


def count_prompt(
    processor: MolmoProcessor,
    tier_crops: Mapping[str, tuple[int, int]],
    size: tuple[int, int],
    num_prompt_ids: int,
    settings: Sequence[KnobSetting],
) -> dict[str, list[int]]:
    """Counts of a request, by its image's width and height and the length of its tokenized prompt, at each of some
    settings. What depends on the tier alone is worked out once a tier."""
    width, height = size
    counts_at = {}
    for tier in {setting["tier"] for setting in settings}:
        tiling = processor.image_processor.choose_tiling(height, width, tier=tier, tier_crops=tier_crops)
        counts_at[tier] = counts_of(processor, size, tiling, num_prompt_ids)
    counts = [counts_at[setting["tier"]] for setting in settings]
    return {name: [one[name] for one in counts] for name in COUNT_NAMES}


def counts_of(
    processor: MolmoProcessor, size: tuple[int, int], tiling: Sequence[int], num_prompt_ids: int
) -> dict[str, int]:
    """Counts of an image, of this width and height and in this tiling, and of a tokenized prompt of this length."""
    rows, columns = tiling
    vision_tokens = processor.image_processor.count_image_tokens(tiling)
    values = (size[0] * size[1], 1 + rows * columns, vision_tokens, 1 + num_prompt_ids)
    return dict(zip(COUNT_NAMES, values, strict=True))


class MolmoInputCounter:
    """The [`InputCounter`] of a Molmo. `max_new_tokens` is the room that is left for an answer."""

    count_names = COUNT_NAMES

    def __init__(self, config: MolmoConfig, processor: MolmoProcessor, knob_space: KnobSpace, max_new_tokens: int):
        self.processor = processor
        self.knob_space = knob_space
        self.max_prompt_tokens: int = config.text_config.max_position_embeddings - max_new_tokens

    def count_inputs(self, request: ExecutorRequest, settings: Sequence[KnobSetting]) -> dict[str, list[int]]:
        """As [`InputCounter.count_inputs`]."""
        return count_inputs(self.processor, tier_crops_of(self.knob_space), request, settings)
