"""Configuration of the two-stage controller."""

from transformers import PreTrainedConfig

from ..knobs import KnobSpace


STAGE1_INPUTS = ("question_and_budget", "budget")
HEADS = ("joint", "independent")
STAGE2_INPUTS = ("image_question_and_budget", "question_and_budget", "budget")


class JointControllerConfig(PreTrainedConfig):
    r"""
    Configuration of [`JointControllerModel`].

    Args:
        > Parameters that describe the executor

        knob_space (`dict`, *optional*):
            Knobs of the executor, as in [`KnobSpace.to_dict`]. Required by the model.
        question_size (`int`, *optional*, defaults to 2048):
            Width of the executor's question features. Not used where no stage sees the question.
        vision_size (`int`, *optional*, defaults to 2048):
            Width of the executor's vision features. Not used where stage 2 does not see the image.

        > Parameters that describe the budget

        latency_budget_min_ms (`float`, *optional*, defaults to 10.0):
            Lowest budget of the training range, in ms: encoded as 0.
        latency_budget_max_ms (`float`, *optional*, defaults to 42.0):
            Highest budget of the training range, in ms: encoded as 1. Budgets outside the range are encoded beyond 0 and
            1, where the controller extrapolates from what it saw in training.
        budget_octaves (`int`, *optional*, defaults to 3):
            Frequencies of the sinusoidal budget encoding: \\(\pi, 2\pi, 4\pi, …\\) over the training range. The finest
            one tells budgets apart that are \\(2^{-\text{octaves}}\\) of the range apart.

        > Parameters that describe the policy

        stage1_inputs (`str`, *optional*, defaults to `"question_and_budget"`):
            What stage 1 decides its knobs from: `"question_and_budget"`, or `"budget"` alone.
        stage2_inputs (`str`, *optional*, defaults to `"image_question_and_budget"`):
            What stage 2 decides its knobs from, besides the choice of stage 1: `"image_question_and_budget"`,
            `"question_and_budget"`, or `"budget"` alone.
        projection_size (`int`, *optional*, defaults to 32):
            Width that question, vision, budget and each knob of stage 1 are projected to.
        hidden_size (`int`, *optional*, defaults to 64):
            Width of the two hidden layers of each stage.
        heads (`str`, *optional*, defaults to `"joint"`):
            How a stage with several knobs scores its choices: `"joint"`, each combination of values on its own, or
            `"independent"`, as the sum of a score for each value.
        sees_slack (`bool`, *optional*, defaults to `False`):
            Whether the controller is told which settings are predicted to fit the request, and how much of the budget each
            would leave ([`SettingFit`]).

        > Parameters that say what it was trained for

        rewards (`dict[str, float]`, *optional*):
            Weight of each reward function (by name, or by dotted path if it is not one of this package's).
        max_new_tokens (`int`, *optional*):
            Most tokens of the executor's answers in training, the end-of-sequence token included.
        training_seed (`int`, *optional*):
            Seed of the training.

    Raises:
        ValueError: If the knob space is not valid, the budget range is empty or not positive, or `stage1_inputs`,
            `stage2_inputs` or `heads` is unknown.

    Example:

    ```python
    >>> from joint_controller import JointControllerConfig, JointControllerModel, Knob, KnobSpace

    >>> space = KnobSpace([Knob("tier", ("low", "high"), stage=1), Knob("depth", (4, 6, 8), stage=2)])
    >>> config = JointControllerConfig(
    ...     knob_space=space.to_dict(), question_size=192, vision_size=192, latency_budget_min_ms=5, latency_budget_max_ms=20
    ... )
    >>> model = JointControllerModel(config)
    ```
    """

    model_type = "joint_controller"

    knob_space: dict | None = None
    question_size: int = 2048
    vision_size: int = 2048
    latency_budget_min_ms: float = 10.0
    latency_budget_max_ms: float = 42.0
    budget_octaves: int = 3
    stage1_inputs: str = "question_and_budget"
    stage2_inputs: str = "image_question_and_budget"
    projection_size: int = 32
    hidden_size: int = 64
    heads: str = "joint"
    sees_slack: bool = False
    rewards: dict[str, float] | None = None
    max_new_tokens: int | None = None
    training_seed: int | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.knob_space is not None:
            KnobSpace.from_dict(self.knob_space)  # refuses a space that is not valid
        if not 0 < self.latency_budget_min_ms < self.latency_budget_max_ms < float("inf"):
            raise ValueError(
                f"the budget range is {self.latency_budget_min_ms} to {self.latency_budget_max_ms} ms: "
                "`latency_budget_min_ms` must be above 0 and below `latency_budget_max_ms`, which must be finite."
            )
        for name, known in (("stage1_inputs", STAGE1_INPUTS), ("stage2_inputs", STAGE2_INPUTS), ("heads", HEADS)):
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` is '{getattr(self, name)}': it must be one of {list(known)}.")
