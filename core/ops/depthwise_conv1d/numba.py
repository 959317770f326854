"""Launches of the loops that numba compiles: tasks of rows, spread over torch's threads."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from manyheads.core import parallel
from manyheads.core.ops import packed
from manyheads.core.ops.depthwise_conv1d import cpu, numba_kernels

# Elements of a task: its rows of x, of dy and of the recomputed gradient stay within a second-level cache.
_TASK = 1 << 16
# Rows of a task: their sums for the gradients of the taps stay exact enough.
_LONGEST = 1024
# Taps from which torch's convolution is faster, where nothing lies beside the sequences.
_WIDE = 5
# Multiplications that are not worth a second thread.
_SMALL = 1 << 18


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor | None,
    cu_seqlens: Tensor | None,
    left: int,
    silu: bool,
) -> Tensor:
    """Convolve; arguments as `cpu.forward`."""
    if past is None and cu_seqlens is None and weight.shape[1] == 2 * left + 1 >= _WIDE:
        return cpu.forward(x, weight, bias, past, cu_seqlens, left, silu)
    tasks = _tasks(x, weight.shape[1], left, cu_seqlens)
    y = torch.empty(x.shape, dtype=torch.float32)
    rows, out = _rows(x), y.view(-1, x.shape[2]).numpy()
    taps, offset, before = _dense(weight.t()), _offset(bias, x), _past(past)
    parallel.run(
        [
            partial(numba_kernels.forward, rows, taps, offset, before, out, part, left, silu)
            for part in _parts(tasks, x.numel() * weight.shape[1])
        ]
    )
    return y.to(x.dtype)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor | None,
    cu_seqlens: Tensor | None,
    left: int,
    silu: bool,
    vectors: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pull the gradient of y back; as `cpu.backward`."""
    dim, width = weight.shape
    parts = _parts(_tasks(x, width, left, cu_seqlens), 3 * x.numel() * width)
    dx = torch.empty(x.shape, dtype=torch.float32)
    shares = torch.zeros(len(parts), width + 1, dim)
    dpast = torch.zeros((0, 0, 0) if past is None else past.shape)
    into = dx.view(-1, dim).numpy()
    taps, turned = _dense(weight.t()), _dense(weight.t().flip(0))
    given = (_dense(dy).reshape(-1, dim), _rows(x), taps, turned, _offset(bias, x), _past(past))
    parallel.run(
        [
            partial(
                numba_kernels.backward, *given, into, share.numpy(), dpast.numpy(), part, left, silu, vectors
            )
            for share, part in zip(shares, parts, strict=True)
        ]
    )
    return dx.to(x.dtype), shares.sum(0), dpast


def _tasks(x: Tensor, width: int, left: int, cu_seqlens: Tensor | None) -> np.ndarray:
    """Sequence, its start and end, first and last row of each task, `[tasks, 5]`.

    A sequence is cut from the side where its state lies, and never below W rows, so that one task has all
    the rows that the state reaches.
    """
    batch, length, dim = x.shape
    most = max(min(_TASK // dim, _LONGEST), width, 32)
    if cu_seqlens is None:
        bounds = np.arange(batch + 1) * length
    else:
        bounds = np.array(packed.bounds("depthwise_conv1d", cu_seqlens, length))
    counts = -(-np.diff(bounds) // most)
    sequence = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(len(sequence)) - np.repeat(np.cumsum(counts) - counts, counts)
    start, end = bounds[sequence], bounds[sequence + 1]
    if left:
        first = start + number * most
        last = np.minimum(first + most, end)
    else:
        last = end - number * most
        first = np.maximum(last - most, start)
    return np.stack([sequence, start, end, first, last], 1)


def _parts(tasks: np.ndarray, work: int) -> list[np.ndarray]:
    count = 1 if work < _SMALL or parallel.workers() == 1 else 4 * parallel.workers()
    return np.array_split(tasks, min(count, len(tasks)))


def _rows(x: Tensor) -> np.ndarray:
    """x as `[N, row stride]`: a half of a wider tensor, as `chunk` gives it, is read where it lies."""
    batch, length, dim = x.shape
    stride = x.stride(1)
    if x.dtype != torch.float32 or x.stride(2) != 1 or stride < dim:
        return _dense(x).reshape(-1, dim)
    if batch > 1 and x.stride(0) != length * stride:
        return _dense(x).reshape(-1, dim)
    # The last row may seem to run past the end of memory: the loops read D columns of it.
    shape, strides = (batch * length, stride), (4 * stride, 4)
    return np.lib.stride_tricks.as_strided(x.detach().numpy(), shape, strides)


def _dense(x: Tensor) -> np.ndarray:
    return x.detach().float().contiguous().numpy()


def _offset(bias: Tensor | None, x: Tensor) -> np.ndarray:
    return np.zeros(x.shape[2], np.float32) if bias is None else _dense(bias)


def _past(past: Tensor | None) -> np.ndarray:
    return np.zeros((0, 0, 0), np.float32) if past is None else _dense(past)
