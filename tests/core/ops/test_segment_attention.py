"""Segment attention against float64, the official Graph Transformer, a loop over edges, and torch's tools."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from manyheads.core.dispatch import choose, use_backend
from manyheads.core.ops import edge_order, segment_attention
from manyheads.core.ops.segment_attention import order as orders
from manyheads.core.ops.segment_attention import reference
from manyheads.core.ops.segment_attention.custom_op import (
    segment_attention_backward_op,
    segment_attention_op,
)
from manyheads.core.testing import assert_accurate, check_gradients, check_op, nan_filled_empties

BACKENDS = ["numba", "cpu"]
GRAPH_TRANSFORMER = {"clamp": 5.0, "eps": 1e-6, "return_edge": True}


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()


def graph(nodes: int, edges: int, *, seed: int = 0) -> Tensor:
    """Random edges in no order, some of them repeated; the last node has no edge into it."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(0, nodes, (edges,), generator=generator)
    return torch.stack([source, torch.randint(0, max(1, nodes - 1), (edges,), generator=generator)])


def inputs(nodes: int, edges: int, heads: int, dim: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [draw(n, heads, dim, dtype=dtype, seed=i) for i, n in enumerate([nodes] * 3 + [edges])]


def bound(function, edge_index, **options):
    return lambda q, k, v, edge=None: function(q, k, v, edge_index, edge=edge, **options)


@pytest.mark.parametrize(
    "options", [{}, {"clamp": 1.0}, {"clamp": 1.0, "eps": 1e-2, "return_edge": True}], ids=str
)
@pytest.mark.parametrize(
    ("nodes", "edges", "heads", "dim"),
    [(1, 1, 1, 1), (63, 197, 2, 5), (100, 63, 3, 8), (197, 1000, 4, 6), (30, 400, 1, 64), (9, 100, 2, 28)],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_rule(backend, nodes, edges, heads, dim, options):
    edge_index = graph(nodes, edges)
    q, k, v, edge = inputs(nodes, edges, heads, dim)
    ours = bound(segment_attention, edge_index, **options)
    plain = bound(reference.segment_attention, edge_index, **options)
    with use_backend(backend), nan_filled_empties():
        assert_accurate(ours, plain, q, k, v, edge)
        assert_accurate(ours, plain, q, k, v)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_rule_in_half_precision(backend, dtype):
    edge_index = graph(63, 197)
    for options in ({}, GRAPH_TRANSFORMER):
        with use_backend(backend), nan_filled_empties():
            assert_accurate(
                bound(segment_attention, edge_index, **options),
                bound(reference.segment_attention, edge_index, **options),
                *inputs(63, 197, 2, 8, dtype),
            )


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("name", ["gt_node_attention_a", "gt_edge_attention_a"])
def test_official_graph_transformer(golden, name, backend):
    """Scores and their sums, which the official layer leaves on the graph, follow from the edge output."""
    case = golden("graph", name)
    given, weights = case.inputs(), {k: v.requires_grad_() for k, v in case.group("param").items()}
    edge_index, heads = given["edge_index"], case.config["num_heads"]

    def project(x: Tensor, key: str) -> Tensor:
        return (x @ weights[f"{key}.weight"].T).unflatten(-1, (heads, -1))

    q, k, v = (project(given["h"], key) for key in "QKV")
    edge = project(given["e"], "proj_e") if "e" in given else None
    with use_backend(backend):
        eps = 0.0 if edge is None else 1e-6
        h, product = segment_attention(q, k, v, edge_index, edge=edge, clamp=5.0, eps=eps, return_edge=True)
    score = product.sum(-1, keepdim=True).clamp(-5, 5).exp()
    z = torch.zeros(h.shape[0], heads, 1).index_add(0, edge_index[1], score)
    found = {"h": h, "score": score, "z": z} | ({} if edge is None else {"e_out": product})
    expected = case.group("output")
    assert set(found) == set(expected)
    for key, want in expected.items():
        torch.testing.assert_close(found[key], want, rtol=1e-4, atol=1e-5)
    sum((found[key] * x).sum() for key, x in case.group("cotangent").items()).backward()
    grads = {f"grad.{key}": x.grad for key, x in weights.items()}
    grads |= {f"grad_input.{key}": x.grad for key, x in given.items() if x.requires_grad}
    assert len(grads) == len(case.group("grad")) + len(case.group("grad_input"))
    for key, got in grads.items():
        want = case.tensors[key]
        assert ((got - want).abs() / (1 + want.abs())).max() < 2e-3, key


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_against_a_loop_over_the_nodes(backend):
    edge_index = graph(20, 60)
    q, k, v, edge = (x.detach() for x in inputs(20, 60, 2, 4))
    with use_backend(backend):
        out, product = segment_attention(q, k, v, edge_index, edge=edge, scale=0.7, return_edge=True)
    want = torch.zeros(20, 2, 4)
    for i in range(20):
        into = (edge_index[1] == i).nonzero()[:, 0]
        logit = (q[i] * k[edge_index[0, into]] * edge[into] * 0.7).sum(-1)
        want[i] = (logit.softmax(0)[..., None] * v[edge_index[0, into]]).sum(0)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(product, q[edge_index[1]] * k[edge_index[0]] * edge * 0.7)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_nodes_and_graphs_without_edges(backend):
    q, k, v, edge = inputs(5, 2, 2, 4)
    edge_index = torch.tensor([[0, 4], [1, 1]])
    with use_backend(backend), nan_filled_empties():
        for options in ({}, {"clamp": 5.0}):
            out = segment_attention(q, k, v, edge_index, edge=edge, **options)
            assert out[[0, 2, 3, 4]].eq(0).all() and out[1].ne(0).all()
            dq, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
            assert dq[[0, 2, 3, 4]].eq(0).all() and dk[1:4].eq(0).all() and dv[1:4].eq(0).all()
            nothing = torch.empty(2, 0, dtype=torch.int64)
            none = edge.detach()[:0].requires_grad_()
            out, product = segment_attention(q, k, v, nothing, edge=none, return_edge=True, **options)
            assert out.eq(0).all() and product.shape == (0, 2, 4)
            assert all(g.eq(0).all() for g in torch.autograd.grad(out.sum(), (q, k, v)))
            empty = [x.detach()[:0] for x in (q, k, v)]
            assert segment_attention(*empty, nothing, **options).shape == (0, 2, 4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits(backend):
    """Without a clamp the largest logit goes first: exponentials do not overflow, gradients stay finite."""
    edge_index = graph(30, 90)
    q, k, v, _ = (x.detach() * 30 for x in inputs(30, 90, 2, 8))
    with use_backend(backend):
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = segment_attention(*leaves, edge_index)
        grads = torch.autograd.grad(out.sum(), leaves)
        truth = reference.segment_attention(*(x.double() for x in leaves), edge_index)
    assert all(g.isfinite().all() for g in grads)
    torch.testing.assert_close(out.double(), truth, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_nan_stays_nan(backend):
    edge_index = torch.tensor([[0, 1, 2, 2], [1, 2, 0, 3]])
    for at in range(3):
        for options in ({}, {"clamp": 5.0}):
            given = [x.detach().clone() for x in inputs(4, 4, 1, 4)[:3]]
            given[at][1, 0, 2] = float("nan")
            with use_backend(backend):
                out = segment_attention(*given, edge_index, **options)
            touched = 1 if at == 0 else 2  # its own query, or the node that its edge goes to
            assert out[touched].isnan().any()
            assert out[[i for i in range(4) if i != touched]].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_order_of_the_edges_does_not_matter(backend):
    edge_index = graph(40, 120)
    q, k, v, edge = inputs(40, 120, 2, 8)
    mixed = torch.randperm(120)
    with use_backend(backend):
        out, product = segment_attention(q, k, v, edge_index, edge=edge, **GRAPH_TRANSFORMER)
        other, others = segment_attention(
            q, k, v, edge_index[:, mixed], edge=edge[mixed], **GRAPH_TRANSFORMER
        )
        given = edge_order(edge_index, 40)
        same = segment_attention(q, k, v, edge_index.int(), edge=edge, order=given, **GRAPH_TRANSFORMER)
    torch.testing.assert_close(other, out)
    torch.testing.assert_close(others, product[mixed])
    assert torch.equal(same[0], out)


@pytest.mark.parametrize("threads", [1, 2])
def test_parts_give_the_same_numbers(threads):
    """Enough work for several threads; a node's edges are summed in one order whatever the parts."""
    edge_index = graph(2000, 3000)
    given = inputs(2000, 3000, 4, 8)

    def run() -> tuple[Tensor, ...]:
        out, product = segment_attention(*given[:3], edge_index, edge=given[3], **GRAPH_TRANSFORMER)
        return torch.autograd.grad((out, product), given, (out.detach(), product.detach()))

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with use_backend("numba"):
            found = run()
        torch.set_num_threads(1)
        with use_backend("numba"):
            single = run()
        with use_backend("cpu"):
            plain = run()
    finally:
        torch.set_num_threads(before)
    for a, b, c in zip(found, single, plain, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c)


def test_only_one_output_used():
    edge_index = graph(20, 50)
    for pick in (0, 1):

        def chosen(f, *x, pick=pick):
            return bound(f, edge_index, **GRAPH_TRANSFORMER)(*x)[pick] + 0 * x[2].sum()

        assert_accurate(
            lambda *x: chosen(segment_attention, *x),
            lambda *x: chosen(reference.segment_attention, *x),
            *inputs(20, 50, 2, 4),
        )


def test_strided_inputs():
    edge_index = graph(20, 50)
    qkv = draw(20, 3, 2, 4).detach()
    q, k, v = (x.requires_grad_() for x in qkv.unbind(1))
    edge = draw(2, 50, 4).detach().transpose(0, 1).requires_grad_()
    for backend in BACKENDS:
        with use_backend(backend):
            assert_accurate(
                bound(segment_attention, edge_index),
                bound(reference.segment_attention, edge_index),
                q,
                k,
                v,
                edge,
            )


def test_gradcheck_of_the_reference():
    edge_index = graph(5, 9)
    for options in ({}, {"clamp": 2.0, "eps": 0.1, "return_edge": True}):
        function = bound(reference.segment_attention, edge_index, **options)
        check_gradients(function, *inputs(5, 9, 2, 3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    edge_index = graph(7, 12)
    q, k, v, edge = inputs(7, 12, 2, 4)
    order = list(edge_order(edge_index, 7))
    check_op(orders._order, (edge_index, 7))
    check_op(segment_attention_op, (q, k, v, edge, edge_index, order, [0.5, 5.0, 1e-6], True, backend))
    check_op(
        segment_attention_op, (q, k, v, None, edge_index, order, [0.5, float("inf"), 0.0], False, backend)
    )
    plain = [x.detach() for x in (q, k, v, edge)]
    options = [0.5, 5.0, 1e-6]
    out, product, logits, norm = segment_attention_op(*plain, edge_index, order, options, True, backend)
    kept = edge_index, order, options, out, logits, norm, backend
    check_op(segment_attention_backward_op, (out, product, *plain, *kept))


def test_compiles_without_a_graph_break():
    edge_index = graph(7, 12)
    given = inputs(7, 12, 2, 4)
    run = bound(segment_attention, edge_index, **GRAPH_TRANSFORMER)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for a, b in zip(compiled(*given), run(*given), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    grads = [torch.autograd.grad(f(*given)[0].square().sum(), given) for f in (compiled, run)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("counted", [True, False])
def test_edge_order(counted, monkeypatch):
    monkeypatch.setattr(orders, "numba_installed", lambda: counted)
    edge_index = torch.tensor([[3, 0, 3, 1, 0], [1, 1, 0, 3, 1]])
    order = edge_order(edge_index, 5)
    assert [x.tolist() for x in order] == [
        [2, 0, 1, 4, 3],
        [0, 1, 4, 4, 5, 5],
        [1, 4, 3, 0, 2],
        [0, 2, 3, 3, 5, 5],
    ]
    assert {x.dtype for x in order} == {torch.int32}


def test_dispatch(monkeypatch):
    def chosen(**other):
        return choose("segment_attention", **({"device": "cpu", "dtype": torch.float32} | other)).backend

    assert chosen() == chosen(dtype=torch.bfloat16) == "numba"
    assert chosen(dtype=torch.float64) == chosen(device="cuda", width="wide") == "reference"
    assert chosen(device="cuda") == "triton"
    monkeypatch.setattr("manyheads.core.dispatch.numba_installed", lambda: False)
    assert chosen() == "cpu"


def test_errors():
    q, k, v, edge = inputs(4, 3, 2, 4)
    edge_index = torch.tensor([[0, 1, 2], [1, 2, 3]])
    for wrong, kind, match in [
        (lambda: segment_attention(q[0], k, v, edge_index), ValueError, "q must be"),
        (lambda: segment_attention(q, k[:3], v, edge_index), ValueError, "k must be"),
        (lambda: segment_attention(q, k, v[..., :2], edge_index), ValueError, "v must be"),
        (lambda: segment_attention(q, k.half(), v, edge_index), TypeError, "k is torch.float16"),
        (lambda: segment_attention(q.long(), k, v, edge_index), TypeError, "floating point"),
        (lambda: segment_attention(q, k, v, edge_index.float()), TypeError, "edge_index must be int64"),
        (lambda: segment_attention(q, k, v, edge_index.T), ValueError, "edge_index must be"),
        (lambda: segment_attention(q, k, v, edge_index, edge=edge[:2]), ValueError, "edge must be"),
        (lambda: segment_attention(q, k, v, edge_index, eps=0.1), ValueError, "give clamp"),
        (lambda: segment_attention(q, k, v, edge_index, clamp=-1.0), ValueError, "clamp must be positive"),
        (lambda: segment_attention(q, k, v, edge_index, clamp=1.0, eps=-1.0), ValueError, "eps must not"),
        (lambda: segment_attention(q, k, v, edge_index + 1), ValueError, "names node 4"),
        (lambda: segment_attention(q, k, v, edge_index - 1), ValueError, "names node -1"),
        (
            lambda: segment_attention(q, k, v, edge_index, order=edge_order(edge_index, 5)),
            ValueError,
            "another graph",
        ),
        (lambda: edge_order(edge_index.float(), 4), TypeError, "edge_index must be int64"),
        (lambda: edge_order(edge_index[0], 4), ValueError, "edge_index must be"),
    ]:
        with pytest.raises(kind, match=match):
            wrong()
