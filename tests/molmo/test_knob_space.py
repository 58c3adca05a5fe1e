"""The knob space of a Molmo: defaults, what a checkpoint says, what a caller asks for, and what it cannot do."""

import json

import pytest
from transformers import OlmoeConfig

from joint_controller import Knob, KnobSpace
from joint_controller.molmo import MolmoConfig
from joint_controller.molmo.knob_space import (
    DEFAULT_TIER_CROPS,
    build_knob_space,
    check_knob_space,
    molmo_knob_space,
    tier_crops_of,
)


ALL_TIERS = {"low": (1, 3), "medium": (4, 8), "high": (9, 15)}
SAVED = build_knob_space({"low": (1, 1), "high": (2, 4)}, top_k=(1, 8), num_blocks=(4, 16))


def executor_config(knob_space=None, max_crops=12):
    text_config = OlmoeConfig(num_hidden_layers=16, num_experts=64, num_experts_per_tok=8)
    return MolmoConfig(text_config=text_config, max_crops=max_crops, knob_space=knob_space)


def test_a_molmo_has_three_knobs_of_which_the_tier_is_decided_first():
    space = build_knob_space(ALL_TIERS, (4, 8), (12, 16))
    assert space.names == ("tier", "top_k", "num_blocks")
    assert space.decided_by(1) == (0,) and space.decided_by(2) == (1, 2)
    assert tier_crops_of(space) == ALL_TIERS and list(tier_crops_of(space)) == list(ALL_TIERS)
    assert [space["tier"].meaning(tier) for tier in ("low", "high")] == [(1, 3), (9, 15)]
    assert all(knob.description.endswith(".") for knob in space.knobs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tier_crops": {}}, "knob `tier` has no values"),
        ({"tier_crops": {"tiny": (1, 3)}}, r"unknown values \['tiny'\]"),
        ({"tier_crops": {"low": (3, 1)}}, r"'low' has the crop range \(3, 1\): give \[fewest, most\]"),
        ({"tier_crops": {"low": (0, 1)}}, r"'low' has the crop range \(0, 1\)"),
        ({"tier_crops": {"low": (1, 2, 3)}}, r"'low' has the crop range \(1, 2, 3\)"),
        ({"tier_crops": {"low": 3}}, "'low' has the crop range 3"),
        ({"tier_crops": {"low": (1, 2.5)}}, r"'low' has the crop range \(1, 2.5\)"),
        (
            {"tier_crops": {"low": (1, 4), "high": (4, 9)}},
            "'high' starts at 4 crops but a cheaper tier already reaches 4",
        ),
        ({"tier_crops": {"low": (4, 8), "medium": (1, 3)}}, "'medium' starts at 1 crops but a cheaper tier"),
        (
            {"tier_crops": {"medium": (4, 8), "low": (1, 3)}},
            r"lists \['medium', 'low'\]: name the tiers cheapest first",
        ),
        ({"top_k": ()}, "knob `top_k` has no values"),
        ({"top_k": 4}, "knob `top_k` must be a list of values, got 4"),
        ({"top_k": (0, 1)}, r"knob `top_k` has the values \[0, 1\]: all must be integers of 1 or more"),
        ({"top_k": (1.0,)}, r"knob `top_k` has the values \[1.0\]: all must be integers of 1 or more"),
        ({"top_k": (True,)}, r"knob `top_k` has the values \[True\]"),
        ({"num_blocks": ("12",)}, r"knob `num_blocks` has the values \['12'\]: all must be integers of 1 or more"),
        ({"num_blocks": (16, 12)}, "list each once, smallest first"),
        ({"num_blocks": (12, 12)}, "list each once, smallest first"),
    ],
)
def test_values_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        build_knob_space(**{"tier_crops": ALL_TIERS, "top_k": (4, 8), "num_blocks": (12, 16), **changes})


def test_defaults_of_a_checkpoint_are_those_of_the_published_profiling_tables():
    space = molmo_knob_space(executor_config())
    assert space == build_knob_space(DEFAULT_TIER_CROPS, (4, 5, 6, 7, 8), (12, 13, 14, 15, 16))
    assert list(tier_crops_of(molmo_knob_space(executor_config(max_crops=8)))) == ["low", "medium"]


def test_values_that_are_asked_for_come_before_those_of_the_checkpoint():
    config = executor_config(json.loads(json.dumps(SAVED.to_dict(), sort_keys=True)))
    assert molmo_knob_space(config) == SAVED
    assert molmo_knob_space(config, {"top_k": [2]}) == build_knob_space(tier_crops_of(SAVED), (2,), (4, 16))
    # A tier's crops are those of the checkpoint, else the defaults.
    tiers = molmo_knob_space(config, {"tier": ["high"]}), molmo_knob_space(executor_config(), {"tier": ["high"]})
    assert [tier_crops_of(space) for space in tiers] == [{"high": (2, 4)}, {"high": (9, 15)}]
    assert tier_crops_of(molmo_knob_space(config, {"tier": ["medium"]})) == {"medium": (4, 8)}


def test_values_of_flags_are_read_in_the_type_of_their_knob():
    asked = {"tier": ["low", "medium"], "top_k": ["1", "64"], "num_blocks": ["9"]}
    expected = build_knob_space({"low": (1, 3), "medium": (4, 8)}, (1, 64), (9,))
    assert molmo_knob_space(executor_config(), asked) == expected
    assert molmo_knob_space(executor_config(), {"top_k": 3})["top_k"].values == (3,)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"top_k": [65]},
            "`top_k` has the value 65 but the executor has 64 experts per block: use values from 1 to 64",
        ),
        ({"num_blocks": ["17"]}, "`num_blocks` has the value 17 but the executor has 16 blocks"),
        ({"top_k": ["many"]}, "`top_k` takes values of the type int32, got 'many'"),
        ({"top_k": ["0"]}, r"`top_k` has the values \[0\]: all must be integers of 1 or more"),
        ({"top_k": [1.5]}, r"`top_k` has the values \[1.5\]: all must be integers of 1 or more"),
        ({"top_k": []}, "`top_k` has no values"),
        ({"tier": []}, "`tier` has no values"),
        ({"tier": ["low", "best"]}, r"`tier` has unknown values \['best'\]: choose from \['low', 'medium', 'high'\]"),
        ({"tier": ["low", "low"]}, r"`tier` has the values \['low', 'low'\]: list each once"),
        ({"tier": ["medium", "low"]}, "name the tiers cheapest first"),
        ({"depth": [4]}, "there is no knob `depth`: the executor has tier, top_k, num_blocks"),
    ],
)
def test_values_beyond_the_checkpoint_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        molmo_knob_space(executor_config(), values)


def test_tiers_that_overlap_because_one_is_the_default_are_refused():
    config = executor_config(build_knob_space({"low": (1, 5), "high": (6, 12)}, (8,), (16,)).to_dict())
    with pytest.raises(ValueError, match="'medium' starts at 4 crops but a cheaper tier already reaches 5"):
        molmo_knob_space(config, {"tier": ["low", "medium"]})


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (
            build_knob_space({"low": (1, 3), "high": (13, 15)}, (8,), (16,)),
            "'high' starts at 13 crops but the executor",
        ),
        (build_knob_space(ALL_TIERS, (8, 65), (16,)), "`top_k` has the value 65 but"),
        (KnobSpace([Knob("tier", ("low",), 1, [[1, 3]])]), "has the knobs tier, top_k, num_blocks .* got tier"),
        (KnobSpace([*SAVED.knobs[::-1]]), "in this order, got num_blocks, top_k, tier: it is .* another executor"),
        (KnobSpace([Knob("tier", ("low",), 1), *SAVED.knobs[1:]]), "'low' has the crop range 'low'"),
        (KnobSpace([Knob("tier", ("low",), 2, [[1, 3]]), *SAVED.knobs[1:]]), "`tier` is decided by stage 2"),
    ],
)
def test_a_space_that_is_none_of_this_checkpoint_is_refused_wherever_it_comes_from(saved, message):
    with pytest.raises(ValueError, match=message):
        check_knob_space(saved, executor_config())
    with pytest.raises(ValueError, match=message):
        molmo_knob_space(executor_config(saved.to_dict()))


def test_the_space_of_an_earlier_version_is_refused():
    config = executor_config({"tier_crops": {"low": [1, 3]}, "top_k": [4], "num_blocks": [12]})
    with pytest.raises(ValueError, match="earlier version of this package"):
        molmo_knob_space(config)
