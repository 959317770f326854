"""A layer of the Graph Transformer in training, compiled by numba: one function either way, for all threads.

A batch norm waits for all rows, so that a pass is some phases: threads share out a phase's parts, then meet
(`core.crew`). A part is some pieces, each of them nodes and edges that follow one another. Where a batch is many
small graphs, pieces are closed: no edge leaves one. Then projections, attention and what follows it up to the
norm are one phase, and a piece goes through all of them while it lies in the second cache; else they are three.
Blocks of rows go through a step while they lie in the first (`core.rows`, `core.tiles`).

Sums are left a part at a time and added up in order: results do not depend on the number of threads. Nodes are
stream 0, edges stream 1, which has no rows in the node variant, nor on the way back where nobody looks at them.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import numpy as np

from manyheads.core.crew import meet, take
from manyheads.core.jit import kernel
from manyheads.core.ops.segment_attention import numba_kernels as attention
from manyheads.core.rows import (
    BLOCK,
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

PIECE = 768  # nodes and edges, from which a piece may end
LARGE = 4096  # a closed piece that is larger leaves threads idle
PARTS = 16
PHASES = 20  # slots of `core.crew`
attend, attend_into, attend_out = attention.forward, attention.backward_into, attention.backward_out


@kernel
def cut(source, target, nodes):
    """Cut a graph into pieces: where each one's nodes and edges begin `[pieces + 1, 2]`, whether all are closed."""
    edges = source.size
    lowest = np.empty(edges + 1, np.int64)  # node of the edges from here on
    lowest[edges] = nodes
    for e in range(edges - 1, -1, -1):
        lowest[e] = min(lowest[e + 1], source[e], target[e])
    cuts = np.zeros(((nodes + edges) // PIECE + 2, 2), np.int64)
    count, highest, largest = 0, -1, 0
    for e in range(1, edges + 1):
        highest = max(highest, source[e - 1], target[e - 1])
        rows = lowest[e] - cuts[count, 0] + e - cuts[count, 1]
        if highest < lowest[e] and (rows >= PIECE or e == edges):
            largest = max(largest, rows)
            count += 1
            cuts[count] = lowest[e], e
    if edges and largest <= LARGE:
        return cuts[: count + 1], True
    pieces = cuts.shape[0] - 1
    for i in range(1, pieces + 1):
        cuts[i] = nodes * i // pieces, edges * i // pieces
    return cuts, False


@kernel
def _piece(cuts, part, parts):
    """The first piece of a part."""
    return (cuts.shape[0] - 1) * part // parts


@kernel
def _view(room, at, rows, width):
    return room[at : at + rows * width].reshape(rows, width)


@kernel
def _both(room, at, rows, width):
    return _view(room, at, rows[0], width), _view(room, at + rows[0] * width, rows[1], width)


@kernel
def _pair(room, at, parts, rows, width):
    """Two of each part."""
    many = parts * rows * width
    first, second = room[at : at + many], room[at + many : at + 2 * many]
    return first.reshape(parts, rows, width), second.reshape(parts, rows, width)


@kernel
def _states(room, at, rows, width):
    """Queries, keys, values and edges, or their gradients."""
    many = rows[0] * width
    q, k = _view(room, at, rows[0], width), _view(room, at + many, rows[0], width)
    return q, k, *_both(room, at + 2 * many, rows, width)


@kernel
def _kept(room, rows, width, pairs, heads):
    """What the way back needs: projections, mixed, total, second; norms 1 and 2; logits, shares."""
    at, many = (3 * rows[0] + rows[1]) * width, (rows[0] + rows[1]) * width
    streams = _both(room, at, rows, width), _both(room, at + many, rows, width), _both(room, at + 2 * many, rows, width)
    at += 3 * many
    fours = (4, 4)
    norms = _both(room, at, fours, width), _both(room, at + 8 * width, fours, width)
    at += 16 * width
    logits = _view(room, at, pairs, heads)
    at += pairs * heads
    shares = room[at : at + 2 * rows[0] * heads].reshape(rows[0], 2, heads)
    return _states(room, 0, rows, width), streams, norms, (logits, shares)


@kernel
def forward(
    x, weights, biases, running, numbers, edges, options, heads, room, out, sums, counts, cuts, closed, slots,
    threads,
):  # fmt: skip
    """Give `out`, and in `room` what the way back needs.

    Tuples: x, out, sums (of each part) of the two streams; weights, turned, of Q, K, V and edges, then of both
    streams the output, the net's first and second layer; biases of these three, then gain and bias of both
    norms; running of means and variances; numbers of eps and momentum; edges of sources, targets, their order
    by target and where each begins; options of scale, clamp and eps.
    """
    rows, width = (x[0].shape[0], x[1].shape[0]), x[0].shape[1]
    projected, (mixed, total, second), norms, (logits, shares) = _kept(room, rows, width, edges[0].size, heads)
    inward, (norms1, norms2) = weights[:4], norms
    parts = counts.shape[1]
    part = take(slots, 0)
    while part < parts:
        first, last = _piece(cuts, part, parts), _piece(cuts, part + 1, parts)
        for s in range(2):
            counts[s, part] = cuts[last, s] - cuts[first, s]
        for piece in range(first, last):
            _project(x, inward, projected, cuts[piece], cuts[piece + 1])
            if closed:
                _attend(projected, mixed, edges, options, logits, shares, cuts[piece, 0], cuts[piece + 1, 0])
                _sum(x, mixed, weights, biases, total, sums, part, cuts[first], cuts[piece], cuts[piece + 1])
        part = take(slots, 0)
    meet(slots, 1, threads)
    if not closed:
        part = take(slots, 2)
        while part < parts:
            first, last = _piece(cuts, part, parts), _piece(cuts, part + 1, parts)
            _attend(projected, mixed, edges, options, logits, shares, cuts[first, 0], cuts[last, 0])
            part = take(slots, 2)
        meet(slots, 3, threads)
        part = take(slots, 4)
        while part < parts:
            first, last = _piece(cuts, part, parts), _piece(cuts, part + 1, parts)
            _sum(x, mixed, weights, biases, total, sums, part, cuts[first], cuts[first], cuts[last])
            part = take(slots, 4)
        meet(slots, 5, threads)
    _merge(slots, 6, sums, counts, numbers, 0, norms1, biases, running, threads)
    part = take(slots, 8)
    while part < parts:
        first, last = _piece(cuts, part, parts), _piece(cuts, part + 1, parts)
        for s in range(2):
            net = weights[6 + s], biases[2 + s], weights[8 + s], biases[4 + s]
            _inner(total[s], norms1[s], net, second[s], sums[s][part], cuts[first, s], cuts[last, s])
        part = take(slots, 8)
    meet(slots, 9, threads)
    _merge(slots, 10, sums, counts, numbers, 1, norms2, biases, running, threads)
    part = take(slots, 12)
    while part < parts:
        first, last = _piece(cuts, part, parts), _piece(cuts, part + 1, parts)
        for s in range(2):
            begin = cuts[first, s]
            normalise(second[s], begin, norms2[s], out[s], begin, cuts[last, s] - begin)
        part = take(slots, 12)


@kernel
def _project(x, weights, out, first, last):
    for t in range(4):
        s = 1 if t == 3 else 0
        for begin in range(first[s], last[s], BLOCK):
            rows = min(BLOCK, last[s] - begin)
            zero(out[t], begin, rows)
            add_product(x[s], begin, weights[t], out[t], begin, rows)


@kernel
def _attend(projected, mixed, edges, options, logits, shares, first, last):
    q, k, v, edge = projected
    attend(
        q, k, v, edge, edges[0], edges[1], edges[2], edges[3], options[0], options[1], options[2], mixed[0],
        mixed[1], logits, shares, first, last,
    )  # fmt: skip


@kernel
def _sum(x, y, weights, biases, total, sums, part, start, first, last):
    """`total = x + (y @ weight + bias)`, and its mean and squared distances from it."""
    for s in range(2):
        for begin in range(first[s], last[s], BLOCK):
            rows = min(BLOCK, last[s] - begin)
            fill(biases[s], total[s], begin, rows)
            add_product(y[s], begin, weights[4 + s], total[s], begin, rows)
            add(x[s], begin, total[s], begin, rows)
            measure(total[s], begin, rows, sums[s][part], begin - start[s])


@kernel
def _inner(total, norm, net, second, sums, first, last):
    """`z = norm(total)`, `hidden = relu(expand(z))`, `second = z + contract(hidden)`, measured likewise."""
    expand, expand_bias, contract, contract_bias = net
    z, hidden = np.empty((BLOCK, total.shape[1]), np.float32), np.empty((BLOCK, expand.shape[1]), np.float32)
    for begin in range(first, last, BLOCK):
        rows = min(BLOCK, last - begin)
        _hidden(total, begin, norm, expand, expand_bias, z, hidden, rows)
        fill(contract_bias, second, begin, rows)
        add_product(hidden, 0, contract, second, begin, rows)
        add(z, 0, second, begin, rows)
        measure(second, begin, rows, sums, begin - first)


@kernel
def _hidden(total, begin, norm, expand, bias, z, hidden, rows):
    """Both of a block of rows: made again on the way back, which is cheaper than to store and fetch them."""
    normalise(total, begin, norm, z, 0, rows)
    fill(bias, hidden, 0, rows)
    add_product(z, 0, expand, hidden, 0, rows)
    relu(hidden, 0, rows)


@kernel
def _merge(slots, phase, sums, counts, numbers, which, norms, biases, running, threads):
    """Both streams' means and deviations; then all threads go on."""
    s = take(slots, phase)
    while s < 2:
        if counts[s].sum():
            eps, momentum = numbers[s, which, 0], numbers[s, which, 1]
            at = 4 * s + 2 * which
            for c in range(norms[s].shape[1]):
                norms[s][2, c], norms[s][3, c] = biases[6 + 4 * which + s][c], biases[8 + 4 * which + s][c]
            merge(sums[s], counts[s], eps, momentum, norms[s], running[at], running[at + 1])
        s = take(slots, phase)
    meet(slots, phase + 1, threads)


@kernel
def _scratch(room, rows, states, width, wide, pairs, heads, parts):
    """Of the way back: gradients of z and mixed; of projections; of weights and logits; sums; dweights."""
    many = (rows[0] + rows[1]) * width
    dz, dmixed = _both(room, 0, rows, width), _both(room, many, rows, width)
    at = 2 * many
    dprojected = _states(room, at, states, width)
    at += (3 * states[0] + states[1]) * width
    sums = _pair(room, at, parts, 2, width)
    at += 4 * parts * width
    square, net = parts * width * width, parts * wide * width
    inward = _pair(room, at, parts, width, width), _pair(room, at + 2 * square, parts, width, width)
    outputs = _pair(room, at + 4 * square, parts, width, width)
    at += 6 * square
    expand, contract = _pair(room, at, parts, wide, width), _pair(room, at + 2 * net, parts, width, wide)
    at += 4 * net
    dweights = *inward[0], *inward[1], *outputs, *expand, *contract, *_pair(room, at, parts, 1, wide)
    at += 2 * parts * wide
    dlogits = _view(room, at, pairs, heads), _view(room, at + pairs * heads, pairs, heads)
    return dz, dmixed, dprojected, dlogits, sums, dweights


@kernel
def backward(
    grads, x, weights, biases, edges, options, heads, room, scratch, dx, totals, found, cuts, closed, slots,
    threads,
):  # fmt: skip
    """From the gradients of both streams' results to those of all else.

    Tuples as in `forward`, weights as the layers have them, then the net's first turned; biases of that one;
    edges with the order by source too; grads and dx of the streams; totals (sums and means) of both norms;
    found of the gradients of weights, as in `forward`, and of the net's first bias.
    """
    rows, width, wide = (x[0].shape[0], x[1].shape[0]), x[0].shape[1], weights[6].shape[0]
    pairs, parts = edges[0].size, min(PARTS, cuts.shape[0] - 1)
    projected, (mixed, total, second), (norms1, norms2), (logits, shares) = _kept(room, rows, width, pairs, heads)
    dz, dmixed, dprojected, dlogits, sums, dweights = _scratch(
        scratch, (grads[0].shape[0], grads[1].shape[0]), rows, width, wide, pairs, heads, parts
    )
    inward, outputs = weights[:4], weights[4:6]
    seen = 2 if grads[1].shape[0] else 1
    part = take(slots, 0)
    while part < parts:
        first, last = _piece(cuts, part, parts), _piece(cuts, part + 1, parts)
        for s in range(seen):
            clear(sums[s][part])
            for begin in range(cuts[first, s], cuts[last, s], BLOCK):
                rows = min(BLOCK, cuts[last, s] - begin)
                gradient_sums(grads[s], begin, second[s], begin, norms2[s], rows, sums[s][part])
        part = take(slots, 0)
    meet(slots, 1, threads)
    _totals(slots, 2, sums, grads, totals, 2, threads)
    part = take(slots, 4)
    while part < parts:
        first, last = _piece(cuts, part, parts), _piece(cuts, part + 1, parts)
        for t in range(12):
            clear(dweights[t][part])
        for s in range(seen):
            layers = weights[6 + s], weights[8 + s], weights[10 + s], biases[s]
            dlayers = dweights[6 + s][part], dweights[8 + s][part], dweights[10 + s][part]
            _inner_back(
                grads[s], second[s], norms2[s], totals[2 + s], total[s], norms1[s], layers, dz[s], sums[s][part],
                dlayers, cuts[first, s], cuts[last, s],
            )  # fmt: skip
        part = take(slots, 4)
    meet(slots, 5, threads)
    _totals(slots, 6, sums, grads, totals, 0, threads)
    part = take(slots, 8)
    while part < parts:
        first, last = _piece(cuts, part, parts), _piece(cuts, part + 1, parts)
        for piece in range(first, last):
            a, b = cuts[piece], cuts[piece + 1]
            _sum_back(dz, total, norms1, totals, mixed, outputs, dx, dmixed, dweights, part, seen, a, b)
            if closed:
                _into(projected, mixed, dmixed, edges, options, logits, shares, dprojected, dlogits, a[0], b[0])
                _out(projected, dmixed, edges, options, dprojected, dlogits, a[0], b[0])
                _project_back(x, dprojected, inward, dx, dweights, part, seen, a, b)
        part = take(slots, 8)
    meet(slots, 9, threads)
    if not closed:
        part = take(slots, 10)
        while part < parts:
            a, b = cuts[_piece(cuts, part, parts)], cuts[_piece(cuts, part + 1, parts)]
            _into(projected, mixed, dmixed, edges, options, logits, shares, dprojected, dlogits, a[0], b[0])
            part = take(slots, 10)
        meet(slots, 11, threads)
        part = take(slots, 12)
        while part < parts:
            a, b = cuts[_piece(cuts, part, parts)], cuts[_piece(cuts, part + 1, parts)]
            _out(projected, dmixed, edges, options, dprojected, dlogits, a[0], b[0])
            part = take(slots, 12)
        meet(slots, 13, threads)
        part = take(slots, 14)
        while part < parts:
            a, b = cuts[_piece(cuts, part, parts)], cuts[_piece(cuts, part + 1, parts)]
            _project_back(x, dprojected, inward, dx, dweights, part, seen, a, b)
            part = take(slots, 14)
        meet(slots, 15, threads)
    t = take(slots, 16)
    while t < len(found):
        _add_up(dweights[t], found[t])
        t = take(slots, 16)


@kernel
def _totals(slots, phase, sums, grads, totals, first, threads):
    """Both streams' sums of a norm's gradient over all parts, and means; then all threads go on."""
    s = take(slots, phase)
    while s < 2:
        if grads[s].shape[0]:
            total = totals[first + s]
            _add_up(sums[s], total)
            for c in range(total.shape[1]):
                for row in range(2):
                    total[2 + row, c] = total[row, c] / np.float32(grads[s].shape[0])
        s = take(slots, phase)
    meet(slots, phase + 1, threads)


@kernel
def _inner_back(grad, second, norm2, totals2, total, norm1, layers, dz, sums, dlayers, first, last):
    """Through the second norm and the net, to the first norm's output."""
    (expand, contract, turned, bias), (dexpand, dcontract, dbias) = layers, dlayers
    width, wide = contract.shape
    dsecond, z = np.empty((BLOCK, width), np.float32), np.empty((BLOCK, width), np.float32)
    dhidden, hidden = np.empty((BLOCK, wide), np.float32), np.empty((BLOCK, wide), np.float32)
    clear(sums)
    for begin in range(first, last, BLOCK):
        rows = min(BLOCK, last - begin)
        normalise_backward(grad, begin, second, norm2, totals2, dsecond, 0, rows)
        _hidden(total, begin, norm1, turned, bias, z, hidden, rows)
        add_outer(dsecond, 0, hidden, 0, dcontract, rows, 0, width)
        zero(dhidden, 0, rows)
        add_product(dsecond, 0, contract, dhidden, 0, rows)
        hide(dhidden, hidden, rows)
        column_sums(dhidden, 0, rows, dbias)
        add_outer(dhidden, 0, z, 0, dexpand, rows, 0, wide)
        zero(dz, begin, rows)
        add_product(dhidden, 0, expand, dz, begin, rows)
        add(dsecond, 0, dz, begin, rows)
        gradient_sums(dz, begin, total, begin, norm1, rows, sums)


@kernel
def _sum_back(dz, total, norms, totals, y, weights, dtotal, dy, dweights, part, seen, first, last):
    """Through the first norm, to x (whose gradient is the sum's) and through the projection to y."""
    for s in range(seen):
        for begin in range(first[s], last[s], BLOCK):
            rows = min(BLOCK, last[s] - begin)
            normalise_backward(dz[s], begin, total[s], norms[s], totals[s], dtotal[s], begin, rows)
            add_outer(dtotal[s], begin, y[s], begin, dweights[4 + s][part], rows, 0, total[s].shape[1])
            zero(dy[s], begin, rows)
            add_product(dtotal[s], begin, weights[s], dy[s], begin, rows)


@kernel
def _into(projected, mixed, dmixed, edges, options, logits, shares, dprojected, dlogits, first, last):
    (q, k, v, edge), (weights, dlogit) = projected, dlogits
    attend_into(
        dmixed[0], dmixed[1], q, k, v, edge, edges[0], edges[1], edges[2], edges[3], options[0], options[1],
        mixed[0], logits, shares, dprojected[0], dprojected[3], weights, dlogit, first, last,
    )  # fmt: skip


@kernel
def _out(projected, dmixed, edges, options, dprojected, dlogits, first, last):
    weights, dlogit = dlogits
    attend_out(
        dmixed[0], dmixed[1], projected[0], projected[3], edges[0], edges[1], edges[4], edges[5], options[0],
        weights, dlogit, dprojected[1], dprojected[2], first, last,
    )  # fmt: skip


@kernel
def _project_back(x, grads, weights, dx, dweights, part, seen, first, last):
    """Add to x's gradients; those of edges that nobody looked at begin here."""
    for t in range(4):
        s = 1 if t == 3 else 0
        for begin in range(first[s], last[s], BLOCK):
            rows = min(BLOCK, last[s] - begin)
            if s >= seen:
                zero(dx[s], begin, rows)
            add_product(grads[t], begin, weights[t], dx[s], begin, rows)
            add_outer(grads[t], begin, x[s], begin, dweights[t][part], rows, 0, grads[t].shape[1])


@kernel
def _add_up(parts, found):
    """The first rows of found are the sum of the parts."""
    for row in range(parts.shape[1]):
        for c in range(parts.shape[2]):
            found[row, c] = np.float32(0.0)
    for part in range(parts.shape[0]):
        for row in range(parts.shape[1]):
            for c in range(parts.shape[2]):
                found[row, c] += parts[part, row, c]
