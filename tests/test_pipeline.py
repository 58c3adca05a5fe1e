import shutil

import pytest
from molmo_knobs import molmo_setting
from safetensors.torch import load_file, save_file

import joint_controller.controller.loading
from joint_controller import (
    JointControllerConfig,
    JointControllerModel,
    JointPipeline,
    LatencyEstimatorModel,
)
from joint_controller.data import load_vqa_dataset
from joint_controller.executor import ExecutorRequest
from joint_controller.latency import embedded_latency_estimator_path
from joint_controller.molmo.executor import MolmoExecutor


@pytest.fixture(scope="module")
def controller_path(tmp_path_factory):
    """A controller whose choice is known: medium, top_k 8, 8 blocks."""
    executor = MolmoExecutor.from_pretrained("embedded", max_new_tokens=2)
    controller = JointControllerModel(
        JointControllerConfig(
            knob_space=executor.knob_space.to_dict(),
            question_size=executor.question_size,
            vision_size=executor.vision_size,
            latency_budget_min_ms=30,
            latency_budget_max_ms=110,
        )
    )
    controller.stage1.heads[0].bias.data[1] = 1.0
    controller.stage2.heads[0].bias.data[3] = 1.0
    controller.stage2.heads[1].bias.data[3] = 1.0
    folder = tmp_path_factory.mktemp("controller")
    controller.save_pretrained(folder)
    LatencyEstimatorModel.from_pretrained(embedded_latency_estimator_path()).save_pretrained(
        folder / "latency_estimator"
    )
    return folder


def test_answers_are_the_executors_at_the_controllers_setting(controller_path):
    pipeline = JointPipeline.from_pretrained(controller_path, max_new_tokens=2)
    setting = molmo_setting("medium", 8, 8)
    for row in load_vqa_dataset("easy_vqa", "test", max_samples=4):
        found = pipeline(row["image"], row["question"], latency_budget_ms=80)
        request = ExecutorRequest(row["sample_id"], row["image"], row["question"], "vqa2", setting)
        [output] = pipeline.executor.run([request])
        assert (found.answer, found.setting, found.latency_budget_ms) == (output.answer, setting, 80)
        assert found.answer == row["answers"][0]  # the executor answers easy-vqa rightly
        [expected] = pipeline.latency_estimator.predict_latency_ms(
            [setting], {name: [count] for name, count in output.counts.items()}, [output.output_tokens]
        ).tolist()
        assert found.latency_ms == pytest.approx(expected)


def test_what_cannot_be_answered_is_refused(controller_path, tmp_path):
    pipeline = JointPipeline.from_pretrained(controller_path)
    image = load_vqa_dataset("easy_vqa", "test", max_samples=1)[0]["image"]
    with pytest.raises(ValueError, match="`latency_budget_ms` is 0"):
        pipeline(image, "what color is the shape?", latency_budget_ms=0)
    with pytest.raises(ValueError, match="`question` is empty"):
        pipeline(image, " ", latency_budget_ms=50)
    with pytest.raises(FileNotFoundError, match="is not the folder of a controller"):
        JointPipeline.from_pretrained(tmp_path / "missing")


def test_guardrail_takes_the_likeliest_setting_that_is_predicted_to_fit(controller_path):
    """Against the latency of every setting, predicted one by one from what the executor encodes."""
    pipeline = JointPipeline.from_pretrained(controller_path, max_new_tokens=2, guardrail_quantile=0.95)
    executor = pipeline.executor
    row = load_vqa_dataset("easy_vqa", "test", max_samples=1)[0]

    def predicted_ms(setting):
        request = ExecutorRequest("brute-force", row["image"], row["question"], "vqa2", setting)
        [encoded] = executor.encode([request], setting["tier"])
        counts = {
            "num_views": [encoded.num_views],
            "vision_tokens": [encoded.vision_tokens],
            "text_tokens": [len(encoded.input_ids) - encoded.vision_tokens],
        }
        return pipeline.latency_estimator.predict_latency_ms([setting], counts, [2], quantile=0.95).item()

    latencies = {setting: predicted_ms(setting) for setting in executor.knob_space}
    wanted = molmo_setting("medium", 8, 8)
    cheapest, full = latencies[executor.knob_space.cheapest], latencies[executor.knob_space.full]
    chosen = set()
    for budget in (
        full,
        latencies[wanted],
        0.97 * latencies[wanted],
        0.7 * latencies[wanted],
        1.2 * cheapest,
        cheapest,
    ):
        fits = [setting for setting, latency_ms in latencies.items() if latency_ms <= budget]
        # Stage 1: medium if anything of it fits. Stage 2: of 8 experts and 8 blocks, as many as fit; the heads' other
        # logits are alike, so that of two settings that keep one of the two, the first is taken.
        tier = "medium" if any(setting["tier"] == "medium" for setting in fits) else "low"
        likeliest = max(
            (setting for setting in fits if setting["tier"] == tier),
            key=lambda setting: (setting["top_k"] == 8) + (setting["num_blocks"] == 8),
        )
        found = pipeline(row["image"], row["question"], latency_budget_ms=budget)
        assert found.fits_budget is True and found.setting == likeliest and found.latency_ms <= budget
        chosen.add(found.setting)
    assert len(chosen) > 3 and wanted in chosen
    assert {setting["tier"] for setting in chosen} == {"low", "medium"}
    # Nothing fits: the cheapest setting, and the answer says so.
    found = pipeline(row["image"], row["question"], latency_budget_ms=0.99 * cheapest)
    assert found.fits_budget is False and found.setting == executor.knob_space.cheapest
    controller = JointControllerModel.from_pretrained(controller_path)
    without = JointPipeline(controller, executor, pipeline.latency_estimator)
    found = without(row["image"], row["question"], latency_budget_ms=cheapest)
    assert found.fits_budget is None and found.setting == wanted


def test_a_guardrail_that_cannot_promise_is_refused(controller_path):
    with pytest.raises(ValueError, match="has no quantile 0.5 of 'total'"):
        JointPipeline.from_pretrained(controller_path, guardrail_quantile=0.5)


def broken_copy(controller_path, folder, break_weights):
    """A copy of the controller whose weights are changed by `break_weights(path)`."""
    shutil.copytree(controller_path, folder)
    break_weights(folder / "model.safetensors")
    return folder


def test_a_broken_controller_is_refused_in_one_line(controller_path, tmp_path):
    def cut(path):
        path.write_bytes(path.read_bytes()[:1000])

    def empty(path):
        path.write_bytes(b"")

    def make_nan(path):
        weights = load_file(path)
        weights["stage1.heads.0.bias"][0] = float("nan")
        save_file(weights, path, {"format": "pt"})

    def drop_a_value(path):
        weights = load_file(path)
        weights["stage1.heads.0.bias"] = weights["stage1.heads.0.bias"][:1].clone()
        save_file(weights, path, {"format": "pt"})

    def drop_a_weight(path):
        weights = load_file(path)
        del weights["stage1.heads.0.bias"]
        save_file(weights, path, {"format": "pt"})

    messages = {
        cut: "model.safetensors' cannot be read",
        empty: "model.safetensors' cannot be read",
        make_nan: r"holds weights that are not finite \('stage1.heads.0.bias'\)",
        drop_a_value: "does not fit|cannot be read",
        drop_a_weight: "does not fit '.*config.json' .stage1.heads.0.bias",
    }
    for number, (break_weights, message) in enumerate(messages.items()):
        with pytest.raises(ValueError, match=message) as raised:
            JointPipeline.from_pretrained(broken_copy(controller_path, tmp_path / str(number), break_weights))
        assert "\n" not in str(raised.value)


def test_a_controller_is_taken_from_the_hub_by_its_name(controller_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        joint_controller.controller.loading,
        "snapshot_download",
        lambda name, **kwargs: asked.append(name) or str(controller_path),
    )
    assert JointPipeline.from_pretrained("somebody/controller").latency_estimator.config.held_out
    assert asked == ["somebody/controller"]


def test_a_broken_stage_1_is_refused_in_one_line(controller_path, tmp_path):
    weights = load_file(controller_path / "model.safetensors")
    weights["stage1.heads.0.bias"][0] = float("nan")
    broken = broken_copy(controller_path, tmp_path / "broken", lambda path: save_file(weights, path, {"format": "pt"}))
    with pytest.raises(ValueError, match="holds weights that are not finite"):
        JointControllerModel.from_pretrained(controller_path).load_stage1(broken)
