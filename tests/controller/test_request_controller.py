import pytest
import torch

from joint_controller import JointControllerConfig, JointControllerModel, KnobSpace
from joint_controller.controller import RequestController, likeliest_depth, likeliest_tier


SPACE = KnobSpace({"low": (1, 1), "medium": (2, 4), "high": (5, 9)}, top_k=(1, 2, 4), num_blocks=(2, 3, 4))


def random_controller(stage2_inputs, device):
    torch.manual_seed(0)
    config = JointControllerConfig(
        knob_space=SPACE.to_dict(),
        question_size=12,
        vision_size=20,
        latency_budget_min_ms=10,
        latency_budget_max_ms=100,
        stage2_inputs=stage2_inputs,
    )
    model = JointControllerModel(config)
    # A new controller is uniform: all decisions would be the first.
    for head in (model.stage1.tier_head, model.stage2.top_k_head, model.stage2.num_blocks_head):
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


@ON_EACH_DEVICE
@pytest.mark.parametrize("stage2_inputs", ["image_question_and_budget", "budget"])
def test_decisions_one_by_one_are_the_argmax_of_the_batch(stage2_inputs, device):
    model = random_controller(stage2_inputs, device)
    questions, images = torch.randn(40, 12, device=device), torch.randn(40, 20, device=device)
    budgets = torch.linspace(10, 100, 40, device=device)
    request_controller = RequestController(model)
    found = []
    for question, image, budget in zip(questions, images, budgets, strict=True):
        tier_index = request_controller.choose_tier(question[None], budget.item())
        found.append((tier_index, *request_controller.choose_depth(image[None])))
    with torch.no_grad():
        tier_index = model.stage1(questions, budgets).argmax(-1)
        depth = model.stage2(images, questions, budgets, tier_index)
    expected = torch.stack([tier_index, *(logits.argmax(-1) for logits in depth)], dim=1)
    assert found == [tuple(row) for row in expected.tolist()]
    assert len(set(found)) > 2, "all decisions are alike: the test shows nothing"


def random_masks(num):
    """Settings to choose from: of some tiers none, in all at least one."""
    generator = torch.Generator().manual_seed(2)
    masks = torch.rand(num, *SPACE.sizes, generator=generator) < torch.rand(num, 3, 1, 1, generator=generator) / 2
    masks[:, 1, 2, 0] |= ~masks.flatten(1).any(dim=1)
    return masks


@ON_EACH_DEVICE
def test_only_settings_that_fit_are_chosen(device):
    """The likeliest of all settings that fit, found by looking at every one of them."""
    model = random_controller("image_question_and_budget", device)
    questions, images = torch.randn(40, 12, device=device), torch.randn(40, 20, device=device)
    masks = random_masks(40)
    request_controller = RequestController(model)
    changed = 0
    for question, image, fits in zip(questions[:, None], images[:, None], masks, strict=True):
        with torch.no_grad():
            budget = torch.full((1,), 30.0, device=device)
            tier_logits = model.stage1(question, budget)
            open_tiers = [tier for tier in range(3) if fits[tier].any()]
            tier_index = max(open_tiers, key=lambda tier: tier_logits[0, tier].item())
            depth = model.stage2(image, question, budget, torch.tensor([tier_index], device=device))
            top_k, num_blocks = (logits.log_softmax(-1)[0].double().tolist() for logits in depth)
        pairs = fits[tier_index].nonzero().tolist()
        best = max(pairs, key=lambda pair: top_k[pair[0]] + num_blocks[pair[1]])
        assert request_controller.choose_tier(question, 30.0, fits) == tier_index
        assert request_controller.choose_depth(image) == tuple(best)
        # The same decisions for a batch, and all settings are open again without a mask.
        assert likeliest_tier(tier_logits, fits[None].to(device)).tolist() == [tier_index]
        assert likeliest_depth(*depth, fits[tier_index][None].to(device)).tolist() == [best]
        free = request_controller.choose_tier(question, 30.0), *request_controller.choose_depth(image)
        assert free[0] == tier_logits.argmax()
        changed += free != (tier_index, *best)
    assert 5 < changed < 40


def test_without_a_mask_the_pair_is_that_of_the_likeliest_values():
    generator = torch.Generator().manual_seed(0)
    # Logits that differ in their last bit only: their sums must not be rounded to ties.
    logits = 1 + torch.randint(0, 4, (500, 6), generator=generator) * 2.0**-23
    pairs = likeliest_depth(logits, 3 * logits.flip(0))
    assert torch.equal(pairs, torch.stack([logits.argmax(-1), (3 * logits.flip(0)).argmax(-1)], dim=1))
