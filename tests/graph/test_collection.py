"""Sets of graphs: batches against graphs put together one by one, torch-geometric and back."""

from __future__ import annotations

import logging
from dataclasses import fields, replace

import pytest
import torch
from torch_geometric.data import Batch, Data, HeteroData, InMemoryDataset

from manyheads.core.errors import DataError
from manyheads.graph.collection import GraphSet
from manyheads.graph.graphs import Graphs
from manyheads.graph.preprocessing import Encoding, Preprocessing
from manyheads.graph.torch_geometric import parts


def some(sizes=(5, 1, 0, 12, 3), level="graph", encoded=True, seed=0) -> GraphSet:
    """Graphs of these sizes with everything a set can have."""
    draw = torch.Generator().manual_seed(seed)
    graphs = []
    for size in sizes:
        edge_index = torch.randint(0, max(1, size), (2, 2 * size if size > 1 else 0), generator=draw)
        count = edge_index.shape[1]
        graphs.append(
            (
                torch.randint(0, 9, (size, 2), generator=draw),
                edge_index,
                torch.randn(count, 3, generator=draw),
            )
        )
    rows = len(sizes) if level == "graph" else sum(sizes)
    found = GraphSet.of(graphs, [f"g{i}" for i in range(len(sizes))])
    found = replace(
        found,
        y=torch.randn(rows, 2, generator=draw),
        weight=torch.rand(rows, generator=draw),
        level=level,
        node_ids=[f"n{i}" for i in range(sum(sizes))],
    )
    if not encoded:
        return found
    return Preprocessing(encoding=Encoding("random_walk", 4), roles=9, distances=5).encode(found)


def naive(graphs: GraphSet, index: list[int]) -> Graphs:
    """The batch by a loop over graphs."""
    columns = {name: [] for name in ("x", "edge_index", "edge_attr", "encoding", "roles", "distances")}
    starts, squares = [0], [0]
    for size in graphs.sizes.tolist():
        squares.append(squares[-1] + size**2)
    for i in index:
        nodes, edges = (slice(int(b[i]), int(b[i + 1])) for b in (graphs.nodes, graphs.edges))
        columns["edge_index"].append(graphs.edge_index[:, edges] + starts[-1])
        columns["edge_attr"].append(graphs.edge_attr[edges])
        columns["distances"].append(graphs.distances[squares[i] : squares[i + 1]])
        for name in ("x", "encoding", "roles"):
            columns[name].append(getattr(graphs, name)[nodes])
        starts.append(starts[-1] + nodes.stop - nodes.start)
    found = {name: torch.cat(part, 1 if name == "edge_index" else 0) for name, part in columns.items()}
    return Graphs(starts=torch.tensor(starts, dtype=torch.int32), **found)


def same(a, b):
    for name in a._fields if isinstance(a, Graphs) else [field.name for field in fields(a)]:
        one, other = getattr(a, name), getattr(b, name)
        if isinstance(one, torch.Tensor):
            assert one.dtype == other.dtype, name
            torch.testing.assert_close(one, other, atol=0, rtol=0, equal_nan=True, msg=name)
        elif name in ("ids", "node_ids") and one is not None:
            assert list(one) == list(other)
        else:
            assert one == other, name


@pytest.mark.parametrize("index", [[0, 1, 2, 3, 4], [3], [4, 0, 4, 2], [2], [1, 1, 3, 0]])
def test_a_batch_is_its_graphs_put_together(index):
    graphs = some()
    same(graphs.batch(torch.tensor(index)), naive(graphs, index))
    same(graphs.batch(index), naive(graphs, index))


@pytest.mark.parametrize("level", ["graph", "node"])
def test_targets_and_weights_are_those_of_the_batch(level):
    graphs, index = some(level=level), [3, 0, 2]
    bounds = graphs.nodes.tolist()
    rows = index if level == "graph" else [row for i in index for row in range(bounds[i], bounds[i + 1])]
    assert torch.equal(graphs.targets(index), graphs.y[rows])
    assert torch.equal(graphs.weights(index), graphs.weight[rows])
    if level == "node":
        assert graphs.node_rows(index).tolist() == rows


@pytest.mark.parametrize("level", ["graph", "node"])
def test_selected_and_joined_again_is_the_same(level):
    graphs = some(level=level)
    same(graphs.select(range(5)), graphs)
    same(GraphSet.join([graphs.select([i]) for i in range(5)]), graphs)
    same(GraphSet.join([graphs.select([3, 1]), graphs.select([0])]), graphs.select([3, 1, 0]))
    assert graphs.select([3, 1]).ids == ["g3", "g1"]
    assert graphs.select([1, 0]).node_ids == ["n5", "n0", "n1", "n2", "n3", "n4"]


def test_of_no_graphs_there_is_a_set_but_no_batch_of_others():
    graphs = some()
    assert len(graphs.select([])) == 0
    assert graphs.batch([]).nodes == 0
    for index in ([5], [-1], [0, 7]):
        with pytest.raises(IndexError, match="of a set of 5"):
            graphs.batch(index)


def test_what_does_not_fit_is_refused():
    graphs = some(encoded=False)
    with pytest.raises(DataError, match="y has 4 rows, and 5 are needed"):
        replace(graphs, y=torch.zeros(4, 1))
    with pytest.raises(DataError, match="edge_attr has 3 rows"):
        replace(graphs, edge_attr=torch.zeros(3, 1))
    with pytest.raises(DataError, match="do not end at 21 nodes"):
        replace(graphs, nodes=graphs.nodes + 1)
    with pytest.raises(DataError, match=r"y must be \[rows, targets\]"):
        replace(graphs, y=torch.zeros(5))
    with pytest.raises(DataError, match="some sets have encoding"):
        GraphSet.join([graphs, some()])
    with pytest.raises(DataError, match="of graphs and of nodes"):
        GraphSet.join([graphs, some(level="node", encoded=False)])
    with pytest.raises(DataError, match="x is"):
        GraphSet.join([graphs, replace(graphs, x=graphs.x.float())])
    with pytest.raises(DataError, match="there are none"):
        GraphSet.of([])
    with pytest.raises(DataError, match="no set to join"):
        GraphSet.join([])


def test_an_edge_out_of_its_graph_is_named():
    graphs = some(encoded=False)
    wrong = graphs.edge_index.clone()
    wrong[1, int(graphs.edges[3]) + 2] = 12
    source = int(wrong[0, int(graphs.edges[3]) + 2])
    with pytest.raises(
        DataError, match=f"'g3' has 12 nodes, numbered from 0, and an edge from {source} to 12"
    ):
        replace(graphs, edge_index=wrong).check()
    assert graphs.check() is graphs


class InMemory(InMemoryDataset):
    """A dataset as torch-geometric's users write one."""

    def __init__(self, graphs):
        super().__init__(None)
        self.data, self.slices = self.collate(graphs)


@pytest.mark.parametrize("level", ["graph", "node"])
def test_torch_geometric_and_back(level):
    graphs = some((5, 2, 12, 3), level=level, encoded=False)
    kept = replace(graphs, ids=["0", "1", "2", "3"], node_ids=None, weight=None)
    data = [graphs.to_torch_geometric(i) for i in range(4)]
    for given in (data, iter(data), InMemory(data), Batch.from_data_list(data)):
        same(GraphSet.from_torch_geometric(given), kept)
    same(GraphSet.from_torch_geometric(data[2]), replace(kept.select([2]), ids=["0"]))


def test_torch_geometric_is_taken_as_its_datasets_store_it(caplog):
    edges = torch.tensor([[0, 1, 2], [1, 2, 2]])  # one direction, and a self-loop: stays so
    data = Data(
        x=torch.rand(3, 4, dtype=torch.float64),
        edge_index=edges,
        edge_attr=torch.rand(3),
        y=torch.tensor([1]),
    )
    data.pos, data.edge_weight, data.name = torch.rand(3, 3), torch.rand(3), "x"
    with caplog.at_level(logging.WARNING):
        found = GraphSet.from_torch_geometric([data])
    assert found.x.dtype == torch.float32
    assert torch.equal(found.edge_index, edges)
    assert found.edge_attr.shape == (3, 1)
    assert found.y.tolist() == [[1.0]]
    assert found.level == "graph"
    assert "edge_weight (models take edge_attr), name, pos (models take no coordinates)" in caplog.text
    for kind in (torch.bool, torch.uint8, torch.int32):
        assert (
            GraphSet.from_torch_geometric(Data(x=torch.ones(3).to(kind), edge_index=edges)).x.dtype
            == torch.int64
        )
    bare = GraphSet.from_torch_geometric(Data(edge_index=edges, num_nodes=3))
    assert bare.x.tolist() == [[0], [0], [0]]
    assert bare.y is None


def test_torch_geometric_targets_of_nodes_and_masks():
    data = Data(
        x=torch.rand(4, 2), edge_index=torch.zeros(2, 0, dtype=torch.int64), y=torch.tensor([0, 1, 1, 2])
    )
    found = GraphSet.from_torch_geometric(data)
    assert found.level == "node"
    assert found.y.tolist() == [[0.0], [1.0], [1.0], [2.0]]
    masks = torch.eye(4, dtype=torch.bool)
    data.train_mask, data.val_mask, data.test_mask = masks[0] | masks[3], masks[1], masks[2]
    assert {k: v.tolist() for k, v in parts(data).items()} == {"train": [0, 3], "val": [1], "test": [2]}
    data.val_mask = torch.stack([masks[1], masks[1]], 1)
    assert parts(data, 1)["val"].tolist() == [1]
    data.test_mask = masks[0]
    with pytest.raises(DataError, match="share rows"):
        parts(data)
    del data.test_mask
    with pytest.raises(DataError, match="no test_mask"):
        parts(data)


def test_torch_geometric_that_cannot_be_taken():
    edges = torch.zeros(2, 0, dtype=torch.int64)
    with pytest.raises(DataError, match="of type HeteroData"):
        GraphSet.from_torch_geometric([HeteroData()])
    with pytest.raises(DataError, match="no edge_index"):
        GraphSet.from_torch_geometric(Data(x=torch.rand(2, 1)))
    with pytest.raises(DataError, match="there are no graphs"):
        GraphSet.from_torch_geometric([])
    with pytest.raises(DataError, match=r"y \[2\] of the first graph, which has 3 nodes"):
        GraphSet.from_torch_geometric(Data(x=torch.rand(3, 1), edge_index=edges, y=torch.rand(2)))
    with pytest.raises(DataError, match="graph 1 has no y"):
        GraphSet.from_torch_geometric(
            [Data(x=torch.rand(3, 1), edge_index=edges, y=y) for y in (torch.rand(1), None)], "graph"
        )
    with pytest.raises(DataError, match="has 3 nodes, numbered from 0, and an edge from 0 to 3"):
        GraphSet.from_torch_geometric(Data(x=torch.rand(3, 1), edge_index=torch.tensor([[0], [3]])))
