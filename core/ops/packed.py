"""What every op on packed sequences asks of `cu_seqlens`, the bounds of the S sequences."""

from __future__ import annotations

import torch
from torch import Tensor


def check(op: str, cu_seqlens: Tensor, length: int, *, batch: int = 1, name: str = "cu_seqlens") -> None:
    """Refuse what cannot be the bounds of sequences that lie one after another in a batch of one.

    Their values are looked at on a CPU only: on a GPU that would wait for the device.

    Raises:
        TypeError: Not int32.
        ValueError: Not `[S + 1]`, not rising from 0 to the length, or a batch that is not 1.
    """
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{op}: {name} must be int32, not {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"{op}: {name} must be [S + 1], not {list(cu_seqlens.shape)}")
    if batch != 1:
        raise ValueError(f"{op}: with {name} the batch must be 1, not {batch}")
    if cu_seqlens.is_cpu and not torch.compiler.is_compiling():
        bounds(op, cu_seqlens, length, name)


def bounds(op: str, cu_seqlens: Tensor, length: int, name: str = "cu_seqlens") -> list[int]:
    """The bounds as numbers; on a GPU this waits for them.

    Raises:
        ValueError: They do not rise from 0 to the length.
    """
    found: list[int] = cu_seqlens.tolist()
    if found != sorted(found) or (found[0], found[-1]) != (0, length):
        raise ValueError(f"{op}: {name} must rise from 0 to {length}, not {found[:8]}")
    return found
