"""Attention's contract: errors, custom ops, torch.compile, recorded official results."""

from __future__ import annotations

import math

import pytest
import torch

from manyheads.core.dispatch import use_backend
from manyheads.core.errors import UsageError
from manyheads.core.ops.attention import attention, reference
from manyheads.core.ops.attention.custom_op import attention_backward_op, attention_op
from manyheads.core.testing import assert_within, check_op

QUERY = torch.randn(2, 5, 4, 8)
KEY = torch.randn(2, 7, 2, 8)
WRONG = {
    "three dims": (ValueError, r"q must be \[B, N, H, D\]", {"q": QUERY[0]}),
    "dtypes": (TypeError, "one floating dtype; k", {"k": KEY.half()}),
    "integers": (TypeError, "floating", {"q": QUERY.long(), "k": KEY.long(), "v": KEY.long()}),
    "value shape": (ValueError, "k and v must have one shape", {"v": KEY[..., :4]}),
    "batch": (ValueError, "agree in B and D", {"q": QUERY[:1]}),
    "head dim": (ValueError, "agree in B and D", {"q": QUERY[..., :4]}),
    "groups": (ValueError, "2 key heads must divide the 3", {"q": QUERY[:, :, :3]}),
    "kind": (ValueError, "'softmax' or 'sigmoid', not 'relu'", {"kind": "relu"}),
    "dropout": (ValueError, r"dropout_p must be in \[0, 1\), not 1.0", {"dropout_p": 1.0}),
    "mask dtype": (TypeError, "mask must be boolean", {"mask": torch.ones(5, 7)}),
    "bias dtype": (TypeError, "bias must be floating", {"bias": torch.ones(5, 7, dtype=torch.bool)}),
    "bias shape": (ValueError, r"bias \[7, 5\] does not broadcast", {"bias": torch.ones(7, 5)}),
    "mask dims": (ValueError, "mask .* does not broadcast", {"mask": torch.ones(1, 1, 1, 5, 7).bool()}),
    "scale shape": (ValueError, "post_scale .* does not broadcast", {"post_scale": torch.ones(3, 5, 7)}),
    "device": (ValueError, "bias is on meta, q is on cpu", {"bias": torch.ones(5, 7, device="meta")}),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name):
    error, message, change = WRONG[name]
    with pytest.raises(error, match=message):
        attention(**{"q": QUERY, "k": KEY, "v": KEY, **change})


@pytest.mark.parametrize(
    ("backend", "change", "message"),
    [
        ("torch", {"kind": "sigmoid"}, "has no sigmoid kind"),
        ("torch", {"post_scale": torch.ones(5, 7)}, "has no post_scale"),
        ("cpu", {"dropout_p": 0.5}, "it has no dropout"),
        ("triton", {}, "it needs a CUDA device|triton is not installed"),
    ],
)
def test_a_forced_backend_that_cannot_run(backend, change, message):
    with use_backend(backend), pytest.raises(UsageError, match=message):
        attention(QUERY, KEY, KEY, **change)


def arguments(**changes):
    """The custom op's arguments: q, k, v, bias, mask, post_scale, seed, then the options."""
    given = {
        "bias": None,
        "mask": None,
        "post_scale": None,
        "seed": None,
        "causal": False,
        "scale": 0.3,
        "sigmoid": False,
    }
    given |= {"dropout_p": 0.0, "backend": "cpu", "keep": False} | changes
    tensors = [QUERY.clone().requires_grad_(), *(KEY.clone().requires_grad_() for _ in range(2))]
    return [*tensors, *given.values()]


@pytest.mark.parametrize(
    "changes",
    [
        {"bias": torch.randn(4, 5, 7, requires_grad=True)},
        {"mask": torch.rand(2, 1, 1, 7) > 0.3, "causal": True},
        {"sigmoid": True, "bias": torch.randn(2, 1, 5, 1, requires_grad=True), "post_scale": torch.randn(7)},
        {"bias": torch.randn(4, 5, 7, requires_grad=True), "keep": True},
    ],
    ids=["bias", "mask", "sigmoid", "kept"],
)
def test_custom_ops(changes):
    args = arguments(**changes)
    check_op(attention_op, args)
    plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
    out, lse, kept = attention_op(*plain)
    backward = [torch.randn_like(out), *plain[:7], out, lse, kept, *plain[7:-1]]
    check_op(attention_backward_op, [*backward, changes.get("bias") is not None, "post_scale" in changes])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_into_one_graph(backend):
    torch._dynamo.reset()
    bias = torch.randn(4, 5, 7, requires_grad=True)
    post = torch.randn(5, 7)

    def step(q, k, v):
        return attention(q, k, v, bias=bias, post_scale=post, causal=True) + attention(q, k, v)

    compiled = torch.compile(step, backend=backend, fullgraph=True)
    inputs = [x.clone().requires_grad_() for x in (QUERY, KEY, KEY)]
    results = []
    for function in (compiled, step):
        out = function(*inputs)
        results.append((out, *torch.autograd.grad(out.square().sum(), [*inputs, bias])))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*results, strict=True))


def test_exports():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = torch.nn.Parameter(torch.randn(4, 5, 7))

        def forward(self, q, k):
            return attention(q, k, k, bias=self.bias, kind="sigmoid")

    block = Block()
    program = torch.export.export(block, (QUERY, KEY))
    assert torch.allclose(program.module()(QUERY, KEY), block(QUERY, KEY))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", ["sigmoid_attention_a1", "sigmoid_attention_a2"])
def test_official_sigmoid_attention(name, backend, golden):
    """apple/ml-sigmoid-attention; its bias is a scalar of its own, ours is -log Nk plus any bias."""
    case = golden("core", name)
    inputs = case.inputs()
    nk = inputs["k"].shape[1]
    mask, causal = None, case.config["causal"]
    if "key_padding_mask" in inputs:
        # Official: the causal diagonal ends at the last real key of each sequence, not at the last key.
        real = inputs["key_padding_mask"]
        rows, columns = torch.arange(inputs["q"].shape[1])[:, None], torch.arange(nk)
        seen = columns <= rows + real.sum(1)[:, None, None] - len(rows)
        mask, causal = (real[:, None] & seen)[:, None], False
    with use_backend(backend):
        out = attention(
            inputs["q"], inputs["k"], inputs["v"],
            kind="sigmoid", causal=causal, mask=mask, bias=inputs["sigmoid_bias"] + math.log(nk),
        )  # fmt: skip
    grads = torch.autograd.grad(
        (out * case.tensors["cotangent.o"]).sum(), [inputs[k] for k in case.group("grad_input")]
    )
    assert_within(out, case.tensors["output.o"], 2e-5)
    for key, grad in zip(case.group("grad_input"), grads, strict=True):
        assert_within(grad, case.tensors[f"grad_input.{key}"], 1e-4)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_official_urpe_attention(backend, golden):
    """lsj2408/URPE: the factor is `post_scale`; values that are the identity give the weights before it."""
    case = golden("graph", "urpe_attention_a")
    inputs, p = case.inputs(), {k: v.requires_grad_() for k, v in case.group("param").items()}
    x = inputs["query"].transpose(0, 1)  # [B, T, C]
    batch, tokens, heads = x.shape[0], x.shape[1], case.config["num_heads"]
    q, k, v = ((x @ p[f"{n}_proj.weight"].T + p[f"{n}_proj.bias"]).unflatten(-1, (heads, -1)) for n in "qkv")
    bias = inputs["rel_pos_bias"].view(batch, heads, tokens, tokens)
    post = inputs["ur_rel_pos_bias"].view(batch, heads, tokens, tokens)
    mask = ~case.tensors["input.key_padding_mask"][:, None, None]
    with use_backend(backend):
        out = attention(q, k, v, bias=bias, mask=mask, post_scale=post)
        wide = [torch.nn.functional.pad(t, (0, tokens - t.shape[-1])) for t in (q, k)]
        eye = torch.eye(tokens).expand(batch, heads, tokens, tokens).transpose(1, 2)
        weights = attention(*wide, eye, bias=bias, mask=mask, scale=q.shape[-1] ** -0.5)
    out = (out.flatten(2) @ p["out_proj.weight"].T + p["out_proj.bias"]).transpose(0, 1)  # [T, B, C]
    outputs = {"out": out, "softmax_weights": weights.permute(2, 0, 1, 3)}  # [H, B, Tq, Tk]
    for key, value in outputs.items():
        torch.testing.assert_close(value, case.tensors[f"output.{key}"], rtol=1e-4, atol=1e-5)
    total = sum((value * case.tensors[f"cotangent.{key}"]).sum() for key, value in outputs.items())
    leaves = {f"grad_input.{k}": inputs[k] for k in case.group("grad_input")}
    leaves |= {f"grad.{k}": p[k] for k in case.group("grad")}
    for key, grad in zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True):
        want = case.tensors[key]
        assert ((grad - want).abs() <= 2e-3 * (1 + want.abs())).all(), key


def test_the_reference_is_torchs_attention():
    """An independent check of the formula that all else is compared with."""
    q, k, v = (torch.randn(2, 9, 3, 4, dtype=torch.float64) for _ in range(3))
    bias = torch.randn(3, 9, 9, dtype=torch.float64)
    by_head = [x.transpose(1, 2) for x in (q, k, v)]
    want = torch.nn.functional.scaled_dot_product_attention(*by_head, attn_mask=bias).transpose(1, 2)
    assert torch.allclose(reference.attention(q, k, v, bias=bias), want, atol=1e-12)
