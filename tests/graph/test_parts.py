"""Batches of graphs and of nodes: what is in them, signs by chance, going on where a loader was."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from manyheads.core.buckets import Buckets
from manyheads.core.catalog import create_model
from manyheads.core.loading import Schedule
from manyheads.graph.collection import GraphSet
from manyheads.graph.parts import (
    Batches,
    Flips,
    GraphBatch,
    ManyGraphs,
    Neighbourhoods,
    WholeGraph,
    loader,
)
from manyheads.graph.sampling import Adjacency


def some_graphs(count: int = 60, level: str = "graph", seed: int = 0) -> GraphSet:
    """Random graphs of 3 to 30 nodes, with an encoding; each graph's numbers tell which it is."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    sizes = rng.integers(3, 31, count)
    parts = [
        (
            torch.full((size, 1), i),
            torch.from_numpy(rng.integers(0, size, (2, 2 * size))),
            torch.full((2 * size, 1), i),
        )
        for i, size in enumerate(sizes.tolist())
    ]
    found = GraphSet.of(parts)
    nodes = found.x.shape[0]
    rows = count if level == "graph" else nodes
    return GraphSet(
        found.x,
        found.edge_index,
        found.nodes,
        found.edges,
        found.edge_attr,
        torch.arange(rows).float()[:, None],
        level,  # type: ignore[arg-type]
        weight=torch.rand(rows),
        encoding=torch.randn(nodes, 4),
    )


def many(graphs: GraphSet, *, train: bool = True, seed: int = 0, limit: int | None = None) -> ManyGraphs:
    buckets = Buckets(graphs.sizes.numpy(), limit, 1 if limit is None else 6, train, seed, most=8)
    return ManyGraphs(graphs, buckets, Flips(seed if train else None))


@pytest.mark.parametrize("level", ["graph", "node"])
@pytest.mark.parametrize("limit", [None, 90])
def test_an_epoch_has_every_graph_once_with_its_own_target(level: str, limit: int | None) -> None:
    graphs = some_graphs(level=level)
    rows, seen = [], []
    batches = loader(many(graphs, limit=limit), 0)
    for batch in batches:
        packed = batch["graphs"]
        seen += [int(packed.x[first, 0]) for first in packed.starts[:-1]]
        assert torch.equal(batch["target"][:, 0].long(), batch["index"])
        assert graphs.weight is not None
        assert batch["weight"] is not None
        assert torch.equal(batch["weight"], graphs.weight[batch["index"]])
        assert len(packed.sizes) <= 8
        assert limit is None or packed.nodes <= limit
        ends = packed.x[packed.edge_index.flatten(), 0]
        assert packed.edge_attr is not None
        assert torch.equal(ends, packed.edge_attr[:, 0].repeat(2))  # no edge between two graphs
        rows += batch["index"].tolist()
    assert sorted(seen) == list(range(60))
    assert sorted(rows) == list(range(len(graphs.y if graphs.y is not None else ())))


def signs(part: ManyGraphs, batch: GraphBatch) -> Tensor:
    """What the batch's encodings were multiplied with, `[n, k]`."""
    encoding, own = batch["graphs"].encoding, part.graphs.encoding
    assert encoding is not None
    assert own is not None
    index = batch["index"]
    return encoding / own[part.graphs.node_rows(index)]


def test_signs_are_a_batchs_own_and_repeat_by_seed_and_epoch() -> None:
    graphs = some_graphs()
    part = many(graphs)
    epochs = []
    for epoch in (0, 1, 0):
        part.schedule.set_epoch(epoch)
        found = []
        for job in part.jobs(0):
            each = signs(part, part.make(*job))
            torch.testing.assert_close(each, each[:1].expand_as(each))  # one a column
            found.append(each[0].round().int().tolist())
        epochs.append(found)
    assert epochs[0] == epochs[2]
    assert epochs[0] != epochs[1]
    assert len({tuple(each) for each in epochs[0] + epochs[1]}) > 6  # of 16 batches, 16 ways
    columns = np.array(epochs[0] + epochs[1])
    assert set(np.unique(columns)) == {-1, 1}
    other = many(graphs, seed=1)
    assert [signs(other, other.make(*job))[0].round().int().tolist() for job in other.jobs(0)] != epochs[0]


def test_signs_stay_outside_training() -> None:
    part = many(some_graphs(), train=False)
    for job in part.jobs(0):
        assert torch.equal(signs(part, part.make(*job)), torch.ones_like(signs(part, part.make(*job))))
    assert all(a >= b for a, b in pairwise(int(part.make(*j)["graphs"].sizes.max()) for j in part.jobs(0)))


def one_graph(nodes: int = 200) -> GraphSet:
    rng = np.random.default_rng(3)
    pairs = torch.from_numpy(rng.integers(0, nodes, (2, 3 * nodes)))
    edge_index = torch.cat([pairs, pairs.flip(0)], 1)
    x = torch.from_numpy(rng.random((nodes, 5), np.float32))
    ends = (torch.tensor([0, nodes]), torch.tensor([0, edge_index.shape[1]]))
    return GraphSet(x, edge_index, *ends, y=torch.arange(nodes).float()[:, None], level="node")


def nearby(graphs: GraphSet, fanouts: list[int], *, train: bool = True) -> Neighbourhoods:
    nodes = torch.arange(3, 150, 2)
    schedule = Schedule(len(nodes), 16, train, False, 0)
    adjacency = Adjacency.of(graphs.edge_index, graphs.x.shape[0])
    return Neighbourhoods(graphs, nodes, adjacency, fanouts, schedule, 5, Flips(None))


def test_samples_of_all_neighbours_give_what_the_whole_graph_gives() -> None:
    graphs = one_graph()
    model = create_model("kipf_gcn", node_features=5, outputs=3).eval()
    whole = WholeGraph(graphs, torch.arange(3, 150, 2), Flips(None))
    (job,) = whole.jobs(0)
    full = whole.make(*job)
    rows = full["rows"]
    assert rows is not None
    with torch.no_grad():
        wanted = model(full["graphs"])[rows]
        found = torch.full_like(wanted, torch.nan)
        for batch in loader(nearby(graphs, [-1, -1, -1]), 0):
            assert batch["rows"] is not None
            assert torch.equal(batch["target"], full["target"][batch["index"]])
            found[batch["index"]] = model(batch["graphs"])[batch["rows"]]
    torch.testing.assert_close(found, wanted)


def test_other_neighbours_each_epoch_of_training_and_the_same_outside() -> None:
    graphs = one_graph()
    for train in (True, False):
        part = nearby(graphs, [2, 2], train=train)
        edges = []
        for epoch in (0, 1, 0):
            part.schedule.set_epoch(epoch)
            edges.append([part.make(*job)["graphs"].edge_index.tolist() for job in part.jobs(0)])
        assert edges[0] == edges[2]
        assert (edges[0] == edges[1]) != train


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", ["many", "nearby"])
def test_a_loader_goes_on_where_it_was(kind: str, workers: int) -> None:
    def part() -> Batches:
        return many(some_graphs()) if kind == "many" else nearby(one_graph(), [3, 2])

    whole = loader(part(), 0)
    whole.sampler.set_epoch(2)
    wanted = list(whole)
    begun = loader(part(), workers)
    begun.sampler.set_epoch(2)
    early = [batch for _, batch in zip(range(3), begun, strict=False)]
    state = begun.state_dict()
    assert (state["epoch"], state["batch"]) == (2, 3)
    resumed = loader(part(), workers)
    resumed.load_state_dict(begun.state_dict())
    found = early + list(resumed)
    assert len(found) == len(wanted) > 4
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one["index"], other["index"])
        assert torch.equal(one["graphs"].edge_index, other["graphs"].edge_index)
        mine, theirs = one["graphs"].encoding, other["graphs"].encoding
        assert mine is theirs is None or torch.equal(mine, theirs)  # type: ignore[arg-type]
