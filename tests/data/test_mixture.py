"""Mixtures by weight: shares, epoch lengths, no row twice; and without weights, the samples that there always were."""

import collections
import hashlib
import io

import pytest
from datasets import Dataset
from PIL import Image as PILImage

from joint_controller.data import load_vqa_datasets
from joint_controller.data.mixture import split_by_weight, split_evenly


def write_dataset(folder, num_rows: int) -> str:
    buffer = io.BytesIO()
    PILImage.new("RGB", (8, 8), "red").save(buffer, format="PNG")
    rows = {
        "image": [buffer.getvalue()] * num_rows,
        "question": [f"what is {row} ?" for row in range(num_rows)],
        "answers": [["some"]] * num_rows,
    }
    Dataset.from_dict(rows).save_to_disk(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    return [write_dataset(folder / name, num_rows) for name, num_rows in (("a", 300), ("b", 100), ("c", 40))]


def names_of(dataset) -> list[str]:
    return [sample_id.split("/")[0] for sample_id in dataset["sample_id"]]


@pytest.mark.parametrize(
    ("weights", "num_rows", "max_samples", "expected"),
    [
        ([1, 1], [300, 100], None, [100, 100]),
        ([3, 1], [300, 100], None, [300, 100]),
        ([0.75, 0.25], [300, 101], None, [300, 100]),
        ([9, 1], [300, 100], None, [300, 33]),
        ([9, 1], [300, 100], 50, [45, 5]),
        ([1, 1, 1], [300, 100, 40], 10, [4, 3, 3]),
        ([0.1, 0.2, 0.7], [1000, 1000, 1000], 1000, [100, 200, 700]),
        ([1, 1], [300, 100], 1000, [100, 100]),
        ([1], [7], None, [7]),
        ([0.1], [7], None, [7]),
    ],
)
def test_shares_of_an_epoch(weights, num_rows, max_samples, expected):
    assert split_by_weight(weights, num_rows, max_samples) == expected


def test_an_epoch_is_as_long_as_shares_without_repetition_allow():
    # Against a search over all lengths.
    for weights in ([1, 2], [5, 3], [0.3, 0.6, 0.1], [7, 1, 1]):
        for num_rows in ([10, 30, 17], [50, 9, 4]):
            sizes = num_rows[: len(weights)]
            total = sum(weights)
            longest = max(
                epoch
                for epoch in range(1, 500)
                if all(epoch * weight / total <= size + 1e-9 for weight, size in zip(weights, sizes, strict=True))
            )
            counts = split_by_weight(weights, sizes)
            assert sum(counts) in (longest, longest - 1)  # a share that is rounded up may lack a row
            for count, weight, size in zip(counts, weights, sizes, strict=True):
                assert count <= size and abs(count - longest * weight / total) < 1.001


def test_even_shares():
    assert split_evenly(41, 2) == [21, 20]
    assert split_evenly(6, 3) == [2, 2, 2]


def test_a_mixture_interleaves_by_weight(folders):
    dataset = load_vqa_datasets(folders, weights=[6, 3, 1], seed=5)
    names = names_of(dataset)
    assert collections.Counter(names) == {"a": 200, "b": 100, "c": 33}
    assert len(set(dataset["sample_id"])) == len(dataset)
    # Every tenth of an epoch has about the shares of the whole: the binomial's standard deviation is 2.8 of 33.
    for start in range(0, 297, 33):
        assert 11 <= names[start : start + 33].count("a") <= 29
    rows = [int(sample_id.split("/")[-1]) for sample_id in dataset["sample_id"] if sample_id.startswith("a/")]
    assert rows != sorted(rows)
    assert load_vqa_datasets(folders, weights=[60, 30, 10], seed=5)["sample_id"][:] == dataset["sample_id"][:]
    assert load_vqa_datasets(folders, weights=[6, 3, 1], seed=6)["sample_id"][:] != dataset["sample_id"][:]


def test_max_samples_shortens_a_mixture(folders):
    dataset = load_vqa_datasets(folders, max_samples=20, weights=[6, 3, 1], seed=5)
    assert collections.Counter(names_of(dataset)) == {"a": 12, "b": 6, "c": 2}


def test_scenes_have_no_end_in_a_mixture(folders):
    dataset = load_vqa_datasets(["scenes", folders[1]], max_samples=120, weights=[3, 1])
    assert collections.Counter(names_of(dataset)) == {"scenes": 90, "b": 30}
    assert {sample_id for sample_id in dataset["sample_id"] if "scenes" in sample_id} == {
        f"scenes/train/{row:06d}" for row in range(90)
    }


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, 1], "2 weights are given for 3 data sets"),
        ([1, 1, 0], "weight of data set '.*c' is 0"),
        ([1, -1, 1], "weight of data set '.*b' is -1"),
        ([1, 1, float("nan")], "weight of data set '.*c' is nan"),
        ([1, 1, float("inf")], "weight of data set '.*c' is inf"),
        ([1000, 1, 1000], "an epoch of 80 samples has none of data set 2"),
    ],
)
def test_impossible_weights_are_refused(folders, weights, message):
    with pytest.raises(ValueError, match=message):
        load_vqa_datasets(folders, weights=weights)


def test_without_weights_the_samples_of_the_shipped_recipes_stay_what_they_were():
    # The figures of the README were measured on these.
    for split, max_samples, first, digest in (
        ("train", 1536, "scenes/train/000685", "f229055af6ecc87e"),
        ("validation", 256, "scenes/validation/000040", "c5a88acb1654f61e"),
        ("test", 512, "easy_vqa/test/006543", "14ded4af62829515"),
    ):
        sample_ids = load_vqa_datasets(["easy_vqa", "scenes"], split, max_samples, 42)["sample_id"][:]
        assert sample_ids[0] == first
        assert hashlib.sha256("\n".join(sample_ids).encode()).hexdigest()[:16] == digest
