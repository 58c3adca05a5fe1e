"""Bad rows, of tables and of streams: an error by default, listed and left out on request, never dropped in silence."""

import io
import json
import os
import time

import pytest
from datasets import Dataset, Features, Image, Value, disable_progress_bars, enable_progress_bars
from PIL import Image as PILImage
from published import coco_2014_vqa_row, write_official_coco

from joint_controller.data import (
    FEATURES,
    SkippedRows,
    decode_image,
    load_vqa_dataset,
    load_vqa_datasets,
    row_checks,
    stream_vqa_datasets,
    take_rows,
)
from joint_controller.data.images import MAX_IMAGE_PIXELS


NUM_ROWS = 12
BAD_ROW = 7


def encode(image, format: str = "PNG", **kwargs) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **kwargs)
    return buffer.getvalue()


GOOD = encode(PILImage.new("RGB", (20, 10), "red"))


def too_large() -> bytes:
    # The header of a BMP file says how large it is; the pixels are not even there.
    data = bytearray(encode(PILImage.new("RGB", (4, 4)), "BMP"))
    data[18:26] = (20_000).to_bytes(4, "little") * 2
    return bytes(data)


BAD_VALUES = [
    pytest.param("image", b"no image", "cannot be decoded", id="corrupt"),
    pytest.param("image", GOOD[:50], "cannot be decoded", id="truncated"),
    pytest.param("image", b"", "cannot be decoded", id="empty-file"),
    pytest.param("image", None, "there is no image", id="no-image"),
    pytest.param("image", "no/such/file.jpg", "'no/such/file.jpg' does not exist", id="missing-file"),
    pytest.param("image", encode(PILImage.new("RGB", (1, 1))), "it has 1x1 pixels", id="1x1"),
    pytest.param("image", too_large(), f"more than {MAX_IMAGE_PIXELS:,}", id="20,000x20,000"),
    pytest.param("question", " ", "the question is empty", id="blank-question"),
    pytest.param("question", None, "the question is empty", id="no-question"),
    pytest.param("answers", [], "there are none", id="no-answers"),
    pytest.param("answers", None, "there are none", id="null-answers"),
    pytest.param("answers", ["", " "], "all are empty", id="blank-answers"),
    pytest.param("answers", ["red", None], "an answer is missing", id="null-answer"),
]


def write_rows(folder, column=None, value=None, num_rows: int = NUM_ROWS) -> str:
    """A folder of Parquet files, one of whose rows is bad."""
    rows = {
        "image": [{"bytes": GOOD, "path": None} for _ in range(num_rows)],
        "question": [f"what is {row} ?" for row in range(num_rows)],
        "answers": [["red"] for _ in range(num_rows)],
    }
    if column == "image" and value is not None:
        value = {"bytes": None, "path": value} if isinstance(value, str) else {"bytes": value, "path": None}
    if column is not None:
        rows[column][BAD_ROW] = value
    features = Features({name: FEATURES[name] for name in ("question", "answers")})
    # Not as images: `datasets` would read the missing file to embed it.
    features["image"] = {"bytes": Value("binary"), "path": Value("string")}
    folder.mkdir(parents=True)
    Dataset.from_dict(rows, features=features).to_parquet(folder / "train.parquet")
    return str(folder)


@pytest.mark.parametrize("opens", [load_vqa_datasets, stream_vqa_datasets])
@pytest.mark.parametrize(("column", "value", "message"), BAD_VALUES)
def test_a_bad_row_is_an_error_or_is_listed(tmp_path, opens, column, value, message):
    name = write_rows(tmp_path / "data", column, value)
    with pytest.raises(
        ValueError, match=f"data set '{name}', row 7 .sample 'data/train/000007'. of 'train'"
    ) as caught:
        list(opens([name]))
    assert f"column '{column}'" in str(caught.value) and message in str(caught.value)
    assert "`skip_bad_rows: true`" in str(caught.value) and "\n" not in str(caught.value)

    skipped = SkippedRows(tmp_path / "output" / "skipped_rows.jsonl")
    rows = list(opens([name], skipped_rows=skipped))
    assert sorted(row["sample_id"] for row in rows) == [
        f"data/train/{row:06d}" for row in range(NUM_ROWS) if row != BAD_ROW
    ]
    [listed] = [json.loads(line) for line in skipped.path.read_text().splitlines()]
    assert message in listed.pop("cause")
    assert listed == {
        "dataset": name,
        "split": "train",
        "row": BAD_ROW,
        "sample_id": "data/train/000007",
        "column": column,
    }
    assert skipped.counts() == {(name, "train"): 1}
    assert f"Bad rows left out: 1 of '{name}' (train)" in skipped.summary()


CONVERTIBLE = [
    pytest.param(PILImage.new("P", (8, 8), 3), "PNG", (3, 3, 3), id="palette"),
    pytest.param(PILImage.new("CMYK", (8, 8), (255, 0, 0, 0)), "TIFF", (0, 255, 255), id="cmyk"),
    pytest.param(PILImage.new("I;16", (8, 8), 257 * 90), "PNG", (90, 90, 90), id="16-bit"),
    pytest.param(PILImage.new("RGBA", (8, 8), (9, 9, 9, 0)), "PNG", (255, 255, 255), id="alpha"),
    pytest.param(PILImage.new("LA", (8, 8), (9, 0)), "PNG", (255, 255, 255), id="gray-alpha"),
]


@pytest.mark.parametrize(("image", "format", "color"), CONVERTIBLE)
def test_a_convertible_image_is_no_bad_row(tmp_path, image, format, color):
    if image.mode == "P":
        image.putpalette([value for gray in range(256) for value in (gray, gray, gray)])
    name = write_rows(tmp_path / "data", "image", encode(image, format))
    skipped = SkippedRows()
    for rows in (load_vqa_dataset(name, skipped_rows=skipped), stream_vqa_datasets([name], skipped_rows=skipped)):
        encoded = list(rows.cast_column("image", Image(decode=False)))[BAD_ROW]["image"]
        assert decode_image(encoded).getpixel((0, 0)) == color
    assert not skipped


def test_turned_and_animated_images_are_no_bad_rows(tmp_path):
    exif = PILImage.Exif()
    exif[0x0112] = 6
    turned = encode(PILImage.new("RGB", (20, 10)), "JPEG", exif=exif)
    frames = [PILImage.new("RGB", (8, 8), color) for color in ("red", "blue")]
    animated = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    for kind, data, size in (("turned", turned, (10, 20)), ("animated", animated, (8, 8))):
        dataset = load_vqa_dataset(write_rows(tmp_path / kind, "image", data))
        assert len(dataset) == NUM_ROWS and dataset[BAD_ROW]["image"].size == size


def test_one_of_ten_may_have_answered_nothing(tmp_path):
    name = write_rows(tmp_path / "data", "answers", ["red"] * 9 + [""])
    assert load_vqa_dataset(name)[BAD_ROW]["answers"] == ["red"] * 9 + [""]


@pytest.mark.parametrize("opens", [load_vqa_datasets, stream_vqa_datasets])
def test_bad_rows_of_official_files(tmp_path, opens):
    rows = [coco_2014_vqa_row(number) for number in range(8)]
    rows[3]["question"] = ""
    write_official_coco(tmp_path, "val2014", "v2_", rows)
    (tmp_path / "val2014" / "COCO_val2014_000000000044.jpg").unlink()  # of questions 4 and 5
    (tmp_path / "val2014" / "COCO_val2014_000000000045.jpg").write_bytes(GOOD[:40])  # of 6 and 7
    name = f"coco_2014_vqa={tmp_path}"
    with pytest.raises(ValueError, match="row 0 .sample 'coco_2014_vqa/validation/45001'.*cannot be decoded"):
        list(opens([name], "validation"))
    skipped = SkippedRows()
    kept = list(opens([name], "validation", skipped_rows=skipped))
    assert sorted(row["sample_id"] for row in kept) == [
        f"coco_2014_vqa/validation/{question}" for question in (42000, 42001, 43000)
    ]
    # Rows are those of the annotations, which are written here from the last to the first.
    assert [(bad.row, bad.column) for bad in skipped] == [*((row, "image") for row in range(4)), (4, "question")]
    assert ["does not exist" in bad.cause for bad in skipped] == [False, False, True, True, False]


def test_the_error_counts_the_others(tmp_path):
    rows = [{"image": GOOD, "question": "what ?", "answers": ["red"] if row % 3 else []} for row in range(NUM_ROWS)]
    Dataset.from_list(rows).save_to_disk(tmp_path / "data")
    with pytest.raises(ValueError, match=r"row 0 .*\(4 of 12 rows are bad.\)"):
        load_vqa_dataset(str(tmp_path / "data"))
    skipped = SkippedRows()
    assert len(load_vqa_dataset(str(tmp_path / "data"), skipped_rows=skipped)) == 8
    assert [bad.row for bad in skipped] == [0, 3, 6, 9]


def test_a_data_set_without_a_good_row_is_refused(tmp_path):
    Dataset.from_list([{"image": GOOD, "question": "", "answers": ["red"]}] * 3).save_to_disk(tmp_path / "data")
    with pytest.raises(ValueError, match="has no good row in 'train'"):
        load_vqa_dataset(str(tmp_path / "data"), skipped_rows=SkippedRows())


def test_rows_keep_their_numbers_in_a_subset(tmp_path):
    name = write_rows(tmp_path / "data", "question", "")
    skipped = SkippedRows()
    found = set()
    for seed in range(4):
        found |= {bad.row for bad in skipped}
        load_vqa_dataset(name, max_samples=9, seed=seed, skipped_rows=skipped)
    assert found == {BAD_ROW}


def test_the_list_has_each_row_once_and_forgets_what_was_repaired(tmp_path):
    bad, other = write_rows(tmp_path / "bad", "question", ""), write_rows(tmp_path / "other", "answers", [])
    path = tmp_path / "skipped_rows.jsonl"
    for _ in range(2):
        skipped = SkippedRows(path)
        for name in (bad, other):
            stream = stream_vqa_datasets([name], skipped_rows=skipped)
            for epoch in range(2):
                stream.set_epoch(epoch)
                list(stream)
    assert len(path.read_text().splitlines()) == 2
    (tmp_path / "bad" / "train.parquet").unlink()
    (tmp_path / "bad").rmdir()
    write_rows(tmp_path / "bad")
    skipped = SkippedRows(path)
    load_vqa_datasets([bad, other], skipped_rows=skipped)
    assert [json.loads(line)["dataset"] for line in path.read_text().splitlines()] == [other]


def test_loading_a_split_twice_in_a_run_loses_no_row_of_the_list(tmp_path):
    name = write_rows(tmp_path / "data", "question", "")
    for _ in range(2):
        skipped = SkippedRows(tmp_path / "skipped_rows.jsonl")
        load_vqa_dataset(name, skipped_rows=skipped)
        subset = load_vqa_dataset(name, max_samples=2, seed=0, skipped_rows=skipped)
        assert subset["sample_id"][:] == ["data/train/000006", "data/train/000011"]
        assert len(skipped) == len(skipped.path.read_text().splitlines()) == 1


def test_rows_are_checked_once(tmp_path, monkeypatch):
    name = write_rows(tmp_path / "data")
    checked = []
    find_fault = row_checks.find_fault
    monkeypatch.setattr(row_checks, "find_fault", lambda row: checked.append(row["sample_id"]) or find_fault(row))
    load_vqa_dataset(name)
    assert len(checked) == NUM_ROWS
    load_vqa_dataset(name)
    assert len(checked) == NUM_ROWS
    os.utime(tmp_path / "data" / "train.parquet", (time.time() + 5,) * 2)
    load_vqa_dataset(name)
    assert len(checked) == 2 * NUM_ROWS


def test_an_image_file_is_checked_again_when_it_has_changed(tmp_path):
    for row in range(3):
        (tmp_path / f"{row}.png").write_bytes(GOOD)
    rows = {
        "image": [str(tmp_path / f"{row}.png") for row in range(3)],
        "question": ["what ?"] * 3,
        "answers": [["red"]] * 3,
    }
    Dataset.from_dict(rows).save_to_disk(tmp_path / "data")
    name = str(tmp_path / "data")
    assert len(load_vqa_dataset(name)) == 3
    (tmp_path / "1.png").write_bytes(GOOD[:40])
    with pytest.raises(ValueError, match="row 1 "):
        load_vqa_dataset(name)
    (tmp_path / "1.png").unlink()
    with pytest.raises(ValueError, match="1.png' does not exist"):
        load_vqa_dataset(name)
    (tmp_path / "1.png").write_bytes(GOOD)
    assert len(load_vqa_dataset(name)) == 3


def test_a_check_shows_its_progress_unless_that_is_switched_off(tmp_path, capsys):
    load_vqa_dataset(write_rows(tmp_path / "one"))
    assert "Checking" in capsys.readouterr().err
    disable_progress_bars()
    try:
        load_vqa_dataset(write_rows(tmp_path / "two"))
    finally:
        enable_progress_bars()
    assert "Checking" not in capsys.readouterr().err


def test_a_stream_stops_reading_where_it_is_left(tmp_path):
    name = write_rows(tmp_path / "data", "question", "")
    head = take_rows(stream_vqa_datasets([name]), 5)
    assert head.features == FEATURES and head["sample_id"][:] == [f"data/train/{row:06d}" for row in range(5)]
    assert head[0]["image"].size == (20, 10)
    with pytest.raises(ValueError, match="row 7"):
        take_rows(stream_vqa_datasets([name]), 8)
