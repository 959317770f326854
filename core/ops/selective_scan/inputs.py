"""What every backend of the selective scan is given, and the layout of the states that it keeps."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from manyheads.core.ops import packed

CHUNK = 32  # steps between two states that the forward keeps for the backward


class Inputs(NamedTuple):
    """The arguments of one scan, as `manyheads.core.ops.selective_scan` names them."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    delta_softplus: bool
    reverse: bool

    def sequences(self) -> int:
        """How many sequences there are."""
        return self.u.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    def slots(self) -> int:
        """How many states are kept: sequence s, which starts at row p, has its own from p // CHUNK + s on."""
        return self.u.shape[0] * self.u.shape[1] // CHUNK + self.sequences()

    def starts(self) -> Tensor:
        """The first row of each sequence among the `B * L` rows, and the end: int64 `[S + 1]`, on the CPU."""
        batch, length, _ = self.u.shape
        if self.cu_seqlens is None:
            return torch.arange(batch + 1) * length
        return torch.tensor(packed.bounds("selective_scan", self.cu_seqlens, length))


Gradients = tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None
]  # of u, delta, A, B, C, D, z, delta_bias, initial_state
