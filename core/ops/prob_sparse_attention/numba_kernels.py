"""The steps between ProbSparse attention's products as compiled loops: one pass each, without temporaries.

`heads` is how many heads of a sample lie in a row of the matrices: matrix n is of head n % heads of sample
n // heads. Inputs `[B, L, H, D]` come as their whole storage with the strides of B, L and H, in elements.
"""

# Arrays are numpy's, with types that numba infers.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numpy as np

from manyheads.core.jit import exp, inline, kernel

LANES = 16


# Rows are handed on as slices: an index that is a sum could count from the end, and its loop is no vector's.


@inline
def add(x, total):
    """Add a row to another."""
    for d in range(len(total)):
        total[d] += x[d]


@inline
def copy(x, out):
    """Copy a row."""
    for d in range(len(out)):
        out[d] = x[d]


@inline
def join(x, y, out):
    """Write the sum of two rows."""
    for d in range(len(out)):
        out[d] = x[d] + y[d]


@inline
def add_four(x, w, u, first, second):
    """Add four rows, by two rows' weights, to the sums of both."""
    a, b, c, d = x[0], x[1], x[2], x[3]
    wa, wb, wc, wd = w[0], w[1], w[2], w[3]
    ua, ub, uc, ud = u[0], u[1], u[2], u[3]
    for i in range(len(first)):
        first[i] += wa * a[i] + wb * b[i] + wc * c[i] + wd * d[i]
        second[i] += ua * a[i] + ub * b[i] + uc * c[i] + ud * d[i]


@inline
def add_weighted(x, weight, total):
    """Add a weighted row to another."""
    for d in range(len(total)):
        total[d] += weight * x[d]


@inline
def put(rows, chosen, heads, b, first_b, first_d, out):
    """Write the rows `[n, u, D]` of a block's sample b to their positions in `[B, L, H * D]`."""
    dim = rows.shape[2]
    for h in range(heads):
        n, start = b * heads + h, first_d + h * dim
        for r in range(rows.shape[1]):
            copy(rows[n, r], out[first_b + b, chosen[n, r], start : start + dim])


@kernel
def measure(products, picks, out):
    """Write each query's largest picked product less the picked ones' sum over the number of keys.

    Products are `[n, Lq, Lk]`, picks `[Lq, U]` with U > 0, unsigned (of a signed one the loop asks whether it
    counts from the end), and the result is `[n, Lq]`.
    """
    matrices, queries, keys = products.shape
    share = np.float32(1.0) / np.float32(keys)
    for n in range(matrices):
        for i in range(queries):
            row, pick = products[n, i], picks[i]
            top = total = row[pick[0]]
            for s in range(1, len(pick)):
                x = row[pick[s]]
                total += x  # NaN shows here: the maximum passes over it
                top = x if x > top else top
            out[n, i] = top - total * share


@kernel
def choose(measures, chosen):
    """Write which are the u largest of each row `[n, L]`, `[n, u]`; tell whether there was but one choice.

    Equal numbers on both sides of the border, and NaN, leave a choice: that is `topk`'s. It costs L^2 steps a
    row, all vectors and no branch, next to the products' L^2 D.
    """
    length, count = measures.shape[1], chosen.shape[1]
    above, found = np.empty(length, np.int32), np.empty(length + 1, np.int64)
    for n in range(len(measures)):
        row = measures[n]
        above[:] = 0
        for j in range(0, length - 3, 4):
            a, b, c, d = row[j], row[j + 1], row[j + 2], row[j + 3]
            for i in range(length):
                x = row[i]
                above[i] += np.int32(a > x) + np.int32(b > x) + np.int32(c > x) + np.int32(d > x)
        for j in range(length - length % 4, length):
            for i in range(length):
                above[i] += np.int32(row[j] > row[i])
        number = 0
        for i in range(length):
            found[number] = i
            number += above[i] < count
        if number != count:
            return False
        for r in range(count):
            chosen[n, r] = found[r]
    return True


@kernel
def softmax(products, rows, last, scale, causal, out):
    """Write the weights `[n, u, Lk]` of some rows `[n, u]` of the products `[n, Lq, Lk]`.

    Where causal, a row sees keys up to `last` `[n, u]`.
    """
    matrices, count, keys = out.shape
    hidden = np.float32(-np.inf)
    row, most = np.empty(-(-keys // LANES) * LANES, np.float32), np.empty(LANES, np.float32)
    for n in range(matrices):
        for r in range(count):
            i = rows[n, r]
            seen = last[n, r] + 1 if causal else keys
            for j in range(seen):
                row[j] = products[n, i, j] * scale
            for j in range(seen, len(row)):
                row[j] = hidden
            # A running maximum is no vector operation to the compiler, sixteen side by side are.
            for j in range(LANES):
                most[j] = row[j]
            for c in range(LANES, len(row), LANES):
                for j in range(LANES):
                    most[j] = row[c + j] if row[c + j] > most[j] else most[j]
            top = hidden
            for j in range(LANES):
                top = most[j] if most[j] > top else top
            total = np.float32(0.0)
            for j in range(len(row)):
                row[j] = exp(row[j] - top)
                total += row[j]
            share = np.float32(1.0) / total
            for j in range(keys):
                out[n, r, j] = row[j] * share


@kernel
def softmax_backward(weights, grad, scale):
    """Turn the weights' gradient `[n, u, Lk]`, in place, into that of the products."""
    matrices, count, keys = weights.shape
    for n in range(matrices):
        for r in range(count):
            delta = np.float32(0.0)
            for j in range(keys):
                delta += weights[n, r, j] * grad[n, r, j]
            for j in range(keys):
                grad[n, r, j] = weights[n, r, j] * (grad[n, r, j] - delta) * scale


@kernel
def weigh(weights, v, stride_b, stride_l, stride_h, heads, out):
    """Multiply the weights `[n, u, Lk]` by the values into rows `[n, u, D]`."""
    matrices, count, keys = weights.shape
    dim, whole = out.shape[2], keys - keys % 4
    spare = np.zeros(dim, np.float32)
    values = np.empty((keys, dim), np.float32)  # a head's rows are far apart, and displace each other
    for n in range(matrices):
        first = n // heads * stride_b + n % heads * stride_h
        for j in range(keys):
            start = first + j * stride_l
            copy(v[start : start + dim], values[j])
        out[n] = np.float32(0.0)
        for r in range(0, count, 2):
            # Two rows read a value together; of an odd number the last one does so twice, once into nothing.
            own, other = weights[n, r], weights[n, min(r + 1, count - 1)]
            total, more = out[n, r], (out[n, r + 1] if r + 1 < count else spare)
            for j in range(0, whole, 4):
                add_four(values[j : j + 4], own[j : j + 4], other[j : j + 4], total, more)
            for j in range(whole, keys):
                add_weighted(values[j], own[j], total)
                add_weighted(values[j], other[j], more)


@kernel
def rank(products, picks, measures, chosen):
    """Measure the queries and choose; as `measure` and `choose`."""
    measure(products, picks, measures)
    return choose(measures, chosen)


@kernel
def finish(
    products, scale, weights, v, stride_b, stride_l, stride_h, keys, heads, causal, chosen, rows,
    first_b, first_d, out,
):  # fmt: skip
    """Go from products to the result, where all queries' are there; as `softmax`, `weigh` and `fill`."""
    softmax(products, chosen, chosen, scale, causal, weights)
    weigh(weights, v, stride_b, stride_l, stride_h, heads, rows)
    fill(v, stride_b, stride_l, stride_h, keys, heads, causal, chosen, rows, first_b, first_d, out)


@kernel
def take(x, stride_b, stride_l, stride_h, heads, chosen, out):
    """Gather the chosen rows `[n, u]` of an input into `[n, u, D]`."""
    matrices, count, dim = out.shape
    for n in range(matrices):
        for r in range(count):
            start = n // heads * stride_b + chosen[n, r] * stride_l + n % heads * stride_h
            copy(x[start : start + dim], out[n, r])


@kernel
def fill(v, stride_b, stride_l, stride_h, keys, heads, causal, chosen, rows, first_b, first_d, out):
    """Write a block of the result `[B, Lq, H * D]`, from the given sample and channel on.

    Chosen positions `[n, u]` get `rows` `[n, u, D]`, others the mean of v's `keys` rows, or, where causal,
    the sum up to their own.
    """
    queries, dim = out.shape[1], rows.shape[2]
    width = heads * dim
    # Heads that lie side by side are one run.
    run = width if stride_h == dim else dim
    total, mean = np.empty(width, np.float64), np.empty(width, np.float32)
    for b in range(len(chosen) // heads):
        total[:] = 0.0
        for i in range(keys):
            for first in range(0, width, run):
                start = b * stride_b + i * stride_l + first // dim * stride_h
                add(v[start : start + run], total[first : first + run])
            if causal:
                copy(total, out[first_b + b, i, first_d : first_d + width])
        if not causal:
            for d in range(width):
                mean[d] = total[d] / keys
            for i in range(queries):
                copy(mean, out[first_b + b, i, first_d : first_d + width])
        put(rows, chosen, heads, b, first_b, first_d, out)


@kernel
def fill_backward(
    dy,
    stride_b,
    stride_l,
    stride_h,
    heads,
    causal,
    chosen,
    q_rows,
    k_part,
    v_part,
    first_b,
    first_d,
    dq,
    dk,
    dv,
):
    """Write a block of the gradients `[B, L, H * D]`, from the given sample and channel on.

    `q_rows` `[n, u, D]` are dq's at the chosen positions, `k_part` `[n, Lk, D]` is dk, and `v_part` dv
    but for what comes from the positions that did not attend.
    """
    queries, (_, keys, dim) = dq.shape[1], k_part.shape
    width = heads * dim
    rest = np.empty((queries, heads), np.bool_)
    total = np.empty((heads, dim), np.float64)
    for b in range(len(chosen) // heads):
        rest[:] = True
        for h in range(heads):
            for r in range(chosen.shape[1]):
                rest[chosen[b * heads + h, r], h] = False
        total[:] = 0.0
        for back in range(queries):
            i = queries - 1 - back
            dq[first_b + b, i, first_d : first_d + width] = 0.0
            for h in range(heads):
                if rest[i, h]:
                    start = b * stride_b + i * stride_l + h * stride_h
                    add(dy[start : start + dim], total[h])
                if causal:
                    start = first_d + h * dim
                    join(v_part[b * heads + h, i], total[h], dv[first_b + b, i, start : start + dim])
        put(q_rows, chosen, heads, b, first_b, first_d, dq)
        if not causal:
            total /= keys
        for j in range(keys):
            for h in range(heads):
                n, start = b * heads + h, first_d + h * dim
                copy(k_part[n, j], dk[first_b + b, j, start : start + dim])
                if not causal:
                    join(v_part[n, j], total[h], dv[first_b + b, j, start : start + dim])
