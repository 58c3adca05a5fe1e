"""Choosing blocks: selections, accuracies of sets, and the search, against brute force on a model of six blocks."""

import copy
import itertools

import numpy as np
import pytest
from PIL import Image

from joint_controller import KnobSetting
from joint_controller.executor import ExecutorRequest
from joint_controller.molmo import MolmoForConditionalGeneration
from joint_controller.molmo.blocks import block_accuracy
from joint_controller.molmo.blocks.block_accuracy import BlockSetAccuracies
from joint_controller.molmo.blocks.block_search import max_sets_searched, search_blocks
from joint_controller.molmo.blocks.block_selection import BlockSelection, random_block_sets
from joint_controller.molmo.executor import MolmoExecutor
from joint_controller.molmo.knob_space import build_knob_space, tier_crops_of


SIZES = range(1, 7)
ALL_SETS = [(0, *rest) for size in SIZES for rest in itertools.combinations(range(1, 6), size - 1)]


@pytest.fixture(scope="module")
def executor(tiny_molmo_config, tiny_processor):
    import torch

    config = copy.deepcopy(tiny_molmo_config)
    config.text_config.num_hidden_layers = 6
    torch.manual_seed(1)
    space = build_knob_space({"low": (1, 1)}, top_k=(1, 3), num_blocks=(2, 4, 6))
    return MolmoExecutor(MolmoForConditionalGeneration(config), tiny_processor, space, max_new_tokens=2, batch_size=4)


@pytest.fixture(scope="module")
def samples(executor):
    """Nine samples. A reference answer is what two sets of blocks that have little in common say, for some of them."""
    generator = np.random.default_rng(0)
    images = [Image.fromarray(generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)) for _ in range(9)]
    rows = []
    for index, image in enumerate(images):
        row = {"sample_id": f"made/{index}", "image": image, "question": "what is the color?", "style": "vqa2"}
        sets = [(0, 1, 4), (0, 3)] if index % 3 else [(0, 2, 5)]
        answers = [answer_alone(executor, row, blocks) for blocks in sets]
        rows.append({**row, "metric": "vqa_accuracy", "answers": answers})
    return rows


def answer_alone(executor, row, blocks):
    """What the model's own `generate` answers to one prompt."""
    inputs = executor.processor(
        images=row["image"], text=row["question"], tier="low", tier_crops=tier_crops_of(executor.knob_space)
    )
    tokens = executor.model.generate(
        **inputs,
        active_blocks=list(blocks),
        top_k=3,
        max_new_tokens=2,
        do_sample=False,
        eos_token_id=0,
        pad_token_id=1,
    )[0, inputs["input_ids"].shape[1] :]
    return executor.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def score(metric, answer, answers):
    """1 for the first reference answer, a half for another one."""
    return {0: 1.0, 1: 0.5}.get(answers.index(answer) if answer in answers else None, 0.0)


@pytest.fixture(scope="module")
def truth(executor, samples):
    """Accuracy of each sample with each of the 32 sets, one prompt at a time."""
    return {
        blocks: [score("", answer_alone(executor, row, blocks), row["answers"]) for row in samples]
        for blocks in ALL_SETS
    }


def best_of(truth, candidates, width=1):
    """The most accurate sets; of equal ones, those whose blocks come first."""
    return sorted(candidates, key=lambda blocks: (-sum(truth[blocks]), blocks))[:width]


def test_accuracies_of_sets_are_those_of_single_prompts(executor, samples, truth):
    measured = BlockSetAccuracies(executor, samples, score).measure(ALL_SETS)
    assert measured.tolist() == list(truth.values())
    assert len(np.unique(measured.mean(axis=1))) > 4, "sets hardly differ: the test shows little"


def test_a_wide_beam_finds_the_best_set_of_each_size(executor, samples, truth):
    found = search_blocks(BlockSetAccuracies(executor, samples, score), list(SIZES), beam_width=10)
    assert found == {size: best_of(truth, [s for s in ALL_SETS if len(s) == size])[0] for size in SIZES}


@pytest.mark.parametrize("width", [1, 2, 3])
def test_a_narrow_beam_follows_so_many_sets(executor, samples, truth, width):
    accuracies = BlockSetAccuracies(executor, samples, score)
    beam, expected, seen = [(0, 1, 2, 3, 4, 5)], {6: (0, 1, 2, 3, 4, 5)}, set()
    for size in (5, 4, 3, 2):
        candidates = {tuple(set(blocks) - {block}) for blocks in beam for block in blocks[1:]}
        candidates = {tuple(sorted(blocks)) for blocks in candidates}
        seen |= candidates
        beam = best_of(truth, candidates, width)
        expected[size] = beam[0]
    assert search_blocks(accuracies, [6, 5, 4, 3, 2], width) == expected
    assert accuracies.num_answered == len(seen) * len(samples), "a set was answered twice"
    assert len(seen) <= max_sets_searched(6, 2, width)


def test_the_search_beats_dropping_single_blocks_where_blocks_stand_in_for_one_another(executor, samples, truth):
    """What the search is for: the ranking by single drops does not give the best pair of blocks here."""
    everything = (0, 1, 2, 3, 4, 5)
    drop = {
        block: sum(truth[everything]) - sum(truth[tuple(b for b in everything if b != block)])
        for block in everything[1:]
    }
    by_score = BlockSelection(6, drop)
    gains = []
    for size in (2, 3, 4):
        found = search_blocks(BlockSetAccuracies(executor, samples, score), [size], beam_width=10)[size]
        gains.append(sum(truth[found]) - sum(truth[tuple(by_score.active_blocks(size))]))
    assert min(gains) >= 0 and max(gains) > 0


def test_equally_accurate_sets_are_chosen_by_their_blocks(executor, samples):
    accuracies = BlockSetAccuracies(executor, samples, lambda *_: 0.3)
    assert search_blocks(accuracies, [2, 4], beam_width=2) == {2: (0, 1), 4: (0, 1, 2, 3)}


def test_what_was_measured_is_kept_through_an_interruption(executor, samples, truth, tmp_path, monkeypatch):
    monkeypatch.setattr(block_accuracy, "SECONDS_BETWEEN_SHARDS", 0)
    generate = executor.generate
    calls = []

    def interrupted(*args):
        # All answers but those of the batch before are on disk: this is what kill -9 would leave.
        kept = BlockSetAccuracies(executor, samples, score, tmp_path)
        assert kept.num_missing(ALL_SETS) <= len(ALL_SETS) * len(samples) - 4 * (len(calls) - len(calls) // 3 * 2)
        calls.append(args)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return generate(*args)

    first = BlockSetAccuracies(executor, samples, score, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(executor, "generate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            search_blocks(first, [3], beam_width=2)
    assert 0 < first.num_answered < 5 * len(samples)

    again = BlockSetAccuracies(executor, samples, score, tmp_path)
    found = search_blocks(again, [3], beam_width=2)
    whole = BlockSetAccuracies(executor, samples, score)
    assert found == search_blocks(whole, [3], beam_width=2)
    assert first.num_answered + again.num_answered == whole.num_answered, "an answer was lost or computed twice"
    finished = BlockSetAccuracies(executor, samples, score, tmp_path)
    assert search_blocks(finished, [3], beam_width=2) == found and finished.num_answered == 0
    # More samples: only these are answered.
    assert BlockSetAccuracies(executor, samples[:5], score, tmp_path).num_missing([found[3]]) == 0
    half_written = tmp_path / "accuracies-1.parquet.tmp"
    half_written.write_bytes(b"PAR1")
    BlockSetAccuracies(executor, samples, score, tmp_path)


def test_samples_are_encoded_once(executor, samples, monkeypatch):
    encoded = []
    encode = executor.encode
    monkeypatch.setattr(executor, "encode", lambda requests, tier: encoded.extend(requests) or encode(requests, tier))
    accuracies = BlockSetAccuracies(executor, samples, score)
    search_blocks(accuracies, [2], beam_width=3)
    assert [request.sample_id for request in encoded] == [row["sample_id"] for row in samples]


def test_accuracies_of_other_executors_and_broken_files_are_refused(executor, samples, tmp_path):
    BlockSetAccuracies(executor, samples, score, tmp_path).measure([(0, 1)])
    other = MolmoExecutor(executor.model, executor.processor, executor.knob_space, max_new_tokens=5)
    with pytest.raises(ValueError, match="holds accuracies of another executor"):
        BlockSetAccuracies(other, samples, score, tmp_path)
    ranked = MolmoExecutor(
        executor.model,
        executor.processor,
        executor.knob_space,
        importance={1: 3.0, 2: 2.0, 3: 1, 4: 4, 5: 0},
        max_new_tokens=2,
    )
    assert BlockSetAccuracies(ranked, samples, score, tmp_path).num_missing([(0, 1)]) == 0, (
        "which blocks it runs matters"
    )
    [shard] = tmp_path.glob("*.parquet")
    shard.write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="is not a readable Parquet file"):
        BlockSetAccuracies(executor, samples, score, tmp_path)


def test_samples_that_cannot_be_measured_are_refused(executor, samples):
    with pytest.raises(ValueError, match="no samples"):
        BlockSetAccuracies(executor, [], score)
    with pytest.raises(ValueError, match="sample 'made/0' has no reference answers"):
        BlockSetAccuracies(executor, [{**samples[0], "answers": []}], score)
    with pytest.raises(ValueError, match="two samples have the id 'made/1'"):
        BlockSetAccuracies(executor, [samples[0], samples[1], samples[1]], score)


@pytest.mark.parametrize(
    ("counts", "width", "message"),
    [([2], 0, "`beam_width` is 0"), ([], 1, "give at least one"), ([0], 1, "no set of 0 blocks"), ([7], 1, "1 to 6")],
)
def test_searches_for_what_there_is_not_are_refused(executor, samples, counts, width, message):
    with pytest.raises(ValueError, match=message):
        search_blocks(BlockSetAccuracies(executor, samples, score), counts, width)


def test_the_number_of_sets_of_a_search_by_hand():
    # 16 blocks down to 12, greedily: 15 + 14 + 13 + 12 sets.
    assert max_sets_searched(16, 12, 1) == 54
    # Beam of 4: 15, then 4 of 15 sets have 14 neighbours each, which is more than the 91 sets there are... 56, 52, 48.
    assert max_sets_searched(16, 12, 4) == 15 + 56 + 52 + 48
    # 8 blocks, all sets: 7 + 21 + 35 + 35.
    assert max_sets_searched(8, 4, 100) == 98


# ---- selections -----------------------------------------------------------------------------------------------------


def test_a_selection_prefers_its_sets_to_its_scores():
    scores = {0: 0.0, 1: 0.1, 2: 0.3, 3: 0.1}
    assert [BlockSelection(4).active_blocks(n) for n in (1, 2, 3)] == [[0], [0, 1], [0, 1, 2]]
    by_score = BlockSelection(4, scores)
    assert [by_score.active_blocks(n) for n in (1, 2, 3)] == [[0], [0, 2], [0, 1, 2]]
    searched = BlockSelection(4, scores, {2: (3, 0)})
    assert [searched.active_blocks(n) for n in (1, 2, 3)] == [[0], [0, 3], [0, 1, 2]]
    # Blocks without a score always run; a set may be smaller.
    some = BlockSelection(4, {1: 0.1}, {2: (0, 1)})
    assert some.counts == [2, 3, 4] and some.required_blocks == [0, 2, 3]
    assert some.active_blocks(2) == [0, 1] and some.active_blocks(3) == [0, 2, 3]
    with pytest.raises(ValueError, match="`num_blocks` is 1"):
        some.active_blocks(1)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ({2: (0, 4)}, r"block set of 2 names the blocks \[4\] but the executor has the blocks 0 to 3"),
        ({2: (1, 2)}, "the block set of 2 is .*block 0 among them"),
        ({2: (0, 1, 2)}, "name 2 blocks"),
        ({3: (0, 1, 1)}, "each once"),
    ],
)
def test_sets_that_cannot_run_are_refused(sets, message):
    with pytest.raises(ValueError, match=message):
        BlockSelection(4, None, sets)


def test_random_sets_are_uniform_and_repeat():
    drawn = random_block_sets(6, 3, 4000, seed=5)
    assert drawn[:20] == random_block_sets(6, 3, 20, seed=5) != random_block_sets(6, 3, 20, seed=6)
    counts = {blocks: drawn.count(blocks) for blocks in ALL_SETS if len(blocks) == 3}
    assert sum(counts.values()) == 4000, "a set lacks block 0, or is not a set of 3"
    # 10 sets, 400 each: a binomial's standard deviation is 19.
    assert all(abs(count - 400) < 5 * 19 for count in counts.values())


def test_searched_sets_and_scores_of_data_sets_decide_what_a_request_runs(executor):
    image = Image.fromarray(np.random.default_rng(3).integers(0, 256, (40, 40, 3), dtype=np.uint8))

    def request(sample_id, num_blocks):
        setting = KnobSetting(tier="low", top_k=3, num_blocks=num_blocks)
        return ExecutorRequest(sample_id, image, "what is the color?", "vqa2", setting)

    selections = {
        "first": BlockSelection(6, dict.fromkeys(range(6), 0.0) | {5: 1.0}),
        "second": BlockSelection(6, None, {4: (0, 2, 3, 5)}),
        "default": BlockSelection(6),
    }
    expected = {
        "first/train/1": {2: (0, 5), 4: (0, 1, 2, 5)},
        "second/train/1": {2: (0, 1), 4: (0, 2, 3, 5)},
        "third/train/1": {2: (0, 1), 4: (0, 1, 2, 3)},
        "request-1": {2: (0, 1), 4: (0, 1, 2, 3)},
    }
    mixed = MolmoExecutor(executor.model, executor.processor, executor.knob_space, selections, max_new_tokens=2)
    requests = [request(sample_id, count) for sample_id, sets in expected.items() for count in sets]
    for one, output in zip(requests, mixed.run(requests), strict=True):
        blocks = expected[one.sample_id][one.setting["num_blocks"]]
        assert mixed.active_blocks(one.setting["num_blocks"], one.sample_id) == list(blocks)
        row = {"image": one.image, "question": one.question}
        assert output.answer == answer_alone(executor, row, blocks)

    prints = {mixed.fingerprint, executor.fingerprint}
    for others in (selections["first"], selections["second"], {**selections, "second": selections["first"]}):
        prints.add(
            MolmoExecutor(
                executor.model, executor.processor, executor.knob_space, others, max_new_tokens=2
            ).fingerprint
        )
    assert len(prints) == 5, "different choices of blocks share a fingerprint"
    assert mixed.model_fingerprint == executor.model_fingerprint

    del selections["default"]
    strict = MolmoExecutor(executor.model, executor.processor, executor.knob_space, selections, max_new_tokens=2)
    with pytest.raises(ValueError, match="'third/train/1' is of none of them: give importance scores for 'default'"):
        strict.run([request("third/train/1", 4)])
