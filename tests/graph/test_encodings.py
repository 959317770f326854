"""Encodings against recorded ones, torch-geometric, a dense formula a graph, and on odd graphs."""

from __future__ import annotations

import json
import math
from collections import deque
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from manyheads.core.errors import UsageError
from manyheads.graph import encodings
from manyheads.graph.encoding_cache import cached
from manyheads.graph.encodings import (
    degree,
    flip_signs,
    laplacian,
    laplacian_spectrum,
    random_walk,
    roles,
    shortest_paths,
)


@pytest.fixture
def way(request, monkeypatch):
    """Spectra by compiled loops, or all by LAPACK."""
    if request.param == "lapack":
        monkeypatch.setattr(encodings, "SMALL", -1)


WAYS = pytest.mark.parametrize("way", ["loops", "lapack"], indirect=True)


def dense_laplacian(edge_index: Tensor, first: int, last: int) -> Tensor:
    """I - D^-1/2 A D^-1/2 of one graph, without self-loops, directed edges counting half."""
    a = torch.zeros(last - first, last - first, dtype=torch.float64)
    for i, j in edge_index.t().tolist():
        if first <= i < last and i != j:
            a[i - first, j - first] += 0.5
            a[j - first, i - first] += 0.5
    d = a.sum(1)
    d = torch.where(d > 0, d.rsqrt(), 0.0)
    return torch.eye(last - first, dtype=torch.float64) - d[:, None] * a * d


def check_spectrum(edge_index: Tensor, starts: Tensor, k: int) -> None:
    """Residuals, unit lengths, right angles, the right eigenvalues, and zeros behind the graph's last."""
    found = laplacian_spectrum(edge_index, starts, k)
    assert found.vectors.shape == (int(starts[-1]), k)
    for g, (first, last) in enumerate(zip(starts.tolist(), starts[1:].tolist(), strict=False)):
        own = dense_laplacian(edge_index, first, last)
        count = max(0, min(k, last - first - 1))
        v, values = found.vectors[first:last, :count], found.values[g]
        wanted = torch.linalg.eigvalsh(own)[1 : count + 1]
        torch.testing.assert_close(values[:count], wanted, atol=1e-12, rtol=0)
        assert values[count:].isnan().all()
        residual = own @ v - v * values[:count]
        assert not count or residual.abs().max() < 1e-12
        torch.testing.assert_close(v.T @ v, torch.eye(count, dtype=torch.float64), atol=1e-12, rtol=0)
        assert not found.vectors[first:last, count:].any()


@pytest.fixture
def molecules():
    """The ten recorded molecules, as one batch; their tensors."""
    path = Path(__file__).parents[1] / "golden" / "graph" / "pe_molecules_a.safetensors"
    tensors = load_file(path)
    sizes = [int(tensors[f"g{i}.num_nodes"]) for i in range(10)]
    starts = torch.tensor([0, *sizes]).cumsum(0).int()
    edges = [tensors[f"g{i}.edge_index"] + starts[i] for i in range(10)]
    return torch.cat(edges, 1).long(), starts, tensors


@WAYS
def test_laplacian_of_recorded_molecules(molecules, way):
    edge_index, starts, tensors = molecules
    check_spectrum(edge_index, starts, 8)
    found = laplacian_spectrum(edge_index, starts, 8)
    for i, (first, last) in enumerate(zip(starts.tolist(), starts[1:].tolist(), strict=False)):
        values = tensors[f"g{i}.eigenvalues"]
        torch.testing.assert_close(found.values[i], values[1:9], atol=1e-12, rtol=0)
        gaps = torch.minimum(values[1:9] - values[:8], values[2:10] - values[1:9])
        simple = gaps > 1e-6  # elsewhere the basis is free
        assert simple.sum() >= 6
        for name in ("official_lap_pos_enc", "pyg_lap_pe_eig", "pyg_lap_pe_eigh"):
            same = (found.vectors[first:last] * tensors[f"g{i}.{name}"]).sum(0).abs()
            assert (same[simple] > 1 - 1e-5).all(), (i, name)


def test_random_walks_and_roles_of_recorded_molecules(molecules):
    edge_index, starts, tensors = molecules
    walks, found = random_walk(edge_index, starts, 20), roles(edge_index, starts)
    for i, (first, last) in enumerate(zip(starts.tolist(), starts[1:].tolist(), strict=False)):
        torch.testing.assert_close(walks[first:last], tensors[f"g{i}.pyg_rw_pe"], atol=1e-5, rtol=0)
        assert torch.equal(found[first:last], tensors[f"g{i}.official_wl_pos_enc"])
    assert walks.shape == (240, 20)


def path_graph(nodes: int) -> Tensor:
    steps = torch.arange(nodes - 1)
    there = torch.stack([steps, steps + 1])
    return torch.cat([there, there.flip(0)], 1)


def one(nodes: int) -> Tensor:
    return torch.tensor([0, nodes], dtype=torch.int32)


@WAYS
def test_odd_graphs_always_have_k_columns(way):
    """Recorded: torch-geometric raises for most of these, the published code gives fewer columns."""
    file = Path(__file__).parents[1] / "golden" / "graph" / "pe_odd_graphs_a.json"
    cases = json.loads(file.read_text())["cases"]
    seen = 0
    for name, case in cases.items():
        if not name.startswith("official_lap") or "plus" in name:
            continue
        nodes, k = int(name.split(" of ")[1].split()[0]), int(name.split("k=")[1])
        found = laplacian(path_graph(nodes), one(nodes), k)
        assert found.shape == (nodes, k)
        wanted = torch.tensor(case["values"]).view(nodes, -1)
        count = wanted.shape[1]
        torch.testing.assert_close(found[:, :count].abs(), wanted.abs(), atol=1e-5, rtol=0)
        assert not found[:, count:].any()
        seen += 1
    assert seen >= 7


@WAYS
def test_isolated_nodes_and_components(way):
    """An isolated node has eigenvalue 1; each component but one has a zero."""
    recorded = torch.tensor([[0.0, 0.5, 0.0, 0.5], [0.0, 1.0, 0.0, 1.0], [0.0, 0.5, 0.0, 0.5], [0.0] * 4])
    edge_index = path_graph(3)
    assert torch.allclose(random_walk(edge_index, one(4), 4), recorded)
    found = laplacian_spectrum(edge_index, one(4), 3)
    assert torch.allclose(found.values, torch.tensor([[1.0, 1.0, 2.0]], dtype=torch.float64))
    check_spectrum(edge_index, one(4), 3)
    twice = torch.cat([path_graph(3), path_graph(4) + 3], 1)
    check_spectrum(twice, one(7), 6)
    assert (laplacian_spectrum(twice, one(7), 6).values[0, 0]).abs() < 1e-12
    nothing = torch.zeros(2, 0, dtype=torch.int64)
    assert torch.equal(laplacian_spectrum(nothing, one(3), 2).values, torch.ones(1, 2, dtype=torch.float64))
    check_spectrum(nothing, one(3), 2)


@WAYS
def test_loops_repeated_and_directed_edges(way):
    edges = path_graph(5)
    looped = torch.cat([edges, torch.tensor([[2, 4], [2, 4]])], 1)
    assert torch.equal(laplacian(looped, one(5), 3), laplacian(edges, one(5), 3))
    check_spectrum(torch.cat([edges, edges[:, :3]], 1), one(5), 3)
    check_spectrum(edges[:, :4], one(5), 3)  # one direction alone
    walk = random_walk(torch.tensor([[0], [0]]), one(1), 3)
    assert torch.equal(walk, torch.ones(1, 3))
    assert not random_walk(torch.tensor([[0, 1], [1, 2]]), one(3), 3).any()  # recorded: zeros
    assert degree(looped, 5, 8).tolist() == [1, 2, 3, 2, 2]


@WAYS
@pytest.mark.parametrize("share", [0.03, 0.2, 0.9])
def test_spectra_of_random_graphs(random_graphs, way, share):
    """Batches with graphs of no node, of one, of few, and larger ones than the compiled loops take."""
    sizes = [0, 1, 2, 3, 0, 40, 70, 23, 23, 5, 1, 64, 65, 8]
    starts = torch.tensor([0, *sizes]).cumsum(0).int()
    parts = []
    for size, first in zip(sizes, starts.tolist(), strict=False):
        own = torch.rand(size, size) < share
        parts.append((own | own.t()).fill_diagonal_(False).nonzero().t() + first)
    edge_index = torch.cat(parts, 1)
    check_spectrum(edge_index, starts, 9)
    shuffled = edge_index[:, torch.randperm(edge_index.shape[1])]
    torch.testing.assert_close(
        laplacian_spectrum(shuffled, starts, 9).values, laplacian_spectrum(edge_index, starts, 9).values,
        equal_nan=True,
    )  # fmt: skip


@WAYS
def test_a_graph_does_not_depend_on_its_batch(random_graphs, split, way):
    batch = random_graphs([12, 1, 30, 12, 2, 66, 12], seed=5)
    for encode in (lambda e, s: laplacian(e, s, 6), lambda e, s: random_walk(e, s, 7), roles,
                   lambda e, s: shortest_paths(e, s, 6)):  # fmt: skip
        alone = torch.cat([encode(g.edge_index, g.starts) for g in split(batch)])
        assert torch.equal(encode(batch.edge_index, batch.starts), alone)


def test_threads_give_the_same(random_graphs):
    batch = random_graphs([12, 70, 30, 12, 2, 9, 33], seed=6)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(laplacian(batch.edge_index, batch.starts, 6))
    torch.set_num_threads(before)
    assert torch.equal(*found)


def distances(edge_index: Tensor, first: int, last: int) -> list[list[float]]:
    """Breadth first, from each node."""
    ways: dict[int, list[int]] = {i: [] for i in range(first, last)}
    for i, j in edge_index.t().tolist():
        if i in ways:
            ways[i].append(j)
    found = []
    for begin in ways:
        seen, queue = {begin: 0}, deque([begin])
        while queue:
            i = queue.popleft()
            for j in ways[i]:
                if j not in seen:
                    seen[j] = seen[i] + 1
                    queue.append(j)
        found.append([seen.get(j, math.inf) for j in ways])
    return found


@pytest.mark.parametrize("most", [1, 3, 50])
def test_shortest_paths_by_breadth_first_search(random_graphs, most):
    batch = random_graphs([9, 1, 17, 9, 40], edges=1, seed=2)
    edge_index = batch.edge_index[:, torch.rand(batch.edge_index.shape[1]) < 0.7]  # some have one direction
    wanted = []
    for first, last in zip(batch.starts.tolist(), batch.starts[1:].tolist(), strict=False):
        for row in distances(edge_index, first, last):
            wanted += [most + 1 if math.isinf(d) else min(d, most) for d in row]
    found = shortest_paths(edge_index, batch.starts, most)
    assert found.tolist() == wanted
    assert most + 1 in wanted


def test_signs_flip_by_column_and_step():
    encoding, drawn = torch.rand(50, 8) + 1, torch.Generator().manual_seed(0)
    found = torch.stack([flip_signs(encoding, drawn) / encoding for _ in range(200)])  # [steps, N, k]
    assert set(found.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(found, found[:, :1].expand_as(found))  # one sign a column, for all nodes
    assert (found[:, 0].mean(0).abs() < 0.3).all()
    assert len({tuple(row) for row in found[:, 0].tolist()}) > 100


def test_roles_are_alike_where_neighbourhoods_are():
    found = roles(path_graph(6), one(6), rounds=1)
    assert found[0] == found[5] != found[1]
    assert len(set(found[1:5].tolist())) == 1
    assert len(set(roles(path_graph(6), one(6), rounds=3).tolist())) == 3


def test_what_cannot_be_encoded_is_refused(monkeypatch):
    edge_index = path_graph(4)
    for encode in (laplacian, random_walk, shortest_paths):
        with pytest.raises(UsageError, match="must be positive, not 0"):
            encode(edge_index, one(4), 0)
        with pytest.raises(ValueError, match="names node 3, and there are 3"):
            encode(edge_index, one(3), 2)
        with pytest.raises(ValueError, match="from one graph into another"):
            encode(edge_index, torch.tensor([0, 2, 4]), 2)
        monkeypatch.setattr(encodings, "LARGEST", 3)
        monkeypatch.setattr(encodings, "SMALL", -1)
        if encode is laplacian:  # which has a way for large graphs
            assert encode(edge_index, one(4), 2).shape == (4, 2)
        else:
            with pytest.raises(UsageError, match="a graph of 4 nodes is too large to be made dense"):
                encode(edge_index, one(4), 2)
        monkeypatch.undo()


def test_the_cache_knows_graphs_and_parameters(tmp_path, random_graphs):
    batch = random_graphs([12, 30, 3])
    calls = []

    def laplacian(edge_index: Tensor, starts: Tensor, k: int) -> Tensor:
        calls.append(k)
        return encodings.laplacian(edge_index, starts, k)

    def call(edge_index: Tensor, starts: Tensor, k: int) -> Tensor:
        found = cached(tmp_path, laplacian, edge_index, starts, k=k)
        assert torch.equal(found, encodings.laplacian(edge_index, starts, k))
        return found

    edges, starts = batch.edge_index, batch.starts
    call(edges, starts, 4)
    call(edges, starts.long(), 4)
    assert calls == [4]
    call(edges, starts, 5)
    call(edges[:, 2:], starts, 5)
    call(edges, torch.cat([starts, starts[-1:] + 1]), 5)
    assert calls == [4, 5, 5, 5]
    assert len(list(tmp_path.iterdir())) == 4
    broken = next(tmp_path.iterdir())
    broken.write_bytes(broken.read_bytes()[:50])
    call(edges, starts, 4), call(edges, starts, 5), call(edges[:, 2:], starts, 5)
    call(edges, torch.cat([starts, starts[-1:] + 1]), 5)
    assert len(calls) == 5
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("undirected", [False, True])
def test_torch_geometric_agrees(molecules, undirected):
    pytest.importorskip("scipy")
    from torch_geometric.data import Data
    from torch_geometric.transforms import AddLaplacianEigenvectorPE

    tensors = molecules[2]
    nodes = int(tensors["g0.num_nodes"])
    data = Data(edge_index=tensors["g0.edge_index"], num_nodes=nodes)
    peer = AddLaplacianEigenvectorPE(8, is_undirected=undirected)(data).laplacian_eigenvector_pe
    ours = laplacian(tensors["g0.edge_index"], one(nodes), 8)
    assert ((ours * peer).sum(0).abs() > 1 - 1e-5).all()
