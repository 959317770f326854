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
    prob_sparse_attention,
    reference,
)
from manyheads.core.testing import assert_accurate, check_gradients, check_op, nan_filled_empties

BACKENDS = ["cpu", "torch"]


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
    if name == "onehead" and backend == "cpu":
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
def test_strips(monkeypatch, causal):
    """Samples whose products are too many to keep give the same."""
    given = inputs(2, 40, 40)
    options = {"causal": causal, "index_sample": draw_keys(40, 40, 2)}
    wanted = prob_sparse_attention(*given, 2, **options)
    monkeypatch.setattr(cpu, "_PRODUCTS", 700)
    torch.testing.assert_close(prob_sparse_attention(*given, 2, **options), wanted)
    assert_accurate(*pair(2, **options), *given)
    assert_accurate(*pair(2, causal=causal, sample=False), *given)


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
    same = (y == v.mean(1, keepdim=True)).all(-1).sum(1)  # [B, H]
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


def test_nan_and_strides():
    q, k, v = (x.detach() for x in inputs(2, 20, 20))
    index = draw_keys(20, 20, 2)
    wanted = prob_sparse_attention(q, k, v, 2, index_sample=index)
    turned = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    torch.testing.assert_close(prob_sparse_attention(*turned, 2, index_sample=index), wanted)
    q[0, 3] = math.nan
    assert prob_sparse_attention(q, k, v, 2, index_sample=index)[0, 3].isnan().all()
    v[1, 3] = math.nan
    assert prob_sparse_attention(q, k, v, 2, index_sample=index)[1].isnan().all()


def test_gradcheck_of_the_reference():
    index = draw_keys(7, 7, 1)
    for causal in (False, True):
        check_gradients(pair(1, causal=causal, index_sample=index)[1], *inputs(2, 7, 7, heads=2, dim=3))


@pytest.mark.parametrize("causal", [False, True])
def test_compiles_without_a_graph_break(causal):
    q, k, v = inputs(2, 20, 20)
    op = pair(2, causal=causal, index_sample=draw_keys(20, 20, 2))[0]
    compiled = torch.compile(op, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), op(q, k, v))
    found = torch.autograd.grad(compiled(q, k, v).square().sum(), (q, k, v))
    wanted = torch.autograd.grad(op(q, k, v).square().sum(), (q, k, v))
    torch.testing.assert_close(found, wanted)


def test_opcheck():
    q, k, v = inputs(2, 9, 9)
    index = draw_keys(9, 9, 1)
    for causal in (False, True):
        check_op(custom_op.prob_sparse_attention_op, (q, k, v, index, 0.5, causal, 3))
        _, chosen, weights = custom_op.prob_sparse_attention_op(q, k, v, None, 0.5, causal, 3)
        plain = [x.detach() for x in (q, q, k, v, chosen, weights)]
        check_op(custom_op.prob_sparse_attention_backward, (*plain, 0.5, causal))


def test_dispatch():
    def chosen(**call):
        return choose("prob_sparse_attention", **({"device": "cpu", "dtype": torch.float32} | call)).backend

    assert [chosen(), chosen(dtype=torch.bfloat16)] == ["cpu", "cpu"]
    assert [chosen(dtype=torch.float64), chosen(device="cuda"), chosen(union=True)] == ["torch"] * 3


def test_refusals():
    q, k, v = inputs(2, 6, 5)
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
