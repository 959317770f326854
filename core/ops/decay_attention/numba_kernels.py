"""What happens inside a chunk, as loops compiled for this CPU.

With a decay of each key channel, steps are counted in scan order: 0 is the first, or the last one of the
chunk when reversed. A weight is the product of its decays, built up step by step; the loops run over the key
channels, the contiguous axis.
"""

# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import numpy as np

from manyheads.core.jit import exp, inline, kernel

_TINY = np.float32(1e-37)  # smaller products become zero: subnormal numbers are slow


@inline
def _flushed(x):
    return np.float32(0.0) if abs(x) < _TINY else x


@kernel
def remaining(total, found, group, first, reverse):
    """The decay between each two steps of chunks: total `[N, c, G, h]` float64, found `[m, h, c, c]`."""
    count, shared, size, _ = found.shape
    sums = np.empty(size, np.float64)
    for n in range(count):
        for head in range(shared):
            for i in range(size):
                sums[i] = total[first + n, i, group, head]
            for i in range(size):
                start, stop = (i, size) if reverse else (0, i + 1)
                found[n, head, i, :] = np.float32(0.0)
                for j in range(start, stop):
                    found[n, head, i, j] = exp(np.float32(sums[i] - sums[j]))


@kernel
def fade(q, k, log_decay, scores, faded_q, faded_k, whole, head, first, last, scale, reverse):
    """Scores, faded queries and keys, and the whole decay of the chunks [first, last) of a head.

    q, k, log_decay `[N, c, H, K]`; scores `[H, N, c, c]`; faded_q, faded_k `[H, N, c, K]`; whole
    `[H, N, K, 1]`.
    """
    size, dim = q.shape[1], q.shape[3]
    decay, prefix = np.empty(dim, np.float32), np.empty(dim, np.float32)
    query, keys = np.empty(dim, np.float32), np.empty((size, dim), np.float32)
    for n in range(first, last):
        prefix[:] = np.float32(1.0)
        for i in range(size):
            at = size - 1 - i if reverse else i
            for c in range(dim):
                decay[c] = exp(log_decay[n, at, head, c])
                prefix[c] = _flushed(prefix[c] * decay[c])
                query[c] = scale * q[n, at, head, c]
                keys[i, c] = k[n, at, head, c]
                faded_q[head, n, at, c] = query[c] * prefix[c]
            for j in range(i):
                total = np.float32(0.0)
                for c in range(dim):
                    faded = _flushed(keys[j, c] * decay[c])
                    keys[j, c] = faded
                    total += query[c] * faded
                seen = size - 1 - j if reverse else j
                scores[head, n, at, seen] = total
                scores[head, n, seen, at] = np.float32(0.0)
            total = np.float32(0.0)
            for c in range(dim):
                total += query[c] * keys[i, c]
            scores[head, n, at, at] = total
        for i in range(size):
            at = size - 1 - i if reverse else i
            for c in range(dim):
                faded_k[head, n, at, c] = keys[i, c]
        for c in range(dim):
            whole[head, n, c, 0] = prefix[c]


@inline
def _pull_queries(k, log_decay, d_scores, decay, prefix, keys, pairs, head, n, m, reverse):
    """What the queries get from pairs of two different steps; decays and their products on the way.

    All earlier keys fade by one more step each time.
    """
    size, dim = decay.shape
    for i in range(size):
        at = size - 1 - i if reverse else i
        for c in range(dim):
            decay[i, c] = exp(log_decay[n, at, head, c])
            before = np.float32(1.0) if i == 0 else prefix[i - 1, c]
            prefix[i, c] = _flushed(before * decay[i, c])
            keys[i, c] = k[n, at, head, c]
            pairs[i, c] = np.float32(0.0)
        for j in range(i):
            weight = d_scores[m, at, size - 1 - j if reverse else j]
            for c in range(dim):
                faded = _flushed(keys[j, c] * decay[i, c])
                keys[j, c] = faded
                pairs[i, c] += weight * faded


@inline
def _pull_keys(q, d_scores, decay, queries, pairs, head, n, m, scale, reverse):
    """What the keys get from pairs of two different steps: the other way round, all later queries fade."""
    size, dim = decay.shape
    for j in range(size - 1, -1, -1):
        at = size - 1 - j if reverse else j
        for c in range(dim):
            pairs[j, c] = np.float32(0.0)
            queries[j, c] = scale * q[n, at, head, c]
        for i in range(j + 1, size):
            weight = d_scores[m, size - 1 - i if reverse else i, at]
            for c in range(dim):
                faded = _flushed(queries[i, c] * decay[j + 1, c])
                queries[i, c] = faded
                pairs[j, c] += weight * faded


@kernel
def pull(
    q, k, log_decay, d_scores, d_faded_q, d_faded_k, d_whole, dq, dk, d_decay,
    head, first, last, scale, reverse,
):  # fmt: skip
    """Gradients of q, k and log_decay of the chunks [first, last) of a head.

    q, k, log_decay, dq, dk, d_decay `[N, c, H, K]`; d_scores `[m, c, c]`; d_faded_q, d_faded_k `[m, c, K]`;
    d_whole, of the logarithm, `[m, K]`.
    """
    size, dim = q.shape[1], q.shape[3]
    decay, prefix = np.empty((size, dim), np.float32), np.empty((size, dim), np.float32)
    faded = np.empty((size, dim), np.float32)
    pair_q, pair_k = np.empty((size, dim), np.float32), np.empty((size, dim), np.float32)
    suffix, running = np.empty(dim, np.float32), np.empty(dim, np.float32)
    for n in range(first, last):
        m = n - first
        _pull_queries(k, log_decay, d_scores, decay, prefix, faded, pair_q, head, n, m, reverse)
        _pull_keys(q, d_scores, decay, faded, pair_k, head, n, m, scale, reverse)
        # The rest of both, and of the log-decays what counts from a step backwards ...
        suffix[:] = np.float32(1.0)
        running[:] = np.float32(0.0)
        for i in range(size - 1, -1, -1):
            at = size - 1 - i if reverse else i
            own = d_scores[m, at, at]
            for c in range(dim):
                query, key = scale * q[n, at, head, c], k[n, at, head, c]
                from_pairs = pair_q[i, c] + d_faded_q[m, at, c] * prefix[i, c]
                kept = d_faded_k[m, at, c] * suffix[c]
                running[c] += query * from_pairs - key * pair_k[i, c]
                d_decay[n, at, head, c] = running[c]
                dq[n, at, head, c] = scale * (from_pairs + own * key)
                dk[n, at, head, c] = pair_k[i, c] + kept + own * query
                faded[i, c] = key * kept
                suffix[c] = _flushed(suffix[c] * decay[i, c])
        # ... and what counts from it onwards.
        for c in range(dim):
            running[c] = d_whole[m, c]
        for i in range(size):
            at = size - 1 - i if reverse else i
            for c in range(dim):
                d_decay[n, at, head, c] += running[c]
                running[c] += faded[i, c]
