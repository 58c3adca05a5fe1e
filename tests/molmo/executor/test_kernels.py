"""
Each kernel of the fast path against the modules that it stands for: on a GPU where there is one, else interpreted on the
CPU (where conftest.py has asked for that).
"""

import pytest
import torch
import torch.nn.functional as F
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import (
    OlmoeAttention,
    OlmoeExperts,
    OlmoeRMSNorm,
    OlmoeRotaryEmbedding,
    OlmoeTopKRouter,
    apply_rotary_pos_emb,
)


pytest.importorskip("triton")

from joint_controller.molmo.executor import kernels


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
# Widths that are no powers of 2, and more experts than a power of 2.
CONFIG = OlmoeConfig(
    vocab_size=70,
    hidden_size=48,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_experts=10,
    num_experts_per_tok=5,
    max_position_embeddings=256,
    rms_norm_eps=EPS,
    attn_implementation="eager",
    experts_implementation="eager",
)
WIDTH, HEADS, HEAD_SIZE = 48, 3, 16


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def random(*shape, scale=1.0):
    return scale * torch.randn(*shape, device=DEVICE)


def table(*tensors):
    return torch.tensor([tensor.data_ptr() for tensor in tensors], device=DEVICE)


def ints(*numbers):
    return torch.tensor(numbers, dtype=torch.int32, device=DEVICE)


def rms_norm(x, gain):
    norm = OlmoeRMSNorm(len(gain), EPS).to(DEVICE)
    norm.weight.data = gain
    return norm(x)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=5e-5)


class Attention:
    """transformers' attention with random weights, and what it gives for a whole sequence."""

    def __init__(self, length):
        self.module = OlmoeAttention(CONFIG, 0).to(DEVICE).requires_grad_(False)
        for norm in (self.module.q_norm, self.module.k_norm):
            norm.weight.data = 1 + random(WIDTH, scale=0.3)
        embedding = OlmoeRotaryEmbedding(CONFIG).to(DEVICE)
        self.x = random(1, length, WIDTH)
        positions = torch.arange(128, device=DEVICE)[None]
        self.cos, self.sin = embedding(self.x, positions)
        mask = torch.full((1, 1, length, length), -torch.inf, device=DEVICE).triu(1)
        self.module.o_proj.weight.data = torch.eye(WIDTH, device=DEVICE)  # the attention's output itself
        self.output = self.module(self.x, (self.cos[:, :length], self.sin[:, :length]), mask)[0][0]
        parts = (self.module.q_proj, self.module.k_proj, self.module.v_proj)
        self.qkv = torch.cat([part(self.x[0]) for part in parts], dim=-1).contiguous()

    @property
    def rotary(self):
        return tuple(table[0, :, : HEAD_SIZE // 2].contiguous() for table in (self.cos, self.sin))

    def keys_and_values(self):
        """(heads, length, head size) each."""
        key = self.module.k_norm(self.module.k_proj(self.x)).view(1, -1, HEADS, HEAD_SIZE).transpose(1, 2)
        query = self.module.q_norm(self.module.q_proj(self.x)).view(1, -1, HEADS, HEAD_SIZE).transpose(1, 2)
        length = self.x.shape[1]
        query, key = apply_rotary_pos_emb(query, key, self.cos[:, :length], self.sin[:, :length])
        value = self.module.v_proj(self.x).view(1, -1, HEADS, HEAD_SIZE).transpose(1, 2)
        return query[0], key[0], value[0]


def test_norm_linear_takes_the_weights_of_the_block_in_its_slot():
    gains, weights = [1 + random(WIDTH, scale=0.3) for _ in range(3)], [random(70, WIDTH) for _ in range(3)]
    x, out = random(WIDTH), random(70)
    for slot, block in enumerate([2, 0]):
        kernels.norm_linear(x, table(*gains), table(*weights), ints(2, 0), slot, out, EPS)
        close(out, F.linear(rms_norm(x, gains[block]), weights[block]))


@pytest.mark.parametrize("length", [1, 2, 7, 40])
@pytest.mark.parametrize("splits", [1, 4])
def test_decode_attention_of_the_last_token_equals_that_of_the_whole_sequence(length, splits):
    attention = Attention(length)
    _, keys, values = attention.keys_and_values()
    # The cache has two rows and two blocks; elsewhere it holds what would spoil every result.
    cache = [torch.full((2, 2, HEADS, 64, HEAD_SIZE), torch.nan, device=DEVICE) for _ in range(2)]
    for entries, filled in zip(cache, (keys, values), strict=True):
        entries[1, 1, :, : length - 1] = filled[:, :-1]
    partial = torch.full((1, HEADS, splits, HEAD_SIZE), torch.nan, device=DEVICE)
    stats = torch.full((1, HEADS, splits, 2), torch.nan, device=DEVICE)
    kernels.decode_attention(
        attention.qkv[-1:].contiguous(),
        table(torch.zeros(0), attention.module.q_norm.weight),
        table(torch.zeros(0), attention.module.k_norm.weight),
        attention.rotary,
        *cache,
        ints(1),
        ints(length - 1),
        ints(1),
        0,
        partial,
        stats,
        EPS,
        block_positions=16,
    )
    close(kernels.merge_splits(partial, stats, torch.float32)[0], attention.output[-1])
    for entries, filled in zip(cache, (keys, values), strict=True):
        close(entries[1, 1, :, :length], filled)
        assert entries[1, 1, :, length:].isnan().all() and entries[0].isnan().all() and entries[1, 0].isnan().all()

    weight, x = random(WIDTH, WIDTH), random(WIDTH)
    expected = x + F.linear(attention.output[-1], weight)
    kernels.attention_output(partial, stats, x, table(weight), ints(0), 0)
    close(x, expected)


def test_decode_attention_of_rows_keeps_them_apart():
    lengths, rows = [5, 33, 1], [2, 0, 1]
    attentions = [Attention(length) for length in lengths]
    for attention in attentions[1:]:
        attention.module.q_norm, attention.module.k_norm = attentions[0].module.q_norm, attentions[0].module.k_norm
    queries = [attention.keys_and_values() for attention in attentions]
    cache = [torch.full((1, 3, HEADS, 64, HEAD_SIZE), torch.nan, device=DEVICE) for _ in range(2)]
    for (_, keys, values), row in zip(queries, rows, strict=True):
        cache[0][0, row, :, : keys.shape[1] - 1], cache[1][0, row, :, : keys.shape[1] - 1] = (
            keys[:, :-1],
            values[:, :-1],
        )
    partial = torch.full((3, HEADS, 2, HEAD_SIZE), torch.nan, device=DEVICE)
    stats = torch.full((3, HEADS, 2, 2), torch.nan, device=DEVICE)
    norms = attentions[0].module
    kernels.decode_attention(
        torch.stack([attention.qkv[-1] for attention in attentions]),
        table(norms.q_norm.weight),
        table(norms.k_norm.weight),
        attentions[0].rotary,
        *cache,
        ints(*rows),
        ints(*[length - 1 for length in lengths]),
        ints(0),
        0,
        partial,
        stats,
        EPS,
    )
    found = kernels.merge_splits(partial, stats, torch.float32)
    for row, (query, keys, values) in enumerate(queries):
        expected = F.scaled_dot_product_attention(query[:, -1:], keys, values).flatten()
        close(found[row], expected)


class Experts:
    """transformers' router and experts with random weights."""

    def __init__(self):
        self.gain = 1 + random(WIDTH, scale=0.3)
        self.router = OlmoeTopKRouter(CONFIG).to(DEVICE).requires_grad_(False)
        self.router.weight.data = random(10, WIDTH)
        self.experts = OlmoeExperts(CONFIG).to(DEVICE).requires_grad_(False)
        self.experts.gate_up_proj.data = random(10, 40, WIDTH, scale=0.3)
        self.experts.down_proj.data = random(10, WIDTH, 20)

    def __call__(self, x, top_k):
        """What is added to `x` `(tokens, width)`, and the router's logits."""
        self.router.top_k = top_k
        normed = rms_norm(x, self.gain)
        logits, shares, chosen = self.router(normed)
        return self.experts(normed, chosen, shares), logits, normed


@pytest.mark.parametrize("top_k", [1, 3, 5])
def test_a_token_goes_through_as_many_experts_as_the_device_says(top_k):
    reference, x = Experts(), random(WIDTH)
    change, logits, _ = reference(x[None], top_k)
    activated = torch.full((5, 20), torch.nan, device=DEVICE)
    weights = [table(getattr(reference.experts, name)) for name in ("gate_up_proj", "down_proj")]
    kernels.gate_up(x, table(reference.gain), logits[0], ints(top_k), weights[0], ints(0), 0, activated, EPS)
    assert activated[top_k:].isnan().all() and activated[:top_k].isfinite().all()
    expected = x + change[0]
    kernels.down(activated, logits[0], ints(top_k), weights[1], ints(0), 0, x)
    close(x, expected)


def test_equal_router_logits_choose_every_expert_once():
    reference, x = Experts(), random(WIDTH)
    logits = torch.zeros(10, device=DEVICE)
    activated = torch.full((5, 20), torch.nan, device=DEVICE)
    gate_up = table(reference.experts.gate_up_proj)
    kernels.gate_up(x, table(reference.gain), logits, ints(5), gate_up, ints(0), 0, activated, EPS)
    both = F.linear(rms_norm(x, reference.gain), reference.experts.gate_up_proj[:5].flatten(0, 1)).view(5, 2, 20)
    close(activated, F.silu(both[:, 0]) * both[:, 1])
    counts, _, shares = kernels.route(logits[None], ints(5), 5)
    assert counts.tolist() == [1] * 5 + [0] * 5
    close(shares, torch.full((1, 5), 0.1, device=DEVICE))


@pytest.mark.parametrize("best", [0, 3, 69])
def test_next_token_is_the_first_of_the_likeliest(best):
    logits, embedding = random(70), random(70, WIDTH)
    logits[best:] = torch.where(logits[best:] > 0, 9.0, logits[best:])
    logits[best] = 9.0
    token, position, x = torch.zeros(1, dtype=torch.long, device=DEVICE), ints(17), random(WIDTH)
    kernels.next_token(logits, embedding, token, position, x)
    assert token.item() == best and position.item() == 18
    assert torch.equal(x, embedding[best])


def test_norms_of_rows_and_quick_gelu():
    x, gain = random(5, WIDTH), random(WIDTH)
    close(kernels.rms_norm(x, gain, EPS), rms_norm(x, gain))
    assert kernels.rms_norm(x[:0], gain, EPS).shape == (0, WIDTH)
    change, bias, before = random(5, WIDTH), random(WIDTH), x.clone()
    normed = kernels.add_layer_norm(x, change, gain, bias, EPS)
    close(x, before + change)
    close(normed, F.layer_norm(x, (WIDTH,), gain, bias, EPS))
    values = random(3, 1500)
    expected = values * torch.sigmoid(1.702 * values)
    close(kernels.quick_gelu_(values), expected)


def test_rotate_and_store_writes_each_token_to_its_row_and_position():
    attention = Attention(9)
    query, keys, values = attention.keys_and_values()
    # Two prompts of 5 and 4 tokens, rotated as positions 3.. and 0.. of rows 1 and 0.
    positions, rows = [0, 1, 2, 3, 4, 5, 6, 7, 8], [1, 1, 1, 0, 0, 0, 1, 0, 1]
    cache = [torch.full((2, HEADS, 64, HEAD_SIZE), torch.nan, device=DEVICE) for _ in range(2)]
    queries = kernels.rotate_and_store(
        attention.qkv,
        attention.module.q_norm.weight,
        attention.module.k_norm.weight,
        attention.rotary,
        ints(*rows),
        ints(*positions),
        *cache,
        EPS,
    )
    close(queries.view(9, HEADS, HEAD_SIZE).transpose(0, 1), query)
    for token, (row, position) in enumerate(zip(rows, positions, strict=True)):
        close(cache[0][row, :, position], keys[:, token])
        close(cache[1][row, :, position], values[:, token])
        assert cache[0][1 - row, :, position].isnan().all()


@pytest.mark.parametrize("num_tokens", [1, 21, 150])
def test_each_token_goes_to_its_own_number_of_experts(num_tokens):
    reference, x = Experts(), random(num_tokens, WIDTH)
    top_k = torch.randint(0, 6, (num_tokens,), dtype=torch.int32, device=DEVICE)  # 0: padding, which stays as it is
    expected = x.clone()
    for token, number in enumerate(top_k.tolist()):
        if number:
            expected[token] += reference(x[token][None], number)[0][0]
    _, logits, normed = reference(x, 1)
    projections = reference.experts.gate_up_proj, reference.experts.down_proj
    close(kernels.add_experts_(x.clone(), normed, logits, top_k, 5, *projections), expected)
    # The tiles of half precision: interpreted in float32, since NumPy has no bfloat16.
    dtype, tolerance = (torch.float32, 1e-4) if DEVICE == "cpu" else (torch.bfloat16, 2e-2)
    inputs = [tensor.to(dtype) for tensor in (x, normed, logits)]
    weights = [weight.to(dtype) for weight in projections]
    rounded = [tensor.float().clone() for tensor in (*inputs, *weights)]
    expected = kernels.add_experts_(*rounded[:3], top_k, 5, *rounded[3:])
    for tiles in kernels.EXPERT_TILES.values():
        found = kernels.add_experts_(inputs[0].clone(), *inputs[1:], top_k, 5, *weights, tiles)
        assert (found.float() - expected).norm() < tolerance * expected.norm()


def test_route_lists_each_pair_once():
    logits = random(40, 10)
    top_k = torch.randint(0, 6, (40,), dtype=torch.int32, device=DEVICE)
    counts, pairs, shares = kernels.route(logits, top_k, 5)
    softmax = logits.softmax(dim=-1)
    seen = {}
    for expert, count in enumerate(counts.tolist()):
        for pair in pairs[expert, :count].tolist():
            token, place = divmod(pair, 5)
            seen.setdefault(token, {})[place] = expert
            close(shares[token, place], softmax[token, expert])
    for token, number in enumerate(top_k.tolist()):
        chosen = seen.get(token, {})
        assert sorted(chosen) == list(range(number))
        assert [chosen[place] for place in range(number)] == softmax[token].topk(number).indices.tolist()
