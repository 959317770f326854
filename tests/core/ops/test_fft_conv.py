"""The long convolution against float64 and against torch's own gradients."""

from __future__ import annotations

import pytest
import torch

from manyheads.core.dispatch import choose, use_backend
from manyheads.core.ops.fft_conv import fft_conv, reference, transforms
from manyheads.core.testing import assert_accurate, check_gradients, nan_filled_empties


def composed(u, k, k_after=None):
    """The same transforms, with torch's gradients: what the float64 rule calls the formula in plain torch."""
    length = u.shape[1]
    wide = torch.float64 if u.dtype == torch.float64 else torch.float32
    n = 2 * length
    kernel = torch.zeros(k.shape[0], n, dtype=wide)
    kernel[:, : min(k.shape[1], length)] = k[:, :length]
    if k_after is not None:
        after = k_after[:, :length]
        kernel[:, n - after.shape[1] :] = after.flip(1)
    product = torch.fft.rfft(u.transpose(1, 2).to(wide), n=n) * torch.fft.rfft(kernel)
    return torch.fft.irfft(product, n=n)[..., :length].transpose(1, 2).to(u.dtype)


def draw(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).requires_grad_()


SIZES = [(1, 1, 1), (63, 63, 63), (100, 100, 0), (197, 197, 196), (197, 20, 5), (63, 100, 100), (100, 1, 99)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("length", "reach", "after"), SIZES)
def test_float64_rule(length, reach, after, dtype):
    u, k = draw(3, length, 5, dtype=dtype), draw(5, reach, dtype=dtype)
    k_after = draw(5, after, dtype=dtype)
    with nan_filled_empties():
        assert_accurate(fft_conv, composed, u, k)
        assert_accurate(fft_conv, composed, u, k, k_after)
        float_kernel = k.detach().float().requires_grad_()  # half tokens, a float32 kernel
        assert_accurate(fft_conv, composed, u, float_kernel)


@pytest.mark.parametrize(("length", "reach", "after"), SIZES)
def test_the_sum_over_lags(length, reach, after):
    u, k, k_after = (draw(*s, dtype=torch.float64) for s in ((3, length, 5), (5, reach), (5, after)))
    for given in ((u, k), (u, k, k_after)):
        found, wanted = fft_conv(*given), reference.fft_conv(*given)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
        cotangent = torch.randn(wanted.shape, dtype=torch.float64)
        options = {"grad_outputs": cotangent, "allow_unused": True, "materialize_grads": True}
        grads = (torch.autograd.grad(y, given, **options) for y in (found, wanted))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_the_kernel_of_the_later_tokens_begins_with_the_next():
    u = torch.zeros(1, 8, 1)
    u[0, 5] = 1
    y = fft_conv(u, torch.tensor([[1.0, 2]]), torch.tensor([[10.0, 20, 30]]))
    torch.testing.assert_close(y[0, :, 0], torch.tensor([0.0, 0, 30, 20, 10, 1, 2, 0]))


def test_no_later_token_is_seen():
    u, k = torch.randn(1, 64, 2), torch.randn(2, 64)
    changed = u.clone()
    changed[:, 40:] += 5
    torch.testing.assert_close(fft_conv(u, k)[:, :40], fft_conv(changed, k)[:, :40], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("wants", [(True, False), (False, True)])
def test_one_gradient_alone(wants):
    given = [x.detach().requires_grad_(w) for x, w in zip((draw(2, 50, 3), draw(3, 50)), wants, strict=True)]
    assert len(assert_accurate(fft_conv, composed, *given)) == 2


def test_strides_and_empty():
    u, k = draw(2, 50, 6), draw(6, 50)
    views = [u[:, ::2], u[..., ::2].repeat(1, 1, 2), u.transpose(1, 2).contiguous().transpose(1, 2)]
    for view in views:
        assert_accurate(fft_conv, composed, view.detach().requires_grad_(), k)
    assert fft_conv(u[:, :0], k).shape == (2, 0, 6)
    assert fft_conv(u[:0], k).shape == (0, 50, 6)
    u.detach()[0, 10] = float("nan")
    assert fft_conv(u, k)[0].isnan().any() and fft_conv(u, k)[1].isfinite().all()


def test_gradchecks():
    check_gradients(reference.fft_conv, draw(2, 6, 2), draw(2, 6), draw(2, 3))
    check_gradients(fft_conv, draw(2, 6, 2), draw(2, 6), draw(2, 3))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic):
    given = draw(2, 50, 6), draw(6, 50), draw(6, 20)
    compiled = torch.compile(fft_conv, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for function in (lambda *a: a, lambda *a: torch.autograd.grad(a[0].square().sum(), given)):
        for a, b in zip(function(compiled(*given)), function(fft_conv(*given)), strict=True):
            assert torch.equal(a, b)


def test_fast_sizes():
    for least in range(1, 3000):
        size = transforms.fast_size(least)
        assert least <= size < max(1.34 * least, 4) and size % 2 == 0
        while size % 2 == 0:
            size //= 2
        assert size in (1, 3, 5, 9, 15)


def test_dispatch_and_refusals():
    assert choose("fft_conv", device="cpu", dtype=torch.float32).backend == "torch"
    u, k = draw(2, 9, 3), draw(3, 9)
    with use_backend("reference"):
        torch.testing.assert_close(fft_conv(u, k), composed(u, k))
    with pytest.raises(ValueError, match=r"u must be \[B, L, D\]"):
        fft_conv(u[0], k)
    with pytest.raises(ValueError, match=r"k must be \[3, K\]"):
        fft_conv(u, k.t())
    with pytest.raises(ValueError, match=r"k_after must be \[3, K\]"):
        fft_conv(u, k, k.t())
    with pytest.raises(ValueError, match="at least"):
        fft_conv(u, k[:, :0])
    with pytest.raises(TypeError, match="k must be floating"):
        fft_conv(u, k.long())
