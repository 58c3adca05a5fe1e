"""Knobs, spaces, settings and action tokens, checked against enumeration."""

import itertools
import json
import pickle
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from joint_controller import Knob, KnobSetting, KnobSpace
from joint_controller.knobs import PAD_TOKEN, PROMPT_TOKEN, build_action_tokenizer, parse_knob_values


TIER = Knob("tier", ("low", "medium", "high"), stage=1, meanings=[[1, 3], [4, 8], [9, 15]])
SPACES = [
    KnobSpace([TIER, Knob("depth", (4, 8), stage=2), Knob("width", (1, 2, 3), stage=2)]),
    KnobSpace([Knob("only", ("one",), stage=1)]),
    # Any number, in any order, of any types.
    KnobSpace(
        [
            Knob("threshold", (0.25, 0.5, 1.0), stage=2),
            Knob("resolution", (224, 336), stage=1),
            Knob("kind", ("a", "b"), stage=1),
            Knob("single", (7,), stage=2),
        ]
    ),
]
each_space = pytest.mark.parametrize("space", SPACES, ids=lambda space: str(space.sizes))


@each_space
def test_a_space_holds_the_product_of_its_values(space):
    expected = [dict(zip(space.names, values, strict=True)) for values in itertools.product(*space.values.values())]
    assert [dict(setting) for setting in space] == expected
    assert len(space) == len(expected) == len(set(space))
    assert space.sizes == tuple(map(len, space.values.values()))
    assert dict(space.cheapest) == expected[0] and dict(space.full) == expected[-1]
    assert all(KnobSetting(values) in space for values in expected)
    assert [space.index(setting) for setting in space] == list(range(len(space)))


@each_space
def test_indices_and_settings_are_inverse(space):
    positions = list(itertools.product(*(range(size) for size in space.sizes)))
    assert [space.indices(setting) for setting in space] == positions
    assert [space.setting(position) for position in positions] == list(space)


@each_space
def test_normalized_knobs_rise_from_0_to_1_in_equal_steps(space):
    assert space.normalized(space.cheapest) == (0.0,) * len(space.names)
    for setting in space:
        for value, index, size in zip(space.normalized(setting), space.indices(setting), space.sizes, strict=True):
            assert value == (0.0 if size == 1 else index / (size - 1))
    assert space.normalized(space.full) == tuple(float(size > 1) for size in space.sizes)


@each_space
def test_a_space_survives_json_and_is_a_key(space):
    for sort_keys in (False, True):
        read = KnobSpace.from_dict(json.loads(json.dumps(space.to_dict(), sort_keys=sort_keys)))
        assert read == space and hash(read) == hash(space) and list(read) == list(space)
    assert len({*SPACES, space}) == len(SPACES)


@each_space
def test_the_stages_decide_all_knobs_once(space):
    assert sorted([*space.decided_by(1), *space.decided_by(2)]) == list(range(len(space.names)))
    for stage in (1, 2):
        assert all(space.knobs[position].stage == stage for position in space.decided_by(stage))


def test_spaces_differ_by_what_values_mean_but_not_by_how_they_are_described():
    described = Knob("tier", TIER.values, 1, TIER.meanings, "how finely the image is cut")
    assert KnobSpace([described]) == KnobSpace([TIER])
    assert KnobSpace([Knob("tier", TIER.values, 1, [[1, 3], [4, 8], [9, 12]])]) != KnobSpace([TIER])
    assert TIER.meaning("medium") == (4, 8)
    assert Knob("depth", (4, 8), stage=2).meaning(8) == 8


def test_a_setting_is_an_immutable_mapping_whose_order_does_not_matter():
    setting = KnobSetting(tier="low", depth=4)
    assert setting == KnobSetting({"depth": 4, "tier": "low"}) and hash(setting) == hash(
        KnobSetting(depth=4, tier="low")
    )
    assert setting != KnobSetting(tier="low", depth=8) and setting != KnobSetting(tier="low")
    assert (dict(setting), str(setting)) == ({"tier": "low", "depth": 4}, "tier=low depth=4")
    assert eval(repr(setting)) == setting and pickle.loads(pickle.dumps(setting)) == setting
    assert sorted([KnobSetting(tier="low", depth=8), setting]) == [setting, KnobSetting(tier="low", depth=8)]
    with pytest.raises(TypeError):
        setting["tier"] = "high"
    with pytest.raises(KeyError):
        setting["width"]


def test_what_is_not_in_the_space_has_no_indices():
    space = SPACES[0]
    for setting in (
        KnobSetting(tier="tiny", depth=4, width=1),
        KnobSetting(tier="low", depth=5, width=1),
        KnobSetting(tier="low", depth=4),
        KnobSetting(tier="low", depth=4, width=1, more=1),
    ):
        assert setting not in space
        for method in (space.index, space.indices, space.normalized):
            with pytest.raises(ValueError, match=f"'{setting}' is outside the knob space"):
                method(setting)
    for position in ((3, 0, 0), (0, 0)):
        with pytest.raises((IndexError, ValueError)):
            space.setting(position)


def test_a_restricted_space_keeps_the_order_and_the_meanings_of_its_values():
    space = SPACES[0].restrict({"tier": ["high", "low"], "width": [2]})
    assert space.values == {"tier": ("low", "high"), "depth": (4, 8), "width": (2,)}
    assert space["tier"].meanings == ((1, 3), (9, 15))
    with pytest.raises(ValueError, match=r"knob `depth` has no value 5: choose from \[4, 8\]"):
        SPACES[0].restrict({"depth": [5]})
    with pytest.raises(ValueError, match="there is no knob `height`: the executor has tier, depth, width"):
        SPACES[0].restrict({"height": [5]})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "two words"}, "a knob is named 'two words'"),
        ({"values": ()}, "knob `depth` has no values"),
        ({"values": 4}, "knob `depth` must be a list of values, got 4"),
        ({"values": "low"}, "knob `depth` must be a list of values, got 'low'"),
        ({"values": (1, 2.0)}, "all must be strings, all integers or all floats"),
        ({"values": (True,)}, "all must be strings, all integers or all floats"),
        ({"values": (None,)}, "all must be strings, all integers or all floats"),
        ({"values": (16, 12)}, "list each once, smallest first"),
        ({"values": (12, 12)}, "list each once, smallest first"),
        ({"values": (0.5, float("nan"))}, "list each once, smallest first"),
        ({"values": ("a", "a")}, "list each once, cheapest first"),
        ({"values": ("a b",)}, "'a b': give words without blanks"),
        ({"values": ("a=b",)}, "'a=b': give words without blanks"),
        ({"values": ("",)}, "'': give words without blanks"),
        ({"stage": 3}, "is decided by stage 3: stages are 1 and 2"),
        ({"meanings": [[1, 2]]}, "has 2 values but 1 meanings"),
    ],
)
def test_a_knob_that_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Knob(**{"name": "depth", "values": (4, 8), "stage": 2, **arguments})


def test_a_space_that_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="a knob space has no knobs"):
        KnobSpace([])
    with pytest.raises(ValueError, match="two knobs named `tier`"):
        KnobSpace([TIER, TIER])
    with pytest.raises(ValueError, match="one of an earlier version of this package has to be made anew"):
        KnobSpace.from_dict({"tier_crops": {"low": [1, 3]}, "depth": [4]})
    with pytest.raises(ValueError, match="a knob has a name, values and a stage"):
        KnobSpace.from_dict({"knobs": [{"name": "depth", "values": [4]}]})


def test_values_come_from_flags_and_recipes_alike():
    assert parse_knob_values(None) == {}
    assert parse_knob_values(["tier=low,high", "depth=4"]) == {"tier": ["low", "high"], "depth": ["4"]}
    assert parse_knob_values({"tier": ["low", "high"], "depth": 4}) == {"tier": ["low", "high"], "depth": [4]}
    assert [SPACES[0]["depth"].parse("8"), SPACES[2]["threshold"].parse("0.5"), TIER.parse("low")] == [8, 0.5, "low"]
    for wrong in (["tier"], ["tier="], ["tier=low", "tier=high"]):
        with pytest.raises(ValueError, match="give each knob once, as name=value,value"):
            parse_knob_values(wrong)
    with pytest.raises(ValueError, match="knob `depth` takes values of the type int32, got 'four'"):
        SPACES[0]["depth"].parse("four")


@each_space
def test_every_setting_is_one_action_token_a_knob_and_back(space, tmp_path):
    tokenizer = build_action_tokenizer(space)
    actions = space.action_tokens()
    assert tokenizer.convert_tokens_to_ids([PAD_TOKEN, PROMPT_TOKEN, *actions]) == list(range(2 + sum(space.sizes)))
    assert len(tokenizer) == 2 + sum(space.sizes)
    starts = [2 + sum(space.sizes[:knob]) for knob in range(len(space.sizes))]
    for setting in space:
        ids = [start + index for start, index in zip(starts, space.indices(setting), strict=True)]
        assert tokenizer.decode(ids) == str(setting)
        assert tokenizer(str(setting))["input_ids"] == ids
    tokenizer.save_pretrained(tmp_path)
    read = AutoTokenizer.from_pretrained(tmp_path)
    assert read(str(space.full))["input_ids"] == tokenizer(str(space.full))["input_ids"]


def test_batches_of_actions_are_padded_on_the_left_and_other_text_is_the_request():
    tokenizer = build_action_tokenizer(KnobSpace([Knob("tier", ("low",), stage=1)]))
    assert tokenizer(["what is it", "tier=low"], padding=True)["input_ids"] == [[1, 1, 1], [0, 0, 2]]


def test_importing_the_package_and_its_knobs_does_not_import_torch():
    code = (
        "import sys, joint_controller as jc; jc.KnobSpace([jc.Knob('tier', ('low',), 1)]); "
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == ["False", "False"]
