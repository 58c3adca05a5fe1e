"""The knobs of a Molmo: how many crops an image is cut into, how many experts a token has, how many blocks run."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..knobs import Knob, KnobSpace, KnobValue, parse_knob_values


if TYPE_CHECKING:
    from .configuration_molmo import MolmoConfig


TIERS = ("low", "medium", "high")
"""Names of the image tiers, cheapest first."""

DEFAULT_TIER_CROPS = {"low": (1, 3), "medium": (4, 8), "high": (9, 15)}
"""Crops (fewest, most) of each tier, as in the MolmoE-1B profiling tables that this project can import."""

_DESCRIPTIONS = {
    "tier": "Crops that the image is cut into.",
    "top_k": "Experts per token.",
    "num_blocks": "Transformer blocks that run.",
}


def build_knob_space(
    tier_crops: Mapping[str, Sequence[int]], top_k: Sequence[int], num_blocks: Sequence[int]
) -> KnobSpace:
    """
    The knob space of a Molmo with these values: the knobs `tier` (decided by stage 1), `top_k` and `num_blocks` (by
    stage 2), in this order.

    Args:
        tier_crops (`dict[str, tuple[int, int]]`):
            Fewest and most crops of each tier, cheapest tier first. Keys are a subset of `"low"`, `"medium"`, `"high"`.
        top_k (`Sequence[int]`):
            Experts per token, ascending.
        num_blocks (`Sequence[int]`):
            Numbers of transformer blocks that run, ascending.

    Raises:
        ValueError: If a knob has no value, values are not ascending integers of 1 or more, a tier is unknown, or tiers
            overlap.

    Example:

    ```python
    >>> space = build_knob_space({"low": (1, 3), "high": (9, 15)}, top_k=(4, 8), num_blocks=(12, 16))
    >>> len(space), str(space.cheapest)
    (8, 'tier=low top_k=4 num_blocks=12')
    ```
    """
    space = KnobSpace(
        [
            Knob("tier", tuple(tier_crops), 1, tuple(tier_crops.values()), _DESCRIPTIONS["tier"]),
            Knob("top_k", top_k, 2, description=_DESCRIPTIONS["top_k"]),
            Knob("num_blocks", num_blocks, 2, description=_DESCRIPTIONS["num_blocks"]),
        ]
    )
    _check_values(space)
    return space


def molmo_knob_space(config: "MolmoConfig", knob_values: Mapping[str, Sequence[KnobValue]] | None = None) -> KnobSpace:
    """
    The knob space of a checkpoint: values given here, else those that its configuration carries in `knob_space`, else
    the defaults of MolmoE-1B's profiling tables (half to all of the experts per token, three quarters to all of the
    blocks, three tiers up to the checkpoint's `max_crops`).

    Args:
        config ([`MolmoConfig`]):
            Configuration of the model.
        knob_values (`Mapping[str, Sequence[KnobValue]]`, *optional*):
            Values of some knobs, by name, as strings or in the knob's type: names of tiers that the checkpoint or
            `DEFAULT_TIER_CROPS` has, numbers of experts and of blocks.

    Raises:
        ValueError: If there is no such knob, or a value is outside what the checkpoint has: more experts per token than
            experts, more blocks than exist, a tier that starts above `max_crops`.
    """
    default = _default_space(config) if config.knob_space is None else KnobSpace.from_dict(config.knob_space)
    check_knob_space(default, config)
    knob_values = parse_knob_values(knob_values)
    default.check_names(knob_values)
    crops = {**DEFAULT_TIER_CROPS, **tier_crops_of(default)}
    knobs = []
    for knob in default.knobs:
        if knob.name in knob_values:
            values = [knob.parse(value) if isinstance(value, str) else value for value in knob_values[knob.name]]
            unknown = [tier for tier in values if tier not in crops] if knob.name == "tier" else []
            if unknown:
                raise ValueError(f"knob `tier` has unknown values {unknown}: choose from {list(crops)}.")
            meanings = [crops[tier] for tier in values] if knob.name == "tier" else None
            knob = replace(knob, values=values, meanings=meanings)
        knobs.append(knob)
    space = KnobSpace(knobs)
    check_knob_space(space, config)
    return space


def tier_crops_of(space: KnobSpace) -> dict[str, tuple[int, int]]:
    """Fewest and most crops of each tier of a Molmo's knob space, cheapest tier first."""
    tier = space["tier"]
    return dict(zip(tier.values, tier.meanings, strict=True))


def check_knob_space(space: KnobSpace, config: "MolmoConfig") -> None:
    """
    Refuses a knob space of any origin that a checkpoint cannot be set to.

    Raises:
        ValueError: If the knobs are not those of a Molmo, or a value is outside what the checkpoint has.
    """
    _check_values(space)
    text = config.text_config
    limits = {"top_k": (text.num_experts, "experts per block"), "num_blocks": (text.num_hidden_layers, "blocks")}
    for name, (most, what) in limits.items():
        if space[name].values[-1] > most:
            raise ValueError(
                f"knob `{name}` has the value {space[name].values[-1]} but the executor has {most} {what}: use values from "
                f"1 to {most}."
            )
    for tier, (fewest, _) in tier_crops_of(space).items():
        if fewest > config.max_crops:
            raise ValueError(
                f"tier '{tier}' starts at {fewest} crops but the executor takes {config.max_crops} at most: "
                "leave the tier out or lower its range."
            )


def _default_space(config: "MolmoConfig") -> KnobSpace:
    most_experts, total_blocks = config.text_config.num_experts_per_tok, config.text_config.num_hidden_layers
    return build_knob_space(
        {tier: crops for tier, crops in DEFAULT_TIER_CROPS.items() if crops[0] <= config.max_crops},
        range(max(1, most_experts // 2), most_experts + 1),
        range(max(1, total_blocks * 3 // 4), total_blocks + 1),
    )


def _check_values(space: KnobSpace) -> None:
    """Refuses knobs that no Molmo has."""
    if space.names != tuple(_DESCRIPTIONS):
        raise ValueError(
            f"a Molmo has the knobs {', '.join(_DESCRIPTIONS)} in this order, got {', '.join(space.names)}: it is the knob "
            "space of another executor."
        )
    tier = space["tier"]
    if tier.stage != 1:
        raise ValueError(
            "knob `tier` is decided by stage 2, but an image is encoded before that: decide it by stage 1."
        )
    unknown = [name for name in tier.values if name not in TIERS]
    if unknown:
        raise ValueError(f"knob `tier` has unknown values {unknown}: tiers are named 'low', 'medium' and 'high'.")
    if tier.values != tuple(name for name in TIERS if name in tier.values):
        raise ValueError(f"knob `tier` lists {list(tier.values)}: name the tiers cheapest first.")
    most_so_far = 0
    for name in tier.values:
        crops = tier.meaning(name)
        is_pair = isinstance(crops, tuple) and len(crops) == 2 and all(isinstance(number, int) for number in crops)
        if not is_pair or not 1 <= crops[0] <= crops[1]:
            raise ValueError(f"tier '{name}' has the crop range {crops!r}: give [fewest, most], 1 or more each.")
        if crops[0] <= most_so_far:
            raise ValueError(
                f"tier '{name}' starts at {crops[0]} crops but a cheaper tier already reaches {most_so_far}: "
                "tiers must not overlap."
            )
        most_so_far = crops[1]
    for name in ("top_k", "num_blocks"):
        values = space[name].values
        if any(not isinstance(value, int) or value < 1 for value in values):
            raise ValueError(f"knob `{name}` has the values {list(values)}: all must be integers of 1 or more.")
