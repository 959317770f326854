"""Where the compiled layers of the Graph Transformer keep what they need: views of flat memory, for numba.

A layer's parameters are one row of numbers, and so are their gradients; what the way back needs is one row,
and what a pass needs for itself another. Streams are two: nodes and edges. Widths are multiples of 16, so
that all but the last few begin where a vector does.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from manyheads.core.jit import kernel


def room_size(rows: tuple[int, int], width: int, wide: int, pairs: int, heads: int) -> int:
    """Numbers that a layer keeps for the way back: `kept`."""
    states = 3 * rows[0] + rows[1] + 4 * sum(rows) + 16 + 6 * width + 4 * wide
    return -(-(states * width + (pairs + 2 * rows[0]) * heads) // 16) * 16


def scratch_size(rows: tuple[int, int], width: int, wide: int, pairs: int, heads: int, parts: int) -> int:
    """Numbers that the way back needs for itself: `scratch`."""
    states = 3 * rows[0] + rows[1] + 4 * sum(rows) + 4 * parts + 16
    return states * width + parts * matrices_size(width, wide) + 2 * pairs * heads


def matrices_size(width: int, wide: int) -> int:
    """Numbers of a layer's `matrices`; twelve vectors of the width follow them."""
    return 6 * width * width + 4 * wide * width + 2 * wide


@kernel
def view(room, at, rows, width):
    """Rows from a place on."""
    return room[at : at + rows * width].reshape(rows, width)


@kernel
def both(room, at, rows, width):
    """Rows of both streams."""
    return view(room, at, rows[0], width), view(room, at + rows[0] * width, rows[1], width)


@kernel
def cube(room, at, count, rows, width):
    """Several matrices."""
    return room[at : at + count * rows * width].reshape(count, rows, width)


@kernel
def states(room, at, rows, width):
    """Queries, keys, values and edges, or their gradients."""
    many = rows[0] * width
    q, k = view(room, at, rows[0], width), view(room, at + many, rows[0], width)
    return q, k, *both(room, at + 2 * many, rows, width)


@kernel
def matrices(flat, width, wide):
    """Weights of Q, K, V, edges, outputs; of both nets' first and second layers; their first biases."""
    at = 6 * width * width
    expand, contract = cube(flat, at, 2, wide, width), cube(flat, at + 2 * wide * width, 2, width, wide)
    return cube(flat, 0, 6, width, width), expand, contract, view(flat, at + 4 * wide * width, 2, wide)


@kernel
def vectors(flat, width):
    """Two each, for nodes and edges: biases of output and net; gain and bias of both norms."""
    return flat[flat.size - 12 * width :].reshape(12, width)


@kernel
def kept(room, rows, width, wide, pairs, heads):
    """Projections; mixed, total, second and out; norms; turned weights; logits; shares.

    Norms are those of nodes and of edges, then the second ones of both.
    """
    at, many = (3 * rows[0] + rows[1]) * width, (rows[0] + rows[1]) * width
    mixed, total = both(room, at, rows, width), both(room, at + many, rows, width)
    second, out = both(room, at + 2 * many, rows, width), both(room, at + 3 * many, rows, width)
    at += 4 * many
    norms, at = cube(room, at, 4, 4, width), at + 16 * width
    squares, at = cube(room, at, 6, width, width), at + 6 * width * width
    expand, contract = cube(room, at, 2, width, wide), cube(room, at + 2 * wide * width, 2, wide, width)
    at += 4 * wide * width
    logits, at = view(room, at, pairs, heads), at + pairs * heads
    shares = room[at : at + 2 * rows[0] * heads].reshape(rows[0], 2, heads)
    turned = squares, expand, contract
    return states(room, 0, rows, width), (mixed, total, second, out), norms, turned, logits, shares


@kernel
def scratch(room, rows, width, wide, pairs, heads, parts):
    """Gradients of z, of mixed, of x in two places, and of the projections; sums; totals; further gradients.

    Sums are of each part; totals of each norm, as in `kept`; the further gradients those of the matrices of
    each part, and of the attention's weights and logits.
    """
    many = (rows[0] + rows[1]) * width
    dz, dmixed = both(room, 0, rows, width), both(room, many, rows, width)
    dx, at = (both(room, 2 * many, rows, width), both(room, 3 * many, rows, width)), 4 * many
    dprojected, at = states(room, at, rows, width), at + (3 * rows[0] + rows[1]) * width
    sums = cube(room, at, parts, 2, width), cube(room, at + 2 * parts * width, parts, 2, width)
    at += 4 * parts * width
    totals, at = cube(room, at, 4, 4, width), at + 16 * width
    many = parts * (6 * width * width + 4 * wide * width + 2 * wide)
    dmatrices, at = room[at : at + many].reshape(parts, many // parts), at + many
    dlogits = view(room, at, pairs, heads), view(room, at + pairs * heads, pairs, heads)
    return dz, dmixed, dx, dprojected, sums, totals, dmatrices, dlogits
