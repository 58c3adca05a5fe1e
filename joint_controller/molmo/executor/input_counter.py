"""How large the inputs of a request are, told without any weights."""

from collections.abc import Mapping, Sequence

from ...executor.requests import ExecutorRequest
from ...images import oriented_size
from ...knobs import KnobSetting, KnobSpace
from .. import MolmoConfig, MolmoProcessor
from ..knob_space import tier_crops_of


COUNT_NAMES = ("num_views", "vision_tokens", "text_tokens")
"""
Views that the tower encodes: the global one and the crops. Tokens that stand for the image: start, patch, column and end
tokens. The other tokens of the prompt: the beginning-of-sequence token and the question.
"""


def count_inputs(
    processor: MolmoProcessor,
    tier_crops: Mapping[str, tuple[int, int]],
    request: ExecutorRequest,
    settings: Sequence[KnobSetting],
) -> dict[str, list[int]]:
    """Counts of a request at each of some settings, see [`InputCounter.count_inputs`]. What depends on the tier alone is
    worked out once a tier."""
    width, height = oriented_size(request.load_image())
    prompt = processor.format_prompt(request.question, request.style)
    text_tokens = 1 + len(processor.tokenizer(prompt, add_special_tokens=False)["input_ids"])
    counts_at = {}
    for tier in {setting["tier"] for setting in settings}:
        rows, columns = processor.image_processor.choose_tiling(height, width, tier=tier, tier_crops=tier_crops)
        counts_at[tier] = (
            1 + rows * columns,
            processor.image_processor.count_image_tokens((rows, columns)),
            text_tokens,
        )
    counts = [counts_at[setting["tier"]] for setting in settings]
    return {name: [count[column] for count in counts] for column, name in enumerate(COUNT_NAMES)}


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
