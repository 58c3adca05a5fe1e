"""How an executor is run, and what differs."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch
from synthetic_profile import WAY

from joint_controller.latency import way_of_running
from joint_controller.latency.way_of_running import WayOfRunning, executor_revision
from joint_controller.version import __version__


THERE = WayOfRunning(**{**WAY, "num_threads": 1, "executor_mode": "onednn"})


def test_it_is_that_of_an_executor_here_and_now():
    executor = SimpleNamespace(device=torch.device("cpu"), mode="plain", dtype="float32", model_type="molmo")
    way = WayOfRunning.of(executor)
    assert (way.device_type, way.driver_version, way.executor_mode, way.executor_dtype) == (
        *("cpu", "none"),
        *("plain", "float32"),
    )
    assert way.num_threads == torch.get_num_threads() and "thread" not in way.device_name
    assert f"torch {torch.__version__}, " in way.library_versions
    assert f"tokenizers {tokenizers.__version__}, " in way.library_versions
    assert re.fullmatch(re.escape(__version__) + r"\+[0-9a-f]{12}", way.executor_revision)
    assert not way.incomparable(WayOfRunning.of(executor)) and not way.differences(WayOfRunning.of(executor))


def test_what_makes_latencies_incomparable_is_told_from_what_changes_them():
    here = replace(THERE, executor_mode="plain", num_threads=2)
    assert THERE.incomparable(here) == "mode onednn there, plain here; threads 1 there, 2 here"
    assert THERE.differences(here) == ""
    here = replace(THERE, device_name="another", library_versions="torch 2.12")
    assert THERE.incomparable(here) == ""
    expected = "device name test device there, another here; library versions torch 2.11 there, torch 2.12 here"
    assert THERE.differences(here) == expected
    gpu = replace(THERE, device_type="cuda", num_threads=None, executor_dtype="bfloat16", driver_version="580")
    assert "device type cpu there, cuda here" in THERE.incomparable(gpu)
    assert THERE.differences(gpu) == "driver version none there, 580 here"


@pytest.mark.parametrize("name", ["family/costs.py", "package/controller/heads.py", "package/request_path.py"])
def test_the_revision_is_that_of_all_that_requests_run_through(tmp_path, monkeypatch, name):
    for path in ("family/costs.py", "package/controller/heads.py", "package/request_path.py", "package/cli.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("one")
    for path in way_of_running._COMMON_CODE:
        if not (tmp_path / "package" / path).exists() and path.endswith(".py"):
            (tmp_path / "package" / path).parent.mkdir(exist_ok=True)
            (tmp_path / "package" / path).write_text("")
    family = SimpleNamespace(code_folders=(tmp_path / "family",))
    monkeypatch.setattr(way_of_running, "executor_family", lambda model_type: family)
    monkeypatch.setattr(way_of_running, "_PACKAGE", tmp_path / "package")
    before = executor_revision("made_up")
    (tmp_path / "package" / "cli.py").write_text("two")
    assert executor_revision("made_up") == before
    (tmp_path / name).write_text("two")
    assert executor_revision("made_up") != before


def test_the_code_is_where_it_is_looked_for():
    for name in way_of_running._COMMON_CODE:
        assert (Path(way_of_running.__file__).parents[1] / name).exists()
