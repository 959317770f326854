"""Batches of graphs: the full graph against a loop."""

from __future__ import annotations

import pytest
import torch

from manyheads.graph.graphs import Graphs, full_graph
from manyheads.graph.models.graph_transformer import graph_transformer_zinc


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("sizes", [[3, 0, 1, 5], [1], [0], [2, 2]])
def test_full_graph_is_every_pair_of_a_graph(sizes, dtype):
    starts = torch.tensor([0, *sizes]).cumsum(0).int()
    nodes = sum(sizes)
    old = torch.ones(4, 2, dtype=torch.int64)
    given = Graphs(torch.arange(nodes), torch.zeros(2, 4, dtype=dtype), starts, old, torch.randn(nodes, 3))
    found = full_graph(given)
    expected = [
        (first + i, first + j)
        for first, size in zip(starts.tolist(), sizes, strict=False)
        for i in range(size)
        for j in range(size)
        if i != j
    ]
    assert [tuple(edge) for edge in found.edge_index.t().tolist()] == expected
    assert found.edge_index.dtype == dtype and found.edge_index.shape[0] == 2
    assert found.edge_attr.shape == (len(expected), 2) and not found.edge_attr.any()
    assert found.encoding is given.encoding and found.starts is starts
    assert full_graph(given._replace(edge_attr=None)).edge_attr is None


def test_full_graphs_go_through_the_model_by_themselves_as_in_a_batch():
    sizes = [7, 4]
    starts = torch.tensor([0, 7, 11], dtype=torch.int32)
    x, encoding = torch.randint(0, 28, (11,)), torch.randn(11, 8)
    nothing = torch.zeros(2, 0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    model = graph_transformer_zinc().eval()
    with torch.no_grad():
        both = model(full_graph(Graphs(x, nothing[0], starts, nothing[1], encoding)))
        for i, size in enumerate(sizes):
            part = slice(int(starts[i]), int(starts[i + 1]))
            own = torch.tensor([0, size], dtype=torch.int32)
            one = Graphs(x[part], nothing[0], own, nothing[1], encoding[part])
            torch.testing.assert_close(model(full_graph(one))[0], both[i])
