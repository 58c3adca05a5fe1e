import math

import pytest
import torch
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

from joint_controller.molmo.embedded.experts import dense_experts_forward


@pytest.fixture
def block() -> OlmoeSparseMoeBlock:
    torch.manual_seed(0)
    config = OlmoeConfig(
        hidden_size=12, intermediate_size=8, num_experts=6, num_experts_per_tok=3, experts_implementation="eager"
    )
    block = OlmoeSparseMoeBlock(config)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return block


@pytest.mark.parametrize("top_k", [1, 3, 6])
def test_dense_experts_equal_sparse_ones_in_value_and_gradient(block, top_k):
    block.gate.top_k = top_k
    hidden_states = torch.randn(5, 12)
    gradients = []
    for experts in (block.experts, lambda *routed: dense_experts_forward(block.experts, *routed)):
        block.zero_grad()
        _, weights, indices = block.gate(hidden_states)
        output = experts(hidden_states, indices, weights)
        output.square().sum().backward()
        gradients.append([output.detach(), *(parameter.grad.clone() for parameter in block.parameters())])
    for sparse, dense in zip(*gradients, strict=True):
        torch.testing.assert_close(dense, sparse, atol=1e-5, rtol=1e-5)


def test_routing_entropy_is_that_of_the_scaled_weights(block):
    weights = torch.tensor([[0.2, 0.2, 0.2], [0.4, 0.1, 0.0]])
    dense_experts_forward(block.experts.train(), torch.randn(2, 12), torch.tensor([[0, 1, 2], [3, 4, 5]]), weights)
    expected = torch.tensor([math.log(3), -0.8 * math.log(0.8) - 0.2 * math.log(0.2)])
    torch.testing.assert_close(block.experts.routing_entropy, expected)
