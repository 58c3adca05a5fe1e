"""One call for users: an image, a question and a budget in; an answer, the setting it was given at and its latency out."""

import itertools
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from .controller import JointControllerModel, RequestController
from .executor import ExecutorRequest
from .knobs import KnobSetting
from .latency import (
    Guardrail,
    LatencyEstimatorModel,
    OriginalLatencyEstimatorModel,
    read_latency_estimator,
    settings_that_fit,
)
from .molmo.executor import MolmoExecutor
from .outcomes import Outcome, predict_latency_ms


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
        executor ([`MolmoExecutor`]):
            Answers. Its knob space must be the controller's.
        latency_estimator ([`LatencyEstimatorModel`]):
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
    BudgetedAnswer(answer='red', setting=KnobSetting(tier='medium', top_k=2, num_blocks=5), latency_ms=44.1, ...)
    ```
    """

    def __init__(
        self,
        controller: JointControllerModel,
        executor: MolmoExecutor,
        latency_estimator: LatencyEstimatorModel | OriginalLatencyEstimatorModel,
        guardrail_quantile: float | None = None,
    ):
        if controller.knob_space != executor.knob_space:
            raise ValueError(
                f"the controller chooses from {controller.knob_space.to_dict()}, but the executor takes "
                f"{executor.knob_space.to_dict()}: give the executor the controller's knob space."
            )
        sees_features = controller.config.sees_question or controller.config.sees_image
        if sees_features and controller.config.question_size != executor.hidden_size:
            raise ValueError(
                f"the controller was trained for an executor {controller.config.question_size} wide, but this one is "
                f"{executor.hidden_size} wide: give the executor that it was trained with."
            )
        latency_estimator.check_executor(executor.model.config)
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
        model_path: str | Path = "embedded",
        latency_estimator_path: str | Path | None = None,
        guardrail_quantile: float | None = None,
        **kwargs,
    ) -> "JointPipeline":
        """
        Loads everything that answering needs.

        Args:
            controller_path (`str` or `Path`):
                Output folder of a training.
            model_path (`str` or `Path`, *optional*, defaults to `"embedded"`):
                The executor that the controller was trained with.
            latency_estimator_path (`str` or `Path`, *optional*):
                Folder of the estimator, or a `best_latency_estimator.pt` of the original scripts. Defaults to
                `latency_estimator` in the controller's folder.
            guardrail_quantile (`float`, *optional*):
                As in [`JointPipeline`].
            **kwargs:
                Further arguments of [`MolmoExecutor.from_pretrained`].

        Raises:
            FileNotFoundError: If the controller or the executor cannot be found.
        """
        if not (Path(controller_path) / "config.json").is_file():
            raise FileNotFoundError(
                f"`controller_path` '{controller_path}' is not the folder of a controller: give the output folder of "
                "`joint-controller train`."
            )
        controller = JointControllerModel.from_pretrained(controller_path)
        executor = MolmoExecutor.from_pretrained(model_path, knob_space=controller.knob_space, **kwargs)
        if latency_estimator_path is None:
            latency_estimator_path = Path(controller_path) / "latency_estimator"
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
            ValueError: If the question is empty or the budget is not positive.
        """
        if not question.strip():
            raise ValueError("`question` is empty.")
        if latency_budget_ms <= 0:
            raise ValueError(f"`latency_budget_ms` is {latency_budget_ms}: a budget must be above 0 ms.")
        # A name of its own: the executor keeps encoded images under it.
        sample_id = f"request-{next(self._numbers)}"
        request = ExecutorRequest(sample_id, image, question, style, self.executor.knob_space.cheapest)
        setting, fits_budget = self._choose(request, latency_budget_ms)
        [output] = self.executor.run([replace(request, setting=setting)])
        outcome = Outcome(
            sample_id=output.sample_id,
            setting=setting,
            answer=output.answer,
            accuracy=float("nan"),  # nobody knows
            num_views=output.num_views,
            vision_tokens=output.vision_tokens,
            text_tokens=output.text_tokens,
            output_tokens=output.output_tokens,
        )
        latency_ms = predict_latency_ms(self.latency_estimator, [outcome]).item()
        return BudgetedAnswer(output.answer, setting, latency_ms, latency_budget_ms, fits_budget)

    def _choose(self, request: ExecutorRequest, latency_budget_ms: float) -> tuple[KnobSetting, bool | None]:
        config, space = self._controller.controller.config, self.executor.knob_space
        fits = fits_budget = None
        if self._guardrail is not None:
            predicted_ms = self._guardrail.predict_latency_ms([request])
            [fits], [fits_budget] = settings_that_fit(predicted_ms, latency_budget_ms)
            fits_budget = fits_budget.item()
        question = self.executor.question_features([request.question]) if config.sees_question else None
        tier_index = self._controller.choose_tier(question, latency_budget_ms, fits)
        tier = space.values["tier"][tier_index]
        # Encoded here, the image is found again when the request is answered.
        vision = self.executor.vision_features([request], tier) if config.sees_image else None
        return space.setting((tier_index, *self._controller.choose_depth(vision))), fits_budget
