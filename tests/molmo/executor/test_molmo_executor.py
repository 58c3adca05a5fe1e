"""The executor against transformers' `generate`, one request at a time."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from molmo_knobs import molmo_setting
from PIL import Image

from joint_controller.executor import ExecutorRequest, StageClock
from joint_controller.molmo import MolmoForConditionalGeneration
from joint_controller.molmo.executor import MolmoExecutor
from joint_controller.molmo.knob_space import build_knob_space, tier_crops_of


QUESTIONS = [
    "what color is the star?",
    "what shape is the red?",
    "is the circle left of the blue star?",
    "a star?",
    "what is left of the green circle?",
]


@pytest.fixture(scope="module")
def knob_space():
    return build_knob_space({"low": (1, 1), "medium": (2, 4), "high": (5, 9)}, top_k=(1, 2, 4), num_blocks=(2, 3, 4))


@pytest.fixture
def executor(tiny_molmo, tiny_processor, knob_space):
    return MolmoExecutor(tiny_molmo, tiny_processor, knob_space, max_new_tokens=6, batch_size=4)


@pytest.fixture(scope="module")
def images():
    """Five images of different shapes."""
    generator = np.random.default_rng(0)
    sizes = [(48, 48), (40, 90), (90, 40), (64, 48), (30, 30)]
    return [Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


@pytest.fixture(scope="module")
def requests(images, knob_space):
    """Every sample at several settings, shuffled."""
    settings = list(knob_space)
    requests = [
        ExecutorRequest(f"sample{index}", image, question, "vqa2", setting)
        for index, (image, question) in enumerate(zip(images, QUESTIONS, strict=True))
        for setting in random.Random(index).sample(settings, 8)
    ]
    random.Random(0).shuffle(requests)
    return requests


def generate_alone(executor, request, active_blocks):
    """New tokens of one request by transformers' `generate`, straight from the processor."""
    inputs = executor.processor(
        images=request.image,
        text=request.question,
        tier=request.setting["tier"],
        tier_crops=tier_crops_of(executor.knob_space),
    )
    tokens = executor.model.generate(
        **inputs,
        active_blocks=active_blocks,
        top_k=request.setting["top_k"],
        max_new_tokens=executor.max_new_tokens,
        do_sample=False,
        eos_token_id=executor.processor.tokenizer.eos_token_id,
        pad_token_id=executor.processor.tokenizer.pad_token_id,
    )
    return tokens[0, inputs["input_ids"].shape[1] :].tolist(), inputs


@pytest.mark.parametrize("mode", ["plain", "onednn"])
def test_answers_of_a_mixed_batch_equal_those_of_generate_one_by_one(
    tiny_molmo, tiny_processor, knob_space, requests, mode
):
    executor = MolmoExecutor(tiny_molmo, tiny_processor, knob_space, max_new_tokens=6, batch_size=4, mode=mode)
    outputs = executor.run(requests)
    assert len(outputs) == len(requests)
    assert len({output.answer for output in outputs}) > 5, "the model answers everything alike: the test shows nothing"
    for request, output in zip(requests, outputs, strict=True):
        tokens, inputs = generate_alone(executor, request, list(range(request.setting["num_blocks"])))
        assert (output.sample_id, output.setting) == (request.sample_id, request.setting)
        assert output.answer == executor.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        assert output.output_tokens == len(tokens)
        size = (request.image.height, request.image.width)
        assert output.counts["vision_tokens"] == executor.processor.count_vision_tokens(
            *size, tier=request.setting["tier"], tier_crops=tier_crops_of(executor.knob_space)
        )
        assert output.counts["vision_tokens"] + output.counts["text_tokens"] == inputs["input_ids"].shape[1]
        assert output.counts["num_views"] == inputs["pixel_values"].shape[1]


def test_threads_change_no_answer(tiny_molmo, tiny_processor, knob_space, requests, executor):
    """Batches of several settings, whose numbers of experts differ, in four threads."""
    threaded = MolmoExecutor(tiny_molmo, tiny_processor, knob_space, max_new_tokens=6, batch_size=1, num_workers=4)
    assert threaded.run(requests) == executor.run(requests)
    assert {layer.mlp.gate.top_k for layer in tiny_molmo.model.language_model.layers} == {4}


def test_questions_about_one_image_share_its_features(executor, images):
    setting = executor.knob_space.full
    about_one = [
        ExecutorRequest(f"question{index}", images[0].copy(), question, "vqa2", setting)
        for index, question in enumerate(QUESTIONS[:3])
    ]
    other = ExecutorRequest("other", images[1], QUESTIONS[0], "vqa2", setting)
    first, second, different, third = executor.encode([about_one[0], about_one[1], other, about_one[2]], "high")
    assert first.image_features is second.image_features is third.image_features
    assert not torch.equal(first.image_features[:4], different.image_features[:4])
    assert len({tuple(encoded.input_ids.tolist()) for encoded in (first, second, third)}) == 3


def test_features_are_the_same_bits_whatever_is_encoded_beside(tiny_molmo, tiny_processor, knob_space, requests):
    together = MolmoExecutor(tiny_molmo, tiny_processor, knob_space, num_workers=2)
    for request in requests[:6]:
        alone = MolmoExecutor(tiny_molmo, tiny_processor, knob_space)
        expected = alone.vision_features([request])[0]
        found = together.vision_features(requests)[requests.index(request)]
        assert torch.equal(found, expected)


def test_answers_end_at_the_end_of_sequence_token_at_different_lengths(
    tiny_molmo_config, tiny_processor, knob_space, requests
):
    torch.manual_seed(1)
    model = MolmoForConditionalGeneration(tiny_molmo_config)
    with torch.no_grad():  # the end-of-sequence token (id 0) gets likely, so that answers have different lengths
        model.lm_head.weight[0] *= 3.0
    executor = MolmoExecutor(model, tiny_processor, knob_space, max_new_tokens=6, batch_size=16)
    outputs = executor.run(requests)
    lengths = Counter(output.output_tokens for output in outputs)
    assert len(lengths) >= 3, f"lengths {lengths}: too few for a test"
    for request, output in zip(requests, outputs, strict=True):
        tokens, _ = generate_alone(executor, request, list(range(request.setting["num_blocks"])))
        assert output.output_tokens == len(tokens)
        assert output.answer == tiny_processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()


@pytest.mark.parametrize("mode", ["plain", "onednn"])
def test_batches_are_handed_out_as_they_are_done(tiny_molmo, tiny_processor, knob_space, requests, mode):
    executor = MolmoExecutor(tiny_molmo, tiny_processor, knob_space, max_new_tokens=2, batch_size=4, mode=mode)
    batches = []
    outputs = executor.run(requests, on_batch=batches.append)
    assert max(len(batch) for batch in batches) <= executor.batch_size
    is_of_one_setting = [len({output.setting for output in batch}) == 1 for batch in batches]
    assert all(is_of_one_setting) if mode == "plain" else not all(is_of_one_setting)
    handed_out = [output for batch in batches for output in batch]
    assert len(handed_out) == len(outputs) and all(output in handed_out for output in outputs)


def test_batches_of_the_fast_mode_hold_requests_of_the_same_blocks_and_experts(executor, images):
    settings = [molmo_setting("low", top_k, num_blocks) for top_k in (1, 4) for num_blocks in (2, 4)]
    requests = [
        ExecutorRequest(f"sample{index}", image, QUESTIONS[index], "vqa2", setting)
        for index, image in enumerate(images[:4])
        for setting in settings
    ]
    batches = []
    executor.run(requests, on_batch=batches.append)
    assert executor.mode == "onednn" and [len(batch) for batch in batches] == [4] * 4
    assert all(len({output.setting for output in batch}) == 1 for batch in batches)


def test_a_window_has_batches_for_all_workers_however_few_images_are_kept(
    tiny_molmo, tiny_processor, knob_space, images, monkeypatch
):
    executor = MolmoExecutor(
        tiny_molmo, tiny_processor, knob_space, max_new_tokens=2, batch_size=1, num_workers=2, vision_cache_bytes=0
    )
    windows, encode = [], executor.encode
    monkeypatch.setattr(
        executor, "encode", lambda samples, tier: windows.append(len(samples)) or encode(samples, tier)
    )
    executor.run(
        [
            ExecutorRequest(f"sample{index}", image, QUESTIONS[0], "vqa2", knob_space.cheapest)
            for index, image in enumerate(images)
        ]
    )
    assert windows == [4, 1]


def test_a_window_goes_on_from_one_tier_to_the_next(tiny_molmo, tiny_processor, knob_space, images, monkeypatch):
    executor = MolmoExecutor(
        tiny_molmo, tiny_processor, knob_space, max_new_tokens=2, batch_size=1, num_workers=2, vision_cache_bytes=0
    )
    windows, encode = [], executor.encode
    monkeypatch.setattr(
        executor, "encode", lambda samples, tier: windows.append((tier, len(samples))) or encode(samples, tier)
    )
    executor.run(
        [
            ExecutorRequest(f"sample{index}", image, QUESTIONS[0], "vqa2", molmo_setting(tier, 1, 2))
            for index, image in enumerate(images[:3])
            for tier in ("low", "medium")
        ]
    )
    assert windows == [("low", 3), ("medium", 1), ("medium", 2)]


def test_a_window_has_as_many_images_as_fit_in_the_cache(tiny_molmo, tiny_processor, knob_space, images, monkeypatch):
    config = tiny_molmo.config
    num_views = 1 + tier_crops_of(knob_space)["low"][1]  # the most that an image may have
    image_bytes = num_views * config.tokens_per_view * config.text_config.hidden_size * 4
    executor = MolmoExecutor(
        tiny_molmo, tiny_processor, knob_space, max_new_tokens=2, batch_size=1, vision_cache_bytes=3 * image_bytes
    )
    windows, encode = [], executor.encode
    monkeypatch.setattr(
        executor, "encode", lambda samples, tier: windows.append(len(samples)) or encode(samples, tier)
    )
    executor.run(
        [
            ExecutorRequest(f"sample{index}", image, QUESTIONS[0], "vqa2", knob_space.cheapest)
            for index, image in enumerate(images)
        ]
    )
    assert windows == [3, 2]


def test_requests_of_several_tiers_share_a_batch_and_the_longest_batch_comes_first(executor, images):
    executor.batch_size = 4
    requests = [
        ExecutorRequest(f"sample{index}", image, QUESTIONS[0], "vqa2", molmo_setting(tier, 2, num_blocks))
        for num_blocks in (2, 4)
        for index, image in enumerate(images[:2])
        for tier in ("low", "high")
    ]
    batches = []
    executor.run(requests, on_batch=batches.append)
    assert [{output.setting["num_blocks"] for output in batch} for batch in batches] == [{4}, {2}]
    assert all(len(batch) == 4 for batch in batches)


def test_images_that_were_forgotten_are_encoded_again(executor, images, monkeypatch):
    request = ExecutorRequest("one", images[0], QUESTIONS[0], "vqa2", molmo_setting("low", 4, 4))
    calls, encode = [], executor.inference.image_features
    monkeypatch.setattr(executor.inference, "image_features", lambda *views: calls.append(1) or encode(*views))
    expected = executor.run([request])
    assert executor.run([request]) == expected and len(calls) == 1
    executor.forget_images()
    assert executor.run([request]) == expected and len(calls) == 2


def test_an_image_is_encoded_once_for_each_tier(tiny_molmo, tiny_processor, knob_space, requests, monkeypatch):
    executor = MolmoExecutor(tiny_molmo, tiny_processor, knob_space, max_new_tokens=2, mode="plain")
    views = []
    encode = tiny_molmo.get_image_features
    monkeypatch.setattr(
        tiny_molmo, "get_image_features", lambda pixels, masks: views.append(pixels.shape[1]) or encode(pixels, masks)
    )
    images = {(request.sample_id, request.setting["tier"]): request for request in requests}
    expected = sum(
        1
        + np.prod(
            tiny_processor.image_processor.choose_tiling(
                request.image.height, request.image.width, tier=tier, tier_crops=tier_crops_of(knob_space)
            )
        )
        for (_, tier), request in images.items()
    )
    executor.run(requests)
    executor.run(requests)
    executor.vision_features(requests)
    assert sum(views) == expected


def test_the_cache_of_images_stays_within_its_bytes_and_changes_no_answer(
    tiny_molmo, tiny_processor, knob_space, requests, executor
):
    small = MolmoExecutor(
        tiny_molmo, tiny_processor, knob_space, max_new_tokens=6, batch_size=2, vision_cache_bytes=30_000
    )
    assert small.run(requests) == executor.run(requests)
    kept = [
        small.encoder._kept[key]
        for key in {(request.sample_id, request.setting["tier"]) for request in requests}
        if key in small.encoder._kept
    ]
    assert 0 < small.encoder.num_bytes <= 30_000
    assert small.encoder.num_bytes == sum(encoded.num_bytes for encoded in kept)
    nothing = MolmoExecutor(tiny_molmo, tiny_processor, knob_space, max_new_tokens=6, vision_cache_bytes=0)
    assert nothing.run(requests) == executor.run(requests)
    assert nothing.encoder.num_bytes == 0


def test_run_of_nothing_is_nothing(executor):
    assert executor.run([]) == []


def test_a_setting_outside_the_knob_space_is_refused(executor, requests):
    request = ExecutorRequest("row17", requests[0].image, "what?", "vqa2", molmo_setting("low", 3, 4))
    with pytest.raises(ValueError, match="row17.*top_k=3.*outside the knob space"):
        executor.run([request])


def test_vision_features_are_the_mean_of_the_features_that_enter_the_sequence(executor, images):
    request = ExecutorRequest("one", images[1], QUESTIONS[0], "vqa2", executor.knob_space.full)
    other = ExecutorRequest("two", images[0], QUESTIONS[1], "vqa2", executor.knob_space.full)
    inputs = executor.processor(
        images=images[1], text=QUESTIONS[0], tier="high", tier_crops=tier_crops_of(executor.knob_space)
    )
    features = executor.model.get_image_features(inputs["pixel_values"], inputs["image_masks"])
    expected = features[inputs["image_input_idx"] >= 0].mean(dim=0)
    got = executor.vision_features([other, request])
    assert got.shape == (2, executor.vision_size) and got.dtype == torch.float32
    torch.testing.assert_close(got[1], expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(got[0], got[1], atol=1e-3)


def test_question_features_are_the_mean_of_the_bare_questions_embeddings(executor):
    table = executor.model.get_input_embeddings().base_embedding
    ids = executor.processor.tokenizer.convert_tokens_to_ids(["what", "color", "is", "the", "star", "?"])
    got = executor.question_features(["a star?", "what color is the star?"])
    torch.testing.assert_close(got[1], table[ids].mean(dim=0))
    with pytest.raises(ValueError, match="question 1 is empty"):
        executor.question_features(["a star?", " "])


def test_counts_are_those_of_the_encoded_request_at_each_setting(executor, images):
    """Images of many shapes, one of them lying on its side."""
    turned = images[1].copy()
    turned.getexif()[0x0112] = 6
    for index, image in enumerate([*images, turned]):
        request = ExecutorRequest(
            f"sample{index}", lambda image=image: image, QUESTIONS[index % 5], "okvqa", executor.knob_space.cheapest
        )
        settings = random.Random(index).sample(list(executor.knob_space), 12)
        counts = executor.count_inputs(request, settings)
        assert tuple(counts) == executor.count_names
        assert executor.count_names == ("image_pixels", "num_views", "vision_tokens", "text_tokens")
        for position, setting in enumerate(settings):
            [encoded] = executor.encode([request], setting["tier"])
            assert {name: values[position] for name, values in counts.items()} == encoded.counts
            assert encoded.counts["vision_tokens"] + encoded.counts["text_tokens"] == len(encoded.input_ids)
    assert executor.max_prompt_tokens == 512 - executor.max_new_tokens


def test_a_request_is_counted_with_one_tokenisation_and_without_its_pixels(executor, monkeypatch):
    class Unread(Image.Image):
        def load(self):
            pytest.fail("the pixels were read")

    image = Unread()
    image._size, image._mode = (90, 40), "RGB"
    processor, calls = executor.processor, []
    monkeypatch.setattr(type(processor), "prompt_ids", _recorded(type(processor).prompt_ids, calls))
    counts = executor.count_inputs(
        ExecutorRequest("one", image, QUESTIONS[0], "vqa2", executor.knob_space.full), list(executor.knob_space)
    )
    assert len(calls) == 1 and len(counts["num_views"]) == len(executor.knob_space)


def _recorded(function, calls):
    def call(self, *args, **kwargs):
        calls.append(args)
        return function(self, *args, **kwargs)

    return call


def test_an_unknown_style_is_refused_wherever_a_question_is_put(executor, images):
    request = ExecutorRequest("one", images[0], QUESTIONS[0], "vqa3", executor.knob_space.cheapest)
    for ask in (
        lambda: executor.run([request]),
        lambda: executor.open(request, StageClock(executor.device)),
        lambda: executor.vision_features([request]),
        lambda: executor.count_inputs(request, [request.setting]),
    ):
        with pytest.raises(ValueError, match="`style` is 'vqa3': Molmo was trained with .*, okvqa, .*, vqa2"):
            ask()


@pytest.mark.parametrize(
    ("importance", "expected"),
    [
        (None, {1: [0], 2: [0, 1], 3: [0, 1, 2], 4: [0, 1, 2, 3]}),
        # Block 0 runs whatever its score; among the others, the highest scores, the earlier block on a tie.
        ({0: 0.0, 1: 0.1, 2: 0.3, 3: 0.1}, {1: [0], 2: [0, 2], 3: [0, 1, 2], 4: [0, 1, 2, 3]}),
        # Blocks that the table leaves out always run.
        ({1: 0.1, 2: 0.3}, {2: [0, 3], 3: [0, 2, 3], 4: [0, 1, 2, 3]}),
    ],
)
def test_active_blocks_follow_importance(tiny_molmo, tiny_processor, importance, expected):
    space = build_knob_space({"low": (1, 1)}, top_k=(4,), num_blocks=(2, 3, 4))
    executor = MolmoExecutor(tiny_molmo, tiny_processor, space, importance=importance)
    assert {n: executor.active_blocks(n) for n in expected} == expected
    with pytest.raises(ValueError, match=f"can run {min(expected)} to 4 blocks"):
        executor.active_blocks(min(expected) - 1)


def test_requests_run_the_blocks_that_importance_chooses(tiny_molmo, tiny_processor, knob_space, requests):
    executor = MolmoExecutor(
        tiny_molmo, tiny_processor, knob_space, importance={1: 0.1, 2: 0.2, 3: 0.3}, max_new_tokens=6
    )
    two_blocks = [request for request in requests if request.setting["num_blocks"] == 2]
    for request, output in zip(two_blocks, executor.run(two_blocks), strict=True):
        tokens, _ = generate_alone(executor, request, [0, 3])
        assert output.answer == tiny_processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"importance": {7: 0.1}}, r"blocks \[7\] but the executor has the blocks 0 to 3"),
        ({"importance": {1: 0.1}}, r"\[0, 2, 3\] always run .* `num_blocks` cannot be 2"),
        (
            {"knob_space": build_knob_space({"low": (1, 1)}, (9,), (4,))},
            "`top_k` has the value 9 but the executor has 8",
        ),
        (
            {"knob_space": build_knob_space({"low": (1, 1)}, (4,), (5,))},
            "`num_blocks` has the value 5 but the executor has 4",
        ),
        ({"max_new_tokens": 0}, "`max_new_tokens` is 0"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"vision_cache_bytes": -1}, "`vision_cache_bytes` is -1"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(tiny_molmo, tiny_processor, knob_space, arguments, message):
    with pytest.raises(ValueError, match=message):
        MolmoExecutor(tiny_molmo, tiny_processor, **{"knob_space": knob_space, **arguments})


def test_fingerprint_changes_with_what_an_outcome_depends_on(
    tiny_molmo, tiny_molmo_config, tiny_processor, knob_space
):
    def fingerprint(model=tiny_molmo, **arguments):
        return MolmoExecutor(model, tiny_processor, **{"knob_space": knob_space, **arguments}).fingerprint

    torch.manual_seed(0)
    same = MolmoForConditionalGeneration(tiny_molmo_config)
    torch.manual_seed(0)
    other_weights = MolmoForConditionalGeneration(tiny_molmo_config)
    with torch.no_grad():
        other_weights.lm_head.weight[3, 3] += 1e-3
    torch.manual_seed(0)
    other_precision = MolmoForConditionalGeneration(tiny_molmo_config).to(torch.bfloat16)
    fewer_values = knob_space.restrict({"top_k": (1, 4), "num_blocks": (2, 4)})
    other_tiers = build_knob_space({"low": (1, 2), "high": (5, 9)}, (1, 2, 4), (2, 3, 4))

    original = fingerprint()
    assert fingerprint(same) == original
    assert fingerprint(batch_size=3, vision_cache_bytes=0, knob_space=fewer_values) == original
    assert fingerprint(importance={0: 0.4, 1: 0.3, 2: 0.2, 3: 0.1}) == original, "the same blocks run"
    different = [
        fingerprint(other_weights),
        fingerprint(other_precision),
        fingerprint(importance={0: 0.1, 1: 0.2, 2: 0.3, 3: 0.4}),
        fingerprint(knob_space=other_tiers),
        fingerprint(max_new_tokens=3),
    ]
    assert len({original, *different}) == 6


def test_a_new_knob_space_is_checked_and_drops_encoded_images(executor, images):
    request = ExecutorRequest("one", images[0], QUESTIONS[0], "vqa2", molmo_setting("low", 4, 4))
    few = executor.run([request])[0].counts["vision_tokens"]
    executor.knob_space = build_knob_space({"low": (4, 4)}, (4,), (4,))
    assert executor.run([request])[0].counts["vision_tokens"] > few
    with pytest.raises(ValueError, match="`num_blocks` has the value 5"):
        executor.knob_space = build_knob_space({"low": (1, 1)}, (4,), (5,))


def test_a_request_that_is_opened_is_answered_as_in_a_batch(executor, images):
    """Step by step and by itself: the same features, counts and answer."""
    for image, question, setting in zip(images, QUESTIONS, executor.knob_space.settings[::5], strict=False):
        request = ExecutorRequest(question, image, question, "vqa2", setting)
        opened = executor.open(request, StageClock(executor.device))
        assert opened.count_inputs(request, list(executor.knob_space)) == executor.count_inputs(
            request, list(executor.knob_space)
        )
        assert torch.equal(opened.question_features([question]), executor.question_features([question]))
        torch.testing.assert_close(opened.vision_features([request]), executor.vision_features([request]))
        assert opened.answer(setting) == executor.run([request])[0]


def test_an_opened_request_marks_every_stage(executor, images):
    clock = StageClock(executor.device)
    request = ExecutorRequest("one", images[0], QUESTIONS[0], "vqa2", executor.knob_space.full)
    opened = executor.open(request, clock)
    with pytest.raises(ValueError, match="top_k=3.*outside the knob space"):
        opened.answer(molmo_setting("high", 3, 4))
    output = opened.answer(request.setting, decode_steps=9)
    times = clock.stop("overhead")
    assert tuple(times) == ("overhead", "controller", *executor.stage_names, "decode")
    assert executor.stage_names == ("image_processing", "vision", "llm_prefill")
    assert len(times["decode"]) == 9 and output.output_tokens == 10
    assert all(0 < span < 10_000 for spans in times.values() for span in spans)


def test_warming_up_changes_no_answer_and_prepares_every_shape(tiny_molmo, tiny_processor, knob_space, requests):
    cold, warm = (MolmoExecutor(tiny_molmo, tiny_processor, knob_space, max_new_tokens=6) for _ in range(2))
    prepared, prepare = [], warm.inference.prepare
    warm.inference.prepare = lambda *shape: prepared.append(shape) or prepare(*shape)
    warm.warm_up()
    assert [one.answer for one in warm.run(requests)] == [one.answer for one in cold.run(requests)]
    asked = [warm.count_inputs(request, [request.setting]) for request in requests]
    for counts, request in zip(asked, requests, strict=True):
        [num_views], [vision], [text] = (counts[name] for name in ("num_views", "vision_tokens", "text_tokens"))
        assert (num_views, vision + text) in {shape[:2] for shape in prepared}
        assert request.setting["num_blocks"] in {shape[2] for shape in prepared}


@pytest.fixture(scope="module")
def model_folder(tiny_molmo, tiny_processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_molmo.save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    return folder


def test_an_executor_from_a_folder_answers_as_the_one_it_was_saved_from(executor, model_folder, knob_space, requests):
    loaded = MolmoExecutor.from_pretrained(model_folder, device="cpu", knob_space=knob_space, max_new_tokens=6)
    assert loaded.model.dtype == torch.float32
    assert loaded.run(requests) == executor.run(requests)
    assert loaded.fingerprint == executor.fingerprint


def test_importance_comes_from_the_folder_unless_it_is_given(model_folder, tmp_path):
    (model_folder / "importance.json").write_text('{"1": 0.1, "2": 0.2, "3": 0.3}')
    assert MolmoExecutor.from_pretrained(model_folder, device="cpu").active_blocks(2) == [0, 3]
    other = tmp_path / "other.json"
    other.write_text('{"scores": {"1": 0.1, "2": 0.9, "3": 0.3}, "provenance": {"n": 1}}')
    assert MolmoExecutor.from_pretrained(model_folder, device="cpu", importance=other).active_blocks(2) == [0, 2]
    given = {1: 0.5, 2: 0.2, 3: 0.3}
    assert MolmoExecutor.from_pretrained(model_folder, device="cpu", importance=given).active_blocks(2) == [0, 1]
    (model_folder / "importance.json").unlink()


@pytest.mark.parametrize("model_path", ["no_such_model", "/no/such/folder", "a/b/c", "./checkpoints"])
def test_a_model_that_is_neither_folder_nor_hub_name_is_refused_before_any_download(model_path, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    with pytest.raises(FileNotFoundError, match=f"`model_path` '{model_path}' does not exist: give a model folder"):
        MolmoExecutor.from_pretrained(model_path)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is a folder without a config.json"):
        MolmoExecutor.from_pretrained(tmp_path)


def test_batches_stay_within_their_tokens_and_change_no_answer(executor, tiny_molmo, tiny_processor, requests):
    few = MolmoExecutor(
        tiny_molmo, tiny_processor, executor.knob_space, max_new_tokens=6, batch_size=16, max_batch_tokens=150
    )
    batches = []
    assert few.run(requests, on_batch=batches.append) == executor.run(requests)
    tokens = [[output.counts["vision_tokens"] + output.counts["text_tokens"] for output in batch] for batch in batches]
    assert all(sum(batch) <= 150 or len(batch) == 1 for batch in tokens)
    assert max(map(len, tokens)) > 1, "no batch: the test shows nothing"


def test_images_that_do_not_fit_in_memory_together_are_encoded_in_parts(executor, images, monkeypatch):
    requests = [
        ExecutorRequest(f"sample{index}", image, QUESTIONS[0], "vqa2", molmo_setting("low", 4, 4))
        for index, image in enumerate(images)
    ]
    expected = [encoded.image_features for encoded in executor.encode(requests, "low")]
    executor.forget_images()
    sizes = []

    def two_at_most(some):  # as a small GPU has it
        sizes.append(len(some))
        if len(some) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [executor.inference.image_features(*one) for one in some]

    monkeypatch.setattr(executor.inference, "shares_passes", True)  # as the mode "captured" does
    monkeypatch.setattr(executor.inference, "features_of_images", two_at_most)
    with pytest.warns(UserWarning, match=r"a batch of \d images did not fit in the memory of cpu"):
        found = executor.encode(requests, "low")
    assert sizes[0] == len(images) and max(sizes[2:]) <= 3 and sum(size for size in sizes if size <= 2) == len(images)
    assert all(torch.equal(one.image_features, other) for one, other in zip(found, expected, strict=True))


def test_a_batch_that_does_not_fit_in_memory_is_split_with_a_warning(executor, requests, monkeypatch):
    expected = executor.run(requests)
    generate = executor.generate

    def generate_two_at_most(encoded, *knobs):
        if len(encoded) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(encoded, *knobs)

    monkeypatch.setattr(executor, "generate", generate_two_at_most)
    with pytest.warns(UserWarning, match="a batch of 4 requests did not fit in the memory of cpu"):
        assert executor.run(requests) == expected

    def generate_nothing(encoded, *knobs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(executor, "generate", generate_nothing)
    with pytest.raises(torch.OutOfMemoryError):
        executor.run(requests[:1])


def test_a_cpu_is_not_warmed_up_for_long(executor, monkeypatch):
    opened, open_request = [], executor.open
    monkeypatch.setattr(executor, "open", lambda *args: opened.append(args) or open_request(*args))
    executor.warm_up()
    tilings = len(opened)
    opened.clear()
    monkeypatch.setattr("joint_controller.molmo.executor.warm_up.MOST_CPU_SECONDS", 1e-9)
    executor.warm_up()
    assert len(opened) == 1 < tilings
