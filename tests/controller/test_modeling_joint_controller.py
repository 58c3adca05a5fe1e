import pytest
import torch
from molmo_knobs import molmo_space
from transformers import AutoConfig, AutoModel

from joint_controller import JointControllerConfig, JointControllerModel, Knob, KnobSpace


SPACE = molmo_space({"low": (1, 1), "medium": (4, 4), "high": (9, 9)}, top_k=(1, 2, 4, 8), num_blocks=(4, 8))
# Two knobs of stage 1 and two of stage 2, in mixed order.
MIXED = KnobSpace(
    [
        Knob("depth", (4, 8), stage=2),
        Knob("resolution", (1, 2, 3), stage=1),
        Knob("threshold", (0.1, 0.2, 0.3, 0.4), stage=2),
        Knob("palette", ("gray", "color"), stage=1),
    ]
)
both_spaces = pytest.mark.parametrize("space", [SPACE, MIXED], ids=["three", "four mixed"])


def small_controller(**kwargs) -> JointControllerModel:
    values = {"knob_space": SPACE.to_dict(), "question_size": 12, "vision_size": 20}
    return JointControllerModel(JointControllerConfig(**{**values, **kwargs}))


def random_inputs(num_rows: int = 5, space: KnobSpace = SPACE) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "question_features": torch.randn(num_rows, 12, generator=generator),
        "latency_budget_ms": torch.linspace(10, 42, num_rows),
        "vision_features": torch.randn(num_rows, 20, generator=generator),
        "actions": torch.stack([torch.arange(num_rows) % size for size in space.sizes], dim=1),
    }


def randomize(model: JointControllerModel) -> JointControllerModel:
    """Weights as after some training: a new controller's heads are zero."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    return model


@pytest.mark.parametrize("size", [192, 2048])
def test_has_less_than_a_million_parameters(size):
    model = small_controller(question_size=size, vision_size=size)
    assert model.num_parameters() < 1_000_000


@both_spaces
def test_a_new_controller_is_uniform_over_all_settings(space):
    outputs = small_controller(knob_space=space.to_dict())(**random_inputs(space=space))
    for logits, size in zip(outputs.logits, space.sizes, strict=True):
        assert logits.shape == (5, size)
        torch.testing.assert_close(logits.softmax(-1), torch.full_like(logits, 1 / size))


@both_spaces
def test_forward_equals_the_two_stages(space):
    model, inputs = randomize(small_controller(knob_space=space.to_dict())), random_inputs(space=space)
    outputs = model(**inputs)
    question, budget = inputs["question_features"], inputs["latency_budget_ms"]
    choice = inputs["actions"][:, space.decided_by(1)]
    stages = {1: model.stage1(question, budget), 2: model.stage2(inputs["vision_features"], question, budget, choice)}
    for stage, logits in stages.items():
        for knob, expected in zip(space.decided_by(stage), logits, strict=True):
            torch.testing.assert_close(outputs.logits[knob], expected)


INPUTS = ["question_features", "latency_budget_ms", "vision_features"]


@both_spaces
@pytest.mark.parametrize("changed", [*INPUTS, "first", "second"])
def test_each_stage_sees_what_it_should_and_nothing_else(space, changed):
    """What stage 2 decided is seen by no stage."""
    model, inputs = randomize(small_controller(knob_space=space.to_dict())), random_inputs(space=space)
    before = model(**inputs)
    if changed in INPUTS:
        inputs[changed] = inputs[changed] * 1.3 + 1
    else:
        for knob in space.decided_by(1 if changed == "first" else 2):
            inputs["actions"][:, knob] = (inputs["actions"][:, knob] + 1) % space.sizes[knob]
    after = model(**inputs)
    sees = {1: changed in ("question_features", "latency_budget_ms"), 2: changed != "second"}
    for knob, (old, new) in enumerate(zip(before.logits, after.logits, strict=True)):
        assert torch.equal(old, new) != sees[space.knobs[knob].stage]


def test_a_stage_without_knobs_has_no_parameters_and_looks_at_nothing():
    first, second = (KnobSpace([Knob("depth", (4, 8), stage)]) for stage in (1, 2))
    inputs = random_inputs(space=first)
    model = small_controller(knob_space=first.to_dict())
    assert not list(model.stage2.parameters()) and model.sees_question and not model.sees_image
    assert [logits.shape for logits in model(**inputs).logits] == [(5, 2)]
    model = small_controller(knob_space=second.to_dict(), stage2_inputs="budget")
    assert not list(model.stage1.parameters()) and not model.sees_question and not model.sees_image
    assert [logits.shape for logits in model(**inputs).logits] == [(5, 2)]
    with pytest.raises(ValueError, match="give its configuration a `knob_space`"):
        JointControllerModel(JointControllerConfig())


def test_stage_1_from_the_budget_alone_does_not_see_the_question():
    model, inputs = randomize(small_controller(stage1_inputs="budget")), random_inputs()
    question, budget = inputs["question_features"], inputs["latency_budget_ms"]
    assert torch.equal(model.stage1(question, budget)[0], model.stage1(torch.zeros_like(question), budget)[0])
    assert not torch.equal(model.stage1(question, budget)[0], model.stage1(question, budget + 1)[0])


@pytest.mark.parametrize("stage2_inputs", ["question_and_budget", "budget"])
def test_stage_2_sees_no_more_than_its_inputs_name(stage2_inputs):
    model, inputs = randomize(small_controller(stage1_inputs="budget", stage2_inputs=stage2_inputs)), random_inputs()
    before = model(**inputs)
    for changed in inputs:
        after = model(**{**inputs, changed: (inputs[changed] + 1) % 2})
        sees = changed in ("latency_budget_ms", "actions") or changed.startswith(stage2_inputs.split("_")[0])
        for old, new in zip(before.logits[1:], after.logits[1:], strict=True):
            assert torch.equal(old, new) != sees


def test_what_no_stage_sees_need_not_be_there():
    model, inputs = small_controller(stage1_inputs="budget", stage2_inputs="budget"), random_inputs()
    inputs["question_features"] = inputs["vision_features"] = torch.empty(5, 0)
    assert model(**inputs).logits[1].shape == (5, 4)
    assert not model.sees_question and not model.sees_image
    assert small_controller(stage2_inputs="budget").sees_question
    assert small_controller(stage1_inputs="budget").sees_image


def test_the_scale_of_the_features_does_not_matter():
    model, inputs = randomize(small_controller()), random_inputs()
    scaled = {**inputs, "question_features": inputs["question_features"] * 100}
    torch.testing.assert_close(model(**inputs).logits, model(**scaled).logits, rtol=1e-3, atol=1e-3)


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
    for before, after in zip(model(**inputs).logits, loaded(**inputs).logits, strict=True):
        assert torch.equal(before, after)


def test_stage_1_of_another_controller_is_taken_and_stage_2_is_not(tmp_path):
    randomize(small_controller(stage2_inputs="budget")).save_pretrained(tmp_path)
    model, inputs = small_controller(), random_inputs()
    before = model(**inputs)
    model.load_stage1(tmp_path)
    after, other = model(**inputs), AutoModel.from_pretrained(tmp_path)(**inputs)
    assert torch.equal(after.logits[0], other.logits[0]) and not torch.equal(after.logits[0], before.logits[0])
    assert torch.equal(after.logits[1], before.logits[1])


def test_a_stage_1_that_does_not_fit_is_refused(tmp_path):
    two_tiers = SPACE.restrict({"tier": ["low", "high"]})
    small_controller(stage1_inputs="budget", knob_space=two_tiers.to_dict()).save_pretrained(tmp_path)
    message = (
        r"`stage1_inputs` 'budget' there, 'question_and_budget' here; it decides {'tier': \['low', 'high'\]} there"
    )
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
        ({"latency_budget_max_ms": float("inf")}, "must be above 0 and below"),
        ({"knob_space": {"knobs": [{"name": "depth", "values": [], "stage": 1}]}}, "knob `depth` has no values"),
        ({"knob_space": {"tier_crops": {}, "depth": [4]}}, "of an earlier version"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        small_controller(**kwargs)
