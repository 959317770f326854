"""The Triton kernels of window attention on a GPU: float32, float16 and bfloat16 (`pytest -m gpu`)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from manyheads.core.dispatch import use_backend
from manyheads.core.ops.window_attention import reference, window_attention
from manyheads.core.ops.window_attention.custom_op import window_attention_backward_op, window_attention_op
from manyheads.core.ops.window_attention.geometry import geometry
from manyheads.core.testing import assert_accurate, check_op, nan_filled_empties

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Batch, height, width, heads; window, options.
CASES = {
    "one token": ((2, 3, 2, 1), 1, {}),
    "packs": ((2, 20, 12, 3), 4, {"shift": 2}),
    "swin": ((4, 28, 28, 3), 7, {}),
    "swin shifted": ((4, 28, 28, 3), 7, {"shift": 3}),
    "64 tokens": ((2, 16, 24, 4), 8, {"shift": 4}),
    "grid": ((2, 28, 21, 3), 7, {"partition": "grid"}),
    "144 tokens": ((2, 24, 24, 2), 12, {"shift": 6}),
    "rows": ((2, 4, 197, 2), 1, {"partition": "stripe_h"}),
    "columns": ((2, 63, 6, 2), 3, {"partition": "stripe_v", "shift": 1}),
}


def draw(name: str, dtype: torch.dtype, dim: int = 32) -> list[Tensor]:
    (batch, height, width, heads), window, options = CASES[name]
    n = geometry(height, width, window, options.get("shift", 0), options.get("partition", "window")).tokens
    qkv = torch.randn(batch, height, width, 3, heads, dim).to("cuda", dtype)
    bias = torch.randn(heads, n, n).to("cuda", dtype)
    return [x.requires_grad_() for x in (*qkv.unbind(3), bias)]


def pair(name: str):
    _, window, options = CASES[name]

    def op(q, k, v, bias=None):
        return window_attention(q, k, v, window, bias=bias, **options)

    def plain(q, k, v, bias=None):
        return reference.window_attention(q, k, v, window, bias=bias, **options)

    return op, plain


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_float64_rule(name, dtype):
    op, plain = pair(name)
    inputs = draw(name, dtype)
    with use_backend("triton"), nan_filled_empties():
        assert_accurate(op, plain, *inputs)
        assert_accurate(op, plain, *inputs[:3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [7, 16, 32, 64, 128, 256])
def test_every_row_of_the_table(dim, dtype):
    if dim == 256 and dtype == torch.float32:
        pytest.skip("float32 stops at 128")
    for name in ("packs", "swin shifted", "144 tokens"):
        with use_backend("triton"), nan_filled_empties():
            assert_accurate(*pair(name), *draw(name, dtype, dim))


def test_the_default_and_the_same_each_time():
    op, _ = pair("swin shifted")
    inputs = draw("swin shifted", torch.bfloat16)
    first, second = (torch.autograd.grad(op(*inputs).float().square().sum(), inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_custom_ops():
    q, k, v, bias = draw("swin shifted", torch.float32)
    options = [[7, 7], [3, 3], False, 0.25, "triton"]
    check_op(window_attention_op, [q, k, v, bias, *options])
    plain = [x.detach() for x in (q, k, v, bias)]
    out, rows = window_attention_op(*plain, *options)
    check_op(window_attention_backward_op, [torch.randn_like(q), *plain, out, rows, *options, True])
