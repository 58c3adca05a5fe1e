"""The table of measurements: what may be unknown, what is refused."""

import json

import pyarrow
import pytest
from pyarrow import parquet

from joint_controller.latency import load_profile, make_profile, save_profile
from joint_controller.latency.profile_table import (
    MACHINE_COLUMNS,
    PROFILE_FILE,
    UNKNOWN,
    ProfileSchema,
    check_one_machine,
)
from joint_controller.molmo.knob_space import build_knob_space


SPACE = build_knob_space({"low": (1, 3), "high": (9, 15)}, top_k=(4, 8), num_blocks=(12, 16))


def known(**changes):
    """What a measurement of the model that was made elsewhere knows at least."""
    row = {"sample_id": "made/0", "tier": "low", "top_k": 4, "num_blocks": 12, "num_views": 2, "vision_tokens": 300}
    row |= {"text_tokens": 20, "output_tokens": 4, "vision_ms": 30.0, "llm_prefill_ms": 90.0}
    row |= dict.fromkeys(MACHINE_COLUMNS, UNKNOWN) | {"latency_scope": "model"}
    return row | {"executor_type": "molmo", "knob_space": json.dumps(SPACE.to_dict())} | changes


def test_what_is_unknown_is_null_or_says_so(tmp_path):
    profile = make_profile([known(), known(decode_ms_per_token=13.4, decode_ms=[13.0, 13.4, 13.8])])
    schema = ProfileSchema.of(profile)
    assert profile.features == schema.features and schema.knob_space == SPACE
    unknown_times = ["overhead_ms", "controller_ms", "image_processing_ms", "decode_ms_per_token"]
    nullable = ["image_pixels", *unknown_times, "decode_ms", "request_ms", "model_ms", "prefill_lengths"]
    nullable += ["num_repeats", "repeats_disagree"]
    nullable += [f"{name}_spread" for name in (*unknown_times, "vision_ms", "llm_prefill_ms")]
    assert sorted(schema.nullable_columns) == sorted(nullable)
    for table in (profile, load_profile(save_profile(profile, tmp_path))):
        assert [table[0][column] for column in nullable] == [None] * len(nullable)
        assert table[1]["decode_ms"] == [13.0, 13.4, 13.8] and table[0]["device_name"] == "unknown"
        assert table.features == schema.features
    check_one_machine(profile)
    assert [path.name for path in tmp_path.iterdir()] == [PROFILE_FILE]


def whole(**changes):
    """What is known of a whole request."""
    row = {"image_pixels": 4096, "overhead_ms": 0.2, "controller_ms": 0.6, "image_processing_ms": 2.0}
    return known(latency_scope="request", **row) | changes


def test_whole_requests_know_all_stages():
    [row] = make_profile([whole(request_ms=[122.8, 123.0], model_ms=[120.0, 120.2])])
    assert row["request_ms"] == [122.8, 123.0] and row["decode_ms_per_token"] is None
    for name in ("image_pixels", "overhead_ms", "controller_ms", "image_processing_ms", "vision_ms"):
        with pytest.raises(ValueError, match=f"no `{name}` in row 0: every measurement needs one"):
            make_profile([whole(**{name: None})])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (known(num_views=None), r"no `num_views` in row 1: every measurement needs one\.$"),
        (known(driver_version=None), "no `driver_version` in row 1: .* Give 'unknown' where it is not known"),
        (known(tier="medium"), r"`tier` medium in row 1: its knob space has \['low', 'high'\]"),
        (known(top_k=5), r"`top_k` 5 in row 1: its knob space has \[4, 8\]"),
        (known(num_blocks=None), "no `num_blocks` in row 1"),
        (known(vision_ms=0.0), "`vision_ms` 0.0 in row 1: it must be above 0"),
        (known(llm_prefill_ms=float("nan")), "`llm_prefill_ms` nan in row 1"),
        (known(decode_ms_per_token=-1.0), "`decode_ms_per_token` -1.0 in row 1"),
        (known(speed=3), r"unknown columns \['speed'\] in row 1"),
    ],
)
def test_rows_that_are_no_measurement_are_refused(row, message):
    with pytest.raises(ValueError, match=message):
        make_profile([known(), row])
    with pytest.raises(ValueError, match="holds no measurement"):
        make_profile([])


@pytest.mark.parametrize("column", ["executor_type", "knob_space", "latency_scope"])
def test_the_executor_must_be_known(column):
    for value in (None, UNKNOWN):
        with pytest.raises(ValueError, match=f"has no `{column}` in row 0: every measurement needs one"):
            make_profile([known(**{column: value})])
    with pytest.raises(ValueError, match="no executor for models of the type 'abacus'"):
        make_profile([known(executor_type="abacus")])
    with pytest.raises(ValueError, match="has a machine column that is not JSON"):
        make_profile([known(knob_space="tier")])
    with pytest.raises(ValueError, match="`latency_scope` is 'everything': choose from 'request', 'model'"):
        make_profile([known(latency_scope="everything")])


def test_stages_that_are_not_predicted_have_columns(tmp_path):
    profile = make_profile([known(), known(image_processing_ms=3.5, image_processing_ms_spread=0.1)])
    assert profile["image_processing_ms"][:] == [None, 3.5]
    assert load_profile(save_profile(profile, tmp_path))["image_processing_ms"][:] == [None, 3.5]
    with pytest.raises(ValueError, match="`image_processing_ms` 0.0 in row 0"):
        make_profile([known(image_processing_ms=0.0)])


def test_files_of_an_earlier_version_are_refused(tmp_path):
    table = parquet.read_table(save_profile(make_profile([known()]), tmp_path))
    parquet.write_table(table.drop_columns(["num_threads", "latency_scope"]), tmp_path / PROFILE_FILE)
    with pytest.raises(ValueError, match=r"lacks the columns \['num_threads', .* make it again with") as error:
        load_profile(tmp_path)
    assert "\n" not in str(error.value)


def test_files_that_are_no_profile_are_refused(tmp_path):
    file = save_profile(make_profile([known()]), tmp_path)
    table = parquet.read_table(file)
    parquet.write_table(table.drop_columns("vision_ms"), file)
    with pytest.raises(ValueError, match=r"lacks the columns \['vision_ms'\]"):
        load_profile(tmp_path)
    position = table.column_names.index("top_k")
    parquet.write_table(table.set_column(position, "top_k", pyarrow.array(["four"])), file)
    with pytest.raises(ValueError, match="has a column of another type"):
        load_profile(tmp_path)


@pytest.mark.parametrize("column", MACHINE_COLUMNS)
def test_mixtures_of_machines_are_noticed(column):
    with pytest.raises(ValueError, match=f"mixes measurements: `{column}` is .* in some rows and 'other' in"):
        check_one_machine(make_profile([known(), known(**{column: "other"})]))


def test_prompts_that_are_padded_otherwise_are_noticed():
    padded = known(prefill_lengths=[64, 128])
    check_one_machine(make_profile([padded, padded]))
    for other in (known(), known(prefill_lengths=[64, 256])):
        with pytest.raises(ValueError, match="mixes measurements: prompts are padded to other lengths"):
            check_one_machine(make_profile([padded, other]))
