"""What stages cost: FLOPs against those that torch counts, terms against what they stand for."""

import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from joint_controller.executor import DECODE
from joint_controller.knobs import KnobSetting
from joint_controller.molmo.costs import MolmoCostModel, pad_lengths, share_of_experts_touched
from joint_controller.molmo.shape import molmo_shape


@pytest.mark.parametrize(("tier", "top_k", "num_blocks"), [("low", 1, 2), ("medium", 4, 4), ("high", 3, 3)])
def test_flops_are_those_that_torch_counts(tiny_molmo, tiny_processor, tier, top_k, num_blocks):
    inputs = tiny_processor(images=Image.new("RGB", (90, 60)), text="what color is the star?", tier=tier)
    output_tokens = 3
    # Attention as matrix products, which are what is counted.
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        tiny_molmo.generate(
            **inputs,
            active_blocks=list(range(num_blocks)),
            top_k=top_k,
            min_new_tokens=output_tokens,
            max_new_tokens=output_tokens,
            do_sample=False,
        )
    expected = counter.get_total_flops()
    num_tokens = inputs["input_ids"].shape[1]
    counts = {"num_views": inputs["pixel_values"].shape[1], "vision_tokens": num_tokens - 7, "text_tokens": 7}
    setting = KnobSetting(tier=tier, top_k=top_k, num_blocks=num_blocks)
    found = MolmoCostModel(molmo_shape(tiny_molmo.config), None).request_flops(setting, counts, output_tokens)
    assert found == pytest.approx(expected, rel=0.02)
    assert MolmoCostModel(None, None).request_flops(setting, counts, output_tokens) is None


def test_share_of_experts_touched_is_that_of_random_routing():
    generator = torch.Generator().manual_seed(0)
    for num_tokens, top_k, num_experts in ((1, 4, 64), (7, 2, 16), (40, 8, 64), (3, 16, 16), (5, 1, 1)):
        chosen = torch.rand(4000, num_tokens, num_experts, generator=generator).topk(top_k, dim=-1).indices
        touched = torch.zeros(4000, num_experts).scatter_(1, chosen.flatten(1), 1.0).mean()
        share = share_of_experts_touched(torch.tensor(float(num_tokens)), torch.tensor(float(top_k)), num_experts)
        assert share.item() == pytest.approx(touched.item(), abs=0.005)


def test_lengths_are_padded_to_the_next_step():
    lengths = torch.tensor([1.0, 64, 65, 128, 129, 500])
    assert pad_lengths(lengths, [64, 128]).tolist() == [64, 64, 128, 128, 129, 500]
    assert pad_lengths(lengths, None) is lengths


def test_every_stage_has_a_value_for_each_of_its_names(tiny_molmo):
    names = ("image_pixels", "num_views", "vision_tokens", "text_tokens", "top_k", "num_blocks", "output_tokens")
    columns = {name: torch.tensor([float(number)]) for number, name in enumerate(names, start=1)}
    cost_model = MolmoCostModel(molmo_shape(tiny_molmo.config), [8, 16])
    assert list(cost_model.stages) == ["image_processing", "vision", "llm_prefill", DECODE]
    assert [stage for stage, cost in cost_model.stages.items() if cost.scope == "request"] == ["image_processing"]
    assert torch.stack(cost_model.terms("image_processing", columns).features).flatten().tolist() == [1, 1, 2]
    for stage, cost in cost_model.stages.items():
        terms = cost_model.terms(stage, columns)
        assert (len(terms.features), len(terms.inputs)) == (len(cost.features), len(cost.inputs))
    # Seven tokens, padded to eight, at 5 experts and 6 blocks; a decode step at 7 + 7 / 2 tokens.
    prefill, decode = (cost_model.terms(stage, columns) for stage in ("llm_prefill", DECODE))
    assert torch.stack(prefill.inputs).flatten().tolist() == [8, 5, 6, 40]
    assert torch.stack([*prefill.features[:2], *prefill.features[3:]]).flatten().tolist() == [1, 6, 48, 240, 384]
    assert prefill.features[2].item() == pytest.approx(6 * (1 - (1 - 5 / 8) ** 8))
    assert torch.stack(decode.features).flatten().tolist() == [1, 6, 30, 63]
    # Of unknown sizes: every prompt touches all weights.
    assert MolmoCostModel(None, None).terms("llm_prefill", columns).features[2].item() == 6
