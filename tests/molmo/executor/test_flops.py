"""FLOPs from sizes against those that torch counts while a model runs."""

import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from joint_controller.latency import executor_shape
from joint_controller.molmo.executor.flops import request_flops


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
    sizes = inputs["pixel_values"].shape[1], inputs["input_ids"].shape[1]
    found = request_flops(executor_shape(tiny_molmo.config), *sizes, output_tokens, top_k, num_blocks)
    assert found == pytest.approx(expected, rel=0.02)
