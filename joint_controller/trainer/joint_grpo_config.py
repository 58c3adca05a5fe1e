"""Arguments of the controller's trainer."""

import math
from dataclasses import MISSING, dataclass, fields

from transformers import TrainingArguments
from transformers.hf_argparser import HfArg
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from trl import GRPOConfig

from ..rewards import DEFAULT_REWARDS
from .losses import LOSSES


ENTROPY_COEFS = {"grpo": 0.1, "expected": 0.01}
"""Defaults by loss: advantages are divided by their standard deviation, expected rewards are not."""

# Fields of `GRPOConfig` that mean something to a policy that takes a few decisions, sampled from a softmax by the trainer
# itself. All others steer text generation or language models: another value than their default would be ignored, so it is
# refused.
_SUPPORTED_FIELDS = frozenset(
    {
        *("disable_dropout", "num_generations", "num_generations_eval", "max_completion_length", "shuffle_dataset"),
        *("generation_batch_size", "steps_per_generation", "temperature", "num_iterations"),
        *(
            "beta",
            "epsilon",
            "delta",
            "epsilon_high",
            "loss_type",
            "importance_sampling_level",
            "use_bias_correction_kl",
        ),
        *("sapo_temperature_neg", "sapo_temperature_pos", "off_policy_mask_threshold"),
        *("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
        *("reward_weights", "multi_objective_aggregation", "scale_rewards"),
        *("top_entropy_quantile", "entropy_coef", "use_adaptive_entropy", "entropy_coef_min", "entropy_coef_max"),
        *("entropy_coef_delta", "entropy_target"),
        *("log_completions", "num_completions_to_print", "log_unique_prompts", "log_completions_hub_repo"),
    }
)


@dataclass
class JointGRPOConfig(GRPOConfig):
    r"""
    Configuration of the [`JointGRPOTrainer`]: all of [`~trl.GRPOConfig`] that does not concern text, and the parameters
    below.

    Parameters:
        > Parameters that control the latency budgets

        latency_budget_min_ms (`float`, *optional*):
            Lowest training budget, in ms. Give both ends in ms, or both as fractions.
        latency_budget_max_ms (`float`, *optional*):
            Highest training budget, in ms.
        latency_budget_min_fraction (`float`, *optional*):
            Lowest training budget, as a fraction of the full setting's estimated latency. Defaults to `0.35` where no
            budgets in ms are given.
        latency_budget_max_fraction (`float`, *optional*):
            Highest training budget, as a fraction of the full setting's estimated latency. Defaults to `1.0` where no
            budgets in ms are given.

        > Parameters that control the loss

        loss (`str`, *optional*, defaults to `"grpo"`):
            How the controller learns. `"grpo"` samples settings. The others take the outcomes of each training sample at all
            settings, and answer those that are not known before training begins: `"expected"` maximises the expected
            reward, whose gradient is then exact; `"supervised"` is the cross-entropy to the best setting; `"regression"`
            predicts the reward of each setting, of which the best is taken.
        shrinkage (`float`, *optional*, defaults to `0.0`):
            How far the accuracies of training samples are moved towards the mean of all training samples at the same setting:
            from 0 to 1, by the losses other than `"grpo"`. That one question was answered at a small setting may be chance.
            With few questions a controller learns such chances by heart; with shrinkage it stays nearer to the best fixed
            setting.

        > Parameters that control checkpoints

        save_every_n_epochs (`int`, *optional*):
            With `eval_strategy` and `save_strategy` "epoch": evaluates after every epoch, but saves after every n-th only,
            after the last, and after each that gives the best controller so far.

        > Parameters that control stage 1

        stage1_lr_ratio (`float`, *optional*, defaults to `1.0`):
            Learning rate of stage 1 as a multiple of `learning_rate`. `0` freezes stage 1.
        stage1_checkpoint (`str`, *optional*):
            Folder (or Hub repository) of a controller whose stage 1 training starts from.

    > [!NOTE]
    > These parameters have default values different from [`~trl.GRPOConfig`], since the policy is small, is trained from
    > scratch and takes a few decisions:
    > - `learning_rate`: Defaults to `2e-3` instead of `1e-6`.
    > - `scale_rewards`: Defaults to `"batch"` instead of `"group"`.
    > - `entropy_coef`: Defaults to `0.1`, and to `0.01` with the loss `"expected"`, instead of `0.0`.
    > - `max_completion_length`: Is the number of knobs.
    > - `num_generations_eval`: Defaults to `1`: evaluation takes the likeliest setting.
    > - `reward_weights`: Defaults to those of [`~joint_controller.rewards.DEFAULT_REWARDS`] instead of ones.
    > - `bf16`, `dataloader_pin_memory`: Default to `False`. `gradient_checkpointing` is off.
    > - `eval_strategy` and `save_strategy`: Default to `"steps"`, `eval_steps` and `save_steps` to `100`.
    > - `load_best_model_at_end`: Defaults to `True`, by the highest `eval_reward`.
    > - `report_to`: Defaults to `"none"`.

    Raises:
        ValueError: If the budget range is empty or given in both kinds, a parameter of text generation is set, or
            checkpoints would not allow an exact resume or not hold the best controller.
    """

    # Parameters whose default values are overridden from GRPOConfig
    learning_rate: float = HfArg(default=2e-3, help="The initial learning rate for AdamW.")
    scale_rewards: str = HfArg(
        default="batch",
        help="What advantages are divided by: the standard deviation of rewards in the 'batch' or in the 'group', or "
        "'none'. By the group's own, a group whose settings are worth nearly the same counts as much as one where "
        "the setting decides, and the controller stops exploring early.",
    )
    entropy_coef: float | None = HfArg(
        default=None,
        help="Coefficient of the entropy bonus. Without it, the first steps, in which most settings violate the budget, "
        "drive the controller to the cheapest setting for good, and later ones to a setting that was right by chance. "
        "Default: " + ", ".join(f"{value} with the loss {name}" for name, value in ENTROPY_COEFS.items()) + ".",
    )
    max_completion_length: int | None = HfArg(
        default=None, help="Decisions of the controller: the number of knobs, which the trainer fills in."
    )
    num_generations_eval: int | None = HfArg(
        default=1, help="Settings per sample in evaluation. All are the same: the likeliest one."
    )
    reward_weights: list[float] | None = HfArg(
        default=None,
        help="Weight of each reward function. Default: "
        + ", ".join(f"{function.__name__} {weight:g}" for function, weight in DEFAULT_REWARDS.items())
        + "; 1 for others.",
    )
    bf16: bool | None = HfArg(default=False, help="Whether to compute the controller's forward in bfloat16.")
    gradient_checkpointing: bool | None = HfArg(
        default=None, help="Must stay unset: the controller is small and has no checkpointed layers."
    )
    dataloader_pin_memory: bool = HfArg(
        default=False, help="Whether to pin memory in data loaders. Rows hold no tensors, so it does nothing."
    )
    eval_strategy: IntervalStrategy | str = HfArg(default="steps", help="When to evaluate: 'no', 'steps' or 'epoch'.")
    eval_steps: float | None = HfArg(default=100, help="Optimiser steps between two evaluations.")
    save_strategy: SaveStrategy | str = HfArg(
        default="steps", help="When to save checkpoints: 'no', 'steps', 'epoch' or 'best'."
    )
    save_steps: float = HfArg(
        default=100,
        help="Optimiser steps between two checkpoints. They must fall on the beginning of a rollout: a multiple of "
        "steps_per_generation x num_iterations / gradient_accumulation_steps.",
    )
    load_best_model_at_end: bool = HfArg(
        default=True, help="Whether to end with the best controller seen rather than the last one."
    )
    metric_for_best_model: str | None = HfArg(
        default="eval_reward", help="Metric that the best controller has the best value of."
    )
    greater_is_better: bool | None = HfArg(
        default=True, help="Whether a higher value of metric_for_best_model is better."
    )
    report_to: None | str | list[str] = HfArg(
        default="none", help="Integrations to report to: 'none', 'all' or names such as 'wandb'."
    )

    # Parameters that control the latency budgets
    latency_budget_min_ms: float | None = HfArg(
        default=None, help="Lowest training budget, in ms. Give both ends in ms, or both as fractions."
    )
    latency_budget_max_ms: float | None = HfArg(default=None, help="Highest training budget, in ms.")
    latency_budget_min_fraction: float | None = HfArg(
        default=None,
        help="Lowest training budget, as a fraction of the full setting's estimated latency. 0.35 where no budgets in ms "
        "are given.",
    )
    latency_budget_max_fraction: float | None = HfArg(
        default=None,
        help="Highest training budget, as a fraction of the full setting's estimated latency. 1.0 where no budgets in ms "
        "are given.",
    )

    # Parameters that control the loss
    loss: str = HfArg(
        default="grpo",
        help="How the controller learns: 'grpo' samples settings; the others need all outcomes of the training samples, and "
        "answer those that are not known first: 'expected' maximises the expected reward by its exact gradient, 'supervised' "
        "imitates the best setting, 'regression' predicts the reward of each setting.",
        metadata={"choices": list(LOSSES)},
    )
    shrinkage: float = HfArg(
        default=0.0,
        help="How far the accuracies of training samples are moved towards the mean of all training samples at the same setting, "
        "from 0 to 1: the fewer samples, the more is chance. Not with the loss 'grpo'.",
    )

    # Parameters that control checkpoints
    save_every_n_epochs: int | None = HfArg(
        default=None,
        help="Epochs between two checkpoints; evaluates after every epoch and saves the best controller, too. Sets "
        "eval_strategy and save_strategy to 'epoch'.",
    )

    # Parameters that control stage 1
    stage1_lr_ratio: float = HfArg(
        default=1.0, help="Learning rate of stage 1 as a multiple of learning_rate. 0 freezes stage 1."
    )
    stage1_checkpoint: str | None = HfArg(
        default=None, help="Folder (or Hub repository) of a controller whose stage 1 training starts from."
    )

    def __post_init__(self):
        if self.entropy_coef is None:
            self.entropy_coef = ENTROPY_COEFS.get(self.loss, 0.0)
        super().__post_init__()
        if self.gradient_checkpointing is None:  # as older releases of transformers leave what is not set
            self.gradient_checkpointing = False
        self._check_latency_budgets()
        self._check_checkpoints()
        self._check_numbers()
        self._check_loss()
        self._check_text_fields()

    def _check_loss(self):
        if self.loss not in LOSSES:
            raise ValueError(f"`loss` is '{self.loss}': choose from {', '.join(map(repr, LOSSES))}.")
        if self.loss != "grpo" and self.beta != 0.0:
            raise ValueError(
                f"`beta` is {self.beta}, but only the loss 'grpo' is held near a reference: leave it at 0."
            )

        if not 0 <= self.shrinkage <= 1:
            raise ValueError(f"`shrinkage` is {self.shrinkage}: give a number from 0 to 1.")
        if self.shrinkage and self.loss == "grpo":
            raise ValueError(
                "`shrinkage` needs the outcomes of all training samples, and the loss 'grpo' does not: leave it at 0, or choose "
                "another loss."
            )

    def _check_numbers(self):
        if not 0 <= self.stage1_lr_ratio < math.inf:
            raise ValueError(f"`stage1_lr_ratio` is {self.stage1_lr_ratio}: give 0 (freezes stage 1) or more.")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"`temperature` is {self.temperature}: give a finite number above 0.")
        if self.seed < 0:
            raise ValueError(f"`seed` is {self.seed}: give 0 or more.")
        if self.reward_weights is not None and not all(map(math.isfinite, self.reward_weights)):
            raise ValueError(f"`reward_weights` is {self.reward_weights}: all must be finite numbers.")

    def _check_text_fields(self):
        inherited = {one.name for one in fields(TrainingArguments)} | _SUPPORTED_FIELDS
        for one in fields(GRPOConfig):
            default = one.default if one.default is not MISSING else None
            if one.name in inherited or getattr(self, one.name) in (None, default):
                continue
            if one.name == "sync_ref_model":
                raise ValueError(
                    "`sync_ref_model` is set, but checkpoints do not hold the moving reference, so a resumed run would differ: "
                    "unset it."
                )
            raise ValueError(
                f"`{one.name}` is {getattr(self, one.name)!r}, but it steers text generation and the controller writes no "
                f"text: leave it at {default!r}."
            )
        if self.gradient_checkpointing:
            raise ValueError(
                "`gradient_checkpointing` is set, but the controller is small and has no checkpointed layers: unset it."
            )

    def check_streaming(self) -> None:
        """
        Refuses what cannot be done with a stream of training samples.

        Raises:
            ValueError: If `max_steps` is not set, or something is to be done at the end of epochs.
        """
        if self.loss != "grpo":
            raise ValueError(
                f"`loss` is '{self.loss}', which looks at all training samples before it begins: set it to 'grpo' to train on a "
                "stream, or leave `streaming` out."
            )
        if self.max_steps <= 0:
            raise ValueError("the length of a stream is unknown: set `max_steps` to say how long to train on it.")
        for name in ("eval_strategy", "save_strategy", "logging_strategy"):
            if getattr(self, name) == "epoch":
                raise ValueError(
                    f"`{name}` is 'epoch', but it is unknown when an epoch of a stream ends: set it to 'steps'."
                )

    def _check_latency_budgets(self):
        kinds = {kind: (f"latency_budget_min_{kind}", f"latency_budget_max_{kind}") for kind in ("ms", "fraction")}
        given = {kind: [name for name in names if getattr(self, name) is not None] for kind, names in kinds.items()}
        if not given["ms"] and not given["fraction"]:
            self.latency_budget_min_fraction, self.latency_budget_max_fraction = 0.35, 1.0
            given["fraction"] = kinds["fraction"]
        if given["ms"] and given["fraction"]:
            raise ValueError(
                f"`{given['ms'][0]}` and `{given['fraction'][0]}` are both set: give the budget range in ms or as "
                "fractions of the full setting's latency."
            )
        kind = "ms" if given["ms"] else "fraction"
        if len(given[kind]) != 2:
            raise ValueError(f"only `{given[kind][0]}` is set: give both `{kinds[kind][0]}` and `{kinds[kind][1]}`.")
        minimum, maximum = (getattr(self, name) for name in kinds[kind])
        if not 0 < minimum < maximum < math.inf:
            raise ValueError(
                f"the budget range is {minimum} to {maximum}: `{kinds[kind][0]}` must be above 0 and below "
                f"`{kinds[kind][1]}`, which must be finite."
            )

    def _check_checkpoints(self):
        if self.save_every_n_epochs is not None:
            if self.save_every_n_epochs < 1:
                raise ValueError(f"`save_every_n_epochs` is {self.save_every_n_epochs}: give 1 or more.")
            for name in ("eval_strategy", "save_strategy"):
                if getattr(self, name) != "epoch":
                    raise ValueError(
                        f"`save_every_n_epochs` is set, but `{name}` is '{getattr(self, name).value}': set it to 'epoch', or "
                        "unset `save_every_n_epochs`."
                    )
        # Rollouts that were made but not yet trained on are not part of a checkpoint: an exact resume needs checkpoints
        # where the next step rolls out anew. Epochs always end there.
        if self.loss != "grpo":
            generate_every = 1  # nothing is rolled out
        else:
            generate_every = self.steps_per_generation * self.num_iterations  # in forward and backward passes
        accumulation = self.gradient_accumulation_steps
        saves_by_step = self.save_strategy in (SaveStrategy.STEPS, SaveStrategy.BEST)
        steps_field = "save_steps" if self.save_strategy == SaveStrategy.STEPS else "eval_steps"
        if saves_by_step:
            if generate_every % accumulation and accumulation % generate_every:
                raise ValueError(
                    f"`gradient_accumulation_steps` ({accumulation}) and `steps_per_generation` x `num_iterations` "
                    f"({generate_every}) do not divide each other, so rollouts would begin in the middle of optimiser "
                    "steps and checkpoints would not allow an exact resume: make one a multiple of the other."
                )
            steps = getattr(self, steps_field)
            if steps < 1 or steps * accumulation % generate_every:
                boundary = max(1, generate_every // accumulation)
                raise ValueError(
                    f"`{steps_field}` is {steps}, but a checkpoint allows an exact resume only where a rollout begins: "
                    f"give a multiple of {boundary} optimiser steps (`steps_per_generation` x `num_iterations` / "
                    "`gradient_accumulation_steps`)."
                )
        if (
            self.load_best_model_at_end
            and self.save_strategy == SaveStrategy.STEPS
            and self.save_steps != self.eval_steps
        ):
            raise ValueError(
                f"`save_steps` ({self.save_steps}) differs from `eval_steps` ({self.eval_steps}), so the best controller "
                "might not be among the checkpoints: make them equal, or unset `load_best_model_at_end`."
            )
