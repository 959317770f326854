"""Layers of the Graph Transformer in training, compiled by numba: one function either way, for all threads.

A batch norm waits for all rows, so that a layer is some phases: threads share out a phase's parts, then
meet (`core.crew`). A part is some pieces, each of them nodes and edges that follow one another. Where a batch
is many small graphs, pieces are closed: no edge leaves one. Then projections, attention and what follows it
up to the norm are one phase, and a piece goes through all of them while it lies in the second cache; else
they are three. Blocks of rows go through a step while they lie in the first (`core.rows`, `core.tiles`).

Sums are left a part at a time and added up in order: results do not depend on the number of threads. Nodes
are stream 0, edges stream 1, which has no rows in the node variant, nor on the way back where nobody looks
at them. `graph_transformer_memory` says where everything lies.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import numpy as np

from manyheads.core.crew import APART, meet, take
from manyheads.core.jit import kernel
from manyheads.core.ops.segment_attention.numba_kernels import forward as attend
from manyheads.core.rows import (
    BLOCK,
    add,
    fill,
    measure,
    merge,
    normalise,
    relu,
    zero,
)
from manyheads.core.tiles import add_product
from manyheads.graph.models.graph_transformer_memory import kept, matrices, vectors

PIECE = 768  # nodes and edges, from which a piece may end
LARGE = 4096  # a closed piece that is larger leaves threads idle
PARTS = 16
PHASES = 20  # slots of `core.crew`, each layer


@kernel
def cut(source, target, nodes):
    """Cut a graph into pieces: where the nodes and edges of each begin; whether all are closed.

    Shape:
        source, target `[E]`; the result `[pieces + 1, 2]`.
    """
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
def ends(cuts, part, parts):
    """The first piece of a part, and the one behind it."""
    pieces = cuts.shape[0] - 1
    return pieces * part // parts, pieces * (part + 1) // parts


@kernel
def forward(
    h, e, flat, wide, running, numbers, edges, options, heads, rooms, out, sums, counts, cuts, closed, slots,
    threads,
):  # fmt: skip
    """Give `out` of both streams, and in each layer's room what the way back needs.

    Args:
        flat: The layers' parameters, a row each (`graph_transformer_memory`).
        running: Of each layer, stream and norm, its mean and variance.
        numbers: Of each likewise, eps and momentum.
        edges: Sources, targets, their order by target, and where each target's begin.
        options: Scale, clamp and eps.
    """
    x, rows, width, parts = (h, e), (h.shape[0], e.shape[0]), h.shape[1], counts.shape[1]
    second, norms = x, rooms[0, : 16 * width].reshape(4, 4, width)
    for layer in range(flat.shape[0]):
        here = slots[layer * PHASES * APART :]
        weights, biases = matrices(flat[layer], width, wide), vectors(flat[layer], width)
        before, norms2 = second, norms
        projected, (mixed, total, second, following), norms, turned, logits, shares = kept(
            rooms[layer], rows, width, wide, edges[0].size, heads
        )
        _turn(here, weights, turned, threads)
        previous = before, norms2, layer > 0
        attended = edges, options, projected, mixed, logits, shares
        _front(here, previous, x, turned[0], biases, attended, total, sums, counts, cuts, closed, threads)
        _merge(here, 8, sums, counts, numbers[layer], 0, norms, biases, running[layer], threads)
        nets = turned[1], weights[3], turned[2], biases
        _inners(here, total, norms, nets, second, sums, cuts, threads)
        _merge(here, 12, sums, counts, numbers[layer], 1, norms, biases, running[layer], threads)
        x = following
    part = take(slots, 14)
    while part < parts:
        first, last = ends(cuts, part, parts)
        _norm(second, norms, out, cuts[first], cuts[last])
        part = take(slots, 14)


@kernel
def _front(slots, previous, x, weights, biases, attended, total, sums, counts, cuts, closed, threads):
    """Up to the first norm: a piece at a time where pieces are closed."""
    parts, (before, norms, normed) = counts.shape[1], previous
    mixed = attended[3]
    part = take(slots, 2)
    while part < parts:
        first, last = ends(cuts, part, parts)
        for s in range(2):
            counts[s, part] = cuts[last, s] - cuts[first, s]
        for piece in range(first, last):
            a, b = cuts[piece], cuts[piece + 1]
            if normed:
                _norm(before, norms, x, a, b)
            _project(x, weights, attended[2], a, b)
            if closed:
                _attend(attended, a[0], b[0])
                _sum(x, mixed, weights, biases, total, sums, part, cuts[first], a, b)
        part = take(slots, 2)
    meet(slots, 3, threads)
    if closed:
        return
    for phase in (4, 6):
        part = take(slots, phase)
        while part < parts:
            first, last = ends(cuts, part, parts)
            a, b = cuts[first], cuts[last]
            if phase == 4:
                _attend(attended, a[0], b[0])
            else:
                _sum(x, mixed, weights, biases, total, sums, part, a, a, b)
            part = take(slots, phase)
        meet(slots, phase + 1, threads)


@kernel
def _inners(slots, total, norms, nets, second, sums, cuts, threads):
    """The first norm, and the net around which it is added."""
    parts, (expand, expand_bias, contract, biases) = sums[0].shape[0], nets
    part = take(slots, 10)
    while part < parts:
        first, last = ends(cuts, part, parts)
        for s in range(2):
            net = expand[s], expand_bias[s], contract[s], biases[2 + s]
            _inner(total[s], norms[s], net, second[s], sums[s][part], cuts[first, s], cuts[last, s])
        part = take(slots, 10)
    meet(slots, 11, threads)


@kernel
def _turn(slots, weights, turned, threads):
    t = take(slots, 0)
    while t < 10:
        if t < 6:
            _transpose(weights[0][t], turned[0][t])
        elif t < 8:
            _transpose(weights[1][t - 6], turned[1][t - 6])
        else:
            _transpose(weights[2][t - 8], turned[2][t - 8])
        t = take(slots, 0)
    meet(slots, 1, threads)


@kernel
def _transpose(x, out):
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            out[j, i] = x[i, j]


@kernel
def _norm(x, norms, out, first, last):
    for s in range(2):
        normalise(x[s], first[s], norms[2 + s], out[s], first[s], last[s] - first[s])


@kernel
def _project(x, weights, out, first, last):
    for t in range(4):
        s = 1 if t == 3 else 0
        for begin in range(first[s], last[s], BLOCK):
            rows = min(BLOCK, last[s] - begin)
            zero(out[t], begin, rows)
            add_product(x[s], begin, weights[t], out[t], begin, rows)


@kernel
def _attend(attended, first, last):
    edges, options, (q, k, v, edge), mixed, logits, shares = attended
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
        hidden_rows(total, begin, norm, expand, expand_bias, z, hidden, rows)
        fill(contract_bias, second, begin, rows)
        add_product(hidden, 0, contract, second, begin, rows)
        add(z, 0, second, begin, rows)
        measure(second, begin, rows, sums, begin - first)


@kernel
def hidden_rows(total, begin, norm, expand, bias, z, hidden, rows):
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
            norm = norms[2 * which + s]
            norm[2], norm[3] = biases[4 + 4 * which + s], biases[6 + 4 * which + s]
            mean, variance = running[s, which, 0], running[s, which, 1]
            merge(sums[s], counts[s], numbers[s, which, 0], numbers[s, which, 1], norm, mean, variance)
        s = take(slots, phase)
    meet(slots, phase + 1, threads)
