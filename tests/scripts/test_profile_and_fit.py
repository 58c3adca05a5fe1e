"""`joint-controller profile` and `joint-controller fit-latency`, one after the other, on a tiny executor."""

import json

import pytest
import torch
from datasets import Dataset

from joint_controller import KnobSetting, LatencyEstimatorModel
from joint_controller.data import load_vqa_datasets
from joint_controller.executor import MolmoExecutor
from joint_controller.latency import executor_shape, load_profile, profile_executor
from joint_controller.latency.profile_table import PROFILE_FILE
from joint_controller.scripts import fit_latency, profile, run_script


NUM_SETTINGS = 18  # 3 tiers, top_k 2 to 4, 3 or 4 blocks: the defaults for a checkpoint of 4 blocks and top_k 4


@pytest.fixture(scope="module")
def executor_folder(tiny_molmo, tiny_processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("executor")
    tiny_molmo.save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def profile_folder(executor_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "profile"
    flags = ["--model_path", executor_folder, "--dataset_names", "scenes", "--output_dir", folder]
    flags += ["--num_inputs", 3, "--repeats", 2, "--decode_steps", 2]
    assert run_script("profile", profile.make_parser, profile.main, [str(flag) for flag in flags]) == 0
    return folder


def run_fit(profile_folder, output_dir):
    flags = ["--profile_path", str(profile_folder), "--output_dir", str(output_dir)]
    return run_script("fit-latency", fit_latency.make_parser, fit_latency.main, flags)


def test_profile_has_a_row_for_every_setting_and_input(profile_folder, executor_folder):
    table = load_profile(profile_folder)
    executor = MolmoExecutor.from_pretrained(executor_folder, device="cpu")
    assert len(executor.knob_space) == NUM_SETTINGS
    rows = {(row["sample_id"], KnobSetting(row["tier"], row["top_k"], row["num_blocks"])) for row in table}
    sample_ids = load_vqa_datasets(["scenes"], "train", 3)["sample_id"]
    assert rows == {(sample_id, setting) for sample_id in sample_ids for setting in executor.knob_space}
    assert len(table) == len(rows)
    for row in table:
        # Square images: 1, 4 and 9 crops and the global view; image tokens as the processor counts them.
        assert row["num_views"] == {"low": 2, "medium": 5, "high": 10}[row["tier"]]
        assert row["vision_tokens"] == executor.processor.count_vision_tokens(128, 128, tier=row["tier"])
        assert row["output_tokens"] == 3 and row["num_repeats"] == 2 and row["image_processing_ms"] > 0
        assert row["executor_fingerprint"] == executor.fingerprint
        assert row["executor_dtype"] == "float32" and row["torch_version"] == torch.__version__
        assert json.loads(row["executor_shape"]) == executor_shape(executor.model.config)


def test_fitted_estimator_predicts_what_was_measured(profile_folder, executor_folder, tmp_path, capsys):
    assert run_fit(profile_folder, tmp_path / "latency") == 0
    assert "MAPE" in capsys.readouterr().out
    model = LatencyEstimatorModel.from_pretrained(tmp_path / "latency")
    executor = MolmoExecutor.from_pretrained(executor_folder, device="cpu")
    model.check_executor(executor.model.config)
    assert model.config.executor_fingerprint == executor.fingerprint
    report = json.loads((tmp_path / "latency" / "fit_report.json").read_text())
    assert report == model.config.held_out
    assert report["num_measurements"] == 3 * NUM_SETTINGS and report["num_held_out"] > 0
    assert model.config.device_name in (tmp_path / "latency" / "README.md").read_text()
    # The machine may be busy: only the order of magnitude is certain.
    table = load_profile(profile_folder)
    settings = [KnobSetting(row["tier"], row["top_k"], row["num_blocks"]) for row in table]
    counts = [table[column][:] for column in ("num_views", "vision_tokens", "text_tokens", "output_tokens")]
    predicted = model.predict_latency_ms(settings, *counts).median().item()
    measured = torch.tensor(
        [row["vision_ms"] + row["llm_prefill_ms"] + 2 * row["decode_ms_per_token"] for row in table]
    ).median()
    assert measured.item() / 3 < predicted < measured.item() * 3


def test_time_limit_measures_a_spread_out_subset(executor_folder):
    executor = MolmoExecutor.from_pretrained(executor_folder, device="cpu")
    inputs = load_vqa_datasets(["scenes"], "train", 60)
    table = profile_executor(executor, inputs, repeats=1, decode_steps=1, time_limit_s=3.0, progress=False)
    assert len(table) < 60 * NUM_SETTINGS
    # However few there was time for, the cheapest and the most expensive setting come first.
    settings = [(row["tier"], row["top_k"], row["num_blocks"]) for row in table]
    assert settings[:2] == [("low", 2, 3), ("high", 4, 4)][: len(settings)]
    # No setting is measured twice before all are measured once.
    counts = [settings.count(setting) for setting in set(settings)]
    assert max(counts) - min(counts) <= 1 and (max(counts) == 1 or len(counts) == NUM_SETTINGS)


def test_an_existing_profile_is_not_overwritten(profile_folder, executor_folder, capsys):
    before = (profile_folder / PROFILE_FILE).read_bytes()
    flags = ["--model_path", str(executor_folder), "--output_dir", str(profile_folder)]
    assert run_script("profile", profile.make_parser, profile.main, flags) == 2
    error = capsys.readouterr().err.strip()
    assert "exists already" in error and "\n" not in error
    assert (profile_folder / PROFILE_FILE).read_bytes() == before


def test_profiles_that_cannot_be_used_are_refused_in_one_line(profile_folder, tmp_path, capsys):
    table = load_profile(profile_folder)
    of_another = table.map(lambda row, index: {"executor_fingerprint": f"other{index % 2}"}, with_indices=True)
    cases = {
        "nothing": (None, "there is no profile at"),
        "mixed": (of_another, "mixes measurements: `executor_fingerprint`"),
        "not_parquet": ("tier,top_k", "is not a Parquet file"),
        "empty": (table.select([]), "holds no measurement"),
        "columns": (table.remove_columns("decode_ms_per_token"), "lacks the columns ['decode_ms_per_token']"),
    }
    for name, (profile_table, message) in cases.items():
        folder = tmp_path / name
        folder.mkdir()
        if isinstance(profile_table, str):
            (folder / PROFILE_FILE).write_text(profile_table)
        elif profile_table is not None:
            profile_table.to_parquet(folder / PROFILE_FILE)
        capsys.readouterr()
        assert run_fit(folder, tmp_path / "latency") == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("joint-controller fit-latency: error:") and message in error
        assert not (tmp_path / "latency").exists()


def test_inputs_and_repeats_are_needed(executor_folder):
    executor = MolmoExecutor.from_pretrained(executor_folder, device="cpu")
    inputs = load_vqa_datasets(["scenes"], "train", 1)
    with pytest.raises(ValueError, match="the data set has no rows"):
        profile_executor(executor, Dataset.from_dict({}))
    with pytest.raises(ValueError, match="`repeats` is 0"):
        profile_executor(executor, inputs, repeats=0)
    with pytest.raises(ValueError, match="time limit of 0.0 s"):
        profile_executor(executor, inputs, time_limit_s=0.0, progress=False)
