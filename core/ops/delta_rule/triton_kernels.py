"""The delta rule as Triton kernels, in chunks of 32 steps (README.md has the mathematics).

`prepare_kernel` inverts each chunk's system, T = (I + A)^-1, by forward substitution; `state_kernel` carries
the state from chunk to chunk, a block of value channels a program, and leaves what the steps wrote, U, and
the state before each chunk; `output_kernel` reads. Backward: `prepare_kernel` again, with U from the kept
states; `pull_output_kernel` begins dU, `pull_state_kernel` goes from the last chunk to the first and leaves
R = T^T dU; `pair_kernel` and `gradient_kernel` do the rest, each chunk on its own. With R there is no need of
the solution W: dA = -R U^T, and the state's part of the known side pulls back through R alone. No atomics.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _rows(x, row, found, head, token_stride, head_stride, col, width):
    """A chunk's rows of one head, [C, BLOCK], float32, zeros past the sequence and the width."""
    at = row.to(tl.int64)[:, None] * token_stride + head * head_stride + col[None, :]
    return tl.load(x + at, found[:, None] & (col < width)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _gates(beta, log_decay, row, found, head, heads, C: tl.constexpr):
    """Rates; decays between steps [C, C], since the chunk's beginning, until its end, and over all of it."""
    step = tl.arange(0, C)
    at = row.to(tl.int64) * heads + head
    rate = tl.load(beta + at, found, other=0.0).to(tl.float32)
    lower = step[:, None] >= step[None, :]
    if log_decay is None:
        one = tl.full([C], 1.0, tl.float32)
        decay, since, until, whole = tl.where(lower, 1.0, 0.0), one, one, 1.0
    else:
        # float64: the difference of two float32 sums would carry the rounding of both.
        gate = tl.load(log_decay + at, found, other=0.0).to(tl.float64)
        gate = tl.where(gate < -1e4, -1e4, gate)
        total = tl.cumsum(gate, 0)
        last = tl.sum(gate, 0)
        decay = tl.where(lower, tl.exp((total[:, None] - total[None, :]).to(tl.float32)), 0.0)
        since, until = tl.exp(total.to(tl.float32)), tl.exp((last - total).to(tl.float32))
        whole = tl.exp(last.to(tl.float32))
    return rate, decay, since, until, whole


@triton.jit
def prepare_kernel(
    k, v, beta, log_decay, begin, length, inverse, kept, written,
    k_token, k_head, v_token, v_head, heads, key_dim, value_dim,
    C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The inverse of a chunk's system; with the kept states also what its steps wrote."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    step = tl.arange(0, C)
    row = tl.load(begin + chunk) + step
    found = step < tl.load(length + chunk)
    col = tl.arange(0, BLOCK_K)
    keys = _rows(k, row, found, head, k_token, k_head, col, key_dim)
    rate, decay, since, _, _ = _gates(beta, log_decay, row, found, head, heads, C)
    system = tl.dot(keys, tl.trans(keys), input_precision="ieee") * decay * rate[:, None]
    coupled = tl.trans(tl.where(step[:, None] > step[None, :], system, 0.0))
    found_inverse = tl.where(step[:, None] == step[None, :], 1.0, 0.0)
    for t in range(1, C):
        known = tl.sum(tl.where(step[None, :] == t, coupled, 0.0), 1)  # A's row t, along the first axis
        solved = tl.sum(known[:, None] * found_inverse, 0)
        found_inverse -= tl.where(step[:, None] == t, solved[None, :], 0.0)
    place = chunk.to(tl.int64) * heads + head
    square = place * C * C + step[:, None] * C + step[None, :]
    tl.store(inverse + square, found_inverse)
    if kept is not None:
        for first in range(0, value_dim, BLOCK_V):
            out = first + tl.arange(0, BLOCK_V)
            values = _rows(v, row, found, head, v_token, v_head, out, value_dim)
            at = (place * key_dim + col)[:, None] * value_dim + out[None, :]
            inside = (col < key_dim)[:, None] & (out < value_dim)[None, :]
            state = tl.load(kept + at, inside, other=0.0)
            values -= since[:, None] * tl.dot(keys, state, input_precision=PRECISION)
            wrote = tl.dot(found_inverse, rate[:, None] * values, input_precision=PRECISION)
            spot = (place * C + step)[:, None] * value_dim + out[None, :]
            tl.store(written + spot, wrote, (out < value_dim)[None, :])


@triton.jit
def state_kernel(
    k, v, beta, log_decay, begin, length, chunks, inverse, initial, kept, written, final,
    k_token, k_head, v_token, v_head, heads, key_dim, value_dim,
    C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state of a block of value channels from chunk to chunk: before each, and at the end."""
    sequence, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    out = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    step, col = tl.arange(0, C), tl.arange(0, BLOCK_K)
    inside = (col < key_dim)[:, None] & (out < value_dim)[None, :]
    here = ((sequence.to(tl.int64) * heads + head) * key_dim + col)[:, None] * value_dim + out[None, :]
    state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if initial is not None:
        state += tl.load(initial + here, inside, other=0.0).to(tl.float32)
    for chunk in range(tl.load(chunks + sequence), tl.load(chunks + sequence + 1)):
        place = tl.cast(chunk, tl.int64) * heads + head
        tl.store(kept + (place * key_dim + col)[:, None] * value_dim + out[None, :], state, inside)
        row = tl.load(begin + chunk) + step
        found = step < tl.load(length + chunk)
        rate, _, since, until, whole = _gates(beta, log_decay, row, found, head, heads, C)
        keys = _rows(k, row, found, head, k_token, k_head, col, key_dim)
        values = _rows(v, row, found, head, v_token, v_head, out, value_dim)
        values -= since[:, None] * tl.dot(keys, state, input_precision=PRECISION)
        solver = tl.load(inverse + place * C * C + step[:, None] * C + step[None, :])
        wrote = tl.dot(solver, rate[:, None] * values, input_precision=PRECISION)
        spot = (place * C + step)[:, None] * value_dim + out[None, :]
        tl.store(written + spot, wrote, (out < value_dim)[None, :])
        state = whole * state + tl.dot(tl.trans(keys * until[:, None]), wrote, input_precision=PRECISION)
    tl.store(final + here, state, inside)


@triton.jit
def output_kernel(
    q, k, beta, log_decay, begin, length, kept, written, o,
    q_token, q_head, k_token, k_head, heads, key_dim, value_dim, scale,
    C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a chunk's queries read, of a block of value channels."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    out = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    step, col = tl.arange(0, C), tl.arange(0, BLOCK_K)
    row = tl.load(begin + chunk) + step
    found = step < tl.load(length + chunk)
    _, decay, since, _, _ = _gates(beta, log_decay, row, found, head, heads, C)
    queries = _rows(q, row, found, head, q_token, q_head, col, key_dim) * scale
    keys = _rows(k, row, found, head, k_token, k_head, col, key_dim)
    lower = step[:, None] >= step[None, :]
    scores = tl.where(lower, tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * decay, 0.0)
    place = chunk.to(tl.int64) * heads + head
    inside = (col < key_dim)[:, None] & (out < value_dim)[None, :]
    state = tl.load(kept + (place * key_dim + col)[:, None] * value_dim + out[None, :], inside, other=0.0)
    spot = (place * C + step)[:, None] * value_dim + out[None, :]
    wrote = tl.load(written + spot, (out < value_dim)[None, :], other=0.0)
    read = tl.dot(queries * since[:, None], state, input_precision=PRECISION)
    read += tl.dot(scores, wrote, input_precision=PRECISION)
    at = (row.to(tl.int64) * heads + head)[:, None] * value_dim + out[None, :]
    tl.store(o + at, read.to(o.dtype.element_ty), found[:, None] & (out < value_dim)[None, :])


@triton.jit
def pull_output_kernel(
    do, q, k, beta, log_decay, begin, length, pulled,
    g_token, g_head, q_token, q_head, k_token, k_head, heads, key_dim, value_dim, scale,
    C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a chunk's own queries pull from what its steps wrote, P^T dO, of a block of value channels."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    out = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    step, col = tl.arange(0, C), tl.arange(0, BLOCK_K)
    row = tl.load(begin + chunk) + step
    found = step < tl.load(length + chunk)
    queries = _rows(q, row, found, head, q_token, q_head, col, key_dim) * scale
    keys = _rows(k, row, found, head, k_token, k_head, col, key_dim)
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    _, decay, _, _, _ = _gates(beta, log_decay, row, found, head, heads, C)
    scores = tl.where(step[:, None] >= step[None, :], scores * decay, 0.0)
    douts = _rows(do, row, found, head, g_token, g_head, out, value_dim)
    pull = tl.dot(tl.trans(scores), douts, input_precision=PRECISION)
    spot = ((chunk.to(tl.int64) * heads + head) * C + step)[:, None] * value_dim + out[None, :]
    tl.store(pulled + spot, pull, (out < value_dim)[None, :])


@triton.jit
def pull_state_kernel(
    do, q, k, beta, log_decay, begin, length, chunks, inverse, dfinal, after, pulled, dinitial,
    g_token, g_head, q_token, q_head, k_token, k_head, heads, key_dim, value_dim, scale,
    C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state's gradient from the last chunk to the first, after each; pulled goes from P^T dO to R."""
    sequence, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    out = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    step, col = tl.arange(0, C), tl.arange(0, BLOCK_K)
    inside = (col < key_dim)[:, None] & (out < value_dim)[None, :]
    here = ((sequence.to(tl.int64) * heads + head) * key_dim + col)[:, None] * value_dim + out[None, :]
    grad = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if dfinal is not None:
        grad += tl.load(dfinal + here, inside, other=0.0).to(tl.float32)
    first, last = tl.load(chunks + sequence), tl.load(chunks + sequence + 1)
    for back in range(0, last - first):
        chunk = last - 1 - back
        place = tl.cast(chunk, tl.int64) * heads + head
        tl.store(after + (place * key_dim + col)[:, None] * value_dim + out[None, :], grad, inside)
        row = tl.load(begin + chunk) + step
        found = step < tl.load(length + chunk)
        rate, _, since, until, whole = _gates(beta, log_decay, row, found, head, heads, C)
        keys = _rows(k, row, found, head, k_token, k_head, col, key_dim)
        spot = (place * C + step)[:, None] * value_dim + out[None, :]
        dwrote = tl.load(pulled + spot, (out < value_dim)[None, :], other=0.0)
        dwrote += tl.dot(keys * until[:, None], grad, input_precision=PRECISION)
        turned = tl.load(inverse + place * C * C + step[None, :] * C + step[:, None])  # T^T
        pull = tl.dot(turned, dwrote, input_precision=PRECISION)
        tl.store(pulled + spot, pull, (out < value_dim)[None, :])
        grad = whole * grad
        keys = _rows(k, row, found, head, k_token, k_head, col, key_dim)  # again: not held meanwhile
        grad -= tl.dot(tl.trans(keys * (rate * since)[:, None]), pull, input_precision=PRECISION)
        queries = _rows(q, row, found, head, q_token, q_head, col, key_dim) * scale
        douts = _rows(do, row, found, head, g_token, g_head, out, value_dim)
        grad += tl.dot(tl.trans(queries * since[:, None]), douts, input_precision=PRECISION)
    tl.store(dinitial + here, grad, inside)


@triton.jit
def pair_kernel(
    do, q, k, v, beta, log_decay, begin, length, written, pulled, dv, dqueries, dkeys, dgates,
    g_token, g_head, q_token, q_head, k_token, k_head, v_token, v_head, heads, key_dim, value_dim, scale,
    C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a chunk's values, and what its pairs of steps pull from all else, float32."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    step = tl.arange(0, C)
    row = tl.load(begin + chunk) + step
    found = step < tl.load(length + chunk)
    place = chunk.to(tl.int64) * heads + head
    at = row.to(tl.int64) * heads + head
    rate = tl.load(beta + at, found, other=0.0).to(tl.float32)
    dscores = tl.zeros([C, C], tl.float32)
    dsystem = tl.zeros([C, C], tl.float32)
    drate = tl.zeros([C], tl.float32)
    for first in range(0, value_dim, BLOCK_V):
        out = first + tl.arange(0, BLOCK_V)
        spot = (place * C + step)[:, None] * value_dim + out[None, :]
        wrote = tl.load(written + spot, (out < value_dim)[None, :], other=0.0)
        pull = tl.load(pulled + spot, (out < value_dim)[None, :], other=0.0)
        drate += tl.sum(pull * _rows(v, row, found, head, v_token, v_head, out, value_dim), 1)
        bounds = found[:, None] & (out < value_dim)[None, :]
        there = at[:, None] * value_dim + out[None, :]
        tl.store(dv + there, (rate[:, None] * pull).to(dv.dtype.element_ty), bounds)
        dsystem -= tl.dot(pull, tl.trans(wrote), input_precision=PRECISION)
        douts = _rows(do, row, found, head, g_token, g_head, out, value_dim)
        dscores += tl.dot(douts, tl.trans(wrote), input_precision=PRECISION)
    products = tl.zeros([C, C], tl.float32)
    scores = tl.zeros([C, C], tl.float32)
    for first in range(0, key_dim, BLOCK_K):
        col = first + tl.arange(0, BLOCK_K)
        keys = _rows(k, row, found, head, k_token, k_head, col, key_dim)
        queries = _rows(q, row, found, head, q_token, q_head, col, key_dim) * scale
        products += tl.dot(keys, tl.trans(keys), input_precision=PRECISION)
        scores += tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    _, decay, _, _, _ = _gates(beta, log_decay, row, found, head, heads, C)
    earlier = step[:, None] > step[None, :]
    dsystem = tl.where(earlier, dsystem * decay, 0.0)
    tl.store(dgates + place * C + step, drate + tl.sum(dsystem * products, 1))
    dsystem *= rate[:, None]
    dscores = tl.where(step[:, None] >= step[None, :], dscores * decay, 0.0)
    if log_decay is not None:
        pairs = tl.where(earlier, dscores * scores + dsystem * products, 0.0)
        # A step's log-decay is in every span that crosses it: sums of those spans alone.
        across = tl.where(earlier, tl.cumsum(pairs, 0, reverse=True), 0.0)
        count = tl.num_programs(0).to(tl.int64) * heads
        tl.store(dgates + (count + place) * C + step, tl.sum(across, 1))
    dsystem += tl.trans(dsystem)
    for first in range(0, key_dim, BLOCK_K):
        col = first + tl.arange(0, BLOCK_K)
        keys = _rows(k, row, found, head, k_token, k_head, col, key_dim)
        queries = _rows(q, row, found, head, q_token, q_head, col, key_dim) * scale
        spot = (place * C + step)[:, None] * key_dim + col[None, :]
        inside = (col < key_dim)[None, :]
        tl.store(dqueries + spot, tl.dot(dscores, keys, input_precision=PRECISION), inside)
        pull = tl.dot(dsystem, keys, input_precision=PRECISION)
        pull += tl.dot(tl.trans(dscores), queries, input_precision=PRECISION)
        tl.store(dkeys + spot, pull, inside)


@triton.jit
def gradient_kernel(
    do, q, k, beta, log_decay, begin, length, kept, written, after, pulled, dqueries, dkeys, dgates,
    dq, dk, dbeta, ddecay,
    g_token, g_head, q_token, q_head, k_token, k_head, heads, key_dim, value_dim, scale,
    C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a chunk's queries, keys and gates: what goes by the state, and what `pair_kernel` left."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    step, col = tl.arange(0, C), tl.arange(0, BLOCK_K)
    row = tl.load(begin + chunk) + step
    found = step < tl.load(length + chunk)
    place = chunk.to(tl.int64) * heads + head
    read = tl.zeros([C, BLOCK_K], tl.float32)  # dO S^T
    faded = tl.zeros([C, BLOCK_K], tl.float32)  # U dS'^T
    known = tl.zeros([C, BLOCK_K], tl.float32)  # R S^T
    carried = tl.zeros([BLOCK_K], tl.float32)
    for first in range(0, value_dim, BLOCK_V):
        out = first + tl.arange(0, BLOCK_V)
        spot = (place * C + step)[:, None] * value_dim + out[None, :]
        here = (place * key_dim + col)[:, None] * value_dim + out[None, :]
        inside = (col < key_dim)[:, None] & (out < value_dim)[None, :]
        state = tl.load(kept + here, inside, other=0.0)
        grad = tl.load(after + here, inside, other=0.0)
        carried += tl.sum(state * grad, 1)
        wrote = tl.load(written + spot, (out < value_dim)[None, :], other=0.0)
        faded += tl.dot(wrote, tl.trans(grad), input_precision=PRECISION)
        pull = tl.load(pulled + spot, (out < value_dim)[None, :], other=0.0)
        known += tl.dot(pull, tl.trans(state), input_precision=PRECISION)
        douts = _rows(do, row, found, head, g_token, g_head, out, value_dim)
        read += tl.dot(douts, tl.trans(state), input_precision=PRECISION)
    rate, _, since, until, whole = _gates(beta, log_decay, row, found, head, heads, C)
    keys = _rows(k, row, found, head, k_token, k_head, col, key_dim)
    at = row.to(tl.int64) * heads + head
    stored = tl.sum(known * keys, 1)
    drate = tl.load(dgates + place * C + step) - since * stored
    tl.store(dbeta + at, drate.to(dbeta.dtype.element_ty), found)
    if ddecay is not None:
        queries = _rows(q, row, found, head, q_token, q_head, col, key_dim) * scale
        ahead = until * tl.sum(faded * keys, 1)
        behind = since * (tl.sum(read * queries, 1) - rate * stored)
        count = tl.num_programs(0).to(tl.int64) * heads
        total = tl.load(dgates + (count + place) * C + step) + whole * tl.sum(carried, 0)
        total += tl.cumsum(behind, 0, reverse=True) + (tl.cumsum(ahead, 0) - ahead)
        tl.store(ddecay + at, total.to(ddecay.dtype.element_ty), found)
    spot = (place * C + step)[:, None] * key_dim + col[None, :]
    bounds = found[:, None] & (col < key_dim)[None, :]
    there = at[:, None] * key_dim + col[None, :]
    query = read * since[:, None] + tl.load(dqueries + spot, bounds, other=0.0)
    tl.store(dq + there, (query * scale).to(dq.dtype.element_ty), bounds)
    key = faded * until[:, None] - known * (rate * since)[:, None] + tl.load(dkeys + spot, bounds, other=0.0)
    tl.store(dk + there, key.to(dk.dtype.element_ty), bounds)
