"""The selective scan by compiled loops: the work in parts of sequences and channels, a thread each."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manyheads.core import parallel
from manyheads.core.ops.selective_scan import numba_kernels as kernels
from manyheads.core.ops.selective_scan.inputs import CHUNK, Gradients, Inputs

Array = NDArray[np.float32]
Range = tuple[int, int]
# Channels that a loop takes at a time: the backward's states of a chunk, 8 KB a channel, stay in the cache.
_WIDTH = 128
_LEAST = 32  # channels below which a part is not worth a thread
_EMPTY = np.empty(0, np.float32)


def forward(x: Inputs, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Scan; return y in u's dtype, the last states `[S, D, N]` and the kept ones `[slots, N, D]`, or none."""
    d, n = x.A.shape
    y = torch.empty(x.u.shape)
    kept = torch.empty(x.slots() if keep else 0, n, d)
    state = _states(x, x.initial_state)
    arguments, starts = _arguments(x), x.starts().numpy()

    def part(numbers: Range, channels: Range) -> None:
        outputs = [_array(y).reshape(-1, d), _array(state), _array(kept)]
        kernels.forward(*arguments, *outputs, *_bounds(x, starts, numbers, channels))

    parallel.run([functools.partial(part, *ranges) for ranges in itertools.product(*_parts(starts, d))])
    return y.to(x.u.dtype), state.transpose(1, 2).contiguous(), kept


def backward(x: Inputs, kept: Tensor, dy: Tensor, dlast: Tensor | None) -> Gradients:
    """Pull the gradients of y and of the last states back, from the states that the forward kept."""
    (d, n), total = x.A.shape, x.u.shape[0] * x.u.shape[1]
    du, ddelta = torch.empty(x.u.shape), torch.empty(x.u.shape)
    dz = torch.empty(x.u.shape if x.z is not None else 0)
    dstate = _states(x, dlast)
    arguments, starts = [_array(dy).reshape(total, d), *_arguments(x), _array(kept)], x.starts().numpy()
    runs, columns = _parts(starts, d)
    # Parts that share rows, or channels, have sums of their own, which are added up in the end in one order.
    db, dc = torch.zeros(2, len(columns), total, n)
    da, vectors = np.zeros((len(runs), n, d)), np.zeros((2, len(runs), d))  # float64: long sums

    def part(run: int, column: int) -> None:
        rows = [_array(grad).reshape(-1, d) for grad in (du, ddelta, dz)]
        sums = [da[run], _array(db[column]), _array(dc[column]), *vectors[:, run], _array(dstate)]
        bounds = _bounds(x, starts, runs[run], columns[column])
        kernels.backward(*arguments, *rows, *sums, *bounds)

    parts = itertools.product(range(len(runs)), range(len(columns)))
    parallel.run([functools.partial(part, *which) for which in parts])
    dskip, dbias = torch.from_numpy(vectors.sum(1))
    return (
        du,
        ddelta,
        torch.from_numpy(da.sum(0)).t(),
        db.sum(0).view(x.B.shape),
        dc.sum(0).view(x.C.shape),
        None if x.D is None else dskip,
        None if x.z is None else dz,
        None if x.delta_bias is None else dbias,
        None if x.initial_state is None else dstate.transpose(1, 2),
    )


def _states(x: Inputs, given: Tensor | None) -> Tensor:
    """States `[S, N, D]` to be written over: zeros, or a copy of `[S, D, N]`."""
    d, n = x.A.shape
    states = torch.zeros(x.sequences(), n, d)
    return states if given is None else states.copy_(given.detach().transpose(1, 2))


def _arguments(x: Inputs) -> list[Array | int]:
    """The loops' arguments from u to delta_bias: arrays, each with its row length where it has rows."""
    return [
        *_rows(x.u),
        *_rows(x.delta),
        _array(x.A.t()),
        *_rows(x.B),
        *_rows(x.C),
        _vector(x.D),
        *_rows(x.z),
        _vector(x.delta_bias),
    ]


def _rows(x: Tensor | None) -> tuple[Array, int]:
    """The memory from x's first element to its last, and the distance of two rows: a slice needs no copy."""
    if x is None:
        return _EMPTY, 0
    x = x.detach().float()
    batch, length, d = x.shape
    dense = (d == 1 or x.stride(2) == 1) and (batch == 1 or x.stride(0) == length * x.stride(1))
    if not dense or length == 1:
        x = x.contiguous()
    row = x.stride(1)
    span = (batch * length - 1) * row + d if x.numel() else 0
    return x.as_strided((span,), (1,)).numpy(), row


def _vector(x: Tensor | None) -> Array:
    return _EMPTY if x is None else _array(x)


def _array(x: Tensor) -> Array:
    found: Array = x.detach().float().contiguous().numpy()
    return found


def _parts(starts: NDArray[np.int64], d: int) -> tuple[list[Range], list[Range]]:
    """Ranges of sequences, about equally many rows each, and of channels: two parts or more a worker."""
    sequences, wanted = len(starts) - 1, 2 * parallel.workers()
    runs = max(1, min(sequences, wanted))
    edges = np.searchsorted(starts, starts[-1] * np.arange(1, runs) / runs)
    cuts = np.unique(np.concatenate([[0], edges, [sequences]])).tolist()
    columns = max(1, min(-(-wanted // max(1, len(cuts) - 1)), d // _LEAST))
    width = -(-d // columns)
    return list(itertools.pairwise(cuts)), [(lo, min(d, lo + width)) for lo in range(0, d, width)]


def _bounds(x: Inputs, starts: NDArray[np.int64], numbers: Range, channels: Range) -> list[object]:
    """The loops' last arguments: the part, its channels in blocks of one size, and the options."""
    size = channels[1] - channels[0]
    width = -(-size // -(-size // _WIDTH))
    return [starts, *numbers, *channels, width, CHUNK, x.delta_softplus, x.reverse]
