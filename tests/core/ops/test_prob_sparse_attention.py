"""ProbSparse attention against float64, the official code's recorded tensors, and dense attention."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from manyheads.core.dispatch import choose, use_backend
from manyheads.core.ops.attention import attention
from manyheads.core.ops.prob_sparse_attention import (
    cpu,
    custom_op,
    dense,
    draw_keys,
    numba,
    prob_sparse_attention,
    reference,
)
from manyheads.core.testing import assert_accurate, check_gradients, check_op, nan_filled_empties

BACKENDS = ["numba", "cpu", "torch"]


def inputs(batch: int, queries: int, keys: int, heads: int = 3, dim: int = 8, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, n, heads, dim) for n in (queries, keys, keys)]
    return [torch.randn(*shape, generator=generator).requires_grad_() for shape in shapes]


def pair(factor: float, **options):
    return (
        lambda q, k, v: prob_sparse_attention(q, k, v, factor, **options),
        lambda q, k, v: reference.prob_sparse_attention(q, k, v, factor, **options),
    )


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize(
    "case", ["a_unmasked", "a_masked", "a_cross", "tsl_a_cross", "tsl_a_masked", "tsl_a_onehead"]
)
def test_golden(golden, case, backend):
    dialect, _, name = case.rpartition("a_")
    if name == "onehead" and backend in ("numba", "cpu"):
        backend = "torch"  # its samples are independent of each other
    recorded = golden("timeseries", f"{dialect}probattention_a_{name}")
    given = recorded.inputs()
    q, k, v = (given[key] for key in ("queries", "keys", "values"))
    with use_backend(backend):
        y = prob_sparse_attention(
            q,
            k,
            v,
            recorded.config["factor"],
            causal=recorded.config["mask_flag"],
            index_sample=recorded.tensors["input.index_sample.0"].long(),
            union=name == "onehead",
        )
    y = y.transpose(1, 2) if dialect else y
    assert (y - recorded.tensors["output.y"]).abs().max() <= recorded.tolerance["output"]
    (y * recorded.tensors["cotangent.y"]).sum().backward()
    recorded.check(
        "grad_input", {key: x.grad for key, x in given.items() if key in ("queries", "keys", "values")}
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sample", [True, False])
@pytest.mark.parametrize(
    ("queries", "keys", "causal"),
    [
        (1, 1, True),
        (2, 1, False),
        (63, 63, True),
        (63, 63, False),
        (100, 197, False),
        (197, 100, False),
        (197, 197, True),
    ],
)
def test_float64_rule(queries, keys, causal, sample, backend):
    index = draw_keys(queries, keys, 2, generator=torch.Generator().manual_seed(1)) if sample else None
    options = {"causal": causal, "index_sample": index, "sample": sample}
    with use_backend(backend, op="prob_sparse_attention"), nan_filled_empties():
        assert_accurate(*pair(2, **options), *inputs(2, queries, keys))
        assert_accurate(*pair(2, **options, count=1, scale=0.3), *inputs(2, queries, keys))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_rule_in_half_precision(causal, dtype, backend):
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in inputs(2, 63, 63))
    index = draw_keys(63, 63, 2)
    with use_backend(backend, op="prob_sparse_attention"):
        assert_accurate(*pair(2, causal=causal, index_sample=index), q, k, v)
    assert prob_sparse_attention(q, k, v, 2).dtype == dtype


@pytest.mark.parametrize("most", [1, 100, 100_000])
@pytest.mark.parametrize("sample", [True, False])
def test_measure_in_parts(monkeypatch, most, sample):
    """However many products are made at a time, the measure is the gather formula's."""
    monkeypatch.setattr(dense, "_CPU_PRODUCTS", most)
    q, k, _ = (x.detach() for x in inputs(3, 20, 17))
    index = draw_keys(20, 17, 2) if sample else torch.arange(17).expand(20, 17)
    products = torch.einsum("blhd,bluhd->bhlu", q, k[:, index])
    wanted = products.amax(-1) - products.sum(-1) / 17
    torch.testing.assert_close(dense.measure(q, k, index if sample else None), wanted)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", ["numba", "cpu"])
def test_strips(monkeypatch, backend, causal):
    """Samples whose products are too many to keep give the same."""
    given = inputs(2, 40, 40)
    options = {"causal": causal, "index_sample": draw_keys(40, 40, 2)}
    with use_backend(backend, op="prob_sparse_attention"):
        wanted = prob_sparse_attention(*given, 2, **options)
        monkeypatch.setattr(numba if backend == "numba" else cpu, "_PRODUCTS", 700)
        monkeypatch.setattr(numba, "_BLOCK", 700)
        torch.testing.assert_close(prob_sparse_attention(*given, 2, **options), wanted)
        assert_accurate(*pair(2, **options), *given)
        assert_accurate(*pair(2, causal=causal, sample=False), *given)


@pytest.mark.parametrize("block", [1, 5_000, 9_000, 1 << 19])
@pytest.mark.parametrize("causal", [False, True])
def test_blocks(monkeypatch, causal, block):
    """One head, two of three, two samples or all samples at a time give the same, gradients too."""
    given = inputs(5, 40, 40)
    op = pair(2, causal=causal, index_sample=draw_keys(40, 40, 2))[0]
    with use_backend("cpu", op="prob_sparse_attention"):
        wanted = torch.autograd.grad(op(*given).square().sum(), given)
    monkeypatch.setattr(numba, "_BLOCK", block)
    torch.testing.assert_close(torch.autograd.grad(op(*given).square().sum(), given), wanted)


@pytest.mark.parametrize("count", [0, 1, 15, 25, 49, 50])
@pytest.mark.parametrize("sample", [True, False])
def test_the_choice(sample, count):
    """The compiled choice is that of torch's topk, ties and NaN among the measures too."""
    index = draw_keys(50, 40, 2) if sample else None
    # Sums of whole numbers are exact, and many measures are equal.
    q, k, v = (torch.randint(-2, 3, (4, n, 3, 4)).float() for n in (50, 40, 40))
    q[1] = torch.randn(50, 3, 4)
    q[2, ::9] = math.nan
    q[3] = 0
    (y, chosen, _), (wanted, rows, _) = (
        custom_op.forward(q, k, v, index, 0.5, False, count, backend) for backend in ("numba", "cpu")
    )
    assert torch.equal(chosen.sort().values, rows.sort().values)
    torch.testing.assert_close(y, wanted, equal_nan=True)


def test_all_queries_is_dense_attention():
    q, k, v = inputs(2, 30, 30)
    for causal in (False, True):
        y = prob_sparse_attention(q, k, v, 5, causal=causal, count=30)
        torch.testing.assert_close(y, attention(q, k, v, causal=causal))


def test_rows_that_do_not_attend():
    q, k, v = (x.detach() for x in inputs(2, 30, 30))
    torch.testing.assert_close(
        prob_sparse_attention(q, k, v, 5, count=0), v.mean(1, keepdim=True).expand_as(v)
    )
    torch.testing.assert_close(prob_sparse_attention(q, k, v, 5, count=0, causal=True), v.cumsum(1))
    y = prob_sparse_attention(q, k, v, 5, count=4)
    same = torch.isclose(y, v.mean(1, keepdim=True), rtol=0, atol=1e-6).all(-1).sum(1)  # [B, H]
    assert same.eq(26).all()


def test_the_draw():
    """The published code's draw; the same seed, the same result; without sampling, the same in each call."""
    torch.manual_seed(3)
    wanted = torch.randint(63, (40, 10))
    torch.manual_seed(3)
    assert torch.equal(draw_keys(40, 63, 2), wanted)
    q, k, v = (x.detach() for x in inputs(2, 96, 96))

    def call(seed):
        return prob_sparse_attention(q, k, v, 1, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(call(0), call(0)) and not torch.equal(call(0), call(1))
    every = [prob_sparse_attention(q, k, v, 1, sample=False) for _ in range(2)]
    assert torch.equal(*every)
    whole = torch.arange(96).expand(96, 96)
    torch.testing.assert_close(every[0], prob_sparse_attention(q, k, v, 1, index_sample=whole))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_strides(backend, causal):
    q, k, v = (x.detach() for x in inputs(2, 20, 20))
    options = {"causal": causal, "index_sample": draw_keys(20, 20, 2)}
    with use_backend(backend, op="prob_sparse_attention"):
        wanted = prob_sparse_attention(q, k, v, 2, **options)
        for turn in (
            lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
            lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
            lambda x: torch.cat((x, x), 3)[..., : x.shape[3]],
        ):
            turned = [turn(x).requires_grad_() for x in (q, k, v)]
            y = prob_sparse_attention(*turned, 2, **options)
            torch.testing.assert_close(y, wanted)
            found = torch.autograd.grad((y * turn(wanted)).sum(), turned)
            assert_accurate(*pair(2, **options), q, k, v)
            plain = [x.clone().requires_grad_() for x in (q, k, v)]
            y = prob_sparse_attention(*plain, 2, **options)
            torch.testing.assert_close(found, torch.autograd.grad((y * wanted).sum(), plain))
        q[0, 3] = math.nan
        assert prob_sparse_attention(q, k, v, 2, **options)[0, 3].isnan().all()
        v[1, 3] = math.nan
        assert prob_sparse_attention(q, k, v, 2, **options)[1, 3:].isnan().all()
        y = prob_sparse_attention(*(x.requires_grad_() for x in (q, k, v)), 2, **options)
        dq, dk, _ = torch.autograd.grad(y.sum(), (q, k, v))
        assert dq[0, 3].isnan().all() and dk[0, :3].isnan().all()


def test_gradcheck_of_the_reference():
    index = draw_keys(7, 7, 1)
    for causal in (False, True):
        check_gradients(pair(1, causal=causal, index_sample=index)[1], *inputs(2, 7, 7, heads=2, dim=3))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", ["numba", "cpu"])
def test_compiles_without_a_graph_break(backend, causal):
    q, k, v = inputs(2, 20, 20)
    op = pair(2, causal=causal, index_sample=draw_keys(20, 20, 2))[0]
    with use_backend(backend, op="prob_sparse_attention"):
        compiled = torch.compile(op, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(q, k, v), op(q, k, v))
        found = torch.autograd.grad(compiled(q, k, v).square().sum(), (q, k, v))
        wanted = torch.autograd.grad(op(q, k, v).square().sum(), (q, k, v))
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("backend", ["numba", "cpu"])
def test_opcheck(backend):
    q, k, v = inputs(2, 9, 9)
    index = draw_keys(9, 9, 1)
    for causal in (False, True):
        check_op(custom_op.prob_sparse_attention_op, (q, k, v, index, 0.5, causal, 3, backend))
        _, chosen, weights = custom_op.prob_sparse_attention_op(q, k, v, None, 0.5, causal, 3, backend)
        plain = [x.detach() for x in (q, q, k, v, chosen, weights)]
        check_op(custom_op.prob_sparse_attention_backward, (*plain, 0.5, causal, backend))


def test_dispatch():
    def chosen(**call):
        return choose("prob_sparse_attention", **({"device": "cpu", "dtype": torch.float32} | call)).backend

    assert [chosen(), chosen(dtype=torch.bfloat16)] == ["numba", "numba"]
    assert [chosen(dtype=torch.float64), chosen(device="cuda"), chosen(union=True)] == ["torch"] * 3


def test_refusals():
    q, k, v = inputs(2, 6, 5)
    for backend in ("numba", "cpu"):
        with (
            use_backend(backend),
            pytest.raises(ValueError, match=r"index_sample must be in 0\.\.4, not 0\.\.5"),
        ):
            prob_sparse_attention(q, k, v, 1, index_sample=torch.arange(6)[:, None])
    with pytest.raises(ValueError, match="causal needs as many queries as keys, not 6 and 5"):
        prob_sparse_attention(q, k, v, 1, causal=True)
    with pytest.raises(ValueError, match="union is of one head, and q has 3"):
        prob_sparse_attention(q, k, v, 1, union=True)
    with pytest.raises(ValueError, match="index_sample must be \\[6, U\\]"):
        prob_sparse_attention(q, k, v, 1, index_sample=draw_keys(5, 5, 1))
    with pytest.raises(TypeError, match="index_sample must be int64"):
        prob_sparse_attention(q, k, v, 1, index_sample=draw_keys(6, 5, 1).int())
    with pytest.raises(ValueError, match=r"count must be in 0\.\.6"):
        prob_sparse_attention(q, k, v, 1, count=7)
    with pytest.raises(ValueError, match="v must have k's shape"):
        prob_sparse_attention(q, k, v[:, :4], 1)
    with pytest.raises(ValueError, match="k must be"):
        prob_sparse_attention(q, k[:1], v, 1)
    with pytest.raises(ValueError, match="factor must be positive"):
        prob_sparse_attention(q, k, v, 0)
    with pytest.raises(TypeError, match="one floating dtype"):
        prob_sparse_attention(q, k.half(), v, 1)
