import json
from dataclasses import replace

import pytest
import torch

from joint_controller.data import generate_scene, scene_seed
from joint_controller.executor import ExecutorRequest
from joint_controller.molmo import MolmoForConditionalGeneration, MolmoProcessor, build_word_tokenizer
from joint_controller.molmo.embedded.data import TrainingScenes, scene_sizes
from joint_controller.molmo.embedded.model import build_model, build_processor, start_from
from joint_controller.molmo.embedded.train_executor import main, make_parser
from joint_controller.molmo.executor import MolmoExecutor
from joint_controller.molmo.knob_space import build_knob_space


pytestmark = pytest.mark.slow


TINY = {
    "vision_hidden_size": 16,
    "vision_num_blocks": 2,
    "vision_num_heads": 2,
    "vit_layers": "-1 -2",
    "hidden_size": 16,
    "num_blocks": 2,
    "num_heads": 2,
    "num_experts": 4,
    "expert_size": 8,
    "top_k": 2,
    "projector_size": 16,
    "knob_top_k": "1 2",
    "knob_num_blocks": "1 2",
    "images_per_step": 4,
    "pool_size": 8,
    "num_workers": 0,
    "max_steps": 12,
    "learning_rate": 0.01,
    "warmup_steps": 2,
    "effective_experts": 1.9,
    "logging_steps": 3,
    "eval_steps": 12,
    "eval_images": 3,
    "test_images": 3,
    # The rest is as in the recipe, but for what it starts from.
    "bf16": "false",
    "compile": "false",
}


def parse(initial_model=None, **overrides):
    flags = [part for name, value in (TINY | overrides).items() for part in (f"--{name}", *str(value).split())]
    [args] = make_parser().parse_args_and_config(["--config", "recipes/embedded_executor/train.yaml", *flags])
    return [replace(args, initial_model=initial_model)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(request.config.rootpath)
        main(*parse(output_dir=folder))
    return folder


def test_the_recipe_trains_and_the_loss_falls(trained):
    log = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [3, 6, 9, 12]
    assert log[-1]["loss"] < 0.9 * log[0]["loss"]


def test_the_folder_is_a_complete_executor(trained):
    executor = MolmoExecutor.from_pretrained(trained)
    crops = {"low": (1, 3), "medium": (4, 8), "high": (9, 12)}
    assert executor.knob_space == build_knob_space(crops, top_k=(1, 2), num_blocks=(1, 2))
    scene = generate_scene(scene_seed("test", 0))
    request = ExecutorRequest("0", scene.image, scene.questions[0].question, "vqa2", executor.knob_space.cheapest)
    assert executor.run([request])[0].output_tokens >= 1


def test_results_and_card_cover_every_setting_and_question_type(trained):
    results = json.loads((trained / "results.json").read_text())
    assert len(results["settings"]) == 3 * 3 * 2 * 2  # data sets, tiers, top_k, num_blocks
    for row in results["settings"]:
        assert set(row["accuracy_by_type"]) == set(results["questions"][row["dataset"]])
    card = (trained / "README.md").read_text()
    for types in results["questions"].values():
        assert all(f"| {question_type} |" in card for question_type in types)


def test_a_training_starts_from_the_weights_of_another_word_by_word(trained):
    [args] = parse()
    processor = build_processor(args)
    names = [name for name in processor.tokenizer.get_vocab() if name.isalpha()]
    swapped = build_word_tokenizer(sorted({*names, "?", "zebra"}, reverse=True))
    processor = MolmoProcessor(processor.image_processor, swapped)
    model = build_model(args, processor)
    before = model.state_dict()["lm_head.weight"].clone()
    start_from(model, processor, trained)
    other = MolmoForConditionalGeneration.from_pretrained(trained)
    other_words = MolmoProcessor.from_pretrained(trained).tokenizer.get_vocab()
    weights, other_weights = model.state_dict(), other.state_dict()
    for name, value in weights.items():
        if value.shape == other_weights[name].shape:
            torch.testing.assert_close(value, other_weights[name].to(value.dtype), atol=0, rtol=0)
    words = swapped.get_vocab()
    for table in ("lm_head.weight", "model.language_model.embed_tokens.base_embedding"):
        for word in ("red", "smallest", "?"):
            expected = other_weights[table][other_words[word]].to(weights[table].dtype)
            torch.testing.assert_close(weights[table][words[word]], expected, atol=0, rtol=0)
    assert torch.equal(weights["lm_head.weight"][words["zebra"]], before[words["zebra"]])  # not known there


def test_weights_of_nowhere_or_of_another_architecture_are_no_start(trained):
    [args] = parse()
    processor = build_processor(args)
    with pytest.raises(FileNotFoundError, match="no folder 'nowhere'"):
        start_from(build_model(args, processor), processor, "nowhere")
    with pytest.raises(ValueError, match="has no weights .* start from one of the same architecture"):
        start_from(build_model(replace(args, hidden_size=32), processor), processor, trained)


def test_each_batch_of_scenes_has_one_size_and_the_first_are_drawn_larger():
    sizes = scene_sizes(transfer_share=0.25)
    assert sum(sizes.values()) == pytest.approx(1) and sizes[384, 128] + sizes[128, 384] == pytest.approx(0.25)
    scenes = TrainingScenes(AsDrawn(), 400, 2, sizes, largest_size_scale=2.0, curriculum_share=0.5, seed=1)
    assert scenes.sizes[: len(sizes)] == list(sizes)  # each once, then by their shares
    assert 0.15 < sum(max(size) == 384 for size in scenes.sizes) / 400 < 0.35
    assert [scenes[row].size for row in range(20)] == [size for size in scenes.sizes[:10] for _ in range(2)]
    # Twice as large at most at first, and as those of the test after half of them.
    row = next(row for row in range(600, len(scenes)) if scenes.sizes[row // 2] == (128, 128))
    plain = generate_scene(scene_seed("executor", row), image_sizes={(128, 128): 1.0}).image
    assert scenes[row].tobytes() == plain.tobytes()
    plain = generate_scene(scene_seed("executor", 1), image_sizes={scenes.sizes[0]: 1.0}).image
    assert scenes[1].tobytes() != plain.tobytes()


class AsDrawn:
    """In place of a packer: the image alone."""

    def pack(self, asked):
        return asked.image


def test_a_finished_training_is_not_overwritten(trained, monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    weights = (trained / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="holds another training"):
        main(*parse(output_dir=trained))
    assert (trained / "model.safetensors").read_bytes() == weights


def test_more_effective_experts_than_are_chosen_are_refused(tmp_path, monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    with pytest.raises(ValueError, match="`effective_experts` is 7.6"):
        main(*parse(output_dir=tmp_path, effective_experts=7.6))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU is there")
def test_compiling_without_a_gpu_is_refused(tmp_path, monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    with pytest.raises(ValueError, match="there is no GPU"):
        main(*parse(output_dir=tmp_path, compile="true"))
