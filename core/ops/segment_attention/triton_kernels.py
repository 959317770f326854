"""Segment attention as Triton kernels: a program owns a block of nodes and one head.

All nodes of a block take their next edge together, until the last of them has none left. The forward and
`into_kernel` walk the edges into the nodes, `out_kernel` those out of them, so that every sum has one owner:
no atomics, and nothing per edge and channel but what the caller asked for.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tile(x, row, node_stride, head_stride, col, mask):
    """Rows of one head, [NODES, BLOCK], float32."""
    at = row.to(tl.int64)[:, None] * node_stride + tl.program_id(1).to(tl.int64) * head_stride + col[None, :]
    return tl.load(x + at, mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["count"])
def forward_kernel(
    q, k, v, edge, source, into, start, out, product, logits, norm,
    count, q_node, q_head, k_node, k_head, v_node, v_head, e_node, e_head, heads, d, scale, clamp, eps,
    BOUNDED: tl.constexpr, NODES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Outputs, logits before the clamp, and each node's maximum and 1 / sum; the products where wanted."""
    head = tl.program_id(1)
    node = tl.program_id(0) * NODES + tl.arange(0, NODES)
    col = tl.arange(0, BLOCK)
    inside = node < count
    mask = inside[:, None] & (col < d)[None, :]
    first = tl.load(start + node, inside, other=0)
    degree = tl.load(start + node + 1, inside, other=0) - first
    query = _tile(q, node, q_node, q_head, col, mask) * scale
    largest = tl.full([NODES], 0.0 if BOUNDED else float("-inf"), tl.float32)
    total = tl.full([NODES], 0.0, tl.float32) + eps
    mixed = tl.zeros([NODES, BLOCK], tl.float32)
    for t in range(0, tl.max(degree, 0)):
        found = t < degree
        at = found[:, None] & (col < d)[None, :]
        e = tl.load(into + first + t, found, other=0).to(tl.int64)
        j = tl.load(source + e, found, other=0)
        row = query * _tile(k, j, k_node, k_head, col, at)
        if edge is not None:
            row *= _tile(edge, e, e_node, e_head, col, at)
        place = e[:, None] * (heads * d) + head * d + col[None, :]
        if product is not None:
            tl.store(product + place, row.to(product.dtype.element_ty), at)
        logit = tl.sum(row, 1)
        tl.store(logits + e * heads + head, logit, found)
        value = _tile(v, j, v_node, v_head, col, at)
        if BOUNDED:
            logit = tl.where(logit > clamp, clamp, logit)
            weight = tl.exp(tl.where(logit < -clamp, -clamp, logit))
        else:
            larger = tl.maximum(largest, logit)
            fade = tl.exp(tl.where(found, largest - larger, 0.0))
            weight = tl.exp(tl.where(found, logit - larger, 0.0))
            largest = tl.where(found, larger, largest)
            total *= fade
            mixed *= fade[:, None]
        weight = tl.where(found, weight, 0.0)
        total += weight
        mixed += weight[:, None] * value
    share = tl.where(degree > 0, 1.0 / tl.where(degree > 0, total, 1.0), 0.0)
    at = node.to(tl.int64) * heads + head
    tl.store(norm + 2 * node.to(tl.int64) * heads + head, largest, inside)
    tl.store(norm + (2 * node.to(tl.int64) + 1) * heads + head, share, inside)
    tl.store(out + at[:, None] * d + col[None, :], (mixed * share[:, None]).to(out.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["count"])
def into_kernel(
    dout, dproduct, q, k, v, edge, source, into, start, out, logits, norm, dq, dedge, weights, dlogits,
    count, g_node, g_head, p_node, p_head, q_node, q_head, k_node, k_head, v_node, v_head, e_node, e_head,
    heads, d, scale, clamp, NODES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of queries and edges; the weights and the logits' gradients, for `out_kernel`."""
    head = tl.program_id(1)
    node = tl.program_id(0) * NODES + tl.arange(0, NODES)
    col = tl.arange(0, BLOCK)
    inside = node < count
    mask = inside[:, None] & (col < d)[None, :]
    first = tl.load(start + node, inside, other=0)
    degree = tl.load(start + node + 1, inside, other=0) - first
    query = _tile(q, node, q_node, q_head, col, mask) * scale
    grad = _tile(dout, node, g_node, g_head, col, mask)
    delta = tl.sum(grad * _tile(out, node, heads * d, d, col, mask), 1)
    largest = tl.load(norm + 2 * node.to(tl.int64) * heads + head, inside, other=0.0)
    share = tl.load(norm + (2 * node.to(tl.int64) + 1) * heads + head, inside, other=0.0)
    held = tl.zeros([NODES, BLOCK], tl.float32)
    for t in range(0, tl.max(degree, 0)):
        found = t < degree
        at = found[:, None] & (col < d)[None, :]
        e = tl.load(into + first + t, found, other=0).to(tl.int64)
        j = tl.load(source + e, found, other=0)
        logit = tl.load(logits + e * heads + head, found, other=0.0)
        bounded = tl.where(logit > clamp, clamp, logit)
        bounded = tl.where(bounded < -clamp, -clamp, bounded)
        weight = tl.exp(bounded - largest) * share
        pull = weight * (tl.sum(grad * _tile(v, j, v_node, v_head, col, at), 1) - delta)
        pull = tl.where(tl.abs(logit) > clamp, 0.0, pull)
        tl.store(weights + e * heads + head, weight, found)
        tl.store(dlogits + e * heads + head, pull, found)
        row = tl.where(at, pull[:, None], 0.0)
        if dproduct is not None:
            row += _tile(dproduct, e, p_node, p_head, col, at)
        row *= _tile(k, j, k_node, k_head, col, at)
        if edge is not None:
            place = e[:, None] * (heads * d) + head * d + col[None, :]
            tl.store(dedge + place, (row * query).to(dedge.dtype.element_ty), at)
            row *= _tile(edge, e, e_node, e_head, col, at)
        held += row
    place = (node.to(tl.int64) * heads + head)[:, None] * d + col[None, :]
    tl.store(dq + place, (held * scale).to(dq.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["count"])
def out_kernel(
    dout, dproduct, q, edge, target, leaving, start, weights, dlogits, dk, dv,
    count, g_node, g_head, p_node, p_head, q_node, q_head, e_node, e_head, heads, d, scale,
    NODES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values."""
    head = tl.program_id(1)
    node = tl.program_id(0) * NODES + tl.arange(0, NODES)
    col = tl.arange(0, BLOCK)
    inside = node < count
    mask = inside[:, None] & (col < d)[None, :]
    first = tl.load(start + node, inside, other=0)
    degree = tl.load(start + node + 1, inside, other=0) - first
    keys = tl.zeros([NODES, BLOCK], tl.float32)
    values = tl.zeros([NODES, BLOCK], tl.float32)
    for t in range(0, tl.max(degree, 0)):
        found = t < degree
        at = found[:, None] & (col < d)[None, :]
        e = tl.load(leaving + first + t, found, other=0).to(tl.int64)
        i = tl.load(target + e, found, other=0)
        weight = tl.load(weights + e * heads + head, found, other=0.0)
        values += weight[:, None] * _tile(dout, i, g_node, g_head, col, at)
        row = tl.where(at, tl.load(dlogits + e * heads + head, found, other=0.0)[:, None], 0.0)
        if dproduct is not None:
            row += _tile(dproduct, e, p_node, p_head, col, at)
        if edge is not None:
            row *= _tile(edge, e, e_node, e_head, col, at)
        keys += row * _tile(q, i, q_node, q_head, col, at)
    place = (node.to(tl.int64) * heads + head)[:, None] * d + col[None, :]
    tl.store(dk + place, (keys * scale).to(dk.dtype.element_ty), mask)
    tl.store(dv + place, values.to(dv.dtype.element_ty), mask)
