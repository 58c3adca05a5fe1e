"""The estimators that ship with the package, on the profiles that ship with them."""

import json
from types import SimpleNamespace

import pytest
import torch

from joint_controller import (
    JointControllerConfig,
    JointControllerModel,
    KnobSetting,
    KnobSpace,
    LatencyEstimatorModel,
)
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
    assert [folder.name for folder in FOLDERS] == ["embedded_cpu", "molmoe_1b_h100"]
    embedded = shipped_latency_estimators(executor_of(*executor_shape(EMBEDDED)))
    assert list(embedded.values()) == [embedded_latency_estimator_path()]
    molmoe = shipped_latency_estimators(executor_of("molmo", molmo_shape(MolmoConfig())))
    assert {device: folder.name for device, folder in molmoe.items()} == {"NVIDIA H100 80GB HBM3": "molmoe_1b_h100"}
    other = MolmoConfig(projector_intermediate_size=77)
    assert shipped_latency_estimators(executor_of("molmo", molmo_shape(other))) == {}
    assert shipped_latency_estimators(executor_of("other", molmo_shape(MolmoConfig()))) == {}


def test_they_are_read_by_name(tmp_path, monkeypatch):
    assert read_latency_estimator("molmoe_1b_h100").config.device_name == "NVIDIA H100 80GB HBM3"
    with pytest.raises(FileNotFoundError, match=r"one that ships \(embedded_cpu, molmoe_1b_h100\)"):
        read_latency_estimator("molmoe_1b_a100")
    # A folder of that name comes first.
    monkeypatch.chdir(tmp_path)
    read_latency_estimator("embedded_cpu").save_pretrained("molmoe_1b_h100")
    assert read_latency_estimator("molmoe_1b_h100").config.device_name != "NVIDIA H100 80GB HBM3"


def test_the_published_checkpoint_has_the_sizes_that_were_measured(shared_dir):
    executor = executor_of(*executor_shape(shared_dir / "molmo" / "molmoe-1b"))
    assert list(shipped_latency_estimators(executor)) == ["NVIDIA H100 80GB HBM3"]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
@torch.no_grad()
def test_it_predicts_its_own_profile_at_least_as_well_as_what_it_had_not_seen(folder):
    model = LatencyEstimatorModel.from_pretrained(folder)
    profile = load_profile(folder)
    settings = profile_settings(profile)
    assert model.latency_scope == "request" and profile.unique("latency_scope") == ["request"]
    counts = {name: torch.tensor(profile[name][:]) for name in model.costs.count_names}
    output_tokens = torch.tensor(profile["output_tokens"][:])
    stages = ("overhead_ms", "controller_ms", "image_processing_ms", "vision_ms", "llm_prefill_ms")
    columns = {name: torch.tensor(profile[name][:]) for name in (*stages, "decode_ms_per_token")}
    model_ms = columns["vision_ms"] + columns["llm_prefill_ms"]
    model_ms = model_ms + columns["decode_ms_per_token"] * (output_tokens - 1)
    before_ms = sum(columns[name] for name in stages[:3])
    reported = json.loads((folder / "fit_report.json").read_text())
    for scope, measured_ms in (("request", before_ms + model_ms), ("model", model_ms)):
        estimator = model.in_scope(scope)
        predicted_ms = estimator.predict_latency_ms(settings, counts, output_tokens)
        mape = ((predicted_ms - measured_ms).abs() / measured_ms).mean().item()
        if scope == "request":
            assert mape < 1.05 * reported["total"]["mape"]
        assert mape < 0.05
        upper_ms = estimator.predict_latency_ms(settings, counts, output_tokens, quantile=0.95)
        assert (upper_ms > predicted_ms).all()
        # Single requests of what it was fitted to, too, stay below.
        pairs = zip(profile[f"{scope}_ms"], upper_ms.tolist(), strict=True)
        is_below = [single_ms <= upper for singles, upper in pairs for single_ms in singles]
        assert sum(is_below) > 0.93 * len(is_below)
    assert reported["total"]["p95_coverage"] > 0.92


def test_they_say_how_the_executor_was_run():
    embedded, molmoe = (read_latency_estimator(folder).way for folder in FOLDERS)
    assert (embedded.device_type, embedded.num_threads, embedded.executor_mode) == ("cpu", 1, "onednn")
    assert (molmoe.device_type, molmoe.num_threads, molmoe.executor_mode) == ("cuda", None, "captured")


@pytest.mark.parametrize(
    ("name", "settings", "expected_ms"),
    [
        (
            "embedded_cpu",
            [("low", 1, 4), ("medium", 4, 6), ("high", 8, 8)],
            [15.266124725341797, 36.66518020629883, 157.01370239257812],
        ),
        (
            "molmoe_1b_h100",
            [("low", 4, 12), ("medium", 6, 14), ("high", 8, 16)],
            [7.845441818237305, 15.628852844238281, 40.80537033081055],
        ),
    ],
)
def test_they_predict_what_they_did_when_they_were_published(name, settings, expected_ms):
    """Figures that were published with them depend on it."""
    model = read_latency_estimator(name)
    settings = [KnobSetting(tier=tier, top_k=top_k, num_blocks=num_blocks) for tier, top_k, num_blocks in settings]
    counts = {
        "embedded_cpu": {"num_views": [2, 5, 13], "vision_tokens": [44, 80, 164], "text_tokens": [11, 30, 94]},
        "molmoe_1b_h100": {"num_views": [2, 7, 13], "vision_tokens": [316, 700, 1252], "text_tokens": [11, 30, 94]},
    }[name] | {"image_pixels": [4096, 65536, 307200]}
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
    for earlier, message in (
        ({"executor_type": None}, r"has no `executor_type`.* make it anew with `joint-controller profile`"),
        ({"upper_quantiles": {"total": {"0.95": 1.1}}}, "are of total .* of an earlier version. Make it anew with"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | earlier))
        with pytest.raises(ValueError, match=message) as error:
            read_latency_estimator(tmp_path)
        assert "\n" not in str(error.value)


def test_other_models_are_no_estimators(tmp_path):
    space = KnobSpace([Knob("depth", (4, 8), stage=2)])
    config = JointControllerConfig(knob_space=space.to_dict(), question_size=4, vision_size=4)
    JointControllerModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a JointControllerModel, which predicts no latencies"):
        read_latency_estimator(tmp_path)
