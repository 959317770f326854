"""Integrate-and-fire as compiled loops over the frames of each row."""

# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import numpy as np

from manyheads.core.jit import kernel


@kernel
def place(
    weights: np.ndarray,
    ends: np.ndarray,
    tail: float,
    threshold: float,
    slack: float,
    totals: np.ndarray,
    places: np.ndarray,
    numbers: np.ndarray,
    fires: np.ndarray,
) -> None:
    """Find each frame's end, in thresholds, and the number of the last token's end up to there.

    weights `[B, T]`, totals `[B]` (before, then after), places and numbers `[B, 1 + T']`, all float64; fires
    `[B, T']`, T' = T, or T + 1 with a tail (not negative). A row with a weight that is not finite gets NaN.
    """
    steps = fires.shape[1]
    for b in range(len(weights)):
        total, poison = 0.0, 0.0
        for t in range(steps + 1):
            weight = 0.0  # of the frame before the t-th end
            if 0 < t <= ends[b]:
                weight = weights[b, t - 1]
                if not np.isfinite(weight):
                    weight, poison = 0.0, np.nan
            elif t == ends[b] + 1 and tail >= 0.0:
                weight = tail
            total += weight
            position = (totals[b] + total) / threshold
            number = np.floor(position * (1.0 + slack))
            places[b, t], numbers[b, t] = max(position, number), number
            if t > 0:
                ended = 1.0 if number > numbers[b, t - 1] else 0.0
                fires[b, t - 1] = (places[b, t] - number + ended) * threshold + poison
        totals[b] += total + poison


@kernel
def cut(
    frames: int,
    ends: np.ndarray,
    totals: np.ndarray,
    places: np.ndarray,
    numbers: np.ndarray,
    threshold: float,
    index: np.ndarray,
    weights: np.ndarray,
    starts: np.ndarray,
) -> int:
    """List the pieces of each row's tokens and then of what is left; return how many there are.

    A piece is a frame's number `index` in `[B * T]` and its weight; `starts` `[B, N + 1]` is where the pieces
    of each token, and of what is left, begin. A row whose weights are not all finite has none. The rest as in
    `place`.
    """
    found, size = 0, starts.shape[1] - 1
    for b in range(len(ends)):
        token, start = 0.0, numbers[b, 0]
        starts[b] = found
        for t in range(places.shape[1] - 1 if np.isfinite(totals[b]) else 0):
            # Frames behind the row's end have no weight, and the tail only zeros.
            inside, begin = t < ends[b], places[b, t]
            while token < numbers[b, t + 1] - start:  # the token ends in this frame
                end = start + token + 1.0
                if token >= np.float64(size):  # it is dropped, as all others: there may be very many
                    end, found = numbers[b, t + 1], starts[b, size]
                else:
                    if inside:
                        index[found], weights[found] = b * frames + t, (end - begin) * threshold
                        found += 1
                    starts[b, int(token) + 1] = found
                begin, token = end, end - start
            if inside:
                index[found], weights[found] = b * frames + t, (places[b, t + 1] - begin) * threshold
                found += 1
        for n in range(int(min(token, np.float64(size))) + 1, size + 1):
            starts[b, n] = starts[b, n - 1]
    return found
