import pytest

from joint_controller import (
    JointControllerConfig,
    JointControllerModel,
    JointPipeline,
    KnobSetting,
    LatencyEstimatorModel,
)
from joint_controller.data import load_vqa_dataset
from joint_controller.executor import ExecutorRequest, MolmoExecutor
from joint_controller.latency import embedded_latency_estimator_path


@pytest.fixture(scope="module")
def controller_path(tmp_path_factory):
    """A controller whose choice is known: medium, top_k 8, 8 blocks."""
    executor = MolmoExecutor.from_pretrained("embedded", max_new_tokens=2)
    controller = JointControllerModel(
        JointControllerConfig(
            knob_space=executor.knob_space.to_dict(),
            question_size=executor.hidden_size,
            vision_size=executor.hidden_size,
            latency_budget_min_ms=30,
            latency_budget_max_ms=110,
        )
    )
    controller.stage1.tier_head.bias.data[1] = 1.0
    controller.stage2.top_k_head.bias.data[3] = 1.0
    controller.stage2.num_blocks_head.bias.data[3] = 1.0
    folder = tmp_path_factory.mktemp("controller")
    controller.save_pretrained(folder)
    LatencyEstimatorModel.from_pretrained(embedded_latency_estimator_path()).save_pretrained(
        folder / "latency_estimator"
    )
    return folder


def test_answers_are_the_executors_at_the_controllers_setting(controller_path):
    pipeline = JointPipeline.from_pretrained(controller_path, max_new_tokens=2)
    setting = KnobSetting("medium", 8, 8)
    for row in load_vqa_dataset("easy_vqa", "test", max_samples=4):
        found = pipeline(row["image"], row["question"], latency_budget_ms=80)
        request = ExecutorRequest(row["sample_id"], row["image"], row["question"], "vqa2", setting)
        [output] = pipeline.executor.run([request])
        assert (found.answer, found.setting, found.latency_budget_ms) == (output.answer, setting, 80)
        assert found.answer == row["answers"][0]  # the executor answers easy-vqa rightly
        [expected] = pipeline.latency_estimator.predict_latency_ms(
            [setting], [5], [output.vision_tokens], [output.text_tokens], [output.output_tokens]
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
