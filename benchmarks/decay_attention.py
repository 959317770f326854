"""Linear attention with decay against the sequential recurrence in torch: SSD, retention and GLA shapes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Case, difference, inference, training
from manyheads.core.ops import decay_attention

PEER = f"step by step, torch {torch.__version__}"


def recurrence(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """The state one step after the other, as the papers' reference code has it."""
    heads = v.shape[2]
    q, k = (x.repeat_interleave(heads // x.shape[2], 2) for x in (q * q.shape[-1] ** -0.5, k))
    decay = log_decay.exp()
    decay = decay[..., None, None] if decay.dim() == 3 else decay[..., None]
    state, found = 0, []
    for t in range(q.shape[1]):
        state = state * decay[:, t] + k[:, t, :, :, None] * v[:, t, :, None, :]
        found.append((q[:, t, :, None] @ state)[:, :, 0])
    return torch.stack(found, 1)


def cases(device: str) -> Iterator[Case]:
    shapes = {
        "SSD": ("B1 L1024 H6x64 N64", 1, False, 10.0),
        "GLA": ("B1 L1024 H6x64 K64", 6, True, None),
    }
    for name, (shape, groups, vector, target) in shapes.items():
        q, k = (torch.randn(1, 1024, groups, 64, device=device) for _ in range(2))
        v = torch.randn(1, 1024, 6, 64, device=device)
        gates = torch.randn(1, 1024, 6, *([64] if vector else []), device=device)
        given = (q, k, v, F.logsigmoid(gates + 2))
        ours, theirs = inference(decay_attention, *given), inference(recurrence, *given)
        yield Case(
            f"decay_attention {name} forward", shape, PEER, ours, theirs, target, difference(ours, theirs)
        )
        ours, theirs = training(decay_attention, *given), training(recurrence, *given)
        yield Case(f"decay_attention {name} forward+backward", shape, PEER, ours, theirs)
