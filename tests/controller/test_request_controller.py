import pytest
import torch

from joint_controller import JointControllerConfig, JointControllerModel, KnobSpace
from joint_controller.controller import RequestController


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


@pytest.mark.parametrize(
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
