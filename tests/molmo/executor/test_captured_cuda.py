"""
The executor's captured mode on a GPU, against the model's modules and the golden data. Run on a machine with a CUDA device
and Triton: `pytest -m gpu`.
"""

import copy
import json
import random

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from joint_controller.executor import ExecutorRequest
from joint_controller.molmo import MolmoForConditionalGeneration
from joint_controller.molmo.executor import MolmoExecutor
from joint_controller.molmo.executor.inference import PlainInference, load_inference
from joint_controller.molmo.knob_space import build_knob_space
from joint_controller.request_path import RequestPath


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

QUESTIONS = ["what color is the star?", "a star?", "is the circle left of the blue star?", "what shape is the red?"]
SPACE = build_knob_space({"low": (1, 1), "medium": (2, 4), "high": (5, 9)}, top_k=(1, 2, 4), num_blocks=(2, 3, 4))


@pytest.fixture(scope="module", autouse=True)
def exact_float32():
    """No tensor-float products: they would hide differences."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = allowed


@pytest.fixture(scope="module")
def model(tiny_molmo):
    return copy.deepcopy(tiny_molmo).cuda().requires_grad_(False)


@pytest.fixture(scope="module")
def captured(model):
    mode, inference = load_inference(model)
    assert mode == "captured"
    return inference


def random_prompts(lengths, num_features=10, seed=0):
    """Prompts of several lengths, padded on the left, in which the first tokens but one carry an image feature."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    is_real = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    tokens = torch.randint(2, 64, (len(lengths), longest), generator=generator)
    places = torch.arange(1, 1 + num_features).repeat(len(lengths), 1) + longest - torch.tensor(lengths)[:, None]
    places[:, -2:] = -100
    prompts = {
        "input_ids": tokens.masked_fill(~is_real, 1),
        "attention_mask": is_real.long(),
        "image_features": torch.randn(len(lengths), 1, num_features, 32, generator=generator),
        "image_input_idx": places[:, None],
    }
    return {name: value.cuda() for name, value in prompts.items()}


def row_of(prompts, row):
    """One prompt of a batch, without padding."""
    padding = int((prompts["attention_mask"][row] == 0).sum())
    places = prompts["image_input_idx"][row : row + 1]
    return {
        "input_ids": prompts["input_ids"][row : row + 1, padding:],
        "attention_mask": prompts["attention_mask"][row : row + 1, padding:],
        "image_features": prompts["image_features"][row : row + 1],
        "image_input_idx": torch.where(places < 0, places, places - padding),
    }


def assert_same(found, expected):
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=2e-5)
    assert torch.equal(found.tokens, expected.tokens)


@torch.inference_mode()
def test_golden_cases(shared_dir):
    folder = shared_dir / "molmo" / "golden" / "model"
    golden = load_file(folder / "cases.safetensors", device="cuda")
    model = MolmoForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).cuda().requires_grad_(False)
    mode, inference = load_inference(model)
    assert mode == "captured"
    for case in json.loads((folder / "cases.json").read_text())["cases"]:
        sample, top_k, blocks = case.split(".")
        ids = golden[f"{sample}.input_ids"]
        features = inference.image_features(golden[f"{sample}.images"].float(), golden[f"{sample}.image_masks"])
        torch.testing.assert_close(features, golden[f"{sample}.image_features"][0], rtol=0, atol=1e-5)
        prompts = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "image_features": features[None],
            "image_input_idx": golden[f"{sample}.image_input_idx"].long(),
        }
        active_blocks = [int(block) for block in blocks.removeprefix("blocks").split("-")]
        # Alone, by graphs, and as two rows of a batch.
        twice = {name: torch.cat([value, value]) for name, value in prompts.items()}
        for one_or_two in (prompts, twice):
            decoding = inference.prefill(one_or_two, int(top_k.removeprefix("topk")), active_blocks)
            for logits in decoding.logits:
                torch.testing.assert_close(logits, golden[f"{case}.logits"][-1], rtol=0, atol=1e-5)
            tokens = [decoding.tokens.tolist()]
            while len(tokens) < 6:
                decoding.step()
                tokens.append(decoding.tokens.tolist())
            for answer in zip(*tokens, strict=True):
                assert list(answer) == golden[f"{case}.greedy"].tolist()


@torch.inference_mode()
@pytest.mark.parametrize("length", [12, 63, 64, 65, 200])
def test_one_request_equals_the_modules_at_every_setting_with_the_same_graphs(model, captured, length):
    prompts = random_prompts([length], seed=length)
    captured.prepare(2, length, 1)
    for count in (2, 3, 4):
        captured.prepare(2, length, count)
    num_graphs = len(captured.graphs)
    for active_blocks in ([0], [3], [0, 2], [1, 2, 3], [0, 1, 3], [0, 1, 2, 3]):
        for top_k in (1, 2, 4):
            found = captured.prefill(prompts, top_k, active_blocks)
            expected = PlainInference(model).prefill(prompts, top_k, active_blocks)
            for _ in range(4):
                assert_same(found, expected)
                found.step()
                expected.step()
            assert_same(found, expected)
    assert len(captured.graphs) == num_graphs


@torch.inference_mode()
@pytest.mark.parametrize("kept", [[0, 1, 2, 3, 4], [4, 0, 3], [2]])
def test_a_batch_of_mixed_settings_equals_the_modules_row_by_row(model, captured, kept):
    prompts = random_prompts([25, 14, 90, 31, 25])
    top_k = [1, 4, 2, 4, 3]
    active_blocks = [[0, 2], [0, 1, 2, 3], [1, 3], [0], [0, 1, 3]]
    found = captured.prefill(prompts, top_k, active_blocks)
    expected = [
        PlainInference(model).prefill(row_of(prompts, row), top_k[row], active_blocks[row]) for row in range(5)
    ]
    for step in range(70):  # longer than what the cache has at first
        logits = torch.cat([one.logits for one in expected])
        torch.testing.assert_close(found.logits, logits, rtol=1e-4, atol=2e-5)
        assert found.tokens.tolist() == [one.tokens.item() for one in expected]
        if step == 2:
            found.keep(kept)
            expected = [expected[row] for row in kept]
        found.step()
        for one in expected:
            one.step()


@torch.inference_mode()
def test_more_experts_and_longer_prompts_than_expected_are_made_room_for(model):
    _, inference = load_inference(model, "captured")
    capacity = inference.capacity
    for length, top_k in ((20, 7), (capacity + 30, 4), (20, 8)):
        prompts = random_prompts([length])
        if length <= 512:  # what the tiny model has positions for does not matter to the rotary embedding
            inference.prefill(prompts, 2, [0, 1])
        found = inference.prefill(prompts, top_k, [0, 3])
        expected = PlainInference(model).prefill(prompts, top_k, [0, 3])
        for _ in range(3):
            assert_same(found, expected)
            found.step()
            expected.step()
    assert inference.capacity > capacity


@torch.inference_mode()
def test_features_equal_those_of_the_modules_alone_and_together(model, captured):
    generator = torch.Generator().manual_seed(0)
    images = [
        (
            torch.randn(1, views, 64, 48, generator=generator),
            torch.randint(0, 3, (1, views, 64), generator=generator) / 2,
        )
        for views in (2, 5, 10, 2)
    ]
    expected = [PlainInference(model).image_features(*image) for image in images]
    for image, features in zip(images, expected, strict=True):
        torch.testing.assert_close(captured.image_features(*image), features, rtol=1e-4, atol=1e-5)
    for found, features in zip(captured.features_of_images(images), expected, strict=True):
        torch.testing.assert_close(found, features, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_graphs_beyond_their_memory_are_dropped_and_captured_again(model):
    _, inference = load_inference(model, "captured")
    for limit in (2**31, -1):  # all are kept; none is
        inference.graphs.limit_bytes = limit
        for length in (30, 100, 30):
            prompts = random_prompts([length], seed=length)
            found = inference.prefill(prompts, 2, [0, 2])
            assert_same(found, PlainInference(model).prefill(prompts, 2, [0, 2]))
            found.step()
            # Of each length one graph a block, one that decodes two blocks, and one that chooses the first token.
            assert len(inference.graphs) == (
                6 if limit < 0 or length == 30 and ("prefill", 128) not in inference.graphs else 10
            )
    inference.graphs.trim()
    assert len(inference.graphs) == 0


@torch.inference_mode()
def test_a_request_ends_the_one_before_it(captured):
    first = captured.prefill(random_prompts([20]), 2, [0])
    captured.prefill(random_prompts([20]), 2, [0])
    with pytest.raises(RuntimeError, match="another request was started"):
        first.step()


@pytest.mark.parametrize("capacity", [128, 768, 1024, 1152, 2688])
def test_prompts_are_padded_to_multiples_of_64_and_long_ones_of_128(capacity):
    from joint_controller.molmo.executor.captured import padded_lengths

    lengths = padded_lengths(capacity)
    assert lengths == sorted(set(lengths)) and lengths[-1] == capacity
    for length in range(1, capacity + 1):
        step = 64 if length <= 1024 else 128
        assert next(padded for padded in lengths if padded >= length) == -(-length // step) * step


def test_the_captured_mode_is_refused_on_a_cpu(tiny_molmo):
    with pytest.raises(ValueError, match="'captured' needs a CUDA device, but the model is on 'cpu'"):
        load_inference(tiny_molmo, "captured")


@pytest.fixture(scope="module")
def requests():
    """Every sample at several settings, shuffled."""
    generator = np.random.default_rng(0)
    sizes = [(48, 48), (40, 90), (90, 40), (64, 48)]
    images = [Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
    requests = [
        ExecutorRequest(f"sample{index}", image, question, "vqa2", setting)
        for index, (image, question) in enumerate(zip(images, QUESTIONS, strict=True))
        for setting in random.Random(index).sample(list(SPACE), 9)
    ]
    random.Random(0).shuffle(requests)
    return requests


@pytest.fixture(scope="module")
def expected_outputs(model, tiny_processor, requests):
    return MolmoExecutor(model, tiny_processor, SPACE, max_new_tokens=6, mode="plain").run(requests)


@pytest.mark.parametrize(("batch_size", "max_batch_tokens"), [(1, 4096), (16, 4096), (5, 300)])
def test_answers_of_the_executor_equal_those_of_the_plain_mode(
    model, tiny_processor, requests, expected_outputs, batch_size, max_batch_tokens
):
    executor = MolmoExecutor(
        model, tiny_processor, SPACE, max_new_tokens=6, batch_size=batch_size, max_batch_tokens=max_batch_tokens
    )
    assert executor.mode == "captured"
    assert len({output.answer for output in expected_outputs}) > 5
    assert executor.run(requests) == expected_outputs
    for request, output in zip(requests[:9], expected_outputs, strict=False):
        assert executor.run([request]) == [output]
        assert RequestPath(executor).time(request, repeats=1, warmup=0).output_tokens == output.output_tokens


def test_memory_does_not_grow_over_requests_at_random_settings(model, tiny_processor, requests):
    executor = MolmoExecutor(model, tiny_processor, SPACE, max_new_tokens=6)
    executor.run(requests)
    for request in requests:
        executor.run([request])
    used = []
    for _ in range(4):
        for request in random.Random(0).choices(requests, k=60):
            executor.run([request])
        torch.cuda.synchronize()
        used.append((torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]))
    assert len(set(used[1:])) == 1, used
