"""The residual block as one step of autograd against its layers one by one, and where it must not run."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from manyheads.core import residual
from manyheads.core.dispatch import numba_installed
from manyheads.core.residual import Block, fits, residual_block
from manyheads.core.testing import assert_accurate, nan_filled_empties

pytestmark = pytest.mark.skipif(
    not numba_installed() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="needs numba, oneDNN"
)


@pytest.fixture(autouse=True)
def any_cpu(monkeypatch):
    monkeypatch.setattr(residual, "wide_vectors_unused", lambda: True)


def block(width: int, momentum: float | None = 0.1) -> Block:
    found = Block(
        nn.Linear(width, width), nn.BatchNorm1d(width, momentum=momentum), nn.Linear(width, 2 * width),
        nn.Linear(2 * width, width), nn.BatchNorm1d(width),
    )  # fmt: skip
    for norm in (found.norm1, found.norm2):
        nn.init.normal_(norm.weight, 1.0, 0.3)
        nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
    return found


def plain(block: Block, x: Tensor, y: Tensor) -> Tensor:
    z = block.norm1(x + block.output(y))
    return block.norm2(z + block.contract(block.expand(z).relu()))


@pytest.mark.parametrize(("rows", "width"), [(2, 16), (63, 80), (100, 64), (2931, 64), (5000, 128)])
@pytest.mark.parametrize("moved", [0.0, 30.0])
def test_float64_rule(rows, width, moved):
    """Columns far from zero too; outputs and every gradient."""
    torch.manual_seed(rows)
    own = block(width)
    x = (torch.randn(rows, width) + moved).requires_grad_()
    y = torch.randn(rows, width, requires_grad=True)
    parameters = [p for part in own for p in part.parameters()]

    def on(run):
        def call(x, y, *parameters):
            parts, left = [], list(parameters)
            for part in own:
                moved_part = copy.deepcopy(part).to(x.dtype)
                for name in ("weight", "bias"):
                    delattr(moved_part, name)
                    setattr(moved_part, name, left.pop(0))
                parts.append(moved_part)
            return run(Block(*parts), x, y)

        return call

    with nan_filled_empties():
        assert_accurate(on(residual_block), on(plain), x, y, *parameters)


def test_statistics_move_as_batch_norms_do():
    torch.manual_seed(0)
    ours = block(64)
    theirs = Block(*copy.deepcopy(list(ours)))
    for rows in (100, 2, 700):
        x, y = torch.randn(rows, 64, requires_grad=True) * 3 + 7, torch.randn(rows, 64)
        assert fits(ours, x, y)
        torch.testing.assert_close(residual_block(ours, x, y), plain(theirs, x, y), rtol=1e-4, atol=1e-4)
        for a, b in ((ours.norm1, theirs.norm1), (ours.norm2, theirs.norm2)):
            for (name, one), two in zip(a.named_buffers(), b.buffers(), strict=True):
                torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5, msg=name)


def test_threads_give_the_same():
    own, x, y = block(64), torch.randn(3000, 64, requires_grad=True), torch.randn(3000, 64)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        out = residual_block(own, x, y)
        found.append((out.detach(), *torch.autograd.grad(out.square().sum(), [x, own.norm1.weight])))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_where_it_does_not_run(monkeypatch):
    own, x = block(64), torch.randn(50, 64)
    assert fits(own, x, x)
    assert not fits(own, x[:1], x[:1])
    assert not fits(own, x.double(), x.double())
    assert not fits(own, x, x[:, :32])
    assert not fits(block(72), torch.randn(50, 72), torch.randn(50, 72))
    assert not fits(block(64, momentum=None), x, x)
    assert not fits(own._replace(output=nn.Linear(64, 64, bias=False)), x, x)
    assert not fits(own._replace(norm2=nn.LayerNorm(64)), x, x)
    with torch.no_grad():
        assert not fits(own, x, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not fits(own, x, x)
    handle = own.expand.register_forward_hook(lambda module, given, out: out)
    assert not fits(own, x, x)
    handle.remove()
    own.norm1.eval()
    assert not fits(own, x, x)
    own.norm1.train()
    assert fits(own, x, x)
    monkeypatch.setattr(residual, "wide_vectors_unused", lambda: False)
    assert not fits(own, x, x)
