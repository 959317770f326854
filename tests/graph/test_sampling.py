"""Neighbour sampling: what is taken, that nothing but seed and node decide it, and that all is all."""

from __future__ import annotations

import pytest
import torch

from manyheads.core.catalog import create_model
from manyheads.core.errors import UsageError
from manyheads.graph.graphs import Graphs
from manyheads.graph.sampling import Adjacency, sample


def random_edges(nodes=400, edges=4000, seed=0):
    draw = torch.Generator().manual_seed(seed)
    hubs = torch.randint(0, 3, (edges // 4,), generator=draw)  # three nodes of many edges
    target = torch.cat([hubs, torch.randint(0, nodes - 5, (edges - len(hubs),), generator=draw)])
    return torch.stack([torch.randint(0, nodes, (edges,), generator=draw), target])


@pytest.fixture
def edges():
    return random_edges()


@pytest.fixture
def adjacency(edges):
    return Adjacency.of(edges, 400)


def around(edges, seed, hops):
    """A node's neighbourhood by loops: nodes, and numbers of edges."""
    nodes, frontier, found = {seed}, {seed}, set()
    for _ in range(hops):
        into = [i for i, t in enumerate(edges[1].tolist()) if t in frontier]
        found |= set(into)
        frontier = {int(edges[0, i]) for i in into} - nodes
        nodes |= frontier
    return nodes, found


def graph_of(sampled, g):
    """One of the graphs: numbers of its nodes and edges in the large one."""
    first, last = sampled.starts[g : g + 2].tolist()
    own = (sampled.edge_index[0] >= first) & (sampled.edge_index[0] < last)
    return sampled.nodes[first:last].tolist(), sampled.edge_numbers[own].tolist()


def test_incoming_edges_in_their_order(edges, adjacency):
    assert adjacency.nodes == 400
    for node in (0, 57, 399):
        rows = slice(adjacency.starts[node], adjacency.starts[node + 1])
        wanted = (edges[1] == node).nonzero().flatten()
        assert adjacency.numbers[rows].tolist() == wanted.tolist()
        assert adjacency.sources[rows].tolist() == edges[0, wanted].tolist()
    with pytest.raises(ValueError, match="an edge names node 400, and there are 400"):
        Adjacency.of(torch.tensor([[0], [400]]), 400)


def test_edges_and_nodes_are_the_large_graphs(edges, adjacency):
    sampled = sample(adjacency, torch.arange(50, 90), [4, 3], seed=3)
    assert torch.equal(sampled.nodes[:40], torch.arange(50, 90))
    assert torch.equal(sampled.seeds, torch.arange(40)) and sampled.starts.tolist() == [0, len(sampled.nodes)]
    assert torch.equal(sampled.nodes[sampled.edge_index], edges[:, sampled.edge_numbers])
    assert len(sampled.nodes.unique()) == len(sampled.nodes)
    assert len(sampled.edge_numbers.unique()) == len(sampled.edge_numbers)  # without replacement
    assert (sampled.edge_index[1].diff() >= 0).all()
    degrees = edges[1].bincount(minlength=400)[sampled.nodes]
    taken = sampled.edge_index[1].bincount(minlength=len(sampled.nodes))
    assert torch.equal(taken[:40], degrees[:40].clamp(max=4))
    first = taken > 0
    assert (taken[40:] <= 3).all() and torch.equal(taken[first][40:], degrees[first][40:].clamp(max=3))


@pytest.mark.parametrize("hops", [1, 2, 3])
def test_all_neighbours_are_the_neighbourhood(edges, adjacency, hops):
    seeds = torch.tensor([0, 7, 120, 399])
    sampled = sample(adjacency, seeds[:, None], [-1] * hops)
    for g, seed in enumerate(seeds.tolist()):
        nodes, numbers = graph_of(sampled, g)
        wanted, found = around(edges, seed, hops)
        assert set(nodes) == wanted and nodes[0] == seed and len(nodes) == len(wanted)
        assert sorted(numbers) == sorted(found)
    joint = sample(adjacency, seeds, [-1] * hops)
    every = [around(edges, seed, hops) for seed in seeds.tolist()]
    assert set(joint.nodes.tolist()) == set().union(*(nodes for nodes, _ in every))
    assert set(joint.edge_numbers.tolist()) == set().union(*(found for _, found in every))


def test_a_row_does_not_depend_on_the_others(adjacency):
    rows = torch.randint(0, 400, (300, 2), generator=torch.Generator().manual_seed(1))
    sampled = sample(adjacency, rows, [5, 2], seed=9)
    for g in (0, 5, 137, 299):
        alone = sample(adjacency, rows[g : g + 1], [5, 2], seed=9)
        assert graph_of(sampled, g) == graph_of(alone, 0)
        assert torch.equal(sampled.nodes[sampled.seeds[g]], rows[g])
    other = sample(adjacency, rows, [5, 2], seed=10)
    assert any(graph_of(sampled, g) != graph_of(other, g) for g in range(300))
    again = sample(adjacency, rows, [5, 2], seed=9)
    assert all(torch.equal(a, b) for a, b in zip(sampled, again, strict=True))


def test_a_seed_given_twice_is_there_once(adjacency):
    sampled = sample(adjacency, torch.tensor([[4, 4], [4, 9]]), [3])
    assert sampled.seeds[0].tolist() == [0, 0] and sampled.nodes[sampled.seeds[1]].tolist() == [4, 9]
    nodes, _ = graph_of(sampled, 0)
    assert nodes.count(4) == 1


def test_nodes_without_edges_and_no_seeds(adjacency):
    sampled = sample(adjacency, torch.tensor([396, 397]), [3, 3])  # nothing leads there
    assert sampled.nodes.tolist() == [396, 397] and sampled.edge_index.shape == (2, 0)
    sampled = sample(adjacency, torch.zeros(0, dtype=torch.int64), [3])
    assert sampled.nodes.shape == (0,) and sampled.starts.tolist() == [0, 0]
    lonely = sample(Adjacency.of(torch.zeros(2, 0, dtype=torch.int64), 3), torch.tensor([[2], [0]]), [-1])
    assert lonely.nodes.tolist() == [2, 0] and lonely.starts.tolist() == [0, 1, 2]


def test_every_neighbour_is_as_likely():
    """Each of a star's 40 leaves in 10 of 40 samples: chi-square of the counts, and of pairs."""
    edges = torch.stack([torch.arange(1, 41), torch.zeros(40, dtype=torch.int64)])
    adjacency = Adjacency.of(edges, 41)
    counts, pairs = torch.zeros(41), torch.zeros(41)
    rounds = 4000
    for seed in range(rounds):
        nodes = sample(adjacency, torch.tensor([0]), [10], seed).nodes[1:]
        assert len(nodes.unique()) == 10
        counts[nodes] += 1
        both = torch.zeros(42).index_fill(0, nodes, 1)
        pairs += both[:-1] * both[1:]  # a leaf and the next
    for found, expected in ((counts[1:], rounds / 4), (pairs[1:40], rounds * 10 * 9 / (40 * 39))):
        assert ((found - expected).abs() < 5 * expected**0.5).all()
        assert (found - expected).square().sum() / expected < 2 * len(found)


@pytest.mark.parametrize("name", ["gated_gcn", "gine", "gcn"])
def test_all_neighbours_give_the_whole_graphs_results(edges, adjacency, name):
    torch.manual_seed(0)
    model = create_model(name, outputs=3, node_features=6, hidden_dim=16, L=3, readout="node").eval()
    x = torch.randn(400, 6)
    seeds = torch.arange(0, 400, 7)
    hops = 3 + (name == "gcn")  # it divides by degrees of both ends
    with torch.inference_mode():
        whole = model(Graphs(x, edges, torch.tensor([0, 400], dtype=torch.int32)))[seeds]
        for given in (seeds, seeds[:, None]):
            cut = sample(adjacency, given, [-1] * hops)
            found = model(Graphs(x[cut.nodes], cut.edge_index, cut.starts))[cut.seeds.flatten()]
            torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-5)
            few = sample(adjacency, given, [2] * hops)
            fewer = model(Graphs(x[few.nodes], few.edge_index, few.starts))[few.seeds.flatten()]
            assert (fewer - whole).abs().max() > 1e-2


def test_written_and_mapped(adjacency, tmp_path):
    adjacency.save(tmp_path)
    mapped = Adjacency.load(tmp_path)
    assert not mapped.sources.flags.writeable and mapped.sources.dtype == "int32"
    seeds = torch.arange(100)[:, None]
    pairs = zip(sample(adjacency, seeds, [5, 5]), sample(mapped, seeds, [5, 5]), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_refused(adjacency):
    with pytest.raises(UsageError, match=r"must be positive, or -1 for all neighbours, not \[5, 0\]"):
        sample(adjacency, torch.tensor([0]), [5, 0])
    with pytest.raises(ValueError, match="nodes from 0 to 399"):
        sample(adjacency, torch.tensor([400]), [5])
