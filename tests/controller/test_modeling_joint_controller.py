import pytest
import torch
from transformers import AutoConfig, AutoModel

from joint_controller import JointControllerConfig, JointControllerModel, KnobSpace


SPACE = KnobSpace({"low": (1, 1), "medium": (4, 4), "high": (9, 9)}, top_k=(1, 2, 4, 8), num_blocks=(4, 8))


def small_controller(**kwargs) -> JointControllerModel:
    values = {"knob_space": SPACE.to_dict(), "question_size": 12, "vision_size": 20}
    return JointControllerModel(JointControllerConfig(**{**values, **kwargs}))


def random_inputs(num_rows: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "question_features": torch.randn(num_rows, 12, generator=generator),
        "latency_budget_ms": torch.linspace(10, 42, num_rows),
        "vision_features": torch.randn(num_rows, 20, generator=generator),
        "tier_index": torch.arange(num_rows) % 3,
    }


def randomize(model: JointControllerModel) -> JointControllerModel:
    """Weights as after some training: a new controller's heads are zero."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    return model


@pytest.mark.parametrize("size", [192, 2048])
def test_has_less_than_a_million_parameters(size):
    model = JointControllerModel(JointControllerConfig(question_size=size, vision_size=size))
    assert model.num_parameters() < 1_000_000


def test_a_new_controller_is_uniform_over_all_settings():
    outputs = small_controller()(**random_inputs())
    for logits, size in zip(outputs.to_tuple(), SPACE.sizes, strict=True):
        assert logits.shape == (5, size)
        torch.testing.assert_close(logits.softmax(-1), torch.full_like(logits, 1 / size))


def test_forward_equals_the_two_stages():
    model, inputs = randomize(small_controller()), random_inputs()
    outputs = model(**inputs)
    question, budget = inputs["question_features"], inputs["latency_budget_ms"]
    torch.testing.assert_close(outputs.tier_logits, model.stage1(question, budget))
    top_k_logits, num_blocks_logits = model.stage2(inputs["vision_features"], question, budget, inputs["tier_index"])
    torch.testing.assert_close(outputs.top_k_logits, top_k_logits)
    torch.testing.assert_close(outputs.num_blocks_logits, num_blocks_logits)


@pytest.mark.parametrize("changed", ["question_features", "latency_budget_ms", "vision_features", "tier_index"])
def test_each_stage_sees_what_it_should_and_nothing_else(changed):
    model, inputs = randomize(small_controller()), random_inputs()
    before = model(**inputs)
    inputs[changed] = (inputs[changed] + 1) % 3 if changed == "tier_index" else inputs[changed] * 1.3 + 1
    after = model(**inputs)
    stage1_sees = changed in ("question_features", "latency_budget_ms")
    assert torch.equal(before.tier_logits, after.tier_logits) != stage1_sees
    assert not torch.equal(before.top_k_logits, after.top_k_logits)
    assert not torch.equal(before.num_blocks_logits, after.num_blocks_logits)


def test_stage_1_from_the_budget_alone_does_not_see_the_question():
    model, inputs = randomize(small_controller(stage1_inputs="budget")), random_inputs()
    question, budget = inputs["question_features"], inputs["latency_budget_ms"]
    assert torch.equal(model.stage1(question, budget), model.stage1(torch.zeros_like(question), budget))
    assert not torch.equal(model.stage1(question, budget), model.stage1(question, budget + 1))


@pytest.mark.parametrize("stage2_inputs", ["question_and_budget", "budget"])
def test_stage_2_sees_no_more_than_its_inputs_name(stage2_inputs):
    model, inputs = randomize(small_controller(stage1_inputs="budget", stage2_inputs=stage2_inputs)), random_inputs()
    before = model(**inputs)
    for changed in inputs:
        after = model(**{**inputs, changed: (inputs[changed] + 1) % 3})
        sees = changed in ("latency_budget_ms", "tier_index") or changed.startswith(stage2_inputs.split("_")[0])
        assert torch.equal(before.top_k_logits, after.top_k_logits) != sees
        assert torch.equal(before.num_blocks_logits, after.num_blocks_logits) != sees


def test_what_no_stage_sees_need_not_be_there():
    model, inputs = small_controller(stage1_inputs="budget", stage2_inputs="budget"), random_inputs()
    inputs["question_features"] = inputs["vision_features"] = torch.empty(5, 0)
    assert model(**inputs).top_k_logits.shape == (5, 4)
    assert not model.config.sees_question and not model.config.sees_image
    assert small_controller(stage2_inputs="budget").config.sees_question
    assert small_controller(stage1_inputs="budget").config.sees_image


def test_the_scale_of_the_features_does_not_matter():
    model, inputs = randomize(small_controller()), random_inputs()
    scaled = {**inputs, "question_features": inputs["question_features"] * 100}
    torch.testing.assert_close(model(**inputs).tier_logits, model(**scaled).tier_logits, rtol=1e-3, atol=1e-3)


def test_stages_share_no_parameters_and_cover_all():
    model = small_controller()
    stage1, stage2 = ({id(p) for p in stage.parameters()} for stage in (model.stage1, model.stage2))
    assert not stage1 & stage2
    assert stage1 | stage2 == {id(p) for p in model.parameters()}


def test_saves_and_loads_through_the_auto_classes(tmp_path):
    model, inputs = randomize(small_controller(latency_budget_min_ms=3.5)), random_inputs()
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, JointControllerModel)
    assert loaded.knob_space == SPACE
    assert AutoConfig.from_pretrained(tmp_path).latency_budget_min_ms == 3.5
    assert (tmp_path / "model.safetensors").is_file()
    for before, after in zip(model(**inputs).to_tuple(), loaded(**inputs).to_tuple(), strict=True):
        assert torch.equal(before, after)


def test_stage_1_of_another_controller_is_taken_and_stage_2_is_not(tmp_path):
    randomize(small_controller(stage2_inputs="budget")).save_pretrained(tmp_path)
    model, inputs = small_controller(), random_inputs()
    before = model(**inputs)
    model.load_stage1(tmp_path)
    after, other = model(**inputs), AutoModel.from_pretrained(tmp_path)(**inputs)
    assert torch.equal(after.tier_logits, other.tier_logits) and not torch.equal(after.tier_logits, before.tier_logits)
    assert torch.equal(after.top_k_logits, before.top_k_logits)


def test_a_stage_1_that_does_not_fit_is_refused(tmp_path):
    two_tiers = KnobSpace({"low": (1, 1), "high": (9, 9)}, SPACE.top_k, SPACE.num_blocks)
    small_controller(stage1_inputs="budget", knob_space=two_tiers.to_dict()).save_pretrained(tmp_path)
    message = r"`stage1_inputs` 'budget' there, 'question_and_budget' here; tiers \['low', 'high'\] there"
    with pytest.raises(ValueError, match=message):
        small_controller().load_stage1(tmp_path)
    torch.save({"weight": torch.zeros(2)}, tmp_path / "best_stage1.pt")
    with pytest.raises(ValueError, match="state dict that the original scripts saved .* cannot be converted"):
        small_controller().load_stage1(tmp_path / "best_stage1.pt")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"latency_budget_min_ms": 50.0}, "must be above 0 and below"),
        ({"latency_budget_min_ms": 0.0}, "must be above 0 and below"),
        (
            {"stage1_inputs": "image"},
            r"`stage1_inputs` is 'image': it must be one of \['question_and_budget', 'budget'\]",
        ),
        ({"stage2_inputs": "image"}, r"`stage2_inputs` is 'image': it must be one of \['image_question_and_budget'"),
        ({"knob_space": {**SPACE.to_dict(), "top_k": []}}, "knob `top_k` has no values"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        small_controller(**kwargs)
