import itertools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPVisionModel,
    DynamicCache,
    GenerationMixin,
    OlmoeForCausalLM,
)

from joint_controller.molmo import MolmoConfig, MolmoForConditionalGeneration
from joint_controller.molmo.modeling_molmo import CACHE_NAME


def random_inputs(config, batch_size=1, num_views=2, length=40, seed=0):
    """Inputs in which every kept feature has a place of its own behind the BOS token."""
    generator = torch.Generator().manual_seed(seed)
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    pixel_values = torch.randn(batch_size, num_views, patches, 3 * vision.patch_size**2, generator=generator)
    tokens = config.tokens_per_view
    places = torch.arange(num_views * tokens).view(1, num_views, tokens).repeat(batch_size, 1, 1) + 1
    places[:, 1:, : tokens // 2] = -100
    return {
        "input_ids": torch.randint(2, config.text_config.vocab_size, (batch_size, length), generator=generator),
        "attention_mask": torch.ones(batch_size, length, dtype=torch.long),
        "pixel_values": pixel_values,
        "image_masks": torch.randint(0, 3, (batch_size, num_views, patches), generator=generator) / 2,
        "image_input_idx": places,
    }


def all_block_subsets(num_blocks):
    return [
        list(blocks)
        for count in range(1, num_blocks + 1)
        for blocks in itertools.combinations(range(num_blocks), count)
    ]


# --- against the reference implementation -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden(shared_dir):
    folder = shared_dir / "molmo" / "golden" / "model"
    model = MolmoForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    index = json.loads((folder / "cases.json").read_text())
    return folder, model, load_file(folder / "cases.safetensors"), index["cases"]


def golden_inputs(tensors, sample):
    return {
        "input_ids": tensors[f"{sample}.input_ids"],
        "attention_mask": torch.ones_like(tensors[f"{sample}.input_ids"]),
        "pixel_values": tensors[f"{sample}.images"].float(),
        "image_masks": tensors[f"{sample}.image_masks"],
        "image_input_idx": tensors[f"{sample}.image_input_idx"].long(),
    }


def worst_golden_differences(model, tensors, cases, drop_mask=False):
    """Largest differences in features and logits over all cases, and whether all greedy tokens agree."""
    feature_difference, logit_difference, tokens_agree = 0.0, 0.0, True
    for case in cases:
        sample, top_k, blocks = case.split(".")
        knobs = {
            "top_k": int(top_k.removeprefix("topk")),
            "active_blocks": [int(block) for block in blocks.removeprefix("blocks").split("-")],
        }
        inputs = golden_inputs(tensors, sample)
        if drop_mask:
            inputs["image_masks"] = inputs["image_masks"].clone()
            inputs["image_masks"][:, 1] = 1.0
        with torch.no_grad():
            features = model.get_image_features(inputs["pixel_values"], inputs["image_masks"])
            logits = model(**inputs, **knobs).logits[0, -13:]
        difference = (features - tensors[f"{sample}.image_features"]).abs().max()
        feature_difference = max(feature_difference, difference.item())
        logit_difference = max(logit_difference, (logits - tensors[f"{case}.logits"]).abs().max().item())
        answer = model.generate(**inputs, **knobs, max_new_tokens=6, do_sample=False, eos_token_id=None)
        tokens_agree &= torch.equal(answer[0, -6:], tensors[f"{case}.greedy"])
    return feature_difference, logit_difference, tokens_agree


def test_all_golden_cases_agree(golden):
    _, model, tensors, cases = golden
    feature_difference, logit_difference, tokens_agree = worst_golden_differences(model, tensors, cases)
    assert feature_difference < 1e-6
    assert logit_difference < 1e-5
    assert tokens_agree


def test_golden_cases_notice_a_changed_mask(golden):
    _, model, tensors, cases = golden
    feature_difference, logit_difference, _ = worst_golden_differences(model, tensors, cases[:1], drop_mask=True)
    assert feature_difference > 1e-4
    assert logit_difference > 1e-5


def test_golden_cases_notice_a_missing_expert(golden):
    _, model, tensors, cases = golden
    down_proj = model.model.language_model.layers[0].mlp.experts.down_proj
    kept = down_proj.detach().clone()
    with torch.no_grad():
        down_proj[3] = 0.0
    try:
        _, logit_difference, _ = worst_golden_differences(model, tensors, cases[:1])
    finally:
        with torch.no_grad():
            down_proj.copy_(kept)
    assert logit_difference > 1e-5


def test_saving_a_published_checkpoint_keeps_its_names_and_values(golden, tmp_path):
    folder, model, _, _ = golden
    model.save_pretrained(tmp_path)
    published, saved = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert published.keys() == saved.keys()
    assert all(torch.equal(published[name], saved[name]) for name in published)


@pytest.mark.parametrize("change", ["missing", "missing_expert", "extra", "misshapen"])
def test_a_damaged_checkpoint_is_refused_by_tensor_name(golden, tmp_path, change):
    folder = golden[0]
    tensors = load_file(folder / "model.safetensors")
    shutil.copy(folder / "config.json", tmp_path)
    if change == "missing":
        del tensors["model.vision_backbone.pad_embed"]
        expected = "missing tensors: .*pad_embed"
    elif change == "missing_expert":
        del tensors["model.transformer.blocks.1.mlp.experts.3.down_proj.weight"]
        expected = "language_model.layers.1.mlp.experts.down_proj"
    elif change == "extra":
        tensors["model.transformer.blocks.9.attn.attn_out.weight"] = torch.zeros(2, 2)
        expected = "unexpected tensors: .*layers.9"
    else:
        tensors["model.transformer.ln_f.weight"] = torch.zeros(3)
        expected = r"norm.weight is \(3,\) but should be \(64,\)"
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=expected):
        MolmoForConditionalGeneration.from_pretrained(tmp_path)


def test_a_sharded_checkpoint_loads(golden, tmp_path):
    folder, model, _, _ = golden
    tensors = load_file(folder / "model.safetensors")
    shutil.copy(folder / "config.json", tmp_path)
    names = sorted(tensors)
    # Experts of one block in different files: they are stacked while loading.
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, members in shards.items():
        save_file({name: tensors[name] for name in members}, tmp_path / file, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(tensor.numel() * 4 for tensor in tensors.values())},
        "weight_map": {name: file for file, members in shards.items() for name in members},
    }
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    loaded = MolmoForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    for expected, found in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True):
        assert torch.equal(expected, found)


def test_the_published_config_is_read(shared_dir):
    config = MolmoConfig.from_pretrained(shared_dir / "molmo" / "molmoe-1b")
    text, vision = config.text_config, config.vision_config
    assert (text.hidden_size, text.num_hidden_layers, text.num_experts, text.num_experts_per_tok) == (2048, 16, 64, 8)
    assert (text.intermediate_size, text.vocab_size, config.additional_vocab_size) == (1024, 50304, 128)
    assert (vision.hidden_size, vision.num_hidden_layers, vision.image_size, vision.patch_size) == (1024, 23, 336, 14)
    assert (config.max_crops, config.tokens_per_view, config.vit_layers) == (12, 144, [-2, -9])
    assert MolmoConfig().to_dict()["text_config"]["num_experts"] == 64


def test_a_dense_molmo_is_refused(shared_dir):
    published = json.loads((shared_dir / "molmo" / "molmoe-1b" / "config.json").read_text())
    with pytest.raises(ValueError, match="`block_type` = 'sequential'.*MolmoE"):
        MolmoConfig.from_dict({**published, "block_type": "sequential"})


# --- against transformers' own modules ----------------------------------------------------------------------------


def test_language_model_equals_olmoe(tiny_molmo, tiny_molmo_config):
    torch.manual_seed(1)
    olmoe = OlmoeForCausalLM(tiny_molmo_config.text_config).eval()
    weights = {
        name.removeprefix("model.language_model."): value
        for name, value in tiny_molmo.state_dict().items()
        if name.startswith("model.language_model.")
    }
    weights["embed_tokens.weight"] = weights.pop("embed_tokens.base_embedding")
    del weights["embed_tokens.additional_embedding"]
    weights = {f"model.{name}": value for name, value in weights.items()}
    weights["lm_head.weight"] = tiny_molmo.lm_head.weight
    olmoe.load_state_dict(weights)
    input_ids = torch.randint(2, 64, (3, 17))
    for top_k in (1, 2, 4):
        for layer in olmoe.model.layers:
            layer.mlp.gate.top_k = top_k
        with torch.no_grad():
            expected = olmoe(input_ids=input_ids).logits
            found = tiny_molmo(input_ids=input_ids, top_k=top_k).logits
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_vision_tower_equals_clip(tiny_molmo, tiny_molmo_config):
    config = tiny_molmo_config.vision_config
    clip = CLIPVisionModel(config).eval()
    tower = tiny_molmo.model.vision_tower
    weights = {name: value for name, value in tower.state_dict().items() if name.startswith("encoder.")}
    weights["embeddings.class_embedding"] = tower.class_embedding
    weights["embeddings.position_embedding.weight"] = tower.position_embedding
    # Linear over (row, column, channel) → convolution over (channel, row, column).
    kernel = tower.patch_embedding.weight.unflatten(1, (config.patch_size, config.patch_size, 3)).permute(0, 3, 1, 2)
    weights["embeddings.patch_embedding.weight"] = kernel
    weights["pre_layrnorm.weight"], weights["pre_layrnorm.bias"] = tower.pre_layernorm.weight, tower.pre_layernorm.bias
    unloaded = clip.load_state_dict(weights, strict=False)
    assert all(name.startswith("post_layernorm") for name in unloaded.missing_keys) and not unloaded.unexpected_keys

    images = torch.randn(5, 3, config.image_size, config.image_size)
    grid = config.image_size // config.patch_size
    patches = (
        images.unflatten(2, (grid, -1)).unflatten(4, (grid, -1)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    )
    with torch.no_grad():
        expected = clip(images, output_hidden_states=True).hidden_states[1:]
        found = tower(patches)
    for block, output in enumerate(found):
        torch.testing.assert_close(output, expected[block], atol=1e-5, rtol=1e-5)


def test_skipped_blocks_equal_a_model_without_them(tiny_molmo, tiny_molmo_config):
    """Brute force: a model of just the chosen blocks gives the same logits."""
    inputs = random_inputs(tiny_molmo_config)
    for blocks in all_block_subsets(4):
        config = MolmoConfig.from_dict(tiny_molmo_config.to_dict())
        config.text_config.num_hidden_layers = len(blocks)
        smaller = MolmoForConditionalGeneration(config).eval()
        weights = {}
        for name, value in tiny_molmo.state_dict().items():
            head, layers, rest = name.partition("language_model.layers.")
            if layers:
                block, _, parameter = rest.partition(".")
                if int(block) not in blocks:
                    continue
                name = f"{head}{layers}{blocks.index(int(block))}.{parameter}"
            weights[name] = value
        smaller.load_state_dict(weights)
        with torch.no_grad():
            expected = smaller(**inputs).logits
            found = tiny_molmo(**inputs, active_blocks=blocks).logits
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


# --- caching, batching, generation --------------------------------------------------------------------------------


@torch.no_grad()
def test_cached_path_equals_uncached_for_every_block_subset(tiny_molmo, tiny_molmo_config):
    inputs = random_inputs(tiny_molmo_config)
    prompt = {**inputs, "input_ids": inputs["input_ids"][:, :36], "attention_mask": inputs["attention_mask"][:, :36]}
    for blocks in all_block_subsets(4):
        expected = tiny_molmo(**inputs, active_blocks=blocks, top_k=2).logits
        cache = DynamicCache()
        outputs = tiny_molmo(**prompt, active_blocks=blocks, top_k=2, cache=cache)
        steps = [outputs.logits]
        for position in range(36, 40):
            outputs = tiny_molmo(
                input_ids=inputs["input_ids"][:, position : position + 1],
                attention_mask=inputs["attention_mask"][:, : position + 1],
                cache=cache,
                active_blocks=blocks,
                top_k=2,
            )
            steps.append(outputs.logits)
        torch.testing.assert_close(torch.cat(steps, dim=1), expected, atol=1e-5, rtol=1e-5)
        assert outputs[CACHE_NAME] is cache
        filled = [layer for layer in cache.layers if layer.get_seq_length() > 0]
        assert len(filled) == len(blocks)


@torch.no_grad()
def test_a_batch_of_unequal_prompts_equals_one_by_one(tiny_molmo, tiny_molmo_config):
    samples = [random_inputs(tiny_molmo_config, length=length, seed=length) for length in (34, 36, 41)]
    longest = 41
    batch = {}
    for name in ("input_ids", "attention_mask"):
        fill = 1 if name == "input_ids" else 0
        batch[name] = torch.cat(
            [
                torch.nn.functional.pad(sample[name], (longest - sample[name].shape[1], 0), value=fill)
                for sample in samples
            ]
        )
    for name in ("pixel_values", "image_masks"):
        batch[name] = torch.cat([sample[name] for sample in samples])
    batch["image_input_idx"] = torch.cat(
        [
            torch.where(
                sample["image_input_idx"] < 0,
                sample["image_input_idx"],
                sample["image_input_idx"] + longest - sample["input_ids"].shape[1],
            )
            for sample in samples
        ]
    )
    logits = tiny_molmo(**batch, active_blocks=[0, 2, 3]).logits
    answers = tiny_molmo.generate(
        **batch, active_blocks=[0, 2, 3], top_k=2, max_new_tokens=8, do_sample=False, pad_token_id=1, eos_token_id=0
    )[:, longest:]
    for row, sample in enumerate(samples):
        alone = tiny_molmo(**sample, active_blocks=[0, 2, 3]).logits[0]
        torch.testing.assert_close(logits[row, -alone.shape[0] :], alone, atol=1e-5, rtol=1e-5)
        answer = tiny_molmo.generate(
            **sample,
            active_blocks=[0, 2, 3],
            top_k=2,
            max_new_tokens=8,
            do_sample=False,
            pad_token_id=1,
            eos_token_id=0,
        )[0, sample["input_ids"].shape[1] :]
        assert torch.equal(answers[row, : len(answer)], answer)


@torch.no_grad()
def test_generate_equals_greedy_by_hand_and_stops_at_eos(tiny_molmo, tiny_molmo_config):
    inputs = random_inputs(tiny_molmo_config, seed=3)
    tokens, knobs = inputs["input_ids"], {"active_blocks": [0, 1, 3], "top_k": 1}
    expected = []
    for _ in range(5):
        mask = torch.ones_like(tokens)
        chosen = (
            tiny_molmo(**{**inputs, "input_ids": tokens, "attention_mask": mask}, **knobs).logits[:, -1].argmax(-1)
        )
        tokens = torch.cat([tokens, chosen[:, None]], dim=1)
        expected.append(chosen.item())
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 1}
    found = tiny_molmo.generate(**inputs, **knobs, **options, eos_token_id=None)[0, 40:].tolist()
    assert found == expected
    stopped = tiny_molmo.generate(**inputs, **knobs, **options, eos_token_id=expected[1])[0, 40:].tolist()
    assert stopped == expected[: expected.index(expected[1]) + 1]
    # The knobs of that call are gone again.
    default = tiny_molmo(**inputs).logits
    torch.testing.assert_close(default, tiny_molmo(**inputs, top_k=4, active_blocks=[0, 1, 2, 3]).logits)
    assert not torch.allclose(default, tiny_molmo(**inputs, top_k=1).logits)


@torch.no_grad()
def test_the_cache_is_taken_under_either_of_its_names(tiny_molmo, tiny_molmo_config):
    inputs = random_inputs(tiny_molmo_config)
    next_token = {"input_ids": torch.tensor([[5]]), "attention_mask": torch.ones(1, 41, dtype=torch.long)}
    logits = []
    for name in ("cache", "past_key_values"):
        cache = DynamicCache()
        tiny_molmo(**inputs, **{name: cache})
        logits.append(tiny_molmo(**next_token, **{name: cache}).logits)
    assert torch.equal(*logits)
    with pytest.raises(ValueError, match="at most one of `cache` and `past_key_values`"):
        tiny_molmo(**inputs, cache=DynamicCache(), past_key_values=DynamicCache())


@torch.no_grad()
def test_arguments_that_the_model_does_not_know_are_refused(tiny_molmo, tiny_molmo_config):
    inputs = random_inputs(tiny_molmo_config)
    with pytest.raises(TypeError, match=r"does not take the arguments \['kv_store'\]"):
        tiny_molmo(**inputs, kv_store=DynamicCache())


def test_a_mask_of_more_tokens_than_there_are_is_refused(tiny_molmo, tiny_molmo_config):
    inputs = random_inputs(tiny_molmo_config)
    last = {"input_ids": inputs["input_ids"][:, -1:], "attention_mask": inputs["attention_mask"]}
    with pytest.raises(ValueError, match="covers 40 tokens, but 1 are given and no `cache`"):
        tiny_molmo(**last)


class TestGenerationWithoutItsCache:
    """Whatever loses the cache on its way, generation must fail: every token after the first would be wrong."""

    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}

    @pytest.mark.parametrize(
        ("new_name", "error", "message"),
        [
            ("kv_store", TypeError, r"does not take the arguments \['kv_store'\]"),
            (None, RuntimeError, f"did not hand the model its KV cache as `{CACHE_NAME}`"),
        ],
    )
    def test_generate_hands_it_over_under_another_name_or_not_at_all(
        self, tiny_molmo, tiny_molmo_config, monkeypatch, new_name, error, message
    ):
        prepare = GenerationMixin.prepare_inputs_for_generation

        def rename_cache(self, *args, **kwargs):
            inputs = prepare(self, *args, **kwargs)
            cache = inputs.pop(CACHE_NAME)
            return inputs if new_name is None else {**inputs, new_name: cache}

        monkeypatch.setattr(GenerationMixin, "prepare_inputs_for_generation", rename_cache)
        with pytest.raises(error, match=message):
            tiny_molmo.generate(**random_inputs(tiny_molmo_config), **self.options)

    def test_a_layer_takes_it_under_another_name(self, tiny_molmo, tiny_molmo_config, monkeypatch):
        attention = type(tiny_molmo.model.language_model.layers[2].self_attn)
        forward = attention.forward

        def forget_cache(self, *args, **kwargs):
            if self.layer_idx == 2:
                del kwargs[CACHE_NAME]
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(attention, "forward", forget_cache)
        with pytest.raises(RuntimeError, match=rf"blocks \[2\] did not use the KV cache .* as `{CACHE_NAME}`"):
            tiny_molmo.generate(**random_inputs(tiny_molmo_config), **self.options)


@torch.no_grad()
def test_features_can_be_computed_before(tiny_molmo, tiny_molmo_config):
    inputs = random_inputs(tiny_molmo_config, batch_size=2, num_views=3, length=60)
    expected = tiny_molmo(**inputs).logits
    features = tiny_molmo.get_image_features(inputs.pop("pixel_values"), inputs.pop("image_masks"))
    torch.testing.assert_close(tiny_molmo(**inputs, image_features=features).logits, expected)


@torch.no_grad()
def test_padding_views_change_nothing(tiny_molmo, tiny_molmo_config):
    inputs = random_inputs(tiny_molmo_config)
    expected = tiny_molmo(**inputs).logits
    for name, fill in (("pixel_values", -1.0), ("image_masks", -1.0), ("image_input_idx", -100)):
        inputs[name] = torch.cat([inputs[name], torch.full_like(inputs[name][:, :1], fill)], dim=1)
    torch.testing.assert_close(tiny_molmo(**inputs).logits, expected)


def test_save_and_reload_gives_the_same_outputs(tiny_molmo, tiny_molmo_config, tmp_path):
    tiny_molmo.save_pretrained(tmp_path)
    assert "model.transformer.blocks.0.mlp.experts.0.gate_proj.weight" in load_file(tmp_path / "model.safetensors")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, MolmoForConditionalGeneration)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), MolmoConfig)
    inputs = random_inputs(tiny_molmo_config)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, tiny_molmo(**inputs).logits)


def test_loss_is_the_cross_entropy_of_the_next_token(tiny_molmo, tiny_molmo_config):
    inputs = random_inputs(tiny_molmo_config)
    labels = inputs["input_ids"].clone()
    labels[:, :35] = -100
    with torch.no_grad():
        outputs = tiny_molmo(**inputs, labels=labels)
    log_probabilities = outputs.logits[0, 34:39].log_softmax(-1)
    expected = -log_probabilities[torch.arange(5), labels[0, 35:]].mean()
    torch.testing.assert_close(outputs.loss, expected)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"top_k": 9}, "`top_k` is 9: a token can go to 1 to 8 experts"),
        ({"top_k": 0}, "`top_k` is 0"),
        ({"active_blocks": [0, 4]}, "from 0 to 3"),
        ({"active_blocks": [2, 1]}, "ascending"),
        ({"active_blocks": []}, "at least one block"),
    ],
)
def test_knobs_outside_the_model_are_refused(tiny_molmo, tiny_molmo_config, knobs, message):
    inputs = random_inputs(tiny_molmo_config)
    with pytest.raises(ValueError, match=message):
        tiny_molmo(**inputs, **knobs)
    with pytest.raises(ValueError, match=message):
        tiny_molmo.generate(**inputs, **knobs, max_new_tokens=1)


def test_features_without_places_are_refused(tiny_molmo, tiny_molmo_config):
    inputs = random_inputs(tiny_molmo_config)
    del inputs["image_input_idx"]
    with pytest.raises(ValueError, match="`image_input_idx` is missing"):
        tiny_molmo(**inputs)
