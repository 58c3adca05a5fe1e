import itertools

import pytest
import torch
from molmo_knobs import molmo_space

from joint_controller import JointControllerConfig, JointControllerModel, Knob, KnobSpace
from joint_controller.controller import BatchController, RequestController, SettingFit
from joint_controller.decisions import decide, decide_one
from joint_controller.executor import ExecutorRequest


THREE = molmo_space({"low": (1, 1), "medium": (2, 4), "high": (5, 9)}, top_k=(1, 2, 4), num_blocks=(2, 3, 4))
# Two knobs of stage 1 and two of stage 2, in mixed order.
FOUR = KnobSpace(
    [
        Knob("depth", (4, 8), stage=2),
        Knob("resolution", (1, 2, 3), stage=1),
        Knob("threshold", (0.1, 0.2, 0.3), stage=2),
        Knob("palette", ("gray", "color"), stage=1),
    ]
)
ONLY_FIRST = KnobSpace([Knob("resolution", (1, 2, 3), stage=1), Knob("palette", ("gray", "color"), stage=1)])
ONLY_SECOND = KnobSpace([Knob("depth", (4, 8, 12), stage=2)])
EACH_SPACE = pytest.mark.parametrize(
    "space", [THREE, FOUR, ONLY_FIRST, ONLY_SECOND], ids=["three", "four mixed", "only first", "only second"]
)


EACH_HEAD = pytest.mark.parametrize("heads", ["joint", "independent"])


def random_controller(space, device, **kwargs):
    torch.manual_seed(0)
    values = {"question_size": 12, "vision_size": 20, "latency_budget_min_ms": 10, "latency_budget_max_ms": 100}
    model = JointControllerModel(JointControllerConfig(knob_space=space.to_dict(), **{**values, **kwargs}))
    # A new controller is uniform: all decisions would be the first.
    for stage in (model.stage1, model.stage2):
        for linear in stage.head.linears if hasattr(stage, "head") else ():
            torch.nn.init.normal_(linear.weight)
    return model.to(device).eval()


ON_EACH_DEVICE = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="captures need a CUDA device"),
            ],
        ),
    ],
)


def make_requests(num, device):
    generator = torch.Generator().manual_seed(1)
    sizes = (12, 20)
    return [torch.randn(num, size, generator=generator).to(device) for size in sizes]


def choose(chooser, question, budget, image, fit=None) -> list[int]:
    """Positions of settings."""
    first, second = chooser.choose_stage1(question, budget, fit), chooser.choose_stage2(image)
    if isinstance(chooser, RequestController):
        return [chooser.controller.knob_space.index(chooser.setting(first, second))]
    return chooser.controller.table.positions[first.cpu(), second.cpu()].tolist()


def choose_one_by_one(request_controller, questions, budgets, images, fit=None) -> list[int]:
    found = []
    for row, budget in enumerate(budgets.tolist()):
        one = slice(row, row + 1)
        of_row = None if fit is None else SettingFit(fit.fits[one], fit.slack[one], fit.fits_budget[one])
        if row % 2 and of_row is not None:
            of_row = of_row.of_one()  # either form will do
        found += choose(request_controller, questions[one], budget, images[one], of_row)
    return found


def stage_scores(model, question, budget, image, fit=None):
    """
    Of each setting of one request, its score in stage 1, and in stage 2 where stage 1 chose as it does: from the modules
    alone, setting by setting.
    """
    space, scores = model.knob_space, {}
    knobs = [space.decided_by(stage) for stage in (1, 2)]
    for position, indices in enumerate(itertools.product(*map(range, space.sizes))):
        values = [[indices[knob] for knob in of_stage] for of_stage in knobs]
        columns = [
            ravel(one, [space.sizes[knob] for knob in of_stage]) for one, of_stage in zip(values, knobs, strict=True)
        ]
        slack, slack_left = None, None
        if fit is not None and model.config.sees_slack:
            slack = fit.slack
            left = [
                other
                for second in itertools.product(*(range(space.sizes[knob]) for knob in knobs[1]))
                for other, candidate in enumerate(itertools.product(*map(range, space.sizes)))
                if [candidate[knob] for knob in knobs[0]] == values[0]
                and [candidate[knob] for knob in knobs[1]] == list(second)
            ]
            slack_left = fit.slack[:, left]
        first = second = 0.0
        if knobs[0]:
            first = model.stage1(question, budget, slack)[0, columns[0]].item()
        if knobs[1]:
            taken = torch.tensor([values[0]], dtype=torch.long, device=budget.device).reshape(1, len(knobs[0]))
            second = model.stage2(image, question, budget, taken, slack_left)[0, columns[1]].item()
        scores[position] = (tuple(values[0]), first, second)
    return scores


def ravel(indices, sizes):
    column = 0
    for index, size in zip(indices, sizes, strict=True):
        column = column * size + index
    return column


def best_by_hand(scores, left) -> int:
    """The setting with the best choice of stage 1 that leaves something, and the best of stage 2 among what it left."""
    first = max((scores[position][1], scores[position][0]) for position in left)[1]
    of_first = [position for position in left if scores[position][0] == first]
    return max(of_first, key=lambda position: scores[position][2])


def random_fit(space, num):
    """Latencies of which some requests' all exceed the budget, and some choices of stage 1 leave nothing."""
    generator = torch.Generator().manual_seed(2)
    latency_ms = 10 + 90 * torch.rand(num, len(space), generator=generator)
    return SettingFit.of(latency_ms, torch.linspace(5, 60, num))


@ON_EACH_DEVICE
@EACH_SPACE
@pytest.mark.parametrize(
    "inputs",
    [("question_and_budget", "image_question_and_budget"), ("question_and_budget", "budget"), ("budget", "budget")],
    ids=str,
)
@EACH_HEAD
@torch.no_grad()
def test_decisions_are_the_argmax_of_each_stage_found_by_looking_at_every_setting(space, inputs, heads, device):
    model = random_controller(space, device, stage1_inputs=inputs[0], stage2_inputs=inputs[1], heads=heads)
    questions, images = make_requests(20, device)
    budgets = torch.linspace(10, 100, 20, device=device)
    expected = []
    for row in range(20):
        one = slice(row, row + 1)
        scores = stage_scores(model, questions[one], budgets[one], images[one])
        expected.append(best_by_hand(scores, range(len(space))))
    assert choose(BatchController(model), questions, budgets, images) == expected
    assert choose_one_by_one(RequestController(model), questions, budgets, images) == expected
    assert len(set(expected)) > 1, "all decisions are alike: the test shows nothing"


@ON_EACH_DEVICE
@EACH_SPACE
@EACH_HEAD
@pytest.mark.parametrize("sees_slack", [False, True])
@torch.no_grad()
def test_only_settings_that_fit_are_chosen(space, heads, sees_slack, device):
    """The best choice of stage 1 that leaves something, then the best of stage 2, found by looking at every setting."""
    model = random_controller(space, device, heads=heads, sees_slack=sees_slack)
    questions, images = make_requests(20, device)
    budgets = torch.full((20,), 30.0, device=device)
    fit = random_fit(space, 20)
    expected = []
    for row in range(20):
        one = slice(row, row + 1)
        of_row = SettingFit(fit.fits[one], fit.slack[one], fit.fits_budget[one]).to(device)
        scores = stage_scores(model, questions[one], budgets[one], images[one], of_row)
        expected.append(best_by_hand(scores, fit.fits[row].nonzero().flatten().tolist()))
    request_controller = RequestController(model)
    assert choose(BatchController(model), questions, budgets, images, fit) == expected
    assert choose_one_by_one(request_controller, questions, budgets, images, fit) == expected
    assert 0 < (~fit.fits_budget).sum() < 20
    for position, fits_budget in zip(expected, fit.fits_budget.tolist(), strict=True):
        assert fits_budget or position == 0
    if not sees_slack:
        # All settings are open again without a mask.
        free = choose(BatchController(model), questions, budgets, images)
        assert choose(request_controller, questions[:1], 30.0, images[:1]) == free[:1]
        assert 3 < sum(one != other for one, other in zip(expected, free, strict=True))


@EACH_SPACE
@torch.no_grad()
def test_a_controller_that_sees_slack_decides_by_it_and_needs_it(space):
    model = random_controller(space, "cpu", sees_slack=True)
    questions, images = make_requests(20, "cpu")
    budgets, request_controller = torch.full((20,), 30.0), RequestController(model)
    everything = torch.ones(20, len(space), dtype=torch.bool)
    found = []
    for seed in range(2):
        slack = 2 * torch.rand(20, len(space), generator=torch.Generator().manual_seed(seed)) - 1
        fit = SettingFit(everything, slack, everything[:, 0])
        found.append(choose(BatchController(model), questions, budgets, images, fit))
        assert choose_one_by_one(request_controller, questions, budgets, images, fit) == found[-1]
    assert found[0] != found[1]
    for chooser, budget in ((BatchController(model), budgets[:1]), (request_controller, 30.0)):
        with pytest.raises(ValueError, match="made to see what fits a request: give `fit`"):
            chooser.choose_stage1(questions[:1], budget)


@EACH_SPACE
@EACH_HEAD
@pytest.mark.parametrize("is_masked", [False, True], ids=["all", "what fits"])
@torch.no_grad()
def test_sampled_decisions_are_distributed_as_the_softmax_of_both_stages(space, heads, is_masked):
    model = random_controller(space, "cpu", heads=heads)
    (question, image), num, temperature = make_requests(1, "cpu"), 20_000, 0.7
    budget = torch.full((1,), 30.0)
    fits = torch.ones(1, len(space), dtype=torch.bool)
    if is_masked:  # among others the whole first half, which is all of some choices
        fits[:, : len(space) // 2] = fits[:, -1] = False
        assert fits.any()
    scores = stage_scores(model, question, budget, image)
    left = fits[0].nonzero().flatten().tolist()
    # Of stage 1 each choice counts once, however many settings it leaves.
    firsts = {scores[position][0]: scores[position][1] for position in left}
    log_first = torch.tensor(list(firsts.values()), dtype=torch.float64).div(temperature).log_softmax(-1)
    probabilities = torch.zeros(len(space), dtype=torch.float64)
    for number, first in enumerate(firsts):
        of_first = [position for position in left if scores[position][0] == first]
        second = torch.tensor([scores[position][2] for position in of_first], dtype=torch.float64)
        probabilities[of_first] = (log_first[number] + (second / temperature).log_softmax(-1)).exp()
    assert probabilities.sum().item() == pytest.approx(1)
    generator = torch.Generator().manual_seed(3)
    noise = -torch.empty(num, sum(model.table.num_choices)).exponential_(generator=generator).log()
    fit = SettingFit(fits, torch.zeros(1, len(space)), fits[:, 0]) if is_masked else None
    many = None if fit is None else SettingFit(fits.expand(num, -1), fit.slack.expand(num, -1), fit.fits_budget)
    chooser = BatchController(model, noise, temperature)
    taken = choose(chooser, question.expand(num, -1), budget.expand(num), image.expand(num, -1), many)
    shares = torch.tensor(taken).bincount(minlength=len(space)) / num
    torch.testing.assert_close(shares, probabilities.float(), atol=0.015, rtol=0)
    assert fits[0, taken].all()


@torch.no_grad()
def test_independent_heads_decide_knob_by_knob_where_all_is_open():
    model = random_controller(FOUR, "cpu", heads="independent")
    questions, images = make_requests(20, "cpu")
    budgets = torch.linspace(10, 100, 20)
    found = choose(BatchController(model), questions, budgets, images)
    # The best value of each knob on its own, by the maximum over the values of the other.
    stage1 = model.score_stage1(questions, budgets).reshape(20, 3, 2)  # resolution, palette
    best = stage1.amax(2).argmax(1), stage1.amax(1).argmax(1)
    for row, position in enumerate(found):
        indices = FOUR.indices(FOUR.settings[position])
        assert (indices[1], indices[3]) == (best[0][row].item(), best[1][row].item())


@EACH_SPACE
def test_decide_gives_the_settings_of_what_both_stages_chose_and_what_they_saw(space):
    model = random_controller(space, "cpu", sees_slack=True)
    questions, images = make_requests(6, "cpu")
    asked = []

    class Source:
        def question_features(self, texts):
            return torch.stack([questions[int(text)] for text in texts])

        def vision_features(self, requests):
            asked.extend(request.setting for request in requests)
            return torch.stack([images[int(request.question)] for request in requests])

    requests = [ExecutorRequest(str(row), None, str(row), "vqa2", space.full) for row in range(6)]
    budgets, fit = torch.full((6,), 30.0), random_fit(space, 6)
    decisions = decide(BatchController(model), Source(), requests, budgets, fit)
    assert decisions.positions == choose(BatchController(model), questions, budgets, images, fit)
    assert decisions.settings == [space.settings[position] for position in decisions.positions]
    assert model.table.positions[decisions.first, decisions.second].tolist() == decisions.positions
    knobs = {stage: [space.names[knob] for knob in space.decided_by(stage)] for stage in (1, 2)}
    # Images are encoded as stage 1 decided; knobs of stage 2 are as cheap as can be.
    for seen, setting in zip(asked, decisions.settings, strict=model.sees_image):
        assert all(seen[name] == setting[name] for name in knobs[1])
        assert all(seen[name] == space.cheapest[name] for name in knobs[2])
    expected = images if model.sees_image else torch.empty(6, 0)
    assert torch.equal(decisions.vision_features, expected) and torch.equal(decisions.question_features, questions)
    one_by_one = RequestController(model)
    for row, request in enumerate(requests):
        one = SettingFit(fit.fits[row : row + 1], fit.slack[row : row + 1], fit.fits_budget[row : row + 1]).of_one()
        asked.clear()
        setting = decide_one(one_by_one, Source(), request, 30.0, one)
        assert setting == decisions.settings[row] and len(asked) == model.sees_image
        for seen in asked:
            assert all(seen[name] == setting[name] for name in knobs[1])
            assert all(seen[name] == space.cheapest[name] for name in knobs[2])


@torch.no_grad()
def test_features_of_any_scale_are_normalised_as_in_the_modules():
    """Question features are small, vision features large and far from zero: stages look at neither scale nor mean."""
    model = random_controller(THREE, "cpu", sees_slack=True)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            torch.nn.init.normal_(module.weight)
            torch.nn.init.normal_(module.bias)
    questions, images = make_requests(100, "cpu")
    questions, images = 1e-2 * questions, 50 * images + 200
    budgets, fit = torch.linspace(5, 150, 100), random_fit(THREE, 100)
    expected = choose(BatchController(model), questions, budgets, images, fit)
    assert choose_one_by_one(RequestController(model), questions, budgets, images, fit) == expected
    assert len(set(expected)) > 5
