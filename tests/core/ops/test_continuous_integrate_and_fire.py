"""Integrate-and-fire against float64, the recorded official cases, by hand, and in chunks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.core.dispatch import choose, use_backend
from manyheads.core.ops.continuous_integrate_and_fire import FireState, reference
from manyheads.core.ops.continuous_integrate_and_fire import continuous_integrate_and_fire as fire
from manyheads.core.testing import assert_accurate, check_gradients, nan_filled_empties

TOLERANCE = 1e-5  # relative and absolute, as the recorded cases' notes ask for
BACKENDS = ["torch", "reference"]
PLAIN = ["numba", *BACKENDS]  # without gradients


def inputs(batch: int, frames: int, dim: int = 5, top: float = 0.8, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, frames, dim, generator=generator)
    alpha = torch.rand(batch, frames, generator=generator) * top
    return [hidden.requires_grad_(), alpha.requires_grad_()]


def pair(**options):
    """Both forms; fewer outputs than the op has, as counts carry no gradient."""

    def picked(function):
        def run(hidden, alpha):
            fired = function(hidden, alpha, return_state=True, **options)
            return fired.tokens, fired.fires, fired.state.partial, fired.state.total

        return run

    return picked(fire), picked(reference.continuous_integrate_and_fire)


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found.detach(), wanted, rtol=TOLERANCE, atol=TOLERANCE, check_dtype=False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden(golden, backend):
    case = golden("speech", "paraformer_cif_a")
    given = case.inputs()
    with use_backend(backend):
        fired = fire(given["hidden"], given["alphas"])
    outputs = case.group("output")
    for variant in ("v1", "loop", "bicif"):
        close(fired.tokens, outputs[f"frames_{variant}"])
        close(fired.fires, outputs[f"fires_{variant}"])
    assert torch.equal(fired.fires >= 1, outputs["fire_mask"].bool())
    assert fired.counts.tolist() == [15, 0, 8]
    (fired.tokens * case.tensors["cotangent.frames_v1"]).sum().backward()
    for name, want in case.group("grad_input").items():
        close(given[name].grad, want)


def predict(case, hidden: Tensor, inside: Tensor) -> Tensor:
    """The weights of Paraformer's predictors: a convolution over three frames, a linear layer, a sigmoid."""
    parameters, config = case.group("param"), case.config
    turned = hidden.transpose(1, 2)
    weight = parameters["cif_conv1d.weight"]
    depthwise = weight.shape[1] == 1
    seen = F.conv1d(
        turned, weight, parameters["cif_conv1d.bias"], padding=1, groups=len(weight) if depthwise else 1
    )
    seen = (seen + turned if depthwise else seen).relu().transpose(1, 2)
    alpha = F.linear(seen, parameters["cif_output.weight"], parameters["cif_output.bias"])[..., 0].sigmoid()
    return (alpha * config["smooth_factor"] - config["noise_threshold"]).relu() * inside


def with_tail(case, alpha: Tensor, lengths: Tensor) -> Tensor:
    """Upstream's tail: a weight on what the first frame of padding holds (`tail=` has zeros there)."""
    after = torch.arange(alpha.shape[1] + 1) == lengths[:, None]
    return F.pad(alpha, (0, 1)) + case.config["tail_threshold"] * after


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["train", "infer", "v1_train"])
def test_golden_predictors(golden, name, backend):
    case = golden("speech", f"paraformer_predictor_{name}_a")
    outputs, cotangents = case.group("output"), case.group("cotangent")
    hidden, lengths = case.tensors["input.hidden"].clone().requires_grad_(), case.tensors["input.lengths"]
    alpha = predict(case, hidden, torch.arange(hidden.shape[1]) < lengths[:, None])
    if name == "infer":
        alpha = with_tail(case, alpha, lengths)
        with use_backend(backend):
            fired = fire(F.pad(hidden, (0, 0, 0, 1)), alpha)
        assert fired.counts.tolist() == outputs["token_num"].tolist()
        numbers = torch.zeros(3)
    else:
        wanted = (case.tensors["input.target_label"] >= 0).sum(1)
        numbers = alpha.sum(1)
        close(numbers, outputs["token_num"])
        alpha = alpha * (wanted / numbers)[:, None]
        with use_backend(backend):
            fired = fire(hidden, alpha, lengths=lengths)
        assert fired.counts.tolist() == wanted.tolist()
    close(fired.tokens, outputs["acoustic_embeds"])
    close(alpha, outputs["alphas"])
    close(fired.fires, outputs["cif_peak"])
    loss = (fired.tokens * cotangents["acoustic_embeds"]).sum() + (alpha * cotangents["alphas"]).sum()
    (loss + (numbers * cotangents["token_num"]).sum()).backward()
    close(hidden.grad, case.tensors["grad_input.hidden"])


def test_golden_predictor_with_weights_above_the_threshold(golden):
    """Upstream fires once a frame at most, so that weights above 1 pile up: equal until they first do."""
    case = golden("speech", "paraformer_predictor_v1_infer_a")
    hidden, lengths = case.tensors["input.hidden"], case.tensors["input.lengths"]
    alpha = predict(case, hidden, torch.arange(37) < lengths[:, None])
    assert fire(hidden, alpha, lengths=lengths, tail=0.45).counts.tolist() == [40, 27, 10]
    alpha = with_tail(case, alpha, lengths)
    fired = fire(F.pad(hidden, (0, 0, 0, 1)), alpha)
    assert fired.counts.tolist() == case.tensors["output.token_num"].tolist()
    extended = case.tensors["output.alphas"].double().cumsum(1).floor()
    same = 0
    for b in range(3):
        steps = extended[b].diff(prepend=torch.zeros(1).double())
        clean = int((steps > 1).nonzero()[0]) if (steps > 1).any() else len(steps)
        tokens = int(extended[b, clean - 1]) if clean else 0
        close(fired.tokens[b, :tokens], case.tensors["output.acoustic_embeds"][b, :tokens])
        same += tokens
    assert same > 10


@pytest.mark.parametrize(
    ("frames", "top"), [(1, 0.8), (1, 4.0), (63, 0.8), (100, 0.2), (197, 2.5), (40, 0.0)]
)
@pytest.mark.parametrize("threshold", [1.0, 0.7])
def test_float64_rule(frames, top, threshold):
    with nan_filled_empties():
        assert_accurate(*pair(threshold=threshold), *inputs(3, frames, top=top))
        lengths = torch.tensor([frames, frames // 2, 0])
        assert_accurate(*pair(threshold=threshold, lengths=lengths, tail=0.45), *inputs(3, frames, top=top))


@pytest.mark.parametrize(
    ("frames", "top", "dim"),
    [(1, 4.0, 1), (63, 0.8, 5), (100, 0.2, 5), (197, 2.5, 3), (40, 0.0, 5), (700, 1.0, 300)],
)
@pytest.mark.parametrize("threshold", [1.0, 0.7])
@pytest.mark.parametrize("max_tokens", [None, 0, 7, 400])
def test_compiled_loops(frames, top, dim, threshold, max_tokens):
    """Without gradients: all outputs against float64, also with lengths, a tail and what others left."""
    given = [x.detach() for x in inputs(3, frames, dim, top=top)]
    state = FireState(torch.randn(3, dim), torch.tensor([0.0, 3.3, 0.2], dtype=torch.float64))
    rows = torch.tensor([frames, frames // 2, 0])
    for options in ({}, {"lengths": rows, "tail": 0.45}, {"lengths": rows, "tail": 2.5, "state": state}):
        options |= {"threshold": threshold, "max_tokens": max_tokens}
        with nan_filled_empties(), use_backend("numba"):
            fired = fire(*given, **options, return_state=True)
        with use_backend("reference"):
            wanted = fire(given[0].double(), given[1].double(), **options, return_state=True)
        assert torch.equal(fired.counts, wanted.counts)
        close(fired.tokens, wanted.tokens.float())
        close(fired.fires, wanted.fires.float())
        close(fired.state.partial, wanted.state.partial.float())
        torch.testing.assert_close(fired.state.total, wanted.state.total)


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_a_huge_weight_takes_no_longer(backend):
    hidden, alpha = (x.detach() for x in inputs(1, 3))
    alpha[0, 1] = 1e15
    with use_backend(backend):
        fired = fire(hidden, alpha, max_tokens=2)
    assert fired.counts.item() >= 10**15
    close(fired.tokens[:, 1], hidden[:, 1])


def test_compiled_loops_leave_the_state_alone():
    hidden, alpha = (x.detach() for x in inputs(2, 9))
    state = FireState(torch.ones(2, 5), torch.full((2,), 0.5, dtype=torch.float64))
    fire(hidden, alpha, state=state, return_state=True)
    assert state.partial.eq(1).all() and state.total.eq(0.5).all()


@pytest.mark.parametrize("max_tokens", [0, 1, 7, 100])
def test_a_given_number_of_tokens(max_tokens):
    hidden, alpha = inputs(3, 50)
    assert_accurate(*pair(max_tokens=max_tokens), hidden, alpha)
    whole, cut = (fire(hidden, alpha, max_tokens=n, return_state=True) for n in (None, max_tokens))
    size = min(max_tokens, whole.tokens.shape[1])
    assert cut.tokens.shape == (3, max_tokens, 5) and torch.equal(cut.counts, whole.counts)
    torch.testing.assert_close(cut.tokens[:, :size], whole.tokens[:, :size])
    assert cut.tokens[:, size:].eq(0).all()
    torch.testing.assert_close(cut.state.partial, whole.state.partial)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float64_rule_in_half_precision(dtype):
    hidden, alpha = inputs(3, 63)
    half = hidden.detach().to(dtype).requires_grad_()
    assert_accurate(*pair(), half, alpha)
    assert_accurate(*pair(), half, alpha.detach().to(dtype).requires_grad_())
    assert fire(half, alpha).tokens.dtype == dtype


@pytest.mark.parametrize("backend", PLAIN)
def test_by_hand(backend):
    """A weight of two tokens; a token that ends with a frame; a rest."""
    hidden = torch.tensor([[[1.0], [10.0], [100.0]], [[1.0], [10.0], [100.0]]])
    alpha = torch.tensor([[0.5, 2.25, 0.5], [0.25, 0.75, 0.5]])
    with use_backend(backend):
        fired = fire(hidden, alpha, return_state=True)
    assert fired.tokens[..., 0].tolist() == [[5.5, 10.0, 32.5], [7.75, 0.0, 0.0]]
    assert fired.counts.tolist() == [3, 1]
    assert fired.fires.tolist() == [[0.5, 1.75, 1.25], [0.25, 1.0, 0.5]]
    assert fired.state.partial[:, 0].tolist() == [25.0, 50.0] and fired.state.total.tolist() == [3.25, 1.5]


def test_weights_scaled_to_a_number_of_tokens_fire_that_many():
    """The last token hangs on the rounding of the sum: upstream loses up to half of them."""
    generator = torch.Generator().manual_seed(0)
    wanted = torch.randint(1, 120, (2000,), generator=generator)
    alpha = torch.rand(2000, 300, generator=generator)
    alpha = alpha * (wanted / alpha.sum(1))[:, None]
    fired = fire(torch.ones(2000, 300, 1), alpha)
    assert torch.equal(fired.counts, wanted)
    used = fired.tokens[..., 0].sum(1)
    torch.testing.assert_close(used, wanted.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_fire(backend):
    """Silence alone, and beside a row that fires, also as the batch's last row; gradients are zero."""
    hidden, alpha = inputs(2, 9)
    quiet = alpha.detach() * torch.tensor([[1.0], [0.0]])
    with use_backend(backend):
        fired = fire(hidden, quiet.requires_grad_())
        assert fired.counts[1] == 0 and fired.tokens[1].eq(0).all() and fired.counts[0] > 0
        fired.tokens.square().sum().backward()
        assert hidden.grad[1].eq(0).all() and quiet.grad[1].eq(0).all() and quiet.grad[0].ne(0).any()
        assert fire(hidden, torch.zeros(2, 9)).tokens.shape == (2, 0, 5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_does_not_count(backend):
    """A batch's rows are its recordings one by one, whatever the padding holds."""
    hidden, alpha = (x.detach() for x in inputs(3, 30))
    lengths = [30, 17, 0]
    padded, weights = hidden.clone(), alpha.clone()
    for b, n in enumerate(lengths):
        padded[b, n:], weights[b, n:] = math.nan, math.nan
    padded.requires_grad_(), weights.requires_grad_()
    with use_backend(backend):
        fired = fire(padded, weights, lengths=torch.tensor(lengths), tail=0.45, return_state=True)
        for b, n in enumerate(lengths[:2]):
            alone = fire(hidden[b : b + 1, :n], alpha[b : b + 1, :n], tail=0.45, return_state=True)
            count = int(alone.counts)
            assert fired.counts[b] == count
            torch.testing.assert_close(fired.tokens[b, :count], alone.tokens[0])
            torch.testing.assert_close(fired.state.partial[b], alone.state.partial[0])
    assert fired.counts[2] == 0 and fired.state.partial[2].eq(0).all()
    (fired.tokens.sum() + fired.state.partial.sum()).backward()
    for b, n in enumerate(lengths):
        assert padded.grad[b, n:].eq(0).all() and weights.grad[b, n:].eq(0).all()
    assert padded.grad.isfinite().all() and weights.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [(1,), (7, 13, 1, 30)])
def test_chunks_are_one_pass(sizes, backend):
    """1,000 frames in chunks: the same tokens, gradients included."""
    frames = 1000 if backend == "torch" else 100
    hidden, alpha = inputs(2, frames)
    with use_backend(backend):
        whole = fire(hidden, alpha, tail=0.45, return_state=True)
        state, tokens, begin, turn = None, ([], []), 0, 0
        while begin < frames:
            end = min(frames, begin + sizes[turn % len(sizes)])
            tail = 0.45 if end == frames else None
            part = fire(hidden[:, begin:end], alpha[:, begin:end], tail=tail, state=state, return_state=True)
            for b in range(2):
                tokens[b].append(part.tokens[b, : part.counts[b]])
            state, begin, turn = part.state, end, turn + 1
    for b in range(2):
        found = torch.cat(tokens[b])
        assert len(found) == whole.counts[b]
        torch.testing.assert_close(found, whole.tokens[b, : len(found)], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, whole.state, rtol=1e-5, atol=1e-5)
    cotangent = torch.randn(whole.tokens.shape)
    wanted = torch.autograd.grad((whole.tokens * cotangent).sum(), (hidden, alpha))
    loss = sum((torch.cat(tokens[b]) * cotangent[b, : whole.counts[b]]).sum() for b in range(2))
    found = torch.autograd.grad(loss, (hidden, alpha))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite(backend, value):
    hidden, alpha = (x.detach() for x in inputs(2, 30))
    broken = alpha.clone()
    broken[1, 10] = value
    with use_backend(backend):
        fired = fire(hidden, broken, return_state=True)
        assert fired.tokens[1].isnan().all() and fired.tokens[0].isfinite().all()
        assert fired.fires[1, 10:].isnan().all() and fired.fires[1, :10].isfinite().all()
        assert fired.state.total[1].isnan() and fired.state.partial[1].isnan().all()
        hidden[0, 3] = math.nan
        assert fire(hidden, alpha).tokens[0].isnan().any()


def test_gradcheck_of_the_reference():
    def run(hidden, alpha):
        fired = reference.continuous_integrate_and_fire(hidden, alpha, tail=0.3, return_state=True)
        return torch.cat([fired.tokens.flatten(), fired.fires.flatten(), fired.state.partial.flatten()])

    check_gradients(run, *inputs(2, 7, dim=2, top=1.7))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic):
    hidden, alpha = inputs(2, 20)

    def op(hidden, alpha):
        return fire(hidden, alpha, max_tokens=12).tokens

    compiled = torch.compile(op, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    torch.testing.assert_close(compiled(hidden, alpha), op(hidden, alpha))
    found = torch.autograd.grad(compiled(hidden, alpha).square().sum(), (hidden, alpha))
    wanted = torch.autograd.grad(op(hidden, alpha).square().sum(), (hidden, alpha))
    torch.testing.assert_close(found, wanted)


def test_dispatch():
    given = {"device": "cpu", "dtype": torch.float32}
    assert choose("continuous_integrate_and_fire", **given).backend == "numba"
    assert choose("continuous_integrate_and_fire", **given, learns=True).backend == "torch"


def test_refusals():
    hidden, alpha = inputs(2, 6)
    with pytest.raises(ValueError, match=r"alpha must be \[2, 6\]"):
        fire(hidden, alpha[:, :5])
    with pytest.raises(ValueError, match="hidden must be"):
        fire(hidden[:, :0], alpha[:, :0])
    with pytest.raises(ValueError, match="threshold must be positive"):
        fire(hidden, alpha, threshold=0.0)
    with pytest.raises(ValueError, match="tail must be finite"):
        fire(hidden, alpha, tail=-1.0)
    with pytest.raises(ValueError, match="max_tokens must not be negative"):
        fire(hidden, alpha, max_tokens=-1)
    with pytest.raises(TypeError, match="lengths must be whole numbers"):
        fire(hidden, alpha, lengths=torch.ones(2))
    with pytest.raises(ValueError, match=r"lengths must be \[2\]"):
        fire(hidden, alpha, lengths=torch.ones(3).long())
    with pytest.raises(TypeError, match="alpha must be floating point"):
        fire(hidden, alpha.long())
    state = fire(hidden, alpha, return_state=True).state
    with pytest.raises(ValueError, match="state must be of"):
        fire(hidden[:1], alpha[:1], state=state)
