"""Measures by the clock what requests of a sweep take, one at a time."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm

from ..executor import CONTROLLER, ExecutorRequest
from ..knobs import KnobSetting
from ..request_path import RequestPath
from .request_table import with_measurements


MEASUREMENTS_FILE = "measurements.jsonl"
"""Name of the journal of measurements in an output folder."""


def measure_requests(
    requests: Dataset,
    samples: Sequence[Mapping[str, Any]],
    paths: Mapping[tuple[str, int], RequestPath],
    journal: str | Path,
    progress: bool = False,
) -> Dataset:
    """
    Answers at batch 1 what policies chose: each sample once at each setting that a policy chose for it, under the first of
    its budgets. The policies of a sample take turns, so that none has the machine in a better moment than another.

    Args:
        requests (`datasets.Dataset`):
            A request table.
        samples (`Sequence[dict]`):
            Its samples.
        paths (`Mapping[tuple[str, int], RequestPath]`):
            Takes the requests of a policy, by its name and seed; all have one knob space. Rows of others are left as they are. With a controller, the
            decision is taken and measured, too, but the setting is that of the table; without one it counts 0 ms.
        journal (`str` or `Path`):
            File of what was measured, which is read first and added to: nothing is measured twice.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.

    Returns:
        `datasets.Dataset`: the table with `measured_ms` and `controller_ms`.

    Raises:
        ValueError: If the table has a sample that is not given, or the journal cannot be read.
    """
    journal = Path(journal)
    known = _read_journal(journal)
    columns = zip(*(requests[name][:] for name in ("policy", "seed", "sample_id", "setting")), strict=True)
    keys = [key if key[:2] in paths else None for key in columns]
    missing: dict[str, dict[tuple, float]] = {}  # budget of what is to be measured, sample by sample
    for key, budget_ms in zip(keys, requests["latency_budget_ms"][:], strict=True):
        if key is not None and key not in known:
            missing.setdefault(key[2], {}).setdefault(key, budget_ms)
    sample_of = {sample["sample_id"]: sample for sample in samples}
    absent = [sample_id for sample_id in missing if sample_id not in sample_of]
    if absent:
        raise ValueError(
            f"the request table has the sample '{absent[0]}', which is not among `samples`: give it, too."
        )
    if missing:
        for path in paths.values():
            path.warm_up()
        [space] = {path.executor.knob_space for path in paths.values()}
        setting_of = {str(setting): setting for setting in space}
        total = sum(map(len, missing.values()))
        with (
            journal.open("a", encoding="utf-8") as file,
            tqdm(total=total, desc="Measuring", unit="request", disable=None if progress else True) as bar,
        ):
            for sample_id, budgets in missing.items():
                for key, taken in _measure_sample(sample_of[sample_id], budgets, paths, setting_of).items():
                    known[key] = taken
                    file.write(json.dumps([*key, *taken]) + "\n")
                file.flush()
                bar.update(len(budgets))
    values = [(None, None) if key is None else known[key] for key in keys]
    return with_measurements(requests, [taken for taken, _ in values], [decided for _, decided in values])


def _measure_sample(
    sample: Mapping[str, Any],
    budgets: Mapping[tuple, float],
    paths: Mapping[tuple[str, int], RequestPath],
    setting_of: Mapping[str, KnobSetting],
) -> dict[tuple, tuple[float, float]]:
    taken = {}
    request = None
    for key, budget_ms in budgets.items():
        policy, seed, _, name = key
        path = paths[policy, seed]
        setting = setting_of[name]
        if request is None:
            # Reading the image's file is not part of the request.
            request = ExecutorRequest.of(sample, setting)
            request = replace(request, image=request.load_image())
        answer = path.answer(request, budget_ms, setting)
        decided_ms = 0.0 if path.controller is None else answer.times.stage_ms[CONTROLLER]
        taken[key] = (answer.measured_ms, decided_ms)
    return taken


def _read_journal(journal: Path) -> dict[tuple, tuple[float, float]]:
    if not journal.exists():
        return {}
    text = journal.read_text(encoding="utf-8")
    if not text.endswith("\n"):
        # The run was stopped while it wrote the last line: what it says is measured again.
        text = text[: text.rfind("\n") + 1]
        journal.write_text(text, encoding="utf-8")
    known = {}
    for number, line in enumerate(text.splitlines(), 1):
        try:
            policy, seed, sample_id, setting, measured_ms, controller_ms = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"line {number} of '{journal}' is not a measurement ({error}): delete the file, and requests are measured again."
            ) from error
        known[policy, seed, sample_id, setting] = (measured_ms, controller_ms)
    return known
