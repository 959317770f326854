"""A layer of the Graph Transformer in training, compiled by numba: one function either way, for all threads.

Nodes are stream 0, edges stream 1, which has no rows where there are none or nobody looks at them. A batch
norm and the attention wait for all rows, so that a pass is some phases: threads share out a phase's stripes of
rows or ranges of nodes, then meet (`core.crew`). Between two of them a block of rows goes through everything
while it lies in the cache (`core.rows`, `core.tiles`). Sums are left a stripe at a time and added up in order:
results do not depend on the number of threads.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import numpy as np

from manyheads.core.crew import meet, take
from manyheads.core.jit import kernel
from manyheads.core.ops.segment_attention import numba_kernels as attention
from manyheads.core.rows import (
    BLOCK,
    STRIPE,
    add,
    clear,
    column_sums,
    fill,
    gradient_sums,
    hide,
    measure,
    merge,
    normalise,
    normalise_backward,
    relu,
    zero,
)
from manyheads.core.tiles import add_outer, add_product

RANGE = 256  # nodes whose edges a thread takes at once
PHASES = 20  # slots of `core.crew`
attend, attend_into, attend_out = attention.forward, attention.backward_into, attention.backward_out


@kernel
def _stripes(x):
    return -(-x.shape[0] // STRIPE)


@kernel
def forward(
    x, inward, projected, mixed, edges, options, logits, shares, outputs, inner, norms1, norms2, running,
    numbers, total, hidden, second, out, parts, slots, threads,
):  # fmt: skip
    """Give `out`, and what the way back needs.

    Tuples: x, mixed, total, hidden, second, out, parts, norms1, norms2 of the two streams; inward of the
    turned weights of Q, K, V and the edges' projection, projected of what they give; edges of sources,
    targets, their order by target and where each begins; options of scale, clamp and eps; outputs of turned
    weights, biases; inner of both of the net's layers; running of means and variances; numbers of eps and
    momentum.
    """
    nodes, both = _stripes(x[0]), _stripes(x[0]) + _stripes(x[1])
    item = take(slots, 0)
    while item < both:
        if item < nodes:
            for t in range(3):
                _project(x[0], inward[t], projected[t], item)
        else:
            _project(x[1], inward[3], projected[3], item - nodes)
        item = take(slots, 0)
    meet(slots, 1, threads)
    count = x[0].shape[0]
    begin = take(slots, 2) * RANGE
    while begin < count:
        attend(
            projected[0], projected[1], projected[2], projected[3], edges[0], edges[1], edges[2], edges[3],
            options[0], options[1], options[2], mixed[0], mixed[1], logits, shares, begin,
            min(begin + RANGE, count),
        )  # fmt: skip
        begin = take(slots, 2) * RANGE
    meet(slots, 3, threads)
    item = take(slots, 4)
    while item < both:
        s, stripe = (0, item) if item < nodes else (1, item - nodes)
        _sum(x[s], mixed[s], outputs[s], outputs[2 + s], total[s], parts[s], stripe)
        item = take(slots, 4)
    meet(slots, 5, threads)
    _merge(slots, 6, parts, x, numbers, 0, norms1, running, threads)
    item = take(slots, 8)
    while item < both:
        s, stripe = (0, item) if item < nodes else (1, item - nodes)
        net = inner[s], inner[2 + s], inner[4 + s], inner[6 + s]
        _inner(total[s], norms1[s], net, hidden[s], second[s], parts[s], stripe)
        item = take(slots, 8)
    meet(slots, 9, threads)
    _merge(slots, 10, parts, x, numbers, 1, norms2, running, threads)
    item = take(slots, 12)
    while item < both:
        s, stripe = (0, item) if item < nodes else (1, item - nodes)
        begin, rows = stripe * STRIPE, min(STRIPE, x[s].shape[0] - stripe * STRIPE)
        normalise(second[s], begin, norms2[s], out[s], begin, rows)
        item = take(slots, 12)


@kernel
def _project(x, weight, out, stripe):
    begin, rows = stripe * STRIPE, min(STRIPE, x.shape[0] - stripe * STRIPE)
    zero(out, begin, rows)
    add_product(x, begin, weight, out, begin, rows)


@kernel
def _sum(x, y, weight, bias, total, parts, stripe):
    """`total = x + (y @ weight + bias)`, and its mean and squared distances from it."""
    end = min(stripe * STRIPE + STRIPE, total.shape[0])
    for begin in range(stripe * STRIPE, end, BLOCK):
        rows = min(BLOCK, end - begin)
        fill(bias, total, begin, rows)
        add_product(y, begin, weight, total, begin, rows)
        add(x, begin, total, begin, rows)
        measure(total, begin, rows, parts[stripe], begin - stripe * STRIPE)


@kernel
def _inner(total, norm, net, hidden, second, parts, stripe):
    """`z = norm(total)`, `hidden = relu(expand(z))`, `second = z + contract(hidden)`, measured likewise."""
    expand, expand_bias, contract, contract_bias = net
    z = np.empty((BLOCK, total.shape[1]), np.float32)
    end = min(stripe * STRIPE + STRIPE, total.shape[0])
    for begin in range(stripe * STRIPE, end, BLOCK):
        rows = min(BLOCK, end - begin)
        normalise(total, begin, norm, z, 0, rows)
        fill(expand_bias, hidden, begin, rows)
        add_product(z, 0, expand, hidden, begin, rows)
        relu(hidden, begin, rows)
        fill(contract_bias, second, begin, rows)
        add_product(hidden, begin, contract, second, begin, rows)
        add(z, 0, second, begin, rows)
        measure(second, begin, rows, parts[stripe], begin - stripe * STRIPE)


@kernel
def _merge(slots, phase, parts, x, numbers, which, norms, running, threads):
    """Both streams' means and deviations; then all threads go on."""
    s = take(slots, phase)
    while s < 2:
        if x[s].shape[0]:
            eps, momentum = numbers[s, which, 0], numbers[s, which, 1]
            at = 4 * s + 2 * which
            merge(parts[s], x[s].shape[0], eps, momentum, norms[s], running[at], running[at + 1])
        s = take(slots, phase)
    meet(slots, phase + 1, threads)


@kernel
def backward(
    grads, x, inward, projected, mixed, edges, options, logits, shares, outputs, inner, norms1, norms2, total,
    hidden, second, dz, dmixed, dprojected, weights, dlogits, dx, parts, sums, dweights, found, slots, threads,
):  # fmt: skip
    """From the gradients of both streams' results to those of all else.

    Tuples as in `forward`, weights as the layers have them, and edges with the order by source too; grads, dz,
    dmixed, dx, parts and sums (totals and means of both norms) of the streams; dprojected of Q, K, V and the
    edges; dweights of each stripe, found of their sums: Q, K, V, edges, then of both streams the output, the
    net's layers and its first bias.
    """
    nodes, both = _stripes(grads[0]), _stripes(grads[0]) + _stripes(grads[1])
    item = take(slots, 0)
    while item < both:
        s, stripe = (0, item) if item < nodes else (1, item - nodes)
        _sums_of_norm(grads[s], second[s], norms2[s], parts[s], stripe)
        item = take(slots, 0)
    meet(slots, 1, threads)
    _totals(slots, 2, parts, grads, sums, 2, threads)
    item = take(slots, 4)
    while item < both:
        s, stripe = (0, item) if item < nodes else (1, item - nodes)
        layers = inner[s], inner[2 + s]
        dlayers = dweights[6 + s], dweights[8 + s], dweights[10 + s]
        _inner_back(
            grads[s], second[s], norms2[s], sums[2 + s], hidden[s], total[s], norms1[s], layers, dz[s],
            parts[s], dlayers, stripe,
        )  # fmt: skip
        item = take(slots, 4)
    meet(slots, 5, threads)
    _totals(slots, 6, parts, grads, sums, 0, threads)
    item = take(slots, 8)
    while item < both:
        s, stripe = (0, item) if item < nodes else (1, item - nodes)
        _sum_back(
            dz[s], total[s], norms1[s], sums[s], mixed[s], outputs[s], dx[s], dmixed[s], dweights[4 + s], stripe
        )
        item = take(slots, 8)
    meet(slots, 9, threads)
    _attention_back(
        slots, 10, projected, mixed, dmixed, edges, options, logits, shares, dprojected, weights, dlogits, threads
    )
    nodes, both = _stripes(x[0]), _stripes(x[0]) + _stripes(x[1])
    item = take(slots, 14)
    while item < both:
        if item < nodes:
            for t in range(3):
                _project_back(x[0], dprojected[t], inward[t], dx[0], dweights[t], item)
        else:
            if grads[1].shape[0] == 0:  # nobody looked at the edges: no residual came back
                stripe = item - nodes
                zero(dx[1], stripe * STRIPE, min(STRIPE, x[1].shape[0] - stripe * STRIPE))
            _project_back(x[1], dprojected[3], inward[3], dx[1], dweights[3], item - nodes)
        item = take(slots, 14)
    meet(slots, 15, threads)
    t = take(slots, 16)
    while t < len(found):
        _add_up(dweights[t], found[t])
        t = take(slots, 16)


@kernel
def _sums_of_norm(grad, x, norm, parts, stripe):
    clear(parts[stripe])
    end = min(stripe * STRIPE + STRIPE, x.shape[0])
    for begin in range(stripe * STRIPE, end, BLOCK):
        gradient_sums(grad, begin, x, begin, norm, min(BLOCK, end - begin), parts[stripe])


@kernel
def _totals(slots, phase, parts, grads, sums, first, threads):
    """Both streams' sums of a norm's gradient over all stripes, and means; then all threads go on."""
    s = take(slots, phase)
    while s < 2:
        if grads[s].shape[0]:
            _add_up(parts[s], sums[first + s])
            for c in range(sums[first + s].shape[1]):
                for row in range(2):
                    sums[first + s][2 + row, c] = sums[first + s][row, c] / np.float32(grads[s].shape[0])
        s = take(slots, phase)
    meet(slots, phase + 1, threads)


@kernel
def _inner_back(grad, second, norm2, sums2, hidden, total, norm1, layers, dz, parts, dlayers, stripe):
    """Through the second norm and the net, to the first norm's output."""
    (expand, contract), (dexpand, dcontract, dbias) = layers, dlayers
    width, wide = total.shape[1], hidden.shape[1]
    dsecond, z = np.empty((BLOCK, width), np.float32), np.empty((BLOCK, width), np.float32)
    dhidden = np.empty((BLOCK, wide), np.float32)
    clear(parts[stripe])
    clear(dexpand[stripe])
    clear(dcontract[stripe])
    clear(dbias[stripe])
    end = min(stripe * STRIPE + STRIPE, total.shape[0])
    for begin in range(stripe * STRIPE, end, BLOCK):
        rows = min(BLOCK, end - begin)
        normalise_backward(grad, begin, second, norm2, sums2, dsecond, 0, rows)
        add_outer(dsecond, 0, hidden, begin, dcontract[stripe], rows, 0, width)
        zero(dhidden, 0, rows)
        add_product(dsecond, 0, contract, dhidden, 0, rows)
        hide(dhidden, hidden, begin, rows)
        column_sums(dhidden, 0, rows, dbias[stripe])
        normalise(total, begin, norm1, z, 0, rows)
        add_outer(dhidden, 0, z, 0, dexpand[stripe], rows, 0, wide)
        zero(dz, begin, rows)
        add_product(dhidden, 0, expand, dz, begin, rows)
        add(dsecond, 0, dz, begin, rows)
        gradient_sums(dz, begin, total, begin, norm1, rows, parts[stripe])


@kernel
def _sum_back(dz, total, norm, sums, y, weight, dtotal, dy, dweight, stripe):
    """Through the first norm, to x (whose gradient is the sum's) and through the projection to y."""
    clear(dweight[stripe])
    end = min(stripe * STRIPE + STRIPE, total.shape[0])
    for begin in range(stripe * STRIPE, end, BLOCK):
        rows = min(BLOCK, end - begin)
        normalise_backward(dz, begin, total, norm, sums, dtotal, begin, rows)
        add_outer(dtotal, begin, y, begin, dweight[stripe], rows, 0, total.shape[1])
        zero(dy, begin, rows)
        add_product(dtotal, begin, weight, dy, begin, rows)


@kernel
def _attention_back(
    slots, phase, projected, mixed, dmixed, edges, options, logits, shares, dprojected, weights, dlogits, threads
):  # fmt: skip
    count, (q, k, v, edge), (dq, dk, dv, dedge) = mixed[0].shape[0], projected, dprojected
    begin = take(slots, phase) * RANGE
    while begin < count:
        attend_into(
            dmixed[0], dmixed[1], q, k, v, edge, edges[0], edges[1], edges[2], edges[3], options[0], options[1],
            mixed[0], logits, shares, dq, dedge, weights, dlogits, begin, min(begin + RANGE, count),
        )  # fmt: skip
        begin = take(slots, phase) * RANGE
    meet(slots, phase + 1, threads)
    begin = take(slots, phase + 2) * RANGE
    while begin < count:
        attend_out(
            dmixed[0], dmixed[1], q, edge, edges[0], edges[1], edges[4], edges[5], options[0], weights, dlogits,
            dk, dv, begin, min(begin + RANGE, count),
        )  # fmt: skip
        begin = take(slots, phase + 2) * RANGE
    meet(slots, phase + 3, threads)


@kernel
def _project_back(x, grad, weight, dx, dweight, stripe):
    """Add to x's gradient."""
    clear(dweight[stripe])
    end = min(stripe * STRIPE + STRIPE, x.shape[0])
    for begin in range(stripe * STRIPE, end, BLOCK):
        rows = min(BLOCK, end - begin)
        add_product(grad, begin, weight, dx, begin, rows)
        add_outer(grad, begin, x, begin, dweight[stripe], rows, 0, grad.shape[1])


@kernel
def _add_up(parts, found):
    """The first rows of found are the sum of the stripes' parts."""
    for row in range(parts.shape[1]):
        for c in range(parts.shape[2]):
            found[row, c] = np.float32(0.0)
    for stripe in range(parts.shape[0]):
        for row in range(parts.shape[1]):
            for c in range(parts.shape[2]):
                found[row, c] += parts[stripe, row, c]
