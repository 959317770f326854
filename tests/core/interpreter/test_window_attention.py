"""The Triton kernels of window attention in Triton's interpreter: forward and every gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from manyheads.core.dispatch import interpreting, use_backend
from manyheads.core.ops.window_attention import reference, window_attention
from manyheads.core.ops.window_attention.custom_op import window_attention_op
from manyheads.core.ops.window_attention.geometry import geometry
from manyheads.core.testing import assert_accurate, check_op, nan_filled_empties

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1"),
]

# Batch, height, width, heads, D; window, options. Up to 64 tokens go to a tile, small windows together.
CASES = {
    "one token": ((2, 3, 2, 1, 5), 1, {}),
    "packs, the last one smaller": ((2, 6, 6, 2, 8), 2, {"shift": 1}),
    "49 tokens, shifted": ((1, 14, 14, 2, 16), 7, {"shift": 3}),
    "oblong, one axis shifted": ((2, 6, 10, 1, 7), (3, 5), {"shift": (1, 0)}),
    "63 tokens": ((1, 9, 14, 1, 16), (9, 7), {"shift": (4, 3)}),
    "grid": ((2, 8, 12, 2, 8), 4, {"partition": "grid"}),
    "100 tokens, rows": ((1, 2, 100, 1, 8), 1, {"partition": "stripe_h"}),
    "81 tokens, shifted": ((1, 18, 9, 1, 12), 9, {"shift": 4}),
    "columns": ((1, 33, 6, 1, 8), 3, {"partition": "stripe_v", "shift": 2}),
}


def draw(name: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    (batch, height, width, heads, dim), window, options = CASES[name]
    n = geometry(height, width, window, options.get("shift", 0), options.get("partition", "window")).tokens
    qkv = torch.randn(batch, height, width, 3, heads, dim).to(dtype)
    return [x.requires_grad_() for x in (*qkv.unbind(3), torch.randn(heads, n, n).to(dtype))]


def pair(name: str):
    _, window, options = CASES[name]

    def op(q, k, v, bias=None):
        return window_attention(q, k, v, window, bias=bias, **options)

    def plain(q, k, v, bias=None):
        return reference.window_attention(q, k, v, window, bias=bias, **options)

    return op, plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_float64_rule(name, dtype):
    with use_backend("triton"), nan_filled_empties():
        assert_accurate(*pair(name), *draw(name, dtype))


@pytest.mark.parametrize("name", ["49 tokens, shifted", "packs, the last one smaller", "81 tokens, shifted"])
def test_without_bias_and_with_a_frozen_one(name):
    op, plain = pair(name)
    q, k, v, bias = draw(name)
    with use_backend("triton"), nan_filled_empties():
        assert_accurate(op, plain, q, k, v)
        assert_accurate(op, plain, q, k, v, bias.detach())


@pytest.mark.parametrize("name", ["49 tokens, shifted", "packs, the last one smaller", "columns"])
def test_programs_sum_several_windows(name, monkeypatch):
    """One program a head: its loop over windows, and for large ones the loop over images."""
    from manyheads.core.ops.window_attention import triton

    monkeypatch.setattr(triton, "MANY", 4)
    monkeypatch.setattr(triton, "FEW", 4)
    with use_backend("triton"), nan_filled_empties():
        assert_accurate(*pair(name), *draw(name))


@pytest.mark.parametrize("name", ["49 tokens, shifted", "packs, the last one smaller"])
def test_small_windows_in_smaller_blocks(name, monkeypatch):
    """What head dims do that have no tile of whole windows: the kernels of large windows."""
    from manyheads.core.ops.window_attention import triton

    monkeypatch.setattr(triton, "INTERPRETED", triton.Config(32, 32, 4, 1))
    with use_backend("triton"), nan_filled_empties():
        assert_accurate(*pair(name), *draw(name))


def test_rows_without_keys_and_strides():
    op, plain = pair("49 tokens, shifted")
    q, k, v, bias = draw("49 tokens, shifted")
    with torch.no_grad():
        bias[1, 5] = float("-inf")
        bias[0, 3, 10:] = float("-inf")
    heads_first = k.detach().permute(0, 3, 1, 2, 4).contiguous().permute(0, 2, 3, 1, 4).requires_grad_()
    turned = v.detach().transpose(1, 4).contiguous().transpose(1, 4).requires_grad_()
    wide = bias.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    with use_backend("triton"), nan_filled_empties():
        assert_accurate(op, plain, q, heads_first, turned, wide)
        assert_accurate(op, plain, q, k, v, bias[:, :1].detach().requires_grad_())
        dead = reference.split(op(q, k, v, bias), geometry(14, 14, 7, 3, "window"))[:, :, 5, 1]
    assert dead.eq(0).all()


@pytest.mark.parametrize(
    ("name", "spread"), [("49 tokens, shifted", slice(3, 10)), ("packs, the last one smaller", slice(0, 6))]
)
def test_nan_stays_in_its_window_or_pack(name, spread):
    """A pack's windows share a tile, where zero times NaN is NaN; a pack lies in one image."""
    q, k, v, bias = (x.detach() for x in draw(name))
    k[0, 4, 4, 1, 5] = float("nan")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    op, _ = pair(name)
    with use_backend("triton"):
        out = op(*leaves, bias)
        grads = torch.autograd.grad(out.sum(), leaves)
    for found in (out, *grads):
        bad = found.isnan().any(-1)
        assert bad[0, 4, 4, 1]
        bad[0, spread, spread, 1] = False
        assert not bad.any()


def test_opcheck():
    q, k, v, bias = draw("packs, the last one smaller")
    check_op(window_attention_op, [q, k, v, bias, [2, 2], [1, 1], False, 0.25, "triton"])


def test_an_image_beyond_the_table():
    q = torch.randn(1, 1 << 15, 1, 1, 4)
    with use_backend("triton"), pytest.raises(ValueError, match="fewer than 32768"):
        window_attention(q, q, q, 1)
