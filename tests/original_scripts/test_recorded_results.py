"""Recorded results as tables in a folder, the images of their samples, and their splits."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image
from recorded_world import write_results

from joint_controller import KnobSetting, LatencyEstimatorModel
from joint_controller.latency.profile_table import load_profile
from joint_controller.molmo.shape import molmo_shape
from joint_controller.original_scripts import (
    find_images,
    import_results,
    load_recorded_results,
    save_recorded_results,
    split_samples,
)
from joint_controller.outcomes import OutcomeStore
from joint_controller.scripts import fit_latency, run_script


def import_folder(results_dir, output_dir, *flags):
    argv = ["--results_dir", str(results_dir), "--output_dir", str(output_dir), *flags]
    return run_script("import-results", import_results.make_parser, import_results.main, argv)


def test_imported_results_are_the_same_from_the_tables_as_from_the_original_files(tmp_path):
    write_results(tmp_path / "results")
    assert import_folder(tmp_path / "results", tmp_path / "imported") == 0
    original = load_recorded_results(tmp_path / "results")
    imported = load_recorded_results(tmp_path / "imported")
    assert imported.samples.to_list() == original.samples.to_list()
    assert imported.profile.to_list() == original.profile.to_list()
    assert imported.knob_space == original.knob_space
    assert imported.outcomes.executor_fingerprint == original.outcomes.executor_fingerprint
    for sample_id in original.samples["sample_id"]:
        for setting in original.knob_space:
            assert imported.outcomes.get(sample_id, setting) == original.outcomes.get(sample_id, setting)
    one = load_recorded_results(tmp_path / "imported", ["okvqa", "text_vqa"])
    assert one.dataset_names == ["text_vqa"] and one.missing_datasets == ["okvqa"] and len(one.profile) == 6 * 12


def test_the_folder_holds_plain_tables(tmp_path):
    write_results(tmp_path / "results")
    flags = ["--dataset_names", "coco_2014_vqa", "--device_name", "H100"]
    assert import_folder(tmp_path / "results", tmp_path / "imported", *flags) == 0
    samples = Dataset.from_parquet(str(tmp_path / "imported" / "samples.parquet"))
    assert samples["sample_id"][:] == [f"coco_2014_vqa/recorded/{number}" for number in range(6)]
    profile = load_profile(tmp_path / "imported")
    assert len(profile) == 6 * 12 and profile.unique("device_name") == ["H100"]
    space = load_recorded_results(tmp_path / "imported").knob_space
    store = OutcomeStore(tmp_path / "imported" / "outcomes", profile["executor_fingerprint"][0], space)
    assert len(store) == 6 * 12


def test_differences_and_gaps_are_said_and_listed(tmp_path, capsys):
    def change(folder_name, entry):
        if folder_name == "text-vqa" and entry["sample_id"] == 4 and entry["tier"] == "high":
            return None
        if folder_name == "text-vqa" and entry["sample_id"] == 1 and entry["tier"] == "low":
            entry["accuracy"] = 0.5
        return entry

    write_results(tmp_path / "results", change=change)
    assert import_folder(tmp_path / "results", tmp_path / "imported", "--dataset_names", "text_vqa", "okvqa") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "There are no results of okvqa." in shown
    assert "4 recorded accuracies are not what the metric gives" in shown
    assert "answer 'blue' was recorded with 0.500, vqa_accuracy gives 0.000" in shown
    assert "1 samples lack settings, e.g. 'text_vqa/recorded/4' lacks tier=high top_k=4 num_blocks=12" in shown
    report = json.loads((tmp_path / "imported" / "import_report.json").read_text())
    assert report["datasets_without_results"] == ["okvqa"]
    assert report["datasets"]["text_vqa"]["num_accuracy_differences"] == 4
    counts = report["datasets"]["text_vqa"]
    assert counts["recorded_accuracy"] == pytest.approx(counts["accuracy"])  # two 0.5 too many, two 0.5 too few
    assert list(report["missing_settings"]) == ["text_vqa/recorded/4"]
    assert len(report["missing_settings"]["text_vqa/recorded/4"]) == 4
    differences = Dataset.from_parquet(str(tmp_path / "imported" / "accuracy_differences.parquet"))
    assert len(differences) == 4 and set(differences["recorded_accuracy"]) == {0.5}


def test_a_data_set_that_is_not_known_is_imported_and_said_to_be_so(tmp_path, capsys):
    write_results(tmp_path / "results", ["my-photos"])
    assert import_folder(tmp_path / "results", tmp_path / "imported") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "'my_photos' is not a data set that this package knows: its answers are scored by vqa_accuracy." in shown
    assert load_recorded_results(tmp_path / "imported").unknown_datasets == ["my_photos"]


def test_a_folder_with_something_in_it_is_left_alone(tmp_path, capsys):
    write_results(tmp_path / "results", ["text-vqa"])
    (tmp_path / "imported").mkdir()
    (tmp_path / "imported" / "notes.txt").write_text("mine")
    assert import_folder(tmp_path / "results", tmp_path / "imported") == 2
    assert "is not empty: name another folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "imported").iterdir()] == ["notes.txt"]


@pytest.mark.slow
def test_the_latency_estimator_is_fitted_to_an_import(tmp_path, tiny_molmo_config):
    write_results(tmp_path / "results", ["text-vqa"], num_samples=2)
    tiny_molmo_config.save_pretrained(tmp_path / "model")
    for name, flags in (("unknown", []), ("known", ["--model_path", str(tmp_path / "model")])):
        assert import_folder(tmp_path / "results", tmp_path / name, *flags) == 0
        argv = [
            "--profile",
            str(tmp_path / name),
            "--output_dir",
            str(tmp_path / f"latency_{name}"),
            "--num_folds",
            "2",
        ]
        assert run_script("fit-latency", fit_latency.make_parser, fit_latency.main, argv) == 0
    unknown, known = (
        LatencyEstimatorModel.from_pretrained(tmp_path / f"latency_{name}") for name in ("unknown", "known")
    )
    setting, counts = (
        KnobSetting(tier="high", top_k=8, num_blocks=16),
        {"num_views": [13], "vision_tokens": [1872], "text_tokens": [22]},
    )
    [latency_ms] = unknown.predict_latency_ms([setting], counts, [3]).tolist()
    assert latency_ms == pytest.approx(90.0 + 2 * 14.8, rel=0.1)  # by the formulas of recorded_world.py
    assert unknown.latency_scope == "model" and unknown.way is None
    executor = SimpleNamespace(model_type="molmo", shape=molmo_shape(tiny_molmo_config))
    unknown.check_executor(executor)  # warns
    known.check_executor(executor)
    other = SimpleNamespace(model_type="molmo", shape={**executor.shape, "text_config.num_hidden_layers": 2})
    with pytest.raises(ValueError, match="text_config.num_hidden_layers 4 there, 2 here"):
        known.check_executor(other)


def save_image(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), value, dtype=np.uint8)).save(path)


def test_images_are_found_by_their_id(tmp_path):
    samples = load_recorded_results(write_results(tmp_path / "results", num_samples=3)).samples
    for number in range(3):
        save_image(tmp_path / "images" / "text-vqa" / f"{1000 + number}.png", number)
        save_image(tmp_path / "images" / "val2014" / f"COCO_val2014_{1000 + number:012}.png", 100 + number)
    found = find_images(samples, tmp_path / "images" / "val2014")
    assert {np.asarray(sample["image"])[0, 0, 0] for sample in found} == {100, 101, 102}
    save_image(tmp_path / "images" / "coco_2014_vqa" / "1000.png", 50)
    save_image(tmp_path / "images" / "coco_2014_vqa" / "000000001001.png", 51)
    save_image(tmp_path / "images" / "coco_2014_vqa" / "COCO_train2014_000000001002.png", 52)
    for sample in find_images(samples, tmp_path / "images"):
        number = int(sample["sample_id"].rsplit("/")[-1])
        assert np.asarray(sample["image"])[0, 0, 0] == number + (0 if sample["sample_id"].startswith("text") else 50)


def test_images_that_are_missing_or_doubtful_are_refused(tmp_path):
    samples = load_recorded_results(write_results(tmp_path / "results", ["text-vqa"], num_samples=3)).samples
    with pytest.raises(FileNotFoundError, match="`image_dir` '.*images' does not exist"):
        find_images(samples, tmp_path / "images")
    (tmp_path / "images").mkdir()
    with pytest.raises(ValueError, match="has no image of any of the 3 samples; the first is '1000'"):
        find_images(samples, tmp_path / "images")
    save_image(tmp_path / "images" / "1000.png", 0)
    found = find_images(samples, tmp_path / "images")
    assert found["defect"][0] is None
    assert found["defect"][1:] == [
        f"image: there is no file for image '{number}' in '{tmp_path / 'images'}'" for number in (1001, 1002)
    ]
    save_image(tmp_path / "images" / "COCO_val2014_000000001000.png", 0)
    with pytest.raises(ValueError, match="sample 'text_vqa/recorded/0' has image '1000', which is both"):
        find_images(samples, tmp_path / "images")


def test_splits_are_a_function_of_the_samples_and_share_none(tmp_path):
    samples = load_recorded_results(write_results(tmp_path / "results", num_samples=25)).samples
    splits = split_samples(samples)
    assert {name: len(split) for name, split in splits.items()} == {"train": 40, "validation": 5, "test": 5}
    ids = [sample_id for split in splits.values() for sample_id in split["sample_id"]]
    assert sorted(ids) == sorted(samples["sample_id"])
    again = split_samples(samples.select(range(len(samples) - 1, -1, -1)))
    assert {name: split["sample_id"][:] for name, split in again.items()} == {
        name: split["sample_id"][:] for name, split in splits.items()
    }
    assert {name: len(split) for name, split in split_samples(samples.select(range(3))).items()} == {
        "train": 1,
        "validation": 1,
        "test": 1,
    }
    with pytest.raises(ValueError, match=r"2 recorded sample\(s\) cannot be divided"):
        split_samples(samples.select(range(2)))


def test_a_folder_that_was_tampered_with_is_refused(tmp_path):
    results = load_recorded_results(write_results(tmp_path / "results", ["text-vqa"]))
    save_recorded_results(results, tmp_path / "imported")
    report = json.loads((tmp_path / "imported" / "import_report.json").read_text())
    (tmp_path / "imported" / "samples.parquet").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="samples.parquet' cannot be read .* import the results again"):
        load_recorded_results(tmp_path / "imported")
    results.accuracy_differences.to_parquet(tmp_path / "imported" / "samples.parquet")  # another table
    with pytest.raises(ValueError, match="samples.parquet' cannot be read .* import the results again"):
        load_recorded_results(tmp_path / "imported")
    (tmp_path / "imported" / "import_report.json").write_text(json.dumps(report)[:200])
    with pytest.raises(ValueError, match="import_report.json' is damaged .* import the results again"):
        load_recorded_results(tmp_path / "imported")


def test_a_folder_of_an_earlier_version_is_refused(tmp_path):
    results = load_recorded_results(write_results(tmp_path / "results", ["text-vqa"]))
    report = save_recorded_results(results, tmp_path / "imported")
    report["knob_space"] = {"tier_crops": {"low": [1, 3]}, "top_k": [4, 8], "num_blocks": [12, 16]}
    (tmp_path / "imported" / "import_report.json").write_text(json.dumps(report))
    with pytest.raises(ValueError, match="was written by an earlier version .* import the results again"):
        load_recorded_results(tmp_path / "imported")


def test_another_kind_of_model_is_refused(tmp_path, capsys):
    write_results(tmp_path / "results", ["text-vqa"])
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "qwen3_vl_moe"}')
    assert import_folder(tmp_path / "results", tmp_path / "imported", "--model_path", str(tmp_path / "model")) == 2
    assert "there is no executor for models of the type 'qwen3_vl_moe'" in capsys.readouterr().err
    assert not (tmp_path / "imported").exists()
