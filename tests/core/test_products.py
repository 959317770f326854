"""Products by oneDNN: the float64 rule, the strides that models have, and where they must not run."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from manyheads.core import products
from manyheads.core.dispatch import numba_installed
from manyheads.core.testing import assert_accurate, nan_filled_empties

SETTINGS = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"),
    reason="needs a PyTorch with oneDNN",
)


@pytest.fixture
def calls(monkeypatch):
    """Let oneDNN run on any CPU, and count how often it does."""
    found = []
    cut = products._cut
    monkeypatch.setattr(products, "wide_vectors_unused", lambda: True)
    monkeypatch.setattr(products, "_SMALL", 1)
    monkeypatch.setattr(products, "_NARROW", 0)
    monkeypatch.setattr(products, "_cut", lambda *given: found.append(1) or cut(*given))
    return found


@pytest.mark.parametrize("inner", [1, 63, 100, 197, 256, 257, 512, 1000])
@pytest.mark.parametrize("rows", [1, 63, 197])
def test_float64_rule(calls, rows, inner):
    x, weight, bias = torch.randn(2, rows, inner), torch.randn(100, inner), torch.randn(100)
    with nan_filled_empties():
        assert_accurate(products.linear, F.linear, x, weight, bias)
        assert_accurate(products.linear, F.linear, x, weight)
        a, b, add = torch.randn(rows, inner), torch.randn(inner, 100), torch.randn(rows, 100)
        assert_accurate(products.product, lambda a, b: a @ b, a, b)
        assert_accurate(products.product, lambda a, b, add: add + a @ b, a, b, add)
    assert len(calls) >= 4


def test_slices_and_transposes(calls):
    """What lies with gaps in memory gives the same numbers."""
    wide = torch.randn(300, 1200)
    for a in (wide[:, 100:400], wide.t()[100:400, :300], wide.t()[:300].contiguous().t()):
        for b in (wide[:, ::2], wide[:, 5:500], wide.t()[:300, :300], wide[:, :64].contiguous().t().t()):
            torch.testing.assert_close(products.product(a, b), a @ b, rtol=1e-4, atol=1e-3)
    assert len(calls) == 12
    weight = wide[:, 3:1003]
    assert not weight.is_contiguous()
    torch.testing.assert_close(
        products.linear(wide[:, :1000], weight), F.linear(wide[:, :1000], weight), rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (8,), (2, 3, 8)])
def test_any_number_of_axes(calls, shape):
    weight, bias, x = torch.randn(5, 8), torch.randn(5), torch.randn(shape)
    torch.testing.assert_close(products.linear(x, weight, bias), F.linear(x, weight, bias))


@pytest.mark.parametrize(("rows", "inner", "outer"), [(1, 63, 100), (197, 100, 63), (1000, 256, 257)])
def test_gradients_keep_the_float64_rule(calls, rows, inner, outer):
    given = torch.randn(rows, inner), torch.randn(outer, inner), torch.randn(outer)
    given = [x.requires_grad_() for x in given]
    with nan_filled_empties():
        assert_accurate(products.linear, F.linear, *given)
        assert_accurate(products.linear, F.linear, *given[:2])
    assert len(calls) >= 6
    alone = products.linear(given[0].detach(), given[1], given[2]).sum()
    assert torch.autograd.grad(alone, given[1])[0].shape == (outer, inner)


@pytest.mark.parametrize(("rows", "inner"), [(63, 100), (500, 600)])
def test_a_sum_and_a_relu_in_the_same_pass(calls, rows, inner):
    given = torch.randn(2, rows, inner), torch.randn(72, inner), torch.randn(72), torch.randn(2, rows, 72)
    given = [x.requires_grad_() for x in given]
    for relu in (False, True):

        def op(x, weight, bias, add=None, relu=relu):
            return products.linear(x, weight, bias, add=add, relu=relu)

        def plain(x, weight, bias, add=None, relu=relu):
            out = F.linear(x, weight, bias) if add is None else F.linear(x, weight, bias) + add
            return out.relu() if relu else out

        with nan_filled_empties():
            assert_accurate(op, plain, *given)
            assert_accurate(op, plain, *given[:3])
    assert len(calls) >= 4
    layer = torch.nn.Linear(inner, 72)
    expected = (layer(given[0]) + given[3]).relu()
    torch.testing.assert_close(products.project(layer, given[0], add=given[3], relu=True), expected)
    layer.register_forward_hook(lambda module, x, out: 2 * out)
    expected = (layer(given[0]) + given[3]).relu()
    torch.testing.assert_close(products.project(layer, given[0], add=given[3], relu=True), expected)


def test_gradients_of_narrow_weights_are_mkls(calls, monkeypatch):
    monkeypatch.setattr(products, "_NARROW", 64 * 17)
    x, weight = torch.randn(2000, 64), torch.randn(17, 64, requires_grad=True)
    assert_accurate(products.linear, F.linear, x, weight)
    assert len(calls) == 1


@pytest.mark.parametrize(("inner", "outer"), [(64, 16), (128, 64), (64, 208)])
@pytest.mark.parametrize("rows", [256, 1000, 6630])
def test_gradients_of_narrow_weights_by_loops(calls, monkeypatch, rows, inner, outer):
    numba_installed() or pytest.skip("needs numba")
    monkeypatch.setattr(products, "_NARROW", 1 << 15)
    ran = []
    loops = products._by_loops
    monkeypatch.setattr(products, "_by_loops", lambda *given: ran.append(1) or loops(*given))
    x = torch.randn(rows, inner)
    weight, bias = torch.randn(outer, inner, requires_grad=True), torch.randn(outer, requires_grad=True)
    for relu in (False, True):

        def op(x, weight, bias, relu=relu):
            return products.linear(x, weight, bias, relu=relu)

        def plain(x, weight, bias, relu=relu):
            return F.linear(x, weight, bias).relu() if relu else F.linear(x, weight, bias)

        with nan_filled_empties():
            assert_accurate(op, plain, x, weight, bias)
    assert ran


def test_loops_give_the_same_on_any_threads(calls, monkeypatch):
    numba_installed() or pytest.skip("needs numba")
    monkeypatch.setattr(products, "_NARROW", 1 << 15)
    grad, x, shown = torch.randn(3000, 112), torch.randn(3000, 64), torch.randn(3000, 112)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(products.weight_gradient(grad, x, shown))
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    assert torch.equal(found[0][2], grad * (shown > 0))


def test_gradients_of_gradients_and_transforms_are_torchs(calls):
    x, weight = (torch.randn(64, 64, requires_grad=True) for _ in range(2))
    found = []
    for linear in (products.linear, F.linear):
        (first,) = torch.autograd.grad(linear(x, weight).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), weight)[0])
    torch.testing.assert_close(*found)
    assert calls
    calls.clear()
    rows = torch.randn(5, 64, 64)
    mapped = torch.vmap(products.linear, (0, None))(rows, weight)
    torch.testing.assert_close(mapped, F.linear(rows, weight))
    value, tangent = torch.func.jvp(lambda x: products.linear(x, weight), (x,), (x,))
    torch.testing.assert_close(value, tangent)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        assert torch.autograd.forward_ad.unpack_dual(products.linear(dual, weight)).tangent is not None
    assert not calls


def test_torch_computes_where_another_type_is_wanted(calls):
    x, weight = torch.randn(64, 64), torch.randn(64, 64)
    learnt = weight.clone().requires_grad_()
    products.product(x, learnt).sum().backward()
    assert learnt.grad is not None
    products.linear(x.double(), weight.double())
    products.linear(x.bfloat16(), weight.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert products.linear(x, weight).dtype == torch.bfloat16
    exported = torch.export.export(torch.nn.Linear(4, 4), (torch.randn(2, 4),))
    assert exported.module()(torch.randn(2, 4)).shape == (2, 4)
    assert not calls
    with torch.no_grad():
        products.linear(x, learnt)
    assert calls


def test_small_products_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(products, "wide_vectors_unused", lambda: True)
    monkeypatch.setattr(products, "_cut", None)
    x, weight = torch.randn(10, 16), torch.randn(16, 16)
    torch.testing.assert_close(products.linear(x, weight), F.linear(x, weight), rtol=0, atol=0)
    torch.testing.assert_close(products.product(x, weight, x), torch.addmm(x, x, weight), rtol=0, atol=0)


def test_an_export_keeps_its_sizes_free():
    class Layer(torch.nn.Module):
        def forward(self, x, weight):
            return products.linear(x, weight)

    weight, rows = torch.randn(64, 64), torch.export.Dim("rows", min=2, max=1 << 20)
    shapes = {"x": {0: rows}, "weight": None}
    exported = torch.export.export(Layer(), (torch.randn(3, 64), weight), dynamic_shapes=shapes).module()
    x = torch.randn(1000, 64)
    torch.testing.assert_close(exported(x, weight), F.linear(x, weight))


@pytest.mark.parametrize(("given", "kept"), [(None, "128"), ("7", "7")])
def test_compiled_shapes_that_are_kept(given, kept):
    """What the user sets holds; else few are kept, for ever new lengths would fill the memory."""
    environment = {key: value for key, value in os.environ.items() if key not in SETTINGS}
    if given is not None:
        environment |= dict.fromkeys(SETTINGS, given)
    code = f"import os, manyheads.core.products; print([os.environ[name] for name in {SETTINGS}])"
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == str([kept, kept])
