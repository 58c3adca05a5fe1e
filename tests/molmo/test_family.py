"""Molmo as a family: what `load_executor` and its siblings make of a checkpoint, whatever its type."""

import json
from types import SimpleNamespace

import pytest
import torch

from joint_controller import KnobSpace
from joint_controller.executor import (
    EMBEDDED,
    ExecutorRequest,
    embedded_executor_path,
    executor_family,
    executor_shape,
    families,
    load_executor,
    load_input_counter,
    register_executor_family,
)
from joint_controller.molmo import MolmoConfig, family
from joint_controller.molmo.costs import MolmoCostModel
from joint_controller.molmo.executor import MolmoExecutor, random_executor
from joint_controller.molmo.knob_space import build_knob_space, molmo_knob_space


SPACE = build_knob_space({"low": (1, 1), "high": (5, 9)}, top_k=(1, 4), num_blocks=(2, 4))


@pytest.fixture(scope="module")
def folder(tiny_molmo, tiny_processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_molmo.save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    return folder


def test_a_checkpoint_is_loaded_by_its_model_type(folder):
    executor = load_executor(
        folder, device="cpu", knob_values={"tier": ["low"], "top_k": ["2"]}, max_new_tokens=3, mode="plain"
    )
    assert isinstance(executor, MolmoExecutor) and executor.model_type == "molmo"
    assert (executor.dtype, executor.mode, executor.max_new_tokens) == ("float32", "plain", 3)
    assert executor.knob_space.values == {"tier": ("low",), "top_k": (2,), "num_blocks": (3, 4)}
    assert executor.prefill_lengths is None and executor.device.type == "cpu"
    assert executor.question_size == executor.vision_size == 32
    assert load_executor(folder, "cpu", "bfloat16").dtype == "bfloat16"


def test_a_whole_knob_space_stands_in_place_of_values(folder):
    assert load_executor(folder, "cpu", knob_space=SPACE).knob_space == SPACE
    with pytest.raises(ValueError, match="both `knob_values` and `knob_space` are given"):
        load_executor(folder, "cpu", knob_space=SPACE, knob_values={"top_k": [1]})
    with pytest.raises(ValueError, match="`top_k` has the value 9 but the executor has 8 experts"):
        load_executor(folder, "cpu", knob_values={"top_k": [9]})


def test_the_embedded_executor_is_the_default_and_has_the_knobs_of_its_configuration():
    executor = load_executor(device="cpu")
    config = json.loads((embedded_executor_path() / "config.json").read_text())
    assert executor.knob_space == KnobSpace.from_dict(config["knob_space"]) and len(executor.knob_space) == 48
    assert executor.active_blocks(8) == list(range(8))
    # Outcomes that were stored before stay those of this executor.
    assert executor.fingerprint == "e474b3c667de70dfb5e9705c8121b304d39cfabdb3b95bd299ec7440874c5cef"


def test_importance_is_a_file_or_one_for_each_data_set(folder, tmp_path):
    scores = tmp_path / "scores.json"
    scores.write_text('{"1": 0.1, "2": 0.2, "3": 0.3}')
    executor = load_executor(folder, "cpu", importance={"scenes": str(scores), "default": scores})
    assert executor.active_blocks(2, "scenes/train/000001") == [0, 3]
    for wrong in ([1, 2], None):
        with pytest.raises(ValueError, match="for data set 'scenes': give the path of a JSON file"):
            load_executor(folder, "cpu", importance={"scenes": wrong})


def test_random_weights_are_made_by_name_and_seed(tiny_molmo_config, monkeypatch):
    monkeypatch.setitem(random_executor.RANDOM_CONFIGS, "molmoe-1b", lambda: tiny_molmo_config)
    first, again, other = (
        load_executor("random:molmoe-1b", "cpu", seed=seed, knob_values={"top_k": ["1", "2"]}, max_new_tokens=2)
        for seed in (1, 1, 2)
    )
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert first.knob_space["top_k"].values == (1, 2) and first.max_new_tokens == 2
    with pytest.raises(ValueError, match="'random:molmo-72b' is unknown: choose random:molmoe-1b"):
        load_executor("random:molmo-72b", "cpu")
    with pytest.raises(ValueError, match="'scores.json' .* are random: leave it out"):
        load_executor("random:molmoe-1b", "cpu", importance="scores.json")


@pytest.mark.parametrize("knob_values", [None, {"tier": ["low", "high"], "top_k": ["1"]}])
def test_inputs_are_counted_without_weights(folder, tmp_path, images_and_questions, knob_values):
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    counter = load_input_counter(tmp_path, knob_values, max_new_tokens=5)
    executor = load_executor(folder, "cpu", knob_values=knob_values, max_new_tokens=5)
    assert counter.knob_space == executor.knob_space
    assert counter.count_names == executor.count_names
    assert counter.max_prompt_tokens == executor.max_prompt_tokens == 507
    for number, (image, question) in enumerate(images_and_questions):
        request = ExecutorRequest(f"made/{number}", image, question, "vqa2", executor.knob_space.full)
        settings = list(counter.knob_space)
        assert counter.count_inputs(request, settings) == executor.count_inputs(request, settings)
    with pytest.raises(ValueError, match="`style` is 'none'"):
        counter.count_inputs(ExecutorRequest("made/0", image, "a star?", "none", settings[0]), settings)


@pytest.fixture(scope="module")
def images_and_questions():
    from PIL import Image

    sizes = [(48, 48), (90, 40), (30, 100)]
    return [(Image.new("RGB", size), "what is left of the star?") for size in sizes]


def test_shape_and_costs_come_from_the_configuration(folder, tiny_molmo):
    model_type, shape = executor_shape(folder)
    executor = load_executor(folder, "cpu")
    assert (model_type, shape) == (executor.model_type, executor.shape)
    assert shape["text_config.hidden_size"] == 32 and shape["vision_config.patch_size"] == 4
    assert shape["vit_layers"] == [-1, -2] and json.loads(json.dumps(shape)) == shape
    costs = executor_family(model_type).cost_model(shape, [64, 128], ("tier", "top_k", "num_blocks"))
    assert isinstance(costs, MolmoCostModel)
    assert tuple(costs.count_names) == tuple(executor.count_names)
    assert set(costs.stages) - {"decode"} <= set(executor.stage_names)
    assert set(costs.knob_names) <= set(executor.knob_space.names)


def test_the_family_says_what_families_say():
    assert executor_family("molmo") is family
    assert family.model_type == MolmoConfig.model_type and family.random_names == ("molmoe-1b",)
    assert [(folder / "executor" / "molmo_executor.py").is_file() for folder in family.code_folders] == [True]


def test_a_checkpoint_of_an_unknown_type_is_refused_until_its_family_is_registered(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "other"}')
    for load in (load_executor, load_input_counter, executor_shape):
        with pytest.raises(ValueError, match="no executor for models of the type 'other': choose one of molmo"):
            load(tmp_path)
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))
    executor = SimpleNamespace()
    asked = []
    other = SimpleNamespace(
        model_type="other", random_names=(), load_executor=lambda *args, **options: asked.append(args) or executor
    )
    register_executor_family(other)
    assert load_executor(tmp_path, "cpu", knob_values={"depth": ["4"]}) is executor
    assert asked == [(tmp_path, torch.device("cpu"), None, {"depth": ["4"]}, None)]
    with pytest.raises(ValueError, match="an executor family of the model type 'molmo' already"):
        register_executor_family(SimpleNamespace(model_type="molmo"))


@pytest.mark.parametrize(
    ("content", "message"),
    [("{}", "names no `model_type`"), ("[]", "names no `model_type`"), ("{", "is not valid JSON")],
)
def test_a_folder_whose_configuration_says_no_type_is_refused(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_executor(tmp_path)


def test_embedded_is_a_name_for_its_folder(tiny_molmo_config):
    assert executor_shape(EMBEDDED) == executor_shape(embedded_executor_path())
    assert molmo_knob_space(MolmoConfig.from_pretrained(embedded_executor_path())) == load_input_counter().knob_space
