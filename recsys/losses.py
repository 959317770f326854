"""Losses over a catalogue: of the states that are asked for alone, whole or against a few drawn items.

Shapes: M states, each with one target; N items; K drawn ones; H width. Targets and drawn items are numbers of
items. Every loss is a mean over the states, and 0 where there are none.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core.errors import UsageError
from manyheads.core.products import linear, product
from manyheads.recsys.models.encoder import Items

CELLS = 1 << 22  # scores held at once: 16 MB


def cross_entropy(states: Tensor, targets: Tensor, items: Items, cells: int = CELLS) -> Tensor:
    """Return the full softmax's loss, in memory that does not grow with M times N.

    Blocks of states are scored one after the other, and what their scores give to the gradients is added up
    at once; a score is computed once.

    Args:
        states: What foretells.
        targets: What came.
        items: What states are compared with.
        cells: Scores held at once, at most.

    Shape:
        states `[M, H]`; targets `[M]`.
    """
    loss: Tensor = _CrossEntropy.apply(states, targets, items.weight, items.bias, cells)
    return loss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, cells: int
    ) -> Tensor:
        learns, table_learns = any(ctx.needs_input_grad), ctx.needs_input_grad[2]
        table = weight.to(states.dtype)
        added = None if bias is None else bias.to(states.dtype)
        total = torch.zeros((), dtype=torch.promote_types(states.dtype, torch.float32), device=states.device)
        dstates = dweight = dbias = states.new_empty(0)
        if learns:
            dstates = torch.empty_like(states)
            dweight = torch.zeros_like(weight) if table_learns else dweight
            dbias = dbias if bias is None else torch.zeros_like(bias)
        rows, count = max(1, cells // len(weight)), max(1, len(states))
        for first in range(0, len(states), rows):
            part, wanted = states[first : first + rows], targets[first : first + rows, None]
            scores = linear(part, table, added).to(total.dtype)
            logs = torch.log_softmax(scores, -1)
            total -= logs.gather(1, wanted).sum()
            if not learns:
                continue
            slope = logs.exp_().scatter_add_(1, wanted, -torch.ones_like(wanted, dtype=logs.dtype))
            slope = slope.div_(count).to(states.dtype)
            dstates[first : first + rows] = product(slope, table)
            if table_learns:
                dweight += product(slope.t(), part)
            if bias is not None:
                dbias += slope.sum(0)
        ctx.save_for_backward(dstates, dweight, dbias)
        return total / count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dstates, dweight, dbias = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        of_table = grad * dweight if wanted[2] else None
        return grad * dstates, None, of_table, grad * dbias if wanted[3] else None, None


class Negatives(nn.Module):
    """Draws items by how often they were chosen.

    Args:
        counts: How often, of each item; with `power` 0 only their number counts.
        power: Chances grow with counts to this power: 0 is uniform, 1 the popularity itself. An item that
            nobody chose counts as chosen once.

    Shape:
        counts `[N]`.
    """

    log_chance: Tensor
    upto: Tensor

    def __init__(self, counts: Tensor, power: float = 0.0) -> None:
        super().__init__()
        chance = counts.double().clamp(min=1) ** power
        chance = chance / chance.sum()
        self.register_buffer("log_chance", chance.log().float(), persistent=False)
        self.register_buffer("upto", chance.cumsum(0), persistent=False)

    def forward(self, *size: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw, with replacement: `[*size]`."""
        drawn = torch.rand(size, dtype=torch.float64, device=self.upto.device, generator=generator)
        found = torch.searchsorted(self.upto, drawn, right=True)
        return found.clamp(max=len(self.upto) - 1)


def sampled_softmax(
    states: Tensor,
    targets: Tensor,
    items: Items,
    drawn: Tensor,
    log_chance: Tensor | None = None,
    leave_out: bool = True,
) -> Tensor:
    """Return the loss of a softmax over the target and drawn items.

    Args:
        states: What foretells.
        targets: What came.
        items: What states are compared with.
        drawn: Items shared by all states, or each state's own.
        log_chance: The logarithm of each item's chance to be drawn. With it a drawn item counts by one over
            how often it is to be expected, and the sum of the drawn is, in the mean, that of the whole
            catalogue; None counts each as one, and items that are drawn often are held too low.
        leave_out: A drawn target does not count; else it does, as in the published Recformer.

    Shape:
        states `[M, H]`; targets `[M]`; drawn `[K]` or `[M, K]`; log_chance `[N]`.

    Source:
        Bengio and Senecal 2008; the target, which was not drawn, is not corrected: Khrylchenko et al. 2025
        (arXiv 2507.09331).
    """
    own, others = _scores(states, targets, items, drawn)
    if log_chance is not None:
        others = others - (log_chance[drawn] + math.log(drawn.shape[-1]))
    if leave_out:
        others = others.masked_fill(drawn == targets[:, None], -torch.inf)
    scores = torch.cat([own[:, None], others], 1)
    return _mean(torch.logsumexp(scores, 1) - own)


def gbce(states: Tensor, targets: Tensor, items: Items, drawn: Tensor, t: float = 0.75) -> Tensor:
    """Return the binary cross-entropy that undoes the overconfidence of few negatives.

    A drawn target is left out.
    The target's probability is raised to `beta = a (t (1 - 1 / a) + 1 / a)`, a being the share of the other
    items that is drawn: with t = 0 it is the plain loss, with t = 1 probabilities are calibrated.

    Args:
        states: What foretells.
        targets: What came.
        items: What states are compared with.
        drawn: Items drawn uniformly, shared by all states or each state's own.
        t: How much is undone, from 0 to 1.

    Shape:
        As `sampled_softmax`.

    Raises:
        UsageError: `t` is not from 0 to 1.

    Source:
        Petrov and Macdonald 2023, gSASRec (arXiv 2308.07192).
    """
    if not 0 <= t <= 1:
        raise UsageError(f"gbce: t must be from 0 to 1, not {t}")
    own, others = _scores(states, targets, items, drawn)
    share = min(1.0, drawn.shape[-1] / max(1, len(items.weight) - 1))
    beta = share * (t * (1 - 1 / share) + 1 / share)
    away = F.softplus(others).masked_fill(drawn == targets[:, None], 0.0)
    return _mean((beta * F.softplus(-own) + away.sum(1)) / (drawn.shape[-1] + 1))


def bpr(states: Tensor, targets: Tensor, items: Items, drawn: Tensor) -> Tensor:
    """Return the pairwise loss: each target should be above one drawn item.

    Shape:
        states `[M, H]`; targets, drawn `[M]`.

    Source:
        Rendle et al. 2009 (arXiv 1205.2618).
    """
    own, others = _scores(states, targets, items, drawn[:, None])
    return _mean(F.softplus(others[:, 0] - own))


def _scores(states: Tensor, targets: Tensor, items: Items, drawn: Tensor) -> tuple[Tensor, Tensor]:
    """The scores of targets `[M]` and of drawn items `[M, K]`."""
    weight, bias = items
    own = (states * weight[targets].to(states.dtype)).sum(-1)
    rows = weight[drawn].to(states.dtype)
    others = linear(states, rows) if drawn.dim() == 1 else torch.einsum("mh,mkh->mk", states, rows)
    if bias is not None:
        own, others = own + bias[targets], others + bias[drawn]
    return own.to(torch.promote_types(own.dtype, torch.float32)), others


def _mean(losses: Tensor) -> Tensor:
    return losses.sum() / max(1, len(losses))
