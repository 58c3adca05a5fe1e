"""The table that profiling writes and fitting reads: one row a measurement."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow
from datasets import Dataset, Features, List, Value
from pyarrow import parquet

from ..executor import CONTROLLER, DECODE, MODEL_SCOPE, OVERHEAD, REQUEST_SCOPE, CostModel, executor_family
from ..knobs import KnobSetting, KnobSpace
from .request_costs import RequestCosts


PROFILE_FILE = "profile.parquet"

PROVENANCE_COLUMNS = (
    "device_type",
    "device_name",
    "driver_version",
    "num_threads",
    "library_versions",
    "executor_dtype",
    "executor_mode",
    "executor_revision",
    "executor_fingerprint",
)
"""What was measured on what, in words for people."""
MACHINE_COLUMNS = (*PROVENANCE_COLUMNS, "executor_type", "executor_shape", "knob_space", "latency_scope")
"""
What was measured on what: equal in all rows that belong together. `executor_shape` ([`Executor.shape`]) and `knob_space` are
JSON; `latency_scope` says whether whole requests were measured, or the model's stages alone.
"""
UNKNOWN = "unknown"
"""Value of a machine column where it is not known; `executor_type`, `knob_space` and `latency_scope` must be."""
_KNOWN_COLUMNS = ("executor_type", "knob_space", "latency_scope")

SINGLE_TIMES = {REQUEST_SCOPE: "request_ms", MODEL_SCOPE: "model_ms"}
"""Columns with what each repeat took together, by latency scope."""

_LIST_COLUMNS = {
    "decode_ms": List(Value("float64")),
    **dict.fromkeys(SINGLE_TIMES.values(), List(Value("float64"))),
    "prefill_lengths": List(Value("int32")),
}

_REMEDY = "make it again with `joint-controller profile`"


def time_column(stage: str) -> str:
    """Column with the time of a stage of [`~latency.request_costs.RequestCosts`]."""
    return "decode_ms_per_token" if stage == DECODE else f"{stage}_ms"


@dataclass(frozen=True)
class ProfileSchema:
    """
    Columns of a profile. They follow from the executor that was measured: each of its knobs, counts and stages has one, and
    so have the stages of every request.
    """

    knob_space: KnobSpace
    costs: RequestCosts

    @classmethod
    def of(cls, profile: Dataset | Sequence[Mapping[str, Any]], name: str = "the profile") -> "ProfileSchema":
        """
        The columns of a profile, or of rows that one is to be made of, by the first row, which must say what was
        measured.
        """
        if len(profile) == 0:
            raise ValueError(f"{name} holds no measurement: {_REMEDY}.")
        row = profile[0]
        for column in (*_KNOWN_COLUMNS, "executor_shape"):
            if row.get(column) is None or row[column] == UNKNOWN and column in _KNOWN_COLUMNS:
                raise ValueError(f"{name} has no `{column}` in row 0: every measurement needs one.")
        try:
            shape = None if row["executor_shape"] == UNKNOWN else json.loads(row["executor_shape"])
            space = KnobSpace.from_dict(json.loads(row["knob_space"]))
        except json.JSONDecodeError as error:
            raise ValueError(f"{name} has a machine column that is not JSON ({error}): {_REMEDY}.") from error
        cost_model = executor_family(row["executor_type"]).cost_model(shape, row.get("prefill_lengths"), space.names)
        return cls(space, RequestCosts(cost_model, row["latency_scope"]))

    @property
    def cost_model(self) -> CostModel:
        """That of the executor."""
        return self.costs.cost_model

    @property
    def predicted_columns(self) -> tuple[str, ...]:
        """Medians in milliseconds of the stages that were measured, and that latency estimators predict."""
        return tuple(map(time_column, self.costs.stages))

    @property
    def time_columns(self) -> tuple[str, ...]:
        """Medians in milliseconds of all stages of a request, each followed by the column `<stage>_spread`."""
        return tuple(map(time_column, (OVERHEAD, CONTROLLER, *self.cost_model.stages)))

    @cached_property
    def features(self) -> Features:
        """All columns with their types. A knob, a count or a stage that has the name of another column is refused."""
        dtypes = [
            ("sample_id", "string"),
            *((knob.name, knob.dtype) for knob in self.knob_space.knobs),
            *((name, "int32") for name in (*self.cost_model.count_names, "output_tokens")),
            *((name, "float64") for time in self.time_columns for name in (time, f"{time}_spread")),
            *((name, None) for name in _LIST_COLUMNS),
            ("num_repeats", "int32"),
            ("repeats_disagree", "bool"),
            *((name, "string") for name in MACHINE_COLUMNS),
        ]
        names = [name for name, _ in dtypes]
        repeated = [name for name in names if names.count(name) > 1]
        if repeated:
            raise ValueError(f"profiles would have two columns `{repeated[0]}`: rename the knob, count or stage.")
        return Features({name: _LIST_COLUMNS[name] if dtype is None else Value(dtype) for name, dtype in dtypes})

    @property
    def nullable_columns(self) -> tuple[str, ...]:
        """
        Columns that may be null: what a measurement that was made elsewhere may not know, also because it is of the model's
        stages alone, and the decode time where the answer ended with its first token.
        """
        times = [name for name in self.time_columns if name not in self.predicted_columns]
        counts = [name for name in self.cost_model.count_names if name not in self.costs.count_names]
        spreads = (f"{name}_spread" for name in self.time_columns)
        times.append(time_column(DECODE))
        return (*counts, *times, *spreads, *_LIST_COLUMNS, "num_repeats", "repeats_disagree")


def make_profile(rows: Sequence[Mapping[str, Any]], name: str = "the profile") -> Dataset:
    """
    A profile from its rows.

    Args:
        rows (`Sequence[Mapping[str, Any]]`):
            One mapping a measurement, with the columns of [`~latency.profile_table.ProfileSchema`] that its machine
            columns ask for. Nullable ones may be None or left out; those of `MACHINE_COLUMNS` but `executor_type`,
            `knob_space` and `latency_scope` may be `UNKNOWN` (`"unknown"`).
        name (`str`, *optional*, defaults to `"the profile"`):
            What to call it in errors.

    Returns:
        [`~datasets.Dataset`]: the table.

    Raises:
        ValueError: If a row has a column that profiles do not have, or the table is not a profile, see
            [`~latency.profile_table.check_profile`].
    """
    features = ProfileSchema.of(rows, name).features
    for number, row in enumerate(rows):
        unknown = [column for column in row if column not in features]
        if unknown:
            raise ValueError(f"{name} has unknown columns {unknown} in row {number}: leave them out.")
    columns = {column: [row.get(column) for row in rows] for column in features}
    profile = Dataset.from_dict(columns, features=features)
    check_profile(profile, name)
    return profile


def save_profile(profile: Dataset, folder: str | Path) -> Path:
    """
    Writes a profile to `profile.parquet` in a folder, which is made if needed, and gives the file. It has its name
    only once it is whole.
    """
    file = Path(folder) / PROFILE_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".tmp")
    profile.to_parquet(unfinished)
    unfinished.replace(file)
    return file


def load_profile(path: str | Path) -> Dataset:
    """
    Reads a profile.

    Args:
        path (`str` or `Path`):
            Folder that `joint-controller profile` wrote, or its Parquet file.

    Returns:
        [`~datasets.Dataset`]: see [`~latency.profiling.profile_executor`] for its columns.

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
    _check_columns(table.column_names, MACHINE_COLUMNS, name)
    schema = ProfileSchema.of(table.slice(0, 1).to_pylist(), name).features.arrow_schema
    _check_columns(table.column_names, schema.names, name)
    try:
        profile = Dataset(table.select(schema.names).cast(schema))
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
        raise ValueError(f"{name} has a column of another type ({error}): {_REMEDY}.") from error
    check_profile(profile, name)
    return profile


def check_profile(profile: Dataset, name: str = "the profile") -> ProfileSchema:
    """
    Makes sure that a table is a profile, and gives its columns. `name` is what to call it in errors.

    Raises:
        ValueError: If a column is missing, there is no row, a value is null that must not be, a knob value is not in
            the knob space, or a time or count is not positive.
    """
    _check_columns(profile.column_names, MACHINE_COLUMNS, name)
    schema = ProfileSchema.of(profile, name)
    _check_columns(profile.column_names, schema.features, name)
    for column in schema.features:
        values = profile[column][:]
        if None in values and column not in schema.nullable_columns:
            known = f" Give '{UNKNOWN}' where it is not known." if column in MACHINE_COLUMNS else ""
            raise ValueError(
                f"{name} has no `{column}` in row {values.index(None)}: every measurement needs one.{known}"
            )
        if column in schema.knob_space.names:
            allowed = schema.knob_space[column].values
            wrong = [row for row, value in enumerate(values) if value not in allowed]
            problem = f"its knob space has {list(allowed)}. Measure it again."
        elif column in ("output_tokens", *schema.cost_model.count_names, *schema.time_columns):
            wrong = [row for row, value in enumerate(values) if value is not None and not value > 0]
            problem = "it must be above 0. Measure it again."
        else:
            continue
        if wrong:
            raise ValueError(f"{name} has `{column}` {values[wrong[0]]} in row {wrong[0]}: {problem}")
    return schema


def _check_columns(columns: Sequence[str], needed: Sequence[str] | Features, name: str):
    missing = [column for column in needed if column not in columns]
    if missing:
        raise ValueError(f"{name} lacks the columns {missing}: {_REMEDY}.")


def check_one_machine(*profiles: Dataset, name: str = "the profile"):
    """
    Refuses (`ValueError`) measurements that are not of one executor on one machine. Several profiles may have measured
    different values of its knobs.
    """
    for column in MACHINE_COLUMNS:
        values = list(dict.fromkeys(value for profile in profiles for value in profile.unique(column)))
        if len(values) > 1 and (column != "knob_space" or len(profiles) == 1):
            raise ValueError(
                f"{name} mixes measurements: `{column}` is {values[0]!r} in some rows and {values[1]!r} in others. "
                "Take one executor on one machine at a time."
            )
    if len({json.dumps(lengths) for profile in profiles for lengths in profile["prefill_lengths"]}) > 1:
        raise ValueError(
            f"{name} mixes measurements: prompts are padded to other lengths (`prefill_lengths`) in some rows."
        )


def profile_settings(profile: Dataset) -> list[KnobSetting]:
    """The knob setting of each row."""
    names = ProfileSchema.of(profile).knob_space.names
    columns = zip(*(profile[name] for name in names), strict=True)
    return [KnobSetting(dict(zip(names, values, strict=True))) for values in columns]
