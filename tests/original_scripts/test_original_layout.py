"""Results of the original scripts, read into tables; and everything about them that is refused."""

import json

import pytest
from recorded_world import NUM_BLOCKS, TIER_RANGES, TOP_K, file_of, make_entry, write_results

from joint_controller import KnobSetting, KnobSpace
from joint_controller.molmo.knob_space import build_knob_space
from joint_controller.original_scripts import load_recorded_results


def rewrite(path, change):
    results = json.loads(path.read_text())
    change(results)
    path.write_text(json.dumps(results))


def test_every_number_ends_up_where_it_belongs(tmp_path):
    results = load_recorded_results(write_results(tmp_path))
    assert results.knob_space == build_knob_space(TIER_RANGES, TOP_K, NUM_BLOCKS)
    assert results.dataset_names == ["coco_2014_vqa", "text_vqa"]
    assert len(results.samples) == 12 and len(results.outcomes) == len(results.profile) == 12 * 12
    entry = make_entry(3, "medium", 8, 12)
    setting = KnobSetting(tier="medium", top_k=8, num_blocks=12)
    outcome = results.outcomes.get("text_vqa/recorded/3", setting)
    assert (outcome.answer, outcome.accuracy, outcome.latency_ms) == ("blue", 0.0, entry["T_total"])
    assert outcome.counts == {"num_views": 7, "vision_tokens": 1008, "text_tokens": 23} and outcome.output_tokens == 3
    [row] = [
        row
        for row in results.profile
        if row["sample_id"] == outcome.sample_id and all(row[name] == value for name, value in setting.items())
    ]
    assert row["vision_ms"] == entry["T_vision_total"] and row["llm_prefill_ms"] == entry["T_LLM_prefill"]
    assert row["decode_ms_per_token"] == entry["T_decode_per_token"]
    assert (row["num_views"], row["vision_tokens"], row["text_tokens"], row["output_tokens"]) == (7, 1008, 23, 3)
    assert row["executor_shape"] == row["device_name"] == "unknown" and row["executor_type"] == "molmo"
    assert KnobSpace.from_dict(json.loads(row["knob_space"])) == results.knob_space
    assert row["latency_scope"] == "model" and row["request_ms"] is None and row["image_pixels"] is None
    assert row["overhead_ms"] is row["controller_ms"] is row["image_processing_ms"] is None
    [sample] = [sample for sample in results.samples if sample["sample_id"] == "text_vqa/recorded/3"]
    assert sample["question"] == "What color is number 3?" and sample["answers"] == ["red"] * 10
    assert (sample["style"], sample["metric"], sample["image_id"]) == ("text_vqa", "vqa_accuracy", "1003")
    assert sample["image"] is None


def test_the_example_of_the_original_layout(shared_dir):
    results = load_recorded_results(shared_dir / "profiling_results_example")
    assert len(results.samples) == 8 and len(results.outcomes) == 8 * 27
    assert len(results.accuracy_differences) == 0 and not results.missing_settings()
    file = (
        shared_dir / "profiling_results_example" / "text-vqa" / "text-vqa_imgsizetier-low_crops2_topk6_blocks14.json"
    )
    for entry in json.loads(file.read_text())["per_sample_results"]:
        outcome = results.outcomes.get(
            f"text_vqa/recorded/{entry['sample_id']}", KnobSetting(tier="low", top_k=6, num_blocks=14)
        )
        assert outcome.latency_ms == entry["T_total"] and outcome.accuracy == pytest.approx(entry["accuracy"])


def test_accuracy_is_what_the_metric_gives_and_a_difference_is_listed(tmp_path):
    def change(folder_name, entry):
        if folder_name == "text-vqa" and entry["sample_id"] == 2 and entry["tier"] == "low":
            entry["metadata"]["answers"] = ["blue", "blue", *["red"] * 8]
            if entry["num_active_blocks"] == 12:
                entry["accuracy"] = 0.3  # "blue" is right for two of ten: 2/3 of the time, by the official metric
            else:
                entry["accuracy"] = 0.9996  # rounded
        elif entry["sample_id"] == 2:
            entry["metadata"]["answers"] = ["blue", "blue", *["red"] * 8]
            entry["accuracy"] = 1.0 if entry["pred"] == "red" else 0.6
        return entry

    results = load_recorded_results(write_results(tmp_path, change=change))
    assert results.outcomes.get(
        "text_vqa/recorded/2", KnobSetting(tier="low", top_k=4, num_blocks=12)
    ).accuracy == pytest.approx(0.6)
    assert len(results.accuracy_differences) == 2
    for row in results.accuracy_differences:
        assert (row["sample_id"], row["tier"], row["num_blocks"]) == ("text_vqa/recorded/2", "low", 12)
        assert row["recorded_accuracy"] == 0.3 and row["accuracy"] == pytest.approx(0.6)


def test_a_known_data_set_without_results_is_listed_and_an_unknown_one_refused(tmp_path):
    write_results(tmp_path)
    for names in (["text_vqa", "doc_qa"], ["text-vqa", "doc-qa"]):
        results = load_recorded_results(tmp_path, names)
        assert results.dataset_names == ["text_vqa"] and results.missing_datasets == ["doc_qa"]
    with pytest.raises(ValueError, match="no results of 'text_vqaa' in .* results of 'coco_2014_vqa', 'text_vqa'"):
        load_recorded_results(tmp_path, ["text_vqa", "text_vqaa"])
    with pytest.raises(ValueError, match="no results of 'doc_qa'"):
        load_recorded_results(tmp_path, ["doc_qa"])


def test_what_samples_lack_is_known(tmp_path):
    def change(folder_name, entry):
        lacks = (
            folder_name == "text-vqa" and entry["sample_id"] == 1 and entry["top_k"] == 4 and entry["tier"] == "low"
        )
        return None if lacks else entry

    results = load_recorded_results(write_results(tmp_path, change=change))
    assert results.missing_settings() == {
        "text_vqa/recorded/1": [
            KnobSetting(tier="low", top_k=4, num_blocks=12),
            KnobSetting(tier="low", top_k=4, num_blocks=16),
        ]
    }
    assert not results.missing_settings(results.knob_space.restrict({"top_k": [8]}))


def test_equal_files_have_equal_fingerprints(tmp_path):
    fingerprints = []
    for folder, num_samples in (("a", 3), ("b", 3), ("c", 4)):
        results = load_recorded_results(write_results(tmp_path / folder, num_samples=num_samples))
        fingerprints.append(results.outcomes.executor_fingerprint)
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def entry_of(results):
    return results["per_sample_results"][0]


def set_field(name, value):
    return lambda results: entry_of(results).update({name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda results: results.pop("per_sample_results"), "no list 'per_sample_results'"),
        (
            lambda results: results.update(per_sample_results=[]),
            "no list 'per_sample_results' with at least one entry",
        ),
        (lambda results: entry_of(results).pop("T_LLM_prefill"), "sample 0 has no field 'T_LLM_prefill'"),
        (lambda results: entry_of(results).pop("sample_id"), "entry 0 has no field 'sample_id'"),
        (lambda results: entry_of(results)["metadata"].pop("answers"), "sample 0, metadata has no field 'answers'"),
        (lambda results: entry_of(results)["metadata"].update(answers=[]), "'metadata.answers': \\[\\] is not a list"),
        (lambda results: entry_of(results)["metadata"].update(question=" "), "the question is empty"),
        (
            lambda results: entry_of(results)["metadata"].update(question="Why?"),
            "field 'question': it is .* of one run",
        ),
        (lambda results: entry_of(results)["tier_range"].update(max_crops=4), "tier 'low' has \\[1, 4\\] crops in"),
        (set_field("tier", "high"), "field 'tier': it is 'high', but 'low' by the name of the file"),
        (set_field("top_k", 6), "field 'top_k': it is 6, but 4 by the name of the file"),
        (set_field("num_active_blocks", 13), "field 'num_active_blocks': it is 13, but 12"),
        (set_field("T_total", float("nan")), "field 'T_total': nan is not a number"),
        (set_field("T_total", 1.0), "is less than its stages together take"),
        (set_field("T_vision_total", -1.0), "field 'T_vision_total': -1 ms is not a time"),
        (set_field("output_tokens", 0), "field 'output_tokens': 0 is not a whole number of 1 or more"),
        (set_field("actual_num_crops", 1.5), "field 'actual_num_crops': 1.5 is not a whole number"),
        (set_field("pred", None), "field 'pred': None is not a str"),
        (set_field("accuracy", "high"), "field 'accuracy': 'high' is not a number"),
        (
            lambda results: results["per_sample_results"].__setitem__(1, entry_of(results)),
            "sample 0: it is in .* already: keep one",
        ),
        (lambda results: results["summary"][0].update(top_k=8), "field 'summary', field 'top_k': it is 8, but 4"),
        (lambda results: results["summary"][0].update(num_samples=7), "holds 6 samples, but its summary speaks of 7"),
    ],
)
def test_a_broken_file_is_refused_by_name_sample_and_field(tmp_path, change, message):
    write_results(tmp_path, ["text-vqa"])
    path = file_of(tmp_path, "text-vqa")
    rewrite(path, change)
    with pytest.raises(ValueError, match=message) as caught:
        load_recorded_results(tmp_path)
    assert path.name in str(caught.value)


def test_files_that_are_cut_off_misnamed_or_doubled_are_refused(tmp_path):
    write_results(tmp_path, ["text-vqa"])
    path = file_of(tmp_path, "text-vqa")
    content = path.read_text()
    path.write_text(content[:500])
    with pytest.raises(ValueError, match="crops2_topk4_blocks12.json' is not valid JSON"):
        load_recorded_results(tmp_path)
    path.write_text(content)
    (path.parent / "notes.json").write_text("{}")
    with pytest.raises(ValueError, match="notes.json' is not named <dataset>_imgsizetier"):
        load_recorded_results(tmp_path)
    (path.parent / "notes.json").unlink()
    again = path.rename(path.parent / path.name.replace("crops2", "crops3"))
    path.write_text(content)
    with pytest.raises(ValueError, match="sample 0: it is in .*crops2.* at tier=low top_k=4 num_blocks=12 already"):
        load_recorded_results(tmp_path)
    again.rename(path.parent / path.name.replace("text-vqa", "okvqa"))
    with pytest.raises(ValueError, match="named after data set 'okvqa' but lies in the folder of 'text_vqa'"):
        load_recorded_results(tmp_path)


def test_folders_that_hold_no_results_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="results folder '.*none' does not exist"):
        load_recorded_results(tmp_path / "none")
    with pytest.raises(ValueError, match="has no folder in it"):
        load_recorded_results(tmp_path)
    (tmp_path / "text-vqa").mkdir()
    with pytest.raises(ValueError, match="text-vqa' has no results in it"):
        load_recorded_results(tmp_path)
    (tmp_path / "text_vqa").mkdir()
    with pytest.raises(ValueError, match="both hold results of 'text_vqa'"):
        load_recorded_results(tmp_path)
