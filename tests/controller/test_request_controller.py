import itertools
import math

import pytest
import torch
from molmo_knobs import molmo_space

from joint_controller import JointControllerConfig, JointControllerModel, Knob, KnobSpace
from joint_controller.controller import BatchController, RequestController
from joint_controller.controller.choosing import likeliest


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


def random_controller(space, stage2_inputs, device):
    torch.manual_seed(0)
    config = JointControllerConfig(
        knob_space=space.to_dict(),
        question_size=12,
        vision_size=20,
        latency_budget_min_ms=10,
        latency_budget_max_ms=100,
        stage2_inputs=stage2_inputs,
    )
    model = JointControllerModel(config)
    # A new controller is uniform: all decisions would be the first.
    for head in (*model.stage1.heads, *model.stage2.heads):
        torch.nn.init.normal_(head.weight)
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


def choose(chooser, question, budget, image, fits=None) -> list[tuple[int, ...]]:
    """Positions of values, in the order of the knobs."""
    space = chooser.controller.knob_space
    choices = torch.cat([chooser.choose_stage1(question, budget, fits), chooser.choose_stage2(image)], dim=1)
    order = [*space.decided_by(1), *space.decided_by(2)]
    return [tuple(row[order.index(knob)] for knob in range(len(order))) for row in choices.tolist()]


def log_probs_by_hand(model, question, budget, image):
    """Of every setting of each request: the sum of the logarithms of its values' probabilities, stage by stage."""
    space = model.knob_space
    rows = []
    for row in range(len(budget)):
        one = slice(row, row + 1)
        of_settings = []
        for indices in itertools.product(*map(range, space.sizes)):
            first = torch.tensor([[indices[knob] for knob in space.decided_by(1)]], device=budget.device)
            logits = [*model.stage1(question[one], budget[one])]
            logits += model.stage2(image[one], question[one], budget[one], first)
            knobs = [*space.decided_by(1), *space.decided_by(2)]
            of_settings.append(
                sum(
                    float(one_knob.double().log_softmax(-1)[0, indices[knob]])
                    for knob, one_knob in zip(knobs, logits, strict=True)
                )
            )
        rows.append(of_settings)
    return torch.tensor(rows)


@ON_EACH_DEVICE
@EACH_SPACE
@pytest.mark.parametrize("stage2_inputs", ["image_question_and_budget", "budget"])
@torch.no_grad()
def test_decisions_one_by_one_are_those_of_the_batch_and_the_argmax_of_each_stage(space, stage2_inputs, device):
    model = random_controller(space, stage2_inputs, device)
    questions, images = make_requests(40, device)
    budgets = torch.linspace(10, 100, 40, device=device)
    request_controller = RequestController(model)
    found = [
        choose(request_controller, question[None], budget.item(), image[None])[0]
        for question, image, budget in zip(questions, images, budgets, strict=True)
    ]
    first = [logits.argmax(-1) for logits in model.stage1(questions, budgets)]
    choice = torch.stack(first, dim=1) if first else torch.empty(40, 0, dtype=torch.long, device=device)
    second = [logits.argmax(-1) for logits in model.stage2(images, questions, budgets, choice)]
    of_knob = dict(zip([*space.decided_by(1), *space.decided_by(2)], [*first, *second], strict=True))
    expected = torch.stack([of_knob[knob] for knob in range(len(space.names))], dim=1)
    assert found == [tuple(row) for row in expected.tolist()]
    assert choose(BatchController(model), questions, budgets, images) == found
    assert len(set(found)) > 1, "all decisions are alike: the test shows nothing"


def random_fits(space, num):
    """Settings to choose from: of some values none, in all at least one."""
    generator = torch.Generator().manual_seed(2)
    fits = torch.rand(num, len(space), generator=generator) < torch.rand(num, 1, generator=generator) / 4
    fits[:, len(space) // 2] |= ~fits.any(dim=1)
    return fits


@ON_EACH_DEVICE
@EACH_SPACE
@torch.no_grad()
def test_only_settings_that_fit_are_chosen(space, device):
    """The likeliest choice of stage 1 that leaves something, then the likeliest of stage 2, found by looking at every one."""
    model = random_controller(space, "image_question_and_budget", device)
    questions, images = make_requests(40, device)
    budgets = torch.full((40,), 30.0, device=device)
    fits = random_fits(space, 40)
    request_controller = RequestController(model)
    free = choose(BatchController(model), questions, budgets, images)
    all_indices = list(itertools.product(*map(range, space.sizes)))
    expected = []
    for row in range(40):
        one = slice(row, row + 1)
        open_settings = [indices for indices, is_open in zip(all_indices, fits[row].tolist(), strict=True) if is_open]
        logits = model.stage1(questions[one], budgets[one])

        def score(indices, stage, logits):
            knobs = space.decided_by(stage)
            return math.fsum(one_knob[0, indices[knob]].item() for knob, one_knob in zip(knobs, logits, strict=True))

        best = max(open_settings, key=lambda indices: score(indices, 1, logits))
        first = [best[knob] for knob in space.decided_by(1)]
        left = [indices for indices in open_settings if [indices[knob] for knob in space.decided_by(1)] == first]
        choice = torch.tensor([first], dtype=torch.long, device=device)
        logits = model.stage2(images[one], questions[one], budgets[one], choice)
        expected.append(max(left, key=lambda indices: score(indices, 2, logits)))
    found = [
        choose(request_controller, questions[row, None], 30.0, images[row, None], fits[row, None])[0]
        for row in range(40)
    ]
    assert found == expected
    assert choose(BatchController(model), questions, budgets, images, fits) == expected
    assert 5 < sum(one != other for one, other in zip(found, free, strict=True)) < 40
    # All settings are open again without a mask.
    assert choose(request_controller, questions[:1], 30.0, images[:1]) == free[:1]


@EACH_SPACE
@torch.no_grad()
def test_sampled_decisions_are_distributed_as_the_softmax_of_both_stages(space):
    model = random_controller(space, "image_question_and_budget", "cpu")
    (question, image), num = make_requests(1, "cpu"), 20_000
    budget = torch.full((1,), 30.0)
    noise = -torch.empty(num, sum(space.sizes)).exponential_(generator=torch.Generator().manual_seed(3)).log()
    chooser = BatchController(model, noise, temperature=1.0)
    taken = choose(chooser, question.expand(num, -1), budget.expand(num), image.expand(num, -1))
    probabilities = log_probs_by_hand(model, question, budget, image)[0].exp()
    assert probabilities.sum() == pytest.approx(1)
    all_indices = list(itertools.product(*map(range, space.sizes)))
    counts = torch.tensor([taken.count(indices) for indices in all_indices])
    torch.testing.assert_close(counts / num, probabilities.float(), atol=0.015, rtol=0)
    with pytest.raises(ValueError, match="sampled decisions come from all settings"):
        chooser.choose_stage1(question, budget, torch.ones(1, len(space), dtype=torch.bool))


def test_without_a_mask_the_choice_is_that_of_the_likeliest_values():
    generator = torch.Generator().manual_seed(0)
    # Logits that differ in their last bit only: their sums must not be rounded to ties.
    logits = 1 + torch.randint(0, 4, (500, 6), generator=generator) * 2.0**-23
    choices = likeliest([logits, 3 * logits.flip(0)], torch.zeros(1, 1, dtype=torch.float64))
    assert choices.tolist() == (6 * logits.argmax(-1) + (3 * logits.flip(0)).argmax(-1)).tolist()
