"""What recipes and flags say of the executor."""

import json
from dataclasses import replace

import pytest
import torch

from joint_controller.knobs import KnobSetting
from joint_controller.latency import LatencyEstimatorModel, read_latency_estimator
from joint_controller.latency.way_of_running import WayOfRunning
from joint_controller.scripts import ScriptParser
from joint_controller.scripts.executor_arguments import (
    ExecutorArguments,
    load_executor_from,
    load_latency_estimator,
    set_num_threads,
)


def parse(*flags):
    [args] = ScriptParser([ExecutorArguments]).parse_args_and_config(flags)
    return args


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe; gives the flags that name it."""

    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return ["--config", str(path)]

    return write


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("importance")
    last_blocks = {str(block): block / 10 for block in range(8)}
    (folder / "last.json").write_text(json.dumps(last_blocks))
    (folder / "sets.json").write_text(json.dumps({"scores": last_blocks, "block_sets": {"4": [0, 2, 3, 5]}}))
    return folder


def test_importance_scores_are_a_file_or_one_for_each_data_set(files, recipe):
    assert load_executor_from(parse("--importance_path", str(files / "last.json"))).active_blocks(4) == [0, 5, 6, 7]
    searched = load_executor_from(parse("--importance_path", str(files / "sets.json")))
    assert searched.active_blocks(4) == [0, 2, 3, 5] and searched.active_blocks(5) == [0, 4, 5, 6, 7]

    flags = recipe(f"importance_path: {{easy_vqa: {files}/last.json, default: {files}/sets.json}}")
    executor = load_executor_from(parse(*flags))
    assert executor.active_blocks(4, "easy_vqa/train/000001") == [0, 5, 6, 7]
    assert executor.active_blocks(4, "scenes/train/000001") == [0, 2, 3, 5]
    assert executor.active_blocks(4) == [0, 2, 3, 5], "a request that is of no data set"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("importance_path: {easy_vqa: [1, 2]}", r"gives \[1, 2\] for data set 'easy_vqa'"),
        ("importance_path: {easy_vqa: none.json}", "'none.json' does not exist"),
        ("importance_path: none.json", "'none.json' does not exist"),
    ],
)
def test_wrong_importance_paths_are_refused(recipe, text, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_executor_from(parse(*recipe(text)))


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--knob_values", "top_k=2,8", "tier=low,high"], ""),
        ([], "knob_values: {top_k: [2, 8], tier: [low, high]}"),
        ([], "knob_values: ['top_k=2,8', 'tier=low,high']"),
        (["--knob_values", "top_k=2,8", "tier=low,high"], "knob_values: {top_k: [4], num_blocks: [4]}"),
    ],
)
def test_knob_values_are_a_mapping_or_words(recipe, flags, text):
    executor = load_executor_from(parse(*recipe(f"max_new_tokens: 2\n{text}"), *flags))
    assert executor.knob_space.values == {"tier": ("low", "high"), "top_k": (2, 8), "num_blocks": (4, 5, 6, 8)}
    assert executor.max_new_tokens == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("knob_values: {depth: [4]}", "there is no knob `depth`"),
        ("knob_values: {top_k: [3, many]}", "knob `top_k` takes values of the type int32, got 'many'"),
        ("knob_values: {top_k: [1000]}", "top_k"),
        ("knob_values: {top_k: []}", "knob `top_k` has no values"),
        ("knob_values: {tier: [low, enormous]}", "enormous"),
        ("knob_values: ['top_k']", "`knob_values` has 'top_k': give each knob once, as name=value,value"),
        ("knob_values: ['top_k=1', 'top_k=2']", "`knob_values` has 'top_k=2': give each knob once"),
    ],
)
def test_wrong_knob_values_are_refused(recipe, text, message):
    with pytest.raises(ValueError, match=message):
        load_executor_from(parse(*recipe(text)))


def test_a_whole_knob_space_can_be_given_in_their_place():
    space = load_executor_from(parse()).knob_space.restrict({"top_k": [4]})
    assert load_executor_from(parse(), knob_space=space).knob_space == space
    with pytest.raises(ValueError, match="knob_values"):
        load_executor_from(parse("--knob_values", "top_k=2"), knob_space=space)


@pytest.mark.parametrize(
    ("model_path", "importance", "error", "message"),
    [
        ("random:no-such-sizes", None, ValueError, "'random:no-such-sizes' is unknown: choose random:molmoe-1b"),
        ("random:molmoe-1b", "scores.json", ValueError, "are random: leave it out"),
        ("nowhere/to/be/found", None, FileNotFoundError, "'nowhere/to/be/found' does not exist"),
    ],
)
def test_executors_that_there_are_not_are_refused(model_path, importance, error, message):
    args = ExecutorArguments(model_path=model_path, importance_path=importance)
    with pytest.raises(error, match=message):
        load_executor_from(args, "cpu")


def test_threads():
    threads = torch.get_num_threads()
    try:
        set_num_threads(parse("--num_threads", "1"))
        assert torch.get_num_threads() == 1
        set_num_threads(parse())
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    with pytest.raises(ValueError, match="`num_threads` is 0: give 1 or more."):
        set_num_threads(parse("--num_threads", "0"))


COUNTS = {"image_pixels": [4096], "num_views": [4], "vision_tokens": [200], "text_tokens": [20]}


def test_latency_estimators(tmp_path):
    args = parse()
    executor = load_executor_from(args, "cpu")
    shipped = load_latency_estimator(args, executor)
    assert shipped.way.num_threads == 1 and shipped.latency_scope == "request"
    [named] = [load_latency_estimator(replace(args, latency_estimator_path="embedded_cpu"), executor)]
    full = executor.knob_space.full
    expected = shipped.predict_latency_ms([full], COUNTS, [2])
    assert torch.equal(named.predict_latency_ms([full], COUNTS, [2]), expected)

    shipped.save_pretrained(tmp_path)
    own = load_latency_estimator(replace(args, latency_estimator_path=str(tmp_path)), executor)
    assert isinstance(own, LatencyEstimatorModel)
    assert torch.equal(own.predict_latency_ms([KnobSetting(dict(full))], COUNTS, [2]), expected)


def test_latencies_are_of_the_scope_that_is_asked_for(tmp_path):
    executor = load_executor_from(parse(), "cpu")
    whole = load_latency_estimator(parse("--latency_scope", "request"), executor)
    of_model = load_latency_estimator(parse("--latency_scope", "model"), executor)
    assert (whole.latency_scope, of_model.latency_scope) == ("request", "model")
    full = executor.knob_space.full
    stage_ms = whole.predict_stage_ms([full], COUNTS, [2])
    model_ms = sum(stage_ms[stage] for stage in ("vision", "llm_prefill", "decode"))
    assert of_model.predict_latency_ms([full], COUNTS, [2]).item() == pytest.approx(model_ms.item())
    of_model.save_pretrained(tmp_path)
    flags = ["--latency_estimator_path", str(tmp_path)]
    assert load_latency_estimator(parse(*flags, "--latency_scope", "model"), executor).latency_scope == "model"
    with pytest.raises(ValueError, match="of the model alone, .* or pass `--latency_scope model`") as error:
        load_latency_estimator(parse(*flags), executor)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="latency_scope.* invalid choice: 'all'"):
        parse("--latency_scope", "all")


def test_what_ships_for_another_checkpoint_is_of_this_way_of_running(monkeypatch):
    """Executors of the embedded one's sizes that are not the embedded one."""
    executor, args = load_executor_from(parse(), "cpu"), parse("--model_path", "elsewhere")
    there = read_latency_estimator("embedded_cpu").way
    monkeypatch.setattr(WayOfRunning, "of", lambda executor: there)
    assert load_latency_estimator(args, executor).way == there
    # The code may be another.
    monkeypatch.setattr(WayOfRunning, "of", lambda executor: replace(there, executor_revision="another"))
    assert load_latency_estimator(args, executor).way == there
    for other, message in (
        (
            {"num_threads": 7},
            r"that ships is of another way of running \(threads 1 there, 7 here\); give `--latency_estim",
        ),
        (
            {"device_name": "another processor"},
            r"'elsewhere' on another processor: one ships for .+; give `--latency_est",
        ),
    ):
        monkeypatch.setattr(WayOfRunning, "of", lambda executor, other=other: replace(there, **other))
        with pytest.raises(ValueError, match=message):
            load_latency_estimator(args, executor)


def test_latency_estimators_that_there_are_not_are_refused():
    executor = load_executor_from(parse(), "cpu")
    with pytest.raises(FileNotFoundError, match="'no-such-estimator' does not exist"):
        load_latency_estimator(parse("--latency_estimator_path", "no-such-estimator"), executor)
    with pytest.raises(ValueError, match="was fitted on another executor"):
        load_latency_estimator(parse("--latency_estimator_path", "molmoe_1b_h100"), executor)
