"""The compiled loop of retrieval."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from manyheads.core.jit import kernel

STRIP = 64  # scores that are looked at together


@kernel
def merge(
    scores: NDArray[np.float32], first: int, best: NDArray[np.float32], items: NDArray[np.int64]
) -> None:
    """Put the best of a block of scores among the best so far, which stand in order, best first.

    Items are looked at in order of number and only a higher score takes a place: of equal ones the lower
    number stays ahead. Most strips hold none, which one pass without branches tells.

    Shape:
        scores `[B, n]`; best, items `[B, k]`.
    """
    rows, width = scores.shape
    k = best.shape[1]
    for b in range(rows):
        values, numbers = best[b], items[b]
        least = values[k - 1]
        for left in range(0, width, STRIP):
            right = min(left + STRIP, width)
            part = scores[b, left:right]
            higher = 0
            for j in range(right - left):
                higher += part[j] > least
            if higher == 0:
                continue
            for j in range(right - left):
                score = part[j]
                if score > least:
                    place = k - 1
                    while place > 0 and values[place - 1] < score:
                        values[place] = values[place - 1]
                        numbers[place] = numbers[place - 1]
                        place -= 1
                    values[place] = score
                    numbers[place] = first + left + j
                    least = values[k - 1]
