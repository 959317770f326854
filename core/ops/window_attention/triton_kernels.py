"""The Triton kernels of window attention: forward, and a backward without atomics (README.md).

Tokens are loaded from the image where they lie: a table `Places` holds for each token of each window its y
and x and the side of the shift's cuts it is on, in one number, which spares the kernels the divisions. Scores
are kept in base 2 (`exp2` is the hardware's exponential). All kernels compute tiles of the scores through the
same helper. Offsets of rows have 64 bits.
"""

# The types of a kernel's arguments are Triton's, not Python's.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Sizes change from call to call: a kernel is not compiled anew for their divisibility.
SIZES = ("image", "width", "heads", "n", "windows")


@triton.jit
def place(Places, first, r, inside):
    """Where the tokens `first + r` of the windows lie: y, x (15 bits each), and their side of the cuts."""
    code = tl.load(Places + first + r, mask=inside, other=0)
    return (code >> 15) & 32767, code & 32767, code >> 30


@triton.jit
def tile(base, y, x, stride_y, stride_x, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load tokens `[BLOCK, D]` of an image, zeros where they are outside."""
    d = tl.arange(0, BLOCK_D)
    mask = inside[:, None]
    if BLOCK_D != D:
        mask = mask & (d < D)[None, :]
    offset = y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
    return tl.load(base + offset[:, None] + d[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(base, spot, row, inside, tokens, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store tokens `[BLOCK, D]` of a dense image whose tokens are `row` elements apart."""
    d = tl.arange(0, BLOCK_D)
    mask = inside[:, None]
    if BLOCK_D != D:
        mask = mask & (d < D)[None, :]
    offset = spot.to(tl.int64) * row
    tl.store(base + offset[:, None] + d[None, :], tokens.to(base.dtype.element_ty), mask=mask)


@triton.jit
def bias_tile(
    Bias, h, r, c, n, rows, stride_bh, stride_bm, stride_bn, HAS_BIAS: tl.constexpr, PACKED: tl.constexpr
):  # fmt: skip
    """What is added to base-2 scores of rows r and columns c: the bias, or zero; -inf between windows."""
    inside = (r < rows) & (c < rows)
    if PACKED:
        inside = inside & (r // n == c // n)
        r, c = r % n, c % n
    if HAS_BIAS:
        at = Bias + h * stride_bh + r * stride_bm + c * stride_bn
        return tl.load(at, mask=inside, other=float("-inf")).to(tl.float32) * LOG2E
    return tl.where(inside, 0.0, float("-inf"))


@triton.jit
def scores(a, b, bias, region_a, region_b, qk_scale, SHIFTED: tl.constexpr):
    """A tile of base-2 scores a b^T, minus infinity where a query does not see a key."""
    s = tl.dot(a, tl.trans(b), input_precision="ieee") * qk_scale + bias
    if SHIFTED:
        s = tl.where(region_a == region_b, s, float("-inf"))
    return s


@triton.jit(do_not_specialize=[*SIZES, "pack"])
def forward_kernel(
    Q, K, V, Bias, Places, Out, Rows,
    stride_qb, stride_qy, stride_qx, stride_qh, stride_kb, stride_ky, stride_kx, stride_kh,
    stride_vb, stride_vy, stride_vx, stride_vh, stride_bh, stride_bm, stride_bn,
    image, width, heads, n, windows,
    qk_scale, pack,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr, SHIFTED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head against the keys of their window, or of `pack` small windows."""
    blocks, groups = tl.cdiv(pack * n, BLOCK_M), tl.cdiv(windows, pack)
    pid = tl.program_id(0)
    h, rest = (pid % heads).to(tl.int64), pid // heads
    m, rest = rest % blocks * BLOCK_M, rest // blocks
    window, b = rest % groups * pack, (rest // groups).to(tl.int64)
    rows = tl.minimum(pack, windows - window) * n  # the last group may be smaller
    r = m + tl.arange(0, BLOCK_M)
    in_r = r < rows
    y, x, region_r = place(Places, window * n, r, in_r)
    q = tile(Q + b * stride_qb + h * stride_qh, y, x, stride_qy, stride_qx, in_r, D, BLOCK_D)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, rows, BLOCK_N):
        c = start + tl.arange(0, BLOCK_N)
        in_c = c < rows
        yc, xc, region_c = place(Places, window * n, c, in_c)
        k = tile(K + b * stride_kb + h * stride_kh, yc, xc, stride_ky, stride_kx, in_c, D, BLOCK_D)
        bias = bias_tile(
            Bias, h, r[:, None], c[None, :], n, rows, stride_bh, stride_bm, stride_bn, HAS_BIAS, PACKED
        )
        s = scores(q, k, bias, region_r[:, None], region_c[None, :], qk_scale, SHIFTED)
        new_top = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing seen yet: no -inf minus -inf
        p = tl.exp2(s - shift[:, None])
        shrink = tl.exp2(top - shift)
        total = total * shrink + tl.sum(p, 1)
        v = tile(V + b * stride_vb + h * stride_vh, yc, xc, stride_vy, stride_vx, in_c, D, BLOCK_D)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = new_top

    # A row without keys has total 0 and acc 0: its output is 0, and a share of 0 keeps its weights 0.
    empty = total == 0.0
    share = 1.0 / tl.where(empty, 1.0, total)
    spot = y * width + x
    row = Rows + 2 * ((b * heads + h) * image + spot)
    tl.store(row, tl.where(empty, 0.0, top), mask=in_r)
    tl.store(row + 1, tl.where(empty, 0.0, share), mask=in_r)
    out = Out + (b * image * heads + h) * D
    store_tile(out, spot, heads * D, in_r, acc * share[:, None], D, BLOCK_D)


@triton.jit
def rows_of(Rows, start, spot, inside):
    """What the forward kept of rows: the largest base-2 score, and one over the sum."""
    row = Rows + 2 * (start + spot)
    return tl.load(row, mask=inside, other=0.0), tl.load(row + 1, mask=inside, other=0.0)


@triton.jit(do_not_specialize=[*SIZES, "pack", "groups", "steps"])
def small_kernel(
    Q, K, V, Bias, Places, Rows, Grad, DQ, DK, DV, DBias,
    stride_qb, stride_qy, stride_qx, stride_qh, stride_kb, stride_ky, stride_kx, stride_kh,
    stride_vb, stride_vy, stride_vx, stride_vh, stride_gb, stride_gy, stride_gx, stride_gh,
    stride_bh, stride_bm, stride_bn,
    image, width, heads, n, windows,
    qk_scale, pack, groups, steps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr, SHIFTED: tl.constexpr, PACKED: tl.constexpr, OF_BIAS: tl.constexpr,
):  # fmt: skip
    """All gradients of windows that fit a tile: `steps` groups of `pack` windows of one head, one by one.

    `groups` counts those of all images. The bias gradient is summed over the program's windows and written
    beside the other programs' sums, `[programs a head, heads, BLOCK, BLOCK]`, a pack's on the diagonal.
    """
    pid = tl.program_id(0)
    h, split = (pid % heads).to(tl.int64), pid // heads
    each = tl.cdiv(windows, pack)
    r = tl.arange(0, BLOCK)
    r2, c2 = r[:, None], r[None, :]
    bias = bias_tile(Bias, h, r2, c2, n, pack * n, stride_bh, stride_bm, stride_bn, HAS_BIAS, PACKED)
    dbias = tl.zeros([BLOCK, BLOCK], tl.float32)
    for group in range(split * steps, tl.minimum((split + 1) * steps, groups)):
        window, b = group % each * pack, (group // each).to(tl.int64)
        rows = tl.minimum(pack, windows - window) * n
        inside = r < rows
        y, x, region = place(Places, window * n, r, inside)
        q = tile(Q + b * stride_qb + h * stride_qh, y, x, stride_qy, stride_qx, inside, D, BLOCK_D)
        k = tile(K + b * stride_kb + h * stride_kh, y, x, stride_ky, stride_kx, inside, D, BLOCK_D)
        s = scores(q, k, bias, region[:, None], region[None, :], qk_scale, SHIFTED)
        spot = y * width + x
        top, share = rows_of(Rows, (b * heads + h) * image, spot, inside)
        p = tl.exp2(s - top[:, None]) * share[:, None]
        grad = tile(Grad + b * stride_gb + h * stride_gh, y, x, stride_gy, stride_gx, inside, D, BLOCK_D)
        start = (b * image * heads + h) * D
        dv = tl.dot(tl.trans(p.to(grad.dtype)), grad, input_precision="ieee")
        store_tile(DV + start, spot, heads * D, inside, dv, D, BLOCK_D)
        v = tile(V + b * stride_vb + h * stride_vh, y, x, stride_vy, stride_vx, inside, D, BLOCK_D)
        dp = tl.dot(grad, tl.trans(v), input_precision="ieee")
        ds = p * (dp - tl.sum(p * dp, 1)[:, None])
        if OF_BIAS:
            dbias += ds
        ds = ds.to(q.dtype)
        dq = tl.dot(ds, k, input_precision="ieee") * (qk_scale * LN2)
        store_tile(DQ + start, spot, heads * D, inside, dq, D, BLOCK_D)
        dk = tl.dot(tl.trans(ds), q, input_precision="ieee") * (qk_scale * LN2)
        store_tile(DK + start, spot, heads * D, inside, dk, D, BLOCK_D)
    if OF_BIAS:
        out = DBias + (split * heads + h) * BLOCK * BLOCK + r2 * BLOCK + c2
        tl.store(out, dbias)


@triton.jit
def score_gradient(
    a, b, da, db, bias, top, share, delta, region_a, region_b, qk_scale, SHIFTED: tl.constexpr
):  # fmt: skip
    """The weights of a tile with scores a b^T and gradients da db^T, and the gradient of its scores."""
    p = tl.exp2(scores(a, b, bias, region_a, region_b, qk_scale, SHIFTED) - top) * share
    dp = tl.dot(da, tl.trans(db), input_precision="ieee")
    return p, p * (dp - delta)


@triton.jit(do_not_specialize=SIZES)
def key_kernel(
    Q, K, V, Bias, Places, Out, Rows, Grad, DK, DV,
    stride_qb, stride_qy, stride_qx, stride_qh, stride_kb, stride_ky, stride_kx, stride_kh,
    stride_vb, stride_vy, stride_vx, stride_vh, stride_gb, stride_gy, stride_gx, stride_gh,
    stride_bh, stride_bm, stride_bn,
    image, width, heads, n, windows,
    qk_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """The gradients of one block of a window's keys and values, over its queries in order.

    Tiles are transposed, `[BLOCK_N, BLOCK_M]`, so that weights are the left operand of their product.
    """
    blocks = tl.cdiv(n, BLOCK_N)
    pid = tl.program_id(0)
    h, rest = (pid % heads).to(tl.int64), pid // heads
    c, rest = rest % blocks * BLOCK_N + tl.arange(0, BLOCK_N), rest // blocks
    window, b = rest % windows, (rest // windows).to(tl.int64)
    in_c = c < n
    yc, xc, region_c = place(Places, window * n, c, in_c)
    k = tile(K + b * stride_kb + h * stride_kh, yc, xc, stride_ky, stride_kx, in_c, D, BLOCK_D)
    v = tile(V + b * stride_vb + h * stride_vh, yc, xc, stride_vy, stride_vx, in_c, D, BLOCK_D)
    start = (b * image * heads + h) * D
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for m in range(0, n, BLOCK_M):
        r = m + tl.arange(0, BLOCK_M)
        in_r = r < n
        y, x, region_r = place(Places, window * n, r, in_r)
        q = tile(Q + b * stride_qb + h * stride_qh, y, x, stride_qy, stride_qx, in_r, D, BLOCK_D)
        grad = tile(Grad + b * stride_gb + h * stride_gh, y, x, stride_gy, stride_gx, in_r, D, BLOCK_D)
        out = tile(Out + start, y, x, width * heads * D, heads * D, in_r, D, BLOCK_D)
        delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
        top, share = rows_of(Rows, (b * heads + h) * image, y * width + x, in_r)
        bias = bias_tile(
            Bias, h, r[None, :], c[:, None], n, n, stride_bh, stride_bm, stride_bn, HAS_BIAS, False
        )
        p, ds = score_gradient(
            k, q, v, grad, bias, top[None, :], share[None, :], delta[None, :], region_c[:, None],
            region_r[None, :], qk_scale, SHIFTED,
        )  # fmt: skip
        dv += tl.dot(p.to(grad.dtype), grad, input_precision="ieee")
        dk += tl.dot(ds.to(q.dtype), q, input_precision="ieee")
    spot = yc * width + xc
    store_tile(DK + start, spot, heads * D, in_c, dk * (qk_scale * LN2), D, BLOCK_D)
    store_tile(DV + start, spot, heads * D, in_c, dv, D, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def query_kernel(
    Q, K, V, Bias, Places, Out, Rows, Grad, DQ,
    stride_qb, stride_qy, stride_qx, stride_qh, stride_kb, stride_ky, stride_kx, stride_kh,
    stride_vb, stride_vy, stride_vx, stride_vh, stride_gb, stride_gy, stride_gx, stride_gh,
    stride_bh, stride_bm, stride_bn,
    image, width, heads, n, windows,
    qk_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """The gradient of one block of a window's queries, over its keys in order."""
    blocks = tl.cdiv(n, BLOCK_M)
    pid = tl.program_id(0)
    h, rest = (pid % heads).to(tl.int64), pid // heads
    r, rest = rest % blocks * BLOCK_M + tl.arange(0, BLOCK_M), rest // blocks
    window, b = rest % windows, (rest // windows).to(tl.int64)
    in_r = r < n
    y, x, region_r = place(Places, window * n, r, in_r)
    q = tile(Q + b * stride_qb + h * stride_qh, y, x, stride_qy, stride_qx, in_r, D, BLOCK_D)
    grad = tile(Grad + b * stride_gb + h * stride_gh, y, x, stride_gy, stride_gx, in_r, D, BLOCK_D)
    start = (b * image * heads + h) * D
    out = tile(Out + start, y, x, width * heads * D, heads * D, in_r, D, BLOCK_D)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    top, share = rows_of(Rows, (b * heads + h) * image, y * width + x, in_r)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for j in range(0, n, BLOCK_N):
        c = j + tl.arange(0, BLOCK_N)
        in_c = c < n
        yc, xc, region_c = place(Places, window * n, c, in_c)
        k = tile(K + b * stride_kb + h * stride_kh, yc, xc, stride_ky, stride_kx, in_c, D, BLOCK_D)
        v = tile(V + b * stride_vb + h * stride_vh, yc, xc, stride_vy, stride_vx, in_c, D, BLOCK_D)
        bias = bias_tile(
            Bias, h, r[:, None], c[None, :], n, n, stride_bh, stride_bm, stride_bn, HAS_BIAS, False
        )
        _, ds = score_gradient(
            q, k, grad, v, bias, top[:, None], share[:, None], delta[:, None], region_r[:, None],
            region_c[None, :], qk_scale, SHIFTED,
        )  # fmt: skip
        dq += tl.dot(ds.to(k.dtype), k, input_precision="ieee")
    store_tile(DQ + start, y * width + x, heads * D, in_r, dq * (qk_scale * LN2), D, BLOCK_D)


@triton.jit(do_not_specialize=[*SIZES, "total", "steps"])
def bias_kernel(
    Q, K, V, Bias, Places, Out, Rows, Grad, DBias,
    stride_qb, stride_qy, stride_qx, stride_qh, stride_kb, stride_ky, stride_kx, stride_kh,
    stride_vb, stride_vy, stride_vx, stride_vh, stride_gb, stride_gy, stride_gx, stride_gh,
    stride_bh, stride_bm, stride_bn,
    image, width, heads, n, windows,
    qk_scale, total, steps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """One tile of the bias gradient, summed over `steps` of all `total` windows; `[splits, heads, n, n]`."""
    tiles_m, tiles_n = tl.cdiv(n, BLOCK_M), tl.cdiv(n, BLOCK_N)
    pid = tl.program_id(0)
    h, rest = (pid % heads).to(tl.int64), pid // heads
    c, rest = rest % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N), rest // tiles_n
    r, split = rest % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M), rest // tiles_m
    in_r, in_c = r < n, c < n
    bias = bias_tile(Bias, h, r[:, None], c[None, :], n, n, stride_bh, stride_bm, stride_bn, HAS_BIAS, False)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(split * steps, tl.minimum((split + 1) * steps, total)):
        window, b = step % windows, (step // windows).to(tl.int64)
        y, x, region_r = place(Places, window * n, r, in_r)
        yc, xc, region_c = place(Places, window * n, c, in_c)
        q = tile(Q + b * stride_qb + h * stride_qh, y, x, stride_qy, stride_qx, in_r, D, BLOCK_D)
        grad = tile(Grad + b * stride_gb + h * stride_gh, y, x, stride_gy, stride_gx, in_r, D, BLOCK_D)
        out = tile(Out + (b * image * heads + h) * D, y, x, width * heads * D, heads * D, in_r, D, BLOCK_D)
        delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
        top, share = rows_of(Rows, (b * heads + h) * image, y * width + x, in_r)
        k = tile(K + b * stride_kb + h * stride_kh, yc, xc, stride_ky, stride_kx, in_c, D, BLOCK_D)
        v = tile(V + b * stride_vb + h * stride_vh, yc, xc, stride_vy, stride_vx, in_c, D, BLOCK_D)
        _, ds = score_gradient(
            q, k, grad, v, bias, top[:, None], share[:, None], delta[:, None], region_r[:, None],
            region_c[None, :], qk_scale, SHIFTED,
        )  # fmt: skip
        acc += ds
    out = DBias + (split * heads + h) * n * n + r[:, None] * n + c[None, :]
    tl.store(out, acc, mask=in_r[:, None] & in_c[None, :])
