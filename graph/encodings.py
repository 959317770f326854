"""Where a node lies in its graph: encodings of whole batches of graphs at once.

Graphs of one size are worked on together as dense matrices, and spectra of small graphs by compiled loops:
exact, nothing padded, and a graph's numbers do not depend on the others in the batch. Spectra of graphs too
large to be made dense come from sparse matrices. An edge that is there several times counts as often.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from manyheads.core import parallel
from manyheads.core.dispatch import numba_installed
from manyheads.core.errors import UsageError
from manyheads.graph.graphs import graph_ids

LARGEST = 8192  # nodes of a graph that is made dense: half a GiB in float64
SMALL = 64  # nodes up to which compiled loops are faster than LAPACK
CHUNK = 8 * 1024 * 1024  # numbers of one stack of matrices


class Spectrum(NamedTuple):
    """The low end of graphs' Laplacian spectra.

    Attributes:
        values: Eigenvalues, ascending; 1-based the second to the (k + 1)-th; NaN where a graph has fewer.
        vectors: Each node's entries of their eigenvectors; zero where a graph has fewer.

    Shape:
        values `[B, k]`; vectors `[N, k]`; both float64.
    """

    values: Tensor
    vectors: Tensor


def laplacian(edge_index: Tensor, starts: Tensor, k: int) -> Tensor:
    """Laplacian encodings: entries of the eigenvectors of `I - D^-1/2 A D^-1/2`, the first one left out.

    Their signs are free, so that training flips them (`flip_signs`), and where eigenvalues are equal, so is
    the basis. Here each has the sign that makes its largest entry positive. A graph of n <= k nodes has n - 1
    columns, then zeros; one node has zeros alone. Self-loops are left out. Edges of one direction count half.
    An isolated node has eigenvalue 1, as published, so that it does not hide among the components' zeros.

    Args:
        edge_index: Sources in row 0, destinations in row 1, all graphs'.
        starts: Where each graph's nodes begin, and the end of the last.
        k: Columns.

    Shape:
        edge_index `[2, E]`; starts `[B + 1]`; the result `[N, k]` float32.

    Raises:
        UsageError: k is not positive.
        DataError: The spectrum of a graph too large to be made dense did not converge.
        ValueError: An edge names a node that is not there, or leads into another graph.

    Source:
        Dwivedi and Bresson 2020, arXiv 2012.09699.

    Example:
        >>> laplacian(torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]), torch.tensor([0, 3]), 4).shape
        torch.Size([3, 4])
    """
    return laplacian_spectrum(edge_index, starts, k).vectors.float()


def laplacian_spectrum(edge_index: Tensor, starts: Tensor, k: int) -> Spectrum:
    """Return the eigenvalues too; arguments as `laplacian`."""
    _positive("k", k)
    nodes = int(starts[-1])
    values = torch.full((starts.shape[0] - 1, k), float("nan"), dtype=torch.float64, device=starts.device)
    vectors = torch.zeros(nodes, k, dtype=torch.float64, device=starts.device)
    found = Spectrum(values, vectors)
    small = torch.zeros_like(values[:, 0], dtype=torch.bool)
    if edge_index.is_cpu and numba_installed():
        small = starts.diff() <= SMALL
        if bool(small.any()):
            _small_spectra(edge_index, starts, small, found)
    large = starts.diff() > LARGEST
    if bool(large.any()):
        _large_spectra(edge_index, starts, large, found)
    if not bool((small | large).all()):
        for graphs, rows, dense in _matrices(edge_index, starts, ~(small | large)):
            _spectra(graphs, rows, dense, found)
    return found


def _small_spectra(edge_index: Tensor, starts: Tensor, small: Tensor, found: Spectrum) -> None:
    """Fill in the spectra of small graphs by compiled loops, graphs shared out to torch's threads."""
    from manyheads.graph.spectrum_kernels import spectra

    source, target, owner = _edges(edge_index, starts)
    first = torch.searchsorted(owner, torch.arange(starts.shape[0]))
    a, b, c, d = (x.numpy() for x in (source, target, first, starts.long()))
    values, vectors = found.values.numpy(), found.vectors.numpy()
    sizes = starts.diff()
    graphs = (small & (sizes > 1)).nonzero().flatten()
    # like sizes side by side: a kernel takes eight graphs at a time
    groups = graphs[sizes[graphs].argsort(descending=True, stable=True)].split(8)
    failed = []

    def part(own: Tensor) -> None:
        failed.append(spectra(a, b, c, d, own.numpy(), values, vectors))

    count = parallel.workers()
    parallel.run([partial(part, torch.cat(own)) for i in range(count) if (own := groups[i::count])])
    assert not any(failed), "a Laplacian's spectrum did not converge"


def _large_spectra(edge_index: Tensor, starts: Tensor, large: Tensor, found: Spectrum) -> None:
    """Fill in the spectra of graphs that are too large to be made dense, one by one on the CPU."""
    from manyheads.graph.large_spectrum import large_spectrum

    source, target, owner = _edges(edge_index, starts)
    for graph in large.nonzero().flatten().tolist():
        first, last = int(starts[graph]), int(starts[graph + 1])
        a, b = ((x[owner == graph] - first).cpu().numpy() for x in (source, target))
        values, vectors = large_spectrum(a, b, last - first, found.values.shape[1])
        found.values[graph] = torch.from_numpy(values)
        found.vectors[first:last] = torch.from_numpy(vectors)


def _spectra(graphs: Tensor, rows: Tensor, dense: Tensor, found: Spectrum) -> None:
    """Fill in the spectra of graphs of one size by LAPACK."""
    k, size = found.values.shape[1], dense.shape[1]
    dense.diagonal(dim1=1, dim2=2).zero_()
    dense = (dense + dense.transpose(1, 2)) / 2
    degrees = dense.sum(2)
    scale = degrees.rsqrt().where(degrees > 0, 0.0)
    own = torch.eye(size, dtype=dense.dtype, device=dense.device)
    values, basis = torch.linalg.eigh(own - scale[:, :, None] * dense * scale[:, None, :])
    values, basis = values[:, 1 : k + 1], basis[:, :, 1 : k + 1]  # [G, c], [G, n, c]; c < n
    if basis.shape[2]:
        basis = basis * basis.gather(1, basis.abs().argmax(1, keepdim=True)).sign()
        found.values[graphs, : values.shape[1]] = values
        found.vectors[rows.flatten(), : basis.shape[2]] = basis.flatten(0, 1)


def flip_signs(encoding: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Give each column a random sign, one for the whole batch: for every training step anew, never after it.

    Shape:
        encoding, the result `[N, k]`.
    """
    shape = encoding.shape[1:]
    coin = torch.randint(0, 2, shape, generator=generator, device=encoding.device)
    return encoding * (2 * coin - 1).to(encoding.dtype)


def random_walk(edge_index: Tensor, starts: Tensor, steps: int) -> Tensor:
    """Chance that a walk of 1, 2, ... steps along random edges ends where it began.

    The walk follows the edges' direction; self-loops are steps. From a node without outgoing edges there is
    no walk: zeros.

    Args:
        edge_index: Sources in row 0, destinations in row 1, all graphs'.
        starts: Where each graph's nodes begin, and the end of the last.
        steps: Columns.

    Shape:
        edge_index `[2, E]`; starts `[B + 1]`; the result `[N, steps]` float32.

    Raises:
        UsageError: steps is not positive, or a graph is too large to be made dense.
        ValueError: An edge names a node that is not there, or leads into another graph.

    Source:
        Dwivedi et al. 2021, arXiv 2110.07875.
    """
    _positive("steps", steps)
    chance = torch.zeros(int(starts[-1]), steps, dtype=torch.float64, device=starts.device)
    for _, rows, dense in _matrices(edge_index, starts):
        step = dense / dense.sum(2, keepdim=True).clamp(min=1)
        walk = step
        for i in range(steps):
            walk = walk @ step if i else step
            chance[rows.flatten(), i] = walk.diagonal(dim1=1, dim2=2).flatten()
    return chance.float()


def degree(edge_index: Tensor, num_nodes: int, most: int, *, outgoing: bool = False) -> Tensor:
    """Count each node's incoming edges, up to `most`, as a category to embed (`most` + 1 of them).

    A self-loop is one edge.

    Args:
        edge_index: Sources in row 0, destinations in row 1.
        num_nodes: Nodes, isolated ones included.
        most: From here on all degrees are one category.
        outgoing: Count outgoing edges instead.

    Shape:
        edge_index `[2, E]`; the result `[num_nodes]` int64.

    Raises:
        UsageError: most is not positive.
    """
    _positive("most", most)
    row = edge_index[0 if outgoing else 1].long()
    return torch.bincount(row, minlength=num_nodes).clamp(max=most)


def shortest_paths(edge_index: Tensor, starts: Tensor, most: int) -> Tensor:
    """Steps from each node to each other of its graph: 0 to `most`, and `most` + 1 where there is no way.

    Distances above `most` are given as `most`. Ways follow the edges' direction.

    Args:
        edge_index: Sources in row 0, destinations in row 1, all graphs'.
        starts: Where each graph's nodes begin, and the end of the last.
        most: The largest distance that is told from larger ones.

    Shape:
        edge_index `[2, E]`; starts `[B + 1]`; the result `[n1 ** 2 + n2 ** 2 + ...]` int16: graph after
        graph, the n x n numbers of each row by row, from the row's node to the column's.

    Raises:
        UsageError: most is not positive, or a graph is too large to be made dense.
        ValueError: An edge names a node that is not there, or leads into another graph.
    """
    _positive("most", most)
    sizes = starts.diff().long()
    squares = sizes.square()
    first = squares.cumsum(0) - squares
    found = torch.zeros(int(squares.sum()), dtype=torch.int16, device=starts.device)
    for graphs, _, dense in _matrices(edge_index, starts):
        size = dense.shape[1]
        step = (dense > 0).float()
        reached = torch.eye(size, dtype=torch.bool, device=starts.device).expand(dense.shape).clone()
        distance = (~reached).short() * (most + 1)
        for length in range(1, size):
            nearer = (reached.float() @ step > 0) & ~reached
            if not bool(nearer.any()):
                break
            distance[nearer] = min(length, most)
            reached |= nearer
        where = first[graphs, None] + torch.arange(size * size, device=starts.device)
        found[where.flatten()] = distance.flatten()
    return found


def roles(edge_index: Tensor, starts: Tensor, rounds: int = 1) -> Tensor:
    """Weisfeiler-Lehman roles: nodes with the same neighbourhood in their graph have the same number.

    In each round a node's colour becomes the hash of its own and its neighbours'; the numbers, from 1, are
    the ranks of a graph's hashes. The published code asks for two rounds and keeps the first: 1 is its
    result. A neighbour counts once, however many edges there are, and directions do not matter.

    Args:
        edge_index: Sources in row 0, destinations in row 1, all graphs'.
        starts: Where each graph's nodes begin, and the end of the last.
        rounds: How far a neighbourhood reaches.

    Shape:
        edge_index `[2, E]`; starts `[B + 1]`; the result `[N]` int64, at most the largest graph's nodes.

    Raises:
        UsageError: rounds is not positive.
        ValueError: An edge names a node that is not there, or leads into another graph.

    Source:
        Zhang et al. 2020, arXiv 2001.05140, as in arXiv 2012.09699.
    """
    _positive("rounds", rounds)
    sources, targets, _ = _edges(edge_index, starts)
    nodes = int(starts[-1])
    neighbours: list[set[int]] = [set() for _ in range(nodes)]
    for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
        neighbours[source].add(target)
        neighbours[target].add(source)
    colour = [1] * nodes
    bounds = starts.tolist()
    for _ in range(rounds):
        texts = (
            "_".join([str(own), *sorted(str(colour[n]) for n in near)])
            for own, near in zip(colour, neighbours, strict=True)
        )
        hashes = [hashlib.md5(text.encode(), usedforsecurity=False).hexdigest() for text in texts]
        colour = []
        for low, high in itertools.pairwise(bounds):
            rank = {text: i for i, text in enumerate(sorted(set(hashes[low:high])), 1)}
            colour += [rank[text] for text in hashes[low:high]]
    return torch.tensor(colour, dtype=torch.int64, device=starts.device)


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise UsageError(f"graph encodings: {name} must be positive, not {value}")


def _edges(edge_index: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sources, destinations and graphs of the edges, graph after graph.

    Raises:
        ValueError: edge_index is no such thing, names a node that is not there, or joins two graphs.
    """
    if edge_index.dim() != 2 or edge_index.shape[0] != 2:
        raise ValueError(f"graph encodings: edge_index must be [2, E], not {list(edge_index.shape)}")
    nodes = int(starts[-1])
    if edge_index.numel():
        low, high = (int(x) for x in edge_index.aminmax())
        if low < 0 or high >= nodes:
            wrong = low if low < 0 else high
            raise ValueError(f"graph encodings: an edge names node {wrong}, and there are {nodes}")
    source, target = edge_index.long().contiguous()
    graph = graph_ids(starts, nodes)
    owner = graph[source]
    if not torch.equal(owner, graph[target]):
        raise ValueError("graph encodings: an edge leads from one graph into another")
    if bool((owner.diff() < 0).any()):  # batches come in order
        owner, order = owner.sort(stable=True)
        source, target = source[order], target[order]
    return source, target, owner


def _matrices(
    edge_index: Tensor, starts: Tensor, chosen: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Graphs of one size at a time: their numbers `[G]`, nodes `[G, n]`, adjacencies `[G, n, n]` float64.

    Raises:
        UsageError: A graph is too large.
    """
    source, target, owner = _edges(edge_index, starts)
    starts = starts.long()
    sizes = starts.diff()
    wanted = sizes if chosen is None else sizes[chosen]
    if wanted.numel() and (most := int(wanted.max())) > LARGEST:
        raise UsageError(
            f"graph encodings: a graph of {most} nodes is too large to be made dense (at most {LARGEST})"
        )
    first = torch.searchsorted(owner, torch.arange(starts.shape[0], device=starts.device))
    counts = first.diff()
    for size in wanted.unique().tolist():
        same = (sizes == size).nonzero().flatten()
        for graphs in same.split(max(1, CHUNK // max(1, size * size))):
            if not size:
                continue
            # the numbers of these graphs' edges: a run from each graph's first
            each = counts[graphs]
            place = torch.repeat_interleave(first[graphs] - (each.cumsum(0) - each), each)
            edges = place + torch.arange(place.shape[0], device=place.device)
            local = torch.repeat_interleave(torch.arange(graphs.shape[0], device=place.device), each)
            index = (local * size + source[edges] - starts[graphs][local]) * size
            index = index + target[edges] - starts[graphs][local]
            flat = torch.bincount(index, minlength=graphs.shape[0] * size * size)
            rows = starts[graphs, None] + torch.arange(size, device=starts.device)
            yield graphs, rows, flat.view(-1, size, size).double()
