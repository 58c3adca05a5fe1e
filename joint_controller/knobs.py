"""
The knobs of a frozen executor: each is one definition, and everything that needs to know about knobs (the controller's
heads, action tokens, columns of tables, command-line flags) is derived from the [`KnobSpace`] that holds them.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


PAD_TOKEN = "<pad>"
PROMPT_TOKEN = "<request>"

STAGES = (1, 2)
"""Stages that decide knobs: 1 before any image work, 2 after the vision tower."""

KnobValue = str | int | float


class KnobSetting(Mapping[str, KnobValue]):
    """
    One value for each knob (or, between the two stages, for some): an immutable, hashable mapping.

    Args:
        values (`Mapping[str, KnobValue]`, *optional*):
            Value of each knob by name.
        **knobs:
            The same, by keyword.

    Example:

    ```python
    >>> setting = KnobSetting(tier="low", depth=4)
    >>> setting["depth"], str(setting)
    (4, 'tier=low depth=4')
    ```
    """

    __slots__ = ("_values", "_hash")

    def __init__(self, values: Mapping[str, KnobValue] | None = None, /, **knobs: KnobValue):
        self._values = {**(values or {}), **knobs}
        self._hash = hash(frozenset(self._values.items()))

    def __getitem__(self, name: str) -> KnobValue:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KnobSetting) and self._values == other._values

    def __lt__(self, other: "KnobSetting") -> bool:
        return tuple(self._values.values()) < tuple(other._values.values())

    def __reduce__(self):
        return KnobSetting, (self._values,)

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self._values.items())

    def __repr__(self) -> str:
        return f"KnobSetting({', '.join(f'{name}={value!r}' for name, value in self._values.items())})"


@dataclass(frozen=True)
class Knob:
    """
    One knob.

    Args:
        name (`str`):
            A Python identifier: it names columns, action tokens and the controller's heads.
        values (`tuple[KnobValue, ...]`):
            Values, cheapest first: all strings, all integers or all floats.
        stage (`int`):
            Stage that decides it: 1 from question and budget, before any image work; 2 with the image seen.
        meanings (`tuple`, *optional*):
            What each value stands for in the executor's own terms, e.g. the range of crops of each image tier: numbers,
            strings, or sequences of these. Nothing but the executor looks at it. By default a value speaks for itself.
        description (`str`, *optional*, defaults to `""`):
            What it sets, in a few words: for help texts and cards.

    Raises:
        ValueError: If the name is not an identifier, there is no value, values are of several types, repeat, descend or
            cannot be part of a token, the stage is unknown, or there is not one meaning for each value.
    """

    name: str
    values: tuple[KnobValue, ...]
    stage: int
    meanings: tuple | None = None
    description: str = field(default="", compare=False)

    def __post_init__(self):
        if not isinstance(self.name, str) or not self.name.isidentifier():
            raise ValueError(f"a knob is named {self.name!r}: give a name of letters, digits and underscores.")
        if isinstance(self.values, str | int | float):
            raise ValueError(f"knob `{self.name}` must be a list of values, got {self.values!r}.")
        values = tuple(self.values)
        object.__setattr__(self, "values", values)
        if not values:
            raise ValueError(f"knob `{self.name}` has no values: give at least one.")
        if len({type(value) for value in values}) > 1 or type(values[0]) not in _DTYPES:
            raise ValueError(
                f"knob `{self.name}` has the values {list(values)}: all must be strings, all integers or all floats."
            )
        if isinstance(values[0], str):
            unwritable = [
                value for value in values if not value or "=" in value or "," in value or value.split() != [value]
            ]
            if unwritable:
                raise ValueError(
                    f"knob `{self.name}` has the value {unwritable[0]!r}: give words without blanks, '=' and ','."
                )
            if len(set(values)) < len(values):
                raise ValueError(f"knob `{self.name}` has the values {list(values)}: list each once, cheapest first.")
        elif not all(math.isfinite(value) for value in values) or any(
            low >= high for low, high in itertools.pairwise(values)
        ):
            raise ValueError(f"knob `{self.name}` has the values {list(values)}: list each once, smallest first.")
        if self.stage not in STAGES or isinstance(self.stage, bool):
            raise ValueError(f"knob `{self.name}` is decided by stage {self.stage!r}: stages are 1 and 2.")
        if self.meanings is not None:
            object.__setattr__(self, "meanings", _frozen(self.meanings))
            if len(self.meanings) != len(values):
                raise ValueError(
                    f"knob `{self.name}` has {len(values)} values but {len(self.meanings)} meanings: give one for each."
                )

    def __len__(self) -> int:
        return len(self.values)

    @property
    def dtype(self) -> str:
        """Type of its columns in tables: `"string"`, `"int32"` or `"float64"`."""
        return _DTYPES[type(self.values[0])]

    def meaning(self, value: KnobValue) -> Any:
        """What a value stands for in the executor's terms; the value itself where no meanings are given."""
        return value if self.meanings is None else self.meanings[self.values.index(value)]

    def restrict(self, values: Sequence[KnobValue]) -> "Knob":
        """
        The knob with some of its values, in its own order.

        Raises:
            ValueError: If a value is not one of its own.
        """
        unknown = [value for value in values if value not in self.values]
        if unknown:
            raise ValueError(f"knob `{self.name}` has no value {unknown[0]!r}: choose from {list(self.values)}.")
        kept = tuple(value for value in self.values if value in values)
        meanings = None if self.meanings is None else tuple(map(self.meaning, kept))
        return Knob(self.name, kept, self.stage, meanings, self.description)

    def parse(self, text: str) -> KnobValue:
        """
        A value as a flag gives it, in the knob's type.

        Raises:
            ValueError: If the text is not of that type.
        """
        try:
            return type(self.values[0])(text)
        except ValueError as error:
            raise ValueError(f"knob `{self.name}` takes values of the type {self.dtype}, got {text!r}.") from error

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "values": list(self.values),
            "stage": self.stage,
            "meanings": _thawed(self.meanings),
            "description": self.description,
        }


_DTYPES = {str: "string", int: "int32", float: "float64"}


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _thawed(value: Any) -> Any:
    return list(map(_thawed, value)) if isinstance(value, tuple) else value


class KnobSpace:
    """
    The knobs of an executor, and so the settings that a controller chooses from. Immutable, hashable, JSON-friendly.

    Args:
        knobs (`Sequence[Knob]`):
            One or more knobs, in any order: that of columns, action tokens and [`KnobSetting`]s.

    Raises:
        ValueError: If there is no knob, or two have one name.

    Example:

    ```python
    >>> space = KnobSpace([Knob("tier", ("low", "high"), stage=1), Knob("depth", (4, 8), stage=2)])
    >>> len(space), str(space.cheapest)
    (4, 'tier=low depth=4')
    ```
    """

    def __init__(self, knobs: Sequence[Knob]):
        self.knobs = tuple(knobs)
        if not self.knobs:
            raise ValueError("a knob space has no knobs: give at least one.")
        repeated = [name for name in self.names if self.names.count(name) > 1]
        if repeated:
            raise ValueError(f"a knob space has two knobs named `{repeated[0]}`: give each a name of its own.")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KnobSpace) and self.knobs == other.knobs

    def __hash__(self) -> int:
        return hash(self.knobs)

    def __repr__(self) -> str:
        return f"KnobSpace({list(self.knobs)})"

    def __str__(self) -> str:
        return ", ".join(f"{name} {list(values)}" for name, values in self.values.items())

    def __len__(self) -> int:
        return math.prod(self.sizes)

    def __iter__(self) -> Iterator[KnobSetting]:
        """All settings, the last knob moving fastest."""
        return iter(self.settings)

    def __contains__(self, setting: KnobSetting) -> bool:
        return setting in self._positions

    def __getitem__(self, name: str) -> Knob:
        return self.knobs[self.names.index(name)]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the knobs, in order."""
        return tuple(knob.name for knob in self.knobs)

    @cached_property
    def values(self) -> dict[str, tuple[KnobValue, ...]]:
        """Values of each knob by name, cheapest first."""
        return {knob.name: knob.values for knob in self.knobs}

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of values of each knob."""
        return tuple(map(len, self.knobs))

    @cached_property
    def settings(self) -> tuple[KnobSetting, ...]:
        """All settings, the last knob moving fastest: the first is the cheapest, the last the full one."""
        products = itertools.product(*self.values.values())
        return tuple(KnobSetting(dict(zip(self.names, values, strict=True))) for values in products)

    @cached_property
    def _positions(self) -> dict[KnobSetting, int]:
        return {setting: position for position, setting in enumerate(self.settings)}

    @property
    def cheapest(self) -> KnobSetting:
        """The lowest value of every knob."""
        return self.settings[0]

    @property
    def full(self) -> KnobSetting:
        """The highest value of every knob."""
        return self.settings[-1]

    def decided_by(self, stage: int) -> tuple[int, ...]:
        """Positions (in the order of the knobs) of those that a stage decides."""
        return tuple(position for position, knob in enumerate(self.knobs) if knob.stage == stage)

    def index(self, setting: KnobSetting) -> int:
        """
        Position of a setting among [`~KnobSpace.settings`].

        Raises:
            ValueError: If the setting is not in the space.
        """
        if setting not in self._positions:
            raise ValueError(f"setting '{setting}' is outside the knob space ({self}).")
        return self._positions[setting]

    def indices(self, setting: KnobSetting) -> tuple[int, ...]:
        """
        Position of each of the setting's values among the values of its knob.

        Raises:
            ValueError: If the setting is not in the space.
        """
        self.index(setting)
        return tuple(knob.values.index(setting[knob.name]) for knob in self.knobs)

    def setting(self, indices: Sequence[int]) -> KnobSetting:
        """The setting with these positions of values: the inverse of [`~KnobSpace.indices`]."""
        chosen = zip(self.knobs, indices, strict=True)
        return KnobSetting({knob.name: knob.values[index] for knob, index in chosen})

    def normalized(self, setting: KnobSetting) -> tuple[float, ...]:
        """Each knob of the setting on a scale from 0 (cheapest value) to 1 (highest value); 0 for a one-valued knob."""
        return self._normalized[self.index(setting)]

    @cached_property
    def _normalized(self) -> tuple[tuple[float, ...], ...]:
        scales = [[index / max(size - 1, 1) for index in range(size)] for size in self.sizes]
        return tuple(itertools.product(*scales))

    def restrict(self, values: Mapping[str, Sequence[KnobValue]]) -> "KnobSpace":
        """
        The space with fewer values of some knobs.

        Args:
            values (`Mapping[str, Sequence[KnobValue]]`):
                Values to keep, by name of the knob; knobs that are not named keep all.

        Raises:
            ValueError: If there is no such knob, or a knob has no such value.
        """
        self.check_names(values)
        return KnobSpace([knob.restrict(values[knob.name]) if knob.name in values else knob for knob in self.knobs])

    def check_names(self, names: Sequence[str] | Mapping[str, Any]) -> None:
        """
        Refuses names that no knob has.

        Raises:
            ValueError: If there is no knob of a name.
        """
        unknown = [name for name in names if name not in self.names]
        if unknown:
            raise ValueError(f"there is no knob `{unknown[0]}`: the executor has {', '.join(self.names)}.")

    def to_dict(self) -> dict[str, Any]:
        """JSON-friendly form, read back by [`~KnobSpace.from_dict`]."""
        return {"knobs": [knob.to_dict() for knob in self.knobs]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "KnobSpace":
        """
        Builds a knob space from the output of [`~KnobSpace.to_dict`].

        Raises:
            ValueError: If it is something else.
        """
        if (
            not isinstance(values, Mapping)
            or set(values) != {"knobs"}
            or not isinstance(values["knobs"], list | tuple)
        ):
            raise ValueError(
                f"a knob space is a list of `knobs`, got {dict(values) if isinstance(values, Mapping) else values!r}: one "
                "of an earlier version of this package has to be made anew with the command that wrote it."
            )
        known = {"name", "values", "stage", "meanings", "description"}
        for knob in values["knobs"]:
            if not isinstance(knob, Mapping) or not {"name", "values", "stage"} <= set(knob) <= known:
                raise ValueError(
                    f"a knob has a name, values and a stage (and perhaps meanings, a description): got {knob!r}."
                )
        return cls([Knob(**knob) for knob in values["knobs"]])

    def action_tokens(self) -> list[str]:
        """Names of all actions, e.g. `tier=low`, `depth=4`, grouped by knob, cheapest value first."""
        return [f"{name}={value}" for name, values in self.values.items() for value in values]


def parse_knob_values(arguments: Mapping[str, Any] | Sequence[str] | None) -> dict[str, list[Any]]:
    """
    Values of knobs as flags and recipes give them: `["tier=low,high", "depth=4,8"]`, or a mapping of name to values.

    Args:
        arguments (`Mapping[str, Any]` or `Sequence[str]`, *optional*):
            As a flag or a recipe gives it. Values of a flag stay strings, which [`Knob.parse`] reads.

    Returns:
        `dict[str, list]`: values by name of the knob.

    Raises:
        ValueError: If an entry is not of the form `name=value,value`, or names a knob twice.
    """
    if arguments is None:
        return {}
    if isinstance(arguments, Mapping):
        return {
            name: list(values) if isinstance(values, list | tuple) else [values] for name, values in arguments.items()
        }
    chosen: dict[str, list[Any]] = {}
    for argument in arguments:
        name, separator, values = str(argument).partition("=")
        if not separator or not values or name in chosen:
            raise ValueError(
                f'`knob_values` has {argument!r}: give each knob once, as name=value,value (e.g. "{name}=a,b").'
            )
        chosen[name] = values.split(",")
    return chosen


def build_action_tokenizer(space: KnobSpace) -> "PreTrainedTokenizerFast":
    """
    Word-level tokenizer of the controller's decisions: one token an action, so that a knob setting is a completion of as
    many tokens as there are knobs, which any TRL trainer can log and score.

    Ids are: `<pad>` 0, `<request>` 1 (stands for the prompt, and for everything that is not an action), then
    [`~KnobSpace.action_tokens`] in order from 2.

    Args:
        space ([`KnobSpace`]):
            The knob space.

    Returns:
        [`~transformers.PreTrainedTokenizerFast`]: decodes ids to e.g. `"tier=low depth=4"`.
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
