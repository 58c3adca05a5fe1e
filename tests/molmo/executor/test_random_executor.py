"""Executors with random weights: the sizes that were asked for, the same weights each time, and they answer."""

import torch
from PIL import Image

from joint_controller.executor import ExecutorRequest
from joint_controller.molmo import MolmoConfig
from joint_controller.molmo.executor.random_executor import RANDOM_CONFIGS, random_executor, random_processor
from joint_controller.request_path import RequestPath


def test_a_random_executor_answers_and_is_the_same_again(tiny_molmo_config):
    executor = random_executor(tiny_molmo_config, device="cpu", max_new_tokens=3)
    state = torch.get_rng_state()
    again = random_executor(tiny_molmo_config, device="cpu", max_new_tokens=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert again.fingerprint == executor.fingerprint
    assert random_executor(tiny_molmo_config, "cpu", seed=1, max_new_tokens=3).fingerprint != executor.fingerprint
    assert executor.model.dtype == torch.float32
    assert random_executor(tiny_molmo_config, "cpu", torch.bfloat16).model.dtype == torch.bfloat16
    for setting in (executor.knob_space.cheapest, executor.knob_space.full):
        request = ExecutorRequest("one", Image.new("RGB", (90, 50)), "what is word3 ?", "vqa2", setting)
        times = RequestPath(executor).time(request, repeats=1, warmup=0, decode_steps=2)
        assert times.counts["num_views"] > 1
        assert times.counts["text_tokens"] == 1 + 4 + len("User : vqa2 : Assistant :".split())


def test_molmoe_1b_has_its_published_sizes():
    config = RANDOM_CONFIGS["molmoe-1b"]()
    assert isinstance(config, MolmoConfig) and config.text_config.num_experts == 64
    processor = random_processor(config)
    assert processor.tokenizer.convert_tokens_to_ids("<im_start>") == 50304
    inputs = processor(images=Image.new("RGB", (300, 400)), text="what is this ?", tier="high")
    assert inputs["pixel_values"].shape[1:] == (13, 576, 588)
    assert inputs["input_ids"].max() < 50304 + config.additional_vocab_size
