"""A long recording separated in pieces: where they are cut, and how they are put together again.

Pieces overlap, and over the overlap they are faded into each other. The fade takes the middle half of it, so
that of each piece the ends, where the model saw one side only, are not heard. `alignment` finds which speaker
is which.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor


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


class Joiner:
    """Puts pieces together, in order; holds no more than a piece."""

    def __init__(self) -> None:
        self._held: Tensor | None = None
        self._at = 0

    def add(self, piece: Tensor, start: int) -> Tensor:
        """Take the next piece, and return what no later one changes.

        Args:
            piece: `[speakers, L]`, the speakers in the order of the piece before.
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
        mixed = torch.lerp(over, piece[:, :count], fade(count).to(piece.dtype))
        self._held, self._at = torch.cat((mixed, piece[:, count:]), 1), start
        return ready

    def end(self) -> Tensor:
        """Return what is left."""
        assert self._held is not None
        return self._held


def join(pieces: Iterable[tuple[Tensor, int]], orders: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    """Put pieces together; yield what is ready, one stretch after the other.

    Args:
        pieces: Each with its start.
        orders: Of each piece's speakers.
    """
    joiner = Joiner()
    for (piece, start), order in zip(pieces, orders, strict=True):
        yield joiner.add(piece[list(order)], start)
    yield joiner.end()
