"""A new data set, as docs/extending.md writes it: without code, and by name."""

import datasets
import pytest
from datasets import Dataset
from pages import DOCS, code_blocks
from PIL import Image

from joint_controller.data import VQA_DATASETS, load_vqa_dataset


WITHOUT_CODE, BY_NAME = code_blocks(DOCS / "extending.md", "python", "A new data set")


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "photos").mkdir()
    for number, color in enumerate(("red", "blue"), start=1):
        Image.new("RGB", (32, 24), color).save(tmp_path / "photos" / f"{number}.png")


def test_a_folder_of_parquet_files_is_a_data_set(photos):
    exec(WITHOUT_CODE, {})
    for split in ("train", "validation", "test"):
        dataset = load_vqa_dataset("shop_vqa", split)
        assert dataset["sample_id"] == [f"shop_vqa/{split}/000000", f"shop_vqa/{split}/000001"]
        assert dataset["answers"] == [["red"], ["2", "two"]]
        assert set(dataset["metric"]) == {"vqa_accuracy"} and set(dataset["style"]) == {"vqa2"}
        assert dataset[0]["image"].size == (32, 24)


def test_an_entry_gives_a_published_data_set_a_name(photos, monkeypatch):
    monkeypatch.setitem(VQA_DATASETS, "shop_cases", None)  # forgotten after the test
    definitions = {}
    exec(BY_NAME, definitions)
    columns = VQA_DATASETS["shop_cases"].columns
    rows = {
        "case": ["a1", "a2", "b1"],
        "photo_name": ["1", "1", "2"],
        "photo": ["photos/1.png", "photos/1.png", "photos/2.png"],
        "query": ["what color is it ?", "is it red ?", "what color is it ?"],
        "label": ["red", "yes", "blue"],
    }
    Dataset.from_dict(rows, features=columns).to_parquet("repository/data/val-00000-of-00001.parquet")
    dataset = load_vqa_dataset("shop_cases=repository", "validation")
    assert dataset["sample_id"] == ["shop_cases/val/a1", "shop_cases/val/a2", "shop_cases/val/b1"]
    assert dataset["question"] == rows["query"]
    assert dataset["answers"] == [["red"], ["yes"], ["blue"]]
    assert set(dataset["metric"]) == {"exact_match"}
    assert dataset[2]["image"].convert("RGB").getpixel((0, 0)) == (0, 0, 255)

    with pytest.raises(ValueError, match="split 'test' of data set 'shop_cases' has no answers"):
        load_vqa_dataset("shop_cases=repository", "test")
    with pytest.raises(ValueError, match="shop_cases"):
        load_vqa_dataset("shop_cases=repository", "train")
