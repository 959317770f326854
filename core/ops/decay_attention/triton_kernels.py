"""Linear attention with decay as Triton kernels; README.md has the mathematics.

A chunk is described by a row of `table`: its batch row, its first token and how many tokens it has; `step` is
1, or -1 where sequences are read in reverse. GATE is "none", "scalar" (a decay a head and step) or "vector"
(one a key channel, too). What is [C, ...] has a row for each step of a chunk.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tile(x, row, token, head, x_batch, x_token, x_head, col, live, width):
    """Load `[C, columns]` of x `[B, L, heads, width]`, zeros outside."""
    at = x + row * x_batch + head * x_head + token[:, None] * x_token + col[None, :]
    return tl.load(at, live[:, None] & (col < width)[None, :], other=0.0)


@triton.jit
def _state(states, chunk, head, heads, K, V, k, v):
    """Pointers to `[k, v]` of the state `[N, H, K, V]`, and where they are inside."""
    at = states + ((chunk * heads + head) * K + k[:, None]) * V + v[None, :]
    return at, (k < K)[:, None] & (v < V)[None, :]


@triton.jit
def _clamped(g):
    """Log-decays whose exponential is zero all the same, and whose sums stay finite; NaN stays NaN."""
    return tl.where(g < -10000.0, -10000.0, g)


@triton.jit
def _gates(
    decay, row, token, head, g_batch, g_token, g_head, step, col, i, count, K,
    GATE: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """What is left at each step of the state before the chunk (AHEAD), or of each step after the chunk."""
    # A step's own product is left whole: what fades it begins one step later.
    inside = i < count if AHEAD else i + 1 < count
    token = token if AHEAD else token + step
    if GATE == "vector":
        g = _tile(decay, row, token, head, g_batch, g_token, g_head, col, inside, K)
    else:
        at = decay + row * g_batch + head * g_head
        g = tl.load(at + token * g_token, inside, other=0.0)[:, None]
    return tl.exp(tl.cumsum(_clamped(g.to(tl.float32)), 0, reverse=not AHEAD))


@triton.jit
def _whole(decay, row, token, head, g_batch, g_token, g_head, col, live, K, GATE: tl.constexpr):
    """What is left after the chunk of the state before it, `[columns, 1]`."""
    if GATE == "vector":
        g = _tile(decay, row, token, head, g_batch, g_token, g_head, col, live, K)
    else:
        at = decay + row * g_batch + head * g_head
        g = tl.load(at + token * g_token, live, other=0.0)[:, None]
    return tl.exp(tl.sum(_clamped(g.to(tl.float32)), 0))[:, None]


@triton.jit
def _left(decay, row, token, head, g_batch, g_token, g_head, i, live, GATE: tl.constexpr):
    """What is left at step i of step j's product, `[C, C]`, zero where i comes first.

    Sums are float64, kept as two float32: the difference of two rounded sums would carry both roundings.
    """
    seen = i[:, None] >= i[None, :]
    if GATE == "scalar":
        g = tl.load(decay + row * g_batch + head * g_head + token * g_token, live, other=0.0).to(tl.float32)
        total = tl.cumsum(_clamped(g).to(tl.float64), 0)
        high = total.to(tl.float32)
        low = (total - high.to(tl.float64)).to(tl.float32)
        exponent = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
        return tl.exp(tl.where(seen, exponent, float("-inf")))
    return tl.where(seen, 1.0, 0.0)


@triton.jit
def _exact(x, y):
    """`x @ y` for float32 x: with a half-precision y, x goes in three parts that together have its digits."""
    if y.dtype == tl.float32:
        return tl.dot(x, y, input_precision="ieee")
    high = x.to(y.dtype)
    x -= high.to(tl.float32)
    middle = x.to(y.dtype)
    low = (x - middle.to(tl.float32)).to(y.dtype)
    return tl.dot(high, y) + (tl.dot(middle, y) + tl.dot(low, y))


@triton.jit
def _fading(g, j, i):
    """What is left at each step of step j's product, a number for each channel, zero before it: `[C, K]`."""
    span = tl.cumsum(tl.where((i > j)[:, None], g, 0.0), 0)
    return tl.exp(tl.where((i >= j)[:, None], span, float("-inf")))


@triton.jit(do_not_specialize=["shared", "step"])
def states_kernel(
    x, y, decay, start, states, last, table, spans,
    x_batch, x_token, x_head, y_batch, y_token, y_head, g_batch, g_token, g_head,
    shared, K, V, scale, step,
    GATE: tl.constexpr, BACKWARD: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Carry a tile of a sequence's state along its chunks, and keep what it is before each.

    x, y are k and v; BACKWARD q and the outputs' gradient, from the last chunk to the first.
    """
    sequence, head = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(2)
    tiles = tl.cdiv(K, BLOCK_K)
    k = (tl.program_id(0) % tiles) * BLOCK_K + tl.arange(0, BLOCK_K)
    v = (tl.program_id(0) // tiles) * BLOCK_V + tl.arange(0, BLOCK_V)
    i = tl.arange(0, C)
    at, inside = _state(last, sequence, head, heads, K, V, k, v)
    state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if start is not None:
        first_at, _ = _state(start, sequence, head, heads, K, V, k, v)
        state += tl.load(first_at, inside, other=0.0).to(tl.float32)
    first = tl.load(spans + 2 * sequence)
    chunks = tl.load(spans + 2 * sequence + 1)
    for n in range(chunks):
        chunk = (first + (chunks - 1 - n if BACKWARD else n)).to(tl.int64)
        row = tl.load(table + 3 * chunk).to(tl.int64)
        token = tl.load(table + 3 * chunk + 1) + step * i.to(tl.int64)
        count = tl.load(table + 3 * chunk + 2)
        live = i < count
        kept, _ = _state(states, chunk, head, heads, K, V, k, v)
        tl.store(kept, state, inside)
        left = _tile(x, row, token, head // shared, x_batch, x_token, x_head, k, live, K)
        right = _tile(y, row, token, head, y_batch, y_token, y_head, v, live, V)
        if GATE != "none":
            faded = _gates(
                decay, row, token, head, g_batch, g_token, g_head, step, k, i, count, K, GATE, BACKWARD
            )
            state *= _whole(decay, row, token, head, g_batch, g_token, g_head, k, live, K, GATE)
            added = _exact(tl.trans(left.to(tl.float32) * faded), right)
        else:
            added = tl.dot(tl.trans(left), right, input_precision="ieee")
        state += added * scale if BACKWARD else added
    tl.store(at, state, inside)


@triton.jit(do_not_specialize=["shared", "step"])
def outputs_kernel(
    q, k, y, decay, states, out, table,
    q_batch, q_token, q_head, k_batch, k_token, k_head, y_batch, y_token, y_head, g_batch, g_token, g_head,
    o_batch, o_token, o_head, shared, K, V, scale, step,
    GATE: tl.constexpr, BACKWARD: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Outputs of a chunk, a block of value channels; y is v.

    BACKWARD: the gradient of v; y is the outputs' gradient, and states are those of the states after chunks.
    """
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    heads = tl.num_programs(1)
    v = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    i = tl.arange(0, C)
    row = tl.load(table + 3 * chunk).to(tl.int64)
    token = tl.load(table + 3 * chunk + 1) + step * i.to(tl.int64)
    count = tl.load(table + 3 * chunk + 2)
    live = i < count
    found = tl.zeros([C, BLOCK_V], tl.float32)
    scores = tl.zeros([C, C], tl.float32)
    for begin in range(0, K, BLOCK_K):
        col = begin + tl.arange(0, BLOCK_K)
        query = _tile(q, row, token, head // shared, q_batch, q_token, q_head, col, live, K)
        key = _tile(k, row, token, head // shared, k_batch, k_token, k_head, col, live, K)
        at, inside = _state(states, chunk, head, heads, K, V, col, v)
        state = tl.load(at, inside, other=0.0).to(query.dtype)
        reading = key if BACKWARD else query
        if GATE == "vector":
            g = _clamped(
                _tile(decay, row, token, head, g_batch, g_token, g_head, col, live, K).to(tl.float32)
            )
            for j in range(C):
                other = tl.sum(tl.where((i == j)[:, None], key.to(tl.float32), 0.0), 0)  # [K], key j
                column = tl.sum(query.to(tl.float32) * _fading(g, j, i) * other[None, :], 1)
                scores += tl.where((i == j)[None, :], column[:, None], 0.0)
            faded = _gates(
                decay, row, token, head, g_batch, g_token, g_head, step, col, i, count, K, GATE, not BACKWARD
            )
            reading = (reading.to(tl.float32) * faded).to(query.dtype)
        else:
            scores += tl.dot(query, tl.trans(key), input_precision="ieee")
        found += tl.dot(reading, state, input_precision="ieee")
    if GATE == "scalar":
        found *= _gates(
            decay, row, token, head, g_batch, g_token, g_head, step, i, i, count, K, GATE, not BACKWARD
        )
    if GATE != "vector":
        scores *= _left(decay, row, token, head, g_batch, g_token, g_head, i, live, GATE)
    value = _tile(y, row, token, head, y_batch, y_token, y_head, v, live, V)
    scores = (scores * scale).to(value.dtype)
    if BACKWARD:
        found += tl.dot(tl.trans(scores), value, input_precision="ieee")
    else:
        found = found * scale + tl.dot(scores, value, input_precision="ieee")
    at = out + row * o_batch + head * o_head + token[:, None] * o_token + v[None, :]
    tl.store(at, found.to(out.dtype.element_ty), live[:, None] & (v < V)[None, :])


@triton.jit(do_not_specialize=["shared", "step", "length", "tokens"])
def gradients_kernel(  # noqa: PLR0915
    grad, q, k, v, decay, states, pulls, dq, dk, ddecay, table,
    y_batch, y_token, y_head, q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    g_batch, g_token, g_head, tokens, length, shared, K, V, scale, step,
    GATE: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Gradients of q and k of a chunk, a block of key channels, and that block's share of the log-decays'.

    dq, dk `[B, L, H, K]` are contiguous, float32; ddecay `[B, L, H, K]` (vector) or `[blocks, B, L, H]`.
    """
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    heads = tl.num_programs(1)
    col = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    i = tl.arange(0, C)
    row = tl.load(table + 3 * chunk).to(tl.int64)
    token = tl.load(table + 3 * chunk + 1) + step * i.to(tl.int64)
    count = tl.load(table + 3 * chunk + 2)
    live = i < count
    pairs = tl.zeros([C, C], tl.float32)  # gradient of the scores
    read = tl.zeros([C, BLOCK_K], tl.float32)
    kept = tl.zeros([C, BLOCK_K], tl.float32)
    through = tl.zeros([BLOCK_K], tl.float32)
    for begin in range(0, V, BLOCK_V):
        channel = begin + tl.arange(0, BLOCK_V)
        pull = _tile(grad, row, token, head, y_batch, y_token, y_head, channel, live, V)
        value = _tile(v, row, token, head, v_batch, v_token, v_head, channel, live, V)
        at, inside = _state(states, chunk, head, heads, K, V, col, channel)
        state = tl.load(at, inside, other=0.0)
        at, inside = _state(pulls, chunk, head, heads, K, V, col, channel)
        after = tl.load(at, inside, other=0.0)
        pairs += tl.dot(pull, tl.trans(value), input_precision="ieee")
        read += tl.dot(pull, tl.trans(state.to(pull.dtype)), input_precision="ieee")
        kept += tl.dot(value, tl.trans(after.to(value.dtype)), input_precision="ieee")
        through += tl.sum(state * after, 1)
    query = _tile(q, row, token, head // shared, q_batch, q_token, q_head, col, live, K).to(tl.float32)
    key = _tile(k, row, token, head // shared, k_batch, k_token, k_head, col, live, K).to(tl.float32)
    query *= scale
    own = tl.sum(tl.where(i[:, None] == i[None, :], pairs, 0.0), 1)[:, None]
    pairs = tl.where(i[:, None] > i[None, :], pairs, 0.0)
    if GATE == "vector":
        g = _clamped(_tile(decay, row, token, head, g_batch, g_token, g_head, col, live, K).to(tl.float32))
        to_query = tl.zeros([C, BLOCK_K], tl.float32)
        to_key = tl.zeros([C, BLOCK_K], tl.float32)
        for j in range(C):
            weight = tl.sum(tl.where((i == j)[None, :], pairs, 0.0), 1)[:, None] * _fading(g, j, i)
            other = tl.sum(tl.where((i == j)[:, None], key, 0.0), 0)
            to_query += weight * other[None, :]
            to_key += tl.where((i == j)[:, None], tl.sum(weight * query, 0)[None, :], 0.0)
    else:
        pairs *= _left(decay, row, token, head, g_batch, g_token, g_head, i, live, GATE)
        pairs = pairs.to(grad.dtype.element_ty)
        to_query = tl.dot(pairs, key.to(pairs.dtype), input_precision="ieee")
        to_key = tl.dot(tl.trans(pairs), query.to(pairs.dtype), input_precision="ieee")
    if GATE != "none":
        read *= _gates(decay, row, token, head, g_batch, g_token, g_head, step, col, i, count, K, GATE, True)
        kept *= _gates(decay, row, token, head, g_batch, g_token, g_head, step, col, i, count, K, GATE, False)
    mask = live[:, None] & (col < K)[None, :]
    at = ((row * length + token[:, None]) * heads + head) * K + col[None, :]
    tl.store(dq + at, scale * (to_query + read + own * key), mask)
    tl.store(dk + at, to_key + kept + own * query, mask)
    if GATE == "vector":
        ends = tl.cumsum(query * (to_query + read) - key * to_key, 0, reverse=True)
        ahead = (key * kept).to(tl.float64)
        before = (tl.cumsum(ahead, 0) - ahead).to(tl.float32)
        whole = _whole(decay, row, token, head, g_batch, g_token, g_head, col, live, K, GATE)
        whole = tl.reshape(whole, [1, BLOCK_K])
        tl.store(ddecay + at, ends + before + whole * through[None, :], mask)
    if GATE == "scalar":
        ends = tl.cumsum(tl.sum(query * (to_query + read) - key * to_key, 1), 0, reverse=True)
        ahead = tl.sum(key * kept, 1)
        before = tl.sum(tl.where(i[:, None] > i[None, :], ahead[None, :], 0.0), 1)
        whole = _whole(decay, row, token, head, g_batch, g_token, g_head, col, live, K, GATE)
        share = ddecay + tl.program_id(2).to(tl.int64) * tokens * heads
        tl.store(
            share + (row * length + token) * heads + head,
            ends + before + tl.sum(whole, 1) * tl.sum(through, 0),
            live,
        )
