"""
Triton kernels of the fast path, see [`~molmo.executor.fused.FusedMolmo`], which is what calls them.

They round where transformers' modules round (a norm's output before its weight, each projection, each product of the
rotary embedding, each weighted expert), so that fast and plain answers differ by no more than the order of sums.

Two families. *Decode* kernels work on one token, whose cost is reading weights: each program reads a few rows of a matrix
once, and does over what little comes before (a norm of one row, a choice among 64 experts) rather than wait for a kernel
that does it. They find the weights of a block through tables of addresses, indexed by a list of blocks on the device: so
one captured graph runs any blocks, and any number of experts. *Row* kernels work on many tokens at once: prompts, and
batches of answers.

Triton comes with PyTorch on machines with a GPU. With `TRITON_INTERPRET=1` in the environment the kernels run on a CPU,
slowly: that is for tests.
"""

import torch


try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(
        "the captured mode of the executor needs Triton, which is not installed here: install PyTorch for CUDA, which "
        "brings it, or use the plain mode."
    ) from error


def _power_of_2(number: int) -> int:
    return triton.next_power_of_2(number)


# --- parts --------------------------------------------------------------------------------------------------------


@triton.jit
def _weights_at(table_ptr, index, like_ptr):
    """Pointer to the weights whose address is at `index` of a table; their precision is that of `like_ptr`."""
    pointer = tl.load(table_ptr + index).to(tl.pointer_type(like_ptr.dtype.element_ty))
    return tl.multiple_of(pointer, 16)


@triton.jit
def _rms_normed(row_ptr, gain_ptr, EPS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """A row, normalised and weighted: `(BLOCK_WIDTH,)` in float32, holding values of the row's precision."""
    columns = tl.arange(0, BLOCK_WIDTH)
    inside = columns < WIDTH
    row = tl.load(row_ptr + columns, mask=inside, other=0.0)
    gain = tl.load(gain_ptr + columns, mask=inside, other=0.0)
    values = row.to(tl.float32)
    normed = (values * tl.rsqrt(tl.sum(values * values) / WIDTH + EPS)).to(row.dtype)
    return (gain.to(tl.float32) * normed.to(tl.float32)).to(row.dtype).to(tl.float32)


@triton.jit
def _normed_and_rotated(
    row_ptr,
    gain_ptr,
    first,
    second,
    inside,
    cos,
    sin,
    EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """The columns `first` and `second` (the halves of one head) of a row that is normalised as a whole, rotated."""
    columns = tl.arange(0, BLOCK_WIDTH)
    row = tl.load(row_ptr + columns, mask=columns < WIDTH, other=0.0)
    dtype = row.dtype
    values = row.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values) / WIDTH + EPS)
    x1 = tl.load(row_ptr + first, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(row_ptr + second, mask=inside, other=0.0).to(tl.float32)
    gain1 = tl.load(gain_ptr + first, mask=inside, other=0.0).to(tl.float32)
    gain2 = tl.load(gain_ptr + second, mask=inside, other=0.0).to(tl.float32)
    x1 = (gain1 * (x1 * scale).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    x2 = (gain2 * (x2 * scale).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    y1 = ((x1 * cos).to(dtype).to(tl.float32) - (x2 * sin).to(dtype).to(tl.float32)).to(dtype)
    y2 = ((x2 * cos).to(dtype).to(tl.float32) + (x1 * sin).to(dtype).to(tl.float32)).to(dtype)
    return y1, y2


@triton.jit
def _expert_ranks(logits_ptr, NUM_EXPERTS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr):
    """Place of each expert by its router logit, the highest first, and its softmax: two `(BLOCK_EXPERTS,)`."""
    expert = tl.arange(0, BLOCK_EXPERTS)
    inside = expert < NUM_EXPERTS
    # Read twice, once along each axis of the comparison.
    logits = tl.load(logits_ptr + expert, mask=inside, other=-float("inf")).to(tl.float32)
    others = tl.load(logits_ptr + expert, mask=inside, other=-float("inf")).to(tl.float32)
    above = (others[None, :] > logits[:, None]) | (
        (others[None, :] == logits[:, None]) & (expert[None, :] < expert[:, None])
    )
    ranks = tl.sum(above.to(tl.int32), axis=1)
    exponentials = tl.exp(logits - tl.max(logits, axis=0))
    return ranks, exponentials / tl.sum(exponentials, axis=0)


# --- decode: one token --------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["slot"])
def _norm_linear_kernel(
    x_ptr,
    gain_table,
    weight_table,
    blocks_ptr,
    slot,
    out_ptr,
    OUT_FEATURES: tl.constexpr,
    EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    block = tl.load(blocks_ptr + slot)
    weight_ptr = _weights_at(weight_table, block, x_ptr)
    gain_ptr = _weights_at(gain_table, block, x_ptr)
    out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    columns = tl.arange(0, BLOCK_WIDTH)
    inside = (out[:, None] < OUT_FEATURES) & (columns[None, :] < WIDTH)
    weight = tl.load(weight_ptr + out[:, None] * WIDTH + columns[None, :], mask=inside, other=0.0)
    normed = _rms_normed(x_ptr, gain_ptr, EPS, WIDTH, BLOCK_WIDTH)
    result = tl.sum(weight.to(tl.float32) * normed[None, :], axis=1)
    tl.store(out_ptr + out, result.to(out_ptr.dtype.element_ty), mask=out < OUT_FEATURES)


def norm_linear(
    x: torch.Tensor,
    gains: torch.Tensor,
    weights: torch.Tensor,
    blocks: torch.Tensor,
    slot: int,
    out: torch.Tensor,
    eps: float,
    block_out: int = 8,
    num_warps: int = 4,
) -> None:
    """
    A token through a block's norm and then a linear layer without bias: QKV, router, or output layer.

    Args:
        x (`torch.Tensor` of shape `(width,)`):
            The token's hidden state.
        gains, weights (`torch.LongTensor`):
            Tables of addresses: of the norm's weight `(width,)`, and of the layer's weight `(features, width)`.
        blocks (`torch.IntTensor`):
            Indices into the tables.
        slot (`int`):
            Which entry of `blocks` to take.
        out (`torch.Tensor` of shape `(features,)`):
            Where the result goes.
        eps (`float`):
            The norm's epsilon.
        block_out (`int`, *optional*, defaults to 8):
            Rows of the weight that a program reads.
        num_warps (`int`, *optional*, defaults to 4):
            Warps of a program.
    """
    width = x.shape[-1]
    _norm_linear_kernel[(triton.cdiv(out.shape[-1], block_out),)](
        x,
        gains,
        weights,
        blocks,
        slot,
        out,
        OUT_FEATURES=out.shape[-1],
        EPS=eps,
        WIDTH=width,
        BLOCK_WIDTH=_power_of_2(width),
        BLOCK_OUT=block_out,
        num_warps=num_warps,
    )


@triton.jit(do_not_specialize=["slot", "cache_rows"])
def _decode_attention_kernel(
    qkv_ptr,
    query_gain_table,
    key_gain_table,
    cos_ptr,
    sin_ptr,
    keys_ptr,
    values_ptr,
    cache_rows,
    rows_ptr,
    positions_ptr,
    blocks_ptr,
    slot,
    partial_ptr,
    stats_ptr,
    SCALE: tl.constexpr,
    EPS: tl.constexpr,
    CAPACITY: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
):
    HALF: tl.constexpr = HEAD_SIZE // 2
    head = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    row = tl.program_id(1)
    block = tl.load(blocks_ptr + slot)
    position = tl.load(positions_ptr + row)
    cache_row = tl.load(rows_ptr + row)
    half = tl.arange(0, BLOCK_HALF)
    inside = half < HALF
    first = head * HEAD_SIZE + half
    second = first + HALF
    cos = tl.load(cos_ptr + position * HALF + half, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + position * HALF + half, mask=inside, other=0.0).to(tl.float32)
    qkv_row = qkv_ptr + row * 3 * WIDTH
    query_gain = _weights_at(query_gain_table, block, qkv_ptr)
    q1, q2 = _normed_and_rotated(qkv_row, query_gain, first, second, inside, cos, sin, EPS, WIDTH, BLOCK_WIDTH)
    q1 = q1.to(tl.float32)
    q2 = q2.to(tl.float32)

    base = (block.to(tl.int64) * cache_rows + cache_row) * (CAPACITY * WIDTH) + head * (CAPACITY * HEAD_SIZE)
    share = tl.cdiv(position, SPLITS)
    end = tl.minimum((split + 1) * share, position)
    top = -float("inf")
    total = 0.0
    sum1 = tl.zeros((BLOCK_HALF,), tl.float32)
    sum2 = tl.zeros((BLOCK_HALF,), tl.float32)
    start = split * share
    while start < end:
        at = start + tl.arange(0, BLOCK_POSITIONS)
        here = (at < end)[:, None] & inside[None, :]
        offsets = base + at[:, None] * HEAD_SIZE + half[None, :]
        k1 = tl.load(keys_ptr + offsets, mask=here, other=0.0).to(tl.float32)
        k2 = tl.load(keys_ptr + offsets + HALF, mask=here, other=0.0).to(tl.float32)
        v1 = tl.load(values_ptr + offsets, mask=here, other=0.0).to(tl.float32)
        v2 = tl.load(values_ptr + offsets + HALF, mask=here, other=0.0).to(tl.float32)
        scores = tl.sum(k1 * q1[None, :] + k2 * q2[None, :], axis=1) * SCALE
        scores = tl.where(at < end, scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=0))
        faded = tl.exp(top - new_top)
        weights = tl.exp(scores - new_top)
        total = total * faded + tl.sum(weights, axis=0)
        sum1 = sum1 * faded + tl.sum(weights[:, None] * v1, axis=0)
        sum2 = sum2 * faded + tl.sum(weights[:, None] * v2, axis=0)
        top = new_top
        start += BLOCK_POSITIONS
    if split == SPLITS - 1:
        # The new token is not in the cache yet: this program takes it from the projections, and writes it there.
        key_gain = _weights_at(key_gain_table, block, qkv_ptr)
        k1, k2 = _normed_and_rotated(
            qkv_row + WIDTH, key_gain, first, second, inside, cos, sin, EPS, WIDTH, BLOCK_WIDTH
        )
        v1 = tl.load(qkv_row + 2 * WIDTH + first, mask=inside, other=0.0)
        v2 = tl.load(qkv_row + 2 * WIDTH + second, mask=inside, other=0.0)
        here = base + position * HEAD_SIZE + half
        tl.store(keys_ptr + here, k1, mask=inside)
        tl.store(keys_ptr + here + HALF, k2, mask=inside)
        tl.store(values_ptr + here, v1, mask=inside)
        tl.store(values_ptr + here + HALF, v2, mask=inside)
        score = tl.sum(k1.to(tl.float32) * q1 + k2.to(tl.float32) * q2, axis=0) * SCALE
        new_top = tl.maximum(top, score)
        faded = tl.exp(top - new_top)
        weight = tl.exp(score - new_top)
        total = total * faded + weight
        sum1 = sum1 * faded + weight * v1.to(tl.float32)
        sum2 = sum2 * faded + weight * v2.to(tl.float32)
        top = new_top
    part = (row * (WIDTH // HEAD_SIZE) + head) * SPLITS + split
    tl.store(partial_ptr + part * HEAD_SIZE + half, sum1, mask=inside)
    tl.store(partial_ptr + part * HEAD_SIZE + HALF + half, sum2, mask=inside)
    tl.store(stats_ptr + 2 * part, top)
    tl.store(stats_ptr + 2 * part + 1, total)


def decode_attention(
    qkv: torch.Tensor,
    query_gains: torch.Tensor,
    key_gains: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    blocks: torch.Tensor,
    slot: int,
    partial: torch.Tensor,
    stats: torch.Tensor,
    eps: float,
    block_positions: int = 128,
    num_warps: int = 4,
) -> None:
    """
    Attention of new tokens, one a row, to the tokens before them: QK-norm over the whole width, rotary embedding, the new
    key and value into the cache, and softmax(q·k)·v in parts of the positions, which [`merge_splits`] or
    [`attention_output`] put together.

    Args:
        qkv (`torch.Tensor` of shape `(rows, 3 · width)`):
            Projections of the new tokens.
        query_gains, key_gains (`torch.LongTensor`):
            Tables of addresses of the weights of the QK-norms.
        rotary (`tuple[torch.Tensor, torch.Tensor]`):
            Cosines and sines of each position, `(capacity, head size / 2)` each.
        keys, values (`torch.Tensor` of shape `(blocks, cache rows, heads, capacity, head size)`):
            The cache.
        rows (`torch.IntTensor` of shape `(rows,)`):
            Row of the cache that each token belongs to.
        positions (`torch.IntTensor` of shape `(rows,)`):
            Position of each token: how many are before it.
        blocks (`torch.IntTensor`), slot (`int`):
            As in [`norm_linear`].
        partial (`torch.FloatTensor` of shape `(rows, heads, splits, head size)`):
            Where the weighted sums of values go.
        stats (`torch.FloatTensor` of shape `(rows, heads, splits, 2)`):
            Where the largest score and the sum of exponentials of each part go.
        eps (`float`):
            The norms' epsilon.
        block_positions (`int`, *optional*, defaults to 128):
            Positions that a program reads at once.
        num_warps (`int`, *optional*, defaults to 4):
            Warps of a program.
    """
    num_rows, heads, splits, head_size = partial.shape
    _decode_attention_kernel[(heads * splits, num_rows)](
        qkv,
        query_gains,
        key_gains,
        *rotary,
        keys,
        values,
        keys.shape[1],
        rows,
        positions,
        blocks,
        slot,
        partial,
        stats,
        SCALE=head_size**-0.5,
        EPS=eps,
        CAPACITY=keys.shape[3],
        WIDTH=heads * head_size,
        BLOCK_WIDTH=_power_of_2(heads * head_size),
        HEAD_SIZE=head_size,
        BLOCK_HALF=_power_of_2(head_size // 2),
        SPLITS=splits,
        BLOCK_POSITIONS=block_positions,
        num_warps=num_warps,
    )


@triton.jit
def _merged_splits(
    partial_ptr,
    stats_ptr,
    row,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """The attention's output of one row: `(BLOCK_WIDTH,)` in float32."""
    columns = tl.arange(0, BLOCK_WIDTH)
    inside = columns < WIDTH
    part = (row * (WIDTH // HEAD_SIZE) + columns // HEAD_SIZE) * SPLITS
    top = tl.full((BLOCK_WIDTH,), -float("inf"), tl.float32)
    for split in tl.static_range(SPLITS):
        top = tl.maximum(top, tl.load(stats_ptr + 2 * (part + split), mask=inside, other=0.0))
    total = tl.zeros((BLOCK_WIDTH,), tl.float32)
    weighted = tl.zeros((BLOCK_WIDTH,), tl.float32)
    for split in tl.static_range(SPLITS):
        share = tl.exp(tl.load(stats_ptr + 2 * (part + split), mask=inside, other=0.0) - top)
        total += share * tl.load(stats_ptr + 2 * (part + split) + 1, mask=inside, other=1.0)
        values = tl.load(partial_ptr + (part + split) * HEAD_SIZE + columns % HEAD_SIZE, mask=inside, other=0.0)
        weighted += share * values
    return weighted / total


@triton.jit(do_not_specialize=["slot"])
def _attention_output_kernel(
    partial_ptr,
    stats_ptr,
    x_ptr,
    weight_table,
    blocks_ptr,
    slot,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    dtype = x_ptr.dtype.element_ty
    weight_ptr = _weights_at(weight_table, tl.load(blocks_ptr + slot), x_ptr)
    out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    columns = tl.arange(0, BLOCK_WIDTH)
    inside = (out[:, None] < WIDTH) & (columns[None, :] < WIDTH)
    weight = tl.load(weight_ptr + out[:, None] * WIDTH + columns[None, :], mask=inside, other=0.0)
    attended = _merged_splits(partial_ptr, stats_ptr, 0, WIDTH, BLOCK_WIDTH, HEAD_SIZE, SPLITS)
    attended = attended.to(dtype).to(tl.float32)
    result = tl.sum(weight.to(tl.float32) * attended[None, :], axis=1).to(dtype).to(tl.float32)
    residual = tl.load(x_ptr + out, mask=out < WIDTH, other=0.0).to(tl.float32)
    tl.store(x_ptr + out, (residual + result).to(dtype), mask=out < WIDTH)


def attention_output(
    partial: torch.Tensor,
    stats: torch.Tensor,
    x: torch.Tensor,
    weights: torch.Tensor,
    blocks: torch.Tensor,
    slot: int,
    block_out: int = 16,
    num_warps: int = 8,
) -> None:
    """
    Puts the parts of one token's attention together, and adds their projection to its hidden state, in place.

    Args:
        partial, stats (`torch.FloatTensor`):
            What [`decode_attention`] wrote for one row.
        x (`torch.Tensor` of shape `(width,)`):
            The hidden state.
        weights (`torch.LongTensor`):
            Table of addresses of the output projections `(width, width)`.
        blocks (`torch.IntTensor`), slot (`int`):
            As in [`norm_linear`].
        block_out (`int`, *optional*, defaults to 16):
            Rows of the weight that a program reads.
        num_warps (`int`, *optional*, defaults to 8):
            Warps of a program.
    """
    width = x.shape[-1]
    _attention_output_kernel[(triton.cdiv(width, block_out),)](
        partial,
        stats,
        x,
        weights,
        blocks,
        slot,
        WIDTH=width,
        BLOCK_WIDTH=_power_of_2(width),
        HEAD_SIZE=partial.shape[3],
        SPLITS=partial.shape[2],
        BLOCK_OUT=block_out,
        num_warps=num_warps,
    )


@triton.jit(do_not_specialize=["slot"])
def _gate_up_kernel(
    x_ptr,
    gain_table,
    logits_ptr,
    top_k_ptr,
    weight_table,
    blocks_ptr,
    slot,
    activated_ptr,
    EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    place = tl.program_id(1)
    if place < tl.load(top_k_ptr):
        dtype = x_ptr.dtype.element_ty
        block = tl.load(blocks_ptr + slot)
        weight_ptr = _weights_at(weight_table, block, x_ptr)
        gain_ptr = _weights_at(gain_table, block, x_ptr)
        ranks, _ = _expert_ranks(logits_ptr, NUM_EXPERTS, BLOCK_EXPERTS)
        expert = tl.sum(tl.where(ranks == place, tl.arange(0, BLOCK_EXPERTS), 0), axis=0)
        weight_ptr += expert.to(tl.int64) * (2 * INNER * WIDTH)
        out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        columns = tl.arange(0, BLOCK_WIDTH)
        inside = (out[:, None] < INNER) & (columns[None, :] < WIDTH)
        offsets = out[:, None] * WIDTH + columns[None, :]
        gate_weight = tl.load(weight_ptr + offsets, mask=inside, other=0.0)
        up_weight = tl.load(weight_ptr + INNER * WIDTH + offsets, mask=inside, other=0.0)
        normed = _rms_normed(x_ptr, gain_ptr, EPS, WIDTH, BLOCK_WIDTH)
        gate = tl.sum(gate_weight.to(tl.float32) * normed[None, :], axis=1).to(dtype).to(tl.float32)
        up = tl.sum(up_weight.to(tl.float32) * normed[None, :], axis=1).to(dtype).to(tl.float32)
        gate = (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32)
        tl.store(activated_ptr + place * INNER + out, (gate * up).to(dtype), mask=out < INNER)


def gate_up(
    x: torch.Tensor,
    gains: torch.Tensor,
    logits: torch.Tensor,
    top_k: torch.Tensor,
    weights: torch.Tensor,
    blocks: torch.Tensor,
    slot: int,
    activated: torch.Tensor,
    eps: float,
    block_out: int = 4,
    num_warps: int = 4,
) -> None:
    """
    A token through a block's norm and the gate and up projections of its experts, which are read in place.

    Args:
        x (`torch.Tensor` of shape `(width,)`):
            The token's hidden state.
        gains, weights (`torch.LongTensor`):
            Tables of addresses: of the norm's weight, and of the experts' `gate_up_proj` `(experts, 2 · inner, width)`.
        logits (`torch.Tensor` of shape `(experts,)`):
            Router logits.
        top_k (`torch.IntTensor` of shape `(1,)`):
            How many experts work.
        blocks (`torch.IntTensor`), slot (`int`):
            As in [`norm_linear`].
        activated (`torch.Tensor` of shape `(most experts, inner)`):
            Where silu(gate) · up of each chosen expert goes, the one with the highest logit first.
        eps (`float`):
            The norm's epsilon.
        block_out (`int`, *optional*, defaults to 4):
            Rows of each weight that a program reads.
        num_warps (`int`, *optional*, defaults to 4):
            Warps of a program.
    """
    width, (most, inner), num_experts = x.shape[-1], activated.shape, logits.shape[-1]
    _gate_up_kernel[(triton.cdiv(inner, block_out), most)](
        x,
        gains,
        logits,
        top_k,
        weights,
        blocks,
        slot,
        activated,
        EPS=eps,
        WIDTH=width,
        BLOCK_WIDTH=_power_of_2(width),
        INNER=inner,
        NUM_EXPERTS=num_experts,
        BLOCK_EXPERTS=_power_of_2(num_experts),
        BLOCK_OUT=block_out,
        num_warps=num_warps,
    )


@triton.jit(do_not_specialize=["slot"])
def _down_kernel(
    activated_ptr,
    logits_ptr,
    top_k_ptr,
    weight_table,
    blocks_ptr,
    slot,
    x_ptr,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    MOST: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    dtype = x_ptr.dtype.element_ty
    top_k = tl.load(top_k_ptr)
    weight_ptr = _weights_at(weight_table, tl.load(blocks_ptr + slot), x_ptr)
    ranks, shares = _expert_ranks(logits_ptr, NUM_EXPERTS, BLOCK_EXPERTS)
    out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    columns = tl.arange(0, BLOCK_INNER)
    inside = (out[:, None] < WIDTH) & (columns[None, :] < INNER)
    offsets = out[:, None] * INNER + columns[None, :]
    total = tl.zeros((BLOCK_OUT,), tl.float32)
    for place in tl.static_range(MOST):
        expert = tl.sum(tl.where(ranks == place, tl.arange(0, BLOCK_EXPERTS), 0), axis=0)
        share = tl.sum(tl.where(ranks == place, shares, 0.0), axis=0).to(dtype).to(tl.float32)
        works = place < top_k  # where not, nothing is read
        weight = tl.load(weight_ptr + expert.to(tl.int64) * (WIDTH * INNER) + offsets, mask=inside & works, other=0.0)
        activated = tl.load(activated_ptr + place * INNER + columns, mask=(columns < INNER) & works, other=0.0)
        result = tl.sum(weight.to(tl.float32) * activated.to(tl.float32)[None, :], axis=1).to(dtype).to(tl.float32)
        total += (result * share).to(dtype).to(tl.float32)
    residual = tl.load(x_ptr + out, mask=out < WIDTH, other=0.0).to(tl.float32)
    tl.store(x_ptr + out, (residual + total.to(dtype).to(tl.float32)).to(dtype), mask=out < WIDTH)


def down(
    activated: torch.Tensor,
    logits: torch.Tensor,
    top_k: torch.Tensor,
    weights: torch.Tensor,
    blocks: torch.Tensor,
    slot: int,
    x: torch.Tensor,
    block_out: int = 4,
    num_warps: int = 8,
) -> None:
    """
    The down projections of a token's experts, read in place; their weighted sum is added to its hidden state, in place.

    Args:
        activated, logits, top_k:
            As in [`gate_up`].
        weights (`torch.LongTensor`):
            Table of addresses of the experts' `down_proj` `(experts, width, inner)`.
        blocks (`torch.IntTensor`), slot (`int`):
            As in [`norm_linear`].
        x (`torch.Tensor` of shape `(width,)`):
            The hidden state.
        block_out (`int`, *optional*, defaults to 4):
            Rows of each expert's weight that a program reads.
        num_warps (`int`, *optional*, defaults to 8):
            Warps of a program.
    """
    width, (most, inner), num_experts = x.shape[-1], activated.shape, logits.shape[-1]
    _down_kernel[(triton.cdiv(width, block_out),)](
        activated,
        logits,
        top_k,
        weights,
        blocks,
        slot,
        x,
        WIDTH=width,
        INNER=inner,
        BLOCK_INNER=_power_of_2(inner),
        MOST=most,
        NUM_EXPERTS=num_experts,
        BLOCK_EXPERTS=_power_of_2(num_experts),
        BLOCK_OUT=block_out,
        num_warps=num_warps,
    )


@triton.jit
def _next_token_kernel(
    logits_ptr,
    embedding_ptr,
    token_ptr,
    position_ptr,
    x_ptr,
    VOCABULARY: tl.constexpr,
    BLOCK_VOCABULARY: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    entries = tl.arange(0, BLOCK_VOCABULARY)
    best = tl.full((BLOCK_VOCABULARY,), -float("inf"), tl.float32)
    found = tl.zeros((BLOCK_VOCABULARY,), tl.int32)
    for start in range(0, VOCABULARY, BLOCK_VOCABULARY):
        here = start + entries
        logits = tl.load(logits_ptr + here, mask=here < VOCABULARY, other=-float("inf")).to(tl.float32)
        found = tl.where(logits > best, here, found)
        best = tl.maximum(best, logits)
    # The first of the best, as `torch.argmax`.
    token = tl.min(tl.where(best == tl.max(best, axis=0), found, VOCABULARY), axis=0)
    tl.store(token_ptr, token.to(tl.int64))
    tl.store(position_ptr, tl.load(position_ptr) + 1)
    columns = tl.arange(0, BLOCK_WIDTH)
    row = tl.load(embedding_ptr + token.to(tl.int64) * WIDTH + columns, mask=columns < WIDTH, other=0.0)
    tl.store(x_ptr + columns, row, mask=columns < WIDTH)


def next_token(
    logits: torch.Tensor,
    embedding: torch.Tensor,
    token: torch.Tensor,
    position: torch.Tensor,
    x: torch.Tensor,
) -> None:
    """
    Chooses the likeliest token, embeds it, and moves on by one position.

    Args:
        logits (`torch.Tensor` of shape `(vocabulary,)`):
            Scores.
        embedding (`torch.Tensor` of shape `(vocabulary, width)`):
            Embedding table.
        token (`torch.LongTensor` of shape `(1,)`):
            Where the token goes.
        position (`torch.IntTensor` of shape `(1,)`):
            Raised by one.
        x (`torch.Tensor` of shape `(width,)`):
            Where the token's embedding goes.
    """
    _next_token_kernel[(1,)](
        logits,
        embedding,
        token,
        position,
        x,
        VOCABULARY=logits.shape[-1],
        BLOCK_VOCABULARY=min(8192, _power_of_2(logits.shape[-1])),
        WIDTH=x.shape[-1],
        BLOCK_WIDTH=_power_of_2(x.shape[-1]),
        num_warps=16,
    )


# --- rows: many tokens --------------------------------------------------------------------------------------------


@triton.jit
def _merge_splits_kernel(
    partial_ptr,
    stats_ptr,
    out_ptr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK_WIDTH)
    attended = _merged_splits(partial_ptr, stats_ptr, row, WIDTH, BLOCK_WIDTH, HEAD_SIZE, SPLITS)
    tl.store(out_ptr + row * WIDTH + columns, attended.to(out_ptr.dtype.element_ty), mask=columns < WIDTH)


def merge_splits(partial: torch.Tensor, stats: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """
    Puts together what [`decode_attention`] wrote: the attention's output of each row, `(rows, width)` in `dtype`.
    """
    num_rows, heads, splits, head_size = partial.shape
    width = heads * head_size
    out = torch.empty((num_rows, width), dtype=dtype, device=partial.device)
    _merge_splits_kernel[(num_rows,)](
        partial, stats, out, WIDTH=width, BLOCK_WIDTH=_power_of_2(width), HEAD_SIZE=head_size, SPLITS=splits
    )
    return out


@triton.jit
def _rms_norm_kernel(x_ptr, gain_ptr, out_ptr, EPS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_WIDTH)
    normed = _rms_normed(x_ptr + row * WIDTH, gain_ptr, EPS, WIDTH, BLOCK_WIDTH)
    tl.store(out_ptr + row * WIDTH + columns, normed.to(out_ptr.dtype.element_ty), mask=columns < WIDTH)


def rms_norm(x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm of each row of `x` `(rows, width)`, weighted by `gain` `(width,)`."""
    out = torch.empty_like(x)
    if len(x):
        _rms_norm_kernel[(len(x),)](
            x, gain, out, EPS=eps, WIDTH=x.shape[1], BLOCK_WIDTH=_power_of_2(x.shape[1]), num_warps=4
        )
    return out


@triton.jit
def _add_layer_norm_kernel(
    x_ptr,
    change_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_WIDTH)
    inside = columns < WIDTH
    dtype = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(change_ptr + row * WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
    x = x.to(dtype)
    tl.store(x_ptr + row * WIDTH + columns, x, mask=inside)
    x = x.to(tl.float32)
    centred = tl.where(inside, x - tl.sum(x) / WIDTH, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred) / WIDTH + EPS)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * WIDTH + columns, (normed * weight + bias).to(dtype), mask=inside)


def add_layer_norm(
    x: torch.Tensor, change: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """Adds `change` to `x` `(rows, width)` in place, and returns the layer norm of the sum."""
    out = torch.empty_like(x)
    _add_layer_norm_kernel[(len(x),)](
        x, change, weight, bias, out, EPS=eps, WIDTH=x.shape[1], BLOCK_WIDTH=_power_of_2(x.shape[1]), num_warps=4
    )
    return out


@triton.jit
def _quick_gelu_kernel(x_ptr, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < count, other=0.0)
    dtype = x.dtype
    slope = (x.to(tl.float32) * 1.702).to(dtype).to(tl.float32)
    gate = tl.sigmoid(slope).to(dtype).to(tl.float32)
    tl.store(x_ptr + at, (x.to(tl.float32) * gate).to(dtype), mask=at < count)


def quick_gelu_(x: torch.Tensor) -> torch.Tensor:
    """x · sigmoid(1.702 x), in place."""
    _quick_gelu_kernel[(triton.cdiv(x.numel(), 4096),)](x, x.numel(), BLOCK=4096, num_warps=8)
    return x


@triton.jit
def _rotate_and_store_kernel(
    qkv_ptr,
    query_gain_ptr,
    key_gain_ptr,
    cos_ptr,
    sin_ptr,
    rows_ptr,
    positions_ptr,
    queries_ptr,
    keys_ptr,
    values_ptr,
    EPS: tl.constexpr,
    CAPACITY: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    HALF: tl.constexpr = HEAD_SIZE // 2
    position = tl.load(positions_ptr + token)
    columns = tl.arange(0, BLOCK_WIDTH)
    inside = columns < WIDTH
    within = columns % HEAD_SIZE
    head = columns // HEAD_SIZE
    # A column's partner in the rotation, which the first half takes with a minus.
    partner = tl.where(within < HALF, columns + HALF, columns - HALF)
    sign = tl.where(within < HALF, -1.0, 1.0)
    cos = tl.load(cos_ptr + position * HALF + within % HALF, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + position * HALF + within % HALF, mask=inside, other=0.0).to(tl.float32)
    qkv_row = qkv_ptr + token * 3 * WIDTH
    cached = tl.load(rows_ptr + token).to(tl.int64) * (CAPACITY * WIDTH)
    cached += (head * CAPACITY + position) * HEAD_SIZE + within
    for part in tl.static_range(2):
        gain_ptr = query_gain_ptr if part == 0 else key_gain_ptr
        x = tl.load(qkv_row + part * WIDTH + columns, mask=inside, other=0.0)
        dtype = x.dtype
        values = x.to(tl.float32)
        scale = tl.rsqrt(tl.sum(values * values) / WIDTH + EPS)
        gain = tl.load(gain_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        other_gain = tl.load(gain_ptr + partner, mask=inside, other=0.0).to(tl.float32)
        other = tl.load(qkv_row + part * WIDTH + partner, mask=inside, other=0.0).to(tl.float32)
        normed = (gain * (values * scale).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
        other = (other_gain * (other * scale).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
        rotated = (normed * cos).to(dtype).to(tl.float32) + (sign * other * sin).to(dtype).to(tl.float32)
        if part == 0:
            tl.store(queries_ptr + token * WIDTH + columns, rotated.to(dtype), mask=inside)
        else:
            tl.store(keys_ptr + cached, rotated.to(dtype), mask=inside)
    value = tl.load(qkv_row + 2 * WIDTH + columns, mask=inside, other=0.0)
    tl.store(values_ptr + cached, value, mask=inside)


def rotate_and_store(
    qkv: torch.Tensor,
    query_gain: torch.Tensor,
    key_gain: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    rows: torch.Tensor,
    positions: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """
    QK-norm over the whole width and rotary embedding of tokens, their keys and values into the cache.

    Args:
        qkv (`torch.Tensor` of shape `(tokens, 3 · width)`):
            Projections.
        query_gain, key_gain (`torch.Tensor` of shape `(width,)`):
            Weights of the norms.
        rotary, rows, positions:
            As in [`decode_attention`], one row and position a token.
        keys, values (`torch.Tensor` of shape `(cache rows, heads, capacity, head size)`):
            The cache of one block.
        eps (`float`):
            The norms' epsilon.

    Returns:
        `torch.Tensor` of shape `(tokens, width)`: the queries.
    """
    heads, capacity, head_size = keys.shape[1:]
    width = heads * head_size
    queries = torch.empty((len(qkv), width), dtype=qkv.dtype, device=qkv.device)
    _rotate_and_store_kernel[(len(qkv),)](
        qkv,
        query_gain,
        key_gain,
        *rotary,
        rows,
        positions,
        queries,
        keys,
        values,
        EPS=eps,
        CAPACITY=capacity,
        WIDTH=width,
        BLOCK_WIDTH=_power_of_2(width),
        HEAD_SIZE=head_size,
        num_warps=8,
    )
    return queries


@triton.jit(do_not_specialize=["num_tokens"])
def _route_kernel(
    logits_ptr,
    top_k_ptr,
    num_tokens,
    counts_ptr,
    pairs_ptr,
    shares_ptr,
    MOST: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    expert = tl.arange(0, BLOCK_EXPERTS)
    here = token < num_tokens
    inside = here[:, None] & (expert < NUM_EXPERTS)[None, :]
    logits = tl.load(logits_ptr + token[:, None] * NUM_EXPERTS + expert[None, :], mask=inside, other=-float("inf"))
    dtype = logits.dtype
    left = tl.where(here[:, None], logits.to(tl.float32), 0.0)
    top = tl.max(left, axis=1)
    total = tl.sum(tl.exp(left - top[:, None]), axis=1)
    top_k = tl.load(top_k_ptr + token, mask=here, other=0)
    for place in tl.static_range(MOST):
        best = tl.max(left, axis=1)
        chosen = tl.min(tl.where(left == best[:, None], expert[None, :], BLOCK_EXPERTS), axis=1)
        left = tl.where(expert[None, :] == chosen[:, None], -float("inf"), left)
        works = here & (place < top_k)
        pair = token * MOST + place
        rank = tl.atomic_add(counts_ptr + chosen, 1, mask=works, sem="relaxed")
        tl.store(pairs_ptr + chosen * num_tokens + rank, pair, mask=works)
        tl.store(shares_ptr + pair, (tl.exp(best - top) / total).to(dtype), mask=works)


def route(logits: torch.Tensor, top_k: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Chooses the experts of tokens, and lists the tokens of each expert.

    Args:
        logits (`torch.Tensor` of shape `(tokens, experts)`):
            Router logits.
        top_k (`torch.IntTensor` of shape `(tokens,)`):
            Experts of each token; 0 for a token that is padding.
        most (`int`):
            The largest number in `top_k`.

    Returns:
        `tuple`:
        - `counts` (`torch.IntTensor` of shape `(experts,)`): pairs of each expert;
        - `pairs` (`torch.IntTensor` of shape `(experts, tokens)`): these pairs, each as `token · most + place`, in any
          order; behind the first `counts` of a row nothing is written;
        - `shares` (`torch.Tensor` of shape `(tokens, most)`): softmax of each token's chosen experts; behind the first
          `top_k` of a row nothing is written.
    """
    num_tokens, num_experts = logits.shape
    counts = torch.zeros(num_experts, dtype=torch.int32, device=logits.device)
    pairs = torch.empty((num_experts, num_tokens), dtype=torch.int32, device=logits.device)
    shares = torch.empty((num_tokens, most), dtype=logits.dtype, device=logits.device)
    _route_kernel[(triton.cdiv(num_tokens, 16),)](
        logits,
        top_k,
        num_tokens,
        counts,
        pairs,
        shares,
        MOST=most,
        NUM_EXPERTS=num_experts,
        BLOCK_EXPERTS=_power_of_2(num_experts),
        BLOCK_TOKENS=16,
        num_warps=4,
    )
    return counts, pairs, shares


@triton.jit
def _tile_of_expert(
    counts_ptr, tile, NUM_EXPERTS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr, BLOCK_ROWS: tl.constexpr
):
    """Which expert a tile belongs to (`NUM_EXPERTS` or more: none), the tile's first row in its list, and its count."""
    experts = tl.arange(0, BLOCK_EXPERTS)
    counts = tl.load(counts_ptr + experts, mask=experts < NUM_EXPERTS, other=0)
    tiles = (counts + BLOCK_ROWS - 1) // BLOCK_ROWS
    ends = tl.cumsum(tiles, axis=0)
    expert = tl.where(tile < tl.sum(tiles, axis=0), tl.sum((ends <= tile).to(tl.int32), axis=0), NUM_EXPERTS)
    first = tl.sum(tl.where(experts == expert, ends - tiles, 0), axis=0)
    count = tl.sum(tl.where(experts == expert, counts, 0), axis=0)
    return expert, (tile - first) * BLOCK_ROWS, count


@triton.jit(do_not_specialize=["num_tokens"])
def _experts_gate_up_kernel(
    x_ptr,
    weight_ptr,
    counts_ptr,
    pairs_ptr,
    num_tokens,
    activated_ptr,
    MOST: tl.constexpr,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    TILES_OUT: tl.constexpr = (INNER + BLOCK_OUT - 1) // BLOCK_OUT
    expert, start, count = _tile_of_expert(
        counts_ptr, tl.program_id(0) // TILES_OUT, NUM_EXPERTS, BLOCK_EXPERTS, BLOCK_ROWS
    )
    if expert < NUM_EXPERTS:
        dtype = x_ptr.dtype.element_ty
        rows = start + tl.arange(0, BLOCK_ROWS)
        # Rows behind the last work on its token again and are not stored: no mask in the loop.
        pair = tl.load(pairs_ptr + expert * num_tokens + tl.minimum(rows, count - 1))
        out = tl.program_id(0) % TILES_OUT * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        k = tl.arange(0, BLOCK_K)
        x_ptrs = x_ptr + (pair // MOST).to(tl.int64)[:, None] * WIDTH + k[None, :]
        weight_ptr += expert.to(tl.int64) * (2 * INNER * WIDTH)
        weight_ptrs = weight_ptr + (out % INNER)[None, :] * WIDTH + k[:, None]
        gate = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
        up = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
        for start_k in range(0, WIDTH, BLOCK_K):
            if WIDTH % BLOCK_K == 0:
                x = tl.load(x_ptrs)
                gate_weight = tl.load(weight_ptrs)
                up_weight = tl.load(weight_ptrs + INNER * WIDTH)
            else:
                inside = start_k + k < WIDTH
                x = tl.load(x_ptrs, mask=inside[None, :], other=0.0)
                gate_weight = tl.load(weight_ptrs, mask=inside[:, None], other=0.0)
                up_weight = tl.load(weight_ptrs + INNER * WIDTH, mask=inside[:, None], other=0.0)
            gate = tl.dot(x, gate_weight, gate, input_precision="ieee")
            up = tl.dot(x, up_weight, up, input_precision="ieee")
            x_ptrs += BLOCK_K
            weight_ptrs += BLOCK_K
        gate = gate.to(dtype).to(tl.float32)
        gate = (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32)
        activated = (gate * up.to(dtype).to(tl.float32)).to(dtype)
        inside = (rows < count)[:, None] & (out < INNER)[None, :]
        tl.store(activated_ptr + pair.to(tl.int64)[:, None] * INNER + out[None, :], activated, mask=inside)


@triton.jit(do_not_specialize=["num_tokens"])
def _experts_down_kernel(
    activated_ptr,
    weight_ptr,
    counts_ptr,
    pairs_ptr,
    shares_ptr,
    num_tokens,
    out_ptr,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    TILES_OUT: tl.constexpr = (WIDTH + BLOCK_OUT - 1) // BLOCK_OUT
    expert, start, count = _tile_of_expert(
        counts_ptr, tl.program_id(0) // TILES_OUT, NUM_EXPERTS, BLOCK_EXPERTS, BLOCK_ROWS
    )
    if expert < NUM_EXPERTS:
        dtype = out_ptr.dtype.element_ty
        rows = start + tl.arange(0, BLOCK_ROWS)
        pair = tl.load(pairs_ptr + expert * num_tokens + tl.minimum(rows, count - 1)).to(tl.int64)
        out = tl.program_id(0) % TILES_OUT * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        k = tl.arange(0, BLOCK_K)
        activated_ptrs = activated_ptr + pair[:, None] * INNER + k[None, :]
        weight_ptr += expert.to(tl.int64) * (WIDTH * INNER)
        weight_ptrs = weight_ptr + (out % WIDTH)[None, :] * INNER + k[:, None]
        result = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
        for start_k in range(0, INNER, BLOCK_K):
            if INNER % BLOCK_K == 0:
                activated = tl.load(activated_ptrs)
                weight = tl.load(weight_ptrs)
            else:
                inside = start_k + k < INNER
                activated = tl.load(activated_ptrs, mask=inside[None, :], other=0.0)
                weight = tl.load(weight_ptrs, mask=inside[:, None], other=0.0)
            result = tl.dot(activated, weight, result, input_precision="ieee")
            activated_ptrs += BLOCK_K
            weight_ptrs += BLOCK_K
        share = tl.load(shares_ptr + pair).to(tl.float32)
        weighted = result.to(dtype).to(tl.float32) * share[:, None]
        inside = (rows < count)[:, None] & (out < WIDTH)[None, :]
        tl.store(out_ptr + pair[:, None] * WIDTH + out[None, :], weighted.to(dtype), mask=inside)


@triton.jit
def _add_experts_kernel(
    x_ptr, weighted_ptr, top_k_ptr, MOST: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_WIDTH)
    inside = columns < WIDTH
    top_k = tl.load(top_k_ptr + token)
    total = tl.zeros((BLOCK_WIDTH,), tl.float32)
    for place in tl.static_range(MOST):
        offsets = (token * MOST + place) * WIDTH + columns
        total += tl.load(weighted_ptr + offsets, mask=inside & (place < top_k), other=0.0).to(tl.float32)
    dtype = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + token * WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(x_ptr + token * WIDTH + columns, (x + total.to(dtype).to(tl.float32)).to(dtype), mask=inside)


def _tile(rows: int, out: int, k: int, num_warps: int, num_stages: int) -> dict[str, int]:
    return {"BLOCK_ROWS": rows, "BLOCK_OUT": out, "BLOCK_K": k, "num_warps": num_warps, "num_stages": num_stages}


EXPERT_TILES = {
    160: (_tile(128, 128, 64, 8, 4), _tile(128, 256, 64, 8, 4)),
    96: (_tile(64, 256, 64, 8, 3), _tile(128, 256, 64, 8, 4)),
    16: (_tile(64, 128, 64, 8, 4), _tile(64, 128, 64, 4, 3)),
    0: (_tile(16, 64, 128, 4, 4), _tile(16, 64, 128, 4, 4)),
}
"""
Tiles of the experts' two products (gate and up; down), by the fewest pairs that an expert has on average, most first: the
fastest of those tried on an H200, at the sizes of MolmoE-1B in bfloat16.
"""

FLOAT32_TILES = (_tile(16, 32, 32, 4, 2), _tile(16, 32, 32, 4, 2))
"""Tiles of the experts' products in float32, where the larger ones do not fit in a processor's memory."""


def add_experts_(
    x: torch.Tensor,
    normed: torch.Tensor,
    logits: torch.Tensor,
    top_k: torch.Tensor,
    most: int,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    tiles: tuple[dict[str, int], dict[str, int]] | None = None,
) -> torch.Tensor:
    """
    Sends each token through its experts, and adds their weighted outputs to `x`, in place.

    Args:
        x (`torch.Tensor` of shape `(tokens, width)`):
            Hidden states.
        normed (`torch.Tensor` of shape `(tokens, width)`):
            What the experts see.
        logits, top_k, most:
            As in [`route`].
        gate_up_proj (`torch.Tensor` of shape `(experts, 2 · inner, width)`), down_proj (`torch.Tensor` of shape \
`(experts, width, inner)`):
            The experts.
        tiles (`tuple[dict, dict]`, *optional*):
            Tile sizes of the two products. By default those of `EXPERT_TILES` or `FLOAT32_TILES`.

    Returns:
        `torch.Tensor`: `x`.
    """
    num_tokens, width = x.shape
    num_experts, inner = down_proj.shape[0], down_proj.shape[2]
    counts, pairs, shares = route(logits, top_k, most)
    activated = torch.empty((num_tokens * most, inner), dtype=x.dtype, device=x.device)
    weighted = torch.empty((num_tokens * most, width), dtype=x.dtype, device=x.device)
    sizes = {
        "WIDTH": width,
        "INNER": inner,
        "NUM_EXPERTS": num_experts,
        "BLOCK_EXPERTS": _power_of_2(num_experts),
    }
    if tiles is None and x.dtype == torch.float32:
        tiles = FLOAT32_TILES
    elif tiles is None:
        fewest = next(fewest for fewest in EXPERT_TILES if num_tokens * most >= fewest * num_experts)
        tiles = EXPERT_TILES[fewest]
    gate_up_tiles, down_tiles = tiles

    def grid(out_features: int, tile: dict[str, int]) -> tuple[int]:
        # An upper bound, known without asking the device: every expert may have one tile that is not full.
        most_tiles = num_tokens * most // tile["BLOCK_ROWS"] + min(num_experts, num_tokens * most)
        return (most_tiles * triton.cdiv(out_features, tile["BLOCK_OUT"]),)

    _experts_gate_up_kernel[grid(inner, gate_up_tiles)](
        normed, gate_up_proj, counts, pairs, num_tokens, activated, MOST=most, **sizes, **gate_up_tiles
    )
    _experts_down_kernel[grid(width, down_tiles)](
        activated, down_proj, counts, pairs, shares, num_tokens, weighted, **sizes, **down_tiles
    )
    _add_experts_kernel[(num_tokens,)](x, weighted, top_k, MOST=most, WIDTH=width, BLOCK_WIDTH=_power_of_2(width))
    return x
