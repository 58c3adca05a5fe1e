import hashlib
import io
import math

import numpy as np
import pyarrow.parquet
import pytest
from datasets import Dataset, Features, Image, Value
from made_up_outcomes import SETTINGS, SPACE, make_samples
from PIL import Image as PILImage

from joint_controller.data import read_samples
from joint_controller.evaluation.request_table import (
    Choices,
    build_request_table,
    check_request_table,
    image_id_of,
    knob_columns,
    read_request_table,
    request_features,
    with_measurements,
    write_request_table,
)
from joint_controller.knobs import Knob, KnobSpace


@pytest.fixture(scope="module")
def samples():
    return make_samples(7, 0)


def arrays_of(samples):
    return [np.array([sample[name] for sample in samples]) for name in ("accuracy", "latency_ms", "upper_ms")]


@pytest.fixture(scope="module")
def table(samples):
    choices = [
        Choices("fits", -1, 0.5, 10.0, np.array([0, 1, 2, 3, 4, 5, 0]), np.arange(7.0)),
        Choices("controller", 42, 1.0, 20.0, np.full(7, 5), np.zeros(7)),
    ]
    return build_request_table(SPACE, samples, choices, *arrays_of(samples))


def test_a_row_says_what_was_chosen_and_what_came_of_it(samples, table):
    assert table.features == request_features(SPACE) and len(table) == 14
    for number, row in enumerate(table):
        sample = samples[number % 7]
        position = [0, 1, 2, 3, 4, 5, 0][number] if number < 7 else 5
        policy = ("fits", -1, 0.5, 10.0) if number < 7 else ("controller", 42, 1.0, 20.0)
        assert (row["policy"], row["seed"], row["budget_fraction"], row["latency_budget_ms"]) == policy
        assert row["sample_id"] == sample["sample_id"] and row["question_type"] == sample["question_type"]
        assert row["dataset"] == ("shapes", "signs")[number % 7 % 2]
        assert row["image_id"] == hashlib.sha256(sample["image"]).hexdigest()[:16]
        assert row["setting"] == str(SETTINGS[position])
        assert {name: row[name] for name in SPACE.names} == dict(SETTINGS[position])
        assert row["accuracy"] == sample["accuracy"][position]
        assert row["latency_ms"] == sample["latency_ms"][position]
        assert row["upper_latency_ms"] == sample["upper_ms"][position]
        assert row["measured_ms"] is None and row["controller_ms"] is None
        assert row["reward"] == (number if number < 7 else 0.0)
    assert knob_columns(table) == ["size", "depth"]


def test_without_predictions_upper_latencies_are_null(samples):
    accuracy, latency_ms, _ = arrays_of(samples)
    choices = [Choices("full", -1, 1.0, 20.0, np.full(7, 5), np.zeros(7))]
    table = build_request_table(SPACE, samples, choices, accuracy, latency_ms)
    assert table["upper_latency_ms"][:] == [None] * 7
    check_request_table(table)


def test_it_is_read_as_it_was_written(table, tmp_path):
    file = write_request_table(table, tmp_path / "requests.parquet")
    again = read_request_table(file)
    assert again.features == table.features and again.to_list() == table.to_list()
    assert [path.name for path in tmp_path.iterdir()] == ["requests.parquet"]
    # Rows that were chosen from a table are those that are written.
    write_request_table(table.filter(lambda row: row["policy"] == "controller"), file)
    assert read_request_table(file)["seed"][:] == [42] * 7
    assert len(again) == 14  # in memory: the file could be replaced


def test_measurements_are_put_in(table):
    measured = with_measurements(table, [1.5] * 7 + [None] * 7, [0.5] * 7 + [None] * 7)
    assert measured["measured_ms"][:] == [1.5] * 7 + [None] * 7
    assert measured["controller_ms"][:] == [0.5] * 7 + [None] * 7
    assert measured.features == table.features
    with pytest.raises(ValueError, match="`measured_ms` has 1 values for 14 requests"):
        with_measurements(table, [1.0], [1.0])


def test_what_cannot_be_a_table_is_refused(samples, table):
    accuracy, latency_ms, _ = arrays_of(samples)
    choices = [Choices("full", -1, 1.0, 20.0, np.full(7, 5), np.zeros(7))]
    accuracy[3, 5] = math.nan
    with pytest.raises(
        ValueError, match=f"no outcome of sample '{samples[3]['sample_id']}' at .*, which policy 'full'"
    ):
        build_request_table(SPACE, samples, choices, accuracy, latency_ms)
    with pytest.raises(ValueError, match="policy 'full' chose 7 settings for 6 samples"):
        build_request_table(SPACE, samples[:6], choices, accuracy[:6], latency_ms[:6])
    with pytest.raises(ValueError, match="two columns `seed`: rename the knob"):
        request_features(KnobSpace([Knob("seed", (1, 2), stage=1)]))


def test_other_tables_are_refused(table, tmp_path):
    with pytest.raises(ValueError, match="there is no column `seed`"):
        check_request_table(table.remove_columns("seed"))
    with pytest.raises(ValueError, match=r"column `seed` has the type Value\('int32'\)"):
        check_request_table(table.cast_column("seed", Value("int32")))
    broken = Dataset.from_dict(
        {**table.to_dict(), "accuracy": [None, *table["accuracy"][1:]]}, features=table.features
    )
    with pytest.raises(ValueError, match="column `accuracy` has values that are missing"):
        check_request_table(broken)
    file = tmp_path / "requests.parquet"
    with pytest.raises(FileNotFoundError, match="there is no request table"):
        read_request_table(file)
    file.write_bytes(b"no table")
    with pytest.raises(ValueError, match="is not a readable Parquet file"):
        read_request_table(file)
    pyarrow.parquet.write_table(pyarrow.table({"a": [1]}), file)
    with pytest.raises(ValueError, match="requests.parquet': there is no column `policy`"):
        read_request_table(file)


def test_images_are_named_by_their_content(tmp_path):
    buffer = io.BytesIO()
    PILImage.new("RGB", (4, 5), "red").save(buffer, format="PNG")
    encoded = buffer.getvalue()
    (tmp_path / "red.png").write_bytes(encoded)
    images = [{"bytes": encoded, "path": None}, {"bytes": None, "path": str(tmp_path / "red.png")}, None]
    features = Features({"sample_id": Value("string"), "image": Image(decode=False)})
    rows = Dataset.from_dict({"sample_id": ["a/0", "a/1", "a/2"], "image": images}, features=features)
    expected = hashlib.sha256(encoded).hexdigest()[:16]
    assert [image_id_of(sample) for sample in read_samples(rows)] == [expected, expected, "a/2"]
    in_memory = [
        PILImage.new("RGB", size, color) for size, color in (((4, 5), "red"), ((5, 4), "red"), ((4, 5), "blue"))
    ]
    ids = [image_id_of({"sample_id": "a", "image": image}) for image in (*in_memory, in_memory[0].copy())]
    assert len(set(ids)) == 3 and ids[0] == ids[3]
    assert image_id_of({"sample_id": "a/3"}) == "a/3"
