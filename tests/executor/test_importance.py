"""Importance scores: reading, writing and measuring them."""

import json

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPVisionConfig, OlmoeConfig

from joint_controller import KnobSpace, MolmoConfig, MolmoForConditionalGeneration
from joint_controller.executor import (
    ExecutorRequest,
    MolmoExecutor,
    load_importance,
    measure_importance,
    save_importance,
)


@pytest.fixture(scope="module")
def executor(tiny_molmo, tiny_processor):
    space = KnobSpace({"low": (1, 1), "high": (2, 4)}, top_k=(1, 3), num_blocks=(1, 2, 3, 4))
    return MolmoExecutor(tiny_molmo, tiny_processor, space, max_new_tokens=3, batch_size=4)


@pytest.fixture(scope="module")
def samples(executor):
    """Ten samples, whose reference answers are what the executor says at the full setting for seven of them."""
    generator = np.random.default_rng(0)
    images = [Image.fromarray(generator.integers(0, 256, (48, 48, 3), dtype=np.uint8)) for _ in range(10)]
    requests = [
        ExecutorRequest(str(index), image, "what is the color?", "vqa2", executor.knob_space.full)
        for index, image in enumerate(images)
    ]
    return [
        {
            "sample_id": request.sample_id,
            "image": request.image,
            "question": request.question,
            "style": request.style,
            "metric": "vqa_accuracy",
            "answers": [output.answer if index < 7 else "something else"],
        }
        for index, (request, output) in enumerate(zip(requests, executor.run(requests), strict=True))
    ]


def exact_match(metric, answer, answers):
    assert metric == "vqa_accuracy"
    return float(answer in answers)


def test_importance_is_the_accuracy_lost_without_the_block(executor, samples, tiny_molmo, tiny_processor):
    scores, accuracy = measure_importance(executor, samples, exact_match)
    assert accuracy == pytest.approx(0.7)
    assert sorted(scores) == [0, 1, 2, 3]
    for block, score in scores.items():
        correct = 0
        for sample in samples:
            inputs = tiny_processor(
                images=sample["image"], text=sample["question"], tier="high", tier_crops=executor.knob_space.tier_crops
            )
            tokens = tiny_molmo.generate(
                **inputs,
                active_blocks=[other for other in range(4) if other != block],
                top_k=3,
                max_new_tokens=3,
                do_sample=False,
                eos_token_id=0,
                pad_token_id=1,
            )[0, inputs["input_ids"].shape[1] :]
            correct += tiny_processor.tokenizer.decode(tokens, skip_special_tokens=True).strip() in sample["answers"]
        assert score == pytest.approx(0.7 - correct / 10)
    assert any(score > 0 for score in scores.values()), "no block matters: the test shows nothing"


def test_measuring_importance_of_nothing_is_refused(executor, samples):
    with pytest.raises(ValueError, match="no samples"):
        measure_importance(executor, [], exact_match)
    with pytest.raises(ValueError, match="sample '0' has no reference answers"):
        measure_importance(executor, [{**samples[0], "answers": []}], exact_match)


def test_saved_scores_are_read_back_with_their_provenance_beside_them(tmp_path):
    path = tmp_path / "folder" / "importance.json"
    save_importance(path, {1: 0.25, 0: 0.5}, {"num_samples": 10})
    assert load_importance(path) == {0: 0.5, 1: 0.25}
    assert json.loads(path.read_text())["provenance"] == {"num_samples": 10}


def test_published_tables_are_read(shared_dir):
    folder = shared_dir / "molmo" / "molmoe-1b"
    recommended = load_importance(folder / "block_importance_recommended.json")
    assert len(recommended) == 16 and recommended[0] == 0.56 and recommended[4] == 0.001
    measured = load_importance(folder / "block_importance_coco_2014_vqa_accuracy_drop.json")
    assert sorted(measured) == list(range(1, 15))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[0.1, 0.2]", "holds no scores"),
        ("{}", "holds no scores"),
        ('{"block 0": 0.1}', "has the entry 'block 0': 0.1"),
        ('{"0": "high"}', "has the entry '0': 'high'"),
        ('{"0": NaN}', "has the entry '0': nan"),
        ('{"scores": {"0": true}}', "has the entry '0': True"),
    ],
)
def test_files_without_scores_are_refused_with_the_entry(tmp_path, content, message):
    path = tmp_path / "importance.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_importance(path)


def test_a_missing_file_is_refused_with_its_path(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.json' does not exist"):
        load_importance(tmp_path / "none.json")


def test_fewest_blocks_of_the_published_table_keep_the_first_and_the_last(shared_dir, tiny_processor):
    """The published method never drops the first and the last block: its table scores only those between."""
    config = MolmoConfig(
        text_config=OlmoeConfig(
            vocab_size=64, hidden_size=8, intermediate_size=4, num_hidden_layers=16, num_attention_heads=2
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=4
        ),
        vit_layers=[-1],
    )
    scores = load_importance(shared_dir / "molmo" / "molmoe-1b" / "block_importance_coco_2014_vqa_accuracy_drop.json")
    executor = MolmoExecutor(MolmoForConditionalGeneration(config), tiny_processor, importance=scores)
    # By hand from the table: blocks 3 (0.009), 4 (0.016), 7 (0.016) and 12 (0.019) cost least.
    assert executor.active_blocks(12) == [0, 1, 2, 5, 6, 8, 9, 10, 11, 13, 14, 15]
