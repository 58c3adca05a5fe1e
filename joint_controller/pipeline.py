"""One call for users: an image, a question and a budget in; an answer inside the budget by the clock, and what it took, out."""

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from .controller import JointControllerModel, RequestController, find_controller_folder, load_controller
from .executor import DECODE, EMBEDDED, MODEL_SCOPE, OVERHEAD, Executor, ExecutorRequest
from .knobs import KnobSetting
from .latency import Guardrail, LatencyEstimator, LatencyEstimatorModel, read_latency_estimator
from .latency.clock_check import CHECK_REQUESTS, CHECK_SECONDS, ClockChecker, LatencyCheck
from .latency.run_as_measured import check_runs_as_measured, load_as_measured, torch_threads
from .latency.tracking import LatencyDrift, LatencyTracker
from .request_checks import checked_budget, checked_image, checked_question
from .request_path import RequestPath, undisturbed


@dataclass(frozen=True)
class BudgetedAnswer:
    """
    An answer that was given under a budget.

    Args:
        answer (`str`):
            The executor's answer.
        setting ([`KnobSetting`]):
            Setting that the controller chose.
        latency_ms (`float`):
            What an answer of this length was predicted to take at this setting, typically, in ms.
        latency_upper_ms (`float`, *optional*):
            What it was predicted to stay below, with the guardrail's probability. `None` without a guardrail.
        latency_budget_ms (`float`):
            The budget, in ms.
        fits_budget (`bool`, *optional*):
            With a guardrail, whether the setting was predicted to fit the budget; if not, none was, and the cheapest one
            was taken. `None` without a guardrail.
        measured_ms (`dict[str, float]`):
            What each stage took by the clock, in order: `"overhead"`, `"controller"`, the executor's stages up to the first
            token, and `"decode"`, all further tokens together.
        measured_latency_ms (`float`):
            What they took together; with the latency scope `"model"`, the model's stages alone.
        latency_scope (`str`):
            What latencies and the budget are of: `"request"`, all that the call costs by the clock, or `"model"`, the stages
            of the model alone.
    """

    answer: str
    setting: KnobSetting
    latency_ms: float
    latency_upper_ms: float | None
    latency_budget_ms: float
    fits_budget: bool | None
    measured_ms: dict[str, float]
    measured_latency_ms: float
    latency_scope: str


class JointPipeline:
    """
    Answers questions about images inside latency budgets, with a trained controller. Calls may come from any thread: they
    take turns, and what a call waits for its turn is not counted.

    Args:
        controller ([`JointControllerModel`]):
            Chooses the setting of each request.
        executor ([`Executor`]):
            Answers. Its knob space must be the controller's.
        latency_estimator ([`LatencyEstimator`]):
            Predicts what requests take, for this executor and its way of running.
        guardrail_quantile (`float`, *optional*, defaults to 0.95):
            Lets the controller choose only among settings whose latency is predicted to stay below the budget, with an
            answer of the executor's `max_new_tokens`, on this share of requests: 0.5, 0.9, 0.95 or 0.99. `None` lets it choose
            any setting. See [`~latency.Guardrail`].
        adapt (`bool`, *optional*, defaults to `True`):
            Whether predictions follow what requests take, see [`~latency.tracking.LatencyTracker`].
        num_threads (`int`, *optional*):
            CPU threads an operation, where the estimator does not know how many it was measured with. By default torch's.

    Raises:
        ValueError: If controller, executor and estimator do not belong together, or the estimator does not predict the
            guardrail's quantile.

    Example:

    ```python
    >>> from joint_controller import JointPipeline

    >>> pipeline = JointPipeline.from_pretrained("outputs/easy_vqa")
    >>> pipeline(image, "what color is the star ?", latency_budget_ms=15)
    BudgetedAnswer(answer='red', setting=KnobSetting(tier='medium', ...), latency_ms=11.2, ...)
    ```
    """

    def __init__(
        self,
        controller: JointControllerModel,
        executor: Executor,
        latency_estimator: LatencyEstimator,
        guardrail_quantile: float | None = 0.95,
        adapt: bool = True,
        num_threads: int | None = None,
    ):
        if controller.knob_space != executor.knob_space:
            raise ValueError(
                f"the controller chooses from {controller.knob_space}, but the executor takes {executor.knob_space}: give the "
                "executor the controller's knob space."
            )
        sizes = {"question": controller.sees_question, "vision": controller.sees_image}
        for name in (f"{seen}_size" for seen, is_seen in sizes.items() if is_seen):
            trained_for, there_is = getattr(controller.config, name), getattr(executor, name)
            if trained_for != there_is:
                raise ValueError(
                    f"the controller was trained for an executor whose `{name}` is {trained_for}, but this one's is {there_is}: "
                    "give the executor that it was trained with."
                )
        latency_estimator.check_executor(executor)
        check_runs_as_measured(latency_estimator, executor)
        self.executor = executor
        self.guardrail_quantile = guardrail_quantile
        self._adapt = adapt
        self._num_threads = num_threads if latency_estimator.way is None else latency_estimator.way.num_threads
        self._lock = threading.RLock()
        self._is_warm = False
        self._numbers = itertools.count()
        self._controller = RequestController(controller.to(executor.device))
        self._checker = None
        if isinstance(latency_estimator, LatencyEstimatorModel):
            with self._turn():
                self._checker = ClockChecker(latency_estimator, executor)
        self._use(latency_estimator)

    def _use(self, latency_estimator: LatencyEstimator) -> None:
        """Predicts by an estimator from now on."""
        guardrail = Guardrail(latency_estimator, self.executor, self.guardrail_quantile)
        tracker = LatencyTracker(guardrail.quantile, guardrail.upper_ratio, self._adapt)
        self.latency_estimator = latency_estimator
        self._path = RequestPath(self.executor, self._controller, guardrail, tracker)

    @property
    def drift(self) -> LatencyDrift:
        """How far latencies are from what the estimator predicts, since it was last checked or measured."""
        return self._path.tracker.drift

    @classmethod
    def from_pretrained(
        cls,
        controller_path: str | Path,
        model_path: str | Path = EMBEDDED,
        latency_estimator_path: str | Path | None = None,
        latency_scope: str | None = None,
        guardrail_quantile: float | None = 0.95,
        check_latency: bool = True,
        warm_up: bool = True,
        progress: bool = True,
        adapt: bool = True,
        **kwargs: Any,
    ) -> "JointPipeline":
        """
        Loads everything that answering needs, and runs the executor as the latency estimator was measured: on a device of
        that type, in that mode and precision, with so many threads.

        Args:
            controller_path (`str` or `Path`):
                Output folder of a training, or the name of a Hub repository (`org/name`).
            model_path (`str` or `Path`, *optional*, defaults to `"embedded"`):
                The executor that the controller was trained with.
            latency_estimator_path (`str` or `Path`, *optional*):
                Folder of the estimator, or a `best_latency_estimator.pt` of the original scripts. Defaults to
                `latency_estimator` in the controller's folder.
            latency_scope (`str`, *optional*):
                What budgets are of: `"request"`, all that a call costs by the clock, or `"model"`, the model's stages alone.
                Defaults to what the controller was trained for, which is the estimator's.
            guardrail_quantile (`float`, *optional*, defaults to 0.95), adapt (`bool`, *optional*, defaults to `True`):
                As in [`JointPipeline`].
            check_latency (`bool`, *optional*, defaults to `True`):
                Whether to compare predictions with this machine's clock, see [`~JointPipeline.check_latency`]. What was
                found is kept per machine: later loads do not measure again.
            warm_up (`bool`, *optional*, defaults to `True`):
                Whether to do now what the first requests would wait for.
            progress (`bool`, *optional*, defaults to `True`):
                Whether to say what is done, and to show progress bars.
            **kwargs:
                Further arguments of [`~executor.load_executor`], and `num_threads` (CPU threads an operation). What is not
                the estimator's way of running is refused. `max_new_tokens` defaults to the controller's.

        Raises:
            FileNotFoundError: If the controller or the executor cannot be found.
            ValueError: If another way of running is asked for than the estimator's, or its device is not here; as
                [`JointPipeline`].
        """
        folder = find_controller_folder(controller_path)
        controller = load_controller(folder)
        if latency_estimator_path is None:
            latency_estimator_path = folder / "latency_estimator"
            if not latency_estimator_path.is_dir():
                raise FileNotFoundError(
                    f"'{controller_path}' has no latency estimator, as the controller was trained on recorded latencies: give "
                    "`latency_estimator_path`."
                )
        latency_estimator = read_latency_estimator(latency_estimator_path, latency_scope)
        if controller.config.max_new_tokens is not None:
            kwargs.setdefault("max_new_tokens", controller.config.max_new_tokens)
        executor, num_threads = load_as_measured(
            latency_estimator, model_path, knob_space=controller.knob_space, **kwargs
        )
        pipeline = cls(controller, executor, latency_estimator, guardrail_quantile, adapt, num_threads)
        if warm_up:
            pipeline.warm_up(progress)
        if check_latency:
            pipeline._check_once(progress)
        return pipeline

    def _check_once(self, progress: bool) -> None:
        """Takes what an earlier check on this machine found, or checks now."""
        kept = None if self._checker is None else self._checker.kept()
        if kept is not None:
            self._use(kept[0])
        elif self._checker is not None:
            self.check_latency(progress=progress)
        elif progress:
            tqdm.write(f"A {type(self.latency_estimator).__name__} is not checked against the clock.")

    def check_latency(
        self,
        num_requests: int = CHECK_REQUESTS,
        time_limit_s: float = CHECK_SECONDS,
        recalibrate: str = "auto",
        progress: bool = True,
    ) -> LatencyCheck:
        """
        Compares predictions with the clock: measures requests at settings that are spread over the knob space, and if the
        estimator is off, adapts it to them. What was found is kept for later loads on this machine. See
        [`~latency.clock_check.ClockChecker`].

        Args:
            num_requests (`int`, *optional*, defaults to 96), time_limit_s (`float`, *optional*, defaults to 10.0):
                Most requests to measure, and most seconds for it.
            recalibrate (`str`, *optional*, defaults to `"auto"`):
                Whether to adapt the estimator: `"auto"`, if it is off; `"always"`; `"never"`.
            progress (`bool`, *optional*, defaults to `True`):
                Whether to say what was found and done.

        Returns:
            [`~latency.clock_check.LatencyCheck`]

        Raises:
            ValueError: If the estimator is not a [`LatencyEstimatorModel`], or an argument is not allowed.
        """
        if self._checker is None:
            raise ValueError(
                f"a {type(self.latency_estimator).__name__} cannot be checked: give an estimator that `joint-controller "
                "fit-latency` fitted."
            )
        if not self._is_warm:
            self.warm_up(progress)
        with self._turn():
            path = RequestPath(self.executor, self._controller, self._path.guardrail)
            estimator, check = self._checker.check(
                path, self.latency_estimator, num_requests, time_limit_s, recalibrate
            )
            self._use(estimator)
        if progress:
            tqdm.write(check.summary())
        return check

    def warm_up(self, progress: bool = True) -> None:
        """
        Does what the first requests would wait for: the executor's warm-up, and some whole requests.

        Args:
            progress (`bool`, *optional*, defaults to `True`):
                Whether to say how long it took, and to show a progress bar.
        """
        started = time.perf_counter()
        with self._turn():
            self._path.warm_up(progress)
            self._is_warm = True
        if progress:
            tqdm.write(f"Warmed up in {time.perf_counter() - started:.1f} s.")

    def __call__(
        self, image: Image.Image, question: str, latency_budget_ms: float, style: str = "vqa2"
    ) -> BudgetedAnswer:
        """
        Answers one question.

        Args:
            image (`PIL.Image.Image`):
                The image. If its file has not been read yet, that counts, too.
            question (`str`):
                The question.
            latency_budget_ms (`float`):
                What the call may take by the clock, in ms; with the latency scope `"model"`, what the model may take.
            style (`str`, *optional*, defaults to `"vqa2"`):
                How the question is put to the executor.

        Returns:
            [`BudgetedAnswer`]

        Raises:
            ValueError: If the budget is no finite number above 0, the question is no text, blank, or longer than the executor
                takes, the image cannot be used, or the executor does not know the style.
        """
        with self._turn():
            started = time.perf_counter()
            budget_ms = checked_budget(latency_budget_ms)
            question, image = checked_question(question), checked_image(image)
            # A name of its own: the executor keeps what it computes of a sample under it.
            sample_id = f"request-{next(self._numbers)}"
            request = ExecutorRequest(sample_id, image, question, style, self.executor.knob_space.cheapest)
            spent_ms = 1000.0 * (time.perf_counter() - started)
            found = self._path.answer(request, budget_ms, spent_ms=spent_ms)
            measured_ms = {**found.times.stage_ms, DECODE: sum(found.times.decode_ms)}
            # What the path's own clock does not see.
            unseen_ms = 1000.0 * (time.perf_counter() - started) - sum(measured_ms.values())
            measured_ms[OVERHEAD] += max(0.0, unseen_ms)
        scope = self.latency_estimator.latency_scope
        return BudgetedAnswer(
            answer=found.output.answer,
            setting=found.output.setting,
            latency_ms=found.latency_ms,
            latency_upper_ms=found.latency_upper_ms,
            latency_budget_ms=budget_ms,
            fits_budget=found.fits_budget,
            measured_ms=measured_ms,
            measured_latency_ms=found.measured_ms if scope == MODEL_SCOPE else sum(measured_ms.values()),
            latency_scope=scope,
        )

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """One call at a time, with the estimator's number of threads."""
        with self._lock, torch_threads(self._num_threads), undisturbed(self.executor.device):
            yield
