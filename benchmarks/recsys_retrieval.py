"""Recommendations for many users over a large catalogue: python -m benchmarks.recsys_retrieval [--users N].

The job is 100,000 users over 1,000,000 items of width 64, of which 2,000 users are run here and the rest is
said by their rate: users go by in blocks, so that the time is in proportion, and memory does not grow. Every
user has seen 100 items. The peer is what is usually written: all scores of some users, and torch's topk.
"""

from __future__ import annotations

import argparse
import resource
import time

import torch

from manyheads.recsys.retrieval import Factors, Pairs, top_k

USERS, ITEMS, WIDTH, SEEN, K = 100_000, 1_000_000, 64, 100, 10
PEER_USERS = 128  # of a block: 512 MB of scores


def plain(factors: Factors, seen: Pairs) -> torch.Tensor:
    """The usual way."""
    found = []
    for first in range(0, len(factors.queries), PEER_USERS):
        end = min(first + PEER_USERS, len(factors.queries))
        scores = factors.queries[first:end] @ factors.items.T
        inside = seen.part(first, end)
        scores[inside.rows, inside.items] = -torch.inf
        found.append(scores.topk(K).indices)
    return torch.cat(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--users", type=int, default=2000, help="that are run (2000)")
    parser.add_argument("--peer-users", type=int, default=256, help="that the peer runs (256)")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    factors = Factors(torch.randn(options.users, WIDTH), torch.randn(ITEMS, WIDTH))
    seen = Pairs(
        torch.arange(options.users).repeat_interleave(SEEN), torch.randint(0, ITEMS, (options.users * SEEN,))
    )
    top_k(factors.part(0, 4), K, seen.part(0, 4))  # compiles
    for users in (options.users // 4, options.users):
        before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        found = top_k(factors.part(0, users), K, seen.part(0, users))
        seconds = time.process_time() - begin
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        print(
            f"ours: {users:,} users x {ITEMS:,} items of {WIDTH}, {K} each: {seconds:.1f} s of CPU, "
            f"{users / seconds:,.0f} users/s; {USERS:,} users in {USERS / users * seconds / 60:.1f} min; "
            f"memory grew by {grown:.0f} MiB",
            flush=True,
        )
    few = min(options.peer_users, options.users)
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    peer = plain(factors.part(0, few), seen.part(0, few))
    theirs = (time.process_time() - begin) / few
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"peer: {1 / theirs:,.0f} users/s, memory grew by {grown:.0f} MiB")
    print(f"ours is {theirs * options.users / seconds:.1f}x as fast")
    same = (peer == found.items[:few]).float().mean()
    print(f"the same items: {same:.2%} (scores of blocks differ in the last bit)")


if __name__ == "__main__":
    main()
