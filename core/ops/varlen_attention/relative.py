"""What is added to the scores by relative position, on the CPU: a view, never a matrix (README.md)."""

from __future__ import annotations

import math
from collections.abc import Sequence as List
from dataclasses import dataclass

import torch
from torch import Tensor

from manyheads.core.ops.varlen_attention.sequences import Sequence


@dataclass(frozen=True)
class Relative:
    """What is added to the scores, for every distance that occurs, from the farthest key after a query on.

    Attributes:
        values: `[H or 1, L]`; entry e belongs to the distance `ahead - e` (key minus query); -inf: not seen.
        ahead: The largest distance.
        causal: Whether distances above zero are not seen.
        plain: Whether there is no table, just the causal mask.
        holes: Whether the table itself hides distances, so that a query may see no key at all.
    """

    values: Tensor
    ahead: int
    causal: bool
    plain: bool
    holes: bool

    @classmethod
    def of(
        cls, bias: Tensor | None, sequences: List[Sequence], causal: bool, dtype: torch.dtype
    ) -> Relative | None:
        """Lay out a table `[H, 2M + 1]`, a causal mask, or both; None where there is neither."""
        if not sequences or (bias is None and not causal):
            return None
        ahead, behind = max(s.nq for s in sequences) - 1, max(s.nk for s in sequences) - 1
        distances = torch.arange(ahead, -behind - 1, -1)
        holes = False
        if bias is None:
            values = torch.zeros(1, len(distances), dtype=dtype)
        else:
            values = bias.detach().to(dtype)[:, _columns(distances, bias)]
            holes = bool((values == -math.inf).any())
        if causal:
            values[:, distances > 0] = -math.inf
        return cls(values, ahead, causal, bias is None, holes)

    def matrix(self, one: Sequence, start: int = 0, rows: int | None = None) -> Tensor:
        """View rows of a sequence's matrix `[H or 1, rows, Nk]`, its keys in reverse.

        With keys in reverse the distance falls by one with every row and with every column, so that each row
        is the one before it, begun one entry later.
        """
        length = self.values.shape[1]
        shape = (self.values.shape[0], one.nq if rows is None else rows, one.nk)
        return self.values.as_strided(shape, (length, 1, 1), self.first(one, start))

    def first(self, one: Sequence, start: int) -> int:
        """The entry of a row and the last key of a sequence, which is the first in reverse."""
        return self.ahead - (one.nq - 1) + start

    def table_gradient(self, sums: Tensor, bias: Tensor) -> Tensor:
        """The gradient of the table from that of `values`."""
        distances = self.ahead - torch.arange(self.values.shape[1])
        found = sums.new_zeros(bias.shape).index_add_(1, _columns(distances, bias), sums)
        return found.to(bias.dtype)


def _columns(distances: Tensor, bias: Tensor) -> Tensor:
    """The table's column of each distance."""
    far = bias.shape[1] // 2
    return distances.clamp(-far, far) + far
