"""The delta rule against the sequential recurrence in torch, step by step, as its papers define it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Case, difference, inference, training
from manyheads.core.ops import delta_rule

LENGTH, HEADS, DIM = 1024, 6, 64


def cases(device: str) -> Iterator[Case]:
    """Lines: plain and gated; forward, and forward with backward."""
    shape = (1, LENGTH, HEADS, DIM)
    q, k, v = (torch.randn(shape, device=device) for _ in range(3))
    k = F.normalize(k, dim=-1)
    beta = torch.rand(shape[:3], device=device)
    decay = F.logsigmoid(torch.randn(shape[:3], device=device) + 3)
    for name, inputs in (("delta_rule", (q, k, v, beta)), ("delta_rule gated", (q, k, v, beta, decay))):
        for kind, make in (("forward", inference), ("forward+backward", training)):
            steps = make(ours, *inputs), make(sequential, *inputs)
            yield Case(
                f"{name} {kind}",
                f"B1 L{LENGTH} H{HEADS} K{DIM} V{DIM}",
                f"torch {torch.__version__}, step by step",
                *steps,
                difference=difference(*steps),
                memory=1 / 2 if kind == "forward+backward" and device == "cpu" else None,
            )


def ours(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None = None) -> Tensor:
    return delta_rule(q, k, v, beta, log_decay=decay)


def sequential(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None = None) -> Tensor:
    state = q.new_zeros(q.shape[0], HEADS, DIM, DIM)
    outputs = []
    for t in range(q.shape[1]):
        if decay is not None:
            state = state * decay[:, t].exp()[..., None, None]
        known = (k[:, t, :, None] @ state)[..., 0, :]
        written = beta[:, t, :, None] * (v[:, t] - known)
        state = state + k[:, t, :, :, None] * written[..., None, :]
        outputs.append((q[:, t, :, None] @ state)[..., 0, :] * DIM**-0.5)
    return torch.stack(outputs, 1)
