"""Official JSON files and image folders: the rows of the repository on the Hub, with the same ids."""

import io
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import datasets
import pytest
from datasets import Dataset
from PIL import Image as PILImage
from published import (
    coco_2014_vqa_row,
    encoded_image,
    okvqa_row,
    published_table,
    text_vqa_row,
    write_official_coco,
    write_official_text_vqa,
)

from joint_controller.cli import main
from joint_controller.data import load_vqa_dataset, read_source
from joint_controller.latency import embedded_latency_estimator_path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def official_okvqa_row(number: int) -> dict:
    """As in OK-VQA's files: ids are numbers, answers have a form before and after stemming."""
    row = okvqa_row(number)
    answers = [
        {"answer": answer, "raw_answer": f"{answer}s", "answer_confidence": "yes", "answer_id": answer_id}
        for answer_id, answer in enumerate(row["answers"], start=1)
    ]
    return {**row, "question_id": int(row["question_id"]), "image_id": 297147 + number, "answers": answers}


def write_official(folder: Path, num_validation: int) -> dict[str, Path]:
    """The official files of three data sets, train and validation, each in a folder of its own."""
    folders = {name: folder / name for name in ("text_vqa", "coco_2014_vqa", "okvqa")}
    subsets = {"train": range(20, 24), "val": range(num_validation)}
    for subset, numbers in subsets.items():
        write_official_text_vqa(folders["text_vqa"], subset, [text_vqa_row(number) for number in numbers])
        rows = [coco_2014_vqa_row(number) for number in numbers]
        write_official_coco(folders["coco_2014_vqa"], f"{subset}2014", "v2_", rows)
        write_official_coco(folders["okvqa"], f"{subset}2014", "", [official_okvqa_row(number) for number in numbers])
    return folders


@pytest.fixture
def official(tmp_path) -> dict[str, Path]:
    return write_official(tmp_path / "official", num_validation=6)


PUBLISHED_ROWS = {"text_vqa": text_vqa_row, "coco_2014_vqa": coco_2014_vqa_row, "okvqa": okvqa_row}


@pytest.mark.parametrize("name", list(PUBLISHED_ROWS))
@pytest.mark.parametrize("streaming", [False, True])
def test_official_files_give_the_rows_of_the_hub(official, tmp_path, name, streaming):
    table = published_table(name, [PUBLISHED_ROWS[name](number) for number in range(6)])
    (tmp_path / "hub").mkdir()
    table.to_parquet(tmp_path / "hub" / "validation-00000-of-00001.parquet")
    expected = {row["sample_id"]: row for row in read_source(f"{name}={tmp_path / 'hub'}", "validation")}
    rows = {row["sample_id"]: row for row in read_source(f"{name}={official[name]}", "validation", streaming)}
    assert rows.keys() == expected.keys() and len(rows) == 6
    for sample_id, row in rows.items():
        image = row.pop("image")
        assert image["bytes"] is None
        assert Path(image["path"]).read_bytes() == expected[sample_id].pop("image")["bytes"]
        assert row == expected[sample_id]
    # Parts of it hold the same questions, too.
    part = f"{name}={{}}", "validation[:50%]"
    hub_part = read_source(part[0].format(tmp_path / "hub"), part[1])
    official_part = read_source(part[0].format(official[name]), part[1])
    assert set(hub_part["sample_id"]) == set(official_part["sample_id"])


@pytest.mark.slow
def test_the_recipe_trains_on_the_official_files(tmp_path, monkeypatch):
    """As it is shipped, but for the executor, its budgets and the number of steps: the paths are those of the recipe."""
    recipe = Path(__file__).parents[2] / "recipes" / "molmoe_1b" / "grpo.yaml"
    monkeypatch.chdir(tmp_path)
    folders = write_official(tmp_path / "data", num_validation=20)
    for name, folder in (("text_vqa", "textvqa"), ("coco_2014_vqa", "vqav2")):
        folders[name].rename(tmp_path / "data" / folder)
    changes = {
        "model_path": "embedded",
        "latency_estimator_path": str(embedded_latency_estimator_path()),
        "latency_budget_min_fraction": 0.5,
        "max_new_tokens": 2,
        "max_static_samples": 2,
        "max_steps": 8,
        "eval_steps": 8,
        "save_steps": 8,
        "per_device_train_batch_size": 8,
    }
    flags = [part for name, value in changes.items() for part in (f"--{name}", str(value))]
    assert main(["train", "--config", str(recipe), *flags]) == 0
    outcomes = Dataset.from_parquet(str(tmp_path / "outputs" / "molmoe_1b" / "outcomes" / "*.parquet"))
    names = {sample_id.split("/")[0] for sample_id in outcomes["sample_id"]}
    assert names == set(PUBLISHED_ROWS)
    assert (tmp_path / "outputs" / "molmoe_1b" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", list(PUBLISHED_ROWS))
def test_training_splits_are_loaded_checked_and_decoded(official, name):
    dataset = load_vqa_dataset(f"{name}={official[name]}", "train")
    assert len(dataset) == 4
    assert all(sample_id.startswith(f"{name}/train") for sample_id in dataset["sample_id"])
    assert dataset[0]["image"].size == (12, 8)
    validation = load_vqa_dataset(f"{name}={official[name]}", "validation")
    assert not set(dataset["sample_id"]) & set(validation["sample_id"])


def test_files_may_lie_in_folders_of_their_own(official):
    folder = official["coco_2014_vqa"]
    for name, pattern in (("Questions", "*questions.json"), ("Annotations", "*annotations.json")):
        (folder / name).mkdir()
        for file in folder.glob(pattern):
            file.rename(folder / name / file.name)
    (folder / "Images" / "mscoco").mkdir(parents=True)
    for images in ("train2014", "val2014"):
        (folder / images).rename(folder / "Images" / "mscoco" / images)
    rows = read_source(f"coco_2014_vqa={folder}", "validation")
    assert len(rows) == 6
    assert all("/Images/mscoco/val2014/COCO_val2014_0000000000" in row["image"]["path"] for row in rows)


def test_images_are_named_as_officially(official):
    row = read_source(f"coco_2014_vqa={official['coco_2014_vqa']}", "validation")
    paths = {Path(image["path"]).relative_to(official["coco_2014_vqa"]) for image in row["image"]}
    assert Path("val2014/COCO_val2014_000000000042.jpg") in paths
    row = read_source(f"text_vqa={official['text_vqa']}", "validation")[0]
    assert Path(row["image"]["path"]) == official["text_vqa"] / "train_images" / "0000000000000000.jpg"


def test_a_missing_image_is_found_when_rows_are_checked(official):
    (official["okvqa"] / "val2014" / "COCO_val2014_000000297149.jpg").unlink()
    assert len(read_source(f"okvqa={official['okvqa']}", "validation")) == 6
    with pytest.raises(ValueError, match="okvqa/val2014/2971495.*column 'image'.*COCO_val2014_000000297149.jpg"):
        load_vqa_dataset(f"okvqa={official['okvqa']}", "validation")


# ---- the cache ------------------------------------------------------------------------------------------------------


def test_a_second_load_reads_no_json(official, cache):
    name = f"coco_2014_vqa={official['coco_2014_vqa']}"
    first = read_source(name, "train")
    written = {path: path.stat().st_mtime_ns for path in cache.rglob("*.arrow")}
    second = read_source(name, "train")
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.arrow")} == written
    assert second._fingerprint == first._fingerprint


def test_another_process_finds_what_the_first_one_wrote(official, cache):
    name = f"text_vqa={official['text_vqa']}"
    first = read_source(name, "train")
    written = set(cache.rglob("*.arrow"))
    code = (
        f"import datasets; datasets.config.HF_DATASETS_CACHE = {str(cache)!r}\n"
        f"from joint_controller.data import read_source; print(read_source({name!r}, 'train')._fingerprint)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == first._fingerprint
    assert set(cache.rglob("*.arrow")) == written


def test_a_changed_file_is_read_anew(official):
    folder = official["text_vqa"]
    assert len(read_source(f"text_vqa={folder}", "validation")) == 6
    write_official_text_vqa(folder, "val", [text_vqa_row(number) for number in range(8)])
    assert len(read_source(f"text_vqa={folder}", "validation")) == 8


# ---- what is missing or damaged -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "missing", "message"),
    [
        ("coco_2014_vqa", "v2_mscoco_val2014_annotations.json", "no file 'v2_mscoco_val2014_annotations.json'"),
        ("coco_2014_vqa", "v2_OpenEnded_mscoco_val2014_questions.json", "no file 'v2_OpenEnded_mscoco_val2014_qu"),
        ("okvqa", "val2014", "no folder 'val2014'"),
        ("text_vqa", "train_images", "no folder 'train_images'"),
    ],
)
def test_missing_files_are_named_with_the_place(official, name, missing, message):
    folder = official[name]
    (folder / missing).rename(folder.parent / f"kept {missing}")
    with pytest.raises(ValueError, match=f"'{name}' in '{folder}' has {message}") as caught:
        read_source(f"{name}={folder}", "validation")
    assert "needs" in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_with_none_of_the_files_is_told_what_was_looked_for(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no split 'train'") as caught:
        read_source(f"coco_2014_vqa={tmp_path / 'empty'}")
    for file in ("v2_OpenEnded_mscoco_train2014_questions.json", "v2_mscoco_train2014_annotations.json", "train2014"):
        assert f"'{file}'" in str(caught.value)


def edit(file: Path, change) -> None:
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def set_field(key: str, row: int, field: str, value, document: dict) -> None:
    document[key][row][field] = value


QUESTIONS, ANNOTATIONS = "v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (ANNOTATIONS, lambda document: document["annotations"][3].pop("answers"), "row 3 has no 'answers' .it has"),
        (ANNOTATIONS, lambda document: document["annotations"][2].pop("image_id"), "row 2 has no 'image_id'"),
        (QUESTIONS, lambda document: document["questions"][1].pop("question"), "row 1 has no 'question'"),
        (QUESTIONS, lambda document: document["questions"].pop(0), "row 5: .* has no question 42000"),
        (ANNOTATIONS, lambda document: document["annotations"].pop(), "no answers to 1 questions .* is 42000"),
        (ANNOTATIONS, lambda document: document.pop("annotations"), "has no rows under 'annotations'"),
        *(
            (file, partial(set_field, key, row, field, value), f"{file}', row {row}, field '{field}' is {message}")
            for file, key, row, field, value, message in (
                (ANNOTATIONS, "annotations", 3, "image_id", "forty-two", "'forty-two', which is not a whole number"),
                (ANNOTATIONS, "annotations", 2, "image_id", 42.5, "42.5, which is not a whole number"),
                (ANNOTATIONS, "annotations", 1, "image_id", None, "None, which is not a whole number"),
                (ANNOTATIONS, "annotations", 0, "question_id", [42], r"\[42\], which is not a whole number"),
                (ANNOTATIONS, "annotations", 4, "answers", None, "None, which is not a list"),
                (QUESTIONS, "questions", 5, "question_id", "42", "'42', which is not a whole number"),
            )
        ),
    ],
)
def test_files_that_do_not_fit_are_refused_where_they_do_not(official, file, change, message):
    edit(official["coco_2014_vqa"] / file, change)
    with pytest.raises(ValueError, match=f"official files of data set 'coco_2014_vqa' .*{message}") as caught:
        read_source(f"coco_2014_vqa={official['coco_2014_vqa']}", "validation")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "{}", "no JSON", '{"data": [{"question": "what?"'])
def test_damaged_json_is_refused(official, content):
    (official["text_vqa"] / "TextVQA_0.5.1_val.json").write_text(content)
    with pytest.raises(ValueError, match="official files of data set 'text_vqa'.*TextVQA_0.5.1_val.json'") as caught:
        read_source(f"text_vqa={official['text_vqa']}", "validation")
    assert "\n" not in str(caught.value)


def test_an_image_outside_the_folder_of_its_data_set_is_refused(official, tmp_path):
    """Though it is there, and can be read."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "1.jpg").write_bytes(encoded_image(1)["bytes"])
    name = "../../../secret/1"
    assert (official["text_vqa"] / "train_images" / f"{name}.jpg").is_file()
    edit(official["text_vqa"] / "TextVQA_0.5.1_val.json", partial(set_field, "data", 4, "image_id", name))
    message = f"row 4, field 'image_id' names the image 'train_images/{name}.jpg': give its path below the data set's"
    with pytest.raises(ValueError, match=message) as caught:
        read_source(f"text_vqa={official['text_vqa']}", "validation")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["../../secret/1.jpg", "{}/secret/1.jpg", "coco-text/../../secret/1.jpg", None, 7])
def test_a_path_that_leaves_the_folder_of_its_data_set_is_refused(tmp_path, path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "1.jpg").write_bytes(encoded_image(1)["bytes"])
    (tmp_path / "st_qa" / "coco-text").mkdir(parents=True)
    path = path.format(tmp_path) if isinstance(path, str) else path
    record = {"file_path": path, "question": "What shop?", "question_id": 11, "answers": ["corner"]}
    (tmp_path / "st_qa" / "train_task_3.json").write_text(json.dumps({"data": [record]}))
    message = "names the image" if isinstance(path, str) else f"is {path}, which is not a string"
    with pytest.raises(ValueError, match=f"train_task_3.json', row 0, field 'file_path' {message}"):
        read_source(f"st_qa={tmp_path / 'st_qa'}")


def test_image_folders_may_be_links(official, tmp_path):
    (official["text_vqa"] / "train_images").rename(tmp_path / "elsewhere")
    (official["text_vqa"] / "train_images").symlink_to(tmp_path / "elsewhere")
    assert load_vqa_dataset(f"text_vqa={official['text_vqa']}", "validation")[0]["image"].size == (12, 8)


# ---- further official files -----------------------------------------------------------------------------------------


def test_scene_text_vqa(tmp_path):
    record = {
        "dataset": "coco-text",
        "file_name": "COCO_train2014_000000000149.jpg",
        "file_path": "coco-text/COCO_train2014_000000000149.jpg",
        "question": "What is the name of the shop?",
        "question_id": 11,
        "answers": ["corner", "the corner"],
        "set_name": "train",
    }
    (tmp_path / "train_task_3.json").write_text(json.dumps({"date": "2019", "task": "task_3", "data": [record]}))
    with pytest.raises(ValueError, match="names the image 'coco-text/COCO.*there is no folder 'coco-text'"):
        read_source(f"st_qa={tmp_path}")
    image = tmp_path / "train" / record["file_path"]
    image.parent.mkdir(parents=True)
    image.write_bytes(encoded_image(1)["bytes"])
    # The test images, unpacked next to them, have folders of the same names.
    (tmp_path / "test" / "coco-text").mkdir(parents=True)
    row = read_source(f"st_qa={tmp_path}")[0]
    assert row["sample_id"] == "st_qa/train/11"
    assert row["answers"] == ["corner", "the corner"] and row["metric"] == "anls" and row["style"] == "st_qa"
    assert row["image"] == {"bytes": None, "path": str(image)}


def test_tally_qa(tmp_path):
    records = [
        {
            "answer": 4,
            "data_source": "imported_genome",
            "image": "VG_100K_2/2410408.jpg",
            "image_id": 92410408,
            "issimple": False,
            "question": "How many headlights does the black bus have?",
            "question_id": 30095774,
        }
    ]
    (tmp_path / "test.json").write_text(json.dumps(records))
    # Training questions were not told apart.
    del records[0]["issimple"]
    (tmp_path / "train.json").write_text(json.dumps(records))
    (tmp_path / "VG_100K_2").mkdir()
    (tmp_path / "VG_100K_2" / "2410408.jpg").write_bytes(encoded_image(1)["bytes"])
    for split in ("train", "test"):
        row = read_source(f"tally_qa={tmp_path}", split)[0]
        assert row["sample_id"] == f"tally_qa/{split}/30095774"
        assert row["answers"] == ["4"] and row["metric"] == "exact_count"
        assert row["question_type"] == {"train": "unknown", "test": "complex"}[split]
        assert PILImage.open(io.BytesIO(Path(row["image"]["path"]).read_bytes())).size == (12, 8)
