"""The store of outcomes, through kills and between processes; and the collector over a real executor."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from datasets import Features, Value, load_dataset
from molmo_knobs import molmo_setting, molmo_space
from PIL import Image

from joint_controller import Knob, KnobSpace
from joint_controller.data import load_vqa_datasets, read_samples
from joint_controller.evaluation.scoring import score_answer
from joint_controller.executor import load_executor
from joint_controller.latency import RecordedLatencies
from joint_controller.molmo.executor import MolmoExecutor
from joint_controller.outcomes import (
    Outcome,
    OutcomeCollector,
    OutcomeStore,
    RecordedOutcomes,
    outcome_features,
    shipped_outcomes,
)


SPACE = molmo_space({"low": (1, 1), "high": (4, 4)}, top_k=(2, 4), num_blocks=(3, 4))
SETTING = molmo_setting("low", 2, 3)
OTHER = molmo_setting("high", 4, 4)
COUNTS = {"num_views": 2, "vision_tokens": 44, "text_tokens": 15}
METRICS = {"answer0": "vqa_accuracy", "answer1": "anls", "answer2": "exact_count"}


def outcome(sample_id, setting=SETTING, answer="red", accuracy=1 / 3):
    return Outcome(sample_id, setting, answer, accuracy, COUNTS, output_tokens=2)


def test_outcomes_are_found_again_by_sample_and_setting(tmp_path):
    store = OutcomeStore(tmp_path / "outcomes", "executor", SPACE)
    store.add([outcome("a"), outcome("b", OTHER, "größer ≠ \n 2", 0.1)])
    store.add([outcome("a", OTHER)])
    for opened in (store, OutcomeStore(tmp_path / "outcomes", "executor", SPACE)):
        assert len(opened) == 3
        assert opened.get("a", SETTING) == outcome("a")
        assert opened.get("b", OTHER) == outcome("b", OTHER, "größer ≠ \n 2", 0.1)
        assert opened.get("b", SETTING) is None
        assert ("a", OTHER) in opened and ("c", SETTING) not in opened


def test_a_store_without_a_path_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = OutcomeStore(None, "executor", SPACE)
    store.add([outcome("a")])
    store.compact()
    assert store.get("a", SETTING) == outcome("a")
    assert list(tmp_path.iterdir()) == []


def test_what_is_known_stays_and_is_not_written_again(tmp_path):
    store = OutcomeStore(tmp_path, "executor", SPACE)
    store.add([outcome("a"), outcome("a", answer="blue")])
    store.add([outcome("a", answer="green")])
    store.add([])
    assert store.get("a", SETTING).answer == "red"
    assert len(list(tmp_path.iterdir())) == 1


def test_outcomes_of_other_folders_are_looked_up_but_not_written(tmp_path):
    OutcomeStore(tmp_path / "known", "executor", SPACE).add([outcome("a"), outcome("a", OTHER, "blue")])
    before = {path.name: path.read_bytes() for path in (tmp_path / "known").iterdir()}
    store = OutcomeStore(tmp_path / "outcomes", "executor", SPACE, known=[tmp_path / "known"])
    assert len(store) == 2 and store.get("a", OTHER) == outcome("a", OTHER, "blue") and ("b", SETTING) not in store
    store.add([outcome("a", answer="green")])
    assert list((tmp_path / "outcomes").iterdir()) == []  # nothing new
    store.add([outcome("b")])
    store.add([outcome("c")])
    store.compact()
    assert len(store) == 4 and len(OutcomeStore(tmp_path / "outcomes", "executor", SPACE)) == 2
    assert {path.name: path.read_bytes() for path in (tmp_path / "known").iterdir()} == before


def test_known_outcomes_of_another_executor_are_left_out_and_those_of_nowhere_refused(tmp_path, caplog):
    OutcomeStore(tmp_path / "known", "another", SPACE).add([outcome("a")])
    store = OutcomeStore(tmp_path / "outcomes", "executor", SPACE, known=[tmp_path / "known"])
    assert len(store) == 0 and "of another executor: they are not used" in caplog.text
    other_knobs = KnobSpace([Knob("depth", (4, 8), stage=2)])
    store = OutcomeStore(tmp_path / "others", "another", other_knobs, known=[tmp_path / "known"])
    assert len(store) == 0 and caplog.text.count("they are not used") == 2
    with pytest.raises(FileNotFoundError, match=r"no folder of outcomes 'nowhere'.*one that ships \(embedded\)"):
        OutcomeStore(tmp_path / "outcomes", "executor", SPACE, known=["nowhere"])


def test_shipped_outcomes_are_the_executors_own():
    """Some of them, answered again."""
    executor = load_executor("embedded", max_new_tokens=2)
    store = OutcomeStore(None, executor.fingerprint, executor.knob_space, known=shipped_outcomes())
    dataset = load_vqa_datasets(["easy_vqa", "scenes"], "train", 3072, seed=42, weights=[1, 3])
    settings = list(executor.knob_space)
    assert len(store) == len(dataset) * len(settings)
    samples = read_samples(dataset.select(range(0, len(dataset), 400)))
    pairs = [(sample, settings[(7 * row + shift) % 48]) for row, sample in enumerate(samples) for shift in (0, 23)]
    again = OutcomeCollector(executor, OutcomeStore(None, executor.fingerprint, executor.knob_space), score_answer)
    answered = again.collect(*map(list, zip(*pairs, strict=True)))
    assert again.num_executed == len(pairs)
    for (sample, setting), new in zip(pairs, answered, strict=True):
        assert store.get(sample["sample_id"], setting) == new


def test_another_executor_is_refused_and_nothing_is_lost(tmp_path):
    OutcomeStore(tmp_path, "a" * 64, SPACE).add([outcome("a")])
    with pytest.raises(ValueError, match="outcomes of another executor: fingerprint aaaaaaaaaaaa, .* bbbbbbbbbbbb"):
        OutcomeStore(tmp_path, "b" * 64, SPACE)
    assert len(OutcomeStore(tmp_path, "a" * 64, SPACE)) == 1


def test_foreign_and_broken_files_are_refused_by_name(tmp_path):
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match="broken.parquet' is not a readable Parquet file"):
        OutcomeStore(tmp_path, "executor", SPACE)
    broken.unlink()
    OutcomeStore(None, "executor", SPACE).to_dataset().remove_columns("answer").to_parquet(
        tmp_path / "foreign.parquet"
    )
    with pytest.raises(ValueError, match="foreign.parquet' has no column 'answer'"):
        OutcomeStore(tmp_path, "executor", SPACE)


def test_the_table_is_a_data_set_in_order_and_the_shards_load_as_one(tmp_path):
    store = OutcomeStore(tmp_path, "executor", SPACE)
    store.add([outcome("b"), outcome("a", SETTING)])
    store.add([outcome("a", OTHER)])
    table = store.to_dataset()
    assert table.features == outcome_features(SPACE, list(COUNTS))
    texts = {name: Value("string") for name in ("sample_id", "tier", "answer", "executor_fingerprint")}
    numbers = {name: Value("float64") for name in ("accuracy", "latency_ms")}
    counts = {name: Value("int32") for name in ("top_k", "num_blocks", *COUNTS, "output_tokens")}
    assert table.features == Features({**texts, **numbers, **counts})
    assert list(zip(table["sample_id"], table["tier"], strict=True)) == [("a", "high"), ("a", "low"), ("b", "low")]
    loaded = load_dataset(
        "parquet", data_files=str(tmp_path / "*.parquet"), split="train", cache_dir=tmp_path / "cache"
    )
    assert sorted(loaded.to_list(), key=str) == sorted(table.to_list(), key=str)


def test_measured_latencies_are_kept(tmp_path):
    store = OutcomeStore(tmp_path, "executor", SPACE)
    store.add([replace(outcome("a"), latency_ms=12.5), outcome("b")])
    opened = OutcomeStore(tmp_path, "executor", SPACE)
    assert opened.get("a", SETTING).latency_ms == 12.5 and opened.get("b", SETTING).latency_ms is None


def test_knobs_and_counts_of_any_names_are_columns_and_those_of_others_are_refused(tmp_path):
    space = KnobSpace([Knob("palette", ("gray", "color"), stage=2), Knob("threshold", (0.25, 0.5), stage=1)])
    store = OutcomeStore(tmp_path, "executor", space)
    known = Outcome("a", space.full, "red", 1.0, {"pixels": 640, "prompt_tokens": 7}, 2)
    store.add([known])
    assert OutcomeStore(tmp_path, "executor", space).get("a", space.full) == known
    assert store.to_dataset().features == outcome_features(space, ["pixels", "prompt_tokens"])
    with pytest.raises(ValueError, match=r"no column 'tier' .* keep nothing but outcomes over the knobs tier, top_k"):
        OutcomeStore(tmp_path, "executor", SPACE)
    with pytest.raises(ValueError, match="two columns `pixels`"):
        outcome_features(KnobSpace([Knob("pixels", (1, 2), stage=1)]), ["pixels"])
    with pytest.raises(ValueError, match="two columns `accuracy`"):
        outcome_features(KnobSpace([Knob("accuracy", (1, 2), stage=1)]), [])


def test_without_an_estimator_latencies_are_the_measured_ones():
    outcomes = [replace(outcome("a"), latency_ms=12.5), replace(outcome("b"), latency_ms=7.0)]
    assert RecordedLatencies().latency_ms(outcomes).tolist() == [12.5, 7.0]
    with pytest.raises(ValueError, match="latency of sample 'c' at tier=low top_k=2 num_blocks=3 was not measured"):
        RecordedLatencies().latency_ms([*outcomes, outcome("c")])


def test_recorded_outcomes_are_looked_up_and_a_missing_one_is_named():
    store = OutcomeStore(None, "recorded", SPACE)
    store.add([outcome("a"), outcome("a", OTHER, answer="blue"), outcome("b")])
    collector = RecordedOutcomes(store, SPACE)
    samples = [{"sample_id": "a"}, {"sample_id": "b"}, {"sample_id": "a"}]
    assert collector.collect(samples, [OTHER, SETTING, SETTING]) == [
        outcome("a", OTHER, answer="blue"),
        outcome("b"),
        outcome("a"),
    ]
    with pytest.raises(ValueError, match="no outcome was recorded for sample 'b' at tier=high top_k=4 num_blocks=4"):
        collector.collect(samples[:2], [OTHER, OTHER])
    with pytest.raises(ValueError, match="3 samples but 1 settings"):
        collector.collect(samples, [OTHER])


def test_processes_that_share_a_folder_see_each_other_after_reload(tmp_path):
    first, second = OutcomeStore(tmp_path, "executor", SPACE), OutcomeStore(tmp_path, "executor", SPACE)
    first.add([outcome("a")])
    second.add([outcome("b")])
    assert second.get("a", SETTING) is None
    second.reload()
    first.reload()
    assert len(first) == len(second) == 2


def test_compacting_leaves_one_shard_while_others_write_and_read(tmp_path):
    first, second = OutcomeStore(tmp_path, "executor", SPACE), OutcomeStore(tmp_path, "executor", SPACE)
    for index in range(5):
        first.add([outcome(f"first{index}")])
    second.add([outcome("second")])  # not known to the first store
    first.compact()
    assert len(list(tmp_path.iterdir())) == 2
    first.add([outcome("later")])
    second.reload()
    first.reload()
    first.compact()
    assert len(list(tmp_path.iterdir())) == 1
    second.add([outcome("last")])
    second.compact()
    first.reload()
    assert len(first) == len(second) == len(OutcomeStore(tmp_path, "executor", SPACE)) == 8


def test_a_shard_that_is_compacted_away_while_the_folder_is_read_is_no_loss(tmp_path, monkeypatch):
    writer = OutcomeStore(tmp_path, "executor", SPACE)
    writer.add([outcome("a")])
    writer.add([outcome("b")])
    reader = OutcomeStore(None, "executor", SPACE)
    reader.path = tmp_path
    listed = sorted(tmp_path.glob("*.parquet"))
    writer.compact()
    glob = type(tmp_path).glob
    listings = iter([listed])
    monkeypatch.setattr(type(tmp_path), "glob", lambda path, pattern: next(listings, None) or glob(path, pattern))
    reader.reload()
    assert len(reader) == 2


WRITER = """
import sys
from joint_controller import Knob, KnobSpace
from joint_controller.data import load_vqa_datasets, read_samples
from joint_controller.evaluation.scoring import score_answer
from joint_controller.executor import load_executor
from joint_controller.outcomes import Outcome, OutcomeStore
space = KnobSpace([Knob("tier", ("low", "high"), 1), Knob("top_k", (2, 4), 2), Knob("num_blocks", (3, 4), 2)])
counts = {"num_views": 2, "vision_tokens": 44, "text_tokens": 15}
store = OutcomeStore(sys.argv[1], "executor", space)
for shard in range(100_000):
    store.add([Outcome(f"{sys.argv[2]}-{shard}-{row}", space.cheapest, "red", 1.0, counts, 2) for row in range(50)])
    print(shard, flush=True)
    if shard % 10 == 9:
        store.reload()
        store.compact()
"""


@pytest.mark.slow
def test_two_writers_that_are_killed_lose_nothing_that_was_added(tmp_path):
    folder = tmp_path / "outcomes"
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, folder, name], stdout=subprocess.PIPE, text=True)
        for name in ("first", "second")
    ]
    added = {}
    for name, writer in zip(("first", "second"), writers, strict=True):
        # Shards are compacted every ten, so by then both have done so.
        for shard in range(12):
            assert writer.stdout.readline() == f"{shard}\n"
        added[name] = 11
    time.sleep(0.5)
    for name, writer in zip(("first", "second"), writers, strict=True):
        os.kill(writer.pid, signal.SIGKILL)
        lines = writer.communicate()[0].split()
        assert writer.returncode == -signal.SIGKILL
        added[name] = int(lines[-1]) if lines else added[name]
    (folder / "outcomes-1-killed-000000.parquet.tmp").write_bytes(b"half a shard")
    store = OutcomeStore(folder, "executor", SPACE)
    for name, last in added.items():
        for shard in range(last + 1):
            assert all(store.get(f"{name}-{shard}-{row}", SPACE.cheapest) is not None for row in range(50))


@pytest.fixture(scope="module")
def executor(tiny_molmo, tiny_processor):
    return MolmoExecutor(tiny_molmo, tiny_processor, SPACE, max_new_tokens=3, batch_size=2)


@pytest.fixture(scope="module")
def samples():
    generator = np.random.default_rng(0)
    return [
        {
            "sample_id": f"sample{index}",
            "image": Image.fromarray(generator.integers(0, 256, (48, 48, 3), dtype=np.uint8)),
            "question": "what color is the star?",
            "answers": [f"answer{index}"] * 10,
            "style": "vqa2",
            "metric": METRICS[f"answer{index}"],
            "question_type": "color",
        }
        for index in range(3)
    ]


def score(metric, answer, answers):
    """Tells which references it was given, so that a mix-up of samples shows."""
    assert metric == METRICS[answers[0]]
    return len(answer) + int(answers[0].removeprefix("answer")) / 10


def test_collected_outcomes_are_the_executors_and_scored_against_their_own_references(executor, samples, tmp_path):
    collector = OutcomeCollector(executor, OutcomeStore(tmp_path, executor.fingerprint, SPACE), score)
    outcomes = collector.collect([samples[2], samples[0], samples[2]], [SETTING, OTHER, OTHER])
    for index, setting, got in zip((2, 0, 2), (SETTING, OTHER, OTHER), outcomes, strict=True):
        alone = OutcomeCollector(executor, OutcomeStore(None, executor.fingerprint, SPACE), score)
        assert alone.collect([samples[index]], [setting]) == [got]
        assert (got.sample_id, got.setting) == (f"sample{index}", setting)
        assert got.accuracy == len(got.answer) + index / 10


def test_nothing_is_run_twice(executor, samples, tmp_path):
    collector = OutcomeCollector(executor, OutcomeStore(tmp_path, executor.fingerprint, SPACE), score)
    first = collector.collect([samples[0], samples[1], samples[0], samples[0]], [SETTING, SETTING, SETTING, OTHER])
    assert collector.num_executed == 3
    assert first[0] == first[2]
    assert collector.collect([samples[1], samples[0]], [SETTING, OTHER]) == [first[1], first[3]]
    assert collector.num_executed == 3
    resumed = OutcomeCollector(executor, OutcomeStore(tmp_path, executor.fingerprint, SPACE), score)
    assert resumed.collect([samples[0], samples[2]], [SETTING, SETTING])[0] == first[0]
    assert resumed.num_executed == 1
    assert resumed.collect([], []) == []


def test_each_batch_is_stored_before_the_next_is_run(executor, samples, tmp_path):
    def score_until_the_third(metric, answer, answers):
        if answers[0] == "answer2":
            raise RuntimeError("killed here")
        return 1.0

    collector = OutcomeCollector(executor, OutcomeStore(tmp_path, executor.fingerprint, SPACE), score_until_the_third)
    with pytest.raises(RuntimeError, match="killed here"):
        collector.collect(samples, [SETTING] * 3)
    assert len(OutcomeStore(tmp_path, executor.fingerprint, SPACE)) == 2


def test_bad_input_is_refused(executor, samples, tmp_path):
    collector = OutcomeCollector(executor, OutcomeStore(None, executor.fingerprint, SPACE), score)
    with pytest.raises(ValueError, match="3 samples but 1 settings"):
        collector.collect(samples, [SETTING])
    with pytest.raises(ValueError, match="sample 'sample1' has no reference answers"):
        collector.collect([samples[0], {**samples[1], "answers": []}], [SETTING, SETTING])
    with pytest.raises(ValueError, match="the store keeps outcomes of executor another"):
        OutcomeCollector(executor, OutcomeStore(None, "another", SPACE), score)


def test_what_another_process_has_answered_is_not_run_again_after_a_reload(executor, samples, tmp_path):
    first, second = (
        OutcomeCollector(executor, OutcomeStore(tmp_path, executor.fingerprint, SPACE), score) for _ in range(2)
    )
    known = first.collect([samples[0]], [SETTING])
    second.reload()
    assert second.collect([samples[0]], [SETTING]) == known and second.num_executed == 0
    in_memory = OutcomeCollector(executor, OutcomeStore(None, executor.fingerprint, SPACE), score)
    in_memory.reload()
    assert len(in_memory.store) == 0
