"""Where rows come from: every kind of source gives the same rows; parts of a split share no image; clear errors."""

import io
import os
import shutil
import time
from pathlib import Path

import datasets
import datasets.distributed
import pytest
from datasets import Dataset, DatasetDict, Features, Image, List, NamedSplit, Value, load_from_disk
from PIL import Image as PILImage
from published import coco_2014_vqa_row, encoded_image, published_table, text_vqa_row
from pyarrow import parquet
from torch.utils.data import DataLoader

from joint_controller.data import VQA_DATASETS, SplitPart, load_vqa_dataset, read_source


ROWS = [text_vqa_row(number) for number in range(30)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The validation split of TextVQA, as people have it on disk: paths by kind of source."""
    folder = tmp_path_factory.mktemp("sources")
    table = published_table("text_vqa", ROWS)
    (folder / "repository" / "data").mkdir(parents=True)
    for shard in range(3):
        table.select(range(10 * shard, 10 * shard + 10)).to_parquet(
            folder / "repository" / "data" / f"validation-{shard:05d}-of-00003.parquet"
        )
    (folder / "files").mkdir()
    for shard in range(2):
        table.select(range(15 * shard, 15 * shard + 15)).to_parquet(folder / "files" / f"val_{shard}.parquet")
    table.to_parquet(folder / "validation.parquet")
    DatasetDict({"validation": table, "train": table.select([0])}).save_to_disk(folder / "dictionary")
    table.info.splits = None
    Dataset(table.data, info=table.info, split=NamedSplit("validation")).save_to_disk(folder / "saved")
    names = ("repository", "files", "validation.parquet", "dictionary", "saved")
    return {name: folder / name for name in names}


KINDS = ["repository", "files", "validation.parquet", "dictionary", "saved"]


# ---- kinds of sources -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("streaming", [False, True])
def test_all_kinds_of_files_give_the_same_rows(sources, kind, streaming):
    rows = list(read_source(f"text_vqa={sources[kind]}", "validation", streaming))
    assert [row["sample_id"] for row in rows] == [f"text_vqa/validation/{34602 + number}" for number in range(30)]
    assert [row["image"]["bytes"] for row in rows] == [row["image"]["bytes"] for row in ROWS]
    assert [row["answers"] for row in rows] == [row["answers"] for row in ROWS]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_written_next_to_the_data(sources, kind):
    files = sorted((path, path.stat().st_mtime_ns) for path in sources["repository"].parent.rglob("*"))
    list(read_source(f"text_vqa={sources[kind]}", "validation[:50%]"))
    assert sorted((path, path.stat().st_mtime_ns) for path in sources["repository"].parent.rglob("*")) == files


def test_a_local_repository_is_read_by_its_bare_name(sources, tmp_path, monkeypatch):
    """`datasets` takes a folder of the repository's name for the repository, which stands in for the Hub here."""
    repository = tmp_path / VQA_DATASETS["text_vqa"].repository
    shutil.copytree(sources["repository"], repository)
    (repository / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: validation\n    path: data/validation-*\n---\n"
    )
    monkeypatch.chdir(tmp_path)
    expected = list(read_source(f"text_vqa={sources['repository']}", "validation"))
    assert list(read_source("text_vqa", "validation")) == expected
    assert list(read_source("text_vqa", "validation", streaming=True)) == expected


def test_a_configuration_and_a_split_of_another_repository_are_asked_for(tmp_path, monkeypatch):
    row = {
        "questionId": "1",
        "question": "What?",
        "image": encoded_image(1),
        "answers": ["a"],
        "ucsf_document_id": "x",
    }
    for repository, folder, split, configuration in (
        ("lmms-lab/DocVQA", "DocVQA", "validation", "DocVQA"),
        ("lmms-lab/DocVQA", "InfographicVQA", "validation", "InfographicVQA"),
        ("HuggingFaceM4/DocumentVQA", "data", "train", "default"),
    ):
        path = tmp_path / repository / folder
        path.mkdir(parents=True)
        published_table("doc_qa", [{**row, "question": f"What of {folder}?"}]).to_parquet(
            path / f"{split}-00000-of-00001.parquet"
        )
        readme = path.parent / "README.md"
        text = readme.read_text().removesuffix("---\n") if readme.exists() else "---\nconfigs:\n"
        readme.write_text(
            f"{text}- config_name: {configuration}\n  data_files:\n  - split: {split}\n    path: {folder}/{split}-*\n---\n"
        )
    monkeypatch.chdir(tmp_path)
    for streaming in (False, True):
        assert [row["question"] for row in read_source("doc_qa", "validation", streaming)] == ["What of DocVQA?"]
        assert [row["question"] for row in read_source("doc_qa", "train", streaming)] == ["What of data?"]
    # The repository as a local folder, too.
    local = read_source("doc_qa=lmms-lab/DocVQA", "validation")
    assert [row["question"] for row in local] == ["What of DocVQA?"]


def test_without_a_connection_the_error_says_what_to_give(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    for streaming in (False, True):
        with pytest.raises(ValueError, match="give a folder that holds it, as 'text_vqa=path/to/folder'") as caught:
            read_source("text_vqa", "validation", streaming)
        assert "'lmms-lab/textvqa' on the Hub" in str(caught.value) and "\n" not in str(caught.value)


def test_a_second_load_reads_what_the_first_one_wrote(sources, cache):
    first = read_source(f"text_vqa={sources['repository']}", "validation")
    written = {path: path.stat().st_mtime_ns for path in cache.rglob("*.arrow")}
    assert written
    second = read_source(f"text_vqa={sources['repository']}", "validation")
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.arrow")} == written
    assert second._fingerprint == first._fingerprint


def test_a_changed_file_is_read_anew(tmp_path):
    path = tmp_path / "validation.parquet"
    published_table("text_vqa", ROWS[:2]).to_parquet(path)
    assert len(read_source(f"text_vqa={path}", "validation")) == 2
    published_table("text_vqa", ROWS[2:5]).to_parquet(path)
    os.utime(path, ns=(time.time_ns(), time.time_ns() + 10**9))
    rows = read_source(f"text_vqa={path}", "validation")
    assert rows["sample_id"][:] == [f"text_vqa/validation/{34602 + number}" for number in (2, 3, 4)]


def test_images_are_neither_decoded_nor_copied(tmp_path, cache):
    """Tables of texts are small compared with that of the file, and a row's image is what the file has, however damaged."""
    rows = [{**row, "image": {"bytes": os.urandom(100_000), "path": None}} for row in ROWS]
    published_table("text_vqa", rows).to_parquet(tmp_path / "validation.parquet")
    loaded = read_source(f"text_vqa={tmp_path / 'validation.parquet'}", "validation")
    assert loaded[7]["image"] == rows[7]["image"]
    sizes = sorted(path.stat().st_size for path in cache.rglob("*.arrow"))
    assert sizes[-1] > 3_000_000 and sum(sizes[:-1]) < 100_000


# ---- streaming ------------------------------------------------------------------------------------------------------


def science_rows(tmp_path: Path) -> str:
    """A data set without ids of its own, in three files."""
    rows = [
        {"image": encoded_image(number), "question": f"{number}?", "choices": ["a", "b"], "answer": 0}
        for number in range(40)
    ]
    for shard, (start, stop) in enumerate(((0, 7), (7, 30), (30, 40))):
        path = tmp_path / f"test-{shard:05d}-of-00003.parquet"
        published_table("science_qa_img", rows[start:stop]).to_parquet(path)
    return f"science_qa_img={tmp_path}"


def test_rows_keep_their_ids_when_files_are_shuffled_and_shared_out(tmp_path):
    name = science_rows(tmp_path)
    expected = {row["sample_id"]: row["question"] for row in read_source(name, "test")}
    assert len(expected) == 40
    stream = read_source(name, "test", streaming=True)
    assert stream.num_shards == 3
    orders = []
    for epoch in range(2):
        shuffled = stream.shuffle(seed=3, buffer_size=4)
        shuffled.set_epoch(epoch)
        order = [row["sample_id"] for row in shuffled]
        assert {row["sample_id"]: row["question"] for row in shuffled} == expected
        orders.append(order)
    assert orders[0] != orders[1] != list(expected)
    workers = DataLoader(stream, num_workers=2, batch_size=None)
    assert {row["sample_id"]: row["question"] for row in workers} == expected
    shares = [
        {row["sample_id"]: row["question"] for row in datasets.distributed.split_dataset_by_node(stream, rank, 3)}
        for rank in range(3)
    ]
    assert {**shares[0], **shares[1], **shares[2]} == expected and sum(map(len, shares)) == 40


@pytest.mark.parametrize("kind", KINDS)
def test_tables_are_streamed_in_parts(sources, kind):
    stream = read_source(f"text_vqa={sources[kind]}", "validation", streaming=True)
    assert stream.num_shards > 1 or kind == "validation.parquet"


# ---- parts of a split -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["repository", "saved"])
def test_parts_share_no_image_and_make_the_whole(sources, kind):
    name = f"text_vqa={sources[kind]}"
    whole = {row["sample_id"]: row["image"]["bytes"] for row in read_source(name, "validation")}
    parts = [
        {row["sample_id"]: row["image"]["bytes"] for row in read_source(name, split)}
        for split in ("validation[:30%]", "validation[30%:70%]", "validation[70%:]")
    ]
    assert {**parts[0], **parts[1], **parts[2]} == whole and sum(map(len, parts)) == 30
    images = [set(part.values()) for part in parts]
    assert sum(map(len, images)) == len(set.union(*images)) == 15
    streamed = read_source(name, "validation[30%:70%]", streaming=True)
    assert [row["sample_id"] for row in streamed] == list(parts[1])
    # The same images whatever the source, since their ids tell.
    other = read_source(f"text_vqa={sources['files']}", "validation[:30%]")
    assert {row["sample_id"] for row in other} == set(parts[0])


def test_without_image_ids_the_bytes_tell_images_apart(tmp_path):
    rows = [
        {"image": encoded_image(number // 3), "question": f"{number}?", "choices": ["a"], "answer": 0}
        for number in range(60)
    ]
    published_table("science_qa_img", rows).to_parquet(tmp_path / "test.parquet")
    name = f"science_qa_img={tmp_path}"
    for streaming in (False, True):
        parts = [list(read_source(name, split, streaming)) for split in ("test[:50%]", "test[50%:]")]
        assert len(parts[0]) + len(parts[1]) == 60 and min(map(len, parts)) > 0
        images = [{row["image"]["bytes"] for row in part} for part in parts]
        assert not images[0] & images[1]


def test_a_share_of_the_images_is_about_that_share():
    inside = sum(SplitPart("train", 20, 50).contains(f"image {number}") for number in range(10_000))
    # Binomial: 3,000 expected, a standard deviation of 46.
    assert abs(inside - 3000) < 230


@pytest.mark.parametrize("name", ["easy_vqa", "scenes"])
def test_parts_of_our_own_data_sets_share_no_image(name):
    def images(split, max_samples=None):
        rows = load_vqa_dataset(name, split, max_samples).cast_column("image", Image(decode=False))
        return {row["sample_id"]: row["image"]["path"] or row["image"]["bytes"] for row in rows}

    whole, parts = images("validation"), [images("validation[:40%]"), images("validation[40%:]")]
    assert {**parts[0], **parts[1]} == whole and len(parts[0]) + len(parts[1]) == len(whole)
    assert parts[0] and parts[1] and not set(parts[0].values()) & set(parts[1].values())
    assert len(images("validation[:40%]", 30)) == 30
    if name == "scenes":
        # There is always a next scene, in a part too.
        assert len(images("validation[:40%]", 600)) == 600


@pytest.mark.parametrize(
    ("split", "part"),
    [
        ("train", SplitPart("train", 0, 100)),
        ("train[:90%]", SplitPart("train", 0, 90)),
        ("val2014[90%:]", SplitPart("val2014", 90, 100)),
        ("dev[5%:10%]", SplitPart("dev", 5, 10)),
        ("dev[:]", SplitPart("dev", 0, 100)),
    ],
)
def test_splits_are_parsed(split, part):
    assert SplitPart.parse(split) == part


@pytest.mark.parametrize(
    "split", ["", "train[5]", "train[:90]", "train[90%:10%]", "train[:0%]", "train[:101%]", "train["]
)
def test_splits_that_are_no_splits_are_refused(split):
    with pytest.raises(ValueError, match="is not understood"):
        SplitPart.parse(split)


# ---- data of one's own ----------------------------------------------------------------------------------------------


OWN_ROWS = {
    "image": [encoded_image(number)["bytes"] for number in range(20)],
    "question": [f"what is {number}?" for number in range(20)],
    "answers": [[str(number)] for number in range(20)],
}


def test_rows_of_a_path_get_ids_by_their_number(tmp_path):
    folder = tmp_path / "shop"
    folder.mkdir()
    Dataset.from_dict(OWN_ROWS).select(range(12)).to_parquet(folder / "train-0.parquet")
    Dataset.from_dict(OWN_ROWS).select(range(12, 20)).to_parquet(folder / "train-1.parquet")
    ids = [f"shop/train/{number:06d}" for number in range(20)]
    assert read_source(str(folder))["sample_id"][:] == ids
    stream = read_source(str(folder), streaming=True)
    assert [row["sample_id"] for row in stream] == ids
    assert {row["sample_id"]: row["question"] for row in stream.shuffle(seed=0, buffer_size=3)} == dict(
        zip(ids, OWN_ROWS["question"], strict=True)
    )


@pytest.mark.parametrize("image", ["bytes", "file", "image"])
def test_parts_of_a_path_share_no_image(tmp_path, image):
    rows = {**OWN_ROWS, "image": [OWN_ROWS["image"][number // 2] for number in range(20)]}
    features = None
    if image == "file":
        for number, encoded in enumerate(rows["image"]):
            (tmp_path / f"{number}.png").write_bytes(encoded)
        rows["image"] = [str(tmp_path / f"{number // 2}.png") for number in range(20)]
    if image == "image":
        features = Features({"image": Image(), "question": Value("string"), "answers": List(Value("string"))})
        rows["image"] = [{"bytes": encoded, "path": None} for encoded in rows["image"]]
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    for streaming in (False, True):
        parts = [
            [int(row["answers"][0]) // 2 for row in read_source(str(tmp_path), split, streaming)]
            for split in ("train[:50%]", "train[50%:]")
        ]
        assert sorted(parts[0] + parts[1]) == sorted(2 * list(range(10)))
        assert parts[0] and parts[1] and not set(parts[0]) & set(parts[1])


def test_a_saved_split_is_not_taken_for_another(tmp_path):
    table = Dataset.from_dict(OWN_ROWS, split=NamedSplit("validation"))
    table.save_to_disk(tmp_path / "saved")
    assert str(load_from_disk(str(tmp_path / "saved")).split) == "validation"
    assert read_source(str(tmp_path / "saved"), "validation")[0]["sample_id"] == "saved/validation/000000"
    with pytest.raises(ValueError, match=r"has no split 'train' \(it has \['validation'\]\)"):
        read_source(str(tmp_path / "saved"))


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("textvqa=nowhere", "train", "no data set 'textvqa=nowhere' \\('textvqa' is not a known name\\).*'text_vqa'"),
        ("text_vqa=nowhere", "train", "no file or folder 'nowhere' for data set 'text_vqa'"),
        ("text_vqa", "testdev", "no split 'testdev': it was published with 'train', 'validation', 'test' \\(without"),
        (
            "coco_2014_vqa",
            "train",
            "'lmms-lab/VQAv2' on the Hub has no split 'train'.*v2_mscoco_train2014_annotations",
        ),
        ("okvqa", "train", "'lmms-lab/OK-VQA' on the Hub has no split 'train'.*has \\['val2014'\\]"),
        ("st_qa", "train", "no split 'train'.*train_task_3.json"),
        ("tally_qa", "validation", "no split 'validation'.*'train', 'test'.*'test\\[:50%\\]'"),
        ("coco_caption", "train", "no split 'train'.*'val', 'test' \\(without answers\\).*'validation\\[:50%\\]'"),
    ],
)
def test_what_does_not_exist_is_refused_with_what_does(name, split, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        read_source(name, split)
    assert "\n" not in str(caught.value)


def test_a_missing_split_is_named_with_the_places_that_were_searched(sources):
    with pytest.raises(ValueError, match="has no split 'train' \\(it has \\['validation'\\]\\)") as caught:
        read_source(f"text_vqa={sources['repository']}", "train")
    for searched in ("train*.parquet", f"{sources['repository']}/data", "TextVQA_0.5.1_train.json", "train_images"):
        assert searched in str(caught.value)


def test_a_file_of_another_data_set_is_refused(sources):
    with pytest.raises(ValueError, match="'coco_2014_vqa' in .* has no column 'question_type'"):
        read_source(f"coco_2014_vqa={sources['repository']}", "validation")


def test_a_column_of_another_type_is_refused(tmp_path):
    table = published_table("coco_2014_vqa", [coco_2014_vqa_row(0)]).remove_columns("answers")
    table.add_column("answers", [["yes"]]).to_parquet(tmp_path / "validation.parquet")
    with pytest.raises(ValueError, match="'coco_2014_vqa' .*, column 'answers' has the type .*published as"):
        read_source(f"coco_2014_vqa={tmp_path}", "validation")


def test_a_split_that_is_there_twice_is_refused(tmp_path):
    for name in ("val", "validation"):
        published_table("text_vqa", ROWS[:1]).to_parquet(tmp_path / f"{name}.parquet")
    with pytest.raises(ValueError, match="has its split 'validation' twice"):
        read_source(f"text_vqa={tmp_path}", "validation")


@pytest.mark.parametrize("streaming", [False, True])
def test_damaged_and_empty_files_are_refused(tmp_path, streaming):
    (tmp_path / "validation.parquet").write_bytes(b"PAR1 and no table")
    with pytest.raises(ValueError, match="cannot be read") as caught:
        read_source(f"text_vqa={tmp_path}", "validation", streaming)
    assert "\n" not in str(caught.value)
    # Not by `to_parquet`, which fails on a data set without rows in the oldest supported version of Datasets.
    parquet.write_table(published_table("text_vqa", []).data.table, tmp_path / "validation.parquet")
    with pytest.raises(ValueError, match="hold rows"):
        read_source(f"text_vqa={tmp_path}", "validation", streaming)


def test_missing_shards_are_warned_of(sources, tmp_path, caplog):
    shutil.copy(sources["repository"] / "data" / "validation-00001-of-00003.parquet", tmp_path)
    assert len(read_source(f"text_vqa={tmp_path}", "validation")) == 10
    assert "has 1 of the 00003 Parquet files of 'validation'" in caplog.text


@pytest.mark.parametrize("name", ["text_vqa={}", "{}"])
def test_an_empty_part_is_refused(tmp_path, name):
    published_table("text_vqa", ROWS[:1]).to_parquet(tmp_path / "validation.parquet")
    sizes = []
    for split in ("validation[:50%]", "validation[50%:]"):
        try:
            sizes.append(len(read_source(name.format(tmp_path), split)))
        except ValueError as error:
            assert "has no image in the part" in str(error)
    assert sizes == [1]


def test_images_are_what_pillow_reads(sources):
    row = read_source(f"text_vqa={sources['repository']}", "validation")[0]
    assert PILImage.open(io.BytesIO(row["image"]["bytes"])).size == (12, 8)
