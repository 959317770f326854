"""Local attention against its formula in float64, and against the official Longformer."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from manyheads.core.dispatch import choose, use_backend
from manyheads.core.errors import UsageError
from manyheads.core.layers.local_attention import LongformerAttention
from manyheads.core.ops import attention, local_attention
from manyheads.core.ops.local_attention import reference
from manyheads.core.ops.local_attention.custom_op import local_attention_backward_op, local_attention_op
from manyheads.core.ops.local_attention.pieces import pieces
from manyheads.core.testing import assert_accurate, check_gradients, check_op, nan_filled_empties

SOME = [[0, 5, 40], [44, -1, 7]]
CASES = {
    "one token": {"tokens": 1, "window": 3},
    "one token, global": {"tokens": 1, "window": 3, "places": 1, "own": True},
    "a window of none": {"tokens": 63, "window": 0},
    "a window of none, global": {"tokens": 63, "window": 0, "places": 1},
    "band alone": {"tokens": 197, "window": 20},
    "band, masked": {"tokens": 197, "window": 20, "masked": True},
    "one global token": {"tokens": 100, "window": 16, "places": 1},
    "several, rows given": {"tokens": 197, "window": 16, "places": 3, "own": True},
    "places": {"tokens": 197, "window": 16, "places": SOME},
    "places, rows given, masked": {"tokens": 100, "window": 9, "places": SOME, "own": True, "masked": True},
    "window beyond the ends": {"tokens": 100, "window": 300, "places": 2, "masked": True},
    "many blocks": {"tokens": 400, "window": 40, "places": 1, "batch": 1, "heads": 4},
    "an odd head dim": {"tokens": 63, "window": 5, "places": 1, "dim": 24},
    "every token global": {"tokens": 5, "window": 1, "places": 5},
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BACKENDS = ["cpu", "torch", "reference"]


def forced(backend):
    return use_backend(backend, op="local_attention")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_float64_rule(backend, name, dtype, local_case):
    case = local_case(**CASES[name], dtype=dtype)
    with forced(backend), nan_filled_empties():
        assert_accurate(case.op, case.reference, *case.inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_token_by_token(backend):
    """Every row from the definition, with a mask, and places that are not the first."""
    tokens, window = 70, 6
    q, k, v = (torch.randn(1, tokens, 1, 8, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(1, tokens) > 0.2
    mask[0, [0, 30]] = True
    mask[0, 50] = False
    places = {0, 30}  # 50 is masked, and so not global
    with forced(backend):
        got = local_attention(q, k, v, window, global_tokens=torch.tensor([[30, 50, 0]]), mask=mask)
    for i in range(tokens):
        seen = [
            j for j in range(tokens)
            if mask[0, j] and (i in places or j in places or abs(i - j) <= window)
        ]  # fmt: skip
        weights = torch.softmax(k[0, seen, 0] @ q[0, i, 0] / 8**0.5, 0)
        want = weights @ v[0, seen, 0] if mask[0, i] else torch.zeros(8, dtype=torch.float64)
        torch.testing.assert_close(got[0, i, 0], want, rtol=1e-10, atol=1e-12)


def test_a_window_of_everything_is_dense_attention():
    q, k, v = (torch.randn(2, 50, 2, 8) for _ in range(3))
    torch.testing.assert_close(local_attention(q, k, v, 50), attention(q, k, v))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sequence_of_padding_alone(backend, local_case):
    case = local_case(100, 8, places=1)
    mask = torch.ones(2, 100, dtype=torch.bool)
    mask[1] = False

    def op(q, k, v):
        return local_attention(q, k, v, 8, global_tokens=1, mask=mask)

    with forced(backend), nan_filled_empties():
        out = op(*case.inputs[:3])
        grads = torch.autograd.grad(out.sum(), case.inputs[:3])
    assert out[1].eq(0).all() and out[0].ne(0).all()
    assert all(g.isfinite().all() and g[1].eq(0).all() for g in grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_at_all(backend):
    for shape in ((0, 5, 2, 8), (2, 0, 2, 8)):
        q = torch.randn(shape, requires_grad=True)
        with forced(backend):
            out = local_attention(q, q, q, 3)
        assert out.shape == shape
        assert torch.autograd.grad(out.sum(), q)[0].shape == shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_goes_as_far_as_the_window(backend):
    q, k, v = (torch.randn(1, 200, 1, 8) for _ in range(3))
    q[0, 100] = math.nan
    with forced(backend):
        assert local_attention(q, k, v, 8).isnan().flatten(1).any(1).sum() == 1
        bad = local_attention(q, k, v, 8)[0, :, 0, 0].isnan()
    assert bad.nonzero().flatten().tolist() == [100]


def test_any_strides(local_case):
    case = local_case(150, 20, places=2)
    qkv = torch.stack([x.detach() for x in case.inputs[:3]], 2)  # views of one projection
    views = [x.requires_grad_() for x in qkv.unbind(2)]
    turned = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in views]
    wide = torch.stack([views[2].detach()] * 2, -1)[..., 0].requires_grad_()  # a last stride of 2
    with forced("cpu"):
        for inputs in (views, turned, [views[0], turned[1], wide]):
            assert_accurate(case.op, case.reference, *inputs, None)


@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize(
    ("tokens", "window"), [(1, 0), (31, 64), (100, 0), (400, 64), (1000, 33), (197, 196)]
)
def test_pieces_cover_the_band(tokens, window, first):
    rows, seen = [], torch.zeros(tokens, tokens, dtype=torch.bool)
    for piece in pieces(tokens, window, first):
        assert piece.count == 1 or piece.key >= first
        rows += range(tokens)[piece.rows]
        added = piece.added(None, torch.float32)
        for c in range(piece.count):
            row, key = piece.row + c * piece.size, piece.key + c * piece.size
            seen[row : row + piece.size, key : key + piece.strip] = added[c] == 0
    assert rows == list(range(tokens))
    place = torch.arange(tokens)
    assert torch.equal(seen, (place - place[:, None]).abs() <= window)


def test_gradients_are_the_same_each_time(local_case):
    case = local_case(300, 32, places=2, heads=6)
    with forced("cpu"):
        first, second = (
            torch.autograd.grad(case.op(*case.inputs).square().sum(), case.inputs[:3]) for _ in range(2)
        )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_references_gradients():
    q, k, v = (torch.randn(1, 6, 2, 3) for _ in range(3))
    mask = torch.tensor([[True, True, True, True, False, True]])
    check_gradients(
        lambda q, k, v: reference.local_attention(q, k, v, 1, global_tokens=1, mask=mask), q, k, v
    )
    check_gradients(
        lambda q, k, v, rows: reference.local_attention(q, k, v, 1, global_tokens=2, global_rows=rows),
        q, k, v, torch.randn(1, 2, 2, 3),
    )  # fmt: skip


def test_custom_ops(local_case):
    q, k, v, rows = local_case(40, 3, places=2, own=True).inputs
    index, mask = torch.tensor([[0, 7], [3, -1]]), torch.rand(2, 40) > 0.2
    mask[:, [0, 3, 7]] = True
    check_op(local_attention_op, [q, k, v, index, mask, rows, 3, 0.3, "cpu"])
    check_op(local_attention_op, [q, k, v, None, None, None, 3, 0.3, "cpu"])
    plain = [x.detach() for x in (q, k, v)]
    out, sums = local_attention_op(*plain, index, mask, rows.detach(), 3, 0.3, "cpu")
    args = [torch.randn_like(out), *plain, index, mask, out, sums, 3, 0.3, "cpu"]
    check_op(local_attention_backward_op, args)


def test_compiles_into_one_graph(local_case):
    torch._dynamo.reset()
    case = local_case(40, 3, places=1, masked=True)
    compiled = torch.compile(case.op, backend="aot_eager", fullgraph=True)
    results = []
    for function in (compiled, case.op):
        out = function(*case.inputs)
        results.append((out, *torch.autograd.grad(out.square().sum(), case.inputs[:3])))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*results, strict=True))


Q = torch.randn(2, 9, 3, 8)
WRONG = {
    "dims": (ValueError, r"q must be \[B, N, H, D\]", {"q": Q[0]}),
    "shapes": (ValueError, "one shape and device; v is", {"v": Q[:, :4]}),
    "dtypes": (TypeError, "one floating dtype; k", {"k": Q.half()}),
    "integers": (TypeError, "one floating dtype; q", {"q": Q.long(), "k": Q.long(), "v": Q.long()}),
    "window": (ValueError, "window must be at least 0, not -1", {"window": -1}),
    "mask dtype": (TypeError, "mask must be boolean", {"mask": torch.ones(2, 9)}),
    "mask shape": (ValueError, r"mask must be \[B, N\] = \[2, 9\]", {"mask": torch.ones(9).bool()}),
    "count": (ValueError, r"global_tokens must be in 0..N = 9, not 10", {"global_tokens": 10}),
    "places dtype": (TypeError, "global_tokens must be a count", {"global_tokens": torch.ones(2, 1).bool()}),
    "places shape": (ValueError, "with B = 2", {"global_tokens": torch.zeros(1, 1).long()}),
    "places twice": (ValueError, "different places", {"global_tokens": torch.tensor([[1, 1], [0, -1]])}),
    "places beyond": (ValueError, "below 9", {"global_tokens": torch.tensor([[9], [0]])}),
    "dropout": (ValueError, r"dropout_p must be in 0 <= p < 1, not 1\.0", {"dropout_p": 1.0}),
    "rows dtype": (TypeError, "global_rows is", {"global_tokens": 1, "global_rows": Q[:, :1].half()}),
    "rows shape": (ValueError, r"\[2, 1, 3, 8\]", {"global_tokens": 1, "global_rows": Q}),
    "rows for nobody": (ValueError, r"global_rows must be \[2, 0, 3, 8\]", {"global_rows": Q[:, :1]}),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name):
    error, message, change = WRONG[name]
    with pytest.raises(error, match=f"local_attention: .*{message}"):
        local_attention(**{"q": Q, "k": Q, "v": Q, "window": 2, **change})


def test_dispatch():
    with (
        use_backend("triton"),
        pytest.raises(UsageError, match=r"needs a CUDA device|triton is not installed"),
    ):
        local_attention(Q, Q, Q, 2)
    assert choose("local_attention", device="cpu", dtype=torch.float32).backend == "cpu"
    assert choose("local_attention", device="cuda", dtype=torch.float64).backend == "torch"
    assert choose("local_attention", device="cpu", dtype=torch.float32, dropout=True).backend == "torch"
    with forced("cpu"), pytest.raises(UsageError, match="it has no dropout"):
        local_attention(Q, Q, Q, 2, dropout_p=0.1)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("window", [5, 90])
def test_dropout_drops_weights_and_scales_the_others(window, backend):
    """With one-hot values the result are the weights."""
    tokens, p = 70, 0.3
    q, k = (torch.randn(3, tokens, 2, 8, dtype=torch.float64) for _ in range(2))
    v = torch.eye(tokens, dtype=torch.float64)[None, :, None].expand(3, -1, 2, -1)
    q, k = (F.pad(x, (0, tokens - 8)) for x in (q, k))
    mask = torch.rand(3, tokens) > 0.1
    options = {"global_tokens": torch.tensor([[0, 30], [8, -1], [69, 2]]), "mask": mask}

    def weights(dropout_p, seed=0):
        torch.manual_seed(seed)
        with forced(backend):
            return local_attention(q, k, v, window, dropout_p=dropout_p, **options)

    plain, dropped = weights(0.0), weights(p)
    seen = plain > 0
    kept = dropped != 0
    assert not kept[~seen].any()
    torch.testing.assert_close(dropped[kept], plain[kept] / (1 - p), rtol=1e-12, atol=0)
    count = int(seen.sum())
    assert abs(int(kept.sum()) - (1 - p) * count) < 5 * (p * (1 - p) * count) ** 0.5
    assert torch.equal(dropped, weights(p)) and not torch.equal(dropped, weights(p, seed=1))


def test_dropouts_gradients():
    q, k, v = (torch.randn(1, 40, 2, 3) for _ in range(3))
    mask = torch.arange(40)[None] != 7

    def op(q, k, v):
        torch.manual_seed(3)
        return local_attention(q, k, v, 2, global_tokens=2, mask=mask, dropout_p=0.4)

    check_gradients(op, q, k, v)


@pytest.mark.parametrize("few", [True, False])
def test_the_layer_drops_weights_in_training_alone(few):
    plain, layer = LongformerAttention(32, 4, 6), LongformerAttention(32, 4, 6, dropout=0.4)
    layer.load_state_dict(plain.state_dict())
    layer.most_folded = 8 if few else 0
    x, mask = torch.randn(2, 50, 32), torch.rand(2, 50) > 0.1
    torch.testing.assert_close(layer.eval()(x, 1, mask), plain(x, 1, mask), atol=1e-6, rtol=1e-5)
    torch.manual_seed(5)
    with use_backend("reference"):  # draws in one order, whichever way the global row goes
        found = layer.train()(x, 1, mask)
        layer.most_folded = 0 if few else 8
        torch.manual_seed(5)
        other = layer(x, 1, mask)
    assert not torch.allclose(found, plain(x, 1, mask), atol=1e-2)
    torch.testing.assert_close(found, other, atol=1e-5, rtol=1e-4)


# The official model, of which only the attention is ours.


class Tiny(nn.Module):
    """Longformer with the official parameter names."""

    def __init__(self, config):
        super().__init__()
        dim, wide = config["hidden_size"], config["intermediate_size"]
        self.pad = config["pad_token_id"]

        def norm():
            return nn.LayerNorm(dim, config["layer_norm_eps"])

        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(config["vocab_size"], dim, self.pad),
                "position_embeddings": nn.Embedding(config["max_position_embeddings"], dim, self.pad),
                "token_type_embeddings": nn.Embedding(config["type_vocab_size"], dim),
                "LayerNorm": norm(),
            }
        )
        layers = []
        for window in config["attention_window"]:
            own = LongformerAttention(dim, config["num_attention_heads"], window // 2)
            after = nn.ModuleDict({"dense": nn.Linear(dim, dim), "LayerNorm": norm()})
            layers.append(
                nn.ModuleDict(
                    {
                        "attention": nn.ModuleDict({"self": own, "output": after}),
                        "intermediate": nn.ModuleDict({"dense": nn.Linear(dim, wide)}),
                        "output": nn.ModuleDict({"dense": nn.Linear(wide, dim), "LayerNorm": norm()}),
                    }
                )
            )
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})
        self.pooler = nn.ModuleDict({"dense": nn.Linear(dim, dim)})

    def forward(self, ids, mask, places):
        table = self.embeddings
        real = (ids != self.pad).long()
        x = table["word_embeddings"](ids) + table["position_embeddings"](real.cumsum(1) * real + self.pad)
        x = table["LayerNorm"](x + table["token_type_embeddings"](torch.zeros_like(ids)))
        found = {"embeddings": x * mask[..., None]}  # recorded with zeros at pads, one with zeros elsewhere
        for number, layer in enumerate(self.encoder["layer"], 1):
            after = layer["attention"]["output"]
            x = after["LayerNorm"](x + after["dense"](layer["attention"]["self"](x, places, mask)))
            wide = F.gelu(layer["intermediate"]["dense"](x))
            x = layer["output"]["LayerNorm"](x + layer["output"]["dense"](wide))
            found[f"layer{number}"] = x * mask[..., None]
        found["last_hidden_state"] = x * mask[..., None]
        found["pads_last_hidden_state"] = x * ~mask[..., None]
        found["pooler_output"] = torch.tanh(self.pooler["dense"](x[:, 0]))
        return found


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize(
    ("backend", "dtype"), [("cpu", torch.float32), ("cpu", torch.float64), ("reference", torch.float64)]
)
@pytest.mark.parametrize("name", ["longformer_local_a", "longformer_global0_a", "longformer_manyglobal_a"])
def test_official_longformer(name, backend, dtype, few, golden):
    """Tolerances are the json's: float64 1e-6, float32 1e-4 and for gradients 2e-3 (1 + |g|)."""
    case = golden("recsys", name)
    model = Tiny(case.config)
    model.load_state_dict(case.group("param"))
    for layer in model.encoder["layer"]:
        layer["attention"]["self"].most_folded = 8 if few else 0  # else as for many global tokens
    model.to(dtype)
    inputs = case.group("input")
    places = [row.nonzero().flatten().tolist() for row in inputs["global_attention_mask"]]
    most = max(map(len, places))
    index = torch.tensor([[*row, *[-1] * (most - len(row))] for row in places]).view(len(places), most)
    where = 1 if name == "longformer_global0_a" else (index if most else 0)
    with use_backend(backend):
        found = model(inputs["input_ids"], inputs["attention_mask"].bool(), where)
    relative, absolute = (1e-6, 1e-6) if dtype == torch.float64 else (1e-4, 1e-5)
    for key, want in case.group("output").items():
        got = found[key]
        torch.testing.assert_close(got, want.to(dtype), rtol=relative, atol=absolute)
    sum((found[key] * x).sum() for key, x in case.group("cotangent").items()).backward()
    grads = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == case.group("grad").keys()
    factor = 1e-6 if dtype == torch.float64 else 2e-3
    for key, want in case.group("grad").items():
        assert ((grads[key] - want).abs() <= factor * (1 + want.abs())).all(), key


def test_layer_errors():
    with pytest.raises(ValueError, match="num_heads 5 must divide dim 32"):
        LongformerAttention(32, 5, 4)
