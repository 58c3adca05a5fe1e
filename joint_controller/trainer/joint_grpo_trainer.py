"""
GRPO for a controller that decides on knobs instead of writing text. To TRL, a setting is a completion of as many tokens as
there are knobs.

What this trainer does differently from [`~trl.GRPOTrainer`] is in overrides of it:

- The policy: rows are rolled out through the two stages and the executor (`_generate_and_score_completions`, `_generate`),
  decisions are scored from the tensors of that rollout (`_get_per_token_logps_and_entropies`), and those tensors are handed
  from batch to scoring (`_compute_loss`).
- Exact resume and streams: the order of rows is a function of seed and epoch (`_get_train_sampler`), images stay encoded
  (`get_train_dataloader`, `get_eval_dataloader`), and training ends where it should (`train`, `_run_epoch`).
- Optimisation: the stages have learning rates of their own (`create_optimizer`).
- The card is this package's (`create_model_card`).
- Where all outcomes of the training samples are known, nothing needs to be sampled: other losses than GRPO's train on all
  settings at once (`_prepare_inputs`, `_compute_loss`, `get_train_dataloader`).
"""

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Image, IterableDataset
from torch import nn
from torch.utils.data import Sampler
from transformers import GenerationConfig, TrainerCallback
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging
from trl import GRPOTrainer
from trl.trainer.utils import RepeatSampler, repeat_iterable_dataset

from ..controller import BatchController, JointControllerModel, JointControllerOutput, knob_log_probs
from ..data import Sample
from ..decisions import decide
from ..executor import ExecutorRequest
from ..knobs import KnobSetting, build_action_tokenizer
from ..latency import FitCache, Guardrail, LatencyEstimator
from ..outcomes import OutcomeSource, collect_shares
from ..rewards import RewardFunction, resolve_rewards, reward_columns
from .checkpoints import last_complete_checkpoint
from .draws import draw_action_noise, draw_budget
from .epoch_checkpoints import EpochCheckpoints
from .feature_cache import CachedFeatures
from .joint_grpo_config import JointGRPOConfig
from .latency_budgets import LatencyBudgetRange, resolve_latency_budgets
from .losses import EXACT_LOSSES
from .model_card import format_model_card
from .outcome_table import OutcomeTable, possible_settings


logger = logging.get_logger(__name__)

REQUIRED_COLUMNS = ("sample_id", "image", "question", "answers", "style", "metric")

SHUFFLE_BUFFER_SIZE = 1000
"""Rows of a stream, images encoded, that the next one is drawn from."""

LATENCY_ESTIMATOR_FOLDER = "latency_estimator"
"""Folder of the latency estimator, in that of a controller."""

EVALUATION_EPOCH = 0
"""Epoch that evaluation budgets are drawn for: always the same, so that evaluations can be compared."""


@dataclass
class Rollout:
    """
    What the controller did with a batch of n rows.

    Args:
        rows (`list[dict]`):
            The rows, with what the reward functions need in place of the image.
        completion_ids (`list[list[int]]`):
            Each row's setting as action tokens, one a knob.
        completions (`list[str]`):
            The same, decoded.
        policy_inputs (`dict[str, torch.Tensor]`):
            What scoring the decisions again needs: `question_features` (n, question_size), `latency_budget_ms` (n,),
            `vision_features` (n, vision_size) as stage 1 decided, `first` and `second` (n,), what the stages chose, and
            with a guardrail `fits` and `slack` (n, settings).
        metrics (`dict[str, float]`):
            Means over the rows of all processes.
    """

    rows: list[dict[str, Any]]
    completion_ids: list[list[int]]
    completions: list[str]
    policy_inputs: dict[str, torch.Tensor]
    metrics: dict[str, float]


class EpochRepeatSampler(RepeatSampler):
    """
    TRL's sampler, with the order of an epoch a function of seed and epoch rather than of how often the sampler was
    iterated over before: a resumed run starts a new sampler in the middle of training.

    Args:
        epoch (`Callable[[], int]`):
            Gives the epoch that begins.
        **kwargs:
            Arguments of [`~trl.trainer.utils.RepeatSampler`].
    """

    def __init__(self, *, epoch: Callable[[], int], **kwargs):
        super().__init__(**kwargs)
        self.epoch = epoch

    def __iter__(self):
        if self.shuffle:
            self.generator.manual_seed(self.seed + self.epoch())
        return super().__iter__()


class JointGRPOTrainer(GRPOTrainer):
    r"""
    Trains a controller by GRPO.

    All members of a group share one latency budget, drawn anew each epoch. Stage 1 samples its knobs, stage 2 sees the image
    encoded accordingly and samples the others, the outcome is looked up or computed, the latency estimator gives the latency,
    and the reward functions the reward. In evaluation the controller takes the likeliest setting, at budgets that are the
    same in every evaluation. Losses, advantages, the reference model, generation buffers, logs and checkpoints are TRL's.

    Besides TRL's metrics, `accuracy`, `latency_ms`, `budget_violation_rate` and the share of each knob value
    (`knobs/tier=low`, …) are logged, with `eval_` in front in evaluation.

    Example:

    ```python
    >>> trainer = JointGRPOTrainer(
    ...     model=JointControllerModel(config),
    ...     outcomes=OutcomeCollector(executor, store, score_answer),
    ...     latency_estimator=LatencyEstimatorModel.from_pretrained("latency"),
    ...     args=JointGRPOConfig(output_dir="controller", latency_budget_min_ms=5, latency_budget_max_ms=20),
    ...     train_dataset=train_dataset,
    ...     eval_dataset=eval_dataset,
    ... )
    >>> trainer.train()
    ```

    Args:
        model ([`JointControllerModel`]):
            The controller. Its budget range must contain the training budgets.
        outcomes ([`OutcomeSource`]):
            Gives the outcome of a sample at a setting, by look-up or by running the executor, and the features that the
            controller sees.
        latency_estimator ([`LatencyEstimator`]):
            Gives the latency of an outcome.
        args ([`JointGRPOConfig`]):
            Configuration.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Samples in the schema of `load_vqa_dataset`: `sample_id`, `image`, `question`, `answers`, `style`, `metric`. A
            stream is read again when it ends, rows of an epoch are shuffled in a buffer of 1,000, and what does not fill a
            rollout at the end of an epoch is left out. It needs `max_steps`; the logged `epoch` is then the share of
            `max_steps`. Each process reads all of it, and a resumed run reads it from the beginning to where it was.
        eval_dataset ([`~datasets.Dataset`], *optional*):
            Samples to evaluate on.
        reward_funcs (`list[Callable]`, *optional*):
            TRL reward functions, which are given what [`~joint_controller.rewards.reward_columns`] lists. Defaults to those of
            `joint_controller.rewards.DEFAULT_REWARDS`. `args.reward_weights` has one value for each, or is filled in.
        latency_budgets ([`LatencyBudgetRange`], *optional*):
            Budgets to train under, if they are resolved already. By default what
            [`~trainer.resolve_latency_budgets`] makes of `args`.
        guardrail ([`~latency.Guardrail`], *optional*):
            Says which settings fit a request: the others are not chosen, neither in training nor in evaluation, and the
            controller sees how much of the budget each would leave. By default all can be chosen.
        callbacks (`list[~transformers.TrainerCallback]`, *optional*):
            Callbacks besides the default ones.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            Optimizer and scheduler to use. `stage1_lr_ratio` has no effect on an optimizer that is given here, apart from
            freezing.

    Attributes:
        evaluation_decisions (`list[tuple[float, KnobSetting]]`):
            Budget in ms and setting of each request of the last evaluation, in this process.
        features ([`FeatureSource`] or `None`):
            Gives what the controller sees of questions and images, and keeps it.
        model_card (`str`):
            The README that is written with the controller when it is pushed to the Hub. May be set, once there are results
            to show.

    Raises:
        ValueError: If the controller does not fit the outcomes or the features, a data set lacks a column or repeats a sample id, no
            setting can meet the lowest budget, or the budgets are outside the controller's range.
    """

    _tag_names = ["trl", "grpo", "joint-controller"]

    def __init__(
        self,
        model: JointControllerModel,
        outcomes: OutcomeSource,
        latency_estimator: LatencyEstimator,
        args: JointGRPOConfig,
        train_dataset: Dataset | IterableDataset,
        eval_dataset: Dataset | None = None,
        reward_funcs: Sequence[RewardFunction] | None = None,
        latency_budgets: LatencyBudgetRange | None = None,
        guardrail: Guardrail | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
    ):
        self.outcomes = outcomes
        self.model_card = format_model_card(model.knob_space)
        self.latency_estimator = latency_estimator
        self.knob_space = model.knob_space
        self._stage_table = model.table
        if model.config.sees_slack and guardrail is None:
            raise ValueError(
                "the controller sees what fits a request, but nothing predicts it: give `guardrail`, or make the controller "
                "with `sees_slack=False`."
            )
        self._fits = None if guardrail is None else FitCache(guardrail)
        self._table: OutcomeTable | None = None
        self._check_controller(model)
        for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            if dataset is not None:
                _check_dataset(dataset, name)
        if isinstance(train_dataset, IterableDataset):
            args.check_streaming()
        if latency_budgets is None:
            latency_budgets = resolve_latency_budgets(args, outcomes, latency_estimator, train_dataset)
        self.latency_budgets = latency_budgets
        trained = (model.config.latency_budget_min_ms, model.config.latency_budget_max_ms)
        if self.latency_budgets.minimum_ms < trained[0] or self.latency_budgets.maximum_ms > trained[1]:
            raise ValueError(
                f"training budgets are {self.latency_budgets.minimum_ms:.3f} to {self.latency_budgets.maximum_ms:.3f} ms, "
                f"but the controller encodes budgets of {trained[0]:.3f} to {trained[1]:.3f} ms: train in that range, or "
                "make a controller whose configuration has the wider one."
            )

        if args.max_completion_length not in (None, len(self.knob_space.names)):
            raise ValueError(
                f"`max_completion_length` is {args.max_completion_length}, but the controller decides on "
                f"{len(self.knob_space.names)} knobs: leave it out."
            )
        args.max_completion_length = len(self.knob_space.names)
        rewards = resolve_rewards(None, args.reward_weights) if reward_funcs is None else dict.fromkeys(reward_funcs)
        if reward_funcs is None:
            args.reward_weights = list(rewards.values())
        self._rewards = dict(zip(rewards, args.reward_weights or [1.0] * len(rewards), strict=True))
        # Where the actions of each knob begin among all.
        sizes = torch.tensor(self.knob_space.sizes)
        self._first_action = sizes.cumsum(0) - sizes
        # Where each knob is among those of stage 1 and then stage 2.
        decided = [*self.knob_space.decided_by(1), *self.knob_space.decided_by(2)]
        self._decided_at = [decided.index(knob) for knob in range(len(decided))]
        tokenizer = build_action_tokenizer(self.knob_space)
        self._action_token_ids = torch.tensor(tokenizer.convert_tokens_to_ids(self.knob_space.action_tokens()))
        self.features = None if outcomes.features is None else CachedFeatures(outcomes.features, self.knob_space)
        self._rollout: Rollout | None = None
        self._policy_inputs: dict[str, torch.Tensor] | None = None
        self.evaluation_decisions: list[tuple[float, KnobSetting]] = []

        if args.stage1_checkpoint is not None:
            model.load_stage1(args.stage1_checkpoint)
        if args.stage1_lr_ratio == 0:
            model.stage1.requires_grad_(False)
        # TRL loads the reference model from the Hub by its name; ours is a copy of the controller as it was given. It is
        # made first, since TRL binds a new `forward` to the instance, which a copy would share.
        reference = copy.deepcopy(model).eval().requires_grad_(False) if args.beta != 0.0 else None
        # TRL and transformers keep the token ids of model and tokenizer in step, here as for a language model.
        model.config.eos_token_id = tokenizer.eos_token_id
        model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
        beta, args.beta = args.beta, 0.0
        try:
            super().__init__(
                model=model,
                reward_funcs=list(rewards),
                args=args,
                train_dataset=_keep_images_encoded(train_dataset),
                eval_dataset=None if eval_dataset is None else _keep_images_encoded(eval_dataset),
                processing_class=tokenizer,
                callbacks=callbacks,
                optimizers=optimizers,
            )
        finally:
            args.beta = beta
        self.beta = beta
        if args.save_every_n_epochs is not None:
            self.add_callback(EpochCheckpoints(args.save_every_n_epochs))
        if reference is not None:
            self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)
        outcomes.check_processes(self.accelerator.num_processes)

    def _check_controller(self, model: JointControllerModel) -> None:
        if self.knob_space != self.outcomes.knob_space:
            raise ValueError(
                f"the controller chooses from {self.knob_space}, but there are outcomes for {self.outcomes.knob_space}: build "
                "both with one knob space."
            )
        features = self.outcomes.features
        seen = {"question_size": model.sees_question, "vision_size": model.sees_image}
        for name in (name for name, is_seen in seen.items() if is_seen):
            if features is None:
                raise ValueError(
                    f"the controller sees `stage1_inputs` {model.config.stage1_inputs!r} and `stage2_inputs` "
                    f"{model.config.stage2_inputs!r}, but nothing gives features of questions and images: give the "
                    "outcomes a feature source, or build a controller that sees the budget alone."
                )
            size, size_there = getattr(model.config, name), getattr(features, name)
            if size != size_there:
                raise ValueError(
                    f"the controller's `{name}` is {size}, but the executor's features are {size_there} wide: build the "
                    "controller for this executor."
                )

    # Data

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None):
        if isinstance(eval_dataset, Dataset):
            eval_dataset = _keep_images_encoded(eval_dataset)
        return super().get_eval_dataloader(eval_dataset)

    def get_train_dataloader(self):
        if self.args.loss != "grpo":
            # Positions in the table: what is trained on is there already.
            return self._get_dataloader(
                dataset=Dataset.from_dict({"row": range(len(self.train_dataset))}),
                description="Training",
                batch_size=self._train_batch_size,
                sampler_fn=self._get_train_sampler,
                is_training=True,
            )
        if not isinstance(self.train_dataset, IterableDataset):
            return super().get_train_dataloader()
        # As TRL has it, but that epochs follow each other within the stream: to transformers, which cannot know where the
        # stream ends, all of training is one epoch, and it skips what was trained on from that epoch's beginning.
        epoch = self.train_dataset
        if self.shuffle_dataset:
            epoch = epoch.shuffle(seed=self.args.seed, buffer_size=SHUFFLE_BUFFER_SIZE)
        epoch = repeat_iterable_dataset(
            epoch,
            mini_repeat_count=self.num_generations,
            batch_size=self.args.generation_batch_size // self.num_generations,
            repeat_count=self.num_iterations * self.args.steps_per_generation,
        )
        return self._get_dataloader(
            dataset=IterableDataset.from_generator(_repeat_epoch, gen_kwargs={"epoch": epoch}),
            description="Training",
            batch_size=self._train_batch_size * self.args.steps_per_generation,
            is_training=True,
        )

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler:
        if self.args.loss != "grpo":
            return EpochRepeatSampler(
                epoch=self._current_epoch,
                data_source=dataset,
                mini_repeat_count=1,
                shuffle=self.shuffle_dataset,
                seed=self.args.seed,
            )
        return EpochRepeatSampler(
            epoch=self._current_epoch,
            data_source=self.train_dataset if dataset is None else dataset,
            mini_repeat_count=self.num_generations,
            batch_size=self.args.generation_batch_size // self.num_generations,
            repeat_count=self.num_iterations * self.args.steps_per_generation,
            shuffle=self.shuffle_dataset,
            seed=self.args.seed,
        )

    def _current_epoch(self) -> int:
        # `state.epoch` is exactly whole when an epoch begins, and is part of checkpoints.
        return int(self.state.epoch)

    # Rollouts

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """As [`~transformers.Trainer.evaluate`]; `evaluation_decisions` are those of the last evaluation."""
        self.evaluation_decisions = []
        return super().evaluate(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor | Any]:
        mode = "train" if self.model.training else "eval"
        metrics = self._metrics[mode]
        num_logged = {name: len(values) for name, values in metrics.items()}
        self._rollout = self._roll_out(inputs)
        self._policy_inputs = self._rollout.policy_inputs
        if self.log_completions:
            for column in ("answer", "accuracy", "latency_ms"):
                self._log_completion_extra(column, [row[column] for row in self._rollout.rows])
        output = super()._generate_and_score_completions(self._rollout.rows)
        for name, value in self._rollout.metrics.items():
            metrics[name].append(value)
        if mode == "eval":
            # TRL averages over batches. The last batch of an evaluation may be smaller, so each counts by its rows.
            for name, values in metrics.items():
                values.extend(values[num_logged.get(name, 0) :] * (len(inputs) - 1))
        return {**output, **self._rollout.policy_inputs}

    def _generate(self, prompts: list[str]):
        rollout = self._rollout
        prompt_ids = [[self._tokenizer.unk_token_id]] * len(prompts)
        tool_mask, logprobs, extra_fields, images, tool_images = None, None, {}, None, []
        return (
            prompt_ids,
            rollout.completion_ids,
            tool_mask,
            rollout.completions,
            logprobs,
            extra_fields,
            images,
            tool_images,
        )

    @torch.no_grad()
    def _roll_out(self, inputs: list[dict[str, Any]]) -> Rollout:
        training = self.model.training
        device = self.accelerator.device
        unique_samples: dict[str, Sample] = {}
        for row in inputs:
            if row["sample_id"] not in unique_samples:
                unique_samples[row["sample_id"]] = Sample(row)
        samples = [unique_samples[row["sample_id"]] for row in inputs]

        if not training:
            epoch = EVALUATION_EPOCH
        elif isinstance(self.train_dataset, IterableDataset):
            epoch = inputs[0]["epoch"]
        else:
            epoch = self._current_epoch()
        budget_of = {
            sample_id: draw_budget(
                self.args.seed, epoch, sample_id, self.latency_budgets.minimum_ms, self.latency_budgets.maximum_ms
            )
            for sample_id in unique_samples
        }
        budgets = [budget_of[sample["sample_id"]] for sample in samples]
        latency_budget_ms = torch.tensor(budgets, device=device)
        chooser = BatchController(self.model, self._draw_noise(samples, epoch) if training else None, self.temperature)
        requests = [ExecutorRequest.of(sample, self.knob_space.cheapest) for sample in samples]
        typical_budget_ms, fit = latency_budget_ms, None
        if self._fits is not None:
            typical_budget_ms, fit = self._fits.fit(samples, latency_budget_ms.cpu())
            typical_budget_ms, fit = typical_budget_ms.to(device), fit.to(device)
        decisions = decide(chooser, self.features, requests, typical_budget_ms, fit)
        outcomes = self.outcomes.collect_together(samples, decisions.settings)
        latency_ms = self.latency_estimator.latency_ms(outcomes)
        columns = reward_columns(self.knob_space, samples, outcomes, latency_ms.tolist(), budgets)
        columns["prompt"] = [
            f"{sample['question']} ({budget:.2f} ms)" for sample, budget in zip(samples, budgets, strict=True)
        ]
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        if not training:
            self.evaluation_decisions += zip(budgets, decisions.settings, strict=True)
        accuracy = torch.tensor([outcome.accuracy for outcome in outcomes])
        values = self._stage_table.setting_values[decisions.positions]  # (n, knobs)
        action_index = values + self._first_action  # positions among all action tokens
        policy_inputs = {
            "question_features": decisions.question_features,
            "latency_budget_ms": typical_budget_ms,
            "vision_features": decisions.vision_features,
            "first": decisions.first,
            "second": decisions.second,
        }
        if fit is not None:
            policy_inputs.update(fits=fit.fits, slack=fit.slack)
        return Rollout(
            rows=rows,
            completion_ids=self._action_token_ids[action_index].tolist(),
            completions=[str(setting) for setting in decisions.settings],
            policy_inputs=policy_inputs,
            metrics=self._rollout_metrics(accuracy, latency_ms, torch.tensor(budgets), action_index),
        )

    def _draw_noise(self, samples: list[Sample], epoch: int) -> torch.Tensor:
        num_choices = sum(self._stage_table.num_choices)
        noise_of = {
            sample_id: draw_action_noise(self.args.seed, epoch, sample_id, self.num_generations, num_choices)
            for sample_id in {sample["sample_id"] for sample in samples}
        }
        # Groups follow each other through the rows of all processes, and may be cut where one process's rows end.
        first_row = self.accelerator.process_index * len(samples)
        return torch.stack(
            [
                noise_of[sample["sample_id"]][(first_row + row) % self.num_generations]
                for row, sample in enumerate(samples)
            ]
        )

    def _rollout_metrics(
        self, accuracy: torch.Tensor, latency_ms: torch.Tensor, budgets: torch.Tensor, action_index: torch.Tensor
    ) -> dict[str, float]:
        names = self.knob_space.action_tokens()
        taken = nn.functional.one_hot(action_index, len(names)).sum(1)  # (n, action tokens)
        table = torch.stack([accuracy, latency_ms, latency_ms > budgets, *taken.T], dim=-1)  # (n, metrics)
        means = self.accelerator.gather(table.to(self.accelerator.device)).mean(0).tolist()
        columns = ("accuracy", "latency_ms", "budget_violation_rate", *(f"knobs/{name}" for name in names))
        return dict(zip(columns, means, strict=True))

    # Loss

    def _get_per_token_logps_and_entropies(
        self,
        model,
        input_ids,
        attention_mask,
        logits_to_keep,
        batch_size=None,
        compute_entropy=False,
        compute_aux_loss=False,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        """
        Log-probabilities and entropies of the decisions, (n, knobs) each: those of a stage's choice, by the chain rule over
        its knobs. The token ids are not looked at.
        """
        inputs = {name: values for name, values in self._policy_inputs.items() if name != "second"}
        with self.accelerator.autocast():
            outputs = model(**inputs)
        table = self._stage_table
        logps, entropies = [], []
        chosen = (self._policy_inputs["first"], self._policy_inputs["second"])
        for stage, scores in enumerate((outputs.stage1_scores, outputs.stage2_scores)):
            log_probs = (scores.float() / self.temperature).log_softmax(-1)
            values = table.values[stage].to(scores.device)[chosen[stage]]
            of_stage = knob_log_probs(log_probs, table.sizes[stage], values)
            logps += of_stage[0]
            entropies += of_stage[1]
        logps = torch.stack(logps, dim=-1)[:, self._decided_at]
        return logps, torch.stack(entropies, dim=-1)[:, self._decided_at] if compute_entropy else None, None

    def _compute_loss(self, model, inputs):
        if self.args.loss != "grpo" and self.model.training:
            return self._exact_loss(model, inputs)
        self._policy_inputs = {name: inputs[name] for name in self._rollout.policy_inputs}
        return super()._compute_loss(model, inputs)

    # With all outcomes known

    def _prepare_inputs(self, generation_batch: list[dict[str, Any]]) -> dict[str, torch.Tensor | Any]:
        if self.args.loss == "grpo" or not self.model.training:
            return super()._prepare_inputs(generation_batch)
        rows = [row["row"] for row in generation_batch]
        epoch = self._current_epoch()
        table, device = self._table, self.accelerator.device
        budgets = [
            draw_budget(
                self.args.seed,
                epoch,
                table.samples[row]["sample_id"],
                self.latency_budgets.minimum_ms,
                self.latency_budgets.maximum_ms,
            )
            for row in rows
        ]
        latency_budget_ms = torch.tensor(budgets)
        inputs = {
            "rewards": table.rewards(rows, latency_budget_ms, self._rewards),
            "accuracy": table.accuracy[rows],
            "latency_ms": table.latency_ms[rows],
            "clock_budget_ms": latency_budget_ms,
            "latency_budget_ms": latency_budget_ms,
        }
        if self._fits is not None:
            typical_budget_ms, fit = self._fits.guardrail.fit(table.typical_ms[rows], latency_budget_ms)
            inputs.update(latency_budget_ms=typical_budget_ms, fits=fit.fits, slack=fit.slack)
        for name in ("question_features", "vision_features"):
            features = getattr(table, name)
            if features is not None:
                inputs[name] = features[rows]
        return {name: values.to(device) for name, values in inputs.items()}

    def _exact_loss(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        given = ("latency_budget_ms", "question_features", "vision_features", "fits", "slack")
        with self.accelerator.autocast():
            outputs: JointControllerOutput = model(**{name: inputs[name] for name in given if name in inputs})
        positions = self._stage_table.positions.to(outputs.stage1_scores.device)
        rewards = inputs["rewards"]
        allowed = rewards.isfinite()
        if "fits" in inputs:
            allowed = allowed & inputs["fits"]
        loss, probs = EXACT_LOSSES[self.args.loss](
            outputs.stage1_scores.float(),
            outputs.stage2_scores.float(),
            rewards[:, positions],
            inputs["latency_ms"][:, positions],
            allowed[:, positions],
            self.args.entropy_coef,
        )
        with torch.no_grad():
            latency_ms = inputs["latency_ms"]
            columns = {
                "reward": rewards,
                "accuracy": inputs["accuracy"],
                "latency_ms": latency_ms,
                "budget_violation_rate": (latency_ms > inputs["clock_budget_ms"][:, None]).float(),
            }
            means = [
                (probs * values[:, positions].masked_fill(probs == 0, 0.0)).sum(dim=(1, 2)).mean()
                for values in columns.values()
            ]
            entropy = torch.special.entr(probs).sum(dim=(1, 2)).mean()
            means = self.accelerator.gather(torch.stack([*means, entropy])[None]).mean(0).tolist()
        for name, value in zip((*columns, "entropy"), means, strict=True):
            self._metrics["train"][name].append(value)
        return loss / self.current_gradient_accumulation_steps

    # Optimisation

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """
        Sets up the optimizer with the learning rate for stage 2 and `stage1_lr_ratio` times as much for stage 1. Weight
        decay applies to the parameters that transformers decays.
        """
        if self.optimizer is None:
            optimizer_cls, optimizer_kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            decayed = set(self.get_decay_parameter_names(self.model))
            # Stage 2 first: the logs show the learning rate of the first group.
            groups = []
            for stage, ratio in (("stage2.", 1.0), ("stage1.", self.args.stage1_lr_ratio)):
                for decays in (True, False):
                    parameters = [
                        parameter
                        for name, parameter in self.model.named_parameters()
                        if name.startswith(stage) and parameter.requires_grad and (name in decayed) == decays
                    ]
                    if parameters:
                        groups.append(
                            {
                                "params": parameters,
                                "lr": self.args.learning_rate * ratio,
                                "weight_decay": self.args.weight_decay if decays else 0.0,
                            }
                        )
            self.optimizer = optimizer_cls(groups, **optimizer_kwargs)
        return self.optimizer

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs) -> TrainOutput:
        """
        Trains the controller.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                Checkpoint to go on from. `True` stands for the last one in `output_dir` that was written to the end; with
                none there, training starts from the first step (outcomes that were kept are not computed again).
            **kwargs:
                Further arguments of [`~transformers.Trainer.train`].
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir, self.accelerator.num_processes)
            if resume_from_checkpoint is None:
                logger.warning(
                    f"no complete checkpoint in '{self.args.output_dir}' to resume from: training from the first step."
                )
        if self.args.loss != "grpo" and self._table is None:
            self._table = self._read_table()
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _read_table(self) -> OutcomeTable:
        samples = [Sample(row) for row in self.train_dataset]
        state, highest_ms = self.accelerator, self.latency_budgets.maximum_ms
        if state.num_processes > 1:
            rows, columns = possible_settings(self.knob_space, samples, self._fits, highest_ms)
            settings = [self.knob_space.settings[column] for column in columns]
            collect_shares(self.outcomes, [samples[row] for row in rows], settings, progress=True)
        return OutcomeTable(
            self.outcomes,
            self.latency_estimator,
            samples,
            state.unwrap_model(self.model),
            self.features,
            self._fits,
            highest_ms,
            self.args.shrinkage,
            progress=state.is_main_process,
        )

    def _run_epoch(self, *args, **kwargs):
        # transformers would take one step more when a run that had ended inside an epoch is resumed.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:
            # To transformers, a stream has epochs without end.
            self.control.should_training_stop = True

    # Saving

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        # A controller is of use with the latencies that it was trained with, wherever it goes: checkpoints, the Hub.
        super()._save(output_dir, state_dict)
        self.latency_estimator.save_pretrained(Path(output_dir or self.args.output_dir) / LATENCY_ESTIMATOR_FOLDER)

    def create_model_card(self, *args, **kwargs) -> None:
        """Writes `model_card` to the output folder: TRL's card would show how to generate text."""
        if self.is_world_process_zero():
            (Path(self.args.output_dir) / "README.md").write_text(self.model_card, encoding="utf-8")


def _repeat_epoch(epoch: IterableDataset) -> Iterator[dict[str, Any]]:
    """Rows of one epoch after the other, each with the number of its epoch, which also decides on its order."""
    for number in itertools.count():
        epoch.set_epoch(number)
        has_rows = False
        for row in epoch:
            has_rows = True
            yield {**row, "epoch": number}
        if not has_rows:
            raise ValueError(
                "the stream of training samples has fewer rows than one rollout takes: give more, or lower "
                "`per_device_train_batch_size` or `steps_per_generation`."
            )


def _check_dataset(dataset: Dataset | IterableDataset, name: str) -> None:
    missing = [column for column in REQUIRED_COLUMNS if column not in dataset.column_names]
    if missing:
        raise ValueError(
            f"`{name}` has no column {', '.join(repr(column) for column in missing)} (it has {dataset.column_names}): load "
            "it with `load_vqa_dataset`."
        )
    if isinstance(dataset, Dataset) and len(dataset.unique("sample_id")) != len(dataset):
        raise ValueError(
            f"`{name}` repeats values of `sample_id`, under which outcomes are kept: give each row its own."
        )


def _keep_images_encoded(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    return dataset.cast_column("image", Image(decode=False))
