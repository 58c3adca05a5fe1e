"""The table that profiling writes and fitting reads: one row a measurement."""

from pathlib import Path

import pyarrow
from datasets import Dataset
from pyarrow import parquet


PROFILE_FILE = "profile.parquet"

KNOB_COLUMNS = ("tier", "top_k", "num_blocks")
COUNT_COLUMNS = ("num_views", "vision_tokens", "text_tokens")
STAGE_COLUMNS = ("vision_ms", "llm_prefill_ms", "decode_ms_per_token")
"""Medians in milliseconds of the stages that the latency estimator predicts."""
MACHINE_COLUMNS = ("device_name", "torch_version", "executor_dtype", "executor_fingerprint", "executor_shape")
"""What was measured on what: equal in all rows that belong together."""


def load_profile(path: str | Path) -> Dataset:
    """
    Reads a profile.

    Args:
        path (`str` or `Path`):
            Folder that `joint-controller profile` wrote, or its Parquet file.

    Returns:
        [`~datasets.Dataset`]: see [`~latency.profile_executor`] for its columns.

    Raises:
        FileNotFoundError: If there is no profile.
        ValueError: If it is not a Parquet file, or cannot be fitted to, see [`~latency.profile_table.check_profile`].
    """
    file = Path(path) / PROFILE_FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"there is no profile at '{file}': make one with `joint-controller profile`.")
    try:
        # Read as it is: `Dataset.from_parquet` keeps a second copy in a cache and has no word for an empty table.
        profile = Dataset(parquet.read_table(file))
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"'{file}' is not a Parquet file ({error}): give a profile's folder or file.") from error
    check_profile(profile, name=f"profile '{file}'")
    return profile


def check_profile(profile: Dataset, name: str = "the profile"):
    """
    Makes sure that a table is a profile of one executor on one machine.

    Args:
        profile ([`~datasets.Dataset`]):
            The table.
        name (`str`, *optional*, defaults to `"the profile"`):
            What to call it in errors.

    Raises:
        ValueError: If a column is missing, there is no row, rows come from different executors or machines, or a time
            or count is not positive.
    """
    needed = ("sample_id", *KNOB_COLUMNS, *COUNT_COLUMNS, *STAGE_COLUMNS, *MACHINE_COLUMNS)
    missing = [column for column in needed if column not in profile.column_names]
    if missing:
        raise ValueError(f"{name} lacks the columns {missing}: make it again with `joint-controller profile`.")
    if len(profile) == 0:
        raise ValueError(f"{name} holds no measurement: make it again with `joint-controller profile`.")
    for column in MACHINE_COLUMNS:
        values = profile.unique(column)
        if len(values) > 1:
            raise ValueError(
                f"{name} mixes measurements: `{column}` is {values[0]!r} in some rows and {values[1]!r} in others. "
                "Fit to one executor on one machine at a time."
            )
    for column in ("top_k", "num_blocks", *COUNT_COLUMNS, *STAGE_COLUMNS):
        for row, value in enumerate(profile[column]):
            if not value > 0:
                raise ValueError(f"{name} has `{column}` {value} in row {row}: it must be above 0. Measure it again.")
