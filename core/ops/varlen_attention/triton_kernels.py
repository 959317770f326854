"""The Triton kernels of packed attention: forward, and a backward without atomics (README.md).

Tiles, weights and score gradients are dense attention's; here are the search for a program's sequence, the
bias by relative position, and that bias's gradient.
"""

# The types of a kernel's arguments are Triton's, not Python's.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from manyheads.core.ops.attention.triton_kernels import LN2, LOG2E, store_tile, tile

# Counts change from call to call: a kernel is not compiled anew for their divisibility.
COUNTS = ["S", "H", "G", "far"]


@triton.jit
def sequence_of(Cu, slot, S, BLOCK: tl.constexpr):
    """Find the sequence that a program works on: the last s with cu[s] // BLOCK + s <= slot."""
    low = 0
    high = S
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(Cu + middle) // BLOCK + middle <= slot
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    start = tl.load(Cu + low)
    return low, start, tl.load(Cu + low + 1) - start, (slot - start // BLOCK - low) * BLOCK


@triton.jit
def scored(
    s, bias, m, n, i, j, nq, nk, far, qk_scale, HAS_BIAS: tl.constexpr, CAUSAL: tl.constexpr
):  # fmt: skip
    """Turn products into base-2 scores: scale, bias, -inf where nothing is seen. n + j may be negative."""
    visible = (m + i < nq) & (n + j < nk) & (n + j >= 0)
    distance = (n + j) - (m + i) - (nk - nq)
    s = s * qk_scale
    if HAS_BIAS:
        column = tl.minimum(tl.maximum(distance, -far), far) + far
        s += tl.load(bias + column).to(tl.float32) * LOG2E
    if CAUSAL:
        visible = visible & (distance <= 0)
    return tl.where(visible, s, float("-inf"))


@triton.jit
def rows_of(Rows, Delta, row, h, H, inside):
    """Load what is known of rows: the largest base-2 score, one over the sum, and delta."""
    at = row.to(tl.int64) * H + h
    top = tl.load(Rows + 2 * at, mask=inside, other=0.0)
    share = tl.load(Rows + 2 * at + 1, mask=inside, other=0.0)
    return top, share, tl.load(Delta + at, mask=inside, other=0.0)


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    Q, K, V, CuQ, CuK, Bias, Out, Rows,
    stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, stride_bh,
    S, H, G, far, qk_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head against the keys of its sequence, with a running maximum and sum."""
    h = (tl.program_id(0) % H).to(tl.int64)
    s, start_q, nq, m = sequence_of(CuQ, tl.program_id(0) // H, S, BLOCK_M)
    if m >= nq:
        return
    start_k = tl.load(CuK + s)
    nk = tl.load(CuK + s + 1) - start_k
    i, j, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    i2, j2 = i[:, None], j[None, :]
    first_q, first_k = start_q.to(tl.int64), start_k.to(tl.int64)
    keys = K + first_k * stride_kn + (h // G) * stride_kh
    values = V + first_k * stride_vn + (h // G) * stride_vh
    bias = Bias + h * stride_bh
    q = tile(Q + first_q * stride_qn + h * stride_qh, m, i, stride_qn, d, nq, D, BLOCK_D)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    end = nk
    if CAUSAL:
        end = tl.minimum(nk, m + BLOCK_M + nk - nq)
    for n in range(0, end, BLOCK_N):
        k = tile(keys, n, j, stride_kn, d, nk, D, BLOCK_D)
        x = tl.dot(q, tl.trans(k), input_precision="ieee")
        x = scored(x, bias, m, n, i2, j2, nq, nk, far, qk_scale, HAS_BIAS, CAUSAL)
        new_top = tl.maximum(top, tl.max(x, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing seen yet: no -inf minus -inf
        p = tl.exp2(x - shift[:, None])
        shrink = tl.exp2(top - shift)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        top = new_top
        v = tile(values, n, j, stride_vn, d, nk, D, BLOCK_D)
        acc += tl.dot(p.to(v.dtype), v, input_precision="ieee")

    # A row without keys has total 0 and acc 0: its output is 0, and a share of 0 keeps its weights 0.
    empty = total == 0.0
    share = 1.0 / tl.where(empty, 1.0, total)
    row = Rows + 2 * ((first_q + m + i) * H + h)
    tl.store(row, tl.where(empty, 0.0, top), mask=m + i < nq)
    tl.store(row + 1, tl.where(empty, 0.0, share), mask=m + i < nq)
    acc = (acc * share[:, None]).to(Out.dtype.element_ty)
    store_tile(Out + (first_q * H + h) * D, m, i, H * D, d, nq, acc, D, BLOCK_D)


@triton.jit(do_not_specialize=["T"])
def delta_kernel(
    Grad, Out, Delta, stride_gn, stride_gh, H, T,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The rows' sums of gradient times output, whatever sequences they belong to."""
    h = (tl.program_id(0) % H).to(tl.int64)
    m = (tl.program_id(0) // H) * BLOCK_M
    i, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    grad = tile(Grad + h * stride_gh, m, i, stride_gn, d, T, D, BLOCK_D)
    out = tile(Out + h * D, m, i, H * D, d, T, D, BLOCK_D)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(Delta + (m + i).to(tl.int64) * H + h, delta, mask=m + i < T)


@triton.jit(do_not_specialize=COUNTS)
def key_kernel(
    Q, K, V, CuQ, CuK, Bias, Grad, Rows, Delta, DK, DV,
    stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, stride_gn, stride_gh, stride_bh,
    S, H, G, far, qk_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """The gradients of one block of keys and values, over all queries of all heads that share them, in order.

    Tiles are transposed, `[BLOCK_N, BLOCK_M]`, so that weights are the left operand of their product.
    """
    groups = H // G
    hk = (tl.program_id(0) % groups).to(tl.int64)
    s, start_k, nk, n = sequence_of(CuK, tl.program_id(0) // groups, S, BLOCK_N)
    if n >= nk:
        return
    start_q = tl.load(CuQ + s)
    nq = tl.load(CuQ + s + 1) - start_q
    i, j, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    i2, j2 = i[None, :], j[:, None]
    first_q, first_k = start_q.to(tl.int64), start_k.to(tl.int64)
    k = tile(K + first_k * stride_kn + hk * stride_kh, n, j, stride_kn, d, nk, D, BLOCK_D)
    v = tile(V + first_k * stride_vn + hk * stride_vh, n, j, stride_vn, d, nk, D, BLOCK_D)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    begin = 0
    if CAUSAL:
        begin = tl.maximum(0, n - (nk - nq)) // BLOCK_M * BLOCK_M  # the first query that sees this block
    for g in range(0, G):
        h = hk * G + g
        queries = Q + first_q * stride_qn + h * stride_qh
        grads = Grad + first_q * stride_gn + h * stride_gh
        bias = Bias + h * stride_bh
        for m in range(begin, nq, BLOCK_M):
            q = tile(queries, m, i, stride_qn, d, nq, D, BLOCK_D)
            x = tl.dot(k, tl.trans(q), input_precision="ieee")
            x = scored(x, bias, m, n, i2, j2, nq, nk, far, qk_scale, HAS_BIAS, CAUSAL)
            top, share, delta = rows_of(Rows, Delta, first_q + m + i, h, H, m + i < nq)
            w = tl.exp2(x - top[None, :]) * share[None, :]
            grad = tile(grads, m, i, stride_gn, d, nq, D, BLOCK_D)
            dw = tl.dot(v, tl.trans(grad), input_precision="ieee")
            dv += tl.dot(w.to(grad.dtype), grad, input_precision="ieee")
            ds = w * (dw - delta[None, :])
            dk += tl.dot(ds.to(q.dtype), q, input_precision="ieee")
    dk *= qk_scale * LN2
    start = (first_k * groups + hk) * D
    store_tile(DK + start, n, j, groups * D, d, nk, dk.to(DK.dtype.element_ty), D, BLOCK_D)
    store_tile(DV + start, n, j, groups * D, d, nk, dv.to(DV.dtype.element_ty), D, BLOCK_D)


@triton.jit
def score_gradient(
    q, grad, keys, values, bias, top, share, delta, m, n, i, j, d, stride_kn, stride_vn,
    nq, nk, far, qk_scale, D: tl.constexpr, BLOCK_D: tl.constexpr, HAS_BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """A tile `[BLOCK_M, BLOCK_N]` of the gradient of the scores, and its keys."""
    k = key_tile(keys, n, j, stride_kn, d, nk, D, BLOCK_D)
    x = tl.dot(q, tl.trans(k), input_precision="ieee")
    x = scored(x, bias, m, n, i[:, None], j[None, :], nq, nk, far, qk_scale, HAS_BIAS, CAUSAL)
    w = tl.exp2(x - top[:, None]) * share[:, None]
    v = key_tile(values, n, j, stride_vn, d, nk, D, BLOCK_D)
    dw = tl.dot(grad, tl.trans(v), input_precision="ieee")
    return w * (dw - delta[:, None]), k


@triton.jit
def key_tile(base, start, index, stride, dims, bound, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load rows `start + index` of a `[N, D]` matrix, zeros before its begin and beyond its end."""
    row = (start + index)[:, None]
    inside = (row >= 0) & (row < bound)
    if BLOCK_D != D:
        inside = inside & (dims[None, :] < D)
    return tl.load(base + row.to(tl.int64) * stride + dims[None, :], mask=inside, other=0.0)


@triton.jit(do_not_specialize=COUNTS)
def query_kernel(
    Q, K, V, CuQ, CuK, Bias, Grad, Rows, Delta, DQ,
    stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, stride_gn, stride_gh, stride_bh,
    S, H, G, far, qk_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """The gradient of one block of queries, over all keys in order.

    With a bias it also corrects delta: a row's score gradients sum to zero, and what they sum to is what
    rounding left in delta. The bias's gradient adds up many rows, whose remainders do not cancel.
    """
    h = (tl.program_id(0) % H).to(tl.int64)
    s, start_q, nq, m = sequence_of(CuQ, tl.program_id(0) // H, S, BLOCK_M)
    if m >= nq:
        return
    start_k = tl.load(CuK + s)
    nk = tl.load(CuK + s + 1) - start_k
    i, j, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    first_q, first_k = start_q.to(tl.int64), start_k.to(tl.int64)
    keys = K + first_k * stride_kn + (h // G) * stride_kh
    values = V + first_k * stride_vn + (h // G) * stride_vh
    q = tile(Q + first_q * stride_qn + h * stride_qh, m, i, stride_qn, d, nq, D, BLOCK_D)
    grad = tile(Grad + first_q * stride_gn + h * stride_gh, m, i, stride_gn, d, nq, D, BLOCK_D)
    top, share, delta = rows_of(Rows, Delta, first_q + m + i, h, H, m + i < nq)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    rest = tl.zeros([BLOCK_M], tl.float32)
    end = nk
    if CAUSAL:
        end = tl.minimum(nk, m + BLOCK_M + nk - nq)
    for n in range(0, end, BLOCK_N):
        ds, k = score_gradient(
            q, grad, keys, values, Bias + h * stride_bh, top, share, delta, m, n, i, j, d,
            stride_kn, stride_vn, nq, nk, far, qk_scale, D, BLOCK_D, HAS_BIAS, CAUSAL,
        )  # fmt: skip
        dq += tl.dot(ds.to(k.dtype), k, input_precision="ieee")
        if HAS_BIAS:
            rest += tl.sum(ds, 1)
    if HAS_BIAS:
        tl.store(Delta + (first_q + m + i) * H + h, delta + rest, mask=m + i < nq)
    dq *= qk_scale * LN2
    store_tile(DQ + (first_q * H + h) * D, m, i, H * D, d, nq, dq.to(DQ.dtype.element_ty), D, BLOCK_D)


@triton.jit(do_not_specialize=[*COUNTS, "slots", "steps"])
def relative_kernel(
    Q, K, V, CuQ, CuK, Bias, Grad, Rows, Delta, DB,
    stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, stride_gn, stride_gh, stride_bh,
    S, H, G, far, qk_scale, slots, steps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    HAS_BIAS: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """The sums of the score gradients of one head along a block diagonal, over a share of the query blocks.

    Tiles are square. Diagonal x of `2 * reach + 1` has the keys that begin (x - reach) * BLOCK_M after their
    queries; the first and the last one take all tiles before and after, wholly beyond the table. Entry c of
    `DB[split, h, x, 0]` belongs to the distance (x - reach) * BLOCK_M + c, of `[..., 1]` to one BLOCK_M less.
    """
    reach = tl.cdiv(far, BLOCK_M) + 1
    width = 2 * reach + 1
    x = tl.program_id(0) % width
    h = (tl.program_id(0) // width % H).to(tl.int64)
    split = tl.program_id(0) // width // H
    i, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    turned = (i[:, None] + i[None, :]) % BLOCK_M  # entry c of row i is of the column i + c
    wrapped = i[:, None] + i[None, :] >= BLOCK_M
    after = tl.zeros([BLOCK_M], tl.float32)
    before = tl.zeros([BLOCK_M], tl.float32)
    for slot in range(split * steps, tl.minimum((split + 1) * steps, slots)):
        s, start_q, nq, m = sequence_of(CuQ, slot, S, BLOCK_M)
        start_k = tl.load(CuK + s)
        nk = tl.load(CuK + s + 1) - start_k
        first_q, first_k = start_q.to(tl.int64), start_k.to(tl.int64)
        keys = K + first_k * stride_kn + (h // G) * stride_kh
        values = V + first_k * stride_vn + (h // G) * stride_vh
        aligned = m + nk - nq  # where the block's first query stands among the keys
        begin = aligned + (x - reach) * BLOCK_M
        end = begin + 1
        if x == 0:
            begin -= tl.maximum(0, begin + BLOCK_M - 1) // BLOCK_M * BLOCK_M
        if x == width - 1:
            end = nk
            # A first key before the sequence: skip tiles that hold none.
            begin += tl.maximum(0, -begin) // BLOCK_M * BLOCK_M
        if (m < nq) & (begin < nk) & (end + BLOCK_M > 1) & (not CAUSAL or x <= reach):
            q = tile(Q + first_q * stride_qn + h * stride_qh, m, i, stride_qn, d, nq, D, BLOCK_D)
            grad = tile(Grad + first_q * stride_gn + h * stride_gh, m, i, stride_gn, d, nq, D, BLOCK_D)
            top, share, delta = rows_of(Rows, Delta, first_q + m + i, h, H, m + i < nq)
            for n in range(begin, end, BLOCK_M):
                ds, _ = score_gradient(
                    q, grad, keys, values, Bias + h * stride_bh, top, share, delta, m, n, i, i, d, stride_kn,
                    stride_vn, nq, nk, far, qk_scale, D, BLOCK_D, HAS_BIAS, CAUSAL,
                )  # fmt: skip
                ds = tl.gather(ds, turned, 1)
                after += tl.sum(tl.where(wrapped, 0.0, ds), 0)
                before += tl.sum(tl.where(wrapped, ds, 0.0), 0)
    out = DB + (((split * H + h) * width + x) * 2) * BLOCK_M + i
    tl.store(out, after)
    tl.store(out + BLOCK_M, before)
