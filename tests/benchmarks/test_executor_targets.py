"""
What the executor must reach, measured by its benchmark: on an H100 at MolmoE-1B's sizes, and on the CPU of its host with the
executor that ships. Takes minutes; run on a machine with a CUDA device that nothing else uses: `pytest -m gpu`.
"""

import json

import pytest
import torch

from joint_controller.benchmarks.executor import MOLMOE_CASES
from joint_controller.cli import main


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(1800),
]

MOLMOE_LIMITS_MS = (1.5, 0.95, 17.0, 27.0, 9.5)
"""Most that each of `MOLMOE_CASES` may take on an H100."""


def run_bench(folder, *flags):
    path = folder / "executor.json"
    assert main(["bench", "executor", *flags, "--json", str(path)]) == 0
    results = json.loads(path.read_text())
    return results, {row["what"]: row for row in results["rows"]}


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory):
    return run_bench(tmp_path_factory.mktemp("gpu"), "--num_agreement", "500", "--num_memory", "2000")


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    return run_bench(tmp_path_factory.mktemp("cpu"), "--device", "cpu", "--grid_repeats", "0")


def row_of(rows, beginning):
    [row] = [row for what, row in rows.items() if what.startswith(beginning)]
    return row


@pytest.mark.parametrize(("case", "limit_ms"), list(zip(MOLMOE_CASES, MOLMOE_LIMITS_MS, strict=True)), ids=str)
def test_single_requests(on_gpu, case, limit_ms):
    _, rows = on_gpu
    assert rows[str(case)]["ours"] <= limit_ms


def test_another_setting_costs_nothing(on_gpu):
    _, rows = on_gpu
    assert row_of(rows, "change of setting")["ours"] <= 0.1


def test_the_knobs_save_time(on_gpu):
    _, rows = on_gpu
    assert row_of(rows, "knob authority")["ours"] >= 2.2


def test_batches(on_gpu):
    _, rows = on_gpu
    batched = row_of(rows, "batched answering")
    assert batched["ours"] >= max(45.0, 20 * batched["stock"])


def test_no_higher_value_of_a_knob_is_faster(on_gpu):
    results, _ = on_gpu
    assert results["grid"]["settings"] == 75 and results["grid"]["below_0.98"] == []


def test_answers_are_those_of_transformers_modules_up_to_rounding(on_gpu):
    agreement = on_gpu[0]["agreement"]
    # Random weights make near ties frequent, so that the modules' own two ways of running experts are the measure.
    assert agreement["same_tokens"] >= agreement["stock_same_tokens"] - 0.05
    assert agreement["same_or_near_tie"] >= agreement["stock_same_or_near_tie"] - 0.01


def test_memory_does_not_grow(on_gpu):
    memory = on_gpu[0]["memory"]
    assert memory["growth_gpu_mb"] <= 16 and memory["growth_host_mb"] <= 64


def test_single_requests_on_the_cpu(on_cpu):
    _, rows = on_cpu
    for row in rows.values():
        if row["what"].endswith(("(ms)", "(ms/token)")):
            assert row["ours"] <= 0.7 * row["stock"], row["what"]


def test_batches_on_the_cpu(on_cpu):
    _, rows = on_cpu
    batched = row_of(rows, "batched answering")
    assert batched["ours"] >= 4 * batched["stock"]
