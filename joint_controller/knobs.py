"""The knobs of a frozen executor: which values they may take, one value for each, and the tokens that name them."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast


TIERS = ("low", "medium", "high")
"""Names of the image tiers, cheapest first."""

DEFAULT_TIER_CROPS = {"low": (1, 3), "medium": (4, 8), "high": (9, 15)}
"""Crops (fewest, most) of each tier, as in the MolmoE-1B profiling tables that this project can import."""

KNOBS = ("tier", "top_k", "num_blocks")
"""The knobs in the order in which the controller sets them."""

PAD_TOKEN = "<pad>"
PROMPT_TOKEN = "<request>"


@dataclass(frozen=True, order=True)
class KnobSetting:
    """
    One value for each knob of the executor.

    Args:
        tier (`str`):
            Image tier: one of `"low"`, `"medium"`, `"high"`.
        top_k (`int`):
            Experts per token. 1 for a dense executor.
        num_blocks (`int`):
            Transformer blocks that run.
    """

    tier: str
    top_k: int
    num_blocks: int

    def __str__(self) -> str:
        return f"tier={self.tier} top_k={self.top_k} num_blocks={self.num_blocks}"

    def to_dict(self) -> dict[str, Any]:
        return {"tier": self.tier, "top_k": self.top_k, "num_blocks": self.num_blocks}


@dataclass(frozen=True)
class KnobSpace:
    """
    The values that each knob may take. Immutable, hashable and JSON-friendly.

    Args:
        tier_crops (`dict[str, tuple[int, int]]`):
            Fewest and most crops of each tier, cheapest tier first. Keys are a subset of `"low"`, `"medium"`, `"high"`.
        top_k (`tuple[int, ...]`):
            Experts per token, ascending. `(1,)` for a dense executor.
        num_blocks (`tuple[int, ...]`):
            Numbers of transformer blocks that run, ascending.

    Raises:
        ValueError: If a knob has no value, a value is not positive, values are not strictly ascending, a tier is
            unknown, or tiers overlap.

    Example:

    ```python
    >>> space = KnobSpace({"low": (1, 3), "high": (9, 15)}, top_k=(4, 8), num_blocks=(12, 16))
    >>> len(space), str(space.cheapest)
    (8, 'tier=low top_k=4 num_blocks=12')
    ```
    """

    tier_crops: Mapping[str, tuple[int, int]]
    top_k: tuple[int, ...]
    num_blocks: tuple[int, ...]

    def __post_init__(self):
        tier_crops = {tier: tuple(crops) for tier, crops in self.tier_crops.items()}
        object.__setattr__(self, "tier_crops", tier_crops)
        if not tier_crops:
            raise ValueError("knob `tier` has no values: give at least one of 'low', 'medium', 'high'.")
        unknown = [tier for tier in tier_crops if tier not in TIERS]
        if unknown:
            raise ValueError(f"knob `tier` has unknown values {unknown}: tiers are named 'low', 'medium' and 'high'.")
        if list(tier_crops) != [tier for tier in TIERS if tier in tier_crops]:
            raise ValueError(f"knob `tier` lists {list(tier_crops)}: name the tiers cheapest first.")
        most_so_far = 0
        for tier, crops in tier_crops.items():
            if len(crops) != 2 or not 1 <= crops[0] <= crops[1]:
                raise ValueError(
                    f"tier '{tier}' has the crop range {list(crops)}: give [fewest, most], 1 or more each."
                )
            if crops[0] <= most_so_far:
                raise ValueError(
                    f"tier '{tier}' starts at {crops[0]} crops but a cheaper tier already reaches {most_so_far}: "
                    "tiers must not overlap."
                )
            most_so_far = crops[1]
        for knob in ("top_k", "num_blocks"):
            values = getattr(self, knob)
            if isinstance(values, int):
                raise ValueError(f"knob `{knob}` must be a list of integers, got {values}.")
            values = tuple(values)
            object.__setattr__(self, knob, values)
            if not values:
                raise ValueError(f"knob `{knob}` has no values: give at least one.")
            if any(isinstance(value, bool) or not isinstance(value, int) or value < 1 for value in values):
                raise ValueError(f"knob `{knob}` has the values {list(values)}: all must be integers of 1 or more.")
            if any(low >= high for low, high in itertools.pairwise(values)):
                raise ValueError(f"knob `{knob}` has the values {list(values)}: list each once, smallest first.")

    def __hash__(self) -> int:
        return hash((tuple(self.tier_crops.items()), self.top_k, self.num_blocks))

    def __len__(self) -> int:
        return len(self.tier_crops) * len(self.top_k) * len(self.num_blocks)

    def __iter__(self) -> Iterator[KnobSetting]:
        """All settings, in the order tier, top_k, num_blocks with the last knob moving fastest."""
        for values in itertools.product(*self.values.values()):
            yield KnobSetting(*values)

    def __contains__(self, setting: KnobSetting) -> bool:
        return all(getattr(setting, knob) in values for knob, values in self.values.items())

    @property
    def values(self) -> dict[str, tuple]:
        """Values of each knob, cheapest first, keyed `tier`, `top_k`, `num_blocks`."""
        return {"tier": tuple(self.tier_crops), "top_k": self.top_k, "num_blocks": self.num_blocks}

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Number of values of each knob: (tiers, top_k values, num_blocks values)."""
        return len(self.tier_crops), len(self.top_k), len(self.num_blocks)

    @property
    def cheapest(self) -> KnobSetting:
        """The lowest value of every knob."""
        return KnobSetting(*(values[0] for values in self.values.values()))

    @property
    def full(self) -> KnobSetting:
        """The highest value of every knob."""
        return KnobSetting(*(values[-1] for values in self.values.values()))

    def indices(self, setting: KnobSetting) -> tuple[int, int, int]:
        """
        Position of each of the setting's values among the values of its knob.

        Raises:
            ValueError: If the setting is not in the space.
        """
        if setting not in self:
            raise ValueError(f"setting '{setting}' is outside the knob space {self.to_dict()}.")
        return tuple(values.index(getattr(setting, knob)) for knob, values in self.values.items())

    def setting(self, indices: Sequence[int]) -> KnobSetting:
        """The setting at (tier index, top_k index, num_blocks index): the inverse of [`~KnobSpace.indices`]."""
        return KnobSetting(*(values[index] for values, index in zip(self.values.values(), indices, strict=True)))

    def normalized(self, setting: KnobSetting) -> tuple[float, float, float]:
        """Each knob of the setting on a scale from 0 (cheapest value) to 1 (highest value); 0 for a one-valued knob."""
        positions = self.indices(setting)
        return tuple(
            position / (size - 1) if size > 1 else 0.0 for position, size in zip(positions, self.sizes, strict=True)
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-friendly form, read back by [`~KnobSpace.from_dict`]."""
        return {
            "tier_crops": {tier: list(crops) for tier, crops in self.tier_crops.items()},
            "top_k": list(self.top_k),
            "num_blocks": list(self.num_blocks),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "KnobSpace":
        """
        Builds a knob space from the output of [`~KnobSpace.to_dict`].

        Raises:
            ValueError: If a key is missing or unknown, or a value is not allowed.
        """
        expected = {"tier_crops", "top_k", "num_blocks"}
        if set(values) != expected:
            raise ValueError(f"a knob space has the keys {sorted(expected)}, got {sorted(values)}.")
        # Configurations are written with sorted keys ("high" before "low"), so a dictionary's order means nothing here.
        crops = values["tier_crops"]
        tiers = [tier for tier in TIERS if tier in crops] + [tier for tier in crops if tier not in TIERS]
        return cls({tier: crops[tier] for tier in tiers}, values["top_k"], values["num_blocks"])

    @classmethod
    def from_executor_config(
        cls,
        config: "PreTrainedConfig",
        tier_crops: Mapping[str, Sequence[int]] | None = None,
        top_k: Sequence[int] | None = None,
        num_blocks: Sequence[int] | None = None,
    ) -> "KnobSpace":
        """
        The knob space of an executor: values given here, else those that its configuration carries in `knob_space`,
        else the defaults of MolmoE-1B's profiling tables (half to all of the experts per token, three quarters to all
        of the blocks, three tiers up to the checkpoint's `max_crops`).

        Args:
            config ([`MolmoConfig`]):
                Configuration of the executor.
            tier_crops (`dict[str, tuple[int, int]]`, *optional*):
                Crop range of each tier.
            top_k (`Sequence[int]`, *optional*):
                Experts per token.
            num_blocks (`Sequence[int]`, *optional*):
                Blocks that run.

        Raises:
            ValueError: If a value is outside what the checkpoint has: more experts per token than experts, more blocks
                than exist, a tier that starts above `max_crops`.
        """
        total_blocks = config.text_config.num_hidden_layers
        num_experts = config.text_config.num_experts
        if config.knob_space is not None:
            default = cls.from_dict(config.knob_space)
        else:
            most_experts = config.text_config.num_experts_per_tok
            default = cls(
                {tier: crops for tier, crops in DEFAULT_TIER_CROPS.items() if crops[0] <= config.max_crops},
                range(max(1, most_experts // 2), most_experts + 1),
                range(max(1, total_blocks * 3 // 4), total_blocks + 1),
            )
        space = cls(
            default.tier_crops if tier_crops is None else dict(tier_crops),
            default.top_k if top_k is None else top_k,
            default.num_blocks if num_blocks is None else num_blocks,
        )
        if space.top_k[-1] > num_experts:
            raise ValueError(
                f"knob `top_k` has the value {space.top_k[-1]} but the executor has {num_experts} experts per block: "
                f"use values from 1 to {num_experts}."
            )
        if space.num_blocks[-1] > total_blocks:
            raise ValueError(
                f"knob `num_blocks` has the value {space.num_blocks[-1]} but the executor has {total_blocks} blocks: "
                f"use values from 1 to {total_blocks}."
            )
        for tier, (fewest, _) in space.tier_crops.items():
            if fewest > config.max_crops:
                raise ValueError(
                    f"tier '{tier}' starts at {fewest} crops but the executor takes {config.max_crops} at most: "
                    "leave the tier out or lower its range."
                )
        return space

    def action_tokens(self) -> list[str]:
        """Names of all actions, e.g. `tier=low`, `top_k=4`, `num_blocks=12`, grouped by knob, cheapest value first."""
        return [f"{knob}={value}" for knob, values in self.values.items() for value in values]


def build_action_tokenizer(space: KnobSpace) -> "PreTrainedTokenizerFast":
    """
    Word-level tokenizer of the controller's decisions: one token an action, so that a knob setting is a completion of
    three tokens that any TRL trainer can log and score.

    Ids are: `<pad>` 0, `<request>` 1 (stands for the prompt, and for everything that is not an action), then
    [`~KnobSpace.action_tokens`] in order from 2.

    Args:
        space ([`KnobSpace`]):
            The knob space.

    Returns:
        [`~transformers.PreTrainedTokenizerFast`]: decodes ids to e.g. `"tier=low top_k=4 num_blocks=12"`.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate([PAD_TOKEN, PROMPT_TOKEN, *space.action_tokens()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PROMPT_TOKEN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=PAD_TOKEN,
        unk_token=PROMPT_TOKEN,
        padding_side="left",
    )
