"""The Triton kernels of attention: forward, and a backward without atomics (README.md derives it).

Every kernel recomputes tiles of the scores through the same helpers, so a tile is the same in each. Scores
are kept in base 2 (`exp2` is the hardware's exponential). Base pointers use 64-bit offsets; offsets inside a
tile 32-bit ones. Index tiles come expanded, `[BM, 1]` and `[1, BN]` or transposed, so that a helper works in
both orientations.
"""

# The types of a kernel's arguments are Triton's, not Python's.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Lengths and counts change from call to call: a kernel is not compiled anew for their divisibility.
COUNTS = ["H", "G", "Nq", "Nk"]


@triton.jit
def tile(base, start, index, stride, dims, bound, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load rows `start + index` of a `[N, D]` matrix, zeros beyond its end."""
    inside = (start + index)[:, None] < bound
    if BLOCK_D != D:
        inside = inside & (dims[None, :] < D)
    return tl.load(
        base + tl.cast(start, tl.int64) * stride + index[:, None] * stride + dims[None, :],
        mask=inside,
        other=0.0,
    )


@triton.jit
def store_tile(base, start, index, stride, dims, bound, x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store rows `start + index` of a `[N, D]` matrix."""
    inside = (start + index)[:, None] < bound
    if BLOCK_D != D:
        inside = inside & (dims[None, :] < D)
    tl.store(
        base + tl.cast(start, tl.int64) * stride + index[:, None] * stride + dims[None, :], x, mask=inside
    )


@triton.jit
def extra(base, m, n, i, j, stride_m, stride_n, Nq, Nk):
    """Load a tile of a bias, mask or scale that starts at (m, n); `i` and `j` index inside the tile."""
    start = base + tl.cast(m, tl.int64) * stride_m + tl.cast(n, tl.int64) * stride_n
    return tl.load(start + i * stride_m + j * stride_n, mask=(m + i < Nq) & (n + j < Nk), other=0)


@triton.jit
def shown(
    s, bias, mask, m, n, i, j, stride_bm, stride_bn, stride_mm, stride_mn, Nq, Nk,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Add the bias to a tile of base-2 scores; hidden entries and those outside the matrix become -inf."""
    visible = (m + i < Nq) & (n + j < Nk)
    if HAS_BIAS:
        s += extra(bias, m, n, i, j, stride_bm, stride_bn, Nq, Nk).to(tl.float32) * LOG2E
    if HAS_MASK:
        visible = visible & (extra(mask, m, n, i, j, stride_mm, stride_mn, Nq, Nk) != 0)
    if CAUSAL:
        visible = visible & (n + j <= m + i + (Nk - Nq))
    return tl.where(visible, s, float("-inf"))


@triton.jit
def kept(x, seed, m, n, i, j, bh, dropout_p):
    """Drop entries of a tile; an entry's place alone decides, so every kernel drops the same ones."""
    row, col = tl.broadcast(m + i, n + j)
    bits, _, _, _ = tl.philox(seed, col.to(tl.uint32), row.to(tl.uint32), bh.to(tl.uint32), 0)
    uniform = (bits >> 8).to(tl.float32) * (1.0 / 16777216.0)
    return tl.where(uniform >= dropout_p, x / (1.0 - dropout_p), 0.0)


@triton.jit
def rows_of(Rows, Delta, bh, m, i, Nq):
    """Load what is known of rows m + i of a head: the largest base-2 score, one over the sum, and delta."""
    row = tl.cast(bh, tl.int64) * Nq + m + i
    inside = m + i < Nq
    top = tl.load(Rows + 2 * row, mask=inside, other=0.0)
    share = tl.load(Rows + 2 * row + 1, mask=inside, other=0.0)
    return top, share, tl.load(Delta + row, mask=inside, other=0.0)


@triton.jit
def weights_of(s, top, share, log2_nk, SIGMOID: tl.constexpr):
    """The weights of base-2 scores, as the forward had them: a log-sum-exp would round them once more."""
    if SIGMOID:
        return 1.0 / (1.0 + tl.exp2(log2_nk - s))
    return tl.exp2(s - top) * share


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    Q, K, V, Bias, Mask, Post, Seed, Out, Rows,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_bb, stride_bh, stride_bm, stride_bn, stride_mb, stride_mh, stride_mm, stride_mn,
    stride_pb, stride_ph, stride_pm, stride_pn,
    H, G, Nq, Nk, qk_scale, log2_nk, dropout_p,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_POST: tl.constexpr,
    SIGMOID: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head against all keys, with a running maximum and sum."""
    blocks = tl.cdiv(Nq, BLOCK_M)
    m = (tl.program_id(0) % blocks) * BLOCK_M
    bh = tl.program_id(0) // blocks
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    i, j, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    i2, j2 = i[:, None], j[None, :]
    keys = K + b * stride_kb + (h // G) * stride_kh
    values = V + b * stride_vb + (h // G) * stride_vh
    bias = Bias + b * stride_bb + h * stride_bh
    mask = Mask + b * stride_mb + h * stride_mh
    post = Post + b * stride_pb + h * stride_ph
    q = tile(Q + b * stride_qb + h * stride_qh, m, i, stride_qn, d, Nq, D, BLOCK_D)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    end = Nk
    if CAUSAL:
        end = tl.minimum(Nk, m + BLOCK_M + Nk - Nq)
    for n in range(0, end, BLOCK_N):
        k = tile(keys, n, j, stride_kn, d, Nk, D, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale
        s = shown(
            s, bias, mask, m, n, i2, j2, stride_bm, stride_bn, stride_mm, stride_mn, Nq, Nk,
            HAS_BIAS, HAS_MASK, CAUSAL,
        )  # fmt: skip
        if SIGMOID:
            p = weights_of(s, 0.0, 0.0, log2_nk, True)
        else:
            new_top = tl.maximum(top, tl.max(s, 1))
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing seen yet: no -inf minus -inf
            p = tl.exp2(s - shift[:, None])
            shrink = tl.exp2(top - shift)
            total = total * shrink + tl.sum(p, 1)
            acc = acc * shrink[:, None]
            top = new_top
        if HAS_POST:
            p *= extra(post, m, n, i2, j2, stride_pm, stride_pn, Nq, Nk).to(tl.float32)
        if DROPOUT:
            p = kept(p, tl.load(Seed), m, n, i2, j2, bh, dropout_p)
        v = tile(values, n, j, stride_vn, d, Nk, D, BLOCK_D)
        acc += tl.dot(p.to(v.dtype), v, input_precision="ieee")

    if not SIGMOID:
        # A row without keys has total 0 and acc 0: its output is 0, and a share of 0 keeps its weights 0.
        empty = total == 0.0
        share = 1.0 / tl.where(empty, 1.0, total)
        acc = acc * share[:, None]
        row = Rows + 2 * (tl.cast(bh, tl.int64) * Nq + m + i)
        tl.store(row, tl.where(empty, 0.0, top), mask=m + i < Nq)
        tl.store(row + 1, tl.where(empty, 0.0, share), mask=m + i < Nq)
    out = Out + (b * Nq * H + h) * D
    store_tile(out, m, i, H * D, d, Nq, acc.to(Out.dtype.element_ty), D, BLOCK_D)


@triton.jit(do_not_specialize=COUNTS)
def delta_kernel(
    Grad, Out, Delta, stride_gb, stride_gn, stride_gh, H, Nq,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The rows' sums of gradient times output."""
    blocks = tl.cdiv(Nq, BLOCK_M)
    m = (tl.program_id(0) % blocks) * BLOCK_M
    bh = tl.program_id(0) // blocks
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    i, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    grad = tile(Grad + b * stride_gb + h * stride_gh, m, i, stride_gn, d, Nq, D, BLOCK_D)
    out = tile(Out + (b * Nq * H + h) * D, m, i, H * D, d, Nq, D, BLOCK_D)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(Delta + tl.cast(bh, tl.int64) * Nq + m + i, delta, mask=m + i < Nq)


@triton.jit
def gradient_of(w, dw, delta, SIGMOID: tl.constexpr):
    """The gradient of the scores from the weights `w` and the gradient of the weights `dw`."""
    if SIGMOID:
        return w * (1.0 - w) * dw
    return w * (dw - delta)


@triton.jit(do_not_specialize=COUNTS)
def key_kernel(
    Q, K, V, Bias, Mask, Post, Seed, Grad, Rows, Delta, DK, DV,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_gb, stride_gn, stride_gh,
    stride_bb, stride_bh, stride_bm, stride_bn, stride_mb, stride_mh, stride_mm, stride_mn,
    stride_pb, stride_ph, stride_pm, stride_pn,
    H, G, Nq, Nk, qk_scale, log2_nk, dropout_p,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_POST: tl.constexpr,
    SIGMOID: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """The gradients of one block of keys and values, over all queries of all heads that share them, in order.

    Tiles are transposed, `[BLOCK_N, BLOCK_M]`, so that weights are the left operand of their product.
    """
    blocks = tl.cdiv(Nk, BLOCK_N)
    n = (tl.program_id(0) % blocks) * BLOCK_N
    group = tl.program_id(0) // blocks
    groups = H // G
    b, hk = (group // groups).to(tl.int64), group % groups
    i, j, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    i2, j2 = i[None, :], j[:, None]
    k = tile(K + b * stride_kb + hk.to(tl.int64) * stride_kh, n, j, stride_kn, d, Nk, D, BLOCK_D)
    v = tile(V + b * stride_vb + hk.to(tl.int64) * stride_vh, n, j, stride_vn, d, Nk, D, BLOCK_D)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    first = 0
    if CAUSAL:
        first = tl.maximum(0, n - (Nk - Nq)) // BLOCK_M * BLOCK_M  # the first query that sees this block
    for g in range(0, G):
        h = (hk * G + g).to(tl.int64)
        bh = b * H + h
        queries = Q + b * stride_qb + h * stride_qh
        grads = Grad + b * stride_gb + h * stride_gh
        bias = Bias + b * stride_bb + h * stride_bh
        mask = Mask + b * stride_mb + h * stride_mh
        post = Post + b * stride_pb + h * stride_ph
        for m in range(first, Nq, BLOCK_M):
            q = tile(queries, m, i, stride_qn, d, Nq, D, BLOCK_D)
            s = tl.dot(k, tl.trans(q), input_precision="ieee") * qk_scale
            s = shown(
                s, bias, mask, m, n, i2, j2, stride_bm, stride_bn, stride_mm, stride_mn, Nq, Nk,
                HAS_BIAS, HAS_MASK, CAUSAL,
            )  # fmt: skip
            top, share, delta = rows_of(Rows, Delta, bh, m, i, Nq)
            w = weights_of(s, top[None, :], share[None, :], log2_nk, SIGMOID)
            grad = tile(grads, m, i, stride_gn, d, Nq, D, BLOCK_D)
            dw = tl.dot(v, tl.trans(grad), input_precision="ieee")
            applied = w
            if HAS_POST:
                factor = extra(post, m, n, i2, j2, stride_pm, stride_pn, Nq, Nk).to(tl.float32)
                applied = w * factor
                dw = dw * factor
            if DROPOUT:
                seed = tl.load(Seed)
                applied = kept(applied, seed, m, n, i2, j2, bh, dropout_p)
                dw = kept(dw, seed, m, n, i2, j2, bh, dropout_p)
            dv += tl.dot(applied.to(grad.dtype), grad, input_precision="ieee")
            ds = gradient_of(w, dw, delta[None, :], SIGMOID)
            dk += tl.dot(ds.to(q.dtype), q, input_precision="ieee")
    dk *= qk_scale * LN2
    start = (b * Nk * groups + hk) * D
    store_tile(DK + start, n, j, groups * D, d, Nk, dk.to(DK.dtype.element_ty), D, BLOCK_D)
    store_tile(DV + start, n, j, groups * D, d, Nk, dv.to(DV.dtype.element_ty), D, BLOCK_D)


@triton.jit
def score_gradient(
    q, grad, keys, values, bias, mask, post, Seed, top, share, delta, m, n, i, j, d, bh,
    stride_kn, stride_vn, stride_bm, stride_bn, stride_mm, stride_mn, stride_pm, stride_pn,
    Nq, Nk, qk_scale, log2_nk, dropout_p,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_POST: tl.constexpr,
    SIGMOID: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, OF_POST: tl.constexpr,
):  # fmt: skip
    """A tile `[BLOCK_M, BLOCK_N]` of the gradient of the scores (or of post_scale), and its keys."""
    i2, j2 = i[:, None], j[None, :]
    k = tile(keys, n, j, stride_kn, d, Nk, D, BLOCK_D)
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale
    s = shown(
        s, bias, mask, m, n, i2, j2, stride_bm, stride_bn, stride_mm, stride_mn, Nq, Nk,
        HAS_BIAS, HAS_MASK, CAUSAL,
    )  # fmt: skip
    w = weights_of(s, top[:, None], share[:, None], log2_nk, SIGMOID)
    v = tile(values, n, j, stride_vn, d, Nk, D, BLOCK_D)
    dw = tl.dot(grad, tl.trans(v), input_precision="ieee")
    if DROPOUT:
        dw = kept(dw, tl.load(Seed), m, n, i2, j2, bh, dropout_p)
    if OF_POST:
        return w * dw, k
    if HAS_POST:
        dw *= extra(post, m, n, i2, j2, stride_pm, stride_pn, Nq, Nk).to(tl.float32)
    return gradient_of(w, dw, delta[:, None], SIGMOID), k


@triton.jit(do_not_specialize=COUNTS)
def query_kernel(
    Q, K, V, Bias, Mask, Post, Seed, Grad, Rows, Delta, DQ,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_gb, stride_gn, stride_gh,
    stride_bb, stride_bh, stride_bm, stride_bn, stride_mb, stride_mh, stride_mm, stride_mn,
    stride_pb, stride_ph, stride_pm, stride_pn,
    H, G, Nq, Nk, qk_scale, log2_nk, dropout_p,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_POST: tl.constexpr,
    SIGMOID: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """The gradient of one block of queries, over all keys in order."""
    blocks = tl.cdiv(Nq, BLOCK_M)
    m = (tl.program_id(0) % blocks) * BLOCK_M
    bh = tl.program_id(0) // blocks
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    i, j, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    keys = K + b * stride_kb + (h // G) * stride_kh
    values = V + b * stride_vb + (h // G) * stride_vh
    bias = Bias + b * stride_bb + h * stride_bh
    mask = Mask + b * stride_mb + h * stride_mh
    post = Post + b * stride_pb + h * stride_ph
    q = tile(Q + b * stride_qb + h * stride_qh, m, i, stride_qn, d, Nq, D, BLOCK_D)
    grad = tile(Grad + b * stride_gb + h * stride_gh, m, i, stride_gn, d, Nq, D, BLOCK_D)
    top, share, delta = rows_of(Rows, Delta, bh, m, i, Nq)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    end = Nk
    if CAUSAL:
        end = tl.minimum(Nk, m + BLOCK_M + Nk - Nq)
    for n in range(0, end, BLOCK_N):
        ds, k = score_gradient(
            q, grad, keys, values, bias, mask, post, Seed, top, share, delta, m, n, i, j, d, bh,
            stride_kn, stride_vn, stride_bm, stride_bn, stride_mm, stride_mn, stride_pm, stride_pn,
            Nq, Nk, qk_scale, log2_nk, dropout_p,
            D, BLOCK_D, HAS_BIAS, HAS_MASK, HAS_POST, SIGMOID, CAUSAL, DROPOUT, False,
        )  # fmt: skip
        dq += tl.dot(ds.to(k.dtype), k, input_precision="ieee")
    dq *= qk_scale * LN2
    store_tile(DQ + (b * Nq * H + h) * D, m, i, H * D, d, Nq, dq.to(DQ.dtype.element_ty), D, BLOCK_D)


@triton.jit(do_not_specialize=[*COUNTS, "B", "BX", "HX", "steps"])
def extra_kernel(
    Q, K, V, Bias, Mask, Post, Seed, Grad, Rows, Delta, DX,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_gb, stride_gn, stride_gh,
    stride_bb, stride_bh, stride_bm, stride_bn, stride_mb, stride_mh, stride_mm, stride_mn,
    stride_pb, stride_ph, stride_pm, stride_pn,
    H, G, Nq, Nk, qk_scale, log2_nk, dropout_p, B, BX, HX, steps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_POST: tl.constexpr,
    SIGMOID: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
    OF_POST: tl.constexpr, ONE_ROW: tl.constexpr, ONE_COLUMN: tl.constexpr,
):  # fmt: skip
    """The gradient of a bias or a scale `[BX, HX, Nq or 1, Nk or 1]`: one tile of it, summed in order.

    What is broadcast is looped over: batches, heads, and blocks of queries and keys. The loop is cut into
    splits of `steps`; a split writes its own partial sum `DX[split]`, and the caller adds the splits up in
    order.
    """
    rows, columns = tl.cdiv(Nq, BLOCK_M), tl.cdiv(Nk, BLOCK_N)
    tiles_m = 1 if ONE_ROW else rows
    tiles_n = 1 if ONE_COLUMN else columns
    over_m = rows if ONE_ROW else 1
    over_n = columns if ONE_COLUMN else 1
    pid = tl.program_id(0)
    tile_n, rest = pid % tiles_n, pid // tiles_n
    tile_m, rest = rest % tiles_m, rest // tiles_m
    hx, rest = rest % HX, rest // HX
    bx, split = rest % BX, rest // BX
    over_h, over_b = H // HX, B // BX
    i, j, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    last = tl.minimum((split + 1) * steps, over_b * over_h * over_m * over_n)
    for step in range(split * steps, last):
        n = (tile_n + step % over_n) * BLOCK_N
        m = (tile_m + step // over_n % over_m) * BLOCK_M
        h = (hx + step // (over_n * over_m) % over_h).to(tl.int64)
        b = (bx + step // (over_n * over_m * over_h)).to(tl.int64)
        bh = b * H + h
        q = tile(Q + b * stride_qb + h * stride_qh, m, i, stride_qn, d, Nq, D, BLOCK_D)
        grad = tile(Grad + b * stride_gb + h * stride_gh, m, i, stride_gn, d, Nq, D, BLOCK_D)
        top, share, delta = rows_of(Rows, Delta, bh, m, i, Nq)
        dx, _ = score_gradient(
            q, grad, K + b * stride_kb + (h // G) * stride_kh, V + b * stride_vb + (h // G) * stride_vh,
            Bias + b * stride_bb + h * stride_bh, Mask + b * stride_mb + h * stride_mh,
            Post + b * stride_pb + h * stride_ph, Seed, top, share, delta, m, n, i, j, d, bh,
            stride_kn, stride_vn, stride_bm, stride_bn, stride_mm, stride_mn, stride_pm, stride_pn,
            Nq, Nk, qk_scale, log2_nk, dropout_p,
            D, BLOCK_D, HAS_BIAS, HAS_MASK, HAS_POST, SIGMOID, CAUSAL, DROPOUT, OF_POST,
        )  # fmt: skip
        acc += dx

    height = 1 if ONE_ROW else Nq
    width = 1 if ONE_COLUMN else Nk
    out = DX + ((split * BX + bx) * HX + hx).to(tl.int64) * height * width
    out += (tile_m * BLOCK_M).to(tl.int64) * width + tile_n * BLOCK_N
    row, column = tile_m * BLOCK_M + i, tile_n * BLOCK_N + j
    if ONE_ROW and ONE_COLUMN:
        tl.store(out, tl.sum(tl.sum(acc, 1), 0))
    elif ONE_ROW:
        tl.store(out + j, tl.sum(acc, 0), mask=column < Nk)
    elif ONE_COLUMN:
        tl.store(out + i, tl.sum(acc, 1), mask=row < Nq)
    else:
        inside = (row < Nq)[:, None] & (column < Nk)[None, :]
        tl.store(out + i[:, None] * Nk + j[None, :], acc, mask=inside)
