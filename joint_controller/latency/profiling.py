"""Measures what the stages of a request cost the executor, over knob settings and inputs, into a table."""

import hashlib
import json
import platform
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm

from ..executor import ExecutorRequest, MolmoExecutor, StageTimes
from ..knobs import KnobSetting
from ..version import __version__
from .configuration_latency_estimator import executor_shape
from .profile_table import COUNT_COLUMNS, STAGE_COLUMNS, UNKNOWN, make_profile


DISAGREEMENT = 0.1
"""Repeats disagree where their interquartile range is a larger share of the median in a stage that is predicted."""


def device_name(device: torch.device) -> str:
    """
    Name of a device as it stands in profiles: the model of a GPU, or of the CPU with the number of threads that torch
    uses, e.g. `"AMD EPYC 7B13 (2 threads)"`.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    # Linux keeps the model of the CPU here only; elsewhere `platform` knows it.
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.partition(":")[2] for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = models[0].strip() if models else name
    return f"{name} ({torch.get_num_threads()} threads)"


def driver_version(device: torch.device) -> str:
    """Version of the driver of a CUDA device; `"none"` for a CPU."""
    if device.type != "cuda":
        return "none"
    module = Path("/sys/module/nvidia/version")
    return module.read_text().strip() if module.exists() else UNKNOWN


def executor_revision() -> str:
    """
    Version of the code that the latency depends on: the package's, and a digest of the sources of `executor/` and
    `molmo/`, e.g. `"0.2.0+1f3b9c02a7d4"`.
    """
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(file for room in ("executor", "molmo") for file in (package / room).rglob("*.py")):
        digest.update(f"{file.relative_to(package).as_posix()}\n".encode() + file.read_bytes())
    return f"{__version__}+{digest.hexdigest()[:12]}"


def _plan_pairs(settings: Sequence[KnobSetting], num_inputs: int, seed: int) -> list[tuple[KnobSetting, int]]:
    """
    Every setting with every input, in an order of which each beginning is spread out: all settings once before any
    setting twice, each time with the next input; the cheapest and the most expensive setting at the head, so that a
    shortened profile still spans the range.
    """
    ends = [settings[0], settings[-1]] if len(settings) > 1 else [settings[0]]
    others = list(settings[1:-1])
    random.Random(seed).shuffle(others)
    ordered = ends + others
    return [
        (setting, (position + turn) % num_inputs)
        for turn in range(num_inputs)
        for position, setting in enumerate(ordered)
    ]


def _median_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Median, and interquartile range as a share of the median."""
    lower, median, upper = np.percentile(values, (25, 50, 75))
    return float(median), float((upper - lower) / median)


def _row(sample_id: str, setting: KnobSetting, repeats: Sequence[StageTimes]) -> dict[str, Any]:
    row = {"sample_id": sample_id, **setting.to_dict()}
    row.update({column: getattr(repeats[0], column) for column in (*COUNT_COLUMNS, "output_tokens")})
    times = {
        "image_processing_ms": [repeat.image_processing_ms for repeat in repeats],
        "vision_ms": [repeat.vision_ms for repeat in repeats],
        "llm_prefill_ms": [repeat.llm_prefill_ms for repeat in repeats],
        "decode_ms_per_token": [float(np.median(repeat.decode_ms)) for repeat in repeats],
    }
    for column, values in times.items():
        row[column], row[f"{column}_spread"] = _median_and_spread(values)
    row["decode_ms"] = np.median([repeat.decode_ms for repeat in repeats], axis=0).tolist()
    row["num_repeats"] = len(repeats)
    row["repeats_disagree"] = any(row[f"{column}_spread"] > DISAGREEMENT for column in STAGE_COLUMNS)
    return row


def profile_executor(
    executor: MolmoExecutor,
    dataset: Dataset,
    settings: Sequence[KnobSetting] | None = None,
    repeats: int = 5,
    decode_steps: int = 4,
    time_limit_s: float | None = None,
    seed: int = 42,
    progress: bool = True,
) -> Dataset:
    """
    Times the stages of single requests over settings × inputs. Repeats are passes over all measurements, each in
    another order, so that a machine that slows down for a while does so for all settings alike; a first pass warms up
    and is not kept.

    Args:
        executor ([`MolmoExecutor`]):
            The executor to measure.
        dataset ([`~datasets.Dataset`]):
            Inputs: columns `sample_id`, `image`, `question`, `style`, see [`~data.load_vqa_dataset`]. All rows are used.
        settings (`Sequence[KnobSetting]`, *optional*, defaults to all of the executor's knob space):
            Knob settings to measure, cheapest first.
        repeats (`int`, *optional*, defaults to 5):
            Times that each measurement is repeated; the table holds medians.
        decode_steps (`int`, *optional*, defaults to 4):
            Decode steps that are timed in each request, whatever the answer's length.
        time_limit_s (`float`, *optional*):
            Seconds that the whole profile may take. A spread-out subset of settings × inputs is measured if the whole
            would take longer; the last repeats are left out if that was misjudged.
        seed (`int`, *optional*, defaults to 42):
            Seed of the orders.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to print the plan and show a progress bar.

    Returns:
        [`~datasets.Dataset`]: one row a measurement: `sample_id`, the setting (`tier`, `top_k`, `num_blocks`), counts
        (`num_views`, `vision_tokens`, `text_tokens`, `output_tokens`), medians in milliseconds (`image_processing_ms`,
        `vision_ms`, `llm_prefill_ms`, `decode_ms_per_token`), for each of them its interquartile range as a share of
        the median (`image_processing_ms_spread`, …), `num_repeats`, and the machine (`device_name`, `torch_version`,
        `executor_dtype`, `executor_fingerprint`, `executor_shape` as JSON).

    Raises:
        ValueError: If there is no input, `repeats` or `decode_steps` is below 1, or the time limit is over before
            anything was measured.
    """
    if len(dataset) == 0:
        raise ValueError("there is no input to profile with: the data set has no rows.")
    if repeats < 1 or decode_steps < 1:
        raise ValueError(f"`repeats` is {repeats} and `decode_steps` is {decode_steps}: both must be 1 or more.")
    started = time.perf_counter()
    settings = list(executor.knob_space if settings is None else settings)
    passes = 1 + repeats

    def measure(setting: KnobSetting, position: int) -> StageTimes:
        row = dataset[position]
        request = ExecutorRequest(row["sample_id"], row["image"], row["question"], row["style"], setting)
        return executor.time_request(request, repeats=1, warmup=0, decode_steps=decode_steps)

    def is_over(limit_s: float | None) -> bool:
        return limit_s is not None and time.perf_counter() - started > limit_s

    pairs = _plan_pairs(settings, len(dataset), seed)
    plan = f"{len(settings)} settings x {len(dataset)} inputs = {len(pairs)} measurements, {repeats} repeats each"
    if progress:
        tqdm.write(f"Profiling {plan}, after a warm-up.")
    measured: list[list[StageTimes]] = []
    with tqdm(total=passes * len(pairs), desc="Profiling", unit="request", disable=not progress) as bar:
        # What the warm-up reaches in its share of the time is what there is time to repeat.
        for pair in pairs:
            if is_over(None if time_limit_s is None else time_limit_s / passes):
                break
            measure(*pair)
            measured.append([])
            bar.update()
        pairs = pairs[: len(measured)]
        bar.total = passes * len(pairs)
        bar.refresh()
        if progress:
            warmup_s = time.perf_counter() - started
            tqdm.write(f"Measuring {len(pairs)} of {plan}: about {repeats * warmup_s:.0f} s.")
        order = list(range(len(pairs)))
        generator = random.Random(seed)
        for _ in range(repeats):
            for index in order:
                if is_over(time_limit_s):
                    break
                measured[index].append(measure(*pairs[index]))
                bar.update()
            # After the first repeat: should the time end within it, what was measured is still spread out.
            generator.shuffle(order)
    sample_ids = dataset["sample_id"][:]
    rows = [
        _row(sample_ids[position], setting, times)
        for (setting, position), times in zip(pairs, measured, strict=True)
        if times
    ]
    if not rows:
        raise ValueError(f"the time limit of {time_limit_s} s was over before anything was measured: allow more.")
    machine = {
        "device_name": device_name(executor.device),
        "driver_version": driver_version(executor.device),
        "torch_version": torch.__version__,
        "executor_dtype": str(executor.model.dtype).removeprefix("torch."),
        "executor_mode": "plain",
        "executor_revision": executor_revision(),
        "executor_fingerprint": executor.fingerprint,
        "executor_shape": json.dumps(executor_shape(executor.model.config), sort_keys=True),
    }
    return make_profile([{**row, **machine} for row in rows])
