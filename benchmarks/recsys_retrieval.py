"""Recommendations for many users over a large catalogue: 1,000,000 items of width 64, 100 seen by each user.

The peer is what is usually written: all scores of some users, and torch's topk. The job of 100,000 users
goes block by block as `manyheads predict` does: its rate is printed, and how far its peak of memory is above
that of two blocks. With less than the usual seconds a line it stops sooner, and says where.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.measure import Case, Note, peak_bytes
from manyheads.recsys.retrieval import Factors, Pairs, Top, top_k

USERS, ITEMS, WIDTH, SEEN, K = 100_000, 1_000_000, 64, 100, 10
BLOCK = 256  # users of a batch: for the peer 1 GB of scores
USUAL = 6.0  # seconds a line
GROWTH = 32.0  # MiB that the job may take more than two blocks


def plain(factors: Factors, seen: Pairs) -> Tensor:
    """The usual way."""
    scores = factors.queries @ factors.items.T
    scores[seen.rows, seen.items] = -torch.inf
    return scores.topk(K).indices.sort(1).values


def ours(factors: Factors, seen: Pairs) -> Tensor:
    """The same items, blocks of the catalogue one after the other."""
    return top_k(factors, K, seen).items.sort(1).values


def drawn(items: Tensor, block: int) -> tuple[Factors, Pairs]:
    """Return a batch of users."""
    draw = torch.Generator().manual_seed(block)
    queries = torch.randn(BLOCK, WIDTH, generator=draw)
    seen = torch.randint(0, ITEMS, (BLOCK * SEEN,), generator=draw)
    return Factors(queries, items), Pairs(torch.arange(BLOCK).repeat_interleave(SEEN), seen)


def cases(device: str) -> Iterator[Case | Note]:
    """A batch against the peer, and the whole job."""
    items = torch.randn(ITEMS, WIDTH)
    factors, seen = drawn(items, 0)
    mine, other = partial(ours, factors, seen), partial(plain, factors, seen)
    shape = f"{BLOCK} users, {ITEMS:,} items"
    peer = f"torch {torch.__version__} matmul, topk"
    yield Case(
        f"top {K}, seen items left out", shape, peer, mine, other,
        difference=lambda: float((mine() != other()).double().mean()), tolerance=1e-3, memory=0.5, rounds=3,
    )  # fmt: skip
    yield Note(f"top {K}, the whole job", f"{USERS:,} users, {ITEMS:,} items", partial(job, items))


def job(items: Tensor, seconds: float) -> tuple[str, bool]:
    """Recommend to all users; tell the rate, and how memory grew behind two blocks."""
    blocks = -(-USERS // BLOCK)
    limit = float("inf") if seconds >= USUAL else 5 * seconds

    def run(count: int) -> tuple[int, float]:
        begin, wall = time.process_time(), time.perf_counter()
        for block in range(count):
            found: Top = top_k(*_arranged(items, block))
            assert int(found.items.min()) >= 0
            if time.perf_counter() - wall > limit:
                return block + 1, time.process_time() - begin
        return count, time.process_time() - begin

    few = peak_bytes(lambda: run(2))
    done: list[tuple[int, float]] = []
    whole = peak_bytes(lambda: done.append(run(blocks)), warm=False)
    count, took = done[0]
    users = min(count * BLOCK, USERS)
    grown = max(0, whole - few) / 2**20
    stopped = "" if users == USERS else f" (stopped at {users:,})"
    rate = f"{users / took:,.0f} users a CPU second{stopped}"
    return f"{rate}; peak {grown:.0f} MiB above that of two blocks, at most {GROWTH:.0f}", grown <= GROWTH


def _arranged(items: Tensor, block: int) -> tuple[Factors, int, Pairs]:
    factors, seen = drawn(items, block)
    return factors, K, seen
