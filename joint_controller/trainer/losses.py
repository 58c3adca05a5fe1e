r"""
Losses over all settings of a sample at once, for samples whose outcomes are known at each setting.

With the policy \\(\pi(s) = \pi_1(c_1)\,\pi_2(c_2 \mid c_1)\\) over the settings \\(s = (c_1, c_2)\\) that fit, and their rewards
\\(R(s)\\):

- `"expected"`: \\(-\sum_s \pi(s) R(s)\\), less an entropy bonus. GRPO estimates its gradient from samples; here it is exact.
- `"supervised"`: \\(-\log \pi(s^*)\\), the cross-entropy to the setting with the highest reward (of equals, the fastest).
- `"regression"`: the scores of stage 2 are taught to be \\(R(c_1, c_2)\\), those of stage 1 the reward of what stage 2 would take
  then: the squared error of both, for each sample a mean over what may be chosen. Choosing the highest score is then choosing
  the setting that is predicted to be best.
"""

import torch

from ..controller.modeling_joint_controller import MASKED_SCORE


Losses = tuple[torch.Tensor, torch.Tensor]


def _log_policy(stage1: torch.Tensor, stage2: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of shape `(n, choices of stage 1, choices of stage 2)`."""
    return stage1.log_softmax(dim=-1)[..., None] + stage2.log_softmax(dim=-1)


def expected_loss(
    stage1: torch.Tensor,
    stage2: torch.Tensor,
    rewards: torch.Tensor,
    latency_ms: torch.Tensor,
    allowed: torch.Tensor,
    entropy_coef: float,
) -> Losses:
    """
    The negative expected reward. The arguments are those of all losses here.

    Args:
        stage1 (`torch.Tensor` of shape `(n, choices of stage 1)`), stage2 (`torch.Tensor` of shape `(n, choices of stage 1, choices of stage 2)`):
            Scores of the controller.
        rewards, latency_ms (`torch.Tensor` of shape `(n, choices of stage 1, choices of stage 2)`):
            What each setting is worth, and what it takes in ms. Not read where it is not allowed.
        allowed (`torch.BoolTensor` of the same shape):
            Settings that may be chosen, at least one for each sample.
        entropy_coef (`float`):
            Weight of the entropy of the policy.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The loss, a mean over samples, and the probability of each setting, of the shape
        of `rewards`.
    """
    log_probs = _log_policy(stage1, stage2)
    probs = log_probs.exp()
    expected = (probs * rewards.masked_fill(~allowed, 0.0)).sum(dim=(1, 2))
    entropy = -(probs * log_probs.masked_fill(~allowed, 0.0)).sum(dim=(1, 2))
    return -(expected + entropy_coef * entropy).mean(), probs


def supervised_loss(
    stage1: torch.Tensor,
    stage2: torch.Tensor,
    rewards: torch.Tensor,
    latency_ms: torch.Tensor,
    allowed: torch.Tensor,
    entropy_coef: float,
) -> Losses:
    """The cross-entropy to the best setting that is allowed. Arguments are those of [`expected_loss`]; `entropy_coef` has no
    part."""
    log_probs = _log_policy(stage1, stage2)
    worth = rewards.masked_fill(~allowed, -torch.inf).flatten(1)
    is_best = worth == worth.amax(dim=1, keepdim=True)
    best = latency_ms.flatten(1).masked_fill(~is_best, torch.inf).argmin(dim=1)
    return -log_probs.flatten(1).gather(1, best[:, None]).mean(), log_probs.exp()


def regression_loss(
    stage1: torch.Tensor,
    stage2: torch.Tensor,
    rewards: torch.Tensor,
    latency_ms: torch.Tensor,
    allowed: torch.Tensor,
    entropy_coef: float,
) -> Losses:
    """The squared errors of predicted rewards. Arguments are those of [`expected_loss`]; `entropy_coef` has no part. The
    probabilities are those of the setting that is predicted to be best, 1."""
    errors = (stage2 - rewards.where(allowed, stage2.detach())) ** 2
    loss = (errors.sum(dim=(1, 2)) / allowed.sum(dim=(1, 2))).mean()
    with torch.no_grad():
        taken = stage2.masked_fill(~allowed, MASKED_SCORE).argmax(dim=-1, keepdim=True)
    follows = rewards.gather(-1, taken)[..., 0]  # of each choice of stage 1
    is_left = allowed.any(dim=-1)
    errors = (stage1 - follows.where(is_left, stage1.detach())) ** 2
    loss = loss + (errors.sum(dim=1) / is_left.sum(dim=1)).mean()
    with torch.no_grad():
        first = stage1.masked_fill(~is_left, MASKED_SCORE).argmax(dim=-1)
        probs = torch.zeros_like(rewards)
        rows = torch.arange(len(first), device=first.device)
        probs[rows, first, taken[rows, first, 0]] = 1.0
    return loss, probs


EXACT_LOSSES = {"expected": expected_loss, "supervised": supervised_loss, "regression": regression_loss}
"""Losses that take all outcomes of a sample."""

LOSSES = ("grpo", *EXACT_LOSSES)
"""How a controller can be trained."""
