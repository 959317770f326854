"""Launches of segment attention's Triton kernels: forward, backward, the gate's list."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import triton
from torch import Tensor

from manyheads.core.aot import ARCHITECTURES, Variant
from manyheads.core.ops.launches import dense
from manyheads.core.ops.segment_attention.order import EdgeOrder
from manyheads.core.ops.segment_attention.triton_kernels import forward_kernel, into_kernel, out_kernel

MAX_DIM = 128
# By the padded head dim: numbers of a program's tile of nodes, about four a thread, and warps. The largest of
# those tried that spill nothing, with any strides.
_TABLE = {8: (512, 4), 16: (512, 8), 32: (256, 4), 64: (256, 2), 128: (512, 4)}

Options = tuple[float, float, float]  # scale, clamp (infinite where there is none), eps


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    edge: Tensor | None,
    edge_index: Tensor,
    order: EdgeOrder,
    options: Options,
    return_edge: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Attend along edges; arguments and results as `cpu.forward`."""
    (nodes, heads, d), edges = q.shape, edge_index.shape[1]
    q, k, v = dense(q), dense(k), dense(v)
    edge = None if edge is None else dense(edge)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    product = torch.empty(edges, heads, d, dtype=q.dtype, device=q.device) if return_edge else None
    logits = torch.empty(edges, heads, dtype=torch.float32, device=q.device)
    norm = torch.empty(nodes, 2, heads, dtype=torch.float32, device=q.device)
    block, rows, warps = tile(d)
    if nodes and heads and d:
        forward_kernel[(triton.cdiv(nodes, rows), heads)](
            q, k, v, edge, edge_index[0].contiguous(), order.into, order.into_start, out, product, logits,
            norm, nodes, *_strides(q), *_strides(k), *_strides(v), *_strides(edge), heads, d, *options,
            BOUNDED=options[1] != float("inf"), NODES=rows, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return out, product, logits, norm


def backward(
    dout: Tensor,
    dproduct: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    edge: Tensor | None,
    edge_index: Tensor,
    order: EdgeOrder,
    options: Options,
    out: Tensor,
    logits: Tensor,
    norm: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and edge; arguments as `cpu.backward`."""
    nodes, heads, d = q.shape
    dout, q, k, v = dense(dout), dense(q), dense(k), dense(v)
    dproduct, edge = (None if x is None else dense(x) for x in (dproduct, edge))
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    dedge = None if edge is None else torch.empty(edge.shape, dtype=edge.dtype, device=edge.device)
    weights, dlogits = torch.empty_like(logits), torch.empty_like(logits)
    block, rows, warps = tile(d)
    scale, clamp, _ = options
    grid = (triton.cdiv(nodes, rows), heads)
    shared = *_strides(dout), *_strides(dproduct), *_strides(q)
    if nodes and heads and d:
        into_kernel[grid](
            dout, dproduct, q, k, v, edge, edge_index[0].contiguous(), order.into, order.into_start, out,
            logits, norm, dq, dedge, weights, dlogits,
            nodes, *shared, *_strides(k), *_strides(v), *_strides(edge), heads, d, scale, clamp,
            NODES=rows, BLOCK=block, num_warps=warps,
        )  # fmt: skip
        out_kernel[grid](
            dout, dproduct, q, edge, edge_index[1].contiguous(), order.out, order.out_start, weights, dlogits,
            dk, dv, nodes, *shared, *_strides(edge), heads, d, scale,
            NODES=rows, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return dq, dk, dv, dedge


def tile(d: int) -> tuple[int, int, int]:
    """Channels and nodes of a program's tile for head dim d, and its warps.

    Example:
        >>> tile(10)
        (16, 32, 8)
    """
    block = max(min(_TABLE), triton.next_power_of_2(d))
    numbers, warps = _TABLE[block]
    return block, numbers // block, warps


def _strides(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.stride(0), x.stride(1))


def aot_variants() -> list[Variant]:
    """List what the ahead-of-time gate compiles: every head dim, with and without edge channels.

    The quick gate has the forms with all arguments in bfloat16, one aligned and one unaligned.
    """
    found = []
    options = itertools.product(ARCHITECTURES, _TABLE, ("bf16", "fp32"), (True, False), (True, False))
    for arch, block, dtype, whole, aligned in options:
        slow = not whole or dtype != "bf16" or (block, aligned) not in ((8, True), (64, False))
        for kernel in (forward_kernel, into_kernel, out_kernel):
            for bounded in (True, False) if kernel is forward_kernel else (None,):
                quick = not slow and bounded is not False
                found.append(_variant(kernel, arch, block, dtype, whole, aligned, bounded, not quick))
    return found


def _variant(
    kernel: Any,
    arch: int,
    block: int,
    dtype: str,
    whole: bool,
    aligned: bool,
    bounded: bool | None,
    slow: bool,
) -> Variant:
    names = kernel.arg_names
    sizes = [n for n in names if n.endswith(("_node", "_head")) or n in ("heads", "d", "count")]
    single = ("logits", "norm", "weights", "dlogits")
    types = dict.fromkeys(names, f"*{dtype}") | dict.fromkeys(sizes, "i32")
    types |= dict.fromkeys(single, "*fp32") | dict.fromkeys(("source", "target"), "*i64")
    types |= dict.fromkeys(("into", "start", "leaving"), "*i32")
    types |= dict.fromkeys(("scale", "clamp", "eps"), "fp32")
    _, rows, warps = tile(block)
    constants: dict[str, bool | int | None] = {"NODES": rows, "BLOCK": block}
    if bounded is not None:
        constants["BOUNDED"] = bounded
    if not whole:
        optional = ("edge", "product", "dproduct", "dedge")
        constants |= {n: None for n in optional if n in names}
    form = (" edges" if whole else "") + ("" if bounded is None else f" bounded={bounded}")
    return Variant(
        kernel=f"{kernel.__module__}:{kernel.__name__}",
        signature={n: types[n] for n in names if n not in constants},
        constants=constants,
        arch=arch,
        label=f"{dtype} D{block}{form}",
        divisible=tuple(n for n in sizes if n != "count") if aligned else (),
        num_warps=warps,
        slow=slow,
    )
