"""The way back through the layers of the Graph Transformer, compiled by numba.

Phases, parts and pieces are those of `graph_transformer_kernels`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import numpy as np

from manyheads.core.crew import APART, meet, take
from manyheads.core.jit import kernel
from manyheads.core.ops.segment_attention.numba_kernels import backward_into, backward_out
from manyheads.core.rows import (
    BLOCK,
    add,
    clear,
    column_sums,
    gradient_sums,
    hide,
    normalise_backward,
    zero,
)
from manyheads.core.tiles import add_outer, add_product
from manyheads.graph.models.graph_transformer_kernels import PARTS, PHASES, ends, hidden_rows
from manyheads.graph.models.graph_transformer_memory import kept, matrices, scratch, vectors

SHARES = 32  # of the matrices, when parts are added up


@kernel
def backward(
    dh, de, h, e, flat, wide, edges, options, heads, rooms, room, dinputs, dflat, cuts, closed, slots, threads
):  # fmt: skip
    """From the gradients of both streams' results to `dinputs` and, in `dflat`, those of the parameters.

    Args as in `forward`, and edges with the order by source too; of edges that nobody looked at, de has no
    rows.
    """
    grads, rows, width = (dh, de), (h.shape[0], e.shape[0]), h.shape[1]
    pairs, parts = edges[0].size, min(PARTS, cuts.shape[0] - 1)
    dz, dmixed, dx, dprojected, sums, totals, dmatrices, dlogits = scratch(
        room, rows, width, wide, pairs, heads, parts
    )
    for layer in range(flat.shape[0] - 1, -1, -1):
        here = slots[layer * PHASES * APART :]
        weights = matrices(flat[layer], width, wide)
        projected, (mixed, total, second, _), norms, turned, logits, shares = kept(
            rooms[layer], rows, width, wide, pairs, heads
        )
        x, following = (h, e), dinputs
        if layer:
            x = kept(rooms[layer - 1], rows, width, wide, pairs, heads)[1][3]
            following = dx[layer % 2]
        _sums_of_norm(here, grads, second, norms, sums, cuts, threads)
        _totals(here, 2, sums, grads, totals, 2, threads)
        nets = weights[1], weights[2], turned[1], weights[3]
        _inners(here, grads, second, total, norms, totals, nets, dz, sums, dmatrices, cuts, threads)
        _totals(here, 6, sums, grads, totals, 0, threads)
        attended = edges, options, projected, mixed[0], logits, shares
        dattended = dmixed[0], dmixed[1][: grads[1].shape[0]], dprojected, dlogits
        sizes = width, wide, grads[1].shape[0] > 0
        _outers(
            here, x, dz, total, norms, totals, mixed, weights[0], following, dmixed, dprojected, dmatrices,
            sizes, attended, dattended, cuts, closed, threads,
        )  # fmt: skip
        _found(here, 16, dmatrices, totals, dflat[layer], width)
        grads = following


@kernel
def _sums_of_norm(slots, grads, second, norms, sums, cuts, threads):
    """Sums that the second norm's gradient needs, of each part."""
    parts = sums[0].shape[0]
    part = take(slots, 0)
    while part < parts:
        first, last = ends(cuts, part, parts)
        for s in range(2 if grads[1].shape[0] else 1):
            clear(sums[s][part])
            for begin in range(cuts[first, s], cuts[last, s], BLOCK):
                rows = min(BLOCK, cuts[last, s] - begin)
                gradient_sums(grads[s], begin, second[s], begin, norms[2 + s], rows, sums[s][part])
        part = take(slots, 0)
    meet(slots, 1, threads)


@kernel
def _inners(slots, grads, second, total, norms, totals, nets, dz, sums, dmatrices, cuts, threads):
    """Through the second norm and the net."""
    parts, (expand, contract, turned, bias) = sums[0].shape[0], nets
    part = take(slots, 4)
    while part < parts:
        first, last = ends(cuts, part, parts)
        dmatrices[part] = np.float32(0.0)
        _, dexpand, dcontract, dbias = matrices(dmatrices[part], expand.shape[2], expand.shape[1])
        for s in range(2 if grads[1].shape[0] else 1):
            _inner_back(
                grads[s], second[s], norms[2 + s], totals[2 + s], total[s], norms[s],
                (expand[s], contract[s], turned[s], bias[s]), dz[s], sums[s][part],
                (dexpand[s], dcontract[s], dbias[s : s + 1]), cuts[first, s], cuts[last, s],
            )  # fmt: skip
        part = take(slots, 4)
    meet(slots, 5, threads)


@kernel
def _outers(
    slots, x, dz, total, norms, totals, mixed, weights, dx, dmixed, dprojected, dmatrices, sizes, attended,
    dattended, cuts, closed, threads,
):  # fmt: skip
    """Through the first norm, attention and projections: a piece at a time where pieces are closed."""
    parts, (width, wide, seen) = dmatrices.shape[0], sizes
    part = take(slots, 8)
    while part < parts:
        first, last = ends(cuts, part, parts)
        dweights = matrices(dmatrices[part], width, wide)[0]
        for piece in range(first, last):
            a, b = cuts[piece], cuts[piece + 1]
            _sum_back(dz, total, norms, totals, mixed, weights, dx, dmixed, dweights, seen, a, b)
            if closed:
                _into(attended, dattended, a[0], b[0])
                _out(attended, dattended, a[0], b[0])
                _project_back(x, dprojected, weights, dx, dweights, seen, a, b)
        part = take(slots, 8)
    meet(slots, 9, threads)
    if closed:
        return
    for phase in (10, 12, 14):
        part = take(slots, phase)
        while part < parts:
            first, last = ends(cuts, part, parts)
            a, b = cuts[first], cuts[last]
            if phase == 10:
                _into(attended, dattended, a[0], b[0])
            elif phase == 12:
                _out(attended, dattended, a[0], b[0])
            else:
                dweights = matrices(dmatrices[part], width, wide)[0]
                _project_back(x, dprojected, weights, dx, dweights, seen, a, b)
            part = take(slots, phase)
        meet(slots, phase + 1, threads)


@kernel
def _found(slots, phase, dmatrices, totals, found, width):
    """A layer's gradients: of matrices, over all parts; of norms.

    A bias before a norm has none: the norm takes it off again.
    """
    many = dmatrices.shape[1]
    share = take(slots, phase)
    while share <= SHARES:
        if share < SHARES:
            first, last = many // 16 * share // SHARES * 16, many // 16 * (share + 1) // SHARES * 16
            found[first:last] = dmatrices[0, first:last]
            for part in range(1, dmatrices.shape[0]):
                found[first:last] += dmatrices[part, first:last]
        else:
            rows = vectors(found, width)
            rows[:4] = np.float32(0.0)
            for s in range(2):
                rows[4 + s], rows[6 + s] = totals[s, 1], totals[s, 0]
                rows[8 + s], rows[10 + s] = totals[2 + s, 1], totals[2 + s, 0]
        share = take(slots, phase)


@kernel
def _totals(slots, phase, sums, grads, totals, first, threads):
    """Both streams' sums of a norm's gradient over all parts, and means; then all threads go on."""
    s = take(slots, phase)
    while s < 2:
        if grads[s].shape[0]:
            total = totals[first + s]
            total[:2] = np.float32(0.0)
            for part in range(sums[s].shape[0]):
                total[:2] += sums[s][part]
            total[2:] = total[:2] / np.float32(grads[s].shape[0])
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
        hidden_rows(total, begin, norm1, turned, bias, z, hidden, rows)
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
def _sum_back(dz, total, norms, totals, y, weights, dtotal, dy, dweights, seen, first, last):
    """Through the first norm, to x (whose gradient is the sum's) and through the projection to y."""
    for s in range(2 if seen else 1):
        for begin in range(first[s], last[s], BLOCK):
            rows = min(BLOCK, last[s] - begin)
            normalise_backward(dz[s], begin, total[s], norms[s], totals[s], dtotal[s], begin, rows)
            add_outer(dtotal[s], begin, y[s], begin, dweights[4 + s], rows, 0, total[s].shape[1])
            zero(dy[s], begin, rows)
            add_product(dtotal[s], begin, weights[4 + s], dy[s], begin, rows)


@kernel
def _into(attended, dattended, first, last):
    edges, options, (q, k, v, edge), mixed, logits, shares = attended
    dmixed, dproduct, (dq, _, _, dedge), (weights, dlogits) = dattended
    backward_into(
        dmixed, dproduct, q, k, v, edge, edges[0], edges[1], edges[2], edges[3], options[0], options[1],
        mixed, logits, shares, dq, dedge, weights, dlogits, first, last,
    )  # fmt: skip


@kernel
def _out(attended, dattended, first, last):
    edges, options, (q, _, _, edge), _, _, _ = attended
    dmixed, dproduct, (_, dk, dv, _), (weights, dlogits) = dattended
    backward_out(
        dmixed, dproduct, q, edge, edges[0], edges[1], edges[4], edges[5], options[0], weights, dlogits, dk,
        dv, first, last,
    )  # fmt: skip


@kernel
def _project_back(x, grads, weights, dx, dweights, seen, first, last):
    """Add to x's gradients; those of edges that nobody looked at begin here."""
    for t in range(4):
        s = 1 if t == 3 else 0
        for begin in range(first[s], last[s], BLOCK):
            rows = min(BLOCK, last[s] - begin)
            if s and not seen:
                zero(dx[s], begin, rows)
            add_product(grads[t], begin, weights[t], dx[s], begin, rows)
            add_outer(grads[t], begin, x[s], begin, dweights[t], rows, 0, grads[t].shape[1])
