"""The request table: what each policy chose for each sample under each budget, and what came of it. Summaries follow from it."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from datasets import Dataset, Features, Value
from PIL import Image

from ..data.samples import Sample
from ..data.schema import DEFAULT_QUESTION_TYPE
from ..knobs import KnobSpace


REQUESTS_FILE = "requests.parquet"
"""Name of the request table in an output folder."""

NOT_TRAINED = -1
"""Seed of policies that were not trained."""

_BEFORE_KNOBS = {
    "policy": "string",
    "seed": "int64",
    "budget_fraction": "float64",
    "latency_budget_ms": "float64",
    "sample_id": "string",
    "image_id": "string",
    "dataset": "string",
    "question_type": "string",
    "setting": "string",
}
_AFTER_KNOBS = dict.fromkeys(
    ("accuracy", "latency_ms", "upper_latency_ms", "measured_ms", "controller_ms", "reward"), "float64"
)
_MAY_BE_NULL = ("upper_latency_ms", "measured_ms", "controller_ms")


def request_features(knob_space: KnobSpace) -> Features:
    """
    Columns of a request table, which `docs/sweep.md` explains.

    Args:
        knob_space ([`KnobSpace`]):
            Has the knobs: a column each.

    Raises:
        ValueError: If a knob has the name of another column.
    """
    taken = [name for name in knob_space.names if name in _BEFORE_KNOBS or name in _AFTER_KNOBS]
    if taken:
        raise ValueError(f"request tables would have two columns `{taken[0]}`: rename the knob.")
    dtypes = {**_BEFORE_KNOBS, **{knob.name: knob.dtype for knob in knob_space.knobs}, **_AFTER_KNOBS}
    return Features({name: Value(dtype) for name, dtype in dtypes.items()})


def image_id_of(sample: Mapping[str, Any]) -> str:
    """
    Names the image of a sample by its content, so that questions about one image are known as such.

    Args:
        sample (`dict`):
            Has `sample_id` and perhaps `image`: as a [`~joint_controller.data.samples.Sample`] has it, which is not decoded
            here, or an image in memory.

    Returns:
        `str`: the first 16 hexadecimal digits of the SHA-256 of the encoded image (of an image in memory: of its mode, size
        and pixels); the sample's id where there is no image.
    """
    if isinstance(sample, Sample):
        return sample.image_id or sample["sample_id"]
    image = sample.get("image")
    if isinstance(image, Mapping):
        content, path = image.get("bytes"), image.get("path")
        if content is None and path is not None:
            content = Path(path).read_bytes()
        image = content
    if image is None:
        return sample["sample_id"]
    if isinstance(image, Image.Image):
        image = f"{image.mode} {image.size} ".encode() + image.tobytes()
    return hashlib.sha256(image).hexdigest()[:16]


@dataclass(frozen=True)
class Choices:
    """
    What one policy chose under one budget.

    Args:
        policy (`str`):
            Name of the policy.
        seed (`int`):
            Seed of its training; `NOT_TRAINED` (-1) for a policy that was not trained.
        budget_fraction, latency_budget_ms (`float`):
            The budget, as a fraction of the full setting's mean latency and in ms.
        positions (`np.ndarray` of shape `(n,)`):
            Position in the knob space of the setting of each of n samples.
        reward (`np.ndarray` of shape `(n,)`):
            Reward of each.
    """

    policy: str
    seed: int
    budget_fraction: float
    latency_budget_ms: float
    positions: np.ndarray
    reward: np.ndarray


def build_request_table(
    knob_space: KnobSpace,
    samples: Sequence[Mapping[str, Any]],
    choices: Sequence[Choices],
    accuracy: np.ndarray,
    latency_ms: np.ndarray,
    upper_ms: np.ndarray | None = None,
) -> Dataset:
    """
    The request table of choices whose outcomes are known.

    Args:
        knob_space ([`KnobSpace`]):
            Settings that were chosen from.
        samples (`Sequence[dict]`):
            n samples. Those without a `question_type` have the type `"unknown"`.
        choices (`Sequence[Choices]`):
            What was chosen for them, by policy and budget: the rows come in this order, and in the order of samples.
        accuracy, latency_ms (`np.ndarray` of shape `(n, settings)`):
            Accuracy and estimated latency in ms of each sample at each setting that was chosen for it; others are not read.
        upper_ms (`np.ndarray` of shape `(n, settings)`, *optional*):
            Latency that was predicted not to be exceeded, in ms. By default the column is null.

    Returns:
        `datasets.Dataset`: with the columns of [`request_features`]; `measured_ms` and `controller_ms` are null.

    Raises:
        ValueError: If choices are not of so many samples, or a chosen setting has no outcome.
    """
    features = request_features(knob_space)
    num_samples, num_parts = len(samples), len(choices)
    for one in choices:
        if len(one.positions) != num_samples:
            raise ValueError(
                f"policy '{one.policy}' chose {len(one.positions)} settings for {num_samples} samples: it must choose one for "
                "each."
            )
    rows = np.tile(np.arange(num_samples, dtype=np.int32), num_parts)
    parts = np.repeat(np.arange(num_parts, dtype=np.int32), num_samples)
    no_rows = np.empty(0, dtype=np.int32)
    positions = np.concatenate([no_rows, *(one.positions for one in choices)]).astype(np.int32)
    ids = [sample["sample_id"] for sample in samples]
    accuracy, latency_ms = accuracy[rows, positions], latency_ms[rows, positions]
    if np.isnan(accuracy).any() or np.isnan(latency_ms).any():
        row = int(np.flatnonzero(np.isnan(accuracy) | np.isnan(latency_ms))[0])
        raise ValueError(
            f"there is no outcome of sample '{ids[rows[row]]}' at {knob_space.settings[positions[row]]}, which policy "
            f"'{choices[parts[row]].policy}' chose: collect it first."
        )
    columns = {
        "policy": _spread(parts, [one.policy for one in choices]),
        "seed": np.array([one.seed for one in choices], dtype=np.int64)[parts],
        "budget_fraction": np.array([one.budget_fraction for one in choices], dtype=np.float64)[parts],
        "latency_budget_ms": np.array([one.latency_budget_ms for one in choices], dtype=np.float64)[parts],
        "sample_id": _spread(rows, ids),
        "image_id": _spread(rows, [image_id_of(sample) for sample in samples]),
        "dataset": _spread(rows, [sample_id.partition("/")[0] for sample_id in ids]),
        "question_type": _spread(rows, [sample.get("question_type", DEFAULT_QUESTION_TYPE) for sample in samples]),
        "setting": _spread(positions, [str(setting) for setting in knob_space.settings]),
        **{name: _spread(positions, [setting[name] for setting in knob_space.settings]) for name in knob_space.names},
        "accuracy": accuracy.astype(np.float64),
        "latency_ms": latency_ms.astype(np.float64),
        "upper_latency_ms": None if upper_ms is None else upper_ms[rows, positions].astype(np.float64),
        "measured_ms": None,
        "controller_ms": None,
        "reward": np.concatenate([np.empty(0), *(one.reward for one in choices)]),
    }
    return _to_dataset(columns, features, len(rows))


def _spread(indices: np.ndarray, values: Sequence[Any]) -> pyarrow.Array:
    """Values at indices, without a Python object a row."""
    return pyarrow.array(values).take(pyarrow.array(indices))


def _to_dataset(columns: Mapping[str, Any], features: Features, num_rows: int) -> Dataset:
    schema = features.arrow_schema
    arrays = [
        pyarrow.nulls(num_rows, field.type)
        if columns[field.name] is None
        else pyarrow.array(columns[field.name]).cast(field.type)
        for field in schema
    ]
    return Dataset(pyarrow.Table.from_arrays(arrays, schema=schema))


def with_measurements(
    requests: Dataset, measured_ms: Sequence[float | None], controller_ms: Sequence[float | None]
) -> Dataset:
    """
    A request table with what was measured.

    Args:
        requests (`datasets.Dataset`):
            The table.
        measured_ms, controller_ms (`Sequence[float | None]`):
            What each request and its decision took by the clock, in ms; `None` where it was not measured.

    Raises:
        ValueError: If there is not one value of each for each row.
    """
    table = arrow_table(requests)
    for name, values in (("measured_ms", measured_ms), ("controller_ms", controller_ms)):
        if len(values) != len(table):
            raise ValueError(f"`{name}` has {len(values)} values for {len(table)} requests: give one for each.")
        column = pyarrow.array(values, type=pyarrow.float64())
        table = table.set_column(table.column_names.index(name), table.schema.field(name), column)
    return Dataset(table)


def arrow_table(requests: Dataset) -> pyarrow.Table:
    """The rows of a table, in one piece a column."""
    table = requests.with_format("arrow")[:] if len(requests) else requests.data.table
    return table.replace_schema_metadata(requests.features.arrow_schema.metadata).combine_chunks()


def write_request_table(requests: Dataset, path: str | Path) -> Path:
    """
    Writes a request table to a Parquet file, whole or not at all.

    Args:
        requests (`datasets.Dataset`):
            The table.
        path (`str` or `Path`):
            The file.

    Returns:
        `Path`: the file.
    """
    path = Path(path)
    unfinished = path.with_name(f"{path.name}.tmp")
    pyarrow.parquet.write_table(arrow_table(requests), unfinished)
    unfinished.replace(path)
    return path


def read_request_table(path: str | Path) -> Dataset:
    """
    Reads a request table that [`write_request_table`] wrote.

    Args:
        path (`str` or `Path`):
            The file.

    Returns:
        `datasets.Dataset`: in memory, so that the file may be replaced.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a Parquet file, or not a request table.
    """
    again = "run `joint-controller sweep` again to write it anew"
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no request table '{path}': {again}.")
    try:
        table = pyarrow.parquet.read_table(path, partitioning=None)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"'{path}' is not a readable Parquet file ({error}): {again}.") from error
    dataset = Dataset(table)
    try:
        check_request_table(dataset)
    except ValueError as error:
        raise ValueError(f"'{path}': {error}") from error
    return dataset


def check_request_table(requests: Dataset) -> None:
    """
    Refuses a table that is not a request table.

    Args:
        requests (`datasets.Dataset`):
            The table.

    Raises:
        ValueError: If a column is missing or of another type, or a value that must be there is null or not finite.
    """
    expected = {**_BEFORE_KNOBS, **_AFTER_KNOBS}
    for name, dtype in expected.items():
        if name not in requests.features:
            raise ValueError(
                f"there is no column `{name}` (but {', '.join(requests.column_names)}): give a request table, as "
                "`joint-controller sweep` writes it."
            )
        if requests.features[name] != Value(dtype):
            raise ValueError(
                f"column `{name}` has the type {requests.features[name]}, request tables have {dtype}: give a request table, as "
                "`joint-controller sweep` writes it."
            )
    table = arrow_table(requests)
    for name, dtype in expected.items():
        column = table[name]
        is_bad = column.null_count > 0 and name not in _MAY_BE_NULL
        if dtype == "float64" and not is_bad:
            values = column.drop_null().to_numpy()
            # Upper latencies are infinite where the prompt is too long; NaN is never meant.
            is_bad = bool(np.isnan(values).any() if name in _MAY_BE_NULL else not np.isfinite(values).all())
        if is_bad:
            raise ValueError(f"column `{name}` has values that are missing or not finite: give a number in each row.")


def knob_columns(requests: Dataset) -> list[str]:
    """Names of the knobs of a request table, in order."""
    return [name for name in requests.column_names if name not in _BEFORE_KNOBS and name not in _AFTER_KNOBS]
