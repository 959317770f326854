"""Spectra of graphs that are too large to be made dense: against known ones and LAPACK, and failures said."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor

from manyheads.core.errors import DataError
from manyheads.graph import encodings, large_spectrum
from manyheads.graph.encodings import LARGEST, laplacian, laplacian_spectrum


def both_ways(source: Tensor, target: Tensor) -> Tensor:
    there = torch.stack([source, target])
    return torch.cat([there, there.flip(0)], 1)


def random_graph(nodes: int, edges: int) -> Tensor:
    generator = torch.Generator().manual_seed(nodes)
    return both_ways(*torch.randint(0, nodes, (2, edges), generator=generator))


def check(edge_index: Tensor, nodes: int, values: Tensor, vectors: Tensor) -> None:
    """Residuals, unit lengths, right angles and signs, with sparse products."""
    edge_index = edge_index[:, edge_index[0] != edge_index[1]]
    degrees = torch.bincount(edge_index[0], minlength=nodes).double()
    scale = degrees.rsqrt().where(degrees > 0, 0.0)
    pulled = (scale[:, None] * vectors)[edge_index[1]]
    near = scale[:, None] * torch.zeros_like(vectors).index_add(0, edge_index[0], pulled)
    assert (vectors - near - vectors * values).abs().max() < 1e-10
    own = torch.eye(vectors.shape[1], dtype=torch.float64)
    torch.testing.assert_close(vectors.T @ vectors, own, atol=1e-10, rtol=0)
    assert (vectors.gather(0, vectors.abs().argmax(0, keepdim=True)) > 0).all()
    assert (values.diff() >= 0).all()


def test_a_ring_beside_small_graphs():
    """Twice each eigenvalue, and so near each other that only the factorised matrix tells them apart."""
    nodes = LARGEST + 1000
    ring = both_ways(torch.arange(nodes), (torch.arange(nodes) + 1) % nodes)
    small = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    starts = torch.tensor([0, 3, 3 + nodes, 6 + nodes], dtype=torch.int32)
    edge_index = torch.cat([small, ring + 3, small + 3 + nodes], 1)
    found = laplacian_spectrum(edge_index, starts, 4)
    wanted = torch.tensor([1 - math.cos(2 * math.pi * i / nodes) for i in (1, 1, 2, 2)]).double()
    torch.testing.assert_close(found.values[1], wanted, atol=1e-12, rtol=0)
    check(ring, nodes, found.values[1], found.vectors[3 : 3 + nodes])
    alone = laplacian_spectrum(small, torch.tensor([0, 3]), 4)
    assert torch.equal(found.vectors[:3], alone.vectors)
    assert torch.equal(found.vectors[-3:], alone.vectors)


@pytest.mark.parametrize("edges", [9000, 40000])
def test_random_graphs_of_real_size(edges):
    """With many components and isolated nodes, and of one."""
    edge_index = random_graph(10000, edges)
    found = laplacian_spectrum(edge_index, torch.tensor([0, 10000]), 8)
    check(edge_index, 10000, found.values[0], found.vectors)
    assert (found.values[0].abs() < 1e-12).sum() >= (8 if edges == 9000 else 0)
    again = laplacian(edge_index, torch.tensor([0, 10000]), 8)
    assert torch.equal(again, found.vectors.float())


@pytest.mark.parametrize("edges", [1200, 2400, 9000])
def test_values_are_lapacks(monkeypatch, edges):
    """Of a graph with a large component, small ones and isolated nodes, or of one component."""
    edge_index = torch.cat([random_graph(1200, edges), torch.tensor([[1200, 1201], [1201, 1200]])], 1)
    starts = torch.tensor([0, 1203])
    dense = laplacian_spectrum(edge_index, starts, 30)
    monkeypatch.setattr(encodings, "LARGEST", 1000)
    found = laplacian_spectrum(edge_index, starts, 30)
    torch.testing.assert_close(found.values, dense.values, atol=1e-12, rtol=0)
    check(edge_index, 1203, found.values[0], found.vectors)


def test_what_does_not_converge_is_said(monkeypatch):
    source, target = random_graph(1000, 3000).numpy()

    def give_up(*given, **options):
        raise scipy.sparse.linalg.ArpackNoConvergence("no", np.empty(0), np.empty(0))

    monkeypatch.setattr(large_spectrum, "WRONG", 0.0)
    with pytest.raises(DataError, match="spectrum of a graph of 1000 nodes is off by"):
        large_spectrum.large_spectrum(source, target, 1000, 4)
    monkeypatch.setattr(scipy.sparse.linalg, "eigsh", give_up)
    with pytest.raises(DataError, match=r"spectrum of a graph of [0-9]+ nodes did not converge"):
        large_spectrum.large_spectrum(source, target, 1000, 4)
