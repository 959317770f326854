"""Figures as Recformer's paper has them, to be compared with its tables; ours are in `metrics`.

Items with the same score count for the target, and the history is not left out. (The published loop takes
means of batches' means besides; here a row is a row.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from manyheads.recsys.metrics import Standing, measure

LEFT_OUT = -1e4  # an item with a score no higher takes no part


def recformer_figures(scores: Tensor, targets: Tensor, ks: Sequence[int] = (10, 50)) -> dict[str, float]:
    """Return `ndcg@k`, `recall@k`, `mrr`, `auc` and `loss` of each history's one target.

    Shape:
        scores `[B, items]`; targets `[B]`.

    Source:
        AaronHeee/RecFormer, `utils.Ranker`.
    """
    own = scores.gather(1, targets[:, None])
    above, ties = (scores > own).sum(1), (scores == own).sum(1) - 1
    ranks = Standing(above, ties).ranks("optimistic")
    found = measure(ranks, np.arange(len(ranks)), ks)
    figures = {f"ndcg@{k}": found[f"ndcg@{k}"] for k in ks} | {f"recall@{k}": found[f"hr@{k}"] for k in ks}
    counted = (scores > LEFT_OUT).sum(1).double()
    auc = (1 - above.double() / counted).mean()
    loss = F.cross_entropy(scores, targets)
    return figures | {"mrr": found["mrr"], "auc": float(auc), "loss": float(loss)}
