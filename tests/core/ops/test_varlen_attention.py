"""Packed attention against its formula in float64, and against what each sequence gives alone."""

from __future__ import annotations

import math

import pytest
import torch

from manyheads.core import parallel
from manyheads.core.dispatch import choose, use_backend
from manyheads.core.errors import UsageError
from manyheads.core.ops import attention, varlen_attention
from manyheads.core.ops.varlen_attention import reference, sequences
from manyheads.core.ops.varlen_attention.custom_op import varlen_attention_backward_op, varlen_attention_op
from manyheads.core.testing import assert_accurate, check_gradients, check_op, nan_filled_empties

ODD = [1, 63, 0, 100, 197]
CASES = {
    "plain": {"queries": ODD},
    "causal": {"queries": ODD, "causal": True},
    "groups": {"queries": [63, 100], "heads": 4, "key_heads": 2, "far": 5},
    "near bias": {"queries": ODD, "far": 3},
    "bias longer than any sequence": {"queries": [63, 100], "far": 200},
    "causal bias": {"queries": ODD, "far": 20, "causal": True},
    "other lengths of keys": {"queries": [5, 0, 70, 33], "keys": [9, 4, 63, 0]},
    "the same, causal": {"queries": [5, 0, 70, 33], "keys": [9, 4, 63, 0], "causal": True},
    "the same with a bias": {"queries": [5, 0, 70, 33], "keys": [9, 4, 63, 0], "far": 8, "causal": True},
    "one long sequence": {"queries": [3, 300], "far": 8, "causal": True},
    "a scale, an odd head dim": {"queries": [63, 9], "dim": 24, "scale": 0.4},
    "one token each": {"queries": [1, 1, 1]},
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BACKENDS = ["cpu", "reference"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_float64_rule(name, dtype, varlen_case):
    case = varlen_case(**CASES[name], dtype=dtype)
    with use_backend("cpu"), nan_filled_empties():
        assert_accurate(case.op, case.reference, *case.inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_sequences_do_not_see_each_other(backend, causal):
    """Against the dense op on each sequence, with the bias spread out by hand."""
    lengths, far = [7, 1, 30], 4
    q, k, v = (torch.randn(sum(lengths), 3, 8, dtype=torch.float64) for _ in range(3))
    table = torch.randn(3, 2 * far + 1, dtype=torch.float64)
    cu = torch.tensor([0, 7, 8, 38], dtype=torch.int32)
    with use_backend(backend, op="varlen_attention"):
        got = varlen_attention(q, k, v, cu, bias=table, causal=causal)
    for start, n in zip(cu.tolist(), lengths, strict=False):
        bias = torch.empty(3, n, n, dtype=torch.float64)
        for i in range(n):
            for j in range(n):
                bias[:, i, j] = table[:, max(-far, min(far, j - i)) + far]
        part = [x[None, start : start + n] for x in (q, k, v)]
        want = attention(*part, bias=bias, causal=causal)[0]
        torch.testing.assert_close(got[start : start + n], want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_last_query_stands_at_the_last_key(backend):
    """Decoding: the last rows alone, with all keys, give what the whole sequence gives there."""
    q, k, v = (torch.randn(40, 2, 8) for _ in range(3))
    table = torch.randn(2, 9)
    whole = torch.tensor([0, 40], dtype=torch.int32)
    with use_backend(backend):
        want = varlen_attention(q, k, v, whole, bias=table, causal=True)
        last = torch.tensor([0, 3], dtype=torch.int32)
        got = varlen_attention(q[-3:], k, v, last, whole, bias=table, causal=True)
    torch.testing.assert_close(got, want[-3:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_table_can_hide_distances(backend):
    """Ends of -inf make a band; a table of -inf alone hides every key, which gives zeros, not NaN."""
    q, k, v = (torch.randn(50, 2, 8, requires_grad=True) for _ in range(3))
    cu = torch.tensor([0, 20, 50], dtype=torch.int32)
    band = torch.zeros(2, 9)
    band[:, 0] = band[:, -1] = -math.inf
    band[1] = -math.inf
    band.requires_grad_()
    with use_backend(backend):
        out = varlen_attention(q, k, v, cu, bias=band)
    part = [x[None, :20, :1] for x in (q, k, v)]
    near = (torch.arange(20) - torch.arange(20)[:, None]).abs() < 4
    torch.testing.assert_close(out[:20, :1], attention(*part, mask=near)[0])
    assert out[:, 1].eq(0).all()
    grads = torch.autograd.grad(out.square().sum(), [q, k, v, band])
    assert all(g.isfinite().all() for g in grads)
    assert all(g[:, 1].eq(0).all() for g in grads[:3]) and grads[3][1].eq(0).all()
    assert grads[3][0, 0] == 0 and grads[3][0, 1:-1].ne(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_keys(backend, varlen_case):
    """Sequences without keys, and a causal sequence's first queries when it has more queries than keys."""
    case = varlen_case([4, 9, 5], [0, 6, 5], causal=True, far=3)
    with use_backend(backend), nan_filled_empties():
        out = case.op(*case.inputs)
        grads = torch.autograd.grad(out.sum(), case.inputs)
    assert out[:7].eq(0).all() and out[7:].ne(0).all()
    assert grads[0][:7].eq(0).all()
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_nothing_at_all(backend, lengths, varlen_case):
    case = varlen_case(lengths, far=2)
    with use_backend(backend):
        out = case.op(*case.inputs)
        grads = torch.autograd.grad(out.sum(), case.inputs, allow_unused=backend == "reference")
    assert out.shape == (0, 2, 16)
    assert grads[0].shape == (0, 2, 16)
    assert grads[3] is None or grads[3].eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_sequence(backend, varlen_case):
    case = varlen_case([20, 30], far=3)
    q, k, v, bias = (x.detach().clone() for x in case.inputs)
    k[5, 0] = math.nan
    with use_backend(backend):
        out = case.op(q, k, v, bias)
    assert out[:20, 0].isnan().all() and out[20:].isfinite().all() and out[:20, 1].isfinite().all()


def test_the_gradient_of_one_number_for_all_distances_is_zero(varlen_case):
    """The softmax does not change with it: what is left is rounding, which the float64 rule cannot judge."""
    case = varlen_case([30, 50], far=0)
    with use_backend("cpu"):
        (grad,) = torch.autograd.grad(case.op(*case.inputs).square().sum(), case.inputs[3])
    assert grad.abs().max() < 1e-4


def test_any_strides(varlen_case):
    case = varlen_case([63, 20], far=4)
    q, k, v, bias = case.inputs
    qkv = torch.stack([x.detach() for x in (q, k, v)], 1)  # views of one packed projection
    views = [x.requires_grad_() for x in qkv.unbind(1)]
    wide = torch.stack([v.detach(), v.detach()], -1)[..., 0].requires_grad_()  # a last stride of 2
    with use_backend("cpu"):
        assert_accurate(case.op, case.reference, *views, bias)
        assert_accurate(case.op, case.reference, q, views[1], wide, None)


def test_parts(monkeypatch):
    """Short sequences share a part, and one that outweighs the rest is alone, with all threads."""
    monkeypatch.setattr(parallel, "workers", lambda: 2)
    of = [sequences.Sequence(0, n, 0, n) for n in (512, 512, *[16] * 300)]
    found = sequences.parts(of, 8)
    assert [one for part in found for one in part] == of
    assert len(found[0]) == len(found[1]) == 1 and 2 < len(found) < 20
    assert sequences.parts([sequences.Sequence(0, 4096, 0, 4096), *of], 8) == [
        [sequences.Sequence(0, 4096, 0, 4096), *of]
    ]


def test_gradients_are_the_same_each_time(varlen_case):
    case = varlen_case([200, 150, 197, 180, 100], heads=8, dim=32, far=10)
    with use_backend("cpu"):
        first, second = (
            torch.autograd.grad(case.op(*case.inputs).square().sum(), case.inputs) for _ in range(2)
        )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("causal", [False, True])
def test_the_references_gradients(causal):
    q, k, v = (torch.randn(n, 2, 3) for n in (5, 6, 6))
    cu = [torch.tensor(x, dtype=torch.int32) for x in ([0, 2, 5], [0, 3, 6])]
    check_gradients(
        lambda q, k, v, bias: reference.varlen_attention(q, k, v, *cu, bias=bias, causal=causal),
        q, k, v, torch.randn(2, 5),
    )  # fmt: skip


def test_custom_ops(varlen_case):
    case = varlen_case([5, 0, 7], far=2)
    cu = torch.tensor([0, 5, 5, 12], dtype=torch.int32)
    q, k, v, bias = case.inputs
    check_op(varlen_attention_op, [q, k, v, cu, cu, bias, True, 0.3, "cpu"])
    check_op(varlen_attention_op, [q, k, v, cu, cu, None, False, 0.3, "cpu"])
    plain = [x.detach() for x in (q, k, v)]
    out, rows = varlen_attention_op(*plain, cu, cu, bias.detach(), True, 0.3, "cpu")
    inputs = [torch.randn_like(out), *plain, cu, cu, bias.detach(), out, rows, True, 0.3, "cpu"]
    check_op(varlen_attention_backward_op, [*inputs, True])
    check_op(varlen_attention_backward_op, [*inputs, False])


def test_compiles_into_one_graph(varlen_case):
    torch._dynamo.reset()
    case = varlen_case([5, 7], far=2)
    compiled = torch.compile(case.op, backend="aot_eager", fullgraph=True)
    results = []
    for function in (compiled, case.op):
        out = function(*case.inputs)
        results.append((out, *torch.autograd.grad(out.square().sum(), case.inputs)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


Q, K, CU = torch.randn(12, 4, 8), torch.randn(12, 2, 8), torch.tensor([0, 5, 12], dtype=torch.int32)
WRONG = {
    "dims": (ValueError, r"q must be \[T, H, D\]", {"q": Q[None]}),
    "dtypes": (TypeError, "one floating dtype; k", {"k": K.half()}),
    "integers": (TypeError, "one floating dtype; q", {"q": Q.long(), "k": K.long(), "v": K.long()}),
    "value shape": (ValueError, "k and v must have one shape", {"v": K[:3]}),
    "head dim": (ValueError, "agree in D", {"q": Q[..., :4]}),
    "groups": (ValueError, "2 key heads must divide the 3", {"q": Q[:, :3]}),
    "int64": (TypeError, "cu_seqlens_q must be int32", {"cu_seqlens_q": CU.long()}),
    "no offsets": (ValueError, r"cu_seqlens_q must be \[S \+ 1\]", {"cu_seqlens_q": CU[:0]}),
    "counts": (ValueError, "cu_seqlens_q is of 2 sequences, cu_seqlens_k of 1", {"cu_seqlens_k": CU[::2]}),
    "start": (ValueError, "cu_seqlens_q must rise from 0 to 12", {"cu_seqlens_q": CU + 1}),
    "end": (ValueError, "cu_seqlens_k must rise from 0 to 12", {"cu_seqlens_k": CU.clamp(max=11)}),
    "falling": (ValueError, "rise", {"cu_seqlens_q": CU[[0, 2, 1, 2]], "cu_seqlens_k": CU[[0, 0, 0, 2]]}),
    "bias dtype": (TypeError, "bias must be floating", {"bias": torch.ones(4, 3).long()}),
    "bias heads": (ValueError, r"bias must be \[H, 2M \+ 1\] with H = 4", {"bias": torch.ones(2, 3)}),
    "bias width": (ValueError, r"bias must be \[H, 2M \+ 1\]", {"bias": torch.ones(4, 4)}),
    "device": (ValueError, "bias is on meta, q is on cpu", {"bias": torch.ones(4, 3, device="meta")}),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name, backend):
    error, message, change = WRONG[name]
    with use_backend(backend), pytest.raises(error, match=f"varlen_attention: .*{message}"):
        varlen_attention(**{"q": Q, "k": K, "v": K, "cu_seqlens_q": CU, **change})


def test_dispatch():
    with (
        use_backend("triton"),
        pytest.raises(UsageError, match=r"needs a CUDA device|triton is not installed"),
    ):
        varlen_attention(Q, K, K, CU)
    assert choose("varlen_attention", device="cpu", dtype=torch.float32).backend == "cpu"
    assert choose("varlen_attention", device="cuda", dtype=torch.float64).backend == "reference"
    wide = choose("varlen_attention", device="cuda", dtype=torch.float32, head_dim=256)
    assert wide.backend == "reference"
