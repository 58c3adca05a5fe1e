"""One call for users: an image, a question and a budget in; an answer, the setting it was given at and its latency out."""

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from .controller import JointControllerModel, RequestController, find_controller_folder, load_controller
from .decisions import decide
from .executor import EMBEDDED, Executor, ExecutorRequest, load_executor
from .knobs import KnobSetting
from .latency import Guardrail, LatencyEstimator, read_latency_estimator, settings_that_fit


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
            Estimated latency of the request at batch 1, in ms.
        latency_budget_ms (`float`):
            The budget, in ms.
        fits_budget (`bool`, *optional*):
            With a guardrail, whether the setting was predicted to fit the budget; if not, none was, and the cheapest one
            was taken. `None` without a guardrail.
    """

    answer: str
    setting: KnobSetting
    latency_ms: float
    latency_budget_ms: float
    fits_budget: bool | None = None


class JointPipeline:
    """
    Answers questions about images inside latency budgets, with a trained controller.

    Args:
        controller ([`JointControllerModel`]):
            Chooses the setting of each request.
        executor ([`Executor`]):
            Answers. Its knob space must be the controller's.
        latency_estimator ([`LatencyEstimator`]):
            Estimates what a request took.
        guardrail_quantile (`float`, *optional*):
            Lets the controller choose only among settings whose latency is predicted to stay below the budget, with an
            answer of the executor's `max_new_tokens`, on this share of requests: 0.9, 0.95 or 0.99. By default it may
            choose any setting. See [`~latency.Guardrail`].

    Raises:
        ValueError: If controller, executor and estimator do not belong together, or the estimator does not predict the
            guardrail's quantile.

    Example:

    ```python
    >>> from joint_controller import JointPipeline

    >>> pipeline = JointPipeline.from_pretrained("outputs/easy_vqa")
    >>> pipeline(image, "what color is the star ?", latency_budget_ms=60)
    BudgetedAnswer(answer='red', setting=KnobSetting(tier='medium', ...), latency_ms=44.1, ...)
    ```
    """

    def __init__(
        self,
        controller: JointControllerModel,
        executor: Executor,
        latency_estimator: LatencyEstimator,
        guardrail_quantile: float | None = None,
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
        self.executor = executor
        self.latency_estimator = latency_estimator
        self._guardrail = None
        if guardrail_quantile is not None:
            self._guardrail = Guardrail(latency_estimator, executor, guardrail_quantile)
        self._controller = RequestController(controller.to(executor.device))
        self._numbers = itertools.count()

    @classmethod
    def from_pretrained(
        cls,
        controller_path: str | Path,
        model_path: str | Path = EMBEDDED,
        latency_estimator_path: str | Path | None = None,
        guardrail_quantile: float | None = None,
        **kwargs: Any,
    ) -> "JointPipeline":
        """
        Loads everything that answering needs.

        Args:
            controller_path (`str` or `Path`):
                Output folder of a training, or the name of a Hub repository (`org/name`).
            model_path (`str` or `Path`, *optional*, defaults to `"embedded"`):
                The executor that the controller was trained with.
            latency_estimator_path (`str` or `Path`, *optional*):
                Folder of the estimator, or a `best_latency_estimator.pt` of the original scripts. Defaults to
                `latency_estimator` in the controller's folder.
            guardrail_quantile (`float`, *optional*):
                As in [`JointPipeline`].
            **kwargs:
                Further arguments of [`~executor.load_executor`].

        Raises:
            FileNotFoundError: If the controller or the executor cannot be found.
        """
        folder = find_controller_folder(controller_path)
        controller = load_controller(folder)
        executor = load_executor(model_path, knob_space=controller.knob_space, **kwargs)
        if latency_estimator_path is None:
            latency_estimator_path = folder / "latency_estimator"
            if not latency_estimator_path.is_dir():
                raise FileNotFoundError(
                    f"'{controller_path}' has no latency estimator, as the controller was trained on recorded latencies: give "
                    "`latency_estimator_path`."
                )
        return cls(controller, executor, read_latency_estimator(latency_estimator_path), guardrail_quantile)

    def __call__(
        self, image: Image.Image, question: str, latency_budget_ms: float, style: str = "vqa2"
    ) -> BudgetedAnswer:
        """
        Answers one question.

        Args:
            image (`PIL.Image.Image`):
                The image.
            question (`str`):
                The question.
            latency_budget_ms (`float`):
                What the answer may take, in ms.
            style (`str`, *optional*, defaults to `"vqa2"`):
                How the question is put to the executor.

        Returns:
            [`BudgetedAnswer`]

        Raises:
            ValueError: If the question is empty, the budget is not positive, or the executor does not know the style.
        """
        if not question.strip():
            raise ValueError("`question` is empty.")
        if latency_budget_ms <= 0:
            raise ValueError(f"`latency_budget_ms` is {latency_budget_ms}: a budget must be above 0 ms.")
        # A name of its own: the executor keeps encoded images under it.
        sample_id = f"request-{next(self._numbers)}"
        request = ExecutorRequest(sample_id, image, question, style, self.executor.knob_space.cheapest)
        fits = fits_budget = None
        if self._guardrail is not None:
            predicted_ms = self._guardrail.predict_latency_ms([request])
            fits, [fits_budget] = settings_that_fit(predicted_ms, latency_budget_ms)
            fits_budget = fits_budget.item()
        # An image that is encoded to decide is found again when the request is answered.
        [setting] = decide(self._controller, self.executor, [request], latency_budget_ms, fits).settings
        [output] = self.executor.run([replace(request, setting=setting)])
        counts = {name: [count] for name, count in output.counts.items()}
        [latency_ms] = self.latency_estimator.predict_latency_ms([setting], counts, [output.output_tokens]).tolist()
        return BudgetedAnswer(output.answer, setting, latency_ms, latency_budget_ms, fits_budget)
