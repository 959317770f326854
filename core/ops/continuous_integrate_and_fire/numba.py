"""Continuous integrate-and-fire without gradients: compiled loops cut the frames, torch adds them up."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.core.ops.continuous_integrate_and_fire import numba_kernels
from manyheads.core.ops.continuous_integrate_and_fire.reference import SLACK, Fired, FireState


def continuous_integrate_and_fire(
    hidden: Tensor,
    alpha: Tensor,
    *,
    threshold: float,
    lengths: Tensor | None,
    tail: float | None,
    max_tokens: int | None,
    state: FireState | None,
    return_state: bool,
) -> Fired:
    """Walk through each row's weights; arguments as the public function's."""
    batch, frames, dim = hidden.shape
    steps = frames + (tail is not None)
    ends = np.full(batch, frames) if lengths is None else lengths.cpu().long().clamp(max=frames).numpy()
    totals = np.zeros(batch) if state is None else state.total.detach().double().numpy().copy()
    places, numbers = np.empty((batch, 1 + steps)), np.empty((batch, 1 + steps))
    fires = torch.empty(batch, steps)
    numba_kernels.place(
        alpha.detach().double().contiguous().numpy(), ends, -1.0 if tail is None else float(tail),
        float(threshold), SLACK, totals, places, numbers, fires.numpy(),
    )  # fmt: skip
    counts = np.nan_to_num(numbers[:, -1] - numbers[:, 0]).astype(np.int64)
    size = int(counts.max(initial=0)) if max_tokens is None else max_tokens
    most = batch * (steps + min(size, int(counts.max(initial=0))))
    index, weights = np.empty(most, np.int64), np.empty(most, np.float32)
    starts = np.empty((batch, size + 1), np.int64)
    found = numba_kernels.cut(frames, ends, totals, places, numbers, float(threshold), index, weights, starts)
    bags = F.embedding_bag(
        torch.from_numpy(index[:found]),
        hidden.detach().float().reshape(batch * frames, dim),
        torch.from_numpy(starts).flatten(),
        mode="sum",
        per_sample_weights=torch.from_numpy(weights[:found]),
    ).view(batch, size + 1, dim)  # the tokens, and what is left
    if state is not None:
        first = np.where(counts > 0, 0, size)
        kept = torch.from_numpy((counts == 0) | (size > 0))
        rows = torch.arange(batch)[kept]
        bags[rows, torch.from_numpy(first)[kept]] += state.partial.detach()[kept].float()
    bad = np.isnan(totals)
    if bad.any():
        bags[torch.from_numpy(bad)] = math.nan
    after = FireState(bags[:, -1].clone(), torch.from_numpy(totals)) if return_state else None
    return Fired(bags[:, :-1].to(hidden.dtype), torch.from_numpy(counts), fires, after)
