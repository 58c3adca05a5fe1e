"""The estimators that ship with the package, on the profiles that ship with them."""

import json
from types import SimpleNamespace

import pytest
import torch

from joint_controller import JointControllerConfig, JointControllerModel, KnobSetting, KnobSpace, LatencyEstimatorModel
from joint_controller.executor import EMBEDDED, executor_shape
from joint_controller.knobs import Knob
from joint_controller.latency import (
    embedded_latency_estimator_path,
    load_profile,
    read_latency_estimator,
    shipped_latency_estimators,
)
from joint_controller.latency.loading import SHIPPED_ESTIMATORS
from joint_controller.latency.profile_table import profile_settings
from joint_controller.molmo import MolmoConfig
from joint_controller.molmo.shape import molmo_shape


FOLDERS = sorted(path.parent for path in SHIPPED_ESTIMATORS.glob("*/config.json"))


def executor_of(model_type, shape):
    """As much of an executor as says which estimators are about it."""
    return SimpleNamespace(model_type=model_type, shape=shape)


def test_there_is_one_for_the_embedded_executor_and_one_for_molmoe():
    assert [folder.name for folder in FOLDERS] == ["embedded_cpu", "molmoe_1b_h200"]
    embedded = shipped_latency_estimators(executor_of(*executor_shape(EMBEDDED)))
    assert list(embedded.values()) == [embedded_latency_estimator_path()]
    molmoe = shipped_latency_estimators(executor_of("molmo", molmo_shape(MolmoConfig())))
    assert {device: folder.name for device, folder in molmoe.items()} == {"NVIDIA H200": "molmoe_1b_h200"}
    other = MolmoConfig(projector_intermediate_size=77)
    assert shipped_latency_estimators(executor_of("molmo", molmo_shape(other))) == {}
    assert shipped_latency_estimators(executor_of("other", molmo_shape(MolmoConfig()))) == {}


def test_they_are_read_by_name(tmp_path, monkeypatch):
    assert read_latency_estimator("molmoe_1b_h200").config.device_name == "NVIDIA H200"
    with pytest.raises(FileNotFoundError, match=r"one that ships \(embedded_cpu, molmoe_1b_h200\)"):
        read_latency_estimator("molmoe_1b_a100")
    # A folder of that name comes first.
    monkeypatch.chdir(tmp_path)
    read_latency_estimator("embedded_cpu").save_pretrained("molmoe_1b_h200")
    assert read_latency_estimator("molmoe_1b_h200").config.device_name != "NVIDIA H200"


def test_the_published_checkpoint_has_the_sizes_that_were_measured(shared_dir):
    executor = executor_of(*executor_shape(shared_dir / "molmo" / "molmoe-1b"))
    assert list(shipped_latency_estimators(executor)) == ["NVIDIA H200"]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
@torch.no_grad()
def test_it_predicts_its_own_profile_at_least_as_well_as_what_it_had_not_seen(folder):
    model = LatencyEstimatorModel.from_pretrained(folder)
    profile = load_profile(folder)
    settings = profile_settings(profile)
    counts = {name: torch.tensor(profile[name][:]) for name in model.cost_model.count_names}
    first_token_ms = model.predict_latency_ms(settings, counts, torch.tensor(1))
    measured_ms = torch.tensor(profile["vision_ms"]) + torch.tensor(profile["llm_prefill_ms"])
    mape = ((first_token_ms - measured_ms).abs() / measured_ms).mean().item()
    reported = json.loads((folder / "fit_report.json").read_text())["prefill"]["mape"]
    assert mape < 1.05 * reported < 0.08
    assert (model.predict_latency_ms(settings, counts, torch.tensor(1), quantile=0.95) > first_token_ms).all()


@pytest.mark.parametrize(
    ("name", "settings", "expected_ms"),
    [
        (
            "embedded_cpu",
            [("low", 1, 4), ("medium", 4, 6), ("high", 8, 8)],
            [6.599680423736572, 16.962120056152344, 63.60746765136719],
        ),
        (
            "molmoe_1b_h200",
            [("low", 4, 12), ("medium", 6, 14), ("high", 8, 16)],
            [5.626896858215332, 12.490205764770508, 34.45830535888672],
        ),
    ],
)
def test_they_predict_what_they_did_when_they_were_published(name, settings, expected_ms):
    """Figures that were published with them depend on it."""
    model = read_latency_estimator(name)
    settings = [KnobSetting(tier=tier, top_k=top_k, num_blocks=num_blocks) for tier, top_k, num_blocks in settings]
    counts = {
        "embedded_cpu": {"num_views": [2, 5, 10], "vision_tokens": [44, 80, 134], "text_tokens": [11, 30, 94]},
        "molmoe_1b_h200": {"num_views": [2, 7, 13], "vision_tokens": [316, 700, 1252], "text_tokens": [11, 30, 94]},
    }[name]
    assert model.predict_latency_ms(settings, counts, [1, 3, 16]).tolist() == pytest.approx(expected_ms, rel=1e-6)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_example_of_its_card_runs(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    code = (folder / "README.md").read_text().split("```python")[1].split("```")[0]
    exec(code.replace("path/to/this/folder", folder.name), {})


def test_one_of_an_earlier_version_is_refused(tmp_path):
    model = read_latency_estimator("embedded_cpu")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["executor_type"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"formula_version": 2}))
    with pytest.raises(
        ValueError, match=r"has no `executor_type`.* make it anew with `joint-controller profile`"
    ) as error:
        read_latency_estimator(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_other_models_are_no_estimators(tmp_path):
    space = KnobSpace([Knob("depth", (4, 8), stage=2)])
    config = JointControllerConfig(knob_space=space.to_dict(), question_size=4, vision_size=4)
    JointControllerModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a JointControllerModel, which predicts no latencies"):
        read_latency_estimator(tmp_path)
