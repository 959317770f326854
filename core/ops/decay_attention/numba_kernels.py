"""What happens inside a chunk, as loops compiled for this CPU.

With a decay of each key channel, a weight is the product of its decays, built up step by step; the loops run
over the key channels, the contiguous axis.
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
def remaining(total, found, group, first, backwards):
    """The decay between each two steps of chunks: total `[N, c, G, h]` float64, found `[m, h, c, c]`.

    Rows of found run backwards, if asked for.
    """
    count, shared, size, _ = found.shape
    sums = np.empty(size, np.float64)
    for n in range(count):
        for head in range(shared):
            for i in range(size):
                sums[i] = total[first + n, i, group, head]
            for i in range(size):
                row = size - 1 - i if backwards else i
                for j in range(i + 1):
                    found[n, head, row, j] = exp(np.float32(sums[i] - sums[j]))
                found[n, head, row, i + 1 :] = np.float32(0.0)


@kernel
def fade(q, k, log_decay, scores, faded_q, faded_k, whole, head, first, last, scale):
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
            for c in range(dim):
                decay[c] = exp(log_decay[n, i, head, c])
                prefix[c] = _flushed(prefix[c] * decay[c])
                query[c] = scale * q[n, i, head, c]
                keys[i, c] = k[n, i, head, c]
                faded_q[head, n, i, c] = query[c] * prefix[c]
            for j in range(i):
                total = np.float32(0.0)
                for c in range(dim):
                    faded = _flushed(keys[j, c] * decay[c])
                    keys[j, c] = faded
                    total += query[c] * faded
                scores[head, n, i, j] = total
                scores[head, n, j, i] = np.float32(0.0)
            total = np.float32(0.0)
            for c in range(dim):
                total += query[c] * keys[i, c]
            scores[head, n, i, i] = total
        for i in range(size):
            for c in range(dim):
                faded_k[head, n, i, c] = keys[i, c]
        for c in range(dim):
            whole[head, n, c, 0] = prefix[c]


@inline
def _pull_queries(k, log_decay, d_scores, decay, prefix, keys, pairs, head, n, m):
    """What the queries get from pairs of two different steps; decays and their products on the way.

    All earlier keys fade by one more step each time.
    """
    size, dim = decay.shape
    for i in range(size):
        for c in range(dim):
            decay[i, c] = exp(log_decay[n, i, head, c])
            before = np.float32(1.0) if i == 0 else prefix[i - 1, c]
            prefix[i, c] = _flushed(before * decay[i, c])
            keys[i, c] = k[n, i, head, c]
            pairs[i, c] = np.float32(0.0)
        for j in range(i):
            weight = d_scores[m, i, j]
            for c in range(dim):
                faded = _flushed(keys[j, c] * decay[i, c])
                keys[j, c] = faded
                pairs[i, c] += weight * faded


@inline
def _pull_keys(q, d_scores, decay, queries, pairs, head, n, m, scale):
    """What the keys get from pairs of two different steps: the other way round, all later queries fade."""
    size, dim = decay.shape
    for j in range(size - 1, -1, -1):
        for c in range(dim):
            pairs[j, c] = np.float32(0.0)
            queries[j, c] = scale * q[n, j, head, c]
        for i in range(j + 1, size):
            weight = d_scores[m, i, j]
            for c in range(dim):
                faded = _flushed(queries[i, c] * decay[j + 1, c])
                queries[i, c] = faded
                pairs[j, c] += weight * faded


@kernel
def pull(
    q, k, log_decay, d_scores, d_faded_q, d_faded_k, d_whole, dq, dk, d_decay,
    head, first, last, scale,
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
        _pull_queries(k, log_decay, d_scores, decay, prefix, faded, pair_q, head, n, m)
        _pull_keys(q, d_scores, decay, faded, pair_k, head, n, m, scale)
        # The rest of both, and of the log-decays what counts from a step backwards ...
        suffix[:] = np.float32(1.0)
        running[:] = np.float32(0.0)
        for i in range(size - 1, -1, -1):
            own = d_scores[m, i, i]
            for c in range(dim):
                query, key = scale * q[n, i, head, c], k[n, i, head, c]
                from_pairs = pair_q[i, c] + d_faded_q[m, i, c] * prefix[i, c]
                kept = d_faded_k[m, i, c] * suffix[c]
                running[c] += query * from_pairs - key * pair_k[i, c]
                d_decay[n, i, head, c] = running[c]
                dq[n, i, head, c] = scale * (from_pairs + own * key)
                dk[n, i, head, c] = pair_k[i, c] + kept + own * query
                faded[i, c] = key * kept
                suffix[c] = _flushed(suffix[c] * decay[i, c])
        # ... and what counts from it onwards.
        for c in range(dim):
            running[c] = d_whole[m, c]
        for i in range(size):
            for c in range(dim):
                d_decay[n, i, head, c] += running[c]
                running[c] += faded[i, c]
