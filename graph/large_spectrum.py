"""The low end of the Laplacian spectrum of one graph that is too large to be made dense.

Components are worked on one by one: each has the eigenvalue zero once, with a vector that is known, so that
no eigenvalue that two of them share is missed. Larger components go to ARPACK, which begins at a fixed
vector: products with the matrix first, and where they do not converge (long thin graphs) the factorised one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from manyheads.core.errors import DataError

DENSE = 512  # nodes of a component up to which LAPACK is faster
SHIFT = -1e-3  # below the spectrum: what is factorised is positive definite
ROUNDS = 50  # restarts of ARPACK's first way
WRONG = 1e-8  # the largest residual that is let through

Pairs = tuple[NDArray[np.float64], NDArray[np.float64]]


def large_spectrum(source: NDArray[np.int64], target: NDArray[np.int64], nodes: int, k: int) -> Pairs:
    """Return the second to (k + 1)-th eigenpairs, each vector with its largest entry positive.

    Args:
        source, target: The edges' ends, from 0; self-loops are left out, edges of one direction count half.
        nodes: More than k.
        k: Eigenpairs.

    Shape:
        source, target `[E]`; the results `[k]` and `[nodes, k]`.

    Raises:
        DataError: The spectrum did not converge.
    """
    from scipy.sparse import coo_array, csr_array
    from scipy.sparse.csgraph import connected_components

    keep = source != target
    half = np.full(2 * int(keep.sum()), 0.5)
    ends = np.concatenate([source[keep], target[keep]]), np.concatenate([target[keep], source[keep]])
    links = csr_array(coo_array((half, ends), shape=(nodes, nodes)))
    degrees = links.sum(1)
    scale = np.divide(1.0, np.sqrt(degrees), out=np.zeros(nodes), where=degrees > 0)
    near = links.multiply(scale[:, None]).multiply(scale).tocsr()  # 1 - its eigenvalues are the Laplacian's
    count, owner = connected_components(near, directed=False)
    members = np.split(np.argsort(owner, kind="stable"), np.bincount(owner).cumsum()[:-1])
    linked = sum(len(rows) > 1 for rows in members)
    found: list[tuple[float, NDArray[np.int64], NDArray[np.float64]]] = []
    for rows in members:
        if len(rows) == 1:
            found.append((1.0, rows, np.ones(1)))
            continue
        root = np.sqrt(degrees[rows])
        found.append((0.0, rows, root / np.linalg.norm(root)))
        if linked < k + 1:
            part = near[rows][:, rows] if count > 1 else near
            values, vectors = _component(part, min(k, len(rows) - 1))
            found += [(value, rows, vectors[:, i]) for i, value in enumerate(values)]
    found.sort(key=lambda one: one[0])
    values, basis = np.zeros(k), np.zeros((nodes, k))
    for i, (value, rows, vector) in enumerate(found[1 : k + 1]):
        values[i] = value
        basis[rows, i] = vector * np.sign(vector[np.abs(vector).argmax()])
    wrong = np.abs(basis - near @ basis - basis * values).max()
    if not wrong < WRONG:
        raise DataError(f"graph encodings: the spectrum of a graph of {nodes} nodes is off by {wrong:.1e}")
    return values, basis


def _component(near: Any, k: int) -> Pairs:
    """The second to (k + 1)-th eigenpairs of one component."""
    from scipy.sparse import eye_array
    from scipy.sparse.linalg import ArpackError, eigsh

    size = near.shape[0]
    if size <= max(DENSE, 4 * k):
        values, vectors = np.linalg.eigh(np.eye(size) - near.toarray())
        return values[1 : k + 1], vectors[:, 1 : k + 1]
    start = np.random.default_rng(0).standard_normal(size)
    try:
        values, vectors = eigsh(near, k + 1, which="LA", v0=start, ncv=max(2 * k + 2, 40), maxiter=ROUNDS)
        values = 1 - values
    except ArpackError:
        try:
            own = (eye_array(size) - near).tocsc()
            values, vectors = eigsh(own, k + 1, sigma=SHIFT, which="LM", v0=start)
        except (RuntimeError, MemoryError) as error:
            raise DataError(
                f"graph encodings: the spectrum of a graph of {size} nodes did not converge"
            ) from error
    order = np.argsort(values)[1:]
    return values[order], vectors[:, order]
