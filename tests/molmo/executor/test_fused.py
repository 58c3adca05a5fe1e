"""
The fast path through a Molmo's weights against its modules: on a GPU where there is one, else with interpreted kernels on
the CPU, which takes seconds a token.
"""

import copy

import pytest
import torch
from transformers import OlmoeConfig

from joint_controller.molmo import MolmoConfig, MolmoForConditionalGeneration


pytest.importorskip("triton")

from joint_controller.molmo.executor.fused import DecodeState, FusedMolmo


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def frozen(model):
    return copy.deepcopy(model).to(DEVICE).eval().requires_grad_(False)


def prefill(fused, embeddings, active_blocks, top_k, padding=3, capacity=128):
    """Hidden states of a prompt `(L, width)` with padding behind it, and the cache."""
    length = len(embeddings)
    place = {"dtype": torch.int32, "device": DEVICE}
    cache, rotary = fused.new_cache(1, capacity), fused.rotary(capacity)
    x = torch.cat([embeddings, torch.full_like(embeddings[:padding], 7.0)])
    rows, positions = torch.zeros(len(x), **place), torch.arange(len(x), **place)
    experts = torch.tensor([top_k] * length + [0] * padding, **place)

    def attend(block, qkv):
        return fused.attend_prompts(block, qkv, rotary, cache, rows, positions, [(0, len(x))])

    for block in active_blocks:
        fused.run_block(block, x, experts, fused.config.num_experts_per_tok, attend)
    return x[:length], cache, rotary


def decode(fused, x, cache, rotary, active_blocks, top_k, length, num_tokens):
    """Tokens and logits `(num_tokens, vocab_size)` that follow the hidden state `x` of the prompt's last token."""
    state = DecodeState(fused, fused.config.num_experts_per_tok)
    setting = torch.tensor([length - 1, top_k, *active_blocks], dtype=torch.int32)
    state.setting[: len(setting)] = setting.to(DEVICE)
    state.x.copy_(x)
    fused.choose_token(state)
    tokens, logits = [state.token.item()], [state.logits.clone()]
    while len(tokens) < num_tokens:
        fused.decode(state, len(active_blocks), rotary, cache)
        tokens.append(state.token.item())
        logits.append(state.logits.clone())
    assert state.position.item() == length + num_tokens - 1
    return tokens, torch.stack(logits)


@torch.inference_mode()
@pytest.mark.parametrize(("active_blocks", "top_k"), [([0, 2], 4), ([1], 3)])
def test_prompt_and_answer_equal_those_of_the_modules(tiny_molmo, active_blocks, top_k):
    model = frozen(tiny_molmo)
    ids = torch.randint(2, 64, (1, 6), generator=torch.Generator().manual_seed(top_k)).to(DEVICE)
    knobs = {"active_blocks": active_blocks, "top_k": top_k}
    expected = model(ids, **knobs).logits[0]
    answer = model.generate(ids, **knobs, max_new_tokens=2, do_sample=False, eos_token_id=None)[0]
    expected_next = model(answer[None], **knobs).logits[0, -3:-1]

    fused = FusedMolmo(model)
    x, cache, rotary = prefill(fused, model.get_input_embeddings()(ids)[0], active_blocks, top_k)
    torch.testing.assert_close(fused.output_logits(x), expected, rtol=1e-4, atol=1e-5)
    tokens, logits = decode(fused, x[-1], cache, rotary, active_blocks, top_k, 6, 2)
    assert tokens == answer[-2:].tolist()
    torch.testing.assert_close(logits, expected_next, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_the_model_itself_stays_as_it_was(tiny_molmo, tmp_path):
    model = frozen(tiny_molmo)
    FusedMolmo(model)
    for name, value in tiny_molmo.state_dict().items():
        assert torch.equal(model.state_dict()[name].cpu(), value.cpu()), name
    model.save_pretrained(tmp_path)
    loaded = MolmoForConditionalGeneration.from_pretrained(tmp_path)
    assert all(torch.equal(value, tiny_molmo.state_dict()[name]) for name, value in loaded.state_dict().items())


@torch.inference_mode()
def test_image_features_equal_those_of_the_modules(tiny_molmo):
    model = frozen(tiny_molmo)
    generator = torch.Generator().manual_seed(0)
    views = torch.randn(2, 64, 48, generator=generator).to(DEVICE)
    masks = (torch.randint(0, 3, (2, 64), generator=generator) / 2).to(DEVICE)
    expected = model.get_image_features(views[None], masks[None])[0]
    torch.testing.assert_close(FusedMolmo(model).image_features(views, masks), expected, rtol=1e-4, atol=1e-5)


def test_what_the_fast_path_lacks_is_named(tiny_molmo_config):
    text = {**tiny_molmo_config.text_config.to_dict(), "norm_topk_prob": True, "attention_bias": True}
    vision = tiny_molmo_config.vision_config
    model = MolmoForConditionalGeneration(
        MolmoConfig(text_config=OlmoeConfig(**text), vision_config=vision, additional_vocab_size=8, vit_layers=[-1])
    )
    with pytest.raises(ValueError, match=r"\['attention_bias', 'norm_topk_prob'\]: use the mode 'plain'"):
        FusedMolmo(model)
