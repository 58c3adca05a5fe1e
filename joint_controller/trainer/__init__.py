"""GRPO training of the controller, on TRL."""

from .checkpoints import last_complete_checkpoint
from .joint_grpo_config import JointGRPOConfig
from .joint_grpo_trainer import JointGRPOTrainer
from .latency_budgets import LatencyBudgetRange, resolve_latency_budgets


__all__ = [
    "JointGRPOConfig",
    "JointGRPOTrainer",
    "LatencyBudgetRange",
    "last_complete_checkpoint",
    "resolve_latency_budgets",
]
