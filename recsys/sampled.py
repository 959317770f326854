"""Ranks among a few drawn items, as older papers report them. They flatter, and do not even keep the order of
models (Krichene and Rendle 2020): only where they are asked for, under names that say so."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manyheads.core.errors import UsageError
from manyheads.recsys.metrics import Standing
from manyheads.recsys.retrieval import Factors
from manyheads.recsys.sequences import Cells

Kind = Literal["uniform", "popularity"]


def prefix(kind: Kind, count: int) -> str:
    """Return what stands before the name of each such figure."""
    return f"sampled_{kind}{count}_"


def draw(
    excluded: Cells,
    users: int,
    counts: NDArray[np.integer],
    number: int,
    kind: Kind = "uniform",
    seed: int = 0,
) -> NDArray[np.int32]:
    """Draw different items for each user, none of the excluded; the same for the same seed.

    Args:
        excluded: What a user has chosen, the target with it.
        users: For how many users.
        counts: How often each item was chosen in training: the chances of "popularity".
        number: Items a user.
        kind: "uniform" over the catalogue, or by "popularity".
        seed: Of the draws.

    Raises:
        UsageError: A user has not as many items left that can be drawn.

    Shape:
        counts `[items]`; the result `[users, number]`.
    """
    rng = np.random.default_rng(seed)
    chances = np.ones(len(counts)) if kind == "uniform" else counts.astype(float)
    found = np.empty((users, number), np.int32)
    edges = np.searchsorted(excluded.rows, np.arange(users + 1))
    for user in range(users):
        # The smallest of exponential times at these rates: draws without replacement, one after the other.
        with np.errstate(divide="ignore"):
            times = rng.exponential(size=len(counts)) / chances
        times[excluded.items[edges[user] : edges[user + 1]]] = np.inf
        best = np.argpartition(times, number - 1)[:number] if number <= len(times) else np.arange(0)
        if not len(best) or not np.isfinite(times[best]).all():
            raise UsageError(f"sampled metrics: a user has not {number} items left to draw ({kind})")
        found[user] = best[np.argsort(times[best])]
    return found


@torch.no_grad()
def standing_among(factors: Factors, targets: Tensor, drawn: Tensor) -> Standing:
    """Return how each user's target stands among the drawn items.

    Shape:
        targets `[B]`; drawn `[B, n]`.
    """
    items = torch.cat((targets[:, None], drawn), 1)
    scores = torch.einsum("bh,bnh->bn", factors.queries, factors.items[items])
    if factors.bias is not None:
        scores = scores + factors.bias[items]
    own, others = scores[:, :1], scores[:, 1:]
    ties = (others == own).sum(1)
    return Standing(drawn.shape[1] - (others < own).sum(1) - ties, ties)
