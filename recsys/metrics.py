"""How well recommendations foretell what users chose next, over the whole catalogue.

A target's rank is 1 and the items with a higher score, and half of those with the same score: the mean of
the ranks that it has in all orders of equals. A score that is NaN counts against the recommender: of the
target, as the lowest of all; of another item, as higher than the target's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manyheads.core.errors import UsageError
from manyheads.recsys.retrieval import Factors, Pairs

Floats = NDArray[np.float64]
CELLS = 1 << 24  # scores held at once


class Standing(NamedTuple):
    """How targets stand among the items that their users could be given.

    Args:
        above: Items with a higher score.
        ties: Others with the same.

    Shape:
        `[targets]`.
    """

    above: Tensor
    ties: Tensor

    def ranks(self, ties: Literal["average", "optimistic", "pessimistic"] = "average") -> Floats:
        """Return ranks from 1; equals count half, not at all, or whole."""
        share = {"average": 0.5, "optimistic": 0.0, "pessimistic": 1.0}[ties]
        return (1 + self.above + share * self.ties).double().cpu().numpy()


@torch.no_grad()
def standing(
    factors: Factors, targets: Pairs, seen: Pairs | None = None, items: int | None = None
) -> Standing:
    """Return how each target stands among all items but those that its user has seen.

    A seen item that is the target stays. Other targets of the same user are items as any.

    Args:
        factors: The scores.
        targets: What users chose.
        seen: What is left out of the ranking.
        items: Items of a block; None takes as many as keep it small. One block's scores are computed once,
            those of several twice: a target's score must be its block's own, bit by bit.
    """
    rows, total = len(targets.rows), len(factors.items)
    size = min(total, items or max(1024, CELLS // max(1, len(factors.queries), rows)))
    blocks = [(first, min(first + size, total)) for first in range(0, total, size)]
    kept = factors.scores(0, total) if len(blocks) == 1 else None
    own = factors.queries.new_empty(rows)
    for first, end in blocks:
        here = (targets.items >= first) & (targets.items < end)
        if here.any():
            scores = factors.scores(first, end) if kept is None else kept
            own[here] = scores[targets.rows[here], targets.items[here] - first]
    out = _left_out(targets, seen, len(factors.queries), total)
    counted = torch.int32  # torch adds bools up in this one many times faster than in its own choice
    below = torch.zeros(rows, dtype=torch.long, device=own.device)
    ties = torch.zeros_like(below)
    straight = rows == len(factors.queries) and bool((targets.rows.diff() == 1).all())
    for first, end in blocks:
        scores = factors.scores(first, end) if kept is None else kept
        inside = (out.items >= first) & (out.items < end)
        which = out.rows[inside]
        less = scores[targets.rows[which], out.items[inside] - first]
        scores = scores if straight else scores[targets.rows]
        below += (
            (scores < own[:, None])
            .sum(1, dtype=counted)
            .index_add_(0, which, -(less < own[which]).to(counted))
        )
        ties += (
            (scores == own[:, None])
            .sum(1, dtype=counted)
            .index_add_(0, which, -(less == own[which]).to(counted))
        )
    others = total - torch.bincount(out.rows, minlength=rows)
    return Standing(others - below - ties, ties)


def _left_out(targets: Pairs, seen: Pairs | None, users: int, total: int) -> Pairs:
    """Return the items that do not count beside each target: itself, and once each that its user has seen."""
    device = targets.rows.device
    every = torch.arange(len(targets.rows), device=device)
    if seen is None:
        return Pairs(every, targets.items)
    cells = torch.unique(seen.rows * total + seen.items)
    rows, items = cells.div(total, rounding_mode="floor"), cells % total
    starts = torch.searchsorted(rows, torch.arange(users + 1, device=device))
    first, end = starts[targets.rows], starts[targets.rows + 1]
    which = torch.repeat_interleave(every, end - first)
    begin = torch.cumsum(end - first, 0) - (end - first)
    found = items[torch.arange(len(which), device=device) - begin[which] + first[which]]
    other = found != targets.items[which]
    return Pairs(torch.cat((which[other], every)), torch.cat((found[other], targets.items)))


def measure(
    ranks: Floats,
    rows: NDArray[np.integer],
    ks: Sequence[int] = (1, 5, 10, 20),
    counts: NDArray[np.integer] | None = None,
) -> dict[str, float]:
    """Return the means over users of what ranks say.

    - `hr@k`: whether a target is among the first k.
    - `recall@k`: which share of the targets is, of at most k; only where a user has several.
    - `ndcg@k`: 1 / log2(1 + rank) of the targets among the first k, of the most that there could be.
    - `mrr@k`: 1 / rank of the best target, if among the first k; `mrr` without that.
    - `stratified_hr@k`, `stratified_ndcg@k`: as those, but each target weighs 1 / its count in training (1 if
      it has none): as if every item were asked for equally often.

    Args:
        ranks: Of targets, from 1.
        rows: Whose they are, in order.
        ks: The lengths of lists.
        counts: Of each target's item in training; without it nothing is stratified.

    Raises:
        UsageError: There are no ranks, or a k is not positive.

    Shape:
        ranks, rows, counts `[targets]`.

    Source:
        Steck 2011, "Item popularity and recommendation accuracy", for the strata.
    """
    if not len(ranks) or min(ks) < 1:
        raise UsageError("nothing to measure: there must be targets, and lists of at least one item")
    starts = np.flatnonzero(np.diff(rows, prepend=rows[0] - 1))
    sizes = np.diff(np.append(starts, len(rows)))
    first = np.minimum.reduceat(ranks, starts)
    weights = None if counts is None else 1 / np.maximum(counts, 1)
    discounts = np.cumsum(1 / np.log2(np.arange(2, max(ks) + 2)))
    found: dict[str, float] = {}
    for k in ks:
        hit = (ranks <= k).astype(float)
        gain = hit / np.log2(1 + ranks)
        found[f"hr@{k}"] = float((first <= k).mean())
        if sizes.max() > 1:
            found[f"recall@{k}"] = float((np.add.reduceat(hit, starts) / np.minimum(sizes, k)).mean())
        found[f"ndcg@{k}"] = float(
            (np.add.reduceat(gain, starts) / discounts[np.minimum(sizes, k) - 1]).mean()
        )
        found[f"mrr@{k}"] = float(((first <= k) / first).mean())
        if weights is not None:
            found[f"stratified_hr@{k}"] = float((weights * hit).sum() / weights.sum())
            found[f"stratified_ndcg@{k}"] = float((weights * gain).sum() / weights.sum())
    return found | {"mrr": float((1 / first).mean()), "mean_rank": float(ranks.mean())}


class Spread:
    """Which items recommendations reach, list by list.

    Args:
        counts: How often each item was chosen in training.
        users: Users that chose in training.
        ks: The lengths of lists.

    Shape:
        counts `[items]`.
    """

    def __init__(self, counts: NDArray[np.integer], users: int, ks: Sequence[int]) -> None:
        self.ks = tuple(ks)
        self._surprise = -np.log2((counts + 1) / (users + 1))
        self._given = {k: np.zeros(len(counts), np.int64) for k in ks}

    def add(self, items: NDArray[np.integer]) -> None:
        """Add lists of recommendations, best first; -1 is none.

        Shape:
            `[B, k]`, as wide as the largest k.
        """
        for k in self.ks:
            found = items[:, :k].ravel()
            self._given[k] += np.bincount(found[found >= 0], minlength=len(self._given[k]))

    def join(self, others: Sequence[Spread]) -> None:
        """Add what other processes have seen."""
        for other in others:
            for k in self.ks:
                self._given[k] += other._given[k]

    def figures(self) -> dict[str, float]:
        """Return the spread of all lists so far.

        - `coverage@k`: the share of the catalogue that is in a list.
        - `novelty@k`: bits of surprise of a recommendation, -log2 of the share of users that chose it in
          training (one more of both, for items that nobody chose).
        """
        found: dict[str, float] = {}
        for k, given in self._given.items():
            found[f"coverage@{k}"] = float((given > 0).mean())
            found[f"novelty@{k}"] = float((given * self._surprise).sum() / max(1, given.sum()))
        return found
