"""The two-stage controller: some knobs are decided from question and budget, the others with the image seen."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, logging

from ..knobs import STAGES, KnobSpace
from .configuration_joint_controller import JointControllerConfig
from .setting_fit import RequestFit, SettingFit
from .stage_table import StageTable


logger = logging.get_logger(__name__)


MASKED_SCORE = -1e9
"""Score of choices that are out: finite, so that no gradient is undefined, and of probability 0."""


@dataclass
class JointControllerOutput(ModelOutput):
    """
    Scores of the choices of both stages, before the softmax. Those that are out have `MASKED_SCORE`.

    Args:
        stage1_scores (`torch.FloatTensor` of shape `(batch_size, choices of stage 1)`):
            See [`StageTable`] for the order of choices.
        stage2_scores (`torch.FloatTensor` of shape `(batch_size, choices of stage 2)` or `(batch_size, choices of stage 1, choices of stage 2)`):
            For what stage 1 chose, or for all that it might have chosen.
    """

    stage1_scores: torch.FloatTensor | None = None
    stage2_scores: torch.FloatTensor | None = None


class FeatureProjector(nn.Module):
    """Projects features of the executor. Normalised first: the scale of raw embeddings differs between checkpoints."""

    def __init__(self, feature_size: int, projection_size: int):
        super().__init__()
        self.norm = nn.LayerNorm(feature_size)
        self.projection = nn.Linear(feature_size, projection_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return nn.functional.gelu(self.projection(self.norm(features)))


class BudgetEncoder(nn.Module):
    """Sinusoidal encoding of the normalised budget, and the slack of settings where the controller sees it, through an MLP."""

    def __init__(self, config: JointControllerConfig, num_settings: int):
        super().__init__()
        self.minimum_ms = config.latency_budget_min_ms
        self.range_ms = config.latency_budget_max_ms - config.latency_budget_min_ms
        num_inputs = 2 * config.budget_octaves + (num_settings if config.sees_slack else 0)
        self.mlp = nn.Sequential(
            nn.Linear(num_inputs, config.projection_size),
            nn.GELU(),
            nn.Linear(config.projection_size, config.projection_size),
            nn.GELU(),
        )
        # Not computed in each call, which would be three kernels of a captured stage.
        self.register_buffer("frequencies", torch.empty(config.budget_octaves), persistent=False)
        self.reset_frequencies()

    @torch.no_grad()
    def reset_frequencies(self) -> None:
        """Sets the frequencies, which no checkpoint holds: octaves from half a period over the range of budgets up."""
        init.copy_(self.frequencies, math.pi * 2.0 ** torch.arange(len(self.frequencies)))

    def forward(self, latency_budget_ms: torch.Tensor, slack: torch.Tensor | None) -> torch.Tensor:
        normalized = (latency_budget_ms - self.minimum_ms) / self.range_ms  # (n,), 0 to 1 over the training range
        angles = normalized[:, None].to(self.frequencies.dtype) * self.frequencies  # (n, octaves)
        inputs = [angles.sin(), angles.cos()]
        if slack is not None:
            inputs.append(slack)
        return self.mlp(torch.cat(inputs, dim=-1))


class Trunk(nn.Module):
    """Two hidden layers over the concatenated inputs of a stage."""

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(input_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size), nn.GELU()
        )

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.layers(torch.cat(inputs, dim=-1))


class ChoiceHead(nn.Module):
    """Scores the choices of a stage: each on its own (`"joint"`), or as the sum of a score for each value (`"independent"`)."""

    def __init__(self, config: JointControllerConfig, sizes: Sequence[int]):
        super().__init__()
        outputs = [math.prod(sizes)] if config.heads == "joint" else sizes
        self.linears = nn.ModuleList(nn.Linear(config.hidden_size, size) for size in outputs)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        scores = self.linears[0](hidden_states)
        for linear in self.linears[1:]:
            scores = (scores[:, :, None] + linear(hidden_states)[:, None, :]).flatten(1)
        return scores


class Stage1(nn.Module):
    """Decides its knobs before any image work. Inputs are those of [`JointControllerModel.score_stage1`]."""

    def __init__(self, config: JointControllerConfig, table: StageTable):
        super().__init__()
        sees_question = "question" in config.stage1_inputs
        self.budget_encoder = BudgetEncoder(config, table.positions.numel())
        self.question_projector = (
            FeatureProjector(config.question_size, config.projection_size) if sees_question else None
        )
        self.trunk = Trunk((2 if sees_question else 1) * config.projection_size, config.hidden_size)
        self.head = ChoiceHead(config, table.sizes[0])

    def forward(
        self, question_features: torch.Tensor | None, latency_budget_ms: torch.Tensor, slack: torch.Tensor | None
    ) -> torch.Tensor:
        inputs = [self.budget_encoder(latency_budget_ms, slack)]
        if self.question_projector is not None:
            inputs.append(self.question_projector(question_features))
        return self.head(self.trunk(*inputs))


class Stage2(nn.Module):
    """Decides its knobs after the vision tower has run as stage 1 decided. Inputs are those of
    [`JointControllerModel.score_stage2`], with the slack of the settings that stage 1 left."""

    def __init__(self, config: JointControllerConfig, table: StageTable):
        super().__init__()
        sees_image, sees_question = "image" in config.stage2_inputs, "question" in config.stage2_inputs
        size = config.projection_size
        self.vision_projector = FeatureProjector(config.vision_size, size) if sees_image else None
        self.question_projector = FeatureProjector(config.question_size, size) if sees_question else None
        self.budget_encoder = BudgetEncoder(config, table.num_choices[1])
        self.choice_embeddings = nn.ModuleList(nn.Embedding(num_values, size) for num_values in table.sizes[0])
        num_inputs = 1 + len(table.sizes[0]) + sees_image + sees_question
        self.trunk = Trunk(num_inputs * size, config.hidden_size)
        self.head = ChoiceHead(config, table.sizes[1])

    def forward(
        self,
        vision_features: torch.Tensor | None,
        question_features: torch.Tensor | None,
        latency_budget_ms: torch.Tensor,
        first_values: torch.Tensor,
        slack: torch.Tensor | None,
    ) -> torch.Tensor:
        inputs = []
        if self.vision_projector is not None:
            inputs.append(self.vision_projector(vision_features))
        if self.question_projector is not None:
            inputs.append(self.question_projector(question_features))
        inputs.append(self.budget_encoder(latency_budget_ms, slack))
        inputs += [embed(first_values[:, column]) for column, embed in enumerate(self.choice_embeddings)]
        return self.head(self.trunk(*inputs))


class JointControllerModel(PreTrainedModel):
    r"""
    The policy: stage 1 gives a distribution over the values of its knobs from the question and the budget; stage 2 over those
    of its own from the image (encoded as stage 1 decided), the question, the budget and that decision. The configuration can
    take question and image away. The stages share no parameters, so that either can be trained, frozen or loaded alone. A
    new controller is uniform over all settings. Has about 0.23 M parameters where features are 2048 wide.

    Args:
        config ([`JointControllerConfig`]):
            Knob space, sizes and budget range.

    Raises:
        ValueError: If the configuration has no knob space.

    Example: see [`~joint_controller.decisions.decide`], which goes through both stages.
    """

    config_class = JointControllerConfig
    config: JointControllerConfig
    main_input_name = "question_features"

    def __init__(self, config: JointControllerConfig):
        super().__init__(config)
        if config.knob_space is None:
            raise ValueError("a controller needs knobs to decide: give its configuration a `knob_space`.")
        self.knob_space = KnobSpace.from_dict(config.knob_space)
        self.table = StageTable(self.knob_space)
        stages = [self.knob_space.decided_by(stage) for stage in STAGES]
        # A stage without knobs has nothing to decide, and no parameters.
        self.stage1 = Stage1(config, self.table) if stages[0] else nn.Module()
        self.stage2 = Stage2(config, self.table) if stages[1] else nn.Module()
        for name, values in (("setting_positions", self.table.positions), ("first_values", self.table.values[0])):
            self.register_buffer(name, values, persistent=False)
        self.post_init()

    def _init_weights(self, module: nn.Module):
        heads = [stage.head for stage in (self.stage1, self.stage2) if hasattr(stage, "head")]
        if any(module is linear for head in heads for linear in head.linears):
            # Equal scores: training starts from the uniform policy, whatever the executor's features are.
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, BudgetEncoder):
            module.reset_frequencies()
        elif module is self:
            # Buffers that no checkpoint holds.
            init.copy_(self.setting_positions, self.table.positions)
            init.copy_(self.first_values, self.table.values[0])

    @property
    def sees_question(self) -> bool:
        """Whether a stage that decides something reads question features."""
        inputs = {1: self.config.stage1_inputs, 2: self.config.stage2_inputs}
        return any("question" in inputs[stage] for stage in STAGES if self.knob_space.decided_by(stage))

    @property
    def sees_image(self) -> bool:
        """Whether stage 2 decides something and reads vision features."""
        return "image" in self.config.stage2_inputs and bool(self.knob_space.decided_by(2))

    def load_stage1(self, controller_path: str | Path) -> None:
        """
        Takes stage 1 from another controller.

        Args:
            controller_path (`str` or `Path`):
                Folder or Hub name of a controller, e.g. the output folder of a training.

        Raises:
            ValueError: If it is a file, or the other stage 1 has other inputs, sizes or knobs.
        """
        if Path(controller_path).is_file():
            raise ValueError(
                f"'{controller_path}' is a file, but stage 1 is read from the folder of a controller of this package. A "
                "state dict that the original scripts saved (.pt) holds another network, which cannot be converted: train "
                "stage 1 anew."
            )
        from .loading import load_controller  # which loads this class

        other = load_controller(controller_path)
        differing = [
            f"`{name}` {getattr(other.config, name)!r} there, {getattr(self.config, name)!r} here"
            for name in ("stage1_inputs", "budget_octaves", "projection_size", "hidden_size", "heads", "sees_slack")
            if getattr(other.config, name) != getattr(self.config, name)
        ]
        if self.config.sees_slack and len(other.knob_space) != len(self.knob_space):
            differing.append(
                f"it sees the slack of {len(other.knob_space)} settings there, {len(self.knob_space)} here"
            )
        if "question" in self.config.stage1_inputs and other.config.question_size != self.config.question_size:
            differing.append(f"`question_size` {other.config.question_size} there, {self.config.question_size} here")
        decided, decided_there = (
            {space.knobs[index].name: list(space.knobs[index].values) for index in space.decided_by(1)}
            for space in (self.knob_space, other.knob_space)
        )
        if list(decided.items()) != list(decided_there.items()):
            differing.append(f"it decides {decided_there} there, {decided} here")
        if differing:
            raise ValueError(f"stage 1 of '{controller_path}' does not fit this controller: {'; '.join(differing)}.")
        ranges = [
            (config.latency_budget_min_ms, config.latency_budget_max_ms) for config in (other.config, self.config)
        ]
        if ranges[0] != ranges[1]:
            logger.warning(
                "stage 1 of '%s' knows budgets of %.1f to %.1f ms, which are read as %.1f to %.1f ms here.",
                controller_path,
                *ranges[0],
                *ranges[1],
            )
        self.stage1.load_state_dict(other.stage1.state_dict())

    def score_stage1(
        self,
        question_features: torch.Tensor | None,
        latency_budget_ms: torch.Tensor,
        fit: SettingFit | None = None,
    ) -> torch.Tensor:
        """
        Scores of what stage 1 may choose.

        Args:
            question_features (`torch.Tensor` of shape `(batch_size, question_size)`):
                Question features of the executor. Not read where `stage1_inputs` is `"budget"`.
            latency_budget_ms (`torch.Tensor` of shape `(batch_size,)`):
                Budget in ms.
            fit ([`SettingFit`], *optional*):
                Which settings fit. A choice is out that leaves none of them. Required where `config.sees_slack`.

        Returns:
            `torch.Tensor` of shape `(batch_size, choices of stage 1)`

        Raises:
            ValueError: If the controller sees slack and there is none.
        """
        self.check_fit(fit)
        if not self.table.sizes[0]:
            return latency_budget_ms.new_zeros(len(latency_budget_ms), 1, dtype=self.dtype)
        slack = fit.slack if self.config.sees_slack else None
        scores = self.stage1(question_features, latency_budget_ms, slack)
        if fit is None:
            return scores
        return _masked(scores, fit.fits[:, self.setting_positions].any(dim=-1))

    def score_stage2(
        self,
        vision_features: torch.Tensor | None,
        question_features: torch.Tensor | None,
        latency_budget_ms: torch.Tensor,
        first: torch.Tensor,
        fit: SettingFit | None = None,
    ) -> torch.Tensor:
        """
        Scores of what stage 2 may choose.

        Args:
            vision_features (`torch.Tensor` of shape `(batch_size, vision_size)`):
                Vision features of the executor for the image as stage 1 decided. Not read where `stage2_inputs` does not
                name the image.
            question_features (`torch.Tensor` of shape `(batch_size, question_size)`):
                Question features of the executor. Not read where `stage2_inputs` does not name the question.
            latency_budget_ms (`torch.Tensor` of shape `(batch_size,)`):
                Budget in ms.
            first (`torch.LongTensor` of shape `(batch_size,)`):
                What stage 1 chose.
            fit ([`SettingFit`], *optional*):
                Which settings fit: the others are out. Required where `config.sees_slack`.

        Returns:
            `torch.Tensor` of shape `(batch_size, choices of stage 2)`

        Raises:
            ValueError: If the controller sees slack and there is none.
        """
        self.check_fit(fit)
        if not self.table.sizes[1]:
            return latency_budget_ms.new_zeros(len(latency_budget_ms), 1, dtype=self.dtype)
        left = self.setting_positions[first]  # (n, choices of stage 2), settings that stage 1 left
        slack = fit.slack.gather(1, left) if self.config.sees_slack else None
        scores = self.stage2(vision_features, question_features, latency_budget_ms, self.first_values[first], slack)
        return scores if fit is None else _masked(scores, fit.fits.gather(1, left))

    def check_fit(self, fit: SettingFit | RequestFit | None) -> None:
        """Refuses (`ValueError`) that there is no `fit` for a controller that sees it."""
        if self.config.sees_slack and fit is None:
            raise ValueError(
                "the controller was made to see what fits a request: give `fit`, which `Guardrail.fit` predicts, or make a "
                "controller with `sees_slack=False`."
            )

    def forward(
        self,
        latency_budget_ms: torch.Tensor,
        question_features: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        first: torch.Tensor | None = None,
        fits: torch.Tensor | None = None,
        slack: torch.Tensor | None = None,
    ) -> JointControllerOutput:
        """
        Both stages at once: what training needs to score decisions that were taken, or all that might be.

        Args:
            latency_budget_ms (`torch.Tensor` of shape `(batch_size,)`):
                Budget in ms.
            question_features (`torch.Tensor` of shape `(batch_size, question_size)`, *optional*):
                Question features of the executor.
            vision_features (`torch.Tensor` of shape `(batch_size, vision_size)` or `(batch_size, choices of stage 1, vision_size)`, *optional*):
                Vision features of the executor for the image as stage 1 decided; without `first`, for all of its choices.
            first (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
                What stage 1 chose. By default, stage 2 is scored for all that it might choose.
            fits, slack (`torch.Tensor` of shape `(batch_size, settings)`, *optional*):
                As in [`SettingFit`].

        Returns:
            [`JointControllerOutput`]
        """
        fit = None if fits is None else SettingFit(fits, slack, fits.any(dim=1))
        stage1 = self.score_stage1(question_features, latency_budget_ms, fit)
        if first is not None:
            stage2 = self.score_stage2(vision_features, question_features, latency_budget_ms, first, fit)
            return JointControllerOutput(stage1_scores=stage1, stage2_scores=stage2)
        num_first = self.table.num_choices[0]

        def for_every_choice(values: torch.Tensor | None) -> torch.Tensor | None:
            return None if values is None else values.repeat_interleave(num_first, dim=0)

        if fit is not None:
            fit = SettingFit(*map(for_every_choice, (fit.fits, fit.slack, fit.fits_budget)))
        stage2 = self.score_stage2(
            None if vision_features is None else vision_features.flatten(0, 1),
            for_every_choice(question_features),
            for_every_choice(latency_budget_ms),
            torch.arange(num_first, device=stage1.device).repeat(len(stage1)),
            fit,
        )
        return JointControllerOutput(stage1_scores=stage1, stage2_scores=stage2.reshape(len(stage1), num_first, -1))


def _masked(scores: torch.Tensor, is_left: torch.Tensor) -> torch.Tensor:
    # In float32: float16 has no number as low.
    return scores.float().masked_fill(~is_left, MASKED_SCORE)
