"""Losses against their formulas, and against what they stand for."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from manyheads.core.errors import UsageError
from manyheads.recsys.losses import Negatives, bpr, cross_entropy, gbce, sampled_softmax
from manyheads.recsys.models.encoder import Items


def case(dtype=torch.float64, bias=True):
    states = torch.randn(37, 16, dtype=dtype, requires_grad=True)
    weight = torch.randn(301, 16, dtype=dtype, requires_grad=True)
    added = torch.randn(301, dtype=dtype, requires_grad=True) if bias else None
    return states, torch.randint(0, 301, (37,)), Items(weight, added)


def gradients(loss, states, items):
    return torch.autograd.grad(loss, [x for x in (states, *items) if x is not None])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cells", [1, 5 * 301, 1 << 22])
def test_cross_entropy(cells, bias):
    """In blocks of one, of five, and whole: torch's own, and its gradients."""
    states, targets, items = case(bias=bias)
    plain = F.cross_entropy(F.linear(states, *items), targets)
    found = cross_entropy(states, targets, items, cells)
    torch.testing.assert_close(found, plain, atol=1e-12, rtol=1e-12)
    for got, want in zip(
        gradients(3 * found, states, items), gradients(3 * plain, states, items), strict=True
    ):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-10)


def test_cross_entropy_of_bfloat16_states_is_summed_in_float32():
    states, targets, items = case(torch.float32)
    found = cross_entropy(states.bfloat16(), targets, items)
    assert found.dtype == torch.float32
    wanted = F.cross_entropy(F.linear(states, *items), targets)
    torch.testing.assert_close(found, wanted, atol=0, rtol=2e-2)
    assert [g.dtype for g in gradients(found, states, items)] == [torch.float32] * 3


def test_cross_entropy_without_a_state():
    states, _, items = case()
    none = states[:0]
    for loss in (
        cross_entropy(none, torch.zeros(0, dtype=torch.int64), items),
        sampled_softmax(none, torch.zeros(0, dtype=torch.int64), items, torch.arange(5)),
    ):
        assert loss == 0
        assert all(g.isfinite().all() for g in gradients(loss, states, items))


@pytest.mark.parametrize("own", [False, True])
def test_sampled_softmax(own):
    states, targets, items = case()
    drawn = torch.randint(0, 301, (37, 40) if own else (40,))
    chance = torch.log_softmax(torch.randn(301, dtype=torch.float64), 0)
    wanted = []
    for m in range(37):
        scores = F.linear(states[m], *items)
        row = (drawn[m] if own else drawn).tolist()
        others = [scores[j] - chance[j] - math.log(40) for j in row if j != targets[m]]
        wanted.append(torch.logsumexp(torch.stack([scores[targets[m]], *others]), 0) - scores[targets[m]])
    found = sampled_softmax(states, targets, items, drawn, chance)
    plain = torch.stack(wanted).mean()
    torch.testing.assert_close(found, plain, atol=1e-12, rtol=1e-12)
    for got, want in zip(gradients(found, states, items), gradients(plain, states, items), strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-10)


def test_the_correction_gives_the_gradient_of_the_whole():
    """Many draws by popularity: corrected, the gradient is the full softmax's; uncorrected, another."""
    states, targets, items = case()
    counts = torch.arange(1, 302)
    sampler = Negatives(counts, 1.0)
    drawn = sampler(100_000)
    full = gradients(cross_entropy(states, targets, items), states, items)[0]
    errors = []
    for chance in (sampler.log_chance.double(), None):
        found = gradients(sampled_softmax(states, targets, items, drawn, chance), states, items)[0]
        errors.append(float((found - full).norm() / full.norm()))
    assert errors[0] < 0.05 < 5 * errors[0] < errors[1]


def test_draws_follow_the_counts():
    counts = torch.tensor([0, 1, 3, 12])
    draw = torch.Generator().manual_seed(0)
    found = torch.bincount(Negatives(counts, 1.0)(170_000, generator=draw), minlength=4) / 10_000
    torch.testing.assert_close(found, torch.tensor([1.0, 1.0, 3.0, 12.0]), atol=0.15, rtol=0)
    flat = torch.bincount(Negatives(counts)(40_000, generator=draw), minlength=4) / 10_000
    torch.testing.assert_close(flat, torch.ones(4), atol=0.05, rtol=0)
    assert Negatives(counts)(3, 5).shape == (3, 5)


@pytest.mark.parametrize("t", [0.0, 0.75, 1.0])
def test_gbce(t):
    """The published form: probabilities to the power beta, binary cross-entropy over target and draws."""
    states, targets, items = case()
    drawn = torch.randint(0, 301, (37, 64))
    drawn = torch.where(drawn == targets[:, None], (drawn + 1) % 301, drawn)
    alpha = 64 / 300
    beta = alpha * ((1 - 1 / alpha) * t + 1 / alpha)
    scores = F.linear(states, *items)
    own, others = scores.gather(1, targets[:, None]), scores.gather(1, drawn)
    raised = torch.log(1 / (torch.sigmoid(own) ** -beta - 1))
    logits = torch.cat([raised, others], 1)
    truth = torch.zeros_like(logits)
    truth[:, 0] = 1
    wanted = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(1).mean()
    torch.testing.assert_close(gbce(states, targets, items, drawn, t), wanted, atol=1e-9, rtol=1e-9)


def test_gbce_without_correction_is_plain():
    states, targets, items = case()
    drawn = torch.tensor([3, 8, 250])
    scores = F.linear(states, *items)
    hit = drawn == targets[:, None]
    plain = F.softplus(-scores.gather(1, targets[:, None])).sum(1)
    plain = (plain + (F.softplus(scores[:, drawn]) * ~hit).sum(1)) / 4
    torch.testing.assert_close(gbce(states, targets, items, drawn, 0.0), plain.mean())
    with pytest.raises(UsageError, match=r"t must be from 0 to 1, not 1\.5"):
        gbce(states, targets, items, drawn, 1.5)


def test_bpr():
    states, targets, items = case()
    drawn = torch.randint(0, 301, (37,))
    scores = F.linear(states, *items)
    margin = scores.gather(1, targets[:, None]) - scores.gather(1, drawn[:, None])
    torch.testing.assert_close(bpr(states, targets, items, drawn), -F.logsigmoid(margin).mean())
