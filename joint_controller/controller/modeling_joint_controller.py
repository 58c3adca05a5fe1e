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

from ..knobs import STAGES, Knob, KnobSpace
from .configuration_joint_controller import JointControllerConfig


logger = logging.get_logger(__name__)


@dataclass
class JointControllerOutput(ModelOutput):
    """
    Scores of every value of every knob, before the softmax.

    Args:
        logits (`tuple[torch.FloatTensor, ...]`):
            One of shape `(batch_size, num_values)` for each knob, in the order of the knob space.
    """

    logits: tuple[torch.FloatTensor, ...] | None = None


class FeatureProjector(nn.Module):
    """Projects features of the executor. Normalised first: the scale of raw embeddings differs between checkpoints."""

    def __init__(self, feature_size: int, projection_size: int):
        super().__init__()
        self.norm = nn.LayerNorm(feature_size)
        self.projection = nn.Linear(feature_size, projection_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return nn.functional.gelu(self.projection(self.norm(features)))


class BudgetEncoder(nn.Module):
    """Sinusoidal encoding of the normalised budget through an MLP."""

    def __init__(self, config: JointControllerConfig):
        super().__init__()
        self.minimum_ms = config.latency_budget_min_ms
        self.range_ms = config.latency_budget_max_ms - config.latency_budget_min_ms
        self.mlp = nn.Sequential(
            nn.Linear(2 * config.budget_octaves, config.projection_size),
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

    def forward(self, latency_budget_ms: torch.Tensor) -> torch.Tensor:
        normalized = (latency_budget_ms - self.minimum_ms) / self.range_ms  # (n,), 0 to 1 over the training range
        angles = normalized[:, None].to(self.frequencies.dtype) * self.frequencies  # (n, octaves)
        return self.mlp(torch.cat([angles.sin(), angles.cos()], dim=-1))


class Trunk(nn.Module):
    """Two hidden layers over the concatenated inputs of a stage."""

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(input_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size), nn.GELU()
        )

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.layers(torch.cat(inputs, dim=-1))


class Stage1(nn.Module):
    """Decides its knobs before any image work."""

    def __init__(self, config: JointControllerConfig, knobs: Sequence[Knob]):
        super().__init__()
        self.heads = nn.ModuleList()
        if knobs:
            sees_question = "question" in config.stage1_inputs
            self.budget_encoder = BudgetEncoder(config)
            self.question_projector = (
                FeatureProjector(config.question_size, config.projection_size) if sees_question else None
            )
            self.trunk = Trunk((2 if sees_question else 1) * config.projection_size, config.hidden_size)
            self.heads.extend(nn.Linear(config.hidden_size, len(knob)) for knob in knobs)

    def forward(
        self, question_features: torch.Tensor | None, latency_budget_ms: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """
        Args:
            question_features (`torch.Tensor` of shape `(batch_size, question_size)`):
                Question features of the executor. Not read where `stage1_inputs` is `"budget"`.
            latency_budget_ms (`torch.Tensor` of shape `(batch_size,)`):
                Budget in ms.

        Returns:
            `tuple[torch.Tensor, ...]`: Logits of shape `(batch_size, num_values)` for each knob of this stage, which are
            independent of each other.
        """
        if not self.heads:
            return ()
        inputs = [self.budget_encoder(latency_budget_ms)]
        if self.question_projector is not None:
            inputs.append(self.question_projector(question_features))
        hidden_states = self.trunk(*inputs)
        return tuple(head(hidden_states) for head in self.heads)


class Stage2(nn.Module):
    """Decides its knobs after the vision tower has run as stage 1 decided."""

    def __init__(self, config: JointControllerConfig, knobs: Sequence[Knob], decided_knobs: Sequence[Knob]):
        super().__init__()
        self.heads = nn.ModuleList()
        if knobs:
            sees_image, sees_question = "image" in config.stage2_inputs, "question" in config.stage2_inputs
            size = config.projection_size
            self.vision_projector = FeatureProjector(config.vision_size, size) if sees_image else None
            self.question_projector = FeatureProjector(config.question_size, size) if sees_question else None
            self.budget_encoder = BudgetEncoder(config)
            self.choice_embeddings = nn.ModuleList(nn.Embedding(len(knob), size) for knob in decided_knobs)
            num_inputs = 1 + len(decided_knobs) + sees_image + sees_question
            self.trunk = Trunk(num_inputs * size, config.hidden_size)
            self.heads.extend(nn.Linear(config.hidden_size, len(knob)) for knob in knobs)

    def forward(
        self,
        vision_features: torch.Tensor | None,
        question_features: torch.Tensor | None,
        latency_budget_ms: torch.Tensor,
        stage1_choice: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """
        Args:
            vision_features (`torch.Tensor` of shape `(batch_size, vision_size)`):
                Vision features of the executor for the image as stage 1 decided. Not read where `stage2_inputs` does not
                name the image.
            question_features (`torch.Tensor` of shape `(batch_size, question_size)`):
                Question features of the executor. Not read where `stage2_inputs` does not name the question.
            latency_budget_ms (`torch.Tensor` of shape `(batch_size,)`):
                Budget in ms.
            stage1_choice (`torch.LongTensor` of shape `(batch_size, knobs of stage 1)`):
                Position of each value that stage 1 took among the values of its knob.

        Returns:
            `tuple[torch.Tensor, ...]`: Logits of shape `(batch_size, num_values)` for each knob of this stage, which are
            independent of each other.
        """
        if not self.heads:
            return ()
        inputs = []
        if self.vision_projector is not None:
            inputs.append(self.vision_projector(vision_features))
        if self.question_projector is not None:
            inputs.append(self.question_projector(question_features))
        inputs.append(self.budget_encoder(latency_budget_ms))
        inputs += [embed(stage1_choice[:, column]) for column, embed in enumerate(self.choice_embeddings)]
        hidden_states = self.trunk(*inputs)
        return tuple(head(hidden_states) for head in self.heads)


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
        knobs = {
            stage: [self.knob_space.knobs[index] for index in self.knob_space.decided_by(stage)] for stage in STAGES
        }
        self.stage1 = Stage1(config, knobs[1])
        self.stage2 = Stage2(config, knobs[2], knobs[1])
        self.post_init()

    def _init_weights(self, module: nn.Module):
        if any(module is head for stage in (self.stage1, self.stage2) for head in stage.heads):
            # Equal logits: training starts from the uniform policy, whatever the executor's features are.
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
            for name in ("stage1_inputs", "budget_octaves", "projection_size", "hidden_size")
            if getattr(other.config, name) != getattr(self.config, name)
        ]
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

    def forward(
        self,
        question_features: torch.Tensor,
        latency_budget_ms: torch.Tensor,
        vision_features: torch.Tensor,
        actions: torch.Tensor,
    ) -> JointControllerOutput:
        """
        Both stages at once, for decisions that were already taken: what training needs to score them.

        Args:
            question_features (`torch.Tensor` of shape `(batch_size, question_size)`):
                Question features of the executor.
            latency_budget_ms (`torch.Tensor` of shape `(batch_size,)`):
                Budget in ms.
            vision_features (`torch.Tensor` of shape `(batch_size, vision_size)`):
                Vision features of the executor for the image as stage 1 decided.
            actions (`torch.LongTensor` of shape `(batch_size, knobs)`):
                Position of each value taken among the values of its knob. Those of stage 1 are read.

        Returns:
            [`JointControllerOutput`]
        """
        first, second = (self.knob_space.decided_by(stage) for stage in STAGES)
        logits = [
            *self.stage1(question_features, latency_budget_ms),
            *self.stage2(vision_features, question_features, latency_budget_ms, actions[:, first]),
        ]
        logits_of = dict(zip((*first, *second), logits, strict=True))
        return JointControllerOutput(logits=tuple(logits_of[knob] for knob in range(len(logits))))
