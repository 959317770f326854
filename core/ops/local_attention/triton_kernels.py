"""The Triton kernels of local attention: forward, and a backward without atomics (README.md).

A key is seen in one of two ways: in the band, or, if it is a global token's, by every row and apart from it.
`Flags [B, N]` marks what takes no part in the band: masked tokens, and global ones, whose rows are computed
elsewhere. Tiles, sums of rows and delta are dense attention's.
"""

# The types of a kernel's arguments are Triton's, not Python's.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from manyheads.core.ops.attention.triton_kernels import LN2, rows_of, store_tile, tile

# Counts change from call to call: a kernel is not compiled anew for their divisibility.
COUNTS = ["H", "N", "G", "window"]
# Global tokens to a block: the least that a product takes.
FAR = tl.constexpr(16)


@triton.jit
def banded(s, flags, m, n, i, j, N, window, qk_scale, keys, HAS_FLAGS: tl.constexpr):
    """Turn products into base-2 scores, -inf outside the band; `keys` are the keys as a row or column."""
    distance = (n + j) - (m + i)
    visible = (m + i < N) & (n + j < N) & (distance <= window) & (distance >= -window)
    if HAS_FLAGS:
        visible = visible & (tl.load(flags + n + keys, mask=n + keys < N, other=1) == 0)
    return tl.where(visible, s * qk_scale, float("-inf"))


@triton.jit
def far_rows(base, place, stride, d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load the rows of the global tokens, zeros for a place of -1."""
    inside = (place >= 0)[:, None]
    if BLOCK_D != D:
        inside = inside & (d[None, :] < D)
    return tl.load(base + place[:, None].to(tl.int64) * stride + d[None, :], mask=inside, other=0.0)


@triton.jit
def merged(x, v, top, total, acc):
    """Take a tile of scores and its values into the running maximum, sum and result."""
    new_top = tl.maximum(top, tl.max(x, 1))
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing seen yet: no -inf minus -inf
    p = tl.exp2(x - shift[:, None])
    shrink = tl.exp2(top - shift)
    acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return new_top, total * shrink + tl.sum(p, 1), acc


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    Q, K, V, Index, Flags, Out, Rows,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    H, N, G, window, qk_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_FAR: tl.constexpr, HAS_FLAGS: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head against the global keys and the keys near by."""
    blocks = tl.cdiv(N, BLOCK_M)
    m = (tl.program_id(0) % blocks) * BLOCK_M
    bh = tl.program_id(0) // blocks
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    i, j, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    keys, values = K + b * stride_kb + h * stride_kh, V + b * stride_vb + h * stride_vh
    flags = Flags + b * N
    q = tile(Q + b * stride_qb + h * stride_qh, m, i, stride_qn, d, N, D, BLOCK_D)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if HAS_FAR:
        c = tl.arange(0, FAR)
        for g in range(0, G, FAR):
            place = tl.load(Index + b * G + g + c, mask=g + c < G, other=-1)
            k = far_rows(keys, place, stride_kn, d, D, BLOCK_D)
            x = tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale
            x = tl.where((place >= 0)[None, :], x, float("-inf"))
            top, total, acc = merged(
                x, far_rows(values, place, stride_vn, d, D, BLOCK_D), top, total, acc
            )  # fmt: skip
    for n in range(tl.maximum(0, m - window), tl.minimum(N, m + BLOCK_M + window), BLOCK_N):
        k = tile(keys, n, j, stride_kn, d, N, D, BLOCK_D)
        x = tl.dot(q, tl.trans(k), input_precision="ieee")
        x = banded(x, flags, m, n, i[:, None], j[None, :], N, window, qk_scale, j[None, :], HAS_FLAGS)
        top, total, acc = merged(x, tile(values, n, j, stride_vn, d, N, D, BLOCK_D), top, total, acc)

    # A row without keys, or whose result comes from elsewhere, has a share of 0: its weights stay 0.
    empty = total == 0.0
    if HAS_FLAGS:
        empty = empty | (tl.load(flags + m + i, mask=m + i < N, other=1) != 0)
    share = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, total))
    row = Rows + 2 * (bh.to(tl.int64) * N + m + i)
    tl.store(row, tl.where(empty, 0.0, top), mask=m + i < N)
    tl.store(row + 1, share, mask=m + i < N)
    acc = tl.where(empty[:, None], 0.0, acc * share[:, None]).to(Out.dtype.element_ty)
    store_tile(Out + (b * N * H + h) * D, m, i, H * D, d, N, acc, D, BLOCK_D)


@triton.jit(do_not_specialize=["G", "N"])
def place_kernel(
    Index, Top, Out, stride_tb, stride_tg, stride_th, H, N, G, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Put the row of a global token and head in its place."""
    h = (tl.program_id(0) % H).to(tl.int64)
    bg = (tl.program_id(0) // H).to(tl.int64)
    place = tl.load(Index + bg).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    row = tl.load(
        Top + (bg // G) * stride_tb + (bg % G) * stride_tg + h * stride_th + d, mask=d < D, other=0.0
    )
    tl.store(Out + (((bg // G) * N + place) * H + h) * D + d, row, mask=(d < D) & (place >= 0))


@triton.jit(do_not_specialize=COUNTS)
def query_kernel(
    Q, K, V, Index, Flags, Grad, Rows, Delta, DQ,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_gb, stride_gn, stride_gh, H, N, G, window, qk_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_FAR: tl.constexpr, HAS_FLAGS: tl.constexpr,
):  # fmt: skip
    """The gradient of one block of queries, over the keys in the forward's order."""
    blocks = tl.cdiv(N, BLOCK_M)
    m = (tl.program_id(0) % blocks) * BLOCK_M
    bh = tl.program_id(0) // blocks
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    i, j, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    keys, values = K + b * stride_kb + h * stride_kh, V + b * stride_vb + h * stride_vh
    q = tile(Q + b * stride_qb + h * stride_qh, m, i, stride_qn, d, N, D, BLOCK_D)
    grad = tile(Grad + b * stride_gb + h * stride_gh, m, i, stride_gn, d, N, D, BLOCK_D)
    top, share, delta = rows_of(Rows, Delta, bh, m, i, N)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if HAS_FAR:
        c = tl.arange(0, FAR)
        for g in range(0, G, FAR):
            place = tl.load(Index + b * G + g + c, mask=g + c < G, other=-1)
            k = far_rows(keys, place, stride_kn, d, D, BLOCK_D)
            x = tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale
            x = tl.where((place >= 0)[None, :], x, float("-inf"))
            v = far_rows(values, place, stride_vn, d, D, BLOCK_D)
            dw = tl.dot(grad, tl.trans(v), input_precision="ieee")
            ds = tl.exp2(x - top[:, None]) * share[:, None] * (dw - delta[:, None])
            dq += tl.dot(ds.to(k.dtype), k, input_precision="ieee")
    for n in range(tl.maximum(0, m - window), tl.minimum(N, m + BLOCK_M + window), BLOCK_N):
        k = tile(keys, n, j, stride_kn, d, N, D, BLOCK_D)
        x = tl.dot(q, tl.trans(k), input_precision="ieee")
        x = banded(
            x, Flags + b * N, m, n, i[:, None], j[None, :], N, window, qk_scale, j[None, :], HAS_FLAGS
        )  # fmt: skip
        v = tile(values, n, j, stride_vn, d, N, D, BLOCK_D)
        dw = tl.dot(grad, tl.trans(v), input_precision="ieee")
        ds = tl.exp2(x - top[:, None]) * share[:, None] * (dw - delta[:, None])
        dq += tl.dot(ds.to(k.dtype), k, input_precision="ieee")
    dq *= qk_scale * LN2
    store_tile(DQ + (b * N * H + h) * D, m, i, H * D, d, N, dq.to(DQ.dtype.element_ty), D, BLOCK_D)


@triton.jit
def key_gradients(
    x, q, v, grads, stride_gn, Rows, Delta, bh, m, i, d, N, dk, dv, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Add what a block of queries gives to a block of keys; tiles are transposed, `[keys, queries]`."""
    top, share, delta = rows_of(Rows, Delta, bh, m, i, N)
    w = tl.exp2(x - top[None, :]) * share[None, :]
    grad = tile(grads, m, i, stride_gn, d, N, D, BLOCK_D)
    dw = tl.dot(v, tl.trans(grad), input_precision="ieee")
    dv += tl.dot(w.to(grad.dtype), grad, input_precision="ieee")
    ds = w * (dw - delta[None, :])
    dk += tl.dot(ds.to(q.dtype), q, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=COUNTS)
def key_kernel(
    Q, K, V, Index, Flags, Grad, Rows, Delta, DK, DV,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_gb, stride_gn, stride_gh, H, N, G, window, qk_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_FAR: tl.constexpr, HAS_FLAGS: tl.constexpr,
):  # fmt: skip
    """The gradients of one block of keys and values over the queries near by; zeros for global tokens."""
    blocks = tl.cdiv(N, BLOCK_N)
    n = (tl.program_id(0) % blocks) * BLOCK_N
    bh = tl.program_id(0) // blocks
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    i, j, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    queries, grads = Q + b * stride_qb + h * stride_qh, Grad + b * stride_gb + h * stride_gh
    k = tile(K + b * stride_kb + h * stride_kh, n, j, stride_kn, d, N, D, BLOCK_D)
    v = tile(V + b * stride_vb + h * stride_vh, n, j, stride_vn, d, N, D, BLOCK_D)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for m in range(tl.maximum(0, n - window), tl.minimum(N, n + BLOCK_N + window), BLOCK_M):
        q = tile(queries, m, i, stride_qn, d, N, D, BLOCK_D)
        x = tl.dot(k, tl.trans(q), input_precision="ieee")
        x = banded(
            x, Flags + b * N, m, n, i[None, :], j[:, None], N, window, qk_scale, j[:, None], HAS_FLAGS
        )  # fmt: skip
        dk, dv = key_gradients(x, q, v, grads, stride_gn, Rows, Delta, bh, m, i, d, N, dk, dv, D, BLOCK_D)
    dk *= qk_scale * LN2
    start = (b * N * H + h) * D
    store_tile(DK + start, n, j, H * D, d, N, dk.to(DK.dtype.element_ty), D, BLOCK_D)
    store_tile(DV + start, n, j, H * D, d, N, dv.to(DV.dtype.element_ty), D, BLOCK_D)


@triton.jit(do_not_specialize=COUNTS)
def far_kernel(
    Q, K, V, Index, Flags, Grad, Rows, Delta, DK, DV,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_gb, stride_gn, stride_gh, H, N, G, window, qk_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_FAR: tl.constexpr, HAS_FLAGS: tl.constexpr,
):  # fmt: skip
    """The gradients of a block of global keys and values over all queries, put in their places."""
    blocks = tl.cdiv(G, FAR)
    g = (tl.program_id(0) % blocks) * FAR
    bh = tl.program_id(0) // blocks
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    i, c, d = tl.arange(0, BLOCK_M), tl.arange(0, FAR), tl.arange(0, BLOCK_D)
    queries, grads = Q + b * stride_qb + h * stride_qh, Grad + b * stride_gb + h * stride_gh
    place = tl.load(Index + b * G + g + c, mask=g + c < G, other=-1)
    k = far_rows(K + b * stride_kb + h * stride_kh, place, stride_kn, d, D, BLOCK_D)
    v = far_rows(V + b * stride_vb + h * stride_vh, place, stride_vn, d, D, BLOCK_D)
    dk = tl.zeros([FAR, BLOCK_D], tl.float32)
    dv = tl.zeros([FAR, BLOCK_D], tl.float32)
    for m in range(0, N, BLOCK_M):
        q = tile(queries, m, i, stride_qn, d, N, D, BLOCK_D)
        x = tl.dot(k, tl.trans(q), input_precision="ieee") * qk_scale
        x = tl.where((place >= 0)[:, None] & (m + i < N)[None, :], x, float("-inf"))
        dk, dv = key_gradients(x, q, v, grads, stride_gn, Rows, Delta, bh, m, i, d, N, dk, dv, D, BLOCK_D)
    inside = (place >= 0)[:, None] & (d < D)[None, :]
    at = ((b * N + place.to(tl.int64)) * H + h)[:, None] * D + d[None, :]
    tl.store(DK + at, (dk * (qk_scale * LN2)).to(DK.dtype.element_ty), mask=inside)
    tl.store(DV + at, dv.to(DV.dtype.element_ty), mask=inside)
