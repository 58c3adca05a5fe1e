"""The table that profiling writes and fitting reads: one row a measurement."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
from datasets import Dataset, Features, List, Value
from pyarrow import parquet

from ..knobs import KnobSetting


PROFILE_FILE = "profile.parquet"

KNOB_COLUMNS = ("tier", "top_k", "num_blocks")
COUNT_COLUMNS = ("num_views", "vision_tokens", "text_tokens")
STAGE_COLUMNS = ("vision_ms", "llm_prefill_ms", "decode_ms_per_token")
"""Medians in milliseconds of the stages that the latency estimator predicts."""
TIME_COLUMNS = ("controller_ms", "image_processing_ms", *STAGE_COLUMNS)
"""Medians in milliseconds of all stages of a request, each with the column `<stage>_spread` beside it."""
MACHINE_COLUMNS = (
    "device_name",
    "driver_version",
    "torch_version",
    "executor_dtype",
    "executor_mode",
    "executor_revision",
    "executor_fingerprint",
    "executor_shape",
)
"""What was measured on what: equal in all rows that belong together."""
UNKNOWN = "unknown"
"""Value of a machine column where nobody knows."""

PROFILE_FEATURES = Features(
    {
        "sample_id": Value("string"),
        "tier": Value("string"),
        "top_k": Value("int32"),
        "num_blocks": Value("int32"),
        "num_views": Value("int32"),
        "vision_tokens": Value("int32"),
        "text_tokens": Value("int32"),
        "output_tokens": Value("int32"),
        **{name: Value("float64") for stage in TIME_COLUMNS for name in (stage, f"{stage}_spread")},
        "decode_ms": List(Value("float64")),
        "prefill_lengths": List(Value("int32")),
        "num_repeats": Value("int32"),
        "repeats_disagree": Value("bool"),
        **{column: Value("string") for column in MACHINE_COLUMNS},
    }
)
"""
Columns of a profile, see [`~latency.profile_executor`]. What a measurement that was made elsewhere may not know is null
(`NULLABLE_COLUMNS`) or, in a machine column, `"unknown"`.
"""

NULLABLE_COLUMNS = (
    "controller_ms",
    "image_processing_ms",
    "decode_ms_per_token",  # null, too, where the answer ended with its first token
    "decode_ms",
    *(f"{stage}_spread" for stage in TIME_COLUMNS),
    "prefill_lengths",
    "num_repeats",
    "repeats_disagree",
)
"""Columns that may be null."""

# Columns that files of the first version lack.
_LATER_COLUMNS = (
    "controller_ms",
    "controller_ms_spread",
    "decode_ms",
    "prefill_lengths",
    "repeats_disagree",
    "driver_version",
    "executor_mode",
    "executor_revision",
)


def make_profile(rows: Sequence[Mapping[str, Any]], name: str = "the profile") -> Dataset:
    """
    A profile from its rows.

    Args:
        rows (`Sequence[Mapping[str, Any]]`):
            One mapping a measurement, with the columns of `PROFILE_FEATURES`. Those of `NULLABLE_COLUMNS` may be None or
            left out; those of `MACHINE_COLUMNS` may be `UNKNOWN` (`"unknown"`).
        name (`str`, *optional*, defaults to `"the profile"`):
            What to call it in errors.

    Returns:
        [`~datasets.Dataset`]: the table.

    Raises:
        ValueError: If a row has a column that profiles do not have, or the table is not a profile, see
            [`~latency.profile_table.check_profile`].
    """
    for number, row in enumerate(rows):
        unknown = [column for column in row if column not in PROFILE_FEATURES]
        if unknown:
            raise ValueError(f"{name} has unknown columns {unknown} in row {number}: leave them out.")
    columns = {column: [row.get(column) for row in rows] for column in PROFILE_FEATURES}
    profile = Dataset.from_dict(columns, features=PROFILE_FEATURES)
    check_profile(profile, name)
    return profile


def save_profile(profile: Dataset, folder: str | Path) -> Path:
    """
    Writes a profile to `profile.parquet` in a folder, which is made if needed. The file has its name only once it is
    whole.

    Returns:
        `Path`: the file.
    """
    file = Path(folder) / PROFILE_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".tmp")
    profile.to_parquet(unfinished)
    unfinished.replace(file)
    return file


def load_profile(path: str | Path) -> Dataset:
    """
    Reads a profile. Columns that a file of an earlier version lacks are null or, of the machine, `"unknown"`.

    Args:
        path (`str` or `Path`):
            Folder that `joint-controller profile` wrote, or its Parquet file.

    Returns:
        [`~datasets.Dataset`]: see [`~latency.profile_executor`] for its columns.

    Raises:
        FileNotFoundError: If there is no profile.
        ValueError: If it is not a Parquet file, or not a profile, see [`~latency.profile_table.check_profile`].
    """
    file = Path(path) / PROFILE_FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"there is no profile at '{file}': make one with `joint-controller profile`.")
    try:
        # Read as it is: `Dataset.from_parquet` keeps a second copy in a cache and has no word for an empty table.
        table = parquet.read_table(file)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"'{file}' is not a Parquet file ({error}): give a profile's folder or file.") from error
    name = f"profile '{file}'"
    schema = PROFILE_FEATURES.arrow_schema
    for column in _LATER_COLUMNS:
        if column not in table.column_names:
            value = UNKNOWN if column in MACHINE_COLUMNS else None
            table = table.append_column(
                schema.field(column), [pyarrow.array([value] * len(table), schema.field(column).type)]
            )
    _check_columns(table.column_names, name)
    try:
        profile = Dataset(table.select(schema.names).cast(schema))
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
        raise ValueError(
            f"{name} has a column of another type ({error}): make it again with `joint-controller profile`."
        ) from error
    check_profile(profile, name)
    return profile


def check_profile(profile: Dataset, name: str = "the profile"):
    """
    Makes sure that a table is a profile.

    Args:
        profile ([`~datasets.Dataset`]):
            The table.
        name (`str`, *optional*, defaults to `"the profile"`):
            What to call it in errors.

    Raises:
        ValueError: If a column is missing, there is no row, a value is null that must not be, or a time or count is not
            positive.
    """
    _check_columns(profile.column_names, name)
    if len(profile) == 0:
        raise ValueError(f"{name} holds no measurement: make it again with `joint-controller profile`.")
    for column in PROFILE_FEATURES:
        values = profile[column][:]
        if column not in NULLABLE_COLUMNS and None in values:
            known = f" Give '{UNKNOWN}' where nobody knows." if column in MACHINE_COLUMNS else ""
            raise ValueError(
                f"{name} has no `{column}` in row {values.index(None)}: every measurement needs one.{known}"
            )
        if column in ("top_k", "num_blocks", "output_tokens", *COUNT_COLUMNS, *TIME_COLUMNS):
            for row, value in enumerate(values):
                if value is not None and not value > 0:
                    raise ValueError(
                        f"{name} has `{column}` {value} in row {row}: it must be above 0. Measure it again."
                    )


def _check_columns(columns: Sequence[str], name: str):
    missing = [column for column in PROFILE_FEATURES if column not in columns]
    if missing:
        raise ValueError(f"{name} lacks the columns {missing}: make it again with `joint-controller profile`.")


def check_one_machine(profile: Dataset, name: str = "the profile"):
    """
    Makes sure that all measurements are of one executor on one machine.

    Raises:
        ValueError: If a machine column has several values.
    """
    for column in MACHINE_COLUMNS:
        values = profile.unique(column)
        if len(values) > 1:
            raise ValueError(
                f"{name} mixes measurements: `{column}` is {values[0]!r} in some rows and {values[1]!r} in others. "
                "Take one executor on one machine at a time."
            )
    if len({json.dumps(lengths) for lengths in profile["prefill_lengths"]}) > 1:
        raise ValueError(
            f"{name} mixes measurements: prompts are padded to other lengths (`prefill_lengths`) in some rows."
        )


def profile_settings(profile: Dataset) -> list[KnobSetting]:
    """The knob setting of each row."""
    return [KnobSetting(*values) for values in zip(*(profile[knob] for knob in KNOB_COLUMNS), strict=True)]
