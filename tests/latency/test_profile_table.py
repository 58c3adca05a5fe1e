"""The table of measurements: what may be unknown, what is refused, what older files lack."""

import json

import pyarrow
import pytest
from pyarrow import parquet

from joint_controller.latency import embedded_latency_estimator_path, load_profile, make_profile, save_profile
from joint_controller.latency.profile_table import (
    MACHINE_COLUMNS,
    NULLABLE_COLUMNS,
    PROFILE_FEATURES,
    PROFILE_FILE,
    UNKNOWN,
    check_one_machine,
)


def known(**changes):
    """What a measurement that was made elsewhere knows at least."""
    row = {"sample_id": "made/0", "tier": "low", "top_k": 4, "num_blocks": 12, "num_views": 2, "vision_tokens": 300}
    row |= {"text_tokens": 20, "output_tokens": 4, "vision_ms": 30.0, "llm_prefill_ms": 90.0}
    return row | dict.fromkeys(MACHINE_COLUMNS, UNKNOWN) | changes


def test_what_is_unknown_is_null_or_says_so(tmp_path):
    profile = make_profile([known(), known(decode_ms_per_token=13.4, decode_ms=[13.0, 13.4, 13.8])])
    assert profile.features == PROFILE_FEATURES
    for table in (profile, load_profile(save_profile(profile, tmp_path))):
        assert [table[0][column] for column in NULLABLE_COLUMNS] == [None] * len(NULLABLE_COLUMNS)
        assert table[1]["decode_ms"] == [13.0, 13.4, 13.8] and table[0]["device_name"] == "unknown"
        assert table.features == PROFILE_FEATURES
    check_one_machine(profile)
    assert [path.name for path in tmp_path.iterdir()] == [PROFILE_FILE]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (known(num_views=None), r"no `num_views` in row 1: every measurement needs one\.$"),
        (known(driver_version=None), "no `driver_version` in row 1: .* Give 'unknown' where nobody knows"),
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


def test_files_of_the_first_version_are_read(tmp_path):
    added = ("controller_ms", "controller_ms_spread", "decode_ms", "prefill_lengths", "repeats_disagree")
    added += ("driver_version", "executor_mode", "executor_revision")
    shipped = parquet.read_table(embedded_latency_estimator_path() / PROFILE_FILE)
    raw = shipped.drop_columns(list(added))
    assert len(raw.column_names) == 22
    file = tmp_path / PROFILE_FILE
    parquet.write_table(raw, file)
    profile = load_profile(file)
    assert profile["executor_mode"][:] == [UNKNOWN] * len(raw) and profile["decode_ms"][:] == [None] * len(raw)
    for column in raw.column_names:
        assert profile[column][:] == raw[column].to_pylist()
    assert json.loads(profile["executor_shape"][0])["text_config.num_experts"] == 16


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
    with pytest.raises(ValueError, match=f"mixes measurements: `{column}` is 'unknown' in some rows and 'other' in"):
        check_one_machine(make_profile([known(), known(**{column: "other"})]))


def test_prompts_that_are_padded_otherwise_are_noticed():
    padded = known(prefill_lengths=[64, 128])
    check_one_machine(make_profile([padded, padded]))
    for other in (known(), known(prefill_lengths=[64, 256])):
        with pytest.raises(ValueError, match="mixes measurements: prompts are padded to other lengths"):
            check_one_machine(make_profile([padded, other]))
