"""Segment attention's loops, compiled by numba: edges by destination, and by source for what goes back to it.

A row is all heads of a node or an edge, H x D channels one after another. A part of the work is a range of
nodes; a node's edges are summed in their sorted order, so that results do not depend on the parts. Edges go
through in blocks whose rows stay in the cache, a step at a time over all of the block: the compiler makes
vectors of a long loop that writes one array and reads few, not of a sum over a short head.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# ruff: noqa: PLR0912

from __future__ import annotations

import numpy as np

from manyheads.core.jit import exp, kernel

_BLOCK = 32  # edges; two blocks of rows of 64 channels are 32 KiB


@kernel
def counting_sort(nodes, edges, starts):
    """Edge numbers sorted by their node, and where each node's begin; starts comes as zeros."""
    for e in range(nodes.size):
        starts[nodes[e] + 1] += 1
    for n in range(1, starts.size):
        starts[n] += starts[n - 1]
    place = starts[:-1].copy()
    for e in range(nodes.size):
        n = nodes[e]
        edges[place[n]] = e
        place[n] += 1


@kernel
def _sum_heads(rows, spare, count, dim):
    """Turn count x dim numbers into count sums, in place; spare is scratch."""
    width = count * dim
    while dim % 4 == 0:
        dim //= 4
        width //= 4
        for c in range(2 * width):
            spare[c] = rows[2 * c] + rows[2 * c + 1]
        for c in range(width):
            rows[c] = spare[2 * c] + spare[2 * c + 1]
    if dim % 2 == 0:
        dim //= 2
        width //= 2
        for c in range(width):
            spare[c] = rows[2 * c] + rows[2 * c + 1]
        for c in range(width):
            rows[c] = spare[c]
    if dim > 1:
        for g in range(count):
            total = rows[g * dim]
            for c in range(g * dim + 1, g * dim + dim):
                total += rows[c]
            rows[g] = total


@kernel
def _spread_heads(rows, spare, count, dim):
    """Turn count numbers into count x dim, each repeated dim times, in place; spare is scratch."""
    odd, quads = dim, 0
    while odd % 4 == 0:
        odd //= 4
        quads += 1
    double = odd % 2 == 0
    odd = odd // 2 if double else odd
    if odd > 1:
        for g in range(count - 1, -1, -1):
            value = rows[g]
            for c in range(g * odd, g * odd + odd):
                rows[c] = value
    width = count * odd
    if double:
        for c in range(width):
            spare[c] = rows[c]
        for c in range(width):
            rows[2 * c] = spare[c]
            rows[2 * c + 1] = spare[c]
        width *= 2
    for _ in range(quads):
        for c in range(width):
            spare[2 * c] = rows[c]
            spare[2 * c + 1] = rows[c]
        for c in range(2 * width):
            rows[2 * c] = spare[c]
            rows[2 * c + 1] = spare[c]
        width *= 4


@kernel
def forward(
    q, k, v, edge, source, target, into, start, scale, clamp, eps, out, product, logits, norm, first, last
):
    """Outputs, logits (before the clamp) and norm [N, 2, H] (maximum, 1 / sum) of the nodes first to last.

    edge and product may have no rows: no modulation, no edge output. clamp is infinite where there is none.
    """
    heads, width = logits.shape[1], q.shape[1]
    dim = width // heads
    modulated, wanted, clamped = edge.shape[0] > 0, product.shape[0] > 0, clamp < np.float32(np.inf)
    rows, spare = np.empty(_BLOCK * width, np.float32), np.empty(_BLOCK * width, np.float32)
    for i in range(first, last):
        for h in range(heads):
            norm[i, 0, h] = np.float32(0.0) if clamped else np.float32(-np.inf)
            norm[i, 1, h] = eps
        for c in range(width):
            out[i, c] = np.float32(0.0)
    for begin in range(start[first], start[last], _BLOCK):
        count = min(_BLOCK, start[last] - begin)
        for b in range(count):
            e = into[begin + b]
            i, j, at = target[e], source[e], b * width
            if modulated:
                for c in range(width):
                    rows[at + c] = q[i, c] * scale * k[j, c] * edge[e, c]
            else:
                for c in range(width):
                    rows[at + c] = q[i, c] * scale * k[j, c]
            if wanted:
                for c in range(width):
                    product[e, c] = rows[at + c]
        _sum_heads(rows, spare, count * heads, dim)
        for b in range(count):
            e = into[begin + b]
            for h in range(heads):
                logits[e, h] = rows[b * heads + h]
            if not clamped:
                i = target[e]
                for h in range(heads):
                    s = rows[b * heads + h]
                    norm[i, 0, h] = s if s > norm[i, 0, h] else norm[i, 0, h]
    for begin in range(start[first], start[last], _BLOCK):
        count = min(_BLOCK, start[last] - begin)
        for b in range(count):
            e = into[begin + b]
            i = target[e]
            for h in range(heads):
                s = logits[e, h]
                s = clamp if s > clamp else s
                s = -clamp if s < -clamp else s
                rows[b * heads + h] = exp(s - norm[i, 0, h])
            for h in range(heads):
                norm[i, 1, h] += rows[b * heads + h]
        _spread_heads(rows, spare, count * heads, dim)
        for b in range(count):
            e = into[begin + b]
            i, j, at = target[e], source[e], b * width
            for c in range(width):
                out[i, c] += rows[at + c] * v[j, c]
    for begin in range(first, last, _BLOCK):
        count = min(_BLOCK, last - begin)
        for b in range(count):
            i = begin + b
            found = start[i + 1] > start[i]
            for h in range(heads):
                norm[i, 1, h] = np.float32(1.0) / norm[i, 1, h] if found else np.float32(0.0)
                rows[b * heads + h] = norm[i, 1, h]
        _spread_heads(rows, spare, count * heads, dim)
        for b in range(count):
            for c in range(width):
                out[begin + b, c] *= rows[b * width + c]


@kernel
def backward_into(
    dout, dproduct, q, k, v, edge, source, target, into, start, scale, clamp, out, logits, norm,
    dq, dedge, weights, dlogits, first, last,
):  # fmt: skip
    """Gradients of the queries and edges of the nodes first to last; weights and logits' gradients [E, H]."""
    heads, width = logits.shape[1], q.shape[1]
    dim = width // heads
    modulated, given = edge.shape[0] > 0, dproduct.shape[0] > 0
    rows, spare = np.empty(_BLOCK * width, np.float32), np.empty(_BLOCK * width, np.float32)
    delta = np.empty((last - first, heads), np.float32)
    for begin in range(first, last, _BLOCK):
        count = min(_BLOCK, last - begin)
        for b in range(count):
            for c in range(width):
                rows[b * width + c] = dout[begin + b, c] * out[begin + b, c]
            for c in range(width):
                dq[begin + b, c] = np.float32(0.0)
        _sum_heads(rows, spare, count * heads, dim)
        for b in range(count):
            for h in range(heads):
                delta[begin + b - first, h] = rows[b * heads + h]
    for begin in range(start[first], start[last], _BLOCK):
        count = min(_BLOCK, start[last] - begin)
        for b in range(count):
            e = into[begin + b]
            i, j, at = target[e], source[e], b * width
            for c in range(width):
                rows[at + c] = dout[i, c] * v[j, c]
        _sum_heads(rows, spare, count * heads, dim)
        for b in range(count):
            e = into[begin + b]
            i = target[e]
            for h in range(heads):
                s = logits[e, h]
                s = clamp if s > clamp else s
                s = -clamp if s < -clamp else s
                weights[e, h] = exp(s - norm[i, 0, h]) * norm[i, 1, h]
            for h in range(heads):
                d = weights[e, h] * (rows[b * heads + h] - delta[i - first, h])
                rows[b * heads + h] = np.float32(0.0) if abs(logits[e, h]) > clamp else d
            for h in range(heads):
                dlogits[e, h] = rows[b * heads + h]
        _spread_heads(rows, spare, count * heads, dim)
        for b in range(count):
            e = into[begin + b]
            i, j, at = target[e], source[e], b * width
            if given:
                for c in range(width):
                    rows[at + c] = (rows[at + c] + dproduct[e, c]) * k[j, c]
            else:
                for c in range(width):
                    rows[at + c] *= k[j, c]
            if modulated:
                for c in range(width):
                    dedge[e, c] = rows[at + c] * scale * q[i, c]
                for c in range(width):
                    dq[i, c] += rows[at + c] * scale * edge[e, c]
            else:
                for c in range(width):
                    dq[i, c] += rows[at + c] * scale


@kernel
def backward_out(
    dout, dproduct, q, edge, source, target, out_edges, start, scale, weights, dlogits, dk, dv, first, last
):  # fmt: skip
    """Gradients of the keys and values of the nodes first to last."""
    heads, width = weights.shape[1], q.shape[1]
    dim = width // heads
    modulated, given = edge.shape[0] > 0, dproduct.shape[0] > 0
    rows, spare = np.empty(_BLOCK * width, np.float32), np.empty(_BLOCK * width, np.float32)
    for j in range(first, last):
        for c in range(width):
            dk[j, c] = np.float32(0.0)
        for c in range(width):
            dv[j, c] = np.float32(0.0)
    for begin in range(start[first], start[last], _BLOCK):
        count = min(_BLOCK, start[last] - begin)
        for b in range(count):
            for h in range(heads):
                rows[b * heads + h] = weights[out_edges[begin + b], h]
        _spread_heads(rows, spare, count * heads, dim)
        for b in range(count):
            e = out_edges[begin + b]
            i, j, at = target[e], source[e], b * width
            for c in range(width):
                dv[j, c] += rows[at + c] * dout[i, c]
        for b in range(count):
            for h in range(heads):
                rows[b * heads + h] = dlogits[out_edges[begin + b], h]
        _spread_heads(rows, spare, count * heads, dim)
        for b in range(count):
            e = out_edges[begin + b]
            i, j, at = target[e], source[e], b * width
            if given:
                for c in range(width):
                    rows[at + c] += dproduct[e, c]
            if modulated:
                for c in range(width):
                    rows[at + c] *= edge[e, c]
            for c in range(width):
                dk[j, c] += rows[at + c] * scale * q[i, c]
