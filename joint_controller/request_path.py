"""The way of one request, from the image in memory to the answer: what serving does, and what profiles measure."""

import gc
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from .controller import RequestController
from .decisions import decide_one
from .executor import (
    DECODE,
    MODEL_SCOPE,
    OVERHEAD,
    Executor,
    ExecutorOutput,
    ExecutorRequest,
    OpenRequest,
    StageClock,
    StageTimes,
    executor_family,
)
from .knobs import KnobSetting
from .latency.guardrail import Guardrail, RequestPrediction
from .latency.profile_inputs import make_profile_inputs
from .latency.request_costs import RequestCosts
from .latency.tracking import LatencyTracker


WARM_UP_REQUESTS = 8
"""Whole requests of a warm-up, unless they take longer than `WARM_UP_SECONDS`."""

WARM_UP_SECONDS = 5.0


@dataclass(frozen=True)
class PathAnswer:
    """
    The answer to one request, and what it took.

    Args:
        output ([`ExecutorOutput`]):
            The answer.
        fits_budget (`bool`, *optional*):
            With a guardrail, whether any setting was predicted to fit the budget. `None` without one.
        times ([`StageTimes`]):
            What each stage took, by the clock.
        measured_ms (`float`):
            What these took together, in the latency scope of the predictions.
        latency_ms (`float`, *optional*):
            With a guardrail, what an answer of this length typically takes at this setting.
        latency_upper_ms (`float`, *optional*):
            With a guardrail that promises a quantile, what it was predicted to stay below.
    """

    output: ExecutorOutput
    fits_budget: bool | None
    times: StageTimes
    measured_ms: float
    latency_ms: float | None = None
    latency_upper_ms: float | None = None


class RequestPath:
    """
    Takes requests from image and question to the answer, one at a time, and their time by stage. Whatever is measured is
    measured here, so that predictions are about what users wait for.

    Args:
        executor ([`Executor`]):
            Answers.
        controller ([`RequestController`], *optional*):
            Takes the decisions. Without one, each request is answered at a setting that is given.
        guardrail ([`Guardrail`], *optional*):
            Says which settings the controller may choose, and predicts what requests take.
        tracker ([`~latency.tracking.LatencyTracker`], *optional*):
            Follows how far latencies drift from these predictions, and corrects them.

    Example:

    ```python
    >>> path = RequestPath(executor, RequestController(controller), guardrail)
    >>> path.answer(request, latency_budget_ms=20).times.stage_ms
    {'overhead': 0.2, 'controller': 0.6, 'image_processing': 1.9, 'vision': 5.0, 'llm_prefill': 4.8}
    ```
    """

    def __init__(
        self,
        executor: Executor,
        controller: RequestController | None = None,
        guardrail: Guardrail | None = None,
        tracker: LatencyTracker | None = None,
    ):
        self.executor = executor
        self.controller = controller
        self.guardrail = guardrail
        self.tracker = tracker
        self._model_stages = None
        if guardrail is not None and guardrail.latency_estimator.latency_scope == MODEL_SCOPE:
            costs = executor_family(executor.model_type).cost_model(executor.shape, None, executor.knob_space.names)
            self._model_stages = RequestCosts(costs, MODEL_SCOPE).stages

    def warm_up(self, progress: bool = False) -> None:
        """
        Does beforehand what the first requests would wait for: [`Executor.warm_up`], and some whole requests.

        Args:
            progress (`bool`, *optional*, defaults to `False`):
                Whether to show a progress bar (never where the output is not a terminal).
        """
        self.executor.warm_up(progress)
        settings = self.executor.knob_space.settings
        untracked = RequestPath(self.executor, self.controller, self.guardrail)
        started = time.perf_counter()
        for number, row in enumerate(make_profile_inputs(WARM_UP_REQUESTS)):
            setting = settings[number * (len(settings) - 1) // (WARM_UP_REQUESTS - 1)]
            untracked.answer(ExecutorRequest(**row, setting=setting), self.timing_budget_ms, setting)
            if time.perf_counter() - started > WARM_UP_SECONDS:
                break

    @property
    def timing_budget_ms(self) -> float:
        """Budget of requests whose setting is given."""
        return 1.0 if self.controller is None else self.controller.controller.config.latency_budget_max_ms

    @torch.inference_mode()
    def answer(
        self,
        request: ExecutorRequest,
        latency_budget_ms: float,
        setting: KnobSetting | None = None,
        decode_steps: int | None = None,
        spent_ms: float = 0.0,
    ) -> PathAnswer:
        """
        Answers a request.

        Args:
            request ([`ExecutorRequest`]):
                The request. Its setting is not looked at.
            latency_budget_ms (`float`):
                Its budget, in ms.
            setting ([`KnobSetting`], *optional*):
                Setting to answer it at: decisions are then taken, and what they take is measured, but not followed.
            decode_steps (`int`, *optional*):
                Tokens to decode after the first, whatever the answer. By default, decoding ends with the answer.
            spent_ms (`float`, *optional*, defaults to 0.0):
                What the request has taken before it came here, e.g. until its image was decoded: counted as overhead, and
                not left of its budget if that is of whole requests.

        Raises:
            ValueError: If the executor refuses the request, its prompt is too long at every setting, or there is neither a
                controller nor a setting.
        """
        if self.controller is None and setting is None:
            raise ValueError("there is no controller to choose a setting: give `setting`.")
        with undisturbed(self.executor.device):
            return self._answer(request, latency_budget_ms, setting, decode_steps, spent_ms)

    def _answer(
        self,
        request: ExecutorRequest,
        latency_budget_ms: float,
        setting: KnobSetting | None,
        decode_steps: int | None,
        spent_ms: float,
    ) -> PathAnswer:
        clock = StageClock(self.executor.device)
        opened = self.executor.open(request, clock)
        # Of the model's stages, none has begun.
        counted_ms = spent_ms if self._model_stages is None else 0.0
        left_ms = latency_budget_ms - counted_ms
        prediction = None if self.guardrail is None else self._predict(request, opened)
        fits_budget = None
        if self.controller is None:
            opened.vision_features([request.at(setting)])
        else:
            fit, typical_budget_ms = None, left_ms
            if prediction is not None:
                typical_budget_ms, fit = self.guardrail.fit_one(prediction, left_ms, self._upper_ratio())
                fits_budget = None if self.guardrail.quantile is None else fit.fits_budget
            features = opened if setting is None else _EncodedAt(opened, setting)
            chosen = decide_one(self.controller, features, request, typical_budget_ms, fit)
            setting = chosen if setting is None else setting
        output = opened.answer(setting, decode_steps)
        typical_ms = latency_ms = latency_upper_ms = None
        if prediction is not None:
            position = self.executor.knob_space.index(setting)
            typical_ms = prediction.typical_ms(position, output.output_tokens)
            latency_ms = counted_ms + typical_ms * (1.0 if self.tracker is None else self.tracker.factor)
            if self.guardrail.quantile is not None:
                latency_upper_ms = counted_ms + self._upper_ratio() * prediction.all_tokens_ms[position]
        times = clock.stop(OVERHEAD)
        decode_ms = times.pop(DECODE, [])
        stage_ms = {stage: sum(times[stage]) for stage in times}
        stage_ms[OVERHEAD] += spent_ms
        stage_times = StageTimes(stage_ms, decode_ms, output.counts, output.output_tokens)
        measured_ms = stage_times.total_ms
        if self._model_stages is not None:
            measured_ms = sum(stage_ms[stage] for stage in self._model_stages if stage != DECODE) + sum(decode_ms)
        if self.tracker is not None and typical_ms is not None:
            is_to_fit = latency_ms <= latency_budget_ms if fits_budget is None else fits_budget
            is_over = measured_ms > latency_budget_ms if is_to_fit else None
            self.tracker.add((measured_ms - counted_ms) / typical_ms, is_over)
        return PathAnswer(output, fits_budget, stage_times, measured_ms, latency_ms, latency_upper_ms)

    def _predict(self, request: ExecutorRequest, opened: OpenRequest) -> RequestPrediction:
        prediction = self.guardrail.predict_one(request, opened)
        fewest, most = min(prediction.prompt_tokens), self.executor.max_prompt_tokens
        if fewest > most:
            raise ValueError(
                f"the prompt of the question has {fewest} tokens, those of the image at the setting that needs fewest included, "
                f"but the executor has room for {most}: ask in fewer words."
            )
        return prediction

    def _upper_ratio(self) -> float | None:
        return self.guardrail.upper_ratio if self.tracker is None else self.tracker.upper_ratio

    def time(
        self, request: ExecutorRequest, repeats: int = 5, warmup: int = 2, decode_steps: int | None = None
    ) -> StageTimes:
        """
        Times the stages of a request at its own setting: medians over repeats.

        Args:
            request ([`ExecutorRequest`]):
                The request.
            repeats (`int`, *optional*, defaults to 5):
                Runs that are measured.
            warmup (`int`, *optional*, defaults to 2):
                Runs before these that are not measured.
            decode_steps (`int`, *optional*):
                As in [`~RequestPath.answer`].

        Raises:
            ValueError: If the setting is outside the knob space, or there is nothing to measure.
        """
        if repeats < 1 or warmup < 0:
            raise ValueError(f"`repeats` is {repeats} and `warmup` is {warmup}: give 1 or more and 0 or more.")
        # Reading the image's file is not part of the request.
        request = replace(request, image=request.load_image())
        runs = [
            self.answer(request, self.timing_budget_ms, request.setting, decode_steps).times
            for _ in range(warmup + repeats)
        ]
        return median_times(runs[warmup:])


def median_times(runs: Sequence[StageTimes]) -> StageTimes:
    """Medians of the times of one request that was answered several times at one setting."""
    # Kernels that round differently may end an answer at another token.
    steps = zip(*(run.decode_ms for run in runs), strict=False)
    decode_ms = [statistics.median(step) for step in steps]
    return StageTimes(
        stage_ms={stage: statistics.median(run.stage_ms[stage] for run in runs) for stage in runs[0].stage_ms},
        decode_ms=decode_ms,
        counts=runs[0].counts,
        output_tokens=1 + len(decode_ms),
    )


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """
    Keeps from a request what would make it wait by chance: a collection of garbage, which takes up to hundreds of milliseconds
    in a process with as many objects as torch has, and is left for between requests; and on a GPU threads, of which the small
    operations on the host need no more than one.
    """
    collects, num_threads = gc.isenabled(), torch.get_num_threads()
    gc.disable()
    if device.type == "cuda" and num_threads != 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if torch.get_num_threads() != num_threads:
            torch.set_num_threads(num_threads)
        if collects:
            gc.enable()


class _EncodedAt:
    """Features of a request whose image is encoded at a given setting, whatever stage 1 decides."""

    def __init__(self, opened: OpenRequest, setting: KnobSetting):
        self.question_features = opened.question_features
        self._opened = opened
        self._setting = setting

    def vision_features(self, requests: Sequence[ExecutorRequest]) -> torch.Tensor:
        [request] = requests
        return self._opened.vision_features([request.at(self._setting)])
