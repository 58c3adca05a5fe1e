"""The executor's way to compute a Molmo on a CPU, against the model's modules and the golden data."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from joint_controller.molmo import MolmoForConditionalGeneration
from joint_controller.molmo.executor import cpu_inference
from joint_controller.molmo.executor.cpu_inference import MIN_PACKED_MACS, CpuInference, PackedLinear
from joint_controller.molmo.executor.inference import PlainInference, load_inference


def random_prompts(model, lengths, num_features=10, seed=0):
    """Prompts of several lengths, padded on the left, in which the first tokens but one carry an image feature."""
    generator = torch.Generator().manual_seed(seed)
    text = model.config.text_config
    longest = max(lengths)
    is_real = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    tokens = torch.randint(2, text.vocab_size, (len(lengths), longest), generator=generator)
    places = torch.arange(1, 1 + num_features).repeat(len(lengths), 1) + longest - torch.tensor(lengths)[:, None]
    places[:, -2:] = -100
    return {
        "input_ids": tokens.masked_fill(~is_real, text.pad_token_id),
        "attention_mask": is_real.long(),
        "image_features": torch.randn(len(lengths), 1, num_features, text.hidden_size, generator=generator),
        "image_input_idx": places[:, None],
    }


def assert_equal_decoding(model, prompts, top_k, active_blocks, num_steps=6, keep_after=2, kept=None):
    found = CpuInference(model).prefill(prompts, top_k, active_blocks)
    with torch.inference_mode():
        expected = PlainInference(model).prefill(prompts, top_k, active_blocks)
        for step in range(num_steps):
            torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
            assert torch.equal(found.tokens, expected.tokens)
            if kept is not None and step == keep_after:
                found.keep(kept)
                expected.keep(kept)
            found.step()
            expected.step()


@pytest.mark.parametrize("top_k", [1, 3, 8])
@pytest.mark.parametrize("active_blocks", [[0], [0, 2], [0, 1, 2, 3]])
def test_decoding_of_one_prompt_equals_that_of_the_modules(tiny_molmo, top_k, active_blocks):
    assert_equal_decoding(tiny_molmo, random_prompts(tiny_molmo, [25]), top_k, active_blocks, num_steps=30)


@pytest.mark.parametrize("kept", [None, [0, 2], [2, 0, 1], [1]])
def test_decoding_of_a_batch_equals_that_of_the_modules(tiny_molmo, kept):
    assert_equal_decoding(tiny_molmo, random_prompts(tiny_molmo, [25, 14, 31]), 4, [0, 1, 3], kept=kept)


@pytest.mark.parametrize("kept", [[0, 1, 2, 3], [3, 0], [2, 1], [1]])
def test_rows_of_a_batch_may_have_settings_of_their_own(tiny_molmo, kept):
    lengths, top_k, active_blocks = [25, 14, 31, 14], [4, 1, 2, 8], [[0, 1, 2, 3], [0, 2], [0, 1, 3], [1]]
    assert_decodes_as_alone(tiny_molmo, random_prompts(tiny_molmo, lengths), lengths, top_k, active_blocks, kept)


def assert_decodes_as_alone(model, prompts, lengths, top_k, active_blocks, kept):
    mixed = CpuInference(model).prefill(prompts, top_k, active_blocks)
    longest = max(lengths)
    with torch.inference_mode():
        alone = [
            PlainInference(model).prefill(
                {
                    # The features' places count from the end of the padding.
                    "image_input_idx": torch.where(
                        prompts["image_input_idx"][[row]] < 0,
                        -100,
                        prompts["image_input_idx"][[row]] - longest + length,
                    ),
                    "image_features": prompts["image_features"][[row]],
                    **{name: prompts[name][[row], longest - length :] for name in ("input_ids", "attention_mask")},
                },
                top_k[row],
                active_blocks[row],
            )
            for row, length in enumerate(lengths)
        ]
        for step in range(24):
            expected = torch.cat([decoding.logits for decoding in alone])
            torch.testing.assert_close(mixed.logits, expected, rtol=1e-4, atol=1e-5)
            if step == 3:
                mixed.keep(kept)
                alone = [alone[row] for row in kept]
            mixed.step()
            for decoding in alone:
                decoding.step()


@pytest.mark.parametrize("length", [10, 1025, 3000])
def test_positions_are_turned_as_the_modules_turn_them_however_long_a_prompt_is(tiny_molmo, length):
    inference = CpuInference(tiny_molmo)
    cos, sin = tiny_molmo.model.language_model.rotary_emb(torch.zeros(1), torch.arange(length)[None])
    half = cos.shape[-1] // 2
    torch.testing.assert_close(inference.rotations(length)[:length], torch.complex(cos[0, :, :half], sin[0, :, :half]))


def test_the_last_block_of_a_prompt_computes_its_last_token_only(tiny_molmo, monkeypatch):
    inference, rows = CpuInference(tiny_molmo), []
    for block in inference.blocks:
        finish = block.finish
        monkeypatch.setattr(
            block, "finish", lambda hidden, *args, f=finish: rows.append(len(hidden)) or f(hidden, *args)
        )
    inference.prefill(random_prompts(tiny_molmo, [25, 14]), 2, [[0, 1, 3], [0, 1]])
    # 39 tokens, rounded; the first prompt's and a last token; a last token
    assert rows == [40, 32, 1]


def test_a_block_of_short_prompts_decodes_beside_long_ones(tiny_molmo):
    # The last block runs for the short prompt alone, so that its cache starts with much less room than the others'.
    prompts = random_prompts(tiny_molmo, [13, 90])
    assert_decodes_as_alone(tiny_molmo, prompts, [13, 90], [2, 2], [[0, 3], [0]], kept=[0, 1])


def test_memory_of_ended_answers_is_used_again_whatever_it_holds(tiny_molmo):
    inference, prompts = CpuInference(tiny_molmo), random_prompts(tiny_molmo, [25, 14])
    inference.prefill(prompts, 2, [0, 1])  # ends at once
    spare = [inference.spare_memory.take(1) for _ in range(2)]
    places = {memory.data_ptr() for memory in spare}
    while spare:
        with torch.inference_mode():
            inference.spare_memory.give_back(spare.pop().fill_(math.nan))
    found = inference.prefill(prompts, 2, [0, 1])
    with torch.inference_mode():
        expected = PlainInference(tiny_molmo).prefill(prompts, 2, [0, 1])
        for _ in range(4):
            torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
            found.step()
            expected.step()
    del found
    assert {inference.spare_memory.take(1).data_ptr() for _ in range(2)} == places


def test_answers_that_are_decoded_at_the_same_time_share_no_memory(tiny_molmo):
    inference = CpuInference(tiny_molmo)
    prompts = [
        random_prompts(tiny_molmo, lengths, seed=seed) for seed, lengths in enumerate([[25, 14], [31], [19, 8]])
    ]
    inference.prefill(prompts[0], 2, [0, 1])  # leaves memory behind
    together = [inference.prefill(one, 2, [0, 1]) for one in prompts]
    with torch.inference_mode():
        expected = [PlainInference(tiny_molmo).prefill(one, 2, [0, 1]) for one in prompts]
        for _ in range(4):
            for one, its_expected in zip(together, expected, strict=True):
                one.step()
                its_expected.step()
                torch.testing.assert_close(one.logits, its_expected.logits, rtol=1e-4, atol=1e-5)


def test_no_more_spare_memory_is_kept_than_its_limit(tiny_molmo, monkeypatch):
    spare = CpuInference(tiny_molmo).spare_memory
    monkeypatch.setattr(cpu_inference, "SPARE_BYTES", 4 * 250)
    kept, too_much = torch.empty(200), torch.empty(100)
    spare.give_back(kept)
    spare.give_back(too_much)
    assert spare.take(100).data_ptr() == kept.data_ptr()
    assert spare.take(100).data_ptr() not in (kept.data_ptr(), too_much.data_ptr())
    spare.give_back(kept)
    assert len(spare.take(201)) == 201  # not what is too small


@pytest.mark.parametrize(
    "changes",
    [
        {"norm_topk_prob": True},
        {"clip_qkv": 0.05},
        {"num_key_value_heads": 2},
        {"attention_bias": True},
        {"hidden_act": "gelu"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_variants_of_the_language_model_equal_their_modules(tiny_molmo_config, changes):
    config = tiny_molmo_config.__class__.from_dict(tiny_molmo_config.to_dict())
    for name, value in changes.items():
        setattr(config.text_config, name, value)
    torch.manual_seed(1)
    model = MolmoForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            parameter.data += 0.1 * torch.randn_like(parameter)
    assert_equal_decoding(model, random_prompts(model, [25, 17]), 4, [0, 1, 2, 3])


@pytest.mark.parametrize("num_views", [1, 4])
def test_image_features_equal_those_of_the_modules(tiny_molmo, num_views):
    generator = torch.Generator().manual_seed(num_views)
    views = torch.randn(1, num_views, 64, 48, generator=generator)
    masks = torch.randint(0, 3, (1, num_views, 64), generator=generator) / 2
    with torch.inference_mode():
        expected = PlainInference(tiny_molmo).image_features(views, masks)
    torch.testing.assert_close(CpuInference(tiny_molmo).image_features(views, masks), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["plain", "onednn"])
def test_images_together_have_the_features_that_each_has_alone(tiny_molmo, mode):
    generator = torch.Generator().manual_seed(0)
    images = [(torch.randn(1, views, 64, 48, generator=generator), torch.ones(1, views, 64)) for views in (2, 5, 2)]
    inference = load_inference(tiny_molmo, mode)[1]
    inference.prepare(num_views=5, length=40, num_blocks=3)
    with torch.inference_mode():
        together = inference.features_of_images(images)
        assert all(
            torch.equal(found, inference.image_features(*image)) for found, image in zip(together, images, strict=True)
        )
    assert inference.graphs is None and not inference.shares_passes


def test_all_golden_cases_agree_without_the_modules(shared_dir):
    folder = shared_dir / "molmo" / "golden" / "model"
    model = MolmoForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    inference = CpuInference(model)
    tensors = load_file(folder / "cases.safetensors")
    cases = json.loads((folder / "cases.json").read_text())["cases"]
    assert cases
    for case in cases:
        sample, top_k, blocks = case.split(".")
        features = inference.image_features(tensors[f"{sample}.images"].float(), tensors[f"{sample}.image_masks"])
        torch.testing.assert_close(features, tensors[f"{sample}.image_features"][0], rtol=0, atol=1e-6)
        input_ids = tensors[f"{sample}.input_ids"]
        prompts = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "image_features": features[None],
            "image_input_idx": tensors[f"{sample}.image_input_idx"].long(),
        }
        active_blocks = [int(block) for block in blocks.removeprefix("blocks").split("-")]
        decoding = inference.prefill(prompts, int(top_k.removeprefix("topk")), active_blocks)
        torch.testing.assert_close(decoding.logits[0], tensors[f"{case}.logits"][-1], rtol=0, atol=1e-5)
        expected = tensors[f"{case}.greedy"]
        for token in expected:
            assert decoding.tokens[0] == token
            decoding.step()


@pytest.mark.parametrize("num_rows", [1, 200])
@pytest.mark.parametrize("has_silu", [False, True])
def test_a_packed_layer_equals_torchs_on_either_side_of_its_threshold(num_rows, has_silu):
    layer = torch.nn.Linear(96, 80)
    assert (num_rows * 96 * 80 > MIN_PACKED_MACS) == (num_rows == 200)
    rows = torch.randn(num_rows, 96)
    expected = layer(rows)
    expected = torch.nn.functional.silu(expected) if has_silu else expected
    found = PackedLinear(layer.weight, layer.bias, has_silu)(rows)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_mode_follows_device_and_precision(tiny_molmo, tiny_molmo_config):
    assert load_inference(tiny_molmo)[0] == "onednn"
    assert load_inference(tiny_molmo, "plain")[0] == "plain"
    half = MolmoForConditionalGeneration(tiny_molmo_config).bfloat16()
    assert load_inference(half)[0] == "plain"
    with pytest.raises(ValueError, match="bfloat16.*mode 'plain'"):
        load_inference(half, "onednn")
    with pytest.raises(ValueError, match="choose one of"):
        load_inference(tiny_molmo, "fast")
