"""Data sets by name and from files: one schema, disjoint splits, bad rows refused where they stand."""

import hashlib
import io
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, Image
from PIL import Image as PILImage

from joint_controller.data import (
    FEATURES,
    SCENE_FAMILIES,
    SPLITS,
    keep_good_rows,
    load_vqa_dataset,
    load_vqa_datasets,
    stream_vqa_datasets,
)
from joint_controller.data.scenes import TRANSFER_IMAGE_SIZES, TRANSFER_QUESTION_TYPES


COLUMNS = ["sample_id", "image", "question", "answers", "style", "metric", "question_type"]


def encoded_image(value: int = 90) -> bytes:
    buffer = io.BytesIO()
    PILImage.new("RGB", (20, 10), (value, 0, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


def good_rows(num_rows: int = 20) -> dict:
    return {
        "image": [encoded_image(row) for row in range(num_rows)],
        "question": [f"what is {row} ?" for row in range(num_rows)],
        "answers": [[str(row), "some"] for row in range(num_rows)],
    }


@pytest.fixture(scope="module")
def easy_vqa_splits():
    return {split: load_vqa_dataset("easy_vqa", split) for split in SPLITS}


# ---- easy-vqa -------------------------------------------------------------------------------------------------------


def test_easy_vqa_splits_hold_all_questions_of_the_package(easy_vqa_splits):
    import easy_vqa

    for expected, splits in (
        (easy_vqa.get_train_questions(), ("train", "validation")),
        (easy_vqa.get_test_questions(), ("test",)),
    ):
        loaded = [
            (question, answers[0], int(Path(image["path"]).stem))
            for split in splits
            for question, answers, image in easy_vqa_splits[split]
            .cast_column("image", Image(decode=False))
            .select_columns(["question", "answers", "image"])
            .to_pandas()
            .itertuples(index=False)
        ]
        assert loaded == list(zip(*expected, strict=True))
    assert len(easy_vqa_splits["train"]) + len(easy_vqa_splits["validation"]) == 38575
    assert len(easy_vqa_splits["test"]) == 9673


def test_easy_vqa_splits_share_no_image(easy_vqa_splits):
    digests = {}
    for split, dataset in easy_vqa_splits.items():
        paths = {image["path"] for image in dataset.cast_column("image", Image(decode=False))["image"]}
        digests[split] = {hashlib.sha256(Path(path).read_bytes()).digest() for path in paths}
        assert len(digests[split]) == {"train": 3500, "validation": 500, "test": 1000}[split]
    assert len(set.union(*digests.values())) == 5000


def test_easy_vqa_types_follow_from_answers(easy_vqa_splits):
    answers = {}
    for name, given in zip(easy_vqa_splits["test"]["question_type"], easy_vqa_splits["test"]["answers"], strict=True):
        answers.setdefault(name, set()).update(given)
    assert answers == {
        "easy_vqa_color": {"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"},
        "easy_vqa_shape": {"circle", "rectangle", "triangle"},
        "easy_vqa_yes_no": {"yes", "no"},
    }


# ---- scenes ---------------------------------------------------------------------------------------------------------


def test_scenes_have_the_stated_sizes_and_repeat():
    small = load_vqa_dataset("scenes", "train", max_samples=10)
    assert small["sample_id"][9] == "scenes/train/000009" and len(small) == 10
    default = load_vqa_dataset("scenes", "validation")
    assert len(default) == 1000
    again = load_vqa_dataset("scenes", "validation", max_samples=20)
    for row in range(20):
        assert again[row] == default[row]
    assert set(default["question_type"]) == set(SCENE_FAMILIES["scenes"].question_types)
    transfer = load_vqa_dataset("scenes_transfer", "train", max_samples=60)
    assert transfer["sample_id"][9] == "scenes_transfer/train/000009" and len(transfer) == 60
    assert set(transfer["question_type"]) == set(TRANSFER_QUESTION_TYPES)
    assert {image.size for image in transfer["image"]} == set(TRANSFER_IMAGE_SIZES)


def test_scene_splits_share_no_picture():
    pictures = [
        {
            row["image"]["bytes"]
            for row in load_vqa_dataset("scenes", split, 200).cast_column("image", Image(decode=False))
        }
        for split in SPLITS
    ]
    assert [len(some) for some in pictures] == [67, 67, 67]  # three questions each
    assert len(set.union(*pictures)) == 3 * 67


@pytest.mark.parametrize("name", ["easy_vqa", "scenes", "scenes_transfer"])
def test_own_data_sets_follow_the_schema_and_are_valid(name):
    dataset = load_vqa_dataset(name, "test", max_samples=100)
    assert dataset.column_names == COLUMNS
    assert dataset.features == FEATURES
    assert set(dataset["style"]) == {"vqa2"} and set(dataset["metric"]) == {"vqa_accuracy"}
    assert len(keep_good_rows(dataset, name, "test")) == 100


# ---- several data sets ----------------------------------------------------------------------------------------------


def test_several_data_sets_share_the_samples_evenly_and_are_mixed():
    dataset = load_vqa_datasets(["easy_vqa", "scenes"], "validation", max_samples=41, seed=1)
    names = [sample_id.split("/")[0] for sample_id in dataset["sample_id"]]
    assert (names.count("easy_vqa"), names.count("scenes")) == (21, 20)
    assert names != sorted(names) and names != sorted(names, reverse=True)
    again = load_vqa_datasets(["easy_vqa", "scenes"], "validation", max_samples=41, seed=1)
    assert again["sample_id"] == dataset["sample_id"]
    other = load_vqa_datasets(["easy_vqa", "scenes"], "validation", max_samples=41, seed=2)
    assert set(other["sample_id"]) != set(dataset["sample_id"])


def test_a_data_set_named_twice_is_refused():
    with pytest.raises(ValueError, match="both have a sample 'scenes/test/000000'"):
        load_vqa_datasets(["scenes", "scenes"], "test", max_samples=8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": []}, "names is empty"),
        ({"names": "scenes"}, "give a list"),
        ({"names": ["scenes", "easy_vqa"], "max_samples": 1}, "at least one for each"),
        ({"names": ["scenes"], "split": "executor"}, "no split 'executor'"),
        ({"names": ["scenes"], "max_samples": 0}, "max_samples is 0"),
        ({"names": ["nowhere/at/all"]}, "no data set 'nowhere/at/all'"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_vqa_datasets(**arguments)


# ---- data from files ------------------------------------------------------------------------------------------------


def test_a_saved_data_set_is_read_and_left_as_it_was(tmp_path):
    folder = tmp_path / "shop.signs"
    Dataset.from_dict(good_rows() | {"note": ["x"] * 20}).save_to_disk(folder)
    files = sorted(folder.iterdir())
    dataset = load_vqa_dataset(str(folder))
    assert dataset.column_names == COLUMNS and dataset.features == FEATURES
    assert dataset[3]["sample_id"] == "shop.signs/train/000003"
    assert dataset[3]["image"].getpixel((0, 0)) == (3, 0, 0)
    assert dataset[3]["answers"] == ["3", "some"]
    assert (dataset[3]["style"], dataset[3]["metric"]) == ("vqa2", "vqa_accuracy")
    assert sorted(folder.iterdir()) == files


def test_columns_that_are_given_are_kept(tmp_path):
    rows = good_rows(3) | {"sample_id": ["a", "b", "c"], "style": ["a_okvqa_da"] * 3, "question_type": ["sign"] * 3}
    Dataset.from_dict(rows).save_to_disk(tmp_path / "data")
    dataset = load_vqa_dataset(str(tmp_path / "data"))
    assert dataset["sample_id"][:] == ["a", "b", "c"]
    assert set(dataset["style"]) == {"a_okvqa_da"} and set(dataset["question_type"]) == {"sign"}


@pytest.mark.parametrize("streaming", [False, True])
def test_a_style_that_only_an_executor_can_judge_is_passed_on(tmp_path, streaming):
    Dataset.from_dict(good_rows(3) | {"style": ["a_style_of_ones_own"] * 3}).to_parquet(tmp_path / "train.parquet")
    load = stream_vqa_datasets if streaming else load_vqa_datasets
    assert {row["style"] for row in load([str(tmp_path)])} == {"a_style_of_ones_own"}


def test_a_subset_keeps_the_ids_of_its_rows(tmp_path):
    Dataset.from_dict(good_rows()).save_to_disk(tmp_path / "data")
    dataset = load_vqa_dataset(str(tmp_path / "data"), max_samples=5, seed=3)
    assert len(dataset) == 5
    for row in dataset:
        assert row["sample_id"] == f"data/train/{int(row['answers'][0]):06d}"
    other = load_vqa_dataset(str(tmp_path / "data"), max_samples=5, seed=4)
    assert other["sample_id"][:] != dataset["sample_id"][:]
    assert len(load_vqa_dataset(str(tmp_path / "data"), max_samples=500)) == 20


def test_splits_of_a_saved_dictionary_are_told_apart(tmp_path):
    splits = {"train": Dataset.from_dict(good_rows(4)), "test": Dataset.from_dict(good_rows(3))}
    DatasetDict(splits).save_to_disk(tmp_path / "data")
    assert len(load_vqa_dataset(str(tmp_path / "data"), "train")) == 4
    assert len(load_vqa_dataset(str(tmp_path / "data"), "test")) == 3
    with pytest.raises(ValueError, match="no split 'validation'"):
        load_vqa_dataset(str(tmp_path / "data"), "validation")


def test_parquet_files_belong_to_the_split_they_are_named_after(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name, num_rows in (("train-0", 4), ("train-1", 5), ("test", 3)):
        Dataset.from_dict(good_rows(num_rows)).to_parquet(folder / f"{name}.parquet")
    assert len(load_vqa_dataset(str(folder), "train")) == 9
    assert len(load_vqa_dataset(str(folder), "test")) == 3
    assert len(load_vqa_dataset(str(folder / "test.parquet"), "test")) == 3
    with pytest.raises(ValueError, match="no split 'validation'"):
        load_vqa_dataset(str(folder), "validation")
    with pytest.raises(ValueError, match="no split 'train'"):
        load_vqa_dataset(str(folder / "test.parquet"), "train")


def test_tables_of_other_libraries_are_read(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(
        {
            "image": pa.array(good_rows(3)["image"]),
            "question": pa.array(good_rows(3)["question"], pa.large_string()),
            "answers": pa.array(good_rows(3)["answers"], pa.list_(pa.large_string())),
        }
    )
    pq.write_table(table, tmp_path / "signs.parquet")
    dataset = load_vqa_dataset(str(tmp_path / "signs.parquet"))
    assert dataset.features == FEATURES
    assert dataset[2]["sample_id"] == "signs/train/000002"
    assert dataset[2]["image"].size == (20, 10)


def test_casting_texts_leaves_images_on_disk(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / "signs"
    folder.mkdir()
    image = encoded_image() + bytes(2**20)  # what follows the end of a PNG file is not read
    table = pa.table(
        {
            "image": pa.array([image] * 32),
            "question": pa.array(good_rows(32)["question"], pa.large_string()),
            "answers": pa.array(good_rows(32)["answers"]),
        }
    )
    pq.write_table(table, folder / "train.parquet")
    del table
    before = pa.total_allocated_bytes()
    dataset = load_vqa_dataset(str(folder))
    assert pa.total_allocated_bytes() - before < 2**22
    assert dataset.features == FEATURES
    assert dataset[31]["question"] == "what is 31 ?" and dataset[31]["image"].getpixel((0, 0)) == (90, 0, 0)


def test_a_damaged_parquet_file_is_refused(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"this is no table")
    with pytest.raises(ValueError, match="train.parquet' cannot be read"):
        load_vqa_dataset(str(tmp_path / "train.parquet"))


@pytest.mark.parametrize("column", ["image", "question", "answers"])
def test_a_missing_column_is_named(tmp_path, column):
    rows = good_rows()
    del rows[column]
    Dataset.from_dict(rows).save_to_disk(tmp_path / "data")
    with pytest.raises(ValueError, match=f"data' has no column '{column}'"):
        load_vqa_dataset(str(tmp_path / "data"))


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("question", " ", "the question is empty"),
        ("question", None, "the question is empty"),
        ("answers", [], "there are none"),
        ("answers", None, "there are none"),
        ("answers", ["some", None], "an answer is missing"),
        ("answers", ["", " "], "all are empty"),
        pytest.param("image", b"no image", "cannot be decoded", id="image-foreign"),
        pytest.param("image", encoded_image()[:50], "cannot be decoded", id="image-truncated"),
        pytest.param("image", b"", "cannot be decoded", id="image-empty"),
        ("image", None, "there is no image"),
    ],
)
def test_a_bad_row_is_named(tmp_path, column, value, message):
    rows = good_rows()
    rows[column][17] = value
    Dataset.from_dict(rows).save_to_disk(tmp_path / "data")
    with pytest.raises(ValueError, match=f"data', row 17 .*, column '{column}': .*{message}") as caught:
        load_vqa_dataset(str(tmp_path / "data"))
    assert "\n" not in str(caught.value)


def test_a_bad_row_keeps_its_number_in_a_subset(tmp_path):
    rows = good_rows()
    rows["image"][17] = b"no image"
    Dataset.from_dict(rows).save_to_disk(tmp_path / "data")
    with pytest.raises(ValueError, match="row 17 "):
        load_vqa_dataset(str(tmp_path / "data"), max_samples=19, seed=0)


@pytest.mark.parametrize(
    ("column", "values"), [("question", range(20)), ("answers", ["some"] * 20), ("image", range(20))]
)
def test_a_column_of_another_type_is_named(tmp_path, column, values):
    Dataset.from_dict(good_rows() | {column: list(values)}).save_to_disk(tmp_path / "data")
    with pytest.raises(ValueError, match=f"column '{column}' has the type"):
        load_vqa_dataset(str(tmp_path / "data"))


def test_a_sample_id_that_occurs_twice_is_named(tmp_path):
    rows = good_rows() | {"sample_id": [str(row % 15) for row in range(20)]}
    Dataset.from_dict(rows).save_to_disk(tmp_path / "data")
    with pytest.raises(ValueError, match="rows 0 and 15, column 'sample_id'"):
        load_vqa_dataset(str(tmp_path / "data"))


def test_a_file_without_rows_is_refused(tmp_path):
    Dataset.from_dict(good_rows()).select([]).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="train.parquet' cannot be read .*hold rows"):
        load_vqa_dataset(str(tmp_path / "train.parquet"))
