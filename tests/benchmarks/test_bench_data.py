"""The benchmark of loading and preprocessing, with few and small images."""

import json
import mmap

import datasets
import numpy as np
import pytest

from joint_controller.benchmarks import data
from joint_controller.benchmarks.common import own_memory_mb
from joint_controller.cli import main


def test_both_ways_give_the_same_views_and_are_timed_side_by_side(tmp_path, capsys):
    cache = datasets.config.HF_DATASETS_CACHE
    path = tmp_path / "results" / "bench.json"
    flags = ["--num_images", "3", "--num_rows", "203", "--image_size", "40", "20", "--tier", "low"]
    assert main(["bench", "data", *flags, "--json", str(path)]) == 0
    assert datasets.config.HF_DATASETS_CACHE == cache
    results = json.loads(path.read_text())
    assert results["num_views"] == 3  # the global view and two crops side by side
    assert results["largest_pixel_difference"] < 1e-6
    stages = results["stages"]
    for plain in ("", ", plain way"):
        both, load, preprocess = (
            1 / stages[name + plain]["images_per_s"] if name != "load" else 1 / stages["load"]["images_per_s"]
            for name in ("load and preprocess", "load", "preprocess")
        )
        assert both == pytest.approx(load + preprocess)
    assert results["memory"]["growth_mb"] == pytest.approx(results["memory"]["peak_mb"] - results["memory"]["warm_mb"])
    shown = capsys.readouterr().out
    assert "3 images of 40x20" in shown and "Memory over 203 rows" in shown


def new_memory(num_bytes: int) -> mmap.mmap:
    """Memory of this process alone, which comes from the system: an array may lie in what others have freed before."""
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.write(b"1" * num_bytes)
    return memory


def test_growing_memory_is_seen(tmp_path, monkeypatch):
    preprocess, kept = data._preprocess, []
    # A megabyte of each row: the rows behind the warm-up add 20 of them.
    monkeypatch.setattr(data, "_preprocess", lambda *args: kept.append(new_memory(1_000_000)) or preprocess(*args))
    flags = ["--num_images", "1", "--num_rows", "220", "--image_size", "20", "20", "--tier", "low"]
    path = tmp_path / "bench.json"
    assert main(["bench", "data", *flags, "--json", str(path)]) == 0
    assert json.loads(path.read_text())["memory"]["growth_mb"] == pytest.approx(20, abs=5)


def test_memory_is_that_of_the_process():
    kept = [new_memory(1_000_000)]  # what writing needs is there
    before = own_memory_mb()
    kept += [new_memory(1_000_000) for _ in range(200)]
    assert own_memory_mb() - before == pytest.approx(200, abs=20)


def test_mapped_files_are_not_counted(tmp_path):
    path = tmp_path / "file.npy"
    np.save(path, np.ones(12_500_000))  # 100 MB
    mapped = np.load(path, mmap_mode="r")
    before = own_memory_mb()
    assert mapped.sum() == 12_500_000
    assert own_memory_mb() - before < 20


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_images", "0"], "`num_images` is 0"),
        (["--num_rows", "200"], "`num_rows` is 200: give more than the 200 rows of the warm-up"),
        (["--image_size", "640"], "`image_size` is [640]: give width and height"),
        (["--num_threads", "0"], "`num_threads` is 0"),
        (["--tier", "huge"], "invalid choice: 'huge'"),
    ],
)
def test_bad_arguments_are_refused(flags, message, capsys):
    assert main(["bench", "data", *flags]) == 2
    assert message in capsys.readouterr().err


def test_bench_names_its_targets(capsys):
    for argv, code in ((["bench"], 2), (["bench", "nothing"], 2), (["bench", "--help"], 0)):
        with pytest.raises(SystemExit) as exit_info:
            main(argv)
        assert exit_info.value.code == code
    captured = capsys.readouterr()
    assert "data            time the way from a Parquet file" in captured.out
    assert "TARGET" in captured.err
