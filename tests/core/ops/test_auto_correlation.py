"""Auto-correlation against float64, against the official code's recorded tensors, and its two forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from manyheads.core.dispatch import choose, use_backend
from manyheads.core.errors import UsageError
from manyheads.core.ops.auto_correlation import auto_correlation, dense, reference
from manyheads.core.testing import assert_accurate, check_gradients, nan_filled_empties

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GAIN = 0.35  # sums of products are not scaled: larger values leave one lag with all the weight


def inputs(batch: int, length: int, keys: int, heads: int = 2, dim: int = 8, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, n, heads, dim) for n in (length, keys, keys)]
    return [(torch.randn(*shape, generator=generator) * GAIN).requires_grad_() for shape in shapes]


def pair(factor: float, **options):
    return (
        lambda q, k, v: auto_correlation(q, k, v, factor, **options),
        lambda q, k, v: reference.auto_correlation(q, k, v, factor, **options),
    )


CASES = [
    f"{dialect}autocorrelation_a_{case}"
    for dialect, names in (
        ("", ("self", "pad", "trunc")),
        ("tsl_", ("self_odd", "pad_odd")),
    )
    for name in names
    for case in (f"{name}_train", f"{name}_eval")
]


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("form", ["products", "transforms"])
@pytest.mark.parametrize("case", [*CASES, "autocorrelation_a_full"])
def test_golden(golden, monkeypatch, case, form, backend):
    mode = "channel" if case.endswith("full") else "batch" if case.endswith("train") else "sample"
    if mode == "channel" and backend == "torch":
        backend = "reference"
    monkeypatch.setattr(dense, "PRODUCTS_UP_TO", 768 if form == "products" else 0)
    recorded = golden("timeseries", case)
    given = recorded.inputs()
    q, k, v = (given[name] for name in ("queries", "keys", "values"))
    even = case.startswith("tsl_")
    with use_backend(backend):
        y = auto_correlation(q, k, v, recorded.config["factor"], mode=mode, even_lags=even)
    wanted = recorded.tensors["output.y"]
    assert (y - wanted).abs().max() <= recorded.tolerance["output"]
    (y * recorded.tensors["cotangent.y"]).sum().backward()
    recorded.check("grad_input", {name: x.grad for name, x in given.items()})


@pytest.mark.parametrize("mode", ["batch", "sample"])
@pytest.mark.parametrize("form", ["products", "transforms"])
@pytest.mark.parametrize(("length", "keys"), [(1, 1), (2, 2), (63, 63), (100, 197), (197, 100), (63, 1)])
def test_float64_rule(monkeypatch, length, keys, form, mode):
    monkeypatch.setattr(dense, "PRODUCTS_UP_TO", 768 if form == "products" else 0)
    with nan_filled_empties():
        for even in (False, True):
            assert_accurate(*pair(2.0, mode=mode, even_lags=even), *inputs(3, length, keys))


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("mode", ["batch", "sample", "channel"])
def test_float64_rule_in_half_precision(mode, dtype):
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in inputs(3, 63, 63))
    assert_accurate(*pair(2.0, mode=mode), q, k, v)
    assert auto_correlation(q, k, v, 2.0, mode=mode).dtype == dtype


def test_by_hand():
    """A series that repeats every 4 steps; its values at the shifts 0, 4 and 8 are the series again."""
    t = torch.arange(12)
    series = (t % 4 == 0).float()[None, :, None, None]
    values = torch.randn(1, 12, 1, 1)
    y = auto_correlation(series, series, values, 3 / math.log(12) + 0.01)
    shifts = [values.roll(-lag, 1) for lag in (0, 4, 8)]
    torch.testing.assert_close(y, sum(shifts) / 3)


def test_lags_of_the_batch_and_of_a_sample():
    """In "sample" mode a batch's rows are those of its samples one by one; in "batch" mode they are not."""
    q, k, v = (x.detach() for x in inputs(4, 63, 63))
    alone = torch.cat([auto_correlation(*(x[i : i + 1] for x in (q, k, v)), 1.0) for i in range(4)])
    torch.testing.assert_close(auto_correlation(q, k, v, 1.0, mode="sample"), alone)
    assert (auto_correlation(q, k, v, 1.0) - alone).abs().max() > 0.01


def test_more_lags_than_positions_and_none():
    q, k, v = (x.detach() for x in inputs(2, 5, 5))
    torch.testing.assert_close(auto_correlation(q, k, v, 100.0), reference.auto_correlation(q, k, v, 100.0))
    assert auto_correlation(q, k, v, 0.5).eq(0).all()


@pytest.mark.parametrize("mode", ["batch", "sample"])
def test_nan_and_strides(mode):
    q, k, v = (x.detach() for x in inputs(2, 20, 20))
    wanted = auto_correlation(q, k, v, 2.0, mode=mode)
    turned = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    torch.testing.assert_close(auto_correlation(*turned, 2.0, mode=mode), wanted)
    v = v.clone()
    v[1, 3] = math.nan
    assert auto_correlation(q, k, v, 2.0, mode=mode)[1].isnan().any()
    q[0, 0, 0, 0] = math.nan
    assert auto_correlation(q, k, v, 2.0, mode=mode)[0].isnan().all()


@pytest.mark.parametrize("mode", reference.MODES)
def test_gradcheck_of_the_reference(mode):
    for even in (False, True):
        check_gradients(pair(2.0, mode=mode, even_lags=even)[1], *inputs(2, 5, 4, dim=2))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic):
    q, k, v = inputs(2, 20, 20)
    op = pair(2.0)[0]
    compiled = torch.compile(op, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    torch.testing.assert_close(compiled(q, k, v), op(q, k, v))
    found = torch.autograd.grad(compiled(q, k, v).square().sum(), (q, k, v))
    wanted = torch.autograd.grad(op(q, k, v).square().sum(), (q, k, v))
    torch.testing.assert_close(found, wanted)


def test_dispatch():
    usual = {"device": "cpu", "dtype": torch.float32}
    assert choose("auto_correlation", **usual).backend == "torch"
    assert choose("auto_correlation", **usual, channel=True).backend == "reference"
    with use_backend("torch"), pytest.raises(UsageError, match="lags of each channel"):
        choose("auto_correlation", **usual, channel=True)


def test_refusals():
    q, k, v = inputs(2, 5, 5)
    with pytest.raises(ValueError, match="mode must be one of batch, sample, channel"):
        auto_correlation(q, k, v, 1.0, mode="train")
    with pytest.raises(ValueError, match="factor must be positive"):
        auto_correlation(q, k, v, 0.0)
    with pytest.raises(ValueError, match="v must be"):
        auto_correlation(q, k, v[:, :, :1], 1.0)
    with pytest.raises(ValueError, match="k has 5 positions and v has 4"):
        auto_correlation(q, k, v[:, :4], 1.0)
    with pytest.raises(TypeError, match="one floating dtype"):
        auto_correlation(q, k, v.double(), 1.0)
    with pytest.raises(ValueError, match="q must be"):
        auto_correlation(q[0], k, v, 1.0)
