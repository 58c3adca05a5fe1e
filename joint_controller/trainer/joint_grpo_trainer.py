"""
GRPO for a controller that takes three decisions instead of writing text.

Everything that this trainer does differently from TRL's is in four overrides of [`~trl.GRPOTrainer`]: rows are rolled out
through the two stages and the executor (`_generate_and_score_completions`, `_generate`), decisions are scored from the
tensors of that rollout (`_get_per_token_logps_and_entropies`), and those tensors are handed from batch to scoring
(`_compute_loss`). To TRL, a setting is a completion of three tokens.
"""

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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

from ..controller import JointControllerModel
from ..data import Sample, draw_budget
from ..executor import ExecutorRequest
from ..knobs import build_action_tokenizer
from ..latency import LatencyEstimatorModel
from ..outcomes import OutcomeCollector, RecordedOutcomes, predict_latency_ms
from ..rewards import REWARD_FUNCTIONS
from .checkpoints import last_complete_checkpoint
from .epoch_checkpoints import EpochCheckpoints
from .joint_grpo_config import JointGRPOConfig
from .latency_budgets import resolve_latency_budgets
from .rollout import FeatureCache, collect_outcomes, draw_action_noise


logger = logging.get_logger(__name__)

REQUIRED_COLUMNS = ("sample_id", "image", "question", "answers", "style", "metric")

SHUFFLE_BUFFER_SIZE = 1000
"""Rows of a stream, images encoded, that the next one is drawn from."""

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
            Each row's setting as three action tokens.
        completions (`list[str]`):
            The same, decoded.
        policy_inputs (`dict[str, torch.Tensor]`):
            What scoring the decisions again needs: `question_features` (n, question_size), `latency_budget_ms` (n,),
            `vision_features` (n, vision_size) at the tiers taken, and `actions` (n, 3), the positions of tier, top_k and
            num_blocks in the knob space.
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

    All members of a group share one latency budget, drawn anew each epoch. Stage 1 samples a tier, stage 2 sees the image
    at that tier and samples top_k and num_blocks, the collector gives the outcome, the latency estimator the latency, and
    the reward functions the reward. In evaluation the controller takes the likeliest setting, at budgets that are the
    same in every evaluation. Losses, advantages, the reference model, generation buffers, logs and checkpoints are TRL's.

    Beside TRL's metrics, `accuracy`, `latency_ms`, `budget_violation_rate` and the share of each knob value
    (`knobs/tier=low`, …) are logged, with `eval_` in front in evaluation.

    Example:

    ```python
    >>> trainer = JointGRPOTrainer(
    ...     model=JointControllerModel(config),
    ...     collector=OutcomeCollector(executor, store, score_answer),
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
        collector ([`OutcomeCollector`] or [`RecordedOutcomes`]):
            Gives the outcome of a sample at a setting, by look-up or by running the executor, and the features that the
            controller sees. With several processes the store of an [`OutcomeCollector`] must be in a folder.
        latency_estimator ([`LatencyEstimatorModel`], *optional*):
            Gives the latency of an outcome. `None` takes the latencies that were measured with the outcomes.
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
            TRL reward functions. They are given the columns of the row (without the image), and `accuracy`, `latency_ms`,
            `latency_budget_ms`, `normalized_knobs`, `answer` and `setting`. Defaults to the five of
            [`joint_controller.rewards`]; `args.reward_weights` must have one value for each.
        callbacks (`list[~transformers.TrainerCallback]`, *optional*):
            Callbacks beside the default ones.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            Optimizer and scheduler to use. `stage1_lr_ratio` has no effect on an optimizer that is given here, apart from
            freezing.

    Raises:
        ValueError: If the controller does not fit the outcomes or the features, a data set lacks a column or repeats a sample id, no
            setting can meet the lowest budget, or the budgets are outside the controller's range.
    """

    _tag_names = ["trl", "grpo", "joint-controller"]

    def __init__(
        self,
        model: JointControllerModel,
        collector: OutcomeCollector | RecordedOutcomes,
        latency_estimator: LatencyEstimatorModel | None,
        args: JointGRPOConfig,
        train_dataset: Dataset | IterableDataset,
        eval_dataset: Dataset | None = None,
        reward_funcs: Sequence[Callable] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
    ):
        self.collector = collector
        self.latency_estimator = latency_estimator
        self.knob_space = model.knob_space
        self._check_controller(model)
        for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            if dataset is not None:
                _check_dataset(dataset, name)
        if isinstance(train_dataset, IterableDataset):
            args.check_streaming()
        self.latency_budgets = resolve_latency_budgets(args, collector, latency_estimator, train_dataset)
        trained = (model.config.latency_budget_min_ms, model.config.latency_budget_max_ms)
        if self.latency_budgets.minimum_ms < trained[0] or self.latency_budgets.maximum_ms > trained[1]:
            raise ValueError(
                f"training budgets are {self.latency_budgets.minimum_ms:.3f} to {self.latency_budgets.maximum_ms:.3f} ms, "
                f"but the controller encodes budgets of {trained[0]:.3f} to {trained[1]:.3f} ms: train in that range, or "
                "make a controller whose configuration has the wider one."
            )

        # Settings by their place in the order of the knob space, so that a batch of actions needs one look-up a row.
        self._settings = list(self.knob_space)
        self._normalized_knobs = [self.knob_space.normalized(setting) for setting in self._settings]
        sizes = self.knob_space.sizes
        self._setting_strides = torch.tensor([sizes[1] * sizes[2], sizes[2], 1])
        self._first_action = torch.tensor([0, sizes[0], sizes[0] + sizes[1]])
        tokenizer = build_action_tokenizer(self.knob_space)
        self._action_token_ids = torch.tensor(tokenizer.convert_tokens_to_ids(self.knob_space.action_tokens()))
        self._question_features = FeatureCache()
        self._vision_features = FeatureCache()
        self._rollout: Rollout | None = None
        self._policy_inputs: dict[str, torch.Tensor] | None = None

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
                reward_funcs=list(REWARD_FUNCTIONS.values() if reward_funcs is None else reward_funcs),
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
        shares_store = self.accelerator.num_processes > 1 and isinstance(collector, OutcomeCollector)
        if shares_store and collector.store.path is None:
            raise ValueError(
                f"{self.accelerator.num_processes} processes share their outcomes through a folder, but the outcome store "
                "is in memory: open it with a path."
            )

    def _check_controller(self, model: JointControllerModel) -> None:
        if self.knob_space != self.collector.knob_space:
            raise ValueError(
                f"the controller chooses from {self.knob_space.to_dict()}, but there are outcomes for "
                f"{self.collector.knob_space.to_dict()}: build both with one knob space."
            )
        features = self.collector.feature_source
        seen = {"question_size": model.config.sees_question, "vision_size": model.config.sees_image}
        for name in (name for name, is_seen in seen.items() if is_seen):
            if features is None:
                raise ValueError(
                    f"the controller sees `stage1_inputs` {model.config.stage1_inputs!r} and `stage2_inputs` "
                    f"{model.config.stage2_inputs!r}, but nothing gives features of questions and images: give the "
                    "collector a feature source, or build a controller that sees the budget alone."
                )
            size = getattr(model.config, name)
            if size != features.hidden_size:
                raise ValueError(
                    f"the controller's `{name}` is {size}, but the executor's features are {features.hidden_size} wide: "
                    "build the controller with the executor's hidden size."
                )

    # Data

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None):
        if isinstance(eval_dataset, Dataset):
            eval_dataset = _keep_images_encoded(eval_dataset)
        return super().get_eval_dataloader(eval_dataset)

    def get_train_dataloader(self):
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
        question_features = self._look_at_questions(samples).to(device)
        noise = self._draw_noise(samples, epoch, training).to(device)  # (n, values of all knobs)
        tier_noise, top_k_noise, num_blocks_noise = noise.split(self.knob_space.sizes, dim=-1)

        tier_logits = self.model.stage1(question_features, latency_budget_ms)
        tier_index = (tier_logits / self.temperature + tier_noise).argmax(-1)
        vision_features = self._look_at_images(samples, tier_index).to(device)
        top_k_logits, num_blocks_logits = self.model.stage2(
            vision_features, question_features, latency_budget_ms, tier_index
        )
        top_k_index = (top_k_logits / self.temperature + top_k_noise).argmax(-1)
        num_blocks_index = (num_blocks_logits / self.temperature + num_blocks_noise).argmax(-1)
        actions = torch.stack([tier_index, top_k_index, num_blocks_index], dim=-1)  # (n, 3)

        setting_indices = (actions.cpu() * self._setting_strides).sum(-1).tolist()
        settings = [self._settings[index] for index in setting_indices]
        outcomes = collect_outcomes(self.collector, samples, settings)
        latency_ms = predict_latency_ms(self.latency_estimator, outcomes)
        accuracy = torch.tensor([outcome.accuracy for outcome in outcomes])
        rows = [
            {
                **{column: value for column, value in sample.items() if column != "image"},
                "prompt": f"{sample['question']} ({budget:.2f} ms)",
                "accuracy": outcome.accuracy,
                "latency_ms": latency,
                "latency_budget_ms": budget,
                "normalized_knobs": self._normalized_knobs[index],
                "answer": outcome.answer,
                "setting": outcome.setting,
            }
            for sample, budget, outcome, latency, index in zip(
                samples, budgets, outcomes, latency_ms.tolist(), setting_indices, strict=True
            )
        ]
        action_index = actions.cpu() + self._first_action  # (n, 3), positions among all action tokens
        return Rollout(
            rows=rows,
            completion_ids=self._action_token_ids[action_index].tolist(),
            completions=[str(setting) for setting in settings],
            policy_inputs={
                "question_features": question_features,
                "latency_budget_ms": latency_budget_ms,
                "vision_features": vision_features,
                "actions": actions,
            },
            metrics=self._rollout_metrics(accuracy, latency_ms, torch.tensor(budgets), action_index),
        )

    def _look_at_questions(self, samples: list[Sample]) -> torch.Tensor:
        if not self.model.config.sees_question:
            return torch.empty(len(samples), 0)
        questions = [sample["question"] for sample in samples]
        features = self.collector.feature_source
        return self._question_features.lookup(
            questions, lambda rows: torch.cat([features.question_features([questions[row]]) for row in rows])
        )

    def _look_at_images(self, samples: list[Sample], tier_index: torch.Tensor) -> torch.Tensor:
        if not self.model.config.sees_image:
            return torch.empty(len(samples), 0)
        features = self.collector.feature_source
        tiers = [self.knob_space.values["tier"][index] for index in tier_index.tolist()]

        def encode(rows: list[int]) -> torch.Tensor:
            vectors: dict[int, torch.Tensor] = {}
            for tier in self.knob_space.tier_crops:
                of_tier = [row for row in rows if tiers[row] == tier]
                requests = [ExecutorRequest.of(samples[row], self.knob_space.full) for row in of_tier]
                if requests:
                    vectors.update(zip(of_tier, features.vision_features(requests, tier), strict=True))
            return torch.stack([vectors[row] for row in rows])

        keys = [(sample["sample_id"], tier) for sample, tier in zip(samples, tiers, strict=True)]
        return self._vision_features.lookup(keys, encode)

    def _draw_noise(self, samples: list[Sample], epoch: int, training: bool) -> torch.Tensor:
        num_logits = sum(self.knob_space.sizes)
        if not training:
            return torch.zeros(len(samples), num_logits)
        noise_of = {
            sample_id: draw_action_noise(self.args.seed, epoch, sample_id, self.num_generations, num_logits)
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
        """Log-probabilities and entropies of the three decisions, (n, 3) each. The token ids are not looked at."""
        inputs = self._policy_inputs
        actions = inputs["actions"]
        with self.accelerator.autocast():
            outputs = model(
                question_features=inputs["question_features"],
                latency_budget_ms=inputs["latency_budget_ms"],
                vision_features=inputs["vision_features"],
                tier_index=actions[:, 0],
            )
        logps, entropies = [], []
        for knob, logits in enumerate((outputs.tier_logits, outputs.top_k_logits, outputs.num_blocks_logits)):
            log_probs = (logits.float() / self.temperature).log_softmax(-1)
            logps.append(log_probs.gather(-1, actions[:, knob, None]))
            entropies.append(-(log_probs.exp() * log_probs).sum(-1, keepdim=True))
        return torch.cat(logps, dim=-1), torch.cat(entropies, dim=-1) if compute_entropy else None, None

    def _compute_loss(self, model, inputs):
        self._policy_inputs = {name: inputs[name] for name in self._rollout.policy_inputs}
        return super()._compute_loss(model, inputs)

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
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _run_epoch(self, *args, **kwargs):
        # transformers would take one step more when a run that had ended inside an epoch is resumed.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:
            # To transformers, a stream has epochs without end.
            self.control.should_training_stop = True


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
