"""`joint-controller profile` and `joint-controller fit-latency`, one after the other, on a tiny executor."""

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from datasets import Dataset

from joint_controller import KnobSpace, LatencyEstimatorModel
from joint_controller.data import load_vqa_datasets
from joint_controller.latency import load_profile, profiling, save_profile
from joint_controller.latency.profile_inputs import make_profile_inputs
from joint_controller.latency.profile_journal import JOURNAL_FILE
from joint_controller.latency.profile_table import PROFILE_FILE, ProfileSchema, profile_settings
from joint_controller.latency.profiling import profile_executor
from joint_controller.molmo.executor import MolmoExecutor
from joint_controller.request_path import RequestPath
from joint_controller.scripts import fit_latency, profile, run_script


pytestmark = pytest.mark.slow

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


def run_fit(profile_folder, output_dir, *flags):
    flags = ["--profile", profile_folder, "--output_dir", output_dir, "--num_units", 4, *flags]
    return run_script("fit-latency", fit_latency.make_parser, fit_latency.main, [str(flag) for flag in flags])


@pytest.fixture(scope="module")
def fitted(profile_folder, tmp_path_factory):
    """The folder of an estimator of the profile, and what the command that fitted it has said."""
    folder = tmp_path_factory.mktemp("fitted") / "latency"
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert run_fit(profile_folder, folder) == 0
    return folder, said.getvalue()


def test_profile_has_a_row_for_every_setting_and_input(profile_folder, executor_folder):
    table = load_profile(profile_folder)
    executor = MolmoExecutor.from_pretrained(executor_folder, device="cpu")
    assert len(executor.knob_space) == NUM_SETTINGS
    rows = set(zip(table["sample_id"], profile_settings(table), strict=True))
    samples = load_vqa_datasets(["scenes"], "train", 3)
    size_of = {sample["sample_id"]: sample["image"].size for sample in samples}
    assert rows == {(sample_id, setting) for sample_id in size_of for setting in executor.knob_space}
    assert len(table) == len(rows)
    for row in table:
        # Crops and the global view; image tokens as the processor counts them.
        width, height = size_of[row["sample_id"]]
        tiling = executor.processor.image_processor.choose_tiling(height, width, tier=row["tier"])
        assert row["num_views"] == 1 + tiling[0] * tiling[1]
        assert row["vision_tokens"] == executor.processor.count_vision_tokens(height, width, tier=row["tier"])
        assert row["output_tokens"] == 3 and row["num_repeats"] == 2 and row["image_processing_ms"] > 0
        assert row["executor_fingerprint"] == executor.fingerprint
        assert row["executor_dtype"] == "float32" and f"torch {torch.__version__}," in row["library_versions"]
        assert (row["device_type"], row["num_threads"]) == ("cpu", str(torch.get_num_threads()))
        assert row["image_pixels"] == width * height and row["latency_scope"] == "request"
        assert row["executor_mode"] == executor.mode and row["driver_version"] == "none"
        assert len(row["decode_ms"]) == 2 and row["prefill_lengths"] is None
        assert row["controller_ms"] > 0 and row["overhead_ms"] > 0 and row["executor_type"] == "molmo"
        # Whole requests are more than their model stages, and both at each repeat.
        assert len(row["request_ms"]) == len(row["model_ms"]) == 2
        before = row["overhead_ms"] + row["controller_ms"] + row["image_processing_ms"]
        differences = [whole - model for whole, model in zip(row["request_ms"], row["model_ms"], strict=True)]
        assert sum(differences) / 2 == pytest.approx(before)
        assert KnobSpace.from_dict(json.loads(row["knob_space"])) == executor.knob_space
        # Of two repeats of two steps each, medians are means.
        assert row["decode_ms_per_token"] == pytest.approx(sum(row["decode_ms"]) / 2)


def test_fitted_estimator_predicts_what_was_measured(profile_folder, executor_folder, fitted):
    folder, said = fitted
    assert "MAPE" in said
    model = LatencyEstimatorModel.from_pretrained(folder)
    executor = MolmoExecutor.from_pretrained(executor_folder, device="cpu")
    model.check_executor(executor)
    assert model.config.executor_fingerprint == executor.fingerprint
    report = json.loads((folder / "fit_report.json").read_text())
    assert report == model.config.held_out
    assert report["num_measurements"] == 3 * NUM_SETTINGS and report["num_held_out"] > 0
    assert model.config.device_name in (folder / "README.md").read_text()
    # The machine may be busy: only the order of magnitude is certain.
    table = load_profile(profile_folder)
    counts = {name: table[name][:] for name in executor.count_names}
    predicted = model.predict_latency_ms(profile_settings(table), counts, table["output_tokens"][:]).median().item()
    measured = torch.tensor([sum(row["request_ms"]) / 2 for row in table]).median()
    assert measured.item() / 3 < predicted < measured.item() * 3


def test_an_estimator_is_adapted_to_another_profile(profile_folder, fitted, tmp_path, capsys):
    slower = load_profile(profile_folder).map(
        lambda row: (
            {name: 3 * row[name] for name in ProfileSchema.of([row]).predicted_columns}
            | {name: [3 * ms for ms in row[name]] for name in ("request_ms", "model_ms")}
            | {"device_name": "a slower machine"}
        )
    )
    save_profile(slower, tmp_path / "slower")
    flags = ["--base_estimator", fitted[0], "--recalibration_sizes", 5, 9]
    assert run_fit(tmp_path / "slower", tmp_path / "adapted", *flags) == 0
    assert "Error after recalibration, by measurements used" in capsys.readouterr().out
    adapted = LatencyEstimatorModel.from_pretrained(tmp_path / "adapted")
    assert adapted.config.device_name == "a slower machine"
    assert adapted.config.recalibrated_from["device_name"] == load_profile(profile_folder)["device_name"][0]
    report = json.loads((tmp_path / "adapted" / "fit_report.json").read_text())
    recalibration = report.pop("recalibration")
    assert report == adapted.config.held_out and set(recalibration["by_size"]) == {"5", "9"}
    # A third of the time is predicted, give or take the noise.
    assert 0.5 < recalibration["without"]["total"]["mape"] < 0.8
    assert recalibration["by_size"]["9"]["total"]["mape"] < 0.5
    card = (tmp_path / "adapted" / "README.md").read_text()
    assert "## Recalibration" in card and "| none |" in card
    assert (tmp_path / "adapted" / "recalibration.png").exists()
    save_profile(slower.select(range(12)), tmp_path / "short")
    assert run_fit(tmp_path / "short", tmp_path / "from_few", *flags) == 0
    assert "-: too few other measurements are left to measure the error on" in capsys.readouterr().out
    assert run_fit(tmp_path / "slower", tmp_path / "adapted", "--base_estimator", tmp_path / "nothing") == 2
    assert "does not exist" in capsys.readouterr().err.splitlines()[-1]


def test_time_limit_measures_a_spread_out_subset(executor_folder):
    executor = MolmoExecutor.from_pretrained(executor_folder, device="cpu")
    inputs = load_vqa_datasets(["scenes"], "train", 60)
    table = profile_executor(executor, inputs, repeats=1, decode_steps=1, time_limit_s=3.0, progress=False)
    assert len(table) < 60 * NUM_SETTINGS
    # However few there was time for, the cheapest and the most expensive setting come first.
    settings = profile_settings(table)
    assert settings[:2] == [executor.knob_space.cheapest, executor.knob_space.full][: len(settings)]
    # No setting is measured twice before all are measured once.
    counts = [settings.count(setting) for setting in set(settings)]
    assert max(counts) - min(counts) <= 1 and (max(counts) == 1 or len(counts) == NUM_SETTINGS)


@pytest.mark.parametrize(("slow_request_s", "num_warm_ups"), [(1e9, 6 + 6 + 12), (0.0, 1 + 6)])
def test_slow_requests_are_not_warmed_up_one_by_one(executor_folder, monkeypatch, slow_request_s, num_warm_ups):
    calls, time_request = [], RequestPath.time

    def counted(self, request, **kwargs):
        calls.append((request.setting, request.sample_id))
        return time_request(self, request, **kwargs)

    monkeypatch.setattr(RequestPath, "time", counted)
    monkeypatch.setattr(profiling, "SLOW_REQUEST_S", slow_request_s)
    executor = MolmoExecutor.from_pretrained(executor_folder, device="cpu")
    settings = list(executor.knob_space)[:4]
    arguments = {"settings": settings, "repeats": 2, "decode_steps": 1, "progress": False}
    table = profile_executor(executor, make_profile_inputs(3), **arguments)
    # Each measurement twice, behind six requests that tell how long it will take, and the warm-up.
    assert len(table) == 12 and len(calls) == num_warm_ups + 2 * 12
    assert len(set(calls[num_warm_ups : num_warm_ups + 12])) == len(set(calls[-12:])) == 12
    assert set(table["num_repeats"]) == {2}


def run_profile(folder, executor_folder, *flags):
    flags = ["--model_path", executor_folder, "--output_dir", folder, "--num_threads", 1, *flags]
    return run_script("profile", profile.make_parser, profile.main, [str(flag) for flag in flags])


def test_a_killed_profile_goes_on_where_it_stopped(executor_folder, tmp_path, monkeypatch, capsys):
    """Killed at random moments; every timing that was taken is kept and none is taken again."""
    folder, journal = tmp_path / "profile", tmp_path / "profile" / JOURNAL_FILE
    flags = ["--num_inputs", 4, "--num_settings", 10, "--repeats", 6, "--decode_steps", 2]
    num_timings = 10 * 4 * 6
    command = [sys.executable, "-m", "joint_controller.scripts.profile", "--model_path", executor_folder]
    command += ["--output_dir", folder, "--num_threads", 1, *flags]
    generator = random.Random(7)
    kept = []
    for least in (1, 25):
        process = subprocess.Popen(
            [str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ
        )
        try:
            deadline = time.monotonic() + 120
            while not (journal.exists() and journal.read_bytes().count(b"\n") >= 2 + len(kept) + least):
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.01)
            time.sleep(generator.random() * 0.2)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert process.returncode == -signal.SIGKILL and not (folder / PROFILE_FILE).exists()
        lines = journal.read_bytes().split(b"\n")[:-1]  # whole lines
        entries = [json.loads(line) for line in lines]
        timings = [entry for entry in entries if "times" in entry]
        assert timings[: len(kept)] == kept and len(kept) + least <= len(timings) < num_timings
        kept = timings

    # The end of a write that was cut off.
    with journal.open("ab") as file:
        file.write(json.dumps(kept[-1]).encode()[:40])
    calls, time_request = [], RequestPath.time

    def counted(self, request, **kwargs):
        calls.append(request)
        return time_request(self, request, **kwargs)

    monkeypatch.setattr(RequestPath, "time", counted)
    saved = {}
    unlink = type(journal).unlink
    monkeypatch.setattr(type(journal), "unlink", lambda path: (saved.update({path: path.read_bytes()}), unlink(path)))
    assert run_profile(folder, executor_folder, *flags) == 0
    assert f"{len(kept)} of {num_timings} timings" in capsys.readouterr().out
    entries = [json.loads(line) for line in saved[journal].splitlines()]
    timings = [entry for entry in entries if "times" in entry]
    assert timings[: len(kept)] == kept and len(timings) == num_timings
    pairs = {(entry["measurement"], entry["repeat"]) for entry in timings}
    assert len(pairs) == num_timings
    # What is missing is timed once each; before that, measurements that are not whole are warmed up, once each.
    unfinished = {entry["measurement"] for entry in timings[len(kept) :]}
    assert len(calls) == num_timings - len(kept) + len(unfinished)
    table = load_profile(folder)
    assert len(table) == 40 and set(table["num_repeats"]) == {6}
    vision = [entry["times"]["stage_ms"]["vision"] for entry in timings if entry["measurement"] == 0]
    assert table[0]["vision_ms"] == pytest.approx(sorted(vision)[2] / 2 + sorted(vision)[3] / 2)
    assert [path.name for path in folder.iterdir()] == [PROFILE_FILE]


def test_timings_of_another_profile_are_refused(executor_folder, tmp_path, capsys):
    executor = MolmoExecutor.from_pretrained(executor_folder, device="cpu")
    inputs = make_profile_inputs(2)
    sizes = {
        "settings": list(executor.knob_space)[:2],
        "decode_steps": 1,
        "progress": False,
        "journal_folder": tmp_path,
    }
    profile_executor(executor, inputs, repeats=1, **sizes)
    before = (tmp_path / JOURNAL_FILE).read_bytes()
    with pytest.raises(ValueError, match="holds the timings of another profile: its repeats is 1, here 2"):
        profile_executor(executor, inputs, repeats=2, **sizes)
    with pytest.raises(ValueError, match="its inputs is"):
        profile_executor(executor, make_profile_inputs(2, seed=1), repeats=1, **sizes)
    assert (tmp_path / JOURNAL_FILE).read_bytes() == before
    lines = before.splitlines(keepends=True)
    (tmp_path / JOURNAL_FILE).write_bytes(b"".join([*lines[:2], b"broken\n", *lines[2:]]))
    with pytest.raises(ValueError, match="line 3, is damaged .* delete the line"):
        profile_executor(executor, inputs, repeats=1, **sizes)


def test_a_sample_of_settings_and_measurements(executor_folder, tmp_path, capsys):
    flags = [
        "--num_settings",
        5,
        "--num_inputs",
        4,
        "--num_measurements",
        12,
        "--repeats",
        1,
        "--free_decoding",
        "true",
    ]
    flags += ["--max_new_tokens", 3, "--knob_values", "top_k=1,2,3", "tier=low,medium"]
    flags += ["--device", "cpu", "--executor_mode", "plain"]
    assert run_profile(tmp_path, executor_folder, *flags) == 0
    assert "To measure: 12 of 5 settings x 4 inputs measurements, 1 repeats each" in capsys.readouterr().out
    table = load_profile(tmp_path)
    settings = profile_settings(table)
    assert len(table) == 12 and len(set(settings)) == 5
    assert [tuple(setting.values()) for setting in settings[:2]] == [("low", 1, 3), ("medium", 3, 4)]
    assert set(table["executor_mode"]) == {"plain"}
    for row in table:
        steps = row["decode_ms"] or []
        assert row["output_tokens"] == 1 + len(steps) <= 3 and (row["decode_ms_per_token"] is None) == (not steps)


def test_a_device_that_is_not_there_is_refused(executor_folder, tmp_path, capsys):
    assert run_profile(tmp_path / "profile", executor_folder, "--device", "abacus") == 2
    assert "`device` is 'abacus', which is not there" in capsys.readouterr().err.splitlines()[-1]
    assert run_profile(tmp_path / "profile", executor_folder, "--device", "cuda:99") == 2
    assert "`device` is 'cuda:99', which is not there" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "profile").exists()


def test_report_and_repeatability(executor_folder, tmp_path, capsys):
    flags = ["--num_settings", 4, "--num_inputs", 2, "--repeats", 1, "--decode_steps", 1]
    assert run_profile(tmp_path, executor_folder, *flags, "--check_repeatability", "true") == 0
    assert "Two profiles of the same 4 settings have medians within 3% on" in capsys.readouterr().out
    report = json.loads((tmp_path / "profile_report.json").read_text())
    assert report["repeatability"]["num_measurements"] == 8 and report["num_settings"] == 4
    assert (tmp_path / "README.md").read_text().startswith("---\nconfigs:")
    pictures = {"stage_shares.png", "prefill.png", "decode.png", "knobs.png", "flops.png"}
    assert {path.name for path in tmp_path.glob("*.png")} == pictures
    # Of what is there, without measuring; against another profile.
    before = (tmp_path / PROFILE_FILE).read_bytes()
    (tmp_path / "knobs.png").unlink()
    assert run_profile(tmp_path, "no-such-model", "--report", "true", "--compare_with", tmp_path / "repeat") == 0
    assert (tmp_path / "knobs.png").exists() and (tmp_path / PROFILE_FILE).read_bytes() == before
    assert json.loads((tmp_path / "profile_report.json").read_text()) == report


def test_a_hub_that_cannot_be_reached_loses_nothing(profile_folder, tmp_path):
    """In a process of its own: the address of the Hub is read once."""
    folder = tmp_path / "profile"
    folder.mkdir()
    (folder / PROFILE_FILE).write_bytes((profile_folder / PROFILE_FILE).read_bytes())
    command = [sys.executable, "-m", "joint_controller.scripts.profile", "--output_dir", str(folder)]
    command += ["--push_to_hub", "somebody/profile"]
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "none"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ended.returncode == 2 and "the profile is whole in" in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr and (folder / "README.md").exists()


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
    with pytest.raises(ValueError, match="`num_measurements` is 0"):
        profile_executor(executor, inputs, num_measurements=0)
    with pytest.raises(ValueError, match="time limit of 0.0 s"):
        profile_executor(executor, inputs, time_limit_s=0.0, progress=False)


@pytest.mark.parametrize("script", [profile, fit_latency])
def test_help_explains_every_field(script):
    text = script.make_parser().format_help()
    for action in script.make_parser()._actions:
        if "--help" not in action.option_strings[-1]:
            assert action.help and action.option_strings[0] in text
