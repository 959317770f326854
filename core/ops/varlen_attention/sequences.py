"""Packed sequences on the CPU: where each lies, and how they are shared out to threads."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from manyheads.core import parallel
from manyheads.core.ops.packed import bounds

# Scores (over all heads) that one part should have at least: below, starting it costs more than it saves.
PART = 512 * 1024


class Sequence(NamedTuple):
    """One sequence's rows of the packed queries and keys; if causal, without queries that see no key."""

    query: int
    nq: int
    key: int
    nk: int

    def queries(self, x: Tensor) -> Tensor:
        """The sequence's part of a tensor of all queries."""
        return x.narrow(0, self.query, self.nq)

    def keys(self, x: Tensor) -> Tensor:
        """The sequence's part of a tensor of all keys."""
        return x.narrow(0, self.key, self.nk)


def sequences(q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, causal: bool) -> tuple[list[Sequence], bool]:
    """Return the sequences with work to do, longest first, and whether they cover every query and key."""
    starts_q = bounds("varlen_attention", cu_q, q.shape[0], "cu_seqlens_q")
    starts_k = bounds("varlen_attention", cu_k, k.shape[0], "cu_seqlens_k")
    found, whole = [], True
    for i in range(len(starts_q) - 1):
        query, end_q, key, end_k = *starts_q[i : i + 2], *starts_k[i : i + 2]
        nq, nk = end_q - query, end_k - key
        seeing = min(nq, nk) if causal else nq
        if seeing and nk:
            found.append(Sequence(end_q - seeing, seeing, key, nk))
        whole = whole and seeing == nq and bool(nq) == bool(nk)
    return sorted(found, key=lambda one: -one.nq * one.nk), whole


def parts(of: list[Sequence], heads: int) -> list[list[Sequence]]:
    """Cut into parts for threads to take one after another; the same parts for the same lengths.

    One sequence that outweighs all others gets every thread: then there is one part.
    """
    costs = [one.nq * one.nk * heads for one in of]
    if not costs or costs[0] * parallel.workers() > sum(costs):
        return [of]
    found: list[list[Sequence]] = [[]]
    filled = 0
    for one, cost in zip(of, costs, strict=True):
        if filled >= PART:
            found.append([])
            filled = 0
        found[-1].append(one)
        filled += cost
    return found
