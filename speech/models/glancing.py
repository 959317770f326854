"""The glancing sampler: in training, some tokens of the first pass are replaced by the true ones' vectors.

The more the first pass gets wrong, the more it is shown. Sources: Qian et al. 2021 (arXiv 2008.07905); Gao et
al. 2022 (arXiv 2206.08317).
"""

from __future__ import annotations

import torch
from torch import Tensor

PADDING = -1  # in targets


def glance(guessed: Tensor, targets: Tensor, ratio: float, order: Tensor | None = None) -> Tensor:
    """Choose the tokens that the second pass is shown.

    Of a row with n wrong tokens, int(n * ratio) of its tokens are chosen, wrong or not.

    Args:
        guessed: The first pass' tokens.
        targets: The true ones, -1 behind a row's end.
        ratio: Share of the number of wrong tokens.
        order: A row's places in the order in which they are chosen, if it is not to be drawn; -1 behind.

    Shape:
        guessed, targets, order and the result `[B, N]`; the result is boolean.
    """
    real = targets != PADDING
    wrong = (real & (guessed != targets)).sum(1)
    count = (wrong.float() * ratio).long()
    if order is None:
        drawn = torch.rand(targets.shape, device=targets.device).masked_fill(~real, 2.0)
        order = drawn.argsort(1)
    chosen = torch.arange(targets.shape[1], device=targets.device) < count[:, None]
    shown = torch.zeros_like(targets).scatter_add(1, order.clamp(min=0), (chosen & (order >= 0)).long())
    return (shown > 0) & real
