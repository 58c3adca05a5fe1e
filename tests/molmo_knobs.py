"""Knob spaces and settings of a Molmo, as tests write them."""

from joint_controller.knobs import Knob, KnobSetting, KnobSpace


def molmo_space(tier_crops, top_k, num_blocks) -> KnobSpace:
    """The space of tiers with their ranges of crops, of experts per token and of blocks that run."""
    return KnobSpace(
        [
            Knob("tier", tuple(tier_crops), stage=1, meanings=tuple(tier_crops.values())),
            Knob("top_k", tuple(top_k), stage=2),
            Knob("num_blocks", tuple(num_blocks), stage=2),
        ]
    )


def molmo_setting(tier, top_k, num_blocks) -> KnobSetting:
    return KnobSetting(tier=tier, top_k=top_k, num_blocks=num_blocks)
