"""The order in which kernels walk a graph's edges: by destination going forward, by source going back."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from manyheads.core.dispatch import choose, numba_installed


class EdgeOrder(NamedTuple):
    """A graph's edges sorted by destination and by source; ties keep their order.

    Attributes:
        into: Edge numbers sorted by destination.
        into_start: Where each destination's edges begin in `into`, and the number of edges at the end.
        out: Edge numbers sorted by source.
        out_start: Where each source's edges begin in `out`, and the number of edges at the end.

    Shape:
        into, out: `[E]`; into_start, out_start: `[N + 1]`; all int32.
    """

    into: Tensor
    into_start: Tensor
    out: Tensor
    out_start: Tensor


def edge_order(edge_index: Tensor, num_nodes: int) -> EdgeOrder:
    """Sort a graph's edges for `segment_attention`, once for all layers that share them.

    Args:
        edge_index: Sources in row 0, destinations in row 1; any order, repeated edges allowed.
        num_nodes: The number of nodes, isolated ones included.

    Shape:
        edge_index: `[2, E]`.

    Raises:
        TypeError: edge_index is not of an integer dtype.
        ValueError: edge_index is not `[2, E]`, or (checked on a CPU alone) it names a node that is not there.

    Example:
        >>> order = edge_order(edge_index, x.shape[0])
        >>> for layer in layers:
        ...     x = layer(x, edge_index, order)
    """
    if edge_index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"edge_order: edge_index must be int64 or int32, not {edge_index.dtype}")
    if edge_index.dim() != 2 or edge_index.shape[0] != 2:
        raise ValueError(f"edge_order: edge_index must be [2, E], not {tuple(edge_index.shape)}")
    if torch.compiler.is_exporting() and _by_formula(edge_index):
        # The formula looks at no order, and other runtimes have no stable sort to make one with.
        edges = torch.arange(edge_index.shape[1], dtype=torch.int32, device=edge_index.device)
        starts = edges.new_zeros(num_nodes + 1)
        return EdgeOrder(edges, starts, edges, starts)
    return EdgeOrder(*_order(edge_index, num_nodes))


def _by_formula(edge_index: Tensor) -> bool:
    device = edge_index.device.type
    return choose("segment_attention", device=device, dtype=torch.float32).backend == "reference"


@torch.library.custom_op("manyheads::edge_order", mutates_args=())
def _order(edge_index: Tensor, num_nodes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if edge_index.device.type == "cpu":
        if edge_index.numel():
            low, high = (int(x) for x in edge_index.aminmax())
            if low < 0 or high >= num_nodes:
                wrong = low if low < 0 else high
                raise ValueError(f"edge_order: edge_index names node {wrong}, and there are {num_nodes}")
        if numba_installed():
            return *_counted(edge_index[1], num_nodes), *_counted(edge_index[0], num_nodes)
    return *_sorted(edge_index[1], num_nodes), *_sorted(edge_index[0], num_nodes)


@_order.register_fake
def _(edge_index: Tensor, num_nodes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def empty(size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int32, device=edge_index.device)

    edges = edge_index.shape[1]
    return empty(edges), empty(num_nodes + 1), empty(edges), empty(num_nodes + 1)


def _sorted(nodes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    values, edges = torch.sort(nodes, stable=True)
    starts = torch.searchsorted(values, torch.arange(count + 1, device=nodes.device, dtype=values.dtype))
    return edges.int(), starts.int()


def _counted(nodes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    from manyheads.core.ops.segment_attention.numba_kernels import counting_sort

    edges, starts = np.empty(nodes.numel(), np.int32), np.zeros(count + 1, np.int32)
    counting_sort(nodes.long().contiguous().numpy(), edges, starts)
    return torch.from_numpy(edges), torch.from_numpy(starts)
