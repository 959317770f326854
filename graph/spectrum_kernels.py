"""Spectra of small graphs, compiled by numba: for a matrix of 23 rows LAPACK's calls cost more than the sums.

Householder reflections make the Laplacian tridiagonal, implicit QL sweeps make that diagonal (EISPACK's tred2
and tql2), and the reflections are taken back for the wanted vectors alone. Eight graphs of like sizes go side
by side, one in each lane (`core.lanes`): entry (i, j) of their matrices is row i * n + j of an array, n being
the largest one's nodes. What lies behind a smaller graph's last node changes nothing of it, to the bit.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import numpy as np

from manyheads.core.jit import kernel
from manyheads.core.lanes import COUNT, absolute, any_of, choose, empty, equal, load, spread, sqrt, store

SWEEPS = 60  # for one eigenvalue; two are usual
TINY = 1e-13  # off-diagonal entries below are zero: the spectrum lies in 0..2
NOTHING = 1e-200  # the square of a length below which it is zero


@kernel
def spectra(source, target, first, starts, graphs, values, vectors):
    """The second to (k + 1)-th eigenpairs of these graphs; how many eights of them did not converge.

    The edges of graph g are first[g]..first[g + 1]. Graphs have two nodes at least; those of
    like sizes should follow each other.
    """
    k, failed, most = values.shape[1], 0, 0
    for g in graphs:
        most = max(most, starts[g + 1] - starts[g])
    a, z, u = empty(most * most), empty(most * most), empty(most * k)
    d, e, tau, v, w = empty(most), empty(most), empty(most), empty(most), empty(most)
    which, lowest = empty(k), empty(k)
    for begin in range(0, graphs.size, COUNT):
        own = graphs[begin : begin + COUNT]
        n = 0
        for g in own:
            n = max(n, starts[g + 1] - starts[g])
        _laplacian(source, target, first, starts, own, n, a, d)
        _tridiagonal(a, n, d, e, tau, v, w)
        if not _diagonal(z, n, d, e):
            failed += 1
            continue
        _choose_lowest(starts, own, n, k, d, which, lowest)
        _take_back(a, z, n, k, tau, which, u)
        for t in range(own.size):
            node, size = starts[own[t]], starts[own[t] + 1] - starts[own[t]]
            for column in range(min(k, size - 1)):
                values[own[t], column] = lowest[column, t]
                for i in range(size):
                    vectors[node + i, column] = u[i * k + column, t]
    return failed


@kernel
def _laplacian(source, target, first, starts, own, n, a, d):
    """The upper halves of the normalised Laplacians in a."""
    a[: n * n] = 0.0
    d[:n] = 0.0
    for t in range(own.size):
        node = starts[own[t]]
        for x in range(first[own[t]], first[own[t] + 1]):
            i, j = source[x] - node, target[x] - node
            if i != j:
                a[min(i, j) * n + max(i, j), t] -= 0.5
                d[i, t] += 0.5
                d[j, t] += 0.5
    for i in range(n):
        degree = load(d, i)
        store(d, i, choose(degree > 0.0, 1.0 / sqrt(degree), spread(0.0)))
    for i in range(n):
        scale = load(d, i)
        for j in range(i + 1, n):
            store(a, i * n + j, load(a, i * n + j) * scale * load(d, j))
        store(a, i * n + i, spread(1.0))


@kernel
def _tridiagonal(a, n, d, e, tau, v, w):
    """Diagonal d, off-diagonal e (e[i] beside d[i]); reflections stay in a's rows right of the diagonal."""
    zero = spread(0.0)
    for j in range(n - 2):
        total = zero
        for i in range(j + 2, n):
            x = load(a, j * n + i)
            total = total + x * x
        some = total > 0.0
        head = load(a, j * n + j + 1)
        mu = sqrt(head * head + total)
        lead = choose(head > 0.0, (0.0 - total) / (head + mu), head - mu)
        double = choose(some, 2.0 * lead * lead / (total + lead * lead), zero)
        scale = choose(some, 1.0 / lead, zero)
        store(d, j, load(a, j * n + j))
        store(e, j, choose(some, mu, head))
        store(tau, j, double)
        store(v, j + 1, spread(1.0))
        store(w, j + 1, zero)
        for i in range(j + 2, n):
            store(v, i, load(a, j * n + i) * scale)
            store(w, i, zero)
        for i in range(j + 1, n):  # w = a v, by the upper half
            one, row = load(v, i), load(a, i * n + i) * load(v, i)
            for q in range(i + 1, n):
                x = load(a, i * n + q)
                store(w, q, load(w, q) + one * x)
                row = row + x * load(v, q)
            store(w, i, load(w, i) + row)
        dot = zero
        for i in range(j + 1, n):
            x = load(w, i) * double
            store(w, i, x)
            dot = dot + x * load(v, i)
        dot = 0.5 * dot * double
        for i in range(j + 1, n):
            store(w, i, load(w, i) - dot * load(v, i))
        for i in range(j + 1, n):
            one, two = load(v, i), load(w, i)
            for q in range(i, n):
                store(a, i * n + q, load(a, i * n + q) - one * load(w, q) - two * load(v, q))
            store(a, j * n + i, one)
    store(d, n - 2, load(a, (n - 2) * n + n - 2))
    store(e, n - 2, load(a, (n - 2) * n + n - 1))
    store(d, n - 1, load(a, (n - 1) * n + n - 1))
    store(e, n - 1, zero)


@kernel
def _diagonal(z, n, d, e):
    """Eigenvalues in d, in no order; the eigenvectors of the tridiagonal matrices in z's rows."""
    zero, one = spread(0.0), spread(1.0)
    for i in range(n * n):
        store(z, i, zero)
    for i in range(n):
        store(z, i * n + i, one)
    for l in range(n - 1):
        for sweep in range(SWEEPS + 1):
            # where each lane's matrix falls apart: it ends before, and lanes that end at l have nothing to do
            m, end, corner, more = l, spread(float(l)), zero, absolute(load(e, l)) > TINY
            begun = more
            while any_of(more):
                m += 1
                end, corner = choose(more, spread(float(m)), end), choose(more, load(d, m), corner)
                more = more & (absolute(load(e, m)) > TINY)
            if m == l:
                break
            if sweep == SWEEPS:
                return False
            g = (load(d, l + 1) - load(d, l)) / (2.0 * choose(begun, load(e, l), one))
            r = sqrt(g * g + 1.0)
            g = corner - load(d, l) + load(e, l) / choose(g < 0.0, g - r, g + r)
            s, c, p = one, one, zero
            for i in range(m - 1, l - 1, -1):
                live = end > float(i)
                f, b = s * load(e, i), c * load(e, i)
                square = f * f + g * g
                r = sqrt(square)
                inner = choose(end > float(i + 1), r, zero)
                store(e, i + 1, choose(live, inner, load(e, i + 1)))
                apart = live & (square < NOTHING)  # the matrix falls apart here: the sweep ends
                end = choose(apart, spread(-1.0), end)
                live = end > float(i)
                # the root and the quotient side by side, not in turn
                part = 1.0 / choose(live, square, one) * r
                sine, cosine = choose(live, f * part, zero), choose(live, g * part, one)
                below = load(d, i + 1)
                rest = below - p
                r = (load(d, i) - rest) * sine + 2.0 * cosine * b
                store(d, i + 1, choose(live, rest + sine * r, choose(apart, rest, below)))
                g = choose(live, cosine * r - b, g)
                s, c, p = choose(live, sine, s), choose(live, cosine, c), choose(live, sine * r, p)
                for q in range(n):
                    x, y = load(z, i * n + q), load(z, (i + 1) * n + q)
                    store(z, (i + 1) * n + q, sine * x + cosine * y)
                    store(z, i * n + q, cosine * x - sine * y)
            live = end > float(l)
            store(d, l, choose(live, load(d, l) - p, load(d, l)))
            store(e, l, choose(live, g, load(e, l)))
    return True


@kernel
def _choose_lowest(starts, own, n, k, d, which, lowest):
    """The rows of the second to (k + 1)-th lowest eigenvalues, and these; d is used up."""
    for t in range(own.size):
        for i in range(starts[own[t] + 1] - starts[own[t]], n):
            d[i, t] = np.inf
    for column in range(-1, k):
        least, place = spread(np.inf), spread(0.0)
        for i in range(n):
            x = load(d, i)
            lower = x < least
            least, place = choose(lower, x, least), choose(lower, spread(float(i)), place)
        for i in range(n):
            store(d, i, choose(equal(place, spread(float(i))), spread(np.inf), load(d, i)))
        if column >= 0:
            store(which, column, place)
            store(lowest, column, least)


@kernel
def _take_back(a, z, n, k, tau, which, u):
    """The chosen eigenvectors in u's columns, each with its largest entry positive."""
    for column in range(k):
        for t in range(COUNT):
            row = int(which[column, t]) * n
            for i in range(n):
                u[i * k + column, t] = z[row + i, t]
    for j in range(n - 3, -1, -1):
        double = load(tau, j)
        for column in range(k):
            dot = spread(0.0)
            for i in range(j + 1, n):
                dot = dot + load(a, j * n + i) * load(u, i * k + column)
            dot = dot * double
            for i in range(j + 1, n):
                store(u, i * k + column, load(u, i * k + column) - load(a, j * n + i) * dot)
    for column in range(k):
        largest = spread(0.0)
        for i in range(n):
            x = load(u, i * k + column)
            largest = choose(absolute(x) > absolute(largest), x, largest)
        sign = choose(largest > 0.0, spread(1.0), spread(-1.0))
        for i in range(n):
            store(u, i * k + column, load(u, i * k + column) * sign)
