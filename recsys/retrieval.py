"""The best items for many users: exact, block by block, in memory that does not grow with users times items.

Of equal scores the item with the lower number comes first. An item whose score is NaN or -inf is never given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from manyheads.core import parallel
from manyheads.core.errors import UsageError
from manyheads.core.products import linear

CPU_BLOCK, BLOCK = (256, 4096), (1024, 1 << 16)  # users and items: 4 MB of scores, which stay near; 256 MB
NONE = -1


class Factors(NamedTuple):
    """Scores of all items for some users: `queries @ items.T + bias`.

    Shape:
        queries `[B, H]`; items `[N, H]`; bias `[N]`.
    """

    queries: Tensor
    items: Tensor
    bias: Tensor | None = None

    def scores(self, first: int, end: int) -> Tensor:
        """Return the scores of a block of items, `[B, end - first]`."""
        bias = None if self.bias is None else self.bias[first:end]
        return linear(self.queries, self.items[first:end], bias)

    def part(self, first: int, end: int) -> Factors:
        """Return those of a block of users."""
        return Factors(self.queries[first:end], self.items, self.bias)

    def select(self, items: Tensor) -> Factors:
        """Return those of some items."""
        return Factors(self.queries, self.items[items], None if self.bias is None else self.bias[items])


class Pairs(NamedTuple):
    """Users' items, such as those that they have seen: `items[i]` is of row `rows[i]`.

    Shape:
        rows, items `[pairs]`; rows in order.
    """

    rows: Tensor
    items: Tensor

    @classmethod
    def of(cls, items: Tensor, starts: Tensor) -> Pairs:
        """Take a flat array and where each row begins, with the end of all: `starts [B + 1]`."""
        return cls(torch.repeat_interleave(torch.diff(starts).long()), items.long())

    def part(self, first: int, end: int) -> Pairs:
        """Return those of a block of rows, which are counted from its first."""
        low, high = torch.searchsorted(
            self.rows, torch.tensor([first, end], device=self.rows.device)
        ).tolist()
        return Pairs(self.rows[low:high] - first, self.items[low:high])


class Top(NamedTuple):
    """The best items of each user, best first.

    Args:
        items: Their numbers; -1 where a user has fewer.
        scores: Their scores; -inf there.

    Shape:
        items, scores `[B, k]`.
    """

    items: Tensor
    scores: Tensor


def allowed_items(
    num_items: int, allow: Sequence[int] | Tensor | None = None, deny: Sequence[int] | Tensor | None = None
) -> Tensor | None:
    """Return the items that may be recommended, in order; None where all may.

    Args:
        num_items: Items of the catalogue.
        allow: Only these.
        deny: None of these, also where they are in `allow`.

    Raises:
        UsageError: None is left.
    """
    if allow is None and deny is None:
        return None
    good = torch.full((num_items,), allow is None)
    if allow is not None:
        good[torch.as_tensor(allow, dtype=torch.long)] = True
    if deny is not None:
        good[torch.as_tensor(deny, dtype=torch.long)] = False
    if not good.any():
        raise UsageError("the lists of allowed and denied items leave nothing to recommend")
    return good.nonzero().squeeze(1)


def top_k(
    factors: Factors,
    k: int | Tensor,
    seen: Pairs | None = None,
    allowed: Tensor | None = None,
    users: int | None = None,
    items: int | None = None,
) -> Top:
    """Return the best items for each user.

    Args:
        factors: The scores.
        k: How many; a tensor says it for each user, and has the width of its largest.
        seen: Items that a user is not given.
        allowed: The only items that anybody is given, in order.
        users: Users of a block; None takes as many as are fast.
        items: Items of a block.

    Raises:
        UsageError: `k` is not positive.

    Shape:
        k `[B]`; allowed `[M]`.
    """
    width = int(k.max()) if isinstance(k, Tensor) else k
    if width < 1 or (isinstance(k, Tensor) and int(k.min()) < 0):
        raise UsageError(f"the number of recommendations must be at least 1, not {width}")
    if allowed is not None:
        place = torch.full((len(factors.items),), NONE, device=allowed.device)
        place[allowed] = torch.arange(len(allowed), device=allowed.device)
        if seen is not None:
            found = place[seen.items]
            seen = Pairs(seen.rows[found >= 0], found[found >= 0])
        factors = factors.select(allowed)
    blocks = CPU_BLOCK if factors.queries.is_cpu else BLOCK
    users, items = users or blocks[0], items or blocks[1]
    parts = [
        _best(factors.part(first, first + users), width, seen and seen.part(first, first + users), items)
        for first in range(0, len(factors.queries), users)
    ]
    found, scores = (torch.cat(each) for each in zip(*parts, strict=True))
    if allowed is not None:
        found = torch.where(found >= 0, allowed[found.clamp(min=0)], NONE)
    if isinstance(k, Tensor):
        over = torch.arange(width, device=found.device) >= k[:, None]
        found, scores = found.masked_fill(over, NONE), scores.masked_fill(over, -torch.inf)
    return Top(found, scores)


@torch.no_grad()
def _best(factors: Factors, k: int, seen: Pairs | None, items: int) -> Top:
    """Return the best items for a block of users: blocks of items go by, the best so far stay."""
    device, rows = factors.queries.device, len(factors.queries)
    best = Top(
        torch.full((rows, k), NONE, device=device),
        torch.full((rows, k), -torch.inf, dtype=factors.queries.dtype, device=device),
    )
    for first, end, inside in _blocks(len(factors.items), items, seen):
        scores = factors.scores(first, end)
        if inside is not None:
            scores[inside.rows, inside.items - first] = -torch.inf
        best = _merge_compiled(best, scores, first) if _compiles(scores) else _merge(best, scores, first)
    return best


def _blocks(num_items: int, size: int, seen: Pairs | None) -> Iterator[tuple[int, int, Pairs | None]]:
    """Yield blocks of items, each with the pairs in it."""
    if seen is None:
        yield from ((first, min(first + size, num_items), None) for first in range(0, num_items, size))
        return
    ordered, order = seen.items.sort()
    rows = seen.rows[order]
    edges = torch.arange(0, num_items + size, size, device=ordered.device)
    places = torch.searchsorted(ordered, edges).tolist()
    for number, first in enumerate(range(0, num_items, size)):
        low, high = places[number], places[number + 1]
        yield first, min(first + size, num_items), Pairs(rows[low:high], ordered[low:high])


def _merge(best: Top, scores: Tensor, first: int) -> Top:
    """Return the best of those so far, whose numbers are lower, and a block's.

    torch's `topk` takes any of several equal scores: where one is left out at the last place, the row's
    places are given anew, the lowest numbers first.
    """
    width = best.items.shape[1]
    k = min(width, scores.shape[1])
    scores = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    values, index = scores.topk(k)
    last = values[:, -1:]
    cut = ((scores == last).sum(1) > (values == last).sum(1)).nonzero().squeeze(1)
    if len(cut):
        rows, least = scores[cut], last[cut]
        equal = rows == least
        above = rows > least
        taken = above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True)))
        index[cut] = taken.nonzero()[:, 1].view(-1, k)
    index = index.sort(1).values
    values = scores.gather(1, index)
    items = torch.where(values > -torch.inf, index + first, NONE)
    scores = torch.cat((best.scores, values), 1)
    items = torch.cat((best.items, items), 1)
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :width]
    return Top(items.gather(1, order), scores.gather(1, order))


def _compiles(scores: Tensor) -> bool:
    """Whether the compiled loop can take these; without numba, torch does it."""
    if scores.device.type != "cpu" or scores.dtype not in (torch.float32, torch.float64):
        return False
    try:
        import numba  # noqa: F401
    except ImportError:
        return False
    return True


def _merge_compiled(best: Top, scores: Tensor, first: int) -> Top:
    """As `_merge`, in place."""
    from manyheads.recsys.retrieval_kernels import merge

    found, values, block = (each.numpy() for each in (best.items, best.scores, scores))
    edges = np.linspace(0, len(block), parallel.workers() + 1).astype(int).tolist()
    parallel.run(
        [
            partial(merge, block[low:high], first, values[low:high], found[low:high])
            for low, high in pairwise(edges)
        ]
    )
    return best
