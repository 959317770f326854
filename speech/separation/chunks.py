"""A long recording separated in pieces: where they are cut, and how they are put together again.

Pieces overlap. A model gives the speakers of each piece in an order of its own; over the overlap the order is
found that fits the piece before best, and the two are faded into each other. The fade takes the middle half
of the overlap, so that of each piece the ends, where the model saw one side only, are not heard.
"""

from __future__ import annotations

from itertools import permutations

import torch
from torch import Tensor

DOUBTFUL = 0.1  # below this certainty two pieces may as well belong together in another order


def cuts(length: int, size: int, overlap: int, least: int) -> list[tuple[int, int]]:
    """Return where pieces begin and end.

    Args:
        length: Of the whole.
        size: Of a piece.
        overlap: Of neighbours, at least; smaller than `size`.
        least: Of the last piece, where the whole has so much: it begins earlier then.

    Example:
        >>> cuts(20, size=8, overlap=3, least=8)
        [(0, 8), (5, 13), (10, 18), (12, 20)]
    """
    starts = range(0, max(1, length - overlap), size - overlap)
    return [(min(start, max(0, length - least)), min(start + size, length)) for start in starts]


def fade(count: int) -> Tensor:
    """Return how much of the later piece is heard over an overlap: nothing, a straight rise, all.

    Shape:
        `[count]`, from 0 to 1.
    """
    place = (torch.arange(count) + 0.5) / count
    return (2 * place - 0.5).clamp(0, 1)


def order(before: Tensor, after: Tensor) -> tuple[list[int], float]:
    """Find the order of `after`'s speakers that is closest to `before`, by least squares.

    Args:
        before, after: The same stretch of the recording, from two pieces.

    Shape:
        Both `[speakers, L]`.

    Returns:
        The order, and its certainty: how much better it fits than the next best, 0 (both alike, or silence)
        to 2. Where several fit alike the speakers stay as they are.
    """
    products = before.double() @ after.double().T
    fits = sorted(
        (-sum(float(products[i, j]) for i, j in enumerate(each)), each)
        for each in permutations(range(len(before)))
    )
    scale = float(before.double().norm() * after.double().norm())
    if len(fits) == 1 or not scale:
        return list(range(len(before))), 2.0 if len(fits) == 1 else 0.0
    return list(fits[0][1]), (fits[1][0] - fits[0][0]) / scale


class Joiner:
    """Puts pieces together, in order; holds no more than a piece.

    Args:
        doubtful: Joins in it so far whose order of speakers is not certain.
    """

    def __init__(self, doubtful: int = 0) -> None:
        self.doubtful = doubtful
        self._held: Tensor | None = None
        self._at = 0

    def add(self, piece: Tensor, start: int) -> Tensor:
        """Take the next piece, and return what no later one changes.

        Args:
            piece: `[speakers, L]`.
            start: Its place in the recording.

        Raises:
            ValueError: It does not overlap the one before.
        """
        if self._held is None:
            self._held, self._at = piece, start
            return piece[:, :0]
        ready, over = self._held.tensor_split([start - self._at], dim=1)
        count = over.shape[1]
        if not 0 < count <= piece.shape[1]:
            raise ValueError(f"a piece at {start} does not overlap the one before")
        best, certainty = order(over, piece[:, :count])
        self.doubtful += certainty < DOUBTFUL
        piece = piece[best]
        mixed = torch.lerp(over, piece[:, :count], fade(count).to(piece.dtype))
        self._held, self._at = torch.cat((mixed, piece[:, count:]), 1), start
        return ready

    def end(self) -> Tensor:
        """Return what is left."""
        assert self._held is not None
        return self._held
