"""The comparison of ways to choose blocks, against numbers that are worked out here."""

import io
import statistics

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from joint_controller.molmo.blocks.block_accuracy import BlockSetAccuracies
from joint_controller.molmo.blocks.block_comparison import (
    compare_block_selections,
    draw_comparison,
    format_comparison_markdown,
    format_comparison_table,
)
from joint_controller.molmo.blocks.block_selection import random_block_sets
from joint_controller.molmo.executor import MolmoExecutor
from joint_controller.molmo.knob_space import build_knob_space


DATASETS = {"one": range(0, 5), "two": range(5, 8)}
SELECTIONS = {"search": {2: (0, 3), 3: (0, 2, 3)}, "accuracy drop": {2: (0, 1), 3: (0, 1, 3)}}


@pytest.fixture(scope="module")
def accuracies(tiny_molmo, tiny_processor):
    """Eight samples whose answers score by their first letters: all kinds of accuracies."""
    space = build_knob_space({"low": (1, 1)}, top_k=(3,), num_blocks=(2, 3, 4))
    executor = MolmoExecutor(tiny_molmo, tiny_processor, space, max_new_tokens=2)
    generator = np.random.default_rng(0)
    samples = [
        {
            "sample_id": f"{'one' if index < 5 else 'two'}/{index}",
            "image": Image.fromarray(generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)),
            "question": "what is the color?",
            "style": "vqa2",
            "metric": "vqa_accuracy",
            "answers": [str(index)],
        }
        for index in range(8)
    ]
    return BlockSetAccuracies(executor, samples, lambda _, answer, refs: sum(map(ord, answer + refs[0])) % 11 / 10)


@pytest.fixture(scope="module")
def rows(accuracies):
    return compare_block_selections(accuracies, SELECTIONS, [3, 2], DATASETS, num_random_sets=5, seed=1)


def test_every_number_by_hand(accuracies, rows):
    found = {(row.dataset, row.num_blocks, row.selection): row for row in rows}
    assert list(found) == [
        (dataset, count, selection)
        for dataset in ("all", "one", "two")
        for count in (2, 3)
        for selection in ("search", "accuracy drop", "prefix", "random")
    ]
    for dataset, members in {"all": range(8), **DATASETS}.items():
        for count in (2, 3):
            prefix = accuracies.measure([range(count)])[0, list(members)]
            for name in ("search", "accuracy drop"):
                row = found[dataset, count, name]
                each = accuracies.measure([SELECTIONS[name][count]])[0, list(members)]
                assert row.accuracy == pytest.approx(statistics.mean(each))
                assert row.gain == pytest.approx(statistics.mean(each - prefix))
                assert row.active_blocks == list(SELECTIONS[name][count]) and row.spread is None
                assert row.num_samples == len(members)
                assert min(each) <= row.accuracy_interval[0] <= row.accuracy <= row.accuracy_interval[1] <= max(each)
                assert row.gain_interval[0] <= row.gain <= row.gain_interval[1]
            row = found[dataset, count, "prefix"]
            assert row.accuracy == pytest.approx(statistics.mean(prefix)) and row.gain_interval == (0, 0)
            row = found[dataset, count, "random"]
            drawn = accuracies.measure(random_block_sets(4, count, 5, seed=1))[:, list(members)].mean(axis=1).tolist()
            assert row.accuracy == pytest.approx(statistics.mean(drawn))
            assert row.spread == pytest.approx(statistics.stdev(drawn))
            assert (row.lowest, row.highest) == pytest.approx((min(drawn), max(drawn)))
            assert row.active_blocks is None
    assert found["all", 2, "search"].accuracy != found["all", 2, "prefix"].accuracy
    assert found["all", 2, "random"].spread > 0, "random sets do not differ: the test shows little"


def test_one_data_set_has_no_rows_for_all(accuracies):
    rows = compare_block_selections(accuracies, {}, [2], {"one": range(8)}, num_random_sets=2)
    assert [(row.dataset, row.selection) for row in rows] == [("one", "prefix"), ("one", "random")]


def test_tables_say_what_was_measured(rows):
    full = {"all": 0.9, "one": 0.8, "two": 1.0}
    search = rows[0]
    output = io.StringIO()
    Console(file=output, width=80).print(format_comparison_table(rows, "title"))
    shown = output.getvalue()
    assert f"{search.accuracy:.3f}" in shown and f"{search.gain:+.3f}" in shown and "…" not in shown
    assert shown.count("search") == 2, "one line for each number of blocks, of all samples"

    markdown = format_comparison_markdown(rows, full, "Title", "picture.png")
    assert "8 held-out samples; accuracy with all blocks: 0.900." in markdown and "## two" in markdown
    assert f"| 2 | search | {search.accuracy:.3f} |" in markdown and "| 0 3 |" in markdown
    assert f"± {rows[3].spread:.3f}, {rows[3].lowest:.3f} to {rows[3].highest:.3f}" in markdown
    tables = [line for line in markdown.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in tables} == {8}


@pytest.mark.parametrize("counts", [(2, 3), (2,)])
def test_the_picture_has_a_panel_for_each_data_set(rows, tmp_path, counts):
    path = tmp_path / "picture.png"
    drawn = [row for row in rows if row.num_blocks in counts]
    draw_comparison(drawn, {"all": 0.9, "one": 0.8, "two": 1.0}, path)
    wide = np.asarray(Image.open(path).convert("L"))
    draw_comparison([row for row in drawn if row.dataset == "two"], {"two": 1.0}, path)
    narrow = np.asarray(Image.open(path).convert("L"))
    assert wide.shape[1] > 1.5 * narrow.shape[1] and (wide < 128).mean() > 0.005


def test_one_random_set_has_no_spread(accuracies):
    with pytest.raises(ValueError, match="`num_random_sets` is 1"):
        compare_block_selections(accuracies, {}, [2], {"one": range(8)}, num_random_sets=1)
