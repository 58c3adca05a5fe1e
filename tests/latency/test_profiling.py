"""Parts of profiling: inputs, journal, plan, report."""

import json

import numpy as np
import pytest
from PIL import Image
from synthetic_profile import SPACE, cpu_times, gpu_times, make_synthetic_profile

from joint_controller.executor import StageTimes
from joint_controller.knobs import KnobSetting
from joint_controller.latency.profile_inputs import ASPECT_RATIO, IMAGE_SIDES, QUESTION_WORDS, make_profile_inputs
from joint_controller.latency.profile_journal import ProfileJournal
from joint_controller.latency.profile_report import (
    format_repeatability,
    repeatability,
    summarize_profile,
    write_profile_report,
)
from joint_controller.latency.profile_table import ProfileSchema, profile_settings
from joint_controller.latency.profiling import sample_settings


TIMES = StageTimes(
    stage_ms={"overhead": 0.25, "controller": 0.5, "image_processing": 1.5, "vision": 2.5, "llm_prefill": 3.25},
    decode_ms=[1.0, 2.0],
    counts={"num_views": 2, "vision_tokens": 40, "text_tokens": 10},
    output_tokens=3,
)
PLAN = {"device_name": "here", "seed": 1}


def test_inputs_are_spread_over_shapes_and_lengths():
    inputs = make_profile_inputs(16)
    sizes = np.array([image.size for image in inputs["image"]])
    words = np.array([len(question.split()) - 1 for question in inputs["question"]])
    sides, ratios = sizes.max(axis=1), sizes[:, 0] / sizes[:, 1]
    # One in each sixteenth of the range, on a logarithmic scale.
    for values, (low, high) in (
        (sides, IMAGE_SIDES),
        (ratios, (1 / ASPECT_RATIO, ASPECT_RATIO)),
        (words, QUESTION_WORDS),
    ):
        middles = low * (high / low) ** ((np.arange(16) + 0.5) / 16)
        np.testing.assert_allclose(np.sort(values), middles, rtol=0.12)
    # Each in an order of its own.
    assert abs(np.corrcoef(np.log(sides), np.log(words))[0, 1]) < 0.8
    assert inputs["sample_id"][3] == f"made/0003-{sizes[3][0]}x{sizes[3][1]}-{words[3]}"
    assert make_profile_inputs(16)["question"][:] == inputs["question"][:]
    assert make_profile_inputs(16, seed=1)["question"][:] != inputs["question"][:]
    assert len(np.unique(np.asarray(inputs[0]["image"]))) > 50  # no blank image, whose views could be skipped
    with pytest.raises(ValueError, match="`num_inputs` is 0"):
        make_profile_inputs(0)


def test_sample_of_settings_has_both_ends():
    sample = sample_settings(SPACE, 40)
    assert len(set(sample)) == 40 and sample[0] == SPACE.cheapest and sample[-1] == SPACE.full
    assert [list(SPACE).index(setting) for setting in sample] == sorted(list(SPACE).index(one) for one in sample)
    assert sample_settings(SPACE, 2) == [SPACE.cheapest, SPACE.full]
    assert sample_settings(SPACE) == sample_settings(SPACE, 1000) == list(SPACE)
    with pytest.raises(ValueError, match="`num_settings` is 1"):
        sample_settings(SPACE, 1)


def test_a_journal_that_was_cut_anywhere_keeps_what_was_whole(tmp_path):
    path = tmp_path / "new" / "journal.jsonl"
    with ProfileJournal(path, PLAN) as journal:
        journal.settle(2)
        journal.add(0, 0, TIMES)
        journal.add(1, 0, TIMES)
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    starts = np.cumsum([0, *map(len, lines)])
    assert len(lines) == 4
    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        num_whole = int(np.searchsorted(starts, length, side="right")) - 1
        with ProfileJournal(path, PLAN) as journal:
            assert journal.num_measurements == (2 if num_whole >= 2 else None)
            assert journal.timings == {(index, 0): TIMES for index in range(max(0, num_whole - 2))}
            journal.add(7, 1, TIMES)
        with ProfileJournal(path, PLAN) as journal:
            assert journal.timings[7, 1] == TIMES


def test_a_journal_of_something_else_is_refused(tmp_path):
    path = tmp_path / "journal.jsonl"
    with ProfileJournal(path, PLAN) as journal:
        journal.add(0, 0, TIMES)
    content = path.read_bytes()
    with pytest.raises(ValueError, match='its device_name is "here", here "there"'):
        ProfileJournal(path, PLAN | {"device_name": "there"})
    assert path.read_bytes() == content
    path.write_bytes(content + b'{"measurement": 1, "repeat": 0}\n' + content)
    with pytest.raises(ValueError, match="line 3, is damaged"):
        ProfileJournal(path, PLAN)


def scaled(profile, factor_of):
    """A second profile, whose times are those of the first times a factor of the setting."""

    def scale(row):
        factor = factor_of(KnobSetting({name: row[name] for name in SPACE.names}))
        return {name: row[name] * factor for name in ProfileSchema.of([row]).predicted_columns}

    return profile.map(scale)


def test_repeatability_is_the_share_of_settings_that_agree():
    profile = make_synthetic_profile(cpu_times, num_inputs=3)
    settings = list(SPACE)
    report = repeatability(profile, scaled(profile, lambda setting: 1.04 if setting in settings[:3] else 0.98))
    assert report["num_settings"] == 75 and report["num_measurements"] == 225
    for part in ("prefill", "decode", "total"):
        assert report[part]["share"] == pytest.approx(72 / 75)
        assert report[part]["largest_difference"] == pytest.approx(0.04)
        assert report[part]["median_difference"] == pytest.approx(0.02)
    assert report["is_repeatable"] and "measuring is repeatable" in format_repeatability(report)
    worse = repeatability(profile, scaled(profile, lambda setting: 1.04 if setting in settings[:4] else 1.0))
    assert not worse["is_repeatable"] and "within 3% on" in format_repeatability(worse)
    assert "NOT repeatable" in format_repeatability(worse) and "94.7%" in format_repeatability(worse)
    # Only what both have counts.
    assert repeatability(profile, profile.select(range(10)))["num_measurements"] == 10
    with pytest.raises(ValueError, match="the pair of profiles mixes measurements: `device_name`"):
        repeatability(profile, make_synthetic_profile(gpu_times, num_inputs=3))
    with pytest.raises(ValueError, match="no measurement .* in common"):
        repeatability(profile.select([0]), profile.select([1]))


def test_report_is_drawn_and_says_what_was_measured(tmp_path):
    profile = make_synthetic_profile(gpu_times, num_inputs=3, noise=0.0)
    report = write_profile_report(profile, tmp_path / "new", repeated=profile)
    summary = summarize_profile(profile)
    assert report == {**summary, "repeatability": repeatability(profile, profile)}
    assert json.loads((tmp_path / "new" / "profile_report.json").read_text()) == report
    assert (report["num_measurements"], report["num_settings"], report["num_inputs"]) == (225, 75, 3)
    full = [row for row, setting in zip(profile, profile_settings(profile), strict=True) if setting == SPACE.full]
    stages = ("overhead_ms", "controller_ms", "image_processing_ms", "vision_ms", "llm_prefill_ms")
    expected = np.median([sum(row[name] for name in stages) + 2 * row["decode_ms_per_token"] for row in full])
    assert report["median_spread"] == 0.0
    assert report["settings"]["tier=high top_k=8 num_blocks=16"]["total_ms"] == pytest.approx(expected)
    card = (tmp_path / "new" / "README.md").read_text()
    pictures = {path.name for path in (tmp_path / "new").glob("*.png")}
    assert pictures == {"stage_shares.png", "prefill.png", "decode.png", "knobs.png", "flops.png"}
    for picture in pictures:
        assert f"]({picture})" in card
        assert np.asarray(Image.open(tmp_path / "new" / picture).convert("L")).std() > 10
    assert "gpu_times" in card and format_repeatability(report["repeatability"]) in card


def test_a_profile_that_knows_little_is_drawn_without_flops(tmp_path):
    unknown = {"executor_shape": "unknown", "repeats_disagree": None, "latency_scope": "model"}
    profile = make_synthetic_profile(cpu_times, num_inputs=2, **unknown)
    report = write_profile_report(profile.select(range(20)), tmp_path)
    assert report["num_disagreeing"] is None and report["median_spread"] is None
    assert report["machine"]["latency_scope"] == ["model"]
    assert not (tmp_path / "flops.png").exists() and (tmp_path / "decode.png").exists()
