"""What window attention does between its products, as loops that numba compiles.

Images come as their whole storage with the strides, in elements; a head's D numbers lie side by side.
"""

# Arrays are numpy's, with types that numba infers.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numpy as np

from manyheads.core.jit import exp, inline, kernel


@inline
def _copy(image, token, stride_h, out, w, i):
    for h in range(out.shape[1]):
        row = token + h * stride_h
        for d in range(out.shape[3]):
            out[w, h, i, d] = image[row + d]


@kernel
def take(image, stride_y, stride_x, stride_h, index, width, out):
    """Gather tokens `[windows, n]` of an image into the first n of `out` `[windows, heads, m, D]`."""
    windows, n = index.shape
    for w in range(windows):
        for i in range(n):
            token = index[w, i] // width * stride_y + index[w, i] % width * stride_x
            _copy(image, token, stride_h, out, w, i)


@kernel
def take_three(q, k, v, stride_y, stride_x, stride_h, index, width, out_q, out_k, out_v):
    """Gather from three images of the same strides: where they lie together, memory is read in long runs."""
    windows, n = index.shape
    for w in range(windows):
        for i in range(n):
            token = index[w, i] // width * stride_y + index[w, i] % width * stride_x
            _copy(q, token, stride_h, out_q, w, i)
            _copy(k, token, stride_h, out_k, w, i)
            _copy(v, token, stride_h, out_v, w, i)


@kernel
def put(blocks, index, first, out):
    """Write the first n tokens of `[windows, heads, m, D]` to their places in `out` `[H * W, heads, D]`.

    The block's heads are those from `first` on.
    """
    windows, n = index.shape
    heads, dim = blocks.shape[1], blocks.shape[3]
    for w in range(windows):
        for i in range(n):
            token = index[w, i]
            for h in range(heads):
                for d in range(dim):
                    out[token, first + h, d] = blocks[w, h, i, d]


@kernel
def softmax(scores, bias, region, plain, scale):
    """Turn products `[windows, heads, n, m]` into weights, in place; keys from n to m are padding.

    The bias is `[heads, n, m]`, minus infinity in the padding, and m a multiple of 16. Only windows from
    `plain` on have several regions, `[windows, m]`. A row whose scores are all minus infinity gets zeros.
    """
    windows, heads, n, m = scores.shape
    hidden = np.float32(-np.inf)
    row, most = np.empty(m, np.float32), np.empty(16, np.float32)
    for w in range(windows):
        for h in range(heads):
            for i in range(n):
                for j in range(m):
                    row[j] = scores[w, h, i, j] * scale + bias[h, i, j]
                if w >= plain:
                    own = region[w, i]
                    for j in range(m):
                        row[j] = row[j] if region[w, j] == own else hidden
                # A running maximum is no vector operation to the compiler, sixteen side by side are.
                for j in range(16):
                    most[j] = row[j]
                for c in range(16, m, 16):
                    for j in range(16):
                        most[j] = row[c + j] if row[c + j] > most[j] else most[j]
                top = hidden
                for j in range(16):
                    top = most[j] if most[j] > top else top
                # Nothing above minus infinity: exp(-inf - 0) is zero, and NaN stays NaN.
                top = np.float32(0.0) if top == hidden else top
                total = np.float32(0.0)
                for j in range(m):
                    row[j] = exp(row[j] - top)
                    total += row[j]
                share = np.float32(1.0) / (np.float32(1.0) if total == np.float32(0.0) else total)
                for j in range(m):
                    scores[w, h, i, j] = row[j] * share


@kernel
def gradient(weights, grad, dbias, scale):
    """Turn the weights' gradient `[windows, heads, n, m]`, in place, into that of the products.

    That of the scores is added to `dbias` `[heads, n, m]`.
    """
    windows, heads, n, m = weights.shape
    for w in range(windows):
        for h in range(heads):
            for i in range(n):
                delta = np.float32(0.0)
                for j in range(m):
                    delta += weights[w, h, i, j] * grad[w, h, i, j]
                for j in range(m):
                    found = weights[w, h, i, j] * (grad[w, h, i, j] - delta)
                    dbias[h, i, j] += found
                    grad[w, h, i, j] = found * scale
