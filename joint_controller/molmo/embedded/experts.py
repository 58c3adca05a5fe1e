"""A way to run experts that suits training: all of them at once, as one dense gated unit."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ..modeling_molmo import MolmoForConditionalGeneration


DENSE_MM = "dense_mm"
"""Name of the implementation in transformers' experts interface."""


def use_dense_experts(model: MolmoForConditionalGeneration) -> None:
    """Switches the model's experts to [`dense_experts_forward`]."""
    ALL_EXPERTS_FUNCTIONS.register(DENSE_MM, dense_experts_forward)
    model.config.text_config._experts_implementation = DENSE_MM


def dense_experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """
    The experts of a block, as transformers' experts interface calls them: `hidden_states` `(tokens, hidden_size)` to
    the same shape, each token by its `top_k_index` `(tokens, top_k)`, weighted. Runs every expert on every token and
    weights those that a token was not routed to by zero: the same function and gradients as sparse routing. It costs
    `num_experts / top_k` times the arithmetic, but is two matrix products of a fixed shape, which compile and fuse;
    where experts are small and tokens many, that is many times faster.

    In training it leaves `routing_entropy` (tokens,) on the module: the entropy in nats of each token's weights,
    scaled to sum to 1. A loss may read it; nothing else of the routing leaves a compiled block.
    """
    if self.training:
        shares = top_k_weights.float() / top_k_weights.float().sum(-1, keepdim=True)
        self.routing_entropy = torch.special.entr(shares).sum(-1)
    num_tokens = hidden_states.shape[0]
    routing = top_k_weights.new_zeros(num_tokens, self.num_experts).scatter(1, top_k_index, top_k_weights)
    gate_up = F.linear(hidden_states, self.gate_up_proj.flatten(0, 1)).unflatten(-1, (self.num_experts, -1))
    activated = self._apply_gate(gate_up) * routing[..., None]  # (tokens, experts, intermediate)
    # (experts, hidden, intermediate) → (hidden, experts · intermediate): summing over experts is part of the product.
    output = F.linear(activated.flatten(1), self.down_proj.transpose(0, 1).flatten(1))
    return output.to(hidden_states.dtype)
