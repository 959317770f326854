"""The recommender that every other is measured beside: what was chosen most often, the same for all."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manyheads.recsys.retrieval import Factors


def popularity(counts: NDArray[np.integer] | Tensor, users: int) -> Factors:
    """Return the scores of popularity: each item's count, exactly.

    Args:
        counts: How often each item was chosen in training.
        users: For how many users.
    """
    items = torch.as_tensor(counts).to(torch.float64)[:, None]
    return Factors(torch.ones(users, 1, dtype=torch.float64), items)
