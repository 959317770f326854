"""What MossFormer and MossFormer2 share: sizes, lengths of a batch, any length, and the modes they run in."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from manyheads.core.errors import UsageError
from manyheads.speech.models.mossformer import mossformer, mossformer_base, mossformer_large
from manyheads.speech.models.mossformer2 import mossformer2

SIZES = {"dim": 32, "depth": 2, "query_key_dim": 24, "group_size": 16}
BUILDERS = {
    "mossformer": lambda **more: mossformer(**SIZES | more),
    "causal": lambda **more: mossformer(**SIZES | {"causal": True} | more),
    "mossformer2": lambda **more: mossformer2(**SIZES | {"inner": 24} | more),
    "mapping": lambda **more: mossformer2(**SIZES | {"inner": 24, "num_spks": 3, "mapping": True} | more),
}
each_model = pytest.mark.parametrize("name", BUILDERS)


def trained(name: str, **more) -> nn.Module:
    """A model whose every weight counts: fresh ones have zero shifts and next to no attention in groups."""
    model = BUILDERS[name](**more)
    for key, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
        elif key.endswith("gamma"):
            parameter.data.normal_()
    return model.eval()


@pytest.mark.parametrize(
    ("build", "count"),
    [(mossformer_large, 42_101_834), (mossformer2, 55_735_394), (mossformer_base, 25_195_341)],
)
def test_parameters_are_counted_exactly(build, count):
    """The published code counts 16 more: its rotary frequencies, not learnt either, are parameters."""
    with torch.device("meta"):
        model = build()
    assert all(p.is_meta for p in model.state_dict().values())
    assert sum(p.numel() for p in model.parameters()) == count


@each_model
def test_rows_of_a_batch_are_its_recordings_one_by_one(name):
    """With all gradients, whatever stands behind a row's end; some rows are shorter than a frame."""
    model = trained(name).double()
    lengths = [1003, 1, 15, 16, 24, 640, 999]
    mixture = torch.full((len(lengths), max(lengths)), math.nan, dtype=torch.float64)
    for b, n in enumerate(lengths):
        mixture[b, :n] = torch.randn(n)
    mixture.requires_grad_()
    sources = model(mixture, torch.tensor(lengths))
    cotangent = torch.randn_like(sources)
    (sources * cotangent).sum().backward()
    together = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()
    for b, n in enumerate(lengths):
        one = mixture.detach()[b : b + 1, :n].clone().requires_grad_()
        alone = model(one)
        (alone * cotangent[b : b + 1, :, :n]).sum().backward()
        torch.testing.assert_close(sources[b, :, :n], alone[0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(mixture.grad[b, :n], one.grad[0], rtol=1e-9, atol=1e-12)
        assert sources[b, :, n:].eq(0).all()
        assert mixture.grad[b, n:].eq(0).all()
    for key, p in model.named_parameters():
        scale = together[key].abs().max().item()
        torch.testing.assert_close(together[key], p.grad, rtol=1e-9, atol=1e-11 * max(scale, 1.0))


@each_model
def test_without_lengths_padding_would_leak(name):
    """So that the test above cannot pass by chance: zeros behind a recording do change what comes out."""
    model = trained(name).double()
    mixture = torch.zeros(1, 800, dtype=torch.float64)
    mixture[:, :400] = torch.randn(400)
    difference = (model(mixture)[..., :400] - model(mixture[:, :400])).abs().max()
    assert difference > 1e-3


@each_model
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 23, 24, 25, 3000])
def test_any_length(name, length):
    model = trained(name)
    with torch.no_grad():
        sources = model(torch.randn(2, length))
    assert sources.shape == (2, 3 if name == "mapping" else 2, length)
    assert sources.isfinite().all()
    if length > 24:
        assert sources[..., :16].std() > 0


@each_model
def test_silence_has_finite_gradients(name):
    model = trained(name)
    mixture = torch.zeros(1, 400, requires_grad=True)
    sources = model(mixture)
    sources.sum().backward()
    assert sources.isfinite().all()
    assert mixture.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@each_model
def test_bfloat16_autocast_is_close_and_trains(name):
    model = trained(name)
    mixture, lengths = torch.randn(2, 640), torch.tensor([640, 333])
    exact = model(mixture, lengths)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(mixture, lengths)
    assert rough.dtype == torch.float32
    error = (rough - exact).norm() / exact.norm()
    assert 0 < error < 0.05
    rough.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@each_model
def test_a_model_of_bfloat16_runs(name):
    model = trained(name)
    mixture = torch.randn(2, 640).bfloat16()
    exact = model(mixture.float())
    rough = model.bfloat16()(mixture)
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).norm() / exact.norm() < 0.1


@pytest.mark.parametrize("name", ["mossformer", "mossformer2"])
def test_export_with_any_batch(name):
    model = trained(name)
    batch = torch.export.Dim("batch", min=2, max=16)
    given = torch.randn(2, 808), torch.tensor([808, 200])
    program = torch.export.export(model, given, dynamic_shapes=({0: batch}, {0: batch}))
    exported = program.module()
    for size in (2, 5):
        mixture, lengths = torch.randn(size, 808), torch.randint(1, 809, (size,))
        with torch.no_grad():
            torch.testing.assert_close(exported(mixture, lengths), model(mixture, lengths))


@each_model
def test_dropout_only_in_training(name):
    model = trained(name, dropout=0.5)
    mixture = torch.randn(1, 500)
    torch.testing.assert_close(model(mixture), model(mixture), rtol=0, atol=0)
    model.train()
    assert not torch.equal(model(mixture), model(mixture))


@pytest.mark.parametrize("build", [mossformer, mossformer2])
@pytest.mark.parametrize(
    ("sizes", "complaint"),
    [
        ({"num_spks": 0}, "num_spks must be positive, not 0"),
        ({"depth": 0}, "depth must be positive"),
        ({"dim": 33}, "dim must be even, not 33"),
        ({"kernel_size": 15}, "kernel_size must be even"),
        ({"query_key_dim": 7}, "query_key_dim must be even"),
        ({"group_size": -1}, "group_size must be positive"),
        ({"dropout": 1.0}, "dropout must be at least 0 and less than 1"),
        ({"dropout": math.nan}, "dropout must be"),
    ],
)
def test_sizes_that_make_no_model_are_refused(build, sizes, complaint):
    with pytest.raises(UsageError, match=complaint):
        build(**sizes)


@pytest.mark.parametrize("name", ["mossformer", "mossformer2"])
@pytest.mark.parametrize(
    ("mixture", "lengths", "error", "complaint"),
    [
        (torch.zeros(400), None, ValueError, r"\[B, L\]"),
        (torch.zeros(1, 0), None, ValueError, "at least one sample"),
        (torch.zeros(1, 400, dtype=torch.int16), None, TypeError, "floating point, not torch.int16"),
        (torch.zeros(1, 400), torch.tensor([1.0]), TypeError, "whole numbers"),
        (torch.zeros(1, 400), torch.tensor([400, 400]), ValueError, r"lengths must be \[1\]"),
        (torch.zeros(1, 400), torch.tensor([401]), ValueError, "from 1 to 400, and are from 401 to 401"),
        (torch.zeros(2, 400), torch.tensor([400, 0]), ValueError, "are from 0 to 400"),
    ],
)
def test_what_is_no_batch_of_waveforms_is_refused(
    name: str, mixture: Tensor, lengths: Tensor | None, error: type[Exception], complaint: str
) -> None:
    with pytest.raises(error, match=complaint):
        BUILDERS[name]()(mixture, lengths)
