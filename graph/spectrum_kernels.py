"""Spectra of small graphs, compiled by numba: for a matrix of 23 rows LAPACK's calls cost more than the sums.

Householder reflections make the Laplacian tridiagonal, implicit QL sweeps make that diagonal (EISPACK's tred2
and tql2), and the reflections are taken back for the wanted vectors alone. Rows are padded to eights, and
inner loops run over two rows at most, given as rows: that is what the compiler makes vectors of.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# ruff: noqa: PLR0912

from __future__ import annotations

import numpy as np

from manyheads.core.jit import kernel

SWEEPS = 60  # for one eigenvalue; two are usual
TINY = 1e-13  # off-diagonal entries below are zero: the spectrum lies in 0..2


@kernel
def spectra(source, target, first, starts, low, high, values, vectors):
    """The second to (k + 1)-th eigenpairs of graphs low..high; how many of them did not converge.

    The edges of graph g are first[g]..first[g + 1]. Graphs of fewer than two nodes, or more than the scratch
    holds, are passed over by the caller's choice of low and high.
    """
    most = 0
    for g in range(low, high):
        most = max(most, starts[g + 1] - starts[g])
    width = (most + 7) // 8 * 8
    a, z = np.empty((width, width)), np.empty((width, width))
    d, e, tau, v, w = np.empty(width), np.empty(width), np.empty(width), np.empty(width), np.empty(width)
    failed = 0
    for g in range(low, high):
        n = starts[g + 1] - starts[g]
        if n < 2:
            continue
        _laplacian(source, target, first[g], first[g + 1], starts[g], n, a, d)
        _tridiagonal(a, n, d, e, tau, v, w)
        if not _diagonal(z, n, d, e):
            failed += 1
            continue
        _give(a, z, n, d, tau, v, values[g], vectors[starts[g] : starts[g + 1]])
    return failed


@kernel
def _laplacian(source, target, begin, end, node, n, a, d):
    """The normalised Laplacian in a, rows padded with zeros."""
    eights = (n + 7) // 8 * 8
    for i in range(n):
        d[i] = 0.0
        for j in range(eights):
            a[i, j] = 0.0
    for x in range(begin, end):
        i, j = source[x] - node, target[x] - node
        if i != j:
            a[i, j] -= 0.5
            a[j, i] -= 0.5
            d[i] += 0.5
            d[j] += 0.5
    for i in range(n):
        d[i] = 1.0 / np.sqrt(d[i]) if d[i] > 0.0 else 0.0
    for i in range(n):
        scale = d[i]
        for j in range(n):
            a[i, j] *= scale * d[j]
        a[i, i] = 1.0


@kernel
def _tridiagonal(a, n, d, e, tau, v, w):
    """Diagonal d, off-diagonal e (e[i] beside d[i]); reflections stay in a's rows right of the diagonal."""
    eights = (n + 7) // 8 * 8
    for j in range(n - 2):
        total = 0.0
        for i in range(j + 2, n):
            total += a[j, i] * a[j, i]
        head = a[j, j + 1]
        d[j] = a[j, j]
        if total == 0.0:
            tau[j] = 0.0
            e[j] = head
            continue
        mu = np.sqrt(head * head + total)
        lead = head - mu if head <= 0.0 else -total / (head + mu)
        tau[j] = 2.0 * lead * lead / (total + lead * lead)
        e[j] = mu
        begin = (j + 1) // 8 * 8
        for i in range(begin, eights):
            v[i] = 0.0
            w[i] = 0.0
        v[j + 1] = 1.0
        for i in range(j + 2, n):
            v[i] = a[j, i] / lead
        for i in range(j + 1, n):
            scale, row = v[i], a[i]
            for q in range(begin, eights):
                w[q] += scale * row[q]
        dot = 0.0
        for i in range(j + 1, n):
            w[i] *= tau[j]
            dot += w[i] * v[i]
        dot *= 0.5 * tau[j]
        for i in range(begin, j + 1):
            w[i] = 0.0
        for i in range(j + 1, n):
            w[i] -= dot * v[i]
        for i in range(j + 1, n):
            one, two, row = v[i], w[i], a[i]
            for q in range(begin, eights):
                row[q] -= one * w[q] + two * v[q]
        for i in range(j + 1, n):
            a[j, i] = v[i]
    d[n - 2] = a[n - 2, n - 2]
    e[n - 2] = a[n - 2, n - 1]
    d[n - 1] = a[n - 1, n - 1]
    e[n - 1] = 0.0


@kernel
def _diagonal(z, n, d, e):
    """Eigenvalues in d, in no order; the eigenvectors of the tridiagonal matrix in z's rows."""
    fours = (n + 7) // 8 * 8
    for i in range(n):
        for j in range(fours):
            z[i, j] = 0.0
        z[i, i] = 1.0
    for l in range(n):
        m, stopped = l, False
        for sweep in range(SWEEPS + 1):
            if sweep % 4 == 0 or stopped:  # where the matrix falls apart changes seldom
                m = l
                while m < n - 1 and abs(e[m]) > TINY:
                    m += 1
            if m == l or abs(e[l]) <= TINY:
                break
            if sweep == SWEEPS:
                return False
            g = (d[l + 1] - d[l]) / (2.0 * e[l])
            r = np.sqrt(g * g + 1.0)
            g = d[m] - d[l] + e[l] / (g + r if g >= 0.0 else g - r)
            s, c, p = 1.0, 1.0, 0.0
            stopped = False
            for i in range(m - 1, l - 1, -1):
                f, b = s * e[i], c * e[i]
                square = f * f + g * g
                r = np.sqrt(square)
                e[i + 1] = r
                if square == 0.0:  # the matrix falls apart here
                    d[i + 1] -= p
                    e[m] = 0.0
                    stopped = True
                    break
                # the root and the quotients side by side, not in turn
                s, c = (f / square) * r, (g / square) * r
                g = d[i + 1] - p
                r = (d[i] - g) * s + 2.0 * c * b
                p = s * r
                d[i + 1] = g + p
                g = c * r - b
                upper, lower = z[i], z[i + 1]
                for q in range(fours):
                    above, below = upper[q], lower[q]
                    lower[q] = s * above + c * below
                    upper[q] = c * above - s * below
            if not stopped:
                d[l] -= p
                e[l] = g
                e[m] = 0.0
    return True


@kernel
def _give(a, z, n, d, tau, v, values, vectors):
    """Write the wanted pairs, each vector with its largest entry positive; all vectors at once."""
    k = min(values.size, n - 1)
    order = np.argsort(d[:n])
    for column in range(k):
        which = order[column + 1]
        values[column] = d[which]
        for i in range(n):
            vectors[i, column] = z[which, i]
    for j in range(n - 3, -1, -1):
        for column in range(k):
            v[column] = 0.0
        for i in range(j + 1, n):
            scale = a[j, i]
            for column in range(k):
                v[column] += scale * vectors[i, column]
        for i in range(j + 1, n):
            scale = a[j, i] * tau[j]
            for column in range(k):
                vectors[i, column] -= scale * v[column]
    for column in range(k):
        largest = 0.0
        for i in range(n):
            if abs(vectors[i, column]) > abs(largest):
                largest = vectors[i, column]
        if largest < 0.0:
            for i in range(n):
                vectors[i, column] = -vectors[i, column]
