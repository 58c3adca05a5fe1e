"""Importance scores: reading, writing and measuring them."""

import json
import math
import statistics

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, OlmoeConfig

from joint_controller.executor import ExecutorRequest
from joint_controller.molmo import MolmoConfig, MolmoForConditionalGeneration
from joint_controller.molmo.blocks.block_accuracy import BlockSetAccuracies
from joint_controller.molmo.blocks.importance import bootstrap_intervals, measure_accuracy_drop, measure_hidden_change
from joint_controller.molmo.blocks.importance_files import load_block_sets, load_importance, save_importance
from joint_controller.molmo.executor import MolmoExecutor
from joint_controller.molmo.knob_space import build_knob_space, tier_crops_of


@pytest.fixture(scope="module")
def executor(tiny_molmo, tiny_processor):
    space = build_knob_space({"low": (1, 1), "high": (2, 4)}, top_k=(1, 3), num_blocks=(1, 2, 3, 4))
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


def answers_of_the_model(sample, executor, active_blocks):
    """What the model's own `generate` answers."""
    inputs = executor.processor(
        images=sample["image"], text=sample["question"], tier="high", tier_crops=tier_crops_of(executor.knob_space)
    )
    tokens = executor.model.generate(
        **inputs,
        active_blocks=active_blocks,
        top_k=3,
        max_new_tokens=3,
        do_sample=False,
        eos_token_id=0,
        pad_token_id=1,
    )[0, inputs["input_ids"].shape[1] :]
    return executor.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def test_accuracy_drop_is_the_accuracy_lost_without_the_block(executor, samples):
    accuracies = BlockSetAccuracies(executor, samples, exact_match)
    found = measure_accuracy_drop(accuracies)
    assert accuracies.measure([[0, 1, 2, 3]]).mean() == pytest.approx(0.7)
    assert sorted(found.scores) == [0, 1, 2, 3]
    for block, score in found.scores.items():
        others = [other for other in range(4) if other != block]
        correct = [answers_of_the_model(sample, executor, others) in sample["answers"] for sample in samples]
        assert score == pytest.approx(0.7 - np.mean(correct))
        drops = [float(index < 7) - float(right) for index, right in enumerate(correct)]
        assert found.standard_errors[block] == pytest.approx(statistics.stdev(drops) / 10**0.5)
        lower, upper = found.intervals[block]
        assert -1 <= lower <= score <= upper <= 1
    assert any(score > 0 for score in found.scores.values()), "no block matters: the test shows nothing"


def test_scores_of_some_samples_are_those_measured_on_these_alone(executor, samples):
    of_all = measure_accuracy_drop(BlockSetAccuracies(executor, samples, exact_match), seed=7)
    alone = measure_accuracy_drop(BlockSetAccuracies(executor, samples[4:], exact_match), seed=7)
    some = of_all.of_samples(range(4, 10))
    assert some.scores == alone.scores and some.intervals == alone.intervals
    assert some.standard_errors == alone.standard_errors


def test_hidden_change_is_one_minus_the_cosine_of_a_blocks_input_and_output(executor, samples, tiny_molmo):
    """Against transformers' own hidden states, sample by sample, in double precision."""
    accuracies = BlockSetAccuracies(executor, samples[:3], exact_match)
    found = measure_hidden_change(executor, accuracies.encoded)
    assert accuracies.num_answered == 0
    expected = []
    for sample in samples[:3]:
        inputs = executor.processor(
            images=sample["image"], text=sample["question"], tier="high", tier_crops=tier_crops_of(executor.knob_space)
        )
        states = []
        hooks = [
            layer.register_forward_hook(lambda _, given, made, states=states: states.append((given[0], made)))
            for layer in tiny_molmo.model.language_model.layers
        ]
        with torch.no_grad():
            tiny_molmo(**inputs, top_k=3)
        for hook in hooks:
            hook.remove()
        of_blocks = []
        for before, after in states:
            before, after = before[0].double(), after[0].double()
            cosines = [(x @ y / (x.norm() * y.norm())).item() for x, y in zip(before, after, strict=True)]
            of_blocks.append(1 - sum(cosines) / len(cosines))
        expected.append(of_blocks)
    for block in range(4):
        column = [row[block] for row in expected]
        assert found.scores[block] == pytest.approx(statistics.mean(column), abs=1e-5)
        assert found.standard_errors[block] == pytest.approx(statistics.stdev(column) / 3**0.5, abs=1e-5)
    assert len(set(found.scores.values())) == 4 and min(found.scores.values()) > 1e-3
    assert not any(layer._forward_hooks for layer in tiny_molmo.model.language_model.layers), "hooks are left behind"


def binomial_quantile(probability, n, share):
    """Smallest k with P(X <= k) >= share, X ~ Binomial(n, probability)."""
    total = 0.0
    for k in range(n + 1):
        total += math.comb(n, k) * probability**k * (1 - probability) ** (n - k)
        if total >= share:
            return k


def test_bootstrap_intervals_are_those_of_the_binomial_distribution():
    """Resampling n samples of which k are 1 draws Binomial(n, k / n) ones: its quantiles are known."""
    for n, ones in ((40, 30), (100, 5), (9, 9)):
        values = np.zeros((n, 1))
        values[:ones] = 1
        [[lower, upper]] = bootstrap_intervals(values, num_resamples=20000)
        assert lower == pytest.approx(binomial_quantile(ones / n, n, 0.025) / n, abs=1.01 / n)
        assert upper == pytest.approx(binomial_quantile(ones / n, n, 0.975) / n, abs=1.01 / n)


def test_bootstrap_intervals_of_many_samples_are_those_of_the_normal_distribution():
    values = np.random.default_rng(0).exponential(size=(2000, 1))
    [[lower, upper]] = bootstrap_intervals(values, num_resamples=20000)
    error = values.std() / 2000**0.5
    assert lower == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert upper == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)


def test_the_bootstrap_is_paired_and_repeats():
    """A draw counts in all columns: a difference of columns that is the same in every sample has no spread."""
    first = np.random.default_rng(1).normal(size=50)
    values = np.stack([first, first + 0.25], axis=1)
    intervals = bootstrap_intervals(values, seed=3)
    assert intervals[1] - intervals[0] == pytest.approx([0.25, 0.25])
    assert (intervals == bootstrap_intervals(values, seed=3)).all()
    assert (intervals != bootstrap_intervals(values, seed=4)).any()
    with pytest.raises(ValueError, match="2 samples or more of each data set, but there is 1"):
        bootstrap_intervals(values[:1])


def test_saved_scores_are_read_back_with_their_provenance_beside_them(tmp_path):
    path = tmp_path / "folder" / "importance.json"
    save_importance(path, {1: 0.25, 0: 0.5}, {"num_samples": 10})
    assert load_importance(path) == {0: 0.5, 1: 0.25}
    assert json.loads(path.read_text()) == {"scores": {"0": 0.5, "1": 0.25}, "provenance": {"num_samples": 10}}
    assert load_block_sets(path) == {}
    sure = {"standard_errors": {0: 0.1, 1: 0.2}, "intervals": {0: (0.3, 0.7), 1: (-0.1, 0.6)}}
    save_importance(path, {1: 0.25, 0: 0.5}, {}, **sure, block_sets={2: (0, 3), 1: (0,)})
    assert load_importance(path) == {0: 0.5, 1: 0.25}
    assert load_block_sets(path) == {1: [0], 2: [0, 3]}
    table = json.loads(path.read_text())
    assert table["standard_errors"] == {"0": 0.1, "1": 0.2} and table["intervals_95"]["1"] == [-0.1, 0.6]


def test_published_tables_are_read(shared_dir):
    folder = shared_dir / "molmo" / "molmoe-1b"
    recommended = load_importance(folder / "block_importance_recommended.json")
    assert len(recommended) == 16 and recommended[0] == 0.56 and recommended[4] == 0.001
    measured = load_importance(folder / "block_importance_coco_2014_vqa_accuracy_drop.json")
    assert sorted(measured) == list(range(1, 15))
    assert load_block_sets(folder / "block_importance_recommended.json") == {}


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


@pytest.mark.parametrize("sets", ["[[0, 1]]", '{"two": [0, 1]}', '{"2": "0 1"}', '{"2": [0, true]}'])
def test_block_sets_that_are_none_are_refused(tmp_path, sets):
    path = tmp_path / "importance.json"
    path.write_text(f'{{"scores": {{"0": 1, "1": 0.5}}, "block_sets": {sets}}}')
    with pytest.raises(ValueError, match="expected number of blocks → blocks"):
        load_block_sets(path)


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
