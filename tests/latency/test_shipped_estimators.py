"""The estimators that ship with the package, on the profiles that ship with them."""

import json

import pytest
import torch

from joint_controller import KnobSetting, LatencyEstimatorModel
from joint_controller.latency import (
    embedded_latency_estimator_path,
    load_profile,
    read_latency_estimator,
    shipped_latency_estimators,
)
from joint_controller.latency.shipped_estimators import SHIPPED_ESTIMATORS
from joint_controller.molmo import MolmoConfig
from joint_controller.molmo.executor import embedded_executor_path


FOLDERS = sorted(path.parent for path in SHIPPED_ESTIMATORS.glob("*/config.json"))


def test_there_is_one_for_the_embedded_executor_and_one_for_molmoe():
    assert [folder.name for folder in FOLDERS] == ["embedded_cpu", "molmoe_1b_h200"]
    embedded = shipped_latency_estimators(MolmoConfig.from_pretrained(embedded_executor_path()))
    assert list(embedded.values()) == [embedded_latency_estimator_path()]
    molmoe = shipped_latency_estimators(MolmoConfig())
    assert {device: folder.name for device, folder in molmoe.items()} == {"NVIDIA H200": "molmoe_1b_h200"}
    other = MolmoConfig(projector_intermediate_size=77)
    assert shipped_latency_estimators(other) == {}


def test_they_are_read_by_name(tmp_path, monkeypatch):
    assert read_latency_estimator("molmoe_1b_h200").config.device_name == "NVIDIA H200"
    with pytest.raises(FileNotFoundError, match=r"one that ships \(embedded_cpu, molmoe_1b_h200\)"):
        read_latency_estimator("molmoe_1b_a100")
    # A folder of that name comes first.
    monkeypatch.chdir(tmp_path)
    read_latency_estimator("embedded_cpu").save_pretrained("molmoe_1b_h200")
    assert read_latency_estimator("molmoe_1b_h200").config.device_name != "NVIDIA H200"


def test_the_published_checkpoint_has_the_sizes_that_were_measured(shared_dir):
    config = MolmoConfig.from_pretrained(shared_dir / "molmo" / "molmoe-1b")
    assert list(shipped_latency_estimators(config)) == ["NVIDIA H200"]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
@torch.no_grad()
def test_it_predicts_its_own_profile_at_least_as_well_as_what_it_had_not_seen(folder):
    model = LatencyEstimatorModel.from_pretrained(folder)
    profile = load_profile(folder)
    settings = [
        KnobSetting(*knobs) for knobs in zip(profile["tier"], profile["top_k"], profile["num_blocks"], strict=True)
    ]
    counts = [torch.tensor(profile[name]) for name in ("num_views", "vision_tokens", "text_tokens")]
    first_token_ms = model.predict_latency_ms(settings, *counts, torch.ones(len(profile), dtype=torch.long))
    measured_ms = torch.tensor(profile["vision_ms"]) + torch.tensor(profile["llm_prefill_ms"])
    mape = ((first_token_ms - measured_ms).abs() / measured_ms).mean().item()
    reported = json.loads((folder / "fit_report.json").read_text())["prefill"]["mape"]
    assert mape < 1.05 * reported < 0.08
    quantile_ms = model.predict_latency_ms(
        settings, *counts, torch.ones(len(profile), dtype=torch.long), quantile=0.95
    )
    assert (quantile_ms > first_token_ms).all()
