import pytest
import torch
from molmo_knobs import molmo_space
from transformers import AutoConfig, AutoModel

from joint_controller import JointControllerConfig, JointControllerModel, Knob, KnobSpace
from joint_controller.controller import SettingFit, StageTable
from joint_controller.controller.modeling_joint_controller import MASKED_SCORE


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
both_heads = pytest.mark.parametrize("heads", ["joint", "independent"])


def small_controller(**kwargs) -> JointControllerModel:
    values = {"knob_space": SPACE.to_dict(), "question_size": 12, "vision_size": 20}
    return JointControllerModel(JointControllerConfig(**{**values, **kwargs}))


def random_inputs(num_rows: int = 5, space: KnobSpace = SPACE) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "question_features": torch.randn(num_rows, 12, generator=generator),
        "latency_budget_ms": torch.linspace(10, 42, num_rows),
        "vision_features": torch.randn(num_rows, 20, generator=generator),
        "first": torch.arange(num_rows) % StageTable(space).num_choices[0],
    }


def random_fit(num_rows: int = 5, space: KnobSpace = SPACE) -> SettingFit:
    """Of the first row, stage 1 keeps one choice; in all, something is left."""
    generator = torch.Generator().manual_seed(2)
    latency_ms = torch.rand(num_rows, len(space), generator=generator) * 40
    fit = SettingFit.of(latency_ms, torch.linspace(1, 30, num_rows))
    assert 0 < fit.fits.double().mean() < 1
    return fit


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


@both_heads
@both_spaces
def test_a_new_controller_is_uniform_over_all_settings(space, heads):
    outputs = small_controller(knob_space=space.to_dict(), heads=heads)(**random_inputs(space=space))
    for scores, num_choices in zip(outputs.to_tuple(), StageTable(space).num_choices, strict=True):
        assert scores.shape == (5, num_choices)
        torch.testing.assert_close(scores.softmax(-1), torch.full_like(scores, 1 / num_choices))


@both_spaces
def test_a_new_controller_is_uniform_over_what_fits_of_each_stage(space):
    fit = random_fit(space=space)
    model = small_controller(knob_space=space.to_dict(), sees_slack=True)
    outputs = model(**random_inputs(space=space), fits=fit.fits, slack=fit.slack)
    first = random_inputs(space=space)["first"]
    for row, positions in enumerate(model.table.positions[first]):
        of_choice = [fit.fits[row, left].any() for left in model.table.positions]
        expected = [torch.stack(of_choice), fit.fits[row, positions]]
        for scores, left in zip(outputs.to_tuple(), expected, strict=True):
            if left.any():
                torch.testing.assert_close(scores[row].softmax(-1), left / left.sum())


@both_heads
@both_spaces
@pytest.mark.parametrize("sees_slack", [False, True])
def test_forward_equals_the_two_stages_also_for_all_choices_at_once(space, heads, sees_slack):
    kwargs = {"knob_space": space.to_dict(), "heads": heads, "sees_slack": sees_slack}
    model, inputs, fit = randomize(small_controller(**kwargs)), random_inputs(space=space), random_fit(space=space)
    question, budget, vision, first = (
        inputs[name] for name in ("question_features", "latency_budget_ms", "vision_features", "first")
    )
    outputs = model(**inputs, fits=fit.fits, slack=fit.slack)
    torch.testing.assert_close(outputs.stage1_scores, model.score_stage1(question, budget, fit))
    torch.testing.assert_close(outputs.stage2_scores, model.score_stage2(vision, question, budget, first, fit))
    num_first, num_second = model.table.num_choices
    of_choices = torch.randn(5, num_first, 20, generator=torch.Generator().manual_seed(3))
    del inputs["first"]
    inputs["vision_features"] = of_choices
    outputs = model(**inputs, fits=fit.fits, slack=fit.slack)
    torch.testing.assert_close(outputs.stage1_scores, model.score_stage1(question, budget, fit))
    assert outputs.stage2_scores.shape == (5, num_first, num_second)
    for choice in range(num_first):
        taken = torch.full((5,), choice)
        expected = model.score_stage2(of_choices[:, choice], question, budget, taken, fit)
        torch.testing.assert_close(outputs.stage2_scores[:, choice], expected)


@both_spaces
def test_independent_scores_are_sums_of_a_score_for_each_value_and_joint_ones_are_not(space):
    """Found from the scores alone: second differences over the values of two knobs of a stage are all zero."""
    inputs = random_inputs(space=space)
    for heads in ("joint", "independent"):
        model = randomize(small_controller(knob_space=space.to_dict(), heads=heads))
        for scores, sizes in zip(model(**inputs).to_tuple(), model.table.sizes, strict=True):
            if len(sizes) < 2:
                continue
            table = scores.reshape(5, *sizes)
            interaction = table - table[:, :1] - table[:, :, :1] + table[:, :1, :1]
            assert (interaction.abs().max() < 1e-5) == (heads == "independent")


@both_spaces
def test_independent_scores_are_in_the_order_of_the_table(space):
    model, inputs = (
        randomize(small_controller(knob_space=space.to_dict(), heads="independent")),
        random_inputs(space=space),
    )
    outputs = model(**inputs)
    for stage, (scores, module) in enumerate(zip(outputs.to_tuple(), (model.stage1, model.stage2), strict=True)):
        hidden = torch.randn(4, model.config.hidden_size, generator=torch.Generator().manual_seed(4))
        per_knob = [linear(hidden) for linear in module.head.linears]
        assert [one.shape[1] for one in per_knob] == list(model.table.sizes[stage])
        found = module.head(hidden)
        for choice, values in enumerate(model.table.values[stage].tolist()):
            expected = sum(one[:, value] for one, value in zip(per_knob, values, strict=True))
            torch.testing.assert_close(found[:, choice], expected)
        assert scores.shape[1] == len(model.table.values[stage])


@both_spaces
def test_the_slack_of_settings_is_seen_where_it_is_to_be(space):
    """Stage 1 sees that of all settings, stage 2 that of the settings which stage 1 left."""
    inputs, fit = random_inputs(space=space), random_fit(space=space)
    everything = torch.ones_like(fit.fits)
    for sees_slack in (False, True):
        model = randomize(small_controller(knob_space=space.to_dict(), sees_slack=sees_slack))
        before = model(**inputs, fits=everything, slack=fit.slack).to_tuple()
        left = torch.zeros(5, len(space), dtype=torch.bool)
        left.scatter_(1, model.table.positions[inputs["first"]], True)
        for changed, stages in ((left, (True, True)), (~left, (True, False))):
            slack = torch.where(changed, -fit.slack + 0.1, fit.slack)
            after = model(**inputs, fits=everything, slack=slack).to_tuple()
            for old, new, sees in zip(before, after, stages, strict=True):
                assert torch.equal(old, new) != (sees and sees_slack)
    with pytest.raises(ValueError, match="made to see what fits a request: give `fit`"):
        model(**inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_does_not_fit_is_out_also_in_half_precision(dtype):
    model, inputs, fit = randomize(small_controller(sees_slack=True)), random_inputs(), random_fit()
    with torch.autocast("cpu", dtype=dtype):
        outputs = model(**inputs, fits=fit.fits, slack=fit.slack)
    left = fit.fits[:, model.table.positions].any(-1)
    probs = outputs.stage1_scores.float().softmax(-1)
    assert torch.equal(probs == 0, ~left)
    exact = model(**inputs, fits=fit.fits, slack=fit.slack).stage1_scores.softmax(-1)
    torch.testing.assert_close(probs, exact, atol=0.05, rtol=0)


def test_what_does_not_fit_is_out_and_gradients_are_finite():
    model, inputs, fit = randomize(small_controller(sees_slack=True)), random_inputs(), random_fit()
    outputs = model(**inputs, fits=fit.fits, slack=fit.slack)
    left = fit.fits[:, model.table.positions]
    assert torch.equal(outputs.stage1_scores == MASKED_SCORE, ~left.any(-1))
    assert torch.equal(outputs.stage2_scores == MASKED_SCORE, ~left[torch.arange(5), inputs["first"]])
    sum(scores.log_softmax(-1).sum() for scores in outputs.to_tuple()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


INPUTS = ["question_features", "latency_budget_ms", "vision_features"]


@both_spaces
@pytest.mark.parametrize("changed", [*INPUTS, "first"])
def test_each_stage_sees_what_it_should_and_nothing_else(space, changed):
    model, inputs = randomize(small_controller(knob_space=space.to_dict())), random_inputs(space=space)
    before = model(**inputs)
    if changed in INPUTS:
        inputs[changed] = inputs[changed] * 1.3 + 1
    else:
        inputs["first"] = (inputs["first"] + 1) % model.table.num_choices[0]
    after = model(**inputs)
    sees = (changed in ("question_features", "latency_budget_ms"), True)
    for old, new, does in zip(before.to_tuple(), after.to_tuple(), sees, strict=True):
        assert torch.equal(old, new) != does


def test_a_stage_without_knobs_has_no_parameters_and_looks_at_nothing():
    first, second = (KnobSpace([Knob("depth", (4, 8), stage)]) for stage in (1, 2))
    inputs = random_inputs(space=first)
    model = small_controller(knob_space=first.to_dict())
    assert not list(model.stage2.parameters()) and model.sees_question and not model.sees_image
    assert [scores.shape for scores in model(**inputs).to_tuple()] == [(5, 2), (5, 1)]
    del inputs["first"]
    assert [scores.shape for scores in model(**inputs | {"vision_features": None}).to_tuple()] == [(5, 2), (5, 2, 1)]
    inputs = random_inputs(space=second)
    model = small_controller(knob_space=second.to_dict(), stage2_inputs="budget")
    assert not list(model.stage1.parameters()) and not model.sees_question and not model.sees_image
    assert [scores.shape for scores in model(**inputs).to_tuple()] == [(5, 1), (5, 2)]
    with pytest.raises(ValueError, match="give its configuration a `knob_space`"):
        JointControllerModel(JointControllerConfig())


def test_stage_1_from_the_budget_alone_does_not_see_the_question():
    model, inputs = randomize(small_controller(stage1_inputs="budget")), random_inputs()
    question, budget = inputs["question_features"], inputs["latency_budget_ms"]
    assert torch.equal(model.score_stage1(question, budget), model.score_stage1(torch.zeros_like(question), budget))
    assert not torch.equal(model.score_stage1(question, budget), model.score_stage1(question, budget + 1))


@pytest.mark.parametrize("stage2_inputs", ["question_and_budget", "budget"])
def test_stage_2_sees_no_more_than_its_inputs_name(stage2_inputs):
    model, inputs = randomize(small_controller(stage1_inputs="budget", stage2_inputs=stage2_inputs)), random_inputs()
    before = model(**inputs)
    for changed in inputs:
        after = model(**{**inputs, changed: (inputs[changed] + 1) % 2})
        sees = changed in ("latency_budget_ms", "first") or changed.startswith(stage2_inputs.split("_")[0])
        assert torch.equal(before.stage2_scores, after.stage2_scores) != sees


def test_what_no_stage_sees_need_not_be_there():
    model, inputs = small_controller(stage1_inputs="budget", stage2_inputs="budget"), random_inputs()
    inputs["question_features"] = inputs["vision_features"] = torch.empty(5, 0)
    assert model(**inputs).stage2_scores.shape == (5, 8)
    assert model(inputs["latency_budget_ms"]).stage2_scores.shape == (5, 3, 8)
    assert not model.sees_question and not model.sees_image
    assert small_controller(stage2_inputs="budget").sees_question
    assert small_controller(stage1_inputs="budget").sees_image


def test_the_scale_of_the_features_does_not_matter():
    model, inputs = randomize(small_controller()), random_inputs()
    scaled = {**inputs, "question_features": inputs["question_features"] * 100}
    torch.testing.assert_close(model(**inputs).to_tuple(), model(**scaled).to_tuple(), rtol=1e-3, atol=1e-3)


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
    # What checkpoints do not hold is there all the same.
    assert torch.equal(loaded.setting_positions, StageTable(SPACE).positions)
    assert torch.equal(loaded.first_values, StageTable(SPACE).values[0])


def test_stage_1_of_another_controller_is_taken_and_stage_2_is_not(tmp_path):
    randomize(small_controller(stage2_inputs="budget")).save_pretrained(tmp_path)
    model, inputs = small_controller(), random_inputs()
    before = model(**inputs)
    model.load_stage1(tmp_path)
    after, other = model(**inputs), AutoModel.from_pretrained(tmp_path)(**inputs)
    assert torch.equal(after.stage1_scores, other.stage1_scores)
    assert not torch.equal(after.stage1_scores, before.stage1_scores)
    assert torch.equal(after.stage2_scores, before.stage2_scores)


def test_a_stage_1_that_does_not_fit_is_refused(tmp_path):
    two_tiers = SPACE.restrict({"tier": ["low", "high"]})
    small_controller(stage1_inputs="budget", knob_space=two_tiers.to_dict()).save_pretrained(tmp_path)
    message = (
        r"`stage1_inputs` 'budget' there, 'question_and_budget' here; it decides {'tier': \['low', 'high'\]} there"
    )
    with pytest.raises(ValueError, match=message):
        small_controller().load_stage1(tmp_path)
    small_controller(heads="independent", sees_slack=True).save_pretrained(tmp_path / "other")
    message = "`heads` 'independent' there, 'joint' here; `sees_slack` True there, False here"
    with pytest.raises(ValueError, match=message):
        small_controller().load_stage1(tmp_path / "other")
    fewer = SPACE.restrict({"top_k": [1, 2]})
    small_controller(sees_slack=True, knob_space=fewer.to_dict()).save_pretrained(tmp_path / "fewer")
    with pytest.raises(ValueError, match="it sees the slack of 12 settings there, 24 here"):
        small_controller(sees_slack=True).load_stage1(tmp_path / "fewer")
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
        ({"heads": "both"}, r"`heads` is 'both': it must be one of \['joint', 'independent'\]"),
        ({"latency_budget_max_ms": float("inf")}, "must be above 0 and below"),
        ({"knob_space": {"knobs": [{"name": "depth", "values": [], "stage": 1}]}}, "knob `depth` has no values"),
        ({"knob_space": {"tier_crops": {}, "depth": [4]}}, "of an earlier version"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        small_controller(**kwargs)
