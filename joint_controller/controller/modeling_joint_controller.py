"""The two-stage controller: a tier from question and budget, then top_k and num_blocks with the image seen."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, logging

from ..knobs import KnobSpace
from .configuration_joint_controller import JointControllerConfig


logger = logging.get_logger(__name__)


@dataclass
class JointControllerOutput(ModelOutput):
    """
    Scores of every value of every knob, before the softmax.

    Args:
        tier_logits (`torch.FloatTensor` of shape `(batch_size, num_tiers)`):
            Stage 1.
        top_k_logits (`torch.FloatTensor` of shape `(batch_size, num_top_k_values)`):
            Stage 2.
        num_blocks_logits (`torch.FloatTensor` of shape `(batch_size, num_num_blocks_values)`):
            Stage 2.
    """

    tier_logits: torch.FloatTensor | None = None
    top_k_logits: torch.FloatTensor | None = None
    num_blocks_logits: torch.FloatTensor | None = None


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
    """Chooses the tier before any image work."""

    def __init__(self, config: JointControllerConfig):
        super().__init__()
        sees_question = "question" in config.stage1_inputs
        self.budget_encoder = BudgetEncoder(config)
        self.question_projector = (
            FeatureProjector(config.question_size, config.projection_size) if sees_question else None
        )
        self.trunk = Trunk((2 if sees_question else 1) * config.projection_size, config.hidden_size)
        self.tier_head = nn.Linear(config.hidden_size, len(config.knob_space["tier_crops"]))

    def forward(self, question_features: torch.Tensor, latency_budget_ms: torch.Tensor) -> torch.Tensor:
        """
        Args:
            question_features (`torch.Tensor` of shape `(batch_size, question_size)`):
                Mean of the executor's embeddings of the question's tokens. Not read where `stage1_inputs` is `"budget"`.
            latency_budget_ms (`torch.Tensor` of shape `(batch_size,)`):
                Budget in ms.

        Returns:
            `torch.Tensor`: Tier logits of shape `(batch_size, num_tiers)`.
        """
        inputs = [self.budget_encoder(latency_budget_ms)]
        if self.question_projector is not None:
            inputs.append(self.question_projector(question_features))
        return self.tier_head(self.trunk(*inputs))


class Stage2(nn.Module):
    """Chooses top_k and num_blocks after the vision tower has run at the tier taken."""

    def __init__(self, config: JointControllerConfig):
        super().__init__()
        sees_image, sees_question = "image" in config.stage2_inputs, "question" in config.stage2_inputs
        self.vision_projector = FeatureProjector(config.vision_size, config.projection_size) if sees_image else None
        self.question_projector = (
            FeatureProjector(config.question_size, config.projection_size) if sees_question else None
        )
        self.budget_encoder = BudgetEncoder(config)
        self.tier_embedding = nn.Embedding(len(config.knob_space["tier_crops"]), config.projection_size)
        self.trunk = Trunk((2 + sees_image + sees_question) * config.projection_size, config.hidden_size)
        self.top_k_head = nn.Linear(config.hidden_size, len(config.knob_space["top_k"]))
        self.num_blocks_head = nn.Linear(config.hidden_size, len(config.knob_space["num_blocks"]))

    def forward(
        self,
        vision_features: torch.Tensor,
        question_features: torch.Tensor,
        latency_budget_ms: torch.Tensor,
        tier_index: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            vision_features (`torch.Tensor` of shape `(batch_size, vision_size)`):
                Mean of the projected vision features of the image at the tier taken. Not read where `stage2_inputs` does
                not name the image.
            question_features (`torch.Tensor` of shape `(batch_size, question_size)`):
                Mean of the executor's embeddings of the question's tokens. Not read where `stage2_inputs` does not name
                the question.
            latency_budget_ms (`torch.Tensor` of shape `(batch_size,)`):
                Budget in ms.
            tier_index (`torch.LongTensor` of shape `(batch_size,)`):
                Position of the tier taken in the knob space.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: top_k logits of shape `(batch_size, num_top_k_values)` and num_blocks
            logits of shape `(batch_size, num_num_blocks_values)`. The two are sampled independently of each other.
        """
        inputs = []
        if self.vision_projector is not None:
            inputs.append(self.vision_projector(vision_features))
        if self.question_projector is not None:
            inputs.append(self.question_projector(question_features))
        inputs += [self.budget_encoder(latency_budget_ms), self.tier_embedding(tier_index)]
        hidden_states = self.trunk(*inputs)
        return self.top_k_head(hidden_states), self.num_blocks_head(hidden_states)


class JointControllerModel(PreTrainedModel):
    r"""
    The policy: stage 1 gives a distribution over tiers from the question and the budget; stage 2 gives distributions over
    top_k and num_blocks from the image (encoded at the tier taken), the question, the budget and that tier. The
    configuration can take question and image away. The stages share no parameters, so that either can be trained, frozen
    or loaded alone. A new controller is uniform over all settings. Has about 0.23 M parameters with an executor 2048
    wide.

    Args:
        config ([`JointControllerConfig`]):
            Knob space, sizes and budget range.

    Example:

    ```python
    >>> tier_logits = model.stage1(question_features, latency_budget_ms)
    >>> tier_index = tier_logits.argmax(-1)
    >>> vision_features = executor.vision_features(requests, tier)
    >>> top_k_logits, num_blocks_logits = model.stage2(vision_features, question_features, latency_budget_ms, tier_index)
    ```
    """

    config_class = JointControllerConfig
    config: JointControllerConfig
    main_input_name = "question_features"

    def __init__(self, config: JointControllerConfig):
        super().__init__(config)
        self.stage1 = Stage1(config)
        self.stage2 = Stage2(config)
        self.post_init()

    def _init_weights(self, module: nn.Module):
        if module in (self.stage1.tier_head, self.stage2.top_k_head, self.stage2.num_blocks_head):
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
    def knob_space(self) -> KnobSpace:
        """Values that the knobs may take."""
        return KnobSpace.from_dict(self.config.knob_space)

    def load_stage1(self, controller_path: str | Path) -> None:
        """
        Takes stage 1 from another controller.

        Args:
            controller_path (`str` or `Path`):
                Folder or Hub name of a controller, e.g. the output folder of a training.

        Raises:
            ValueError: If it is a file, or the other stage 1 has other inputs, sizes or tiers.
        """
        if Path(controller_path).is_file():
            raise ValueError(
                f"'{controller_path}' is a file, but stage 1 is read from the folder of a controller of this package. A "
                "state dict that the original scripts saved (.pt) holds another network, which cannot be converted: train "
                "stage 1 anew."
            )
        other = JointControllerModel.from_pretrained(controller_path)
        differing = [
            f"`{name}` {getattr(other.config, name)!r} there, {getattr(self.config, name)!r} here"
            for name in ("stage1_inputs", "budget_octaves", "projection_size", "hidden_size")
            if getattr(other.config, name) != getattr(self.config, name)
        ]
        if "question" in self.config.stage1_inputs and other.config.question_size != self.config.question_size:
            differing.append(f"`question_size` {other.config.question_size} there, {self.config.question_size} here")
        tiers, other_tiers = list(self.knob_space.tier_crops), list(other.knob_space.tier_crops)
        if tiers != other_tiers:
            differing.append(f"tiers {other_tiers} there, {tiers} here")
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
        tier_index: torch.Tensor,
    ) -> JointControllerOutput:
        """
        Both stages at once, for tiers that were already taken: what training needs to score past decisions.

        Args:
            question_features (`torch.Tensor` of shape `(batch_size, question_size)`):
                Mean of the executor's embeddings of the question's tokens.
            latency_budget_ms (`torch.Tensor` of shape `(batch_size,)`):
                Budget in ms.
            vision_features (`torch.Tensor` of shape `(batch_size, vision_size)`):
                Mean of the projected vision features of the image at the tier taken.
            tier_index (`torch.LongTensor` of shape `(batch_size,)`):
                Position of the tier taken in the knob space.

        Returns:
            [`JointControllerOutput`]
        """
        top_k_logits, num_blocks_logits = self.stage2(
            vision_features, question_features, latency_budget_ms, tier_index
        )
        return JointControllerOutput(
            tier_logits=self.stage1(question_features, latency_budget_ms),
            top_k_logits=top_k_logits,
            num_blocks_logits=num_blocks_logits,
        )
