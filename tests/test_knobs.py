"""Knob spaces, settings and action tokens, checked against enumeration."""

import itertools
import json
import subprocess
import sys

import pytest
from transformers import AutoTokenizer, OlmoeConfig

from joint_controller import KnobSetting, KnobSpace, MolmoConfig
from joint_controller.knobs import DEFAULT_TIER_CROPS, PAD_TOKEN, PROMPT_TOKEN, build_action_tokenizer


ALL_TIERS = {"low": (1, 3), "medium": (4, 8), "high": (9, 15)}
SPACES = [
    KnobSpace(tier_crops, top_k, num_blocks)
    for tier_crops in ({"medium": (2, 2)}, {"low": (1, 1), "high": (5, 9)}, ALL_TIERS)
    for top_k in ((1,), (2, 4, 8))
    for num_blocks in ((7,), (12, 13, 16))
]


@pytest.mark.parametrize("space", SPACES, ids=lambda space: str(space.sizes))
def test_a_space_enumerates_every_combination_once_with_the_last_knob_fastest(space):
    expected = [
        KnobSetting(tier, top_k, num_blocks)
        for tier in space.tier_crops
        for top_k in space.top_k
        for num_blocks in space.num_blocks
    ]
    assert list(space) == expected
    assert len(space) == len(expected) == len(set(expected))
    assert space.sizes == (len(space.tier_crops), len(space.top_k), len(space.num_blocks))
    assert space.cheapest == expected[0] and space.full == expected[-1]
    assert all(setting in space for setting in expected)


@pytest.mark.parametrize("space", SPACES, ids=lambda space: str(space.sizes))
def test_indices_and_settings_are_inverse(space):
    positions = list(itertools.product(*(range(size) for size in space.sizes)))
    assert [space.indices(setting) for setting in space] == positions
    assert [space.setting(position) for position in positions] == list(space)


@pytest.mark.parametrize("space", SPACES, ids=lambda space: str(space.sizes))
def test_normalized_knobs_rise_from_0_to_1_in_equal_steps(space):
    assert space.normalized(space.cheapest) == (0.0, 0.0, 0.0)
    for setting in space:
        for value, index, size in zip(space.normalized(setting), space.indices(setting), space.sizes, strict=True):
            assert value == (0.0 if size == 1 else index / (size - 1))
    assert space.normalized(space.full) == tuple(float(size > 1) for size in space.sizes)


@pytest.mark.parametrize("space", SPACES, ids=lambda space: str(space.sizes))
def test_a_space_survives_json_and_is_a_key(space):
    for sort_keys in (False, True):
        read = KnobSpace.from_dict(json.loads(json.dumps(space.to_dict(), sort_keys=sort_keys)))
        assert read == space
        assert hash(read) == hash(space)
        assert list(read) == list(space)
    assert len({*SPACES, space}) == len(SPACES)


def test_what_is_not_in_the_space_has_no_indices():
    space = KnobSpace({"low": (1, 3), "high": (9, 15)}, (4, 8), (12, 16))
    for setting in (KnobSetting("medium", 4, 12), KnobSetting("low", 5, 12), KnobSetting("low", 4, 13)):
        assert setting not in space
        for method in (space.indices, space.normalized):
            with pytest.raises(ValueError, match=f"'{setting}' is outside the knob space"):
                method(setting)
    for position in ((2, 0, 0), (0, 0)):
        with pytest.raises((IndexError, ValueError)):
            space.setting(position)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tier_crops": {}}, "knob `tier` has no values"),
        ({"tier_crops": {"tiny": (1, 3)}}, r"unknown values \['tiny'\]"),
        ({"tier_crops": {"low": (3, 1)}}, r"'low' has the crop range \[3, 1\]"),
        ({"tier_crops": {"low": (0, 1)}}, r"'low' has the crop range \[0, 1\]"),
        ({"tier_crops": {"low": (1, 2, 3)}}, r"'low' has the crop range \[1, 2, 3\]"),
        (
            {"tier_crops": {"low": (1, 4), "high": (4, 9)}},
            "'high' starts at 4 crops but a cheaper tier already reaches 4",
        ),
        ({"tier_crops": {"low": (4, 8), "medium": (1, 3)}}, "'medium' starts at 1 crops but a cheaper tier"),
        ({"top_k": ()}, "knob `top_k` has no values"),
        ({"top_k": 4}, "knob `top_k` must be a list of integers, got 4"),
        ({"top_k": (0, 1)}, r"knob `top_k` has the values \[0, 1\]"),
        ({"top_k": (1.0,)}, r"knob `top_k` has the values \[1.0\]"),
        ({"top_k": (True,)}, r"knob `top_k` has the values \[True\]"),
        ({"num_blocks": ("12",)}, r"knob `num_blocks` has the values \['12'\]"),
        ({"num_blocks": (16, 12)}, "list each once, smallest first"),
        ({"num_blocks": (12, 12)}, "list each once, smallest first"),
    ],
)
def test_values_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        KnobSpace(**{"tier_crops": ALL_TIERS, "top_k": (4, 8), "num_blocks": (12, 16), **changes})


def test_a_dictionary_with_other_keys_is_refused():
    with pytest.raises(ValueError, match="got .'blocks', 'tier_crops', 'top_k'"):
        KnobSpace.from_dict({"tier_crops": ALL_TIERS, "top_k": [4], "blocks": [12]})


def executor_config(knob_space=None, max_crops=12):
    text_config = OlmoeConfig(num_hidden_layers=16, num_experts=64, num_experts_per_tok=8)
    return MolmoConfig(text_config=text_config, max_crops=max_crops, knob_space=knob_space)


def test_defaults_of_an_executor_are_those_of_the_published_profiling_tables():
    space = KnobSpace.from_executor_config(executor_config())
    assert space == KnobSpace(DEFAULT_TIER_CROPS, (4, 5, 6, 7, 8), (12, 13, 14, 15, 16))
    assert list(KnobSpace.from_executor_config(executor_config(max_crops=8)).tier_crops) == ["low", "medium"]


def test_values_given_come_before_those_of_the_checkpoint():
    saved = {"tier_crops": {"low": [1, 1], "high": [2, 4]}, "top_k": [1, 8], "num_blocks": [4, 16]}
    config = executor_config(saved)
    assert KnobSpace.from_executor_config(config).to_dict() == saved
    assert KnobSpace.from_executor_config(config, top_k=[2]).to_dict() == {**saved, "top_k": [2]}
    given = {"tier_crops": {"medium": [3, 3]}, "top_k": [64], "num_blocks": [1]}
    assert KnobSpace.from_executor_config(config, **given).to_dict() == given


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"top_k": [65]},
            "`top_k` has the value 65 but the executor has 64 experts per block: use values from 1 to 64",
        ),
        ({"num_blocks": [17]}, "`num_blocks` has the value 17 but the executor has 16 blocks"),
        ({"tier_crops": {"low": (1, 3), "high": (13, 15)}}, "'high' starts at 13 crops but the executor takes 12"),
        ({"top_k": []}, "`top_k` has no values"),
        ({"tier_crops": {}}, "`tier` has no values"),
    ],
)
def test_values_beyond_the_checkpoint_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        KnobSpace.from_executor_config(executor_config(), **values)


@pytest.mark.parametrize("space", SPACES, ids=lambda space: str(space.sizes))
def test_every_setting_is_three_action_tokens_and_back(space, tmp_path):
    tokenizer = build_action_tokenizer(space)
    actions = space.action_tokens()
    assert tokenizer.convert_tokens_to_ids([PAD_TOKEN, PROMPT_TOKEN, *actions]) == list(range(2 + sum(space.sizes)))
    assert len(tokenizer) == 2 + sum(space.sizes)
    starts = [2, 2 + space.sizes[0], 2 + space.sizes[0] + space.sizes[1]]
    for setting in space:
        ids = [start + index for start, index in zip(starts, space.indices(setting), strict=True)]
        assert tokenizer.decode(ids) == str(setting)
        assert tokenizer(str(setting))["input_ids"] == ids
    tokenizer.save_pretrained(tmp_path)
    read = AutoTokenizer.from_pretrained(tmp_path)
    assert read(str(space.full))["input_ids"] == tokenizer(str(space.full))["input_ids"]


def test_batches_of_actions_are_padded_on_the_left_and_other_text_is_the_request():
    tokenizer = build_action_tokenizer(KnobSpace({"low": (1, 3)}, (4,), (12,)))
    assert tokenizer(["what is it", "tier=low"], padding=True)["input_ids"] == [[1, 1, 1], [0, 0, 2]]


def test_importing_the_package_and_its_knobs_does_not_import_torch():
    code = (
        "import sys, joint_controller; joint_controller.KnobSpace({'low': (1, 3)}, (4,), (12,)); "
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == ["False", "False"]
