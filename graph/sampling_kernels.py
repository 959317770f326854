"""Neighbourhoods of a large graph's nodes, compiled by numba."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import numpy as np

from manyheads.core.jit import inline, kernel

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@inline
def _mixed(x):
    """The finisher of splitmix64: neighbouring numbers become unrelated ones."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@kernel
def _grown(array, count):
    """The array with room for so many numbers."""
    if count <= len(array):
        return array
    found = np.empty(max(2 * len(array), count), array.dtype)
    found[: len(array)] = array
    return found


@kernel
def _choose(picks, degree, key):
    """Fill `picks` with different numbers below `degree` (Floyd's way), by the key alone."""
    take, state = len(picks), key
    for i in range(take):
        last = np.uint64(degree - take + i)
        state += GOLDEN
        # the upper half of the number, brought to 0..last
        pick = np.int64(((_mixed(state) >> np.uint64(32)) * (last + np.uint64(1))) >> np.uint64(32))
        for j in range(i):
            if picks[j] == pick:
                pick = np.int64(last)
                break
        picks[i] = pick


@kernel
def neighbourhoods(starts, sources, seeds, fanouts, key, place):
    """Gather a graph around each row of seeds; `sampling.sample` says what comes out.

    `place` has a zero for each node of the large graph, and is given back so: between, it holds a node's
    place in the graph that is being gathered, plus one.
    """
    nodes, firsts = np.empty(1024, np.int64), np.zeros(len(seeds) + 1, np.int64)
    found = np.empty(seeds.shape, np.int64)
    source, target, picks = np.empty(1024, np.int64), np.empty(1024, np.int64), np.empty(1024, np.int64)
    n, e = 0, 0
    for g in range(len(seeds)):
        nodes = _grown(nodes, n + seeds.shape[1])
        for s in range(seeds.shape[1]):
            node = seeds[g, s]
            if place[node] == 0:
                nodes[n] = node
                n += 1
                place[node] = n
            found[g, s] = place[node] - 1
        begin = firsts[g]
        for fanout in fanouts:
            end = n
            for t in range(begin, end):
                node = nodes[t]
                degree = starts[node + 1] - starts[node]
                take = degree if fanout < 0 or fanout > degree else fanout
                nodes, picks = _grown(nodes, n + take), _grown(picks, e + take)
                source, target = _grown(source, e + take), _grown(target, e + take)
                if take < degree:
                    _choose(picks[e : e + take], degree, _mixed(key + GOLDEN * np.uint64(node)))
                else:
                    for i in range(take):
                        picks[e + i] = i
                for i in range(e, e + take):
                    picks[i] += starts[node]
                    other = sources[picks[i]]
                    if place[other] == 0:
                        nodes[n] = other
                        n += 1
                        place[other] = n
                    source[i] = place[other] - 1
                    target[i] = t
                e += take
            begin = end
        firsts[g + 1] = n
        for t in range(firsts[g], n):
            place[nodes[t]] = 0
    return nodes[:n], firsts, found, source[:e], target[:e], picks[:e]
