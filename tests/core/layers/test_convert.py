"""The LayerNorm converter: equal outputs on our stack, on timm's and torch's models, and its refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from manyheads.core.errors import UsageError
from manyheads.core.layers.convert import Stream, convert, drop_input, fold_affine, remove_mean, stream_of
from manyheads.core.layers.norm import CRMSNorm, LayerNorm, RMSNorm
from manyheads.core.layers.transformer import PreNormStack

TARGETS = ["rms", "crms"]


def trained_like(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random scales and shifts everywhere, and writers with a mean."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter) / max(1, parameter[0].numel()) ** 0.5 + 0.02)
        for module in model.modules():
            if isinstance(module, nn.LayerNorm | LayerNorm):
                module.weight.uniform_(0.5, 2)
                module.bias.normal_()
    return model


def stack(**options) -> PreNormStack:
    arguments = {"depth": 3, "num_heads": 4, "hidden_dim": 64, "in_dim": 6, "out_dim": 5} | options
    return trained_like(PreNormStack(48, **arguments))


def kinds(model: nn.Module) -> set[type]:
    return {type(m) for m in model.modules()} & {nn.LayerNorm, LayerNorm, RMSNorm, CRMSNorm}


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
@pytest.mark.parametrize("to", TARGETS)
def test_stack(to, mlp):
    model, x = stack(mlp=mlp), torch.randn(2, 9, 6)
    before = copy.deepcopy(model.state_dict())
    converted = convert(model, stream_of(model), x, to=to)
    assert kinds(converted) == {{"rms": RMSNorm, "crms": CRMSNorm}[to]}
    torch.testing.assert_close(converted(x), model(x), rtol=1e-5, atol=1e-5)
    other = torch.randn(3, 20, 6)
    torch.testing.assert_close(converted(other, causal=True), model(other, causal=True), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("to", TARGETS)
def test_converted_stack_is_a_stack_of_that_norm(to):
    """The keys are those of a PreNormStack built with the norm, so the weights can be saved and read back."""
    model, x = stack(), torch.randn(2, 9, 6)
    converted = convert(model, stream_of(model), x, to=to)
    width = 48 if to == "rms" else 47
    built = PreNormStack(
        width, depth=3, num_heads=4, head_dim=12, hidden_dim=64, in_dim=6, out_dim=5, norm=to
    )
    for module in built.modules():
        if isinstance(module, CRMSNorm):
            module.weight = module.bias = None
    for module, source in zip(built.modules(), converted.modules(), strict=True):
        if isinstance(module, RMSNorm | CRMSNorm):
            module.eps = source.eps
    built.load_state_dict(converted.state_dict(), strict=True)
    torch.testing.assert_close(built(x), model(x), rtol=1e-5, atol=1e-5)
    counts = [sum(p.numel() for p in m.parameters()) for m in (model, converted)]
    if to == "rms":
        assert counts[0] - counts[1] == 7 * 48  # the shifts of 7 norms
    else:
        lost = (
            7 * 96 + (6 + 1) + 3 * (48 + 1 + 64 + 1) + 3 * (144 + 64) + 5
        )  # affine, then one row or column each
        assert counts[0] - counts[1] == lost


@pytest.mark.parametrize("to", TARGETS)
def test_training_goes_on_after_conversion(to):
    model, x = stack(dropout=0.1), torch.randn(2, 9, 6)
    converted = convert(model, stream_of(model), x, to=to)
    assert converted.training and model.training
    optimizer = torch.optim.SGD(converted.parameters(), lr=1e-3)
    converted(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in converted.parameters())
    assert any(p.grad.abs().max() > 0 for p in converted.parameters())
    optimizer.step()
    assert converted(x).isfinite().all()


def test_a_norm_without_readers_keeps_its_shift():
    model, x = stack(out_dim=None), torch.randn(2, 9, 6)
    converted = convert(model, stream_of(model), x, to="rms")
    assert converted.norm.bias is not None and converted.blocks[0].norm1.bias is None
    torch.testing.assert_close(converted(x), model(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(UsageError, match="'norm' has no readers"):
        convert(model, stream_of(model), x, to="crms")


@pytest.mark.parametrize("to", TARGETS)
def test_timm_vision_transformer(to):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=48, depth=2, num_heads=4, num_classes=10
    )
    model = trained_like(model).eval()
    blocks = [f"blocks.{i}" for i in range(2)]
    norms = {
        f"{b}.{norm}": [f"{b}.{r}"]
        for b in blocks
        for norm, r in (("norm1", "attn.qkv"), ("norm2", "mlp.fc1"))
    }
    writers = ["patch_embed.proj", "cls_token", "pos_embed"]
    writers += [f"{b}.{name}" for b in blocks for name in ("attn.proj", "mlp.fc2")]
    images = torch.randn(3, 3, 16, 16)
    converted = convert(model, Stream(writers, {**norms, "norm": ["head"]}), images, to=to)
    torch.testing.assert_close(converted(images), model(images), rtol=1e-5, atol=1e-5)
    assert kinds(converted) == {{"rms": RMSNorm, "crms": CRMSNorm}[to]}


class Tiny(nn.Module):
    """Token ids in, class scores out; its one layer both reads a norm and writes the stream."""

    def __init__(self, pre_norm: bool) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.tokens = nn.Embedding(11, 24, padding_idx=0)
        self.norm1 = nn.LayerNorm(24)
        self.mix = nn.Linear(24, 24)
        self.norm2 = nn.LayerNorm(24)
        self.head = nn.Linear(24, 3, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids)
        x = x + self.mix(self.norm1(x)) if self.pre_norm else self.norm1(x + self.mix(x))
        return self.head(self.norm2(x))


TINY = Stream(["tokens", "mix"], {"norm1": ["mix"], "norm2": ["head"]})


@pytest.mark.parametrize("to", TARGETS)
def test_embedding_and_a_reader_without_bias(to):
    model, ids = trained_like(Tiny(pre_norm=True)), torch.randint(0, 11, (2, 7))
    converted = convert(model, TINY, ids, to=to)
    torch.testing.assert_close(converted(ids), model(ids), rtol=1e-5, atol=1e-5)
    assert converted.head.bias is not None and model.head.bias is None


@pytest.mark.parametrize("to", TARGETS)
def test_post_norm_is_refused(to):
    model, ids = trained_like(Tiny(pre_norm=False)), torch.randint(0, 11, (2, 7))
    with pytest.raises(UsageError, match=r"not pre-norm"):
        convert(model, TINY, ids, to=to)


def without(stream: Stream, writer: str) -> Stream:
    return Stream([name for name in stream.writers if name != writer], stream.norms)


def test_incomplete_or_wrong_streams_are_refused():
    model, x = stack(), torch.randn(2, 9, 6)
    stream = stream_of(model)
    for writer in stream.writers:
        with pytest.raises(UsageError, match="output differs by"):
            convert(model, without(stream, writer), x, to="rms")
        with pytest.raises(UsageError, match="does not run"):
            convert(model, without(stream, writer), x, to="crms")
    wrong = [
        (Stream([*stream.writers, "blocks.7.attn.proj"], stream.norms), "has no 'blocks.7.attn.proj'"),
        (Stream([*stream.writers, "embed"], stream.norms), "'embed' is used in more than one place"),
        (Stream([*stream.writers, "blocks.0.attn"], stream.norms), "is a MultiHeadAttention"),
        (Stream(stream.writers, {**stream.norms, "blocks": ()}), "'blocks' is a ModuleList, not a LayerNorm"),
        (Stream(stream.writers, {**stream.norms, "norm": ("norm",)}), "used in more than one place"),
        (
            Stream(stream.writers, {**stream.norms, "norm": ("blocks.0.dropout",)}),
            "is a Dropout, not a Linear",
        ),
    ]
    for description, message in wrong:
        with pytest.raises(UsageError, match=message):
            convert(model, description, x, to="rms")
    with pytest.raises(UsageError, match="must be 'rms' or 'crms'"):
        convert(model, stream, x, to="rmsnorm")


def test_tied_weights_are_refused():
    model, x = stack(in_dim=5, out_dim=5), torch.randn(2, 9, 5)
    model.blocks[1].mlp.fc2 = model.blocks[0].mlp.fc2
    with pytest.raises(UsageError, match="more than one place"):
        convert(model, stream_of(model), x, to="rms")


def test_a_stack_fed_with_its_stream_is_refused():
    with pytest.raises(UsageError, match="build it with in_dim"):
        stream_of(stack(in_dim=None))


def test_dtypes_buffers_and_frozen_parameters_survive():
    model, x = stack(), torch.randn(2, 9, 6)
    model.register_buffer("note", torch.arange(3), persistent=False)
    model.head.weight.requires_grad_(False)
    converted = convert(model, stream_of(model), x, to="rms")
    assert {p.dtype for p in converted.parameters()} == {torch.float32}
    assert torch.equal(converted.note, torch.arange(3)) and "note" not in converted.state_dict()
    assert not converted.head.weight.requires_grad and converted.head.bias.requires_grad


def test_primitives():
    torch.manual_seed(0)
    reader, x = nn.Linear(6, 4), torch.randn(5, 6)
    weight, bias = torch.rand(6), torch.randn(6)
    wanted = reader(x * weight + bias)
    fold_affine(reader, weight, bias)
    torch.testing.assert_close(reader(x), wanted)
    x = remove_mean(x, -1)
    wanted = reader(x)
    drop_input(reader)
    assert reader.in_features == 5
    torch.testing.assert_close(reader(x[:, :-1]), wanted)
    torch.testing.assert_close(remove_mean(torch.randn(6, 3)).sum(0), torch.zeros(3), rtol=0, atol=1e-6)
