"""Measures what the stages of a request cost the executor, over knob settings and inputs, into a table."""

import json
import random
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm

from ..controller import JointControllerConfig, JointControllerModel, RequestController
from ..executor import DECODE, MODEL_SCOPE, REQUEST_SCOPE, Executor, ExecutorRequest, StageTimes, executor_family
from ..knobs import KnobSetting, KnobSpace
from ..request_path import RequestPath
from .configuration_latency_estimator import LatencyEstimatorConfig
from .guardrail import Guardrail
from .modeling_latency_estimator import LatencyEstimatorModel
from .profile_journal import JOURNAL_FILE, ProfileJournal
from .profile_table import SINGLE_TIMES, make_profile, time_column
from .request_costs import RequestCosts
from .way_of_running import WayOfRunning


CALIBRATION_REQUESTS = 6
"""Requests that are timed to find out how long a profile will take."""

SLOW_REQUEST_S = 1.0
"""Where requests take longer, none is warmed up by itself: what its first time costs on top (memory that is asked for, kernels
that are chosen) is milliseconds."""

DISAGREEMENT = 0.1
"""Repeats disagree where the interquartile range of the whole request is a larger share of its median."""


def plan_pairs(settings: Sequence[KnobSetting], num_inputs: int, seed: int) -> list[tuple[KnobSetting, int]]:
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


def sample_settings(knob_space: KnobSpace, num_settings: int | None = None, seed: int = 42) -> list[KnobSetting]:
    """
    Settings to profile, cheapest first: all of a knob space, or a random sample of `num_settings` (2 or more) with the
    cheapest and the most expensive one.
    """
    settings = list(knob_space)
    if num_settings is None or num_settings >= len(settings):
        return settings
    if num_settings < 2:
        raise ValueError(f"`num_settings` is {num_settings}: give 2 or more.")
    between = sorted(random.Random(seed).sample(range(1, len(settings) - 1), num_settings - 2))
    return [settings[index] for index in (0, *between, -1)]


def measurement_row(
    sample_id: str, setting: KnobSetting, repeats: Sequence[StageTimes], model_stages: Sequence[str]
) -> dict[str, Any]:
    """A measurement as a row of the profile, without the columns of the machine."""
    # Kernels that round differently may end an answer at another token.
    num_steps = min(len(repeat.decode_ms) for repeat in repeats)
    row = {"sample_id": sample_id, **setting, **repeats[0].counts, "output_tokens": 1 + num_steps}
    times = {time_column(stage): [repeat.stage_ms[stage] for repeat in repeats] for stage in repeats[0].stage_ms}
    if num_steps > 0:
        times[time_column(DECODE)] = [float(np.median(repeat.decode_ms[:num_steps])) for repeat in repeats]
        row["decode_ms"] = np.median([repeat.decode_ms[:num_steps] for repeat in repeats], axis=0).tolist()
    for column, values in times.items():
        row[column], row[f"{column}_spread"] = float(np.median(values)), relative_spread(values)
    for scope, stages in ((REQUEST_SCOPE, repeats[0].stage_ms), (MODEL_SCOPE, model_stages)):
        row[SINGLE_TIMES[scope]] = [
            sum(repeat.stage_ms[stage] for stage in stages) + sum(repeat.decode_ms[:num_steps]) for repeat in repeats
        ]
    row["num_repeats"] = len(repeats)
    row["repeats_disagree"] = relative_spread(row[SINGLE_TIMES[REQUEST_SCOPE]]) > DISAGREEMENT
    return row


def relative_spread(values: Sequence[float]) -> float:
    """Interquartile range as a share of the median."""
    lower, median, upper = np.percentile(values, (25, 50, 75))
    return float((upper - lower) / median)


def machine_columns(executor: Executor) -> dict[str, Any]:
    """What is measured on what: the columns `MACHINE_COLUMNS` of a profile, and the lengths that prompts are padded to."""
    way = WayOfRunning.of(executor)
    machine = {
        **asdict(way),
        "num_threads": "none" if way.num_threads is None else str(way.num_threads),
        "executor_fingerprint": executor.fingerprint,
        "executor_type": executor.model_type,
        "executor_shape": json.dumps(executor.shape, sort_keys=True),
        "knob_space": json.dumps(executor.knob_space.to_dict()),
        "latency_scope": REQUEST_SCOPE,
    }
    if executor.prefill_lengths is not None:
        machine["prefill_lengths"] = list(executor.prefill_lengths)
    return machine


def path_to_measure(executor: Executor) -> RequestPath:
    """
    The way of requests through an executor, with an untrained controller and a guardrail whose latencies are made up: these
    take as long as others.
    """
    space = executor.knob_space
    config = JointControllerConfig(
        knob_space=space.to_dict(),
        question_size=executor.question_size,
        vision_size=executor.vision_size,
        sees_slack=True,
    )
    controller = JointControllerModel(config).to(executor.device)
    lengths = executor.prefill_lengths
    estimator = LatencyEstimatorModel(
        LatencyEstimatorConfig(
            executor_type=executor.model_type,
            executor_shape=executor.shape,
            prefill_lengths=None if lengths is None else list(lengths),
            fitted_knobs={name: list(values) for name, values in space.values.items()},
            upper_quantiles={REQUEST_SCOPE: {"0.95": 1.0}},
        )
    )
    for parameters in estimator.parameters():
        torch.nn.init.constant_(parameters, 1e-3)
    return RequestPath(executor, RequestController(controller), Guardrail(estimator, executor, 0.95))


def profile_executor(
    executor: Executor,
    dataset: Dataset,
    settings: Sequence[KnobSetting] | None = None,
    repeats: int = 5,
    decode_steps: int | None = 4,
    num_measurements: int | None = None,
    time_limit_s: float | None = None,
    journal_folder: str | Path | None = None,
    seed: int = 42,
    progress: bool = True,
) -> Dataset:
    """
    Times single requests over settings × inputs, stage by stage, on their way from the image in memory to the answer, an
    untrained controller and the guardrail included. A short calibration tells how long it will take, and a spread-out subset is chosen if that is more than allowed. Repeats are passes over all measurements, each in another
    order, so that a machine that slows down for a while does so for all settings alike; a first pass warms up and is not
    kept, except where requests take longer than a second.

    Args:
        executor ([`Executor`]):
            The executor to measure.
        dataset ([`~datasets.Dataset`]):
            Inputs: columns `sample_id`, `image`, `question`, `style`, see [`~latency.profile_inputs.make_profile_inputs`] and
            [`~data.load_vqa_dataset`]. All rows are used, and held in memory.
        settings (`Sequence[KnobSetting]`, *optional*, defaults to all of the executor's knob space):
            Knob settings to measure, cheapest first.
        repeats (`int`, *optional*, defaults to 5):
            Times that each measurement is repeated; the table holds medians.
        decode_steps (`int` or `None`, *optional*, defaults to 4):
            Decode steps that are timed in each request, whatever the answer's length. `None`: until the answer ends.
        num_measurements (`int`, *optional*):
            Most measurements: a spread-out subset of settings × inputs. By default all.
        time_limit_s (`float`, *optional*):
            Seconds that measuring may take, after [`Executor.warm_up`]. A spread-out subset of settings × inputs is measured if the whole
            would take longer; the last repeats are left out if that was misjudged.
        journal_folder (`str` or `Path`, *optional*):
            Folder in which timings are kept until the profile is whole (`timings.jsonl`). If it holds those of the same
            profile, which was interrupted, they are not taken again.
        seed (`int`, *optional*, defaults to 42):
            Seed of the orders.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to print the plan and show a progress bar.

    Returns:
        [`~datasets.Dataset`]: one row a measurement: `sample_id`, the setting (a column a knob), the executor's counts,
        `output_tokens`, medians in milliseconds (`overhead_ms`, `controller_ms`, `<stage>_ms` of each of the executor's
        stages, `decode_ms_per_token`: the median of the steps), for each of them its interquartile range as a share of the
        median (`overhead_ms_spread`, …), `decode_ms` (the median of each step), `request_ms` and `model_ms` (each repeat as a
        whole, and the model's stages of it), `prefill_lengths` (what prompts are padded to; null: they are not),
        `num_repeats`, `repeats_disagree` (the spread of the whole request is above 10 %), and what was measured
        (`MACHINE_COLUMNS`). Rows are in the order in which measurements were chosen: the first n are spread out, whatever n
        is.

    Raises:
        ValueError: If there is no input, a number is below 1, the executor's stages are not those of its cost model, the
            time limit is over before anything was measured, or the journal is that of another profile.
    """
    if len(dataset) == 0:
        raise ValueError("there is no input to profile with: the data set has no rows.")
    numbers = {"repeats": repeats, "decode_steps": decode_steps, "num_measurements": num_measurements}
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ValueError(f"`{name}` is {number}: give 1 or more.")
    settings = list(executor.knob_space if settings is None else settings)
    inputs = dataset.select_columns(["sample_id", "image", "question", "style"])[:]
    inputs = [dict(zip(inputs, values, strict=True)) for values in zip(*inputs.values(), strict=True)]
    pairs = plan_pairs(settings, len(inputs), seed)[:num_measurements]
    costs = executor_family(executor.model_type).cost_model(executor.shape, None, executor.knob_space.names)
    if (*executor.stage_names, DECODE) != tuple(costs.stages):
        raise ValueError(
            f"the executor's stages are {', '.join(executor.stage_names)}, but its cost model has {', '.join(costs.stages)}: both "
            f"must be the same, and then '{DECODE}', or a part of each request would be predicted by nothing."
        )
    model_stages = [stage for stage in RequestCosts(costs, MODEL_SCOPE).stages if stage != DECODE]
    machine = machine_columns(executor)
    plan = {
        **machine,
        "settings": [list(setting.values()) for setting in settings],
        "inputs": [one["sample_id"] for one in inputs],
        "seed": seed,
        **numbers,
    }

    executor.warm_up(progress)
    path = path_to_measure(executor)
    started = time.perf_counter()

    def measure(setting: KnobSetting, position: int) -> StageTimes:
        request = ExecutorRequest(**inputs[position], setting=setting)
        return path.time(request, repeats=1, warmup=0, decode_steps=decode_steps)

    def affordable(request_s: float, passes: int, wanted: int) -> int:
        if time_limit_s is None:
            return wanted
        left_s = time_limit_s - (time.perf_counter() - started)
        return min(wanted, max(1, int(left_s / (request_s * passes))))

    def say(text: str) -> None:
        if progress:
            tqdm.write(text)

    with ExitStack() as stack:
        if journal_folder is None:
            journal_folder = stack.enter_context(TemporaryDirectory())
        journal = stack.enter_context(ProfileJournal(Path(journal_folder) / JOURNAL_FILE, plan))
        todo = f"{len(settings)} settings x {len(inputs)} inputs"
        todo = f"{len(pairs)} of {todo}" if len(pairs) < len(settings) * len(inputs) else f"{todo} = {len(pairs)}"
        say(f"To measure: {todo} measurements, {repeats} repeats each, after a warm-up.")
        request_s, warm_ups = None, 1
        if journal.num_measurements is None:
            request_s = _calibrate(measure, pairs)
            if request_s > SLOW_REQUEST_S:
                warm_ups = 0
                say(f"A request takes {request_s:.1f} s: none is warmed up by itself.")
            journal.settle(affordable(request_s, warm_ups + repeats, len(pairs)))
            seconds = request_s * (warm_ups + repeats) * journal.num_measurements
            subset = (
                "" if journal.num_measurements == len(pairs) else f" (a spread-out subset: {time_limit_s:g} s allowed)"
            )
            say(f"Measuring {journal.num_measurements}{subset}: about {seconds:.0f} s.")
        else:
            total = journal.num_measurements * repeats
            say(f"Going on: {len(journal.timings)} of {total} timings of an earlier run are kept.")

        with tqdm(desc="Profiling", unit="request", disable=not progress) as bar:
            unfinished = [
                index
                for index in range(journal.num_measurements)
                if any((index, repeat) not in journal.timings for repeat in range(repeats))
            ]
            bar.reset(total=len(unfinished) * (warm_ups + repeats))
            for number, index in enumerate(unfinished * warm_ups, start=1):
                # What is used for the first time takes longer: less may be affordable than there seemed to be.
                if request_s is not None and affordable(request_s, repeats, number) < number:
                    journal.settle(number - 1)
                    say(f"The warm-up took longer than expected: measuring {journal.num_measurements}.")
                    break
                measure(*pairs[index])
                bar.update()
            for repeat in range(repeats):
                order = [index for index in range(journal.num_measurements) if (index, repeat) not in journal.timings]
                if repeat > 0:
                    # The first in the order of the plan: should the time end within it, what was measured is spread out.
                    random.Random(f"{seed}/{repeat}").shuffle(order)
                for index in order:
                    if time_limit_s is not None and time.perf_counter() - started > time_limit_s:
                        break
                    journal.add(index, repeat, measure(*pairs[index]))
                    bar.update()
        rows = []
        for index, (setting, position) in enumerate(pairs[: journal.num_measurements]):
            times = [journal.timings[index, repeat] for repeat in range(repeats) if (index, repeat) in journal.timings]
            if times:
                rows.append(
                    {**measurement_row(inputs[position]["sample_id"], setting, times, model_stages), **machine}
                )
    if not rows:
        raise ValueError(f"the time limit of {time_limit_s} s was over before anything was measured: allow more.")
    profile = make_profile(rows)
    disagreeing = sum(profile["repeats_disagree"])
    if disagreeing:
        say(
            f"Repeats disagree in {disagreeing} of {len(profile)} measurements: is the machine busy with something else?"
        )
    return profile


def _calibrate(measure: Callable[[KnobSetting, int], StageTimes], pairs: Sequence[tuple[KnobSetting, int]]) -> float:
    """Seconds that a request takes on average: a few that are spread out, each run once before unless they are slow."""
    chosen = pairs[:CALIBRATION_REQUESTS]

    def seconds(requests: Sequence[tuple[KnobSetting, int]]) -> float:
        started = time.perf_counter()
        for request in requests:
            measure(*request)
        return time.perf_counter() - started

    seconds(chosen[:1])
    first_s = seconds(chosen[:1])
    if first_s <= SLOW_REQUEST_S:
        seconds(chosen[1:])
    return (first_s + seconds(chosen[1:])) / len(chosen)
