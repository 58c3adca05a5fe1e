"""The executor's benchmark on a CPU, where it takes the executor that ships with the package."""

import json

import pytest

from joint_controller.benchmarks.executor import MOLMOE_CASES, BenchExecutorArguments, main
from joint_controller.molmo.executor import MolmoExecutor
from joint_controller.request_path import RequestPath


@pytest.mark.slow
def test_it_measures_every_row_and_finds_that_all_ways_agree(tmp_path, capsys):
    path = tmp_path / "new" / "results.json"
    arguments = BenchExecutorArguments(
        device="cpu",
        repeats=1,
        stock_repeats=1,
        num_requests=4,
        num_stock_requests=1,
        batch_size=3,
        max_new_tokens=2,
        grid_repeats=0,
        num_agreement=4,
        num_memory=2,
        json=str(path),
    )
    main(arguments)
    results = json.loads(path.read_text())
    assert results["mode"] == "onednn" and "captures" not in results
    rows = {row["what"]: row for row in results["rows"]}
    assert len(rows) == len(results["rows"]) == 6
    assert sum("decode, top_k 8, 8 blocks, 13 views" in what for what in rows) == 1
    assert sum("image to first token, top_k 1, 4 blocks, 4 views" in what for what in rows) == 1
    assert all(0 < row["ours"] < 100_000 and 0 < row["stock"] < 100_000 for row in rows.values())
    agreement = results["agreement"]
    for way in ("", "batched_", "stock_"):
        assert agreement[f"{way}same_tokens"] == agreement[f"{way}same_or_near_tie"] == 1.0
        assert agreement[f"{way}beyond_near_tie"] == 0 and agreement[f"{way}gaps_where_different"] == []
    for way in ("", "stock_"):
        assert 0 < agreement[f"{way}relative_difference_of_logits_max"] < 1e-4
    assert results["memory"]["requests"] == 2
    for row in results["whole_requests"]:
        parts = [row[stage] for stage in ("overhead", "controller", "image_processing", "vision", "llm_prefill")]
        assert min(parts) > 0 and row["ratio"] > 1 and row["by the clock"] == pytest.approx(sum(parts), rel=0.5)
    assert "batched answering" in capsys.readouterr().out


@pytest.mark.slow
def test_batches_are_compared_with_answers_of_as_many_tokens(monkeypatch):
    answered, timed = {}, {}
    run, time_request = MolmoExecutor.run, RequestPath.time

    def recorded_run(executor, requests, *args, **kwargs):
        outputs = run(executor, requests, *args, **kwargs)
        answered.update({(output.sample_id, output.setting): output.output_tokens for output in outputs})
        return outputs

    def recorded_time_request(path, request, *args, **kwargs):
        times = time_request(path, request, *args, **kwargs)
        if path.executor.mode == "plain" and not request.sample_id.startswith("case/"):
            timed[request.sample_id, request.setting] = 1 + len(times.decode_ms)
        return times

    monkeypatch.setattr(MolmoExecutor, "run", recorded_run)
    monkeypatch.setattr(RequestPath, "time", recorded_time_request)
    main(BenchExecutorArguments(device="cpu", repeats=1, stock_repeats=1, num_requests=6, grid_repeats=0))
    assert len(timed) == 6 and timed.items() <= answered.items()
    assert min(timed.values()) < 8, "no answer ends before the limit: the test shows nothing"


def test_the_knobs_authority_is_that_of_most_over_least_work():
    most, least = MOLMOE_CASES[3:5]
    assert (most.num_crops, most.setting["top_k"], most.setting["num_blocks"]) == (12, 8, 16)
    assert (least.num_crops, least.setting["top_k"], least.setting["num_blocks"]) == (2, 4, 12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"repeats": 0}, "`repeats` is 0"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"num_agreement": -1}, "`num_agreement` is -1"),
        ({"max_new_tokens": 1}, "`max_new_tokens` is 1"),
        ({"num_threads": 0}, "`num_threads` is 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        main(BenchExecutorArguments(**arguments))
