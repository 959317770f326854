"""Window attention: the float64 rule on every CPU backend, timm's Swin and MaxViT, what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from manyheads.core import dispatch, parallel
from manyheads.core.dispatch import choose, explain, use_backend
from manyheads.core.errors import UsageError
from manyheads.core.ops.attention import attention
from manyheads.core.ops.window_attention import cpu, reference, window_attention
from manyheads.core.ops.window_attention.custom_op import window_attention_backward_op, window_attention_op
from manyheads.core.ops.window_attention.geometry import geometry, layout
from manyheads.core.testing import assert_accurate, check_gradients, check_op, nan_filled_empties

BACKENDS = ["numba", "cpu"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Height, width, window, options; n is 1, 63, 100, 197 and others.
CASES = {
    "one token": (1, 1, 1, {}),
    "windows of one": (3, 2, 1, {}),
    "swin": (14, 21, 7, {}),
    "swin shifted": (14, 21, 7, {"shift": 3}),
    "63 tokens, shifted": (18, 14, (9, 7), {"shift": (5, 2)}),
    "one axis shifted": (12, 10, (4, 5), {"shift": (0, 2)}),
    "one window, shifted": (6, 6, 6, {"shift": 2}),
    "100 tokens": (20, 10, 10, {"shift": 3}),
    "grid": (8, 12, 4, {"partition": "grid"}),
    "grid, oblong": (10, 9, (5, 3), {"partition": "grid"}),
    "rows": (3, 197, 1, {"partition": "stripe_h"}),
    "columns": (63, 4, 2, {"partition": "stripe_v", "shift": 1}),
    "stripes": (8, 5, 4, {"partition": "stripe_h", "shift": 2}),
}


def draw(
    name: str, dtype: torch.dtype = torch.float32, batch: int = 2, heads: int = 2, dim: int = 12
) -> list[Tensor]:
    """q, k, v as slices of one projection, and a bias, all requiring gradients."""
    height, width, window, options = CASES[name]
    n = geometry(height, width, window, options.get("shift", 0), options.get("partition", "window")).tokens
    qkv = torch.randn(batch, height, width, 3, heads, dim).to(dtype)
    return [x.requires_grad_() for x in (*qkv.unbind(3), torch.randn(heads, n, n).to(dtype))]


def pair(name: str):
    *_, window, options = CASES[name]

    def op(q, k, v, bias=None):
        return window_attention(q, k, v, window, bias=bias, **options)

    def plain(q, k, v, bias=None):
        return reference.window_attention(q, k, v, window, bias=bias, **options)

    return op, plain


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_rule(backend, dtype, name):
    with use_backend(backend), nan_filled_empties():
        assert_accurate(*pair(name), *draw(name, dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_blocks_and_threads(backend, monkeypatch):
    """Blocks that end inside an image, windows of both kinds, parts of the heads; sums of threads."""
    monkeypatch.setattr(cpu, "BLOCK", 5000)
    monkeypatch.setattr(cpu, "SMALL", 1)
    monkeypatch.setattr(parallel, "workers", lambda: 2)
    for name in ("swin shifted", "columns", "grid"):
        with use_backend(backend), nan_filled_empties():
            assert_accurate(*pair(name), *draw(name, batch=3))
    for dtype in (torch.float32, torch.bfloat16):
        with use_backend(backend), nan_filled_empties():
            assert_accurate(*pair("63 tokens, shifted"), *draw("63 tokens, shifted", dtype, heads=3))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(49, 49), (1, 49, 49), (2, 1, 49), (49,)], ids=str)
def test_a_bias_that_is_broadcast(shape, backend):
    op, plain = pair("swin shifted")
    bias = torch.randn(shape).requires_grad_()
    with use_backend(backend), nan_filled_empties():
        assert_accurate(op, plain, *draw("swin shifted")[:3], bias)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_bias_and_other_strides(backend):
    op, plain = pair("swin shifted")
    q, k, v, bias = draw("swin shifted")
    turned = q.detach().transpose(1, 4).contiguous().transpose(1, 4).requires_grad_()
    heads_first = k.detach().permute(0, 3, 1, 2, 4).contiguous().permute(0, 2, 3, 1, 4).requires_grad_()
    with use_backend(backend), nan_filled_empties():
        assert_accurate(op, plain, q, k, v)
        assert_accurate(op, plain, turned, heads_first, v.detach(), bias)
        mixed = torch.randn(2, 49, 49, dtype=torch.float32).requires_grad_()
        half = [x.detach().half() for x in (q, k, v)]
        assert op(*half, mixed).dtype == torch.float16


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_a_row_without_keys_gives_zeros(backend):
    q, k, v, bias = draw("swin shifted")
    with torch.no_grad():
        bias[1, 5] = float("-inf")
        bias[0, 3, 10:] = float("-inf")
    op, plain = pair("swin shifted")
    with use_backend(backend), nan_filled_empties():
        assert_accurate(op, plain, q, k, v, bias)
        out = op(q, k, v, bias)
    grads = torch.autograd.grad(out.sum(), (q, k, v, bias))
    dead = reference.split(out, geometry(14, 21, 7, 3, "window"))[:, :, 5, 1]
    assert dead.eq(0).all()
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_window(backend, monkeypatch):
    monkeypatch.setattr(cpu, "BLOCK", 2000)
    q, k, v, bias = (x.detach() for x in draw("swin"))
    k[0, 3, 3, 1, 5] = float("nan")
    op, _ = pair("swin")
    with use_backend(backend):
        out = op(q, k, v, bias)
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        grads = torch.autograd.grad(op(*inputs, bias).sum(), inputs)
    for found in (out, *grads):
        bad = found.isnan().any(-1)
        assert bad[0, :7, :7, 1].all()
        bad[0, :7, :7, 1] = False
        assert not bad.any()


def test_the_reference_gradients():
    q, k, v = torch.randn(3, 1, 4, 2, 1, 2)
    check_gradients(
        lambda q, k, v, bias: reference.window_attention(q, k, v, 2, shift=1, bias=bias),
        q, k, v, torch.randn(1, 4, 4),
    )  # fmt: skip


def test_an_image_that_is_one_window_is_dense_attention():
    q, k, v, _ = (x.double() for x in draw("one window, shifted"))
    dense = attention(*(x.flatten(1, 2) for x in (q, k, v))).view_as(q)
    torch.testing.assert_close(reference.window_attention(q, k, v, 6), dense)
    torch.testing.assert_close(reference.window_attention(q, k, v, 6, partition="grid"), dense)


def test_stripes_are_attention_over_whole_rows_and_columns():
    q, k, v = torch.randn(3, 2, 6, 5, 2, 4).double()
    rows = [x.reshape(6, 10, 2, 4) for x in (q, k, v)]  # two rows each
    want = attention(*rows).view_as(q)
    torch.testing.assert_close(reference.window_attention(q, k, v, 2, partition="stripe_h"), want)
    turned = [x.transpose(1, 2) for x in (q, k, v)]
    found = reference.window_attention(*turned, 2, partition="stripe_v").transpose(1, 2)
    torch.testing.assert_close(found, want)


def test_without_numba_torch_takes_over(monkeypatch):
    monkeypatch.setattr(dispatch, "numba_installed", lambda: False)
    assert choose("window_attention", device="cpu", dtype=torch.float32).backend == "cpu"


def test_the_layout_lists_every_token_once():
    for height, width, window, options in CASES.values():
        where = geometry(height, width, window, options.get("shift", 0), options.get("partition", "window"))
        found = layout(where)
        assert torch.equal(found.places.flatten().sort().values, torch.arange(height * width))
        same = (found.region == found.region[:, :1]).all(1)
        assert same[: found.plain].all() and not same[found.plain :].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_timms_swin_block(backend):
    """Both blocks of a stage, qkv and proj by timm's weights, the bias by its table."""
    swin = pytest.importorskip("timm.models.swin_transformer")
    for shift in (0, 3):
        block = swin.SwinTransformerBlock(24, (14, 14), 3, window_size=7, shift_size=shift).requires_grad_()
        x = torch.randn(2, 14, 14, 24, requires_grad=True)
        attn = block.attn

        def ours(x, attn=attn, shift=shift):
            q, k, v = attn.qkv(x).unflatten(-1, (3, 3, 8)).unbind(3)
            out = window_attention(q, k, v, 7, shift=shift, bias=attn._get_rel_pos_bias()[0])
            return attn.proj(out.flatten(3))

        leaves = [x, *attn.parameters()]
        cotangent = torch.randn(2, 14, 14, 24)
        with use_backend(backend):
            found = ours(x)
            grads = torch.autograd.grad(found, leaves, cotangent)
        want = block._attn(x)
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)
        for have, grad in zip(grads, torch.autograd.grad(want, leaves, cotangent), strict=True):
            torch.testing.assert_close(have, grad, rtol=1e-4, atol=2e-5)


def test_timms_padding_is_padding_before_the_projection():
    """As README.md says: pad, project, attend, crop; with a shift timm rolls before it pads."""
    swin = pytest.importorskip("timm.models.swin_transformer")
    x = torch.randn(2, 12, 10, 24)
    for shift in (0, 3):
        block = swin.SwinTransformerBlock(24, (12, 10), 3, window_size=7, shift_size=shift)
        attn = block.attn
        rolled = torch.nn.functional.pad(x.roll((-shift, -shift), (1, 2)), (0, 0, 0, 4, 0, 2))
        padded = rolled.roll((shift, shift), (1, 2))
        q, k, v = attn.qkv(padded).unflatten(-1, (3, 3, 8)).unbind(3)
        out = window_attention(q, k, v, 7, shift=shift, bias=attn._get_rel_pos_bias()[0])
        out = attn.proj(out.flatten(3)).roll((-shift, -shift), (1, 2))[:, :12, :10]
        torch.testing.assert_close(out.roll((shift, shift), (1, 2)), block._attn(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["block", "grid"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_timms_maxvit(backend, kind):
    maxxvit = pytest.importorskip("timm.models.maxxvit")
    config = maxxvit.MaxxVitTransformerCfg(
        dim_head=8, window_size=(3, 2), grid_size=(3, 2), rel_pos_type="bias_tf", head_first=False
    )
    layer = maxxvit.PartitionAttentionCl(24, partition_type=kind, cfg=config)
    x = torch.randn(2, 9, 8, 24)
    attn = layer.attn
    q, k, v = attn.qkv(x).unflatten(-1, (3, 3, 8)).unbind(3)
    partition = "window" if kind == "block" else "grid"
    with use_backend(backend):
        out = window_attention(q, k, v, (3, 2), partition=partition, bias=attn.rel_pos.get_bias())
    torch.testing.assert_close(attn.proj(out.flatten(3)), layer._partition_attn(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_custom_ops(backend):
    q, k, v, bias = draw("swin shifted")
    options = [[7, 7], [3, 3], False, 0.25, backend]
    check_op(window_attention_op, [q, k, v, bias, *options])
    check_op(window_attention_op, [q, k, v, None, *options])
    plain = [x.detach() for x in (q, k, v, bias)]
    rows = torch.empty(0)
    check_op(window_attention_backward_op, [torch.randn_like(q), *plain, None, rows, *options, True])
    check_op(
        window_attention_backward_op, [torch.randn_like(q), *plain[:3], None, None, rows, *options, False]
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic):
    torch._dynamo.reset()
    op, _ = pair("swin shifted")
    inputs = draw("swin shifted")
    compiled = torch.compile(op, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    results = []
    for function in (compiled, op):
        out = function(*inputs)
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*results, strict=True))


def test_dispatch():
    usual = {"device": "cpu", "dtype": torch.float32}
    assert choose("window_attention", **usual).backend == "numba"
    assert choose("window_attention", device="cpu", dtype=torch.float64).backend == "reference"
    assert choose("window_attention", device="cuda", dtype=torch.bfloat16, head="wide").backend == "triton"
    assert choose("window_attention", device="cuda", dtype=torch.float32, head="wide").backend == "reference"
    assert "not triton" in explain("window_attention", **usual)
    with use_backend("torch"), pytest.raises(UsageError, match="no backend 'torch'"):
        window_attention(*draw("swin")[:3], 7)


def test_no_images():
    q = torch.empty(0, 14, 14, 2, 8)
    assert window_attention(q, q, q, 7, shift=3).shape == q.shape


IMAGE = torch.randn(1, 14, 14, 2, 8)
WRONG = {
    "dims": (ValueError, r"q must be \[B, H, W, heads, D\]", {"q": IMAGE[0]}),
    "dtypes": (TypeError, "one floating dtype; k", {"k": IMAGE.half()}),
    "shapes": (ValueError, "one shape; v", {"v": IMAGE[..., :4]}),
    "empty": (ValueError, "at least 1", dict.fromkeys("qkv", IMAGE[..., :0])),
    "window": (ValueError, "H = 14 is not a multiple of the window's 5", {"window": 5}),
    "width": (ValueError, "W = 14 is not a multiple of the window's 4; pad", {"window": (7, 4)}),
    "no window": (ValueError, "multiple of the window's 0", {"window": 0}),
    "window type": (TypeError, "window must be an int or a pair", {"window": 7.0}),
    "window triple": (TypeError, "window must be an int or a pair", {"window": (7, 7, 7)}),
    "shift": (ValueError, r"shift along H must be in \[0, 7\), not 7", {"shift": 7}),
    "negative shift": (ValueError, "shift along W", {"shift": (0, -1)}),
    "partition": (ValueError, "partition must be one of", {"partition": "block"}),
    "grid shift": (ValueError, "takes no shift", {"partition": "grid", "shift": 1}),
    "stripe pair": (ValueError, "must be one int", {"partition": "stripe_h", "window": (1, 1)}),
    "bias dtype": (TypeError, "bias must be floating", {"bias": torch.ones(49, 49, dtype=torch.int64)}),
    "bias shape": (ValueError, r"bias \[2, 48, 49\] does not broadcast", {"bias": torch.ones(2, 48, 49)}),
    "bias dims": (ValueError, "does not broadcast", {"bias": torch.ones(1, 2, 49, 49)}),
    "bias device": (ValueError, "bias is on meta", {"bias": torch.ones(49, 49, device="meta")}),
    "device": (ValueError, "k is on meta", {"k": IMAGE.to("meta")}),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name):
    error, message, change = WRONG[name]
    with pytest.raises(error, match=message):
        window_attention(**{"q": IMAGE, "k": IMAGE, "v": IMAGE, "window": 7, **change})
