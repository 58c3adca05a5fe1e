"""The data that recipes name: one set of fields for all scripts, splits and limits, and the file of rows left out."""

import io
import json

import numpy as np
import pytest
from datasets import Dataset, IterableDataset
from PIL import Image

from joint_controller.cli import main
from joint_controller.molmo.blocks import importance_command
from joint_controller.scripts import profile, sweep, train
from joint_controller.scripts.data_arguments import (
    SKIPPED_ROWS_FILE,
    DataArguments,
    load_data_splits,
    load_split,
    open_skipped_rows,
)


def write_dataset(folder, num_rows: dict[str, int], bad_rows=()) -> str:
    folder.mkdir()
    generator = np.random.default_rng(0)
    for split, count in num_rows.items():
        rows = []
        for row in range(count):
            buffer = io.BytesIO()
            Image.fromarray(generator.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(buffer, format="PNG")
            data = buffer.getvalue()
            if (split, row) in bad_rows:
                data = data[:100]
            rows.append({"image": data, "question": "what color is the star?", "answers": ["red"]})
        Dataset.from_list(rows).to_parquet(folder / f"{split}.parquet")
    return str(folder)


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return [
        write_dataset(folder / "large", {"train": 30, "validation": 6, "test": 6}),
        write_dataset(
            folder / "small", {"train": 6, "validation": 6, "test": 6}, bad_rows=[("train", 2), ("test", 5)]
        ),
    ]


def test_every_script_with_data_takes_the_same_fields():
    for script in (train, sweep, profile, importance_command):
        flags = {flag for action in script.make_parser()._actions for flag in action.option_strings}
        assert {"--dataset_names", "--dataset_weights", "--skip_bad_rows"} <= flags, script.__name__
    assert "--streaming" in {flag for action in train.make_parser()._actions for flag in action.option_strings}


def test_splits_limits_and_weights(names, tmp_path):
    args = DataArguments(
        dataset_names=names,
        dataset_weights=[2, 1],
        skip_bad_rows=True,
        max_train_samples=12,
        max_eval_samples=3,
        test_split="validation[:50%]",
    )
    skipped = open_skipped_rows(args, tmp_path)
    train_rows, validation, test = load_data_splits(args, seed=3, skipped_rows=skipped)
    counts = [
        tuple(sum(sample_id.startswith(name) for sample_id in dataset["sample_id"]) for name in ("large", "small"))
        for dataset in (train_rows, validation, test)
    ]
    assert counts[0] == (8, 4 - len(skipped)) and counts[1] == (2, 1)
    assert 0 < len(test) < 12 and set(test["sample_id"]) <= {
        f"{name}/validation/{row:06d}" for name in ("large", "small") for row in range(6)
    }


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"test_split": "train"}, "`train_split` 'train' and `test_split` 'train' share images"),
        ({"eval_split": "train"}, "`train_split` 'train' and `eval_split` 'train' share images"),
        ({"train_split": "validation"}, "`train_split` 'validation' and `eval_split` 'validation' share images"),
        (
            {"train_split": "test[:50%]", "test_split": "test[49%:]"},
            "`test_split` .*'test\\[:90%\\]' and 'test\\[90%:\\]'",
        ),
        ({"train_split": "train[10%:]", "eval_split": "train[:11%]"}, "`eval_split` 'train\\[:11%\\]' share"),
        ({"train_split": "val", "eval_split": "validation[90%:]"}, "`train_split` 'val' and `eval_split`"),
        ({"train_split": "train[90%]"}, "the split 'train\\[90%\\]' is not understood"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_samples_to_train_on_are_not_evaluated_or_tested_on(splits, message, streaming):
    args = DataArguments(dataset_names=["scenes"], streaming=streaming, max_train_samples=8, **splits)
    with pytest.raises(ValueError, match=message):
        load_data_splits(args, seed=3)


def test_parts_of_one_split_that_do_not_overlap_are_used_for_all():
    splits = {"train_split": "validation[:50%]", "eval_split": "validation[50%:75%]", "test_split": "validation[75%:]"}
    limits = {"max_train_samples": 40, "max_eval_samples": 20, "max_test_samples": 20}
    datasets = load_data_splits(DataArguments(dataset_names=["scenes"], **splits, **limits), seed=3)
    assert [len(dataset) for dataset in datasets] == [40, 20, 20]
    assert len({sample_id for dataset in datasets for sample_id in dataset["sample_id"]}) == 80


def test_a_stream_and_its_evaluation_sets(names, tmp_path):
    args = DataArguments(dataset_names=names, skip_bad_rows=True, streaming=True)
    skipped = open_skipped_rows(args, tmp_path)
    stream, validation, test = load_data_splits(args, seed=3, skipped_rows=skipped)
    assert isinstance(stream, IterableDataset) and len(validation) == 12 and len(test) == 11
    assert [(bad.split, bad.row) for bad in skipped] == [("test", 5)]
    sample_ids = [row["sample_id"] for row in stream]
    # The two take turns; the longer one goes on alone.
    assert sample_ids[:6] == [f"{name}/train/{row:06d}" for row in (0, 1) for name in ("large", "small")] + [
        "large/train/000002",
        "small/train/000003",
    ]
    assert len(sample_ids) == len(set(sample_ids)) == 35
    lines = (tmp_path / SKIPPED_ROWS_FILE).read_text().splitlines()
    assert [(json.loads(line)["split"], json.loads(line)["row"]) for line in lines] == [("test", 5), ("train", 2)]

    limited = DataArguments(dataset_names=names, skip_bad_rows=True, streaming=True, max_train_samples=4)
    stream = load_data_splits(limited, 3, open_skipped_rows(limited, tmp_path))[0]
    assert [row["sample_id"] for row in stream] == sample_ids[:4]

    weighted = DataArguments(dataset_names=names, skip_bad_rows=True, streaming=True, dataset_weights=[3, 1])
    stream = load_data_splits(weighted, 3, open_skipped_rows(weighted, tmp_path))[0]
    sample_ids = [row["sample_id"] for row in stream]
    # Ends with the last row of the first data set that runs out.
    assert sample_ids[-1] in ("large/train/000029", "small/train/000005")
    assert 5 < len(sample_ids) < 35 and len(set(sample_ids)) == len(sample_ids)


def test_without_skip_bad_rows_a_bad_row_is_an_error(names, tmp_path):
    args = DataArguments(dataset_names=names)
    assert open_skipped_rows(args, tmp_path) is None
    with pytest.raises(ValueError, match="row 2 .*of 'train'"):
        load_split(args, "train", None, seed=3)
    assert len(load_split(args, "validation", None, seed=3)) == 12
    assert not (tmp_path / SKIPPED_ROWS_FILE).exists()


@pytest.mark.slow
def test_a_script_says_what_it_left_out(names, tmp_path, capsys):
    output_dir = tmp_path / "profile"
    flags = {
        "dataset_names": names[1],
        "num_inputs": 6,
        "repeats": 1,
        "decode_steps": 1,
        "num_settings": 2,
        "num_threads": 1,
        "output_dir": output_dir,
    }
    argv = ["profile", *(str(part) for name, value in flags.items() for part in (f"--{name}", value))]
    assert main(argv) == 2
    assert "row 2" in capsys.readouterr().err and not output_dir.exists()
    assert main([*argv, "--skip_bad_rows", "true"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"Bad rows left out: 1 of '{names[1]}' (train)" in said
    assert len((output_dir / SKIPPED_ROWS_FILE).read_text().splitlines()) == 1
