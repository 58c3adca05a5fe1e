"""Compares a latency estimator with the clock of this machine, and adapts it where it is off."""

import hashlib
import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from datasets import Dataset
from huggingface_hub import constants
from safetensors import SafetensorError
from safetensors.torch import save, save_file
from transformers.utils import logging

from ..executor import DECODE, MODEL_SCOPE, Executor, ExecutorRequest
from ..request_path import RequestPath
from .configuration_latency_estimator import LatencyEstimatorConfig
from .fitting import calibrate_quantiles, predict_held_out, profile_columns
from .held_out import COVERED_QUANTILE, HeldOut, conformal_quantile, errors
from .latency_estimator import SCOPE_IN_WORDS
from .modeling_latency_estimator import LatencyEstimatorModel
from .profile_inputs import make_profile_inputs
from .profile_table import make_profile, time_column
from .profiling import machine_columns, measurement_row, plan_pairs
from .recalibration import fit_recalibration
from .request_costs import RequestCosts
from .way_of_running import WayOfRunning


logger = logging.get_logger(__name__)

CHECK_REQUESTS = 96
"""Requests of a check."""

CHECK_SECONDS = 10.0
"""Most seconds that they may take together."""

FEWEST_REQUESTS = 32
"""Requests without which nothing is concluded."""

CHECKED_RATIOS = (0.95, 1.05)
"""Median ratios of measured over predicted latencies at which an estimator is right."""

LEAST_COVERAGE = 0.93
"""Least share of requests below the predicted 95 % quantile at which an estimator is right."""

WIDEST_QUANTILE = 1.2
"""Most that the predicted 95 % quantile may be of the measured one at which an estimator is right."""

LEAST_CPU_SHARE = 0.95
"""Least share of a request's time that its thread has a core, where one thread does all; below it, other processes disturb."""

MOST_DISTURBED = 1 / 3
"""Share of disturbed requests at which the machine is too busy to conclude anything."""

WIDEST_SWING = 1.3
"""Most that the median ratio of a sixth of the requests, in the order of time, may be of that of another; beyond it, the machine
has become slower or faster meanwhile."""

CACHE_VARIABLE = "JOINT_CONTROLLER_CACHE"
"""Environment variable: folder of what is kept per machine."""

RECALIBRATE = ("auto", "always", "never")
"""Whether a check adapts the estimator: if it is off, in any case, or not."""

_NUM_INPUTS = 24
_DECODE_STEPS = 4
_NUM_FOLDS = 3
_WARM_UP_SHARE = 0.1
_CHECK_FILE = "check.json"


@dataclass(frozen=True)
class LatencyCheck:
    """
    What a latency estimator predicts, and what the clock says.

    Args:
        num_requests (`int`), num_disturbed (`int`), seconds (`float`):
            Requests that the numbers are about; others, whose core was taken by other processes meanwhile (told where a single
            thread of the CPU does all); how long all took.
        latency_scope (`str`):
            What latencies are of, see [`LatencyEstimator`].
        measured_ms, predicted_ms, ratios (`dict[str, float]`):
            Of each stage in order, of `"decode"` (each token after the first) and of `"total"`: the medians of what was
            measured and of what was predicted, in ms, and of their ratios.
        p95_ratio (`float`):
            95 % quantile of the ratios of whole latencies.
        predicted_p95_ratio, coverage (`float`, *optional*):
            What that is by the estimator, and the share of latencies below the 95 % quantile that it predicts. `None` where it
            predicts none.
        swing (`float`):
            The largest median ratio of a sixth of the requests, in the order of time, over the smallest.
        finding (`str`):
            In what the estimator is off; empty where it is right.
        is_adapted (`bool`, *optional*, defaults to `False`):
            Whether the estimator was adapted to these measurements.
        error, adapted_error (`float`, *optional*):
            Mean relative error of the estimator as it was before any check, and of the adapted one, on measurements that it was
            not adapted to.
        is_kept (`bool`, *optional*, defaults to `False`):
            Whether later loads on this machine begin with what was found.
    """

    num_requests: int
    num_disturbed: int
    seconds: float
    latency_scope: str
    measured_ms: dict[str, float]
    predicted_ms: dict[str, float]
    ratios: dict[str, float]
    p95_ratio: float
    predicted_p95_ratio: float | None
    coverage: float | None
    swing: float
    finding: str
    is_adapted: bool = False
    error: float | None = None
    adapted_error: float | None = None
    is_kept: bool = False

    @property
    def is_conclusive(self) -> bool:
        """Whether enough was measured on a machine that was not busy with something else."""
        return self.num_requests >= FEWEST_REQUESTS and not self.is_disturbed

    @property
    def is_disturbed(self) -> bool:
        """Whether the machine is too busy with something else, or its speed has changed."""
        too_many = self.num_disturbed > MOST_DISTURBED * (self.num_requests + self.num_disturbed)
        return too_many or self.swing > WIDEST_SWING

    def summary(self) -> str:
        """What was found and done, in two sentences."""
        found = (
            f"Latencies of {SCOPE_IN_WORDS[self.latency_scope]} are {self.ratios['total']:.2f} times what was predicted (median "
            f"of {self.num_requests} requests in {self.seconds:.1f} s"
        )
        if self.num_disturbed:
            found += f", {self.num_disturbed} more were disturbed by other processes"
        if self.coverage is not None:
            found += f"; {self.coverage:.1%} below the predicted 95 % quantile"
        found += ")"
        if self.is_adapted:
            done = f"the estimator was adapted, its mean error is {self.error:.1%} without and {self.adapted_error:.1%} with that"
        elif self.is_disturbed:
            done = (
                f"the machine is busy with something else (its speed swings by a factor of {self.swing:.2f}), so that nothing is "
                "concluded: check again when it is not"
            )
        elif self.num_requests < FEWEST_REQUESTS:
            done = f"too few to conclude anything ({FEWEST_REQUESTS} are needed): allow more time"
        else:
            done = f"the estimator is kept{', though ' if self.finding else ''}{self.finding}"
        return f"{found}: {done}."


class ClockChecker:
    """
    Checks a latency estimator against the clock of this machine, and keeps what was found in the cache
    (`$JOINT_CONTROLLER_CACHE`, by default `joint_controller` in Hugging Face's), for this estimator, this executor, and this
    way of running it.

    Args:
        base ([`LatencyEstimatorModel`]):
            The estimator, in the latency scope that it is used in.
        executor ([`Executor`]):
            The executor that it is of. To be run with the number of threads that [`~ClockChecker.check`] is called with.

    Attributes:
        folder (`Path`):
            Where findings are kept.
    """

    def __init__(self, base: LatencyEstimatorModel, executor: Executor):
        self.base = base
        self.executor = executor
        key = {
            "estimator": _digest(base),
            "way": asdict(WayOfRunning.of(executor)),
            "latency_scope": base.latency_scope,
            "knob_space": executor.knob_space.to_dict(),
        }
        cache = os.environ.get(CACHE_VARIABLE) or Path(constants.HF_HOME) / "joint_controller"
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
        self.folder = Path(cache).expanduser() / "latency" / name

    def kept(self) -> tuple[LatencyEstimatorModel, LatencyCheck] | None:
        """The estimator that an earlier check found right or adapted, and what it found; `None` if there was none, or what it
        left is damaged, of which a warning tells."""
        file = self.folder / _CHECK_FILE
        if not file.is_file():
            return None
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            check = LatencyCheck(**content["check"])
            estimator = LatencyEstimatorModel.from_pretrained(self.folder) if content["has_estimator"] else self.base
            if _digest(estimator) != content["digest"]:
                raise ValueError("its estimator is not the one that was written")
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            logger.warning(
                f"what an earlier check left in '{self.folder}' is damaged ({reason}): latencies are checked anew."
            )
            return None
        return estimator, check

    def check(
        self,
        path: RequestPath,
        current: LatencyEstimatorModel | None = None,
        num_requests: int = CHECK_REQUESTS,
        time_limit_s: float = CHECK_SECONDS,
        recalibrate: str = "auto",
        seed: int = 42,
    ) -> tuple[LatencyEstimatorModel, LatencyCheck]:
        """
        Measures requests at settings spread over the knob space, and compares them with predictions. What was found is kept
        if it is conclusive.

        Args:
            path ([`RequestPath`]):
                Takes the requests. Its executor is warmed up.
            current ([`LatencyEstimatorModel`], *optional*):
                The estimator that is compared, by default the base: e.g. one that was adapted before.
            num_requests (`int`, *optional*, defaults to 96), time_limit_s (`float`, *optional*, defaults to 10.0):
                Most requests to measure, and most seconds for it, after up to a tenth of that in which none is measured.
            recalibrate (`str`, *optional*, defaults to `"auto"`):
                Whether to adapt the base to what was measured, see [`~latency.recalibration.fit_recalibration`]: `"auto"`, if
                the current estimator is off; `"always"`; `"never"`.
            seed (`int`, *optional*, defaults to 42):
                Seed of the inputs and of the order of settings.

        Returns:
            `tuple[LatencyEstimatorModel, LatencyCheck]`: the estimator to use from now on, and what was found.

        Raises:
            ValueError: If a number is not positive, or `recalibrate` is unknown.
        """
        current = self.base if current is None else current
        if num_requests < 1 or not time_limit_s > 0:
            raise ValueError(
                f"`num_requests` is {num_requests} and `time_limit_s` is {time_limit_s}: give 1 or more, and more than 0."
            )
        if recalibrate not in RECALIBRATE:
            raise ValueError(f"`recalibrate` is '{recalibrate}': choose from {', '.join(map(repr, RECALIBRATE))}.")
        profile, num_disturbed, seconds = _measure(path, current, num_requests, time_limit_s, seed)
        check = replace(_compare(current, profile), num_disturbed=num_disturbed, seconds=seconds)
        is_to_be_adapted = recalibrate == "always" or (recalibrate == "auto" and check.finding != "")
        if check.is_conclusive and is_to_be_adapted:
            current, check = self._adapt(profile, check)
        if check.is_conclusive and recalibrate != "never":
            check = self._keep(current, check)
        return current, check

    def _adapt(self, profile: Dataset, check: LatencyCheck) -> tuple[LatencyEstimatorModel, LatencyCheck]:
        """The base with the coefficients that predict what they were not adapted to best, its own or recalibrated ones, and with
        the quantiles of these measurements."""
        of_base = _held_out_of(self.base, profile)
        adapted, held_out = fit_recalibration(self.base, profile, _NUM_FOLDS)
        error, adapted_error = (
            errors(one.measured_ms["total"], one.predicted_ms["total"])["mape"] for one in (of_base, held_out)
        )
        config = {
            # A few measurements narrow nothing down.
            "fitted_knobs": self.base.config.fitted_knobs,
            "fitted_counts": self.base.config.fitted_counts,
            "held_out": adapted.config.held_out if adapted_error < error else None,
        }
        if adapted_error >= error:
            config["upper_quantiles"] = calibrate_quantiles(of_base)
        estimator = LatencyEstimatorModel(LatencyEstimatorConfig(**{**adapted.config.to_dict(), **config}))
        estimator.load_state_dict((adapted if adapted_error < error else self.base).state_dict())
        check = replace(check, is_adapted=True, error=error, adapted_error=min(error, adapted_error))
        return estimator.to(self.base.device), check

    def _keep(self, estimator: LatencyEstimatorModel, check: LatencyCheck) -> LatencyCheck:
        """Writes what was found, with the estimator unless it is the base, and gives it back as kept, if it could be written."""
        check = replace(check, is_kept=True)
        content = {
            "check": asdict(check),
            "has_estimator": estimator is not self.base,
            "digest": _digest(estimator),
        }
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.folder.parent) as unfinished:
                # The folder has its name only once it is whole.
                whole, replaced = Path(unfinished) / "whole", Path(unfinished) / "replaced"
                whole.mkdir()
                if content["has_estimator"]:
                    # As `save_pretrained` does, without its progress bar.
                    estimator.config.save_pretrained(whole)
                    save_file(estimator.state_dict(), whole / "model.safetensors", {"format": "pt"})
                (whole / _CHECK_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
                if self.folder.exists():
                    self.folder.rename(replaced)
                whole.rename(self.folder)
        except OSError as error:
            logger.warning(
                f"what the check of latencies found cannot be kept in '{self.folder}' ({error}), so that it will be measured again: "
                f"let ${CACHE_VARIABLE} name a folder that can be written to."
            )
            return replace(check, is_kept=False)
        return check


def _digest(estimator: LatencyEstimatorModel) -> str:
    """Stands for an estimator's configuration and weights."""
    config = estimator.config.to_dict()
    told_by_saving = ("architectures", "dtype", "_name_or_path", "transformers_version")
    config = {name: value for name, value in config.items() if name not in told_by_saving}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    digest.update(save({name: value.cpu().contiguous() for name, value in estimator.state_dict().items()}))
    return digest.hexdigest()


def _measure(
    path: RequestPath, estimator: LatencyEstimatorModel, num_requests: int, time_limit_s: float, seed: int
) -> tuple[Dataset, int, float]:
    """Single requests as a profile in the estimator's scope, without those that were disturbed, unless all were; how many were; and
    how long all took."""
    executor, inputs = path.executor, list(make_profile_inputs(_NUM_INPUTS, seed))
    model_stages = [stage for stage in RequestCosts(estimator.costs.cost_model, MODEL_SCOPE).stages if stage != DECODE]
    machine = {**machine_columns(executor), "latency_scope": estimator.latency_scope}
    # Several threads, or a GPU, compute while this thread waits.
    tells_disturbed = machine["device_type"] == "cpu" and machine["num_threads"] == "1"
    pairs = plan_pairs(executor.knob_space.settings, len(inputs), seed)[:num_requests]
    requests = [ExecutorRequest(**inputs[position], setting=setting) for setting, position in pairs]
    started = time.perf_counter()
    for request in requests:
        # Clocks rise, and caches fill, within the first second of work.
        path.answer(request, path.timing_budget_ms, request.setting, _DECODE_STEPS)
        if time.perf_counter() - started > _WARM_UP_SHARE * time_limit_s:
            break
    rows, is_disturbed = [], []
    started = time.perf_counter()
    for request in requests:
        begun, begun_computing = time.perf_counter(), time.thread_time()
        times = path.answer(request, path.timing_budget_ms, request.setting, _DECODE_STEPS).times
        computing, taken = time.thread_time() - begun_computing, time.perf_counter() - begun
        rows.append({**measurement_row(request.sample_id, request.setting, [times], model_stages), **machine})
        is_disturbed.append(tells_disturbed and computing < LEAST_CPU_SHARE * taken)
        if time.perf_counter() - started > time_limit_s:
            break
    seconds = time.perf_counter() - started
    undisturbed = [row for row, disturbed in zip(rows, is_disturbed, strict=True) if not disturbed]
    return make_profile(undisturbed or rows), sum(is_disturbed), seconds


def _held_out_of(estimator: LatencyEstimatorModel, profile: Dataset) -> HeldOut:
    """All measurements, predicted by an estimator that has seen none of them."""
    return predict_held_out(profile, [([], list(range(len(profile))))], [estimator])


def _compare(estimator: LatencyEstimatorModel, profile: Dataset) -> LatencyCheck:
    columns = profile_columns(profile)
    names = (*estimator.costs.knob_names, *estimator.costs.count_names, "output_tokens")
    estimate = estimator(**{name: columns[name] for name in names})
    held_out = _held_out_of(estimator, profile)
    measured = {stage: columns[time_column(stage)] for stage in estimator.costs.stages}
    predicted = {**estimate.stage_ms, DECODE: estimate.decode_ms_per_token}
    measured["total"], predicted["total"] = held_out.measured_ms["total"], held_out.predicted_ms["total"]

    def medians(values: dict[str, torch.Tensor]) -> dict[str, float]:
        return {name: one.double().nanmedian().item() for name, one in values.items()}

    ratios = {name: measured[name] / predicted[name] for name in measured}
    total = ratios["total"]
    quantiles = (estimator.config.upper_quantiles or {}).get(estimator.latency_scope, {})
    upper = quantiles.get(str(COVERED_QUANTILE))
    sixths = [sixth.median() for sixth in total.tensor_split(min(6, len(total)))]
    check = LatencyCheck(
        num_requests=len(profile),
        num_disturbed=0,
        seconds=0.0,
        latency_scope=estimator.latency_scope,
        measured_ms=medians(measured),
        predicted_ms=medians(predicted),
        ratios=medians(ratios),
        p95_ratio=conformal_quantile(total, COVERED_QUANTILE),
        predicted_p95_ratio=upper,
        coverage=None if upper is None else (total <= upper).double().mean().item(),
        swing=(max(sixths) / min(sixths)).item(),
        finding="",
    )
    return replace(check, finding=_finding(check))


def _finding(check: LatencyCheck) -> str:
    least, most = CHECKED_RATIOS
    if not least <= check.ratios["total"] <= most:
        return f"latencies are {check.ratios['total']:.2f} times what was predicted"
    if check.predicted_p95_ratio is None:
        return "it predicts no 95 % quantile"
    if check.coverage < LEAST_COVERAGE:
        return f"{check.coverage:.1%} lie below the predicted 95 % quantile"
    if check.predicted_p95_ratio > WIDEST_QUANTILE * check.p95_ratio:
        return (
            f"the predicted 95 % quantile is {check.predicted_p95_ratio / check.p95_ratio:.2f} times the measured one"
        )
    return ""
