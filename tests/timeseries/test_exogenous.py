"""Covariates in the base models: what depends on one is learnt with it and not without it."""

import pytest
import torch

from manyheads.core.catalog import create_model
from manyheads.core.errors import UsageError

L, P, N = 24, 8, 2
SIZES = {"d_model": 32, "n_heads": 2, "d_ff": 32, "dropout": 0.0}
STEPS = {"label_len": 8, "enc_in": N, "factor": 3, "e_layers": 1, "d_layers": 1}
MODELS = {
    "itransformer": {**SIZES, "e_layers": 1},
    "iflowformer": {**SIZES, "e_layers": 1},
    "s_mamba": {"d_model": 32, "d_state": 2, "d_ff": 32, "dropout": 0.0, "e_layers": 1},
    "informer": {**SIZES, **STEPS},
    "autoformer": {**SIZES, **STEPS, "moving_avg": 5},
    "dlinear": {"moving_avg": 5},
    "patchtst": {**SIZES, "e_layers": 1, "patch_len": 8, "stride": 4},
}
NORMS = ("itransformer", "iflowformer", "s_mamba", "patchtst")
ROLES = {"past": (L, 2), "future": (L + P, 2), "static": (2,)}
TWO = {"past": 2, "future": 2, "static": 2}


def build(name, **more):
    norm = {"use_norm": False} if name in NORMS else {}
    return create_model(name, **{"seq_len": L, "pred_len": P, **MODELS[name], **norm, **more})


def covariates(size):
    return {role: torch.randn(size, *shape) for role, shape in ROLES.items()}


def windows(role, size):
    """Histories of noise, covariates of which the first decides the targets, and the targets."""
    given = covariates(size)[role]
    if role == "past":
        given[..., 0] = given[:, :1, 0] + 0.1 * given[..., 0]
    if role == "static":
        target = given[:, None, :1]
    else:
        target = given[:, -P:, :1] if role == "future" else given[:, -1:, :1]
    return torch.randn(size, L, N), given, target.expand(-1, P, N)


def error_after_training(model, role, told, steps=100):
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        x, given, y = windows(role, 32)
        adam.zero_grad()
        (model(x, **({role: given} if told else {})) - y).square().mean().backward()
        adam.step()
    x, given, y = windows(role, 256)
    with torch.no_grad():
        return (model.eval()(x, **({role: given} if told else {})) - y).square().mean().item()


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", MODELS)
def test_a_covariate_that_decides_the_target_is_learnt(name, role):
    assert error_after_training(build(name, **{role: 2}), role, told=True) < 0.3


@pytest.mark.parametrize("name", MODELS)
def test_without_the_covariate_it_cannot_be(name):
    assert error_after_training(build(name), "future", told=False, steps=50) > 0.8


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_no_covariates_has_no_parameter_for_them(name):
    plain, zero = build(name), build(name, past=0, future=0, static=0, outputs=1)
    assert plain.state_dict().keys() == zero.state_dict().keys()
    assert not [key for key in plain.state_dict() if key.startswith("covariates.")]


@pytest.mark.parametrize("name", MODELS)
def test_every_output_learns_from_every_covariate(name):
    model, given = build(name, **TWO, outputs=3).eval(), covariates(4)
    for parameter in model.parameters():  # the linear terms begin as zero
        torch.nn.init.normal_(parameter, std=0.3)
    given = {role: tensor.requires_grad_() for role, tensor in given.items()}
    y = model(torch.randn(4, L, N), **given)
    assert y.shape == (4, P, N, 3)
    for k in range(3):
        gradients = torch.autograd.grad(y[..., k].sum(), tuple(given.values()), retain_graph=True)
        for role, gradient in zip(given, gradients, strict=True):
            assert gradient.flatten(0, -2).abs().sum(0).gt(0).all(), (role, k)


@pytest.mark.parametrize("name", MODELS)
def test_a_batchs_forecasts_are_those_of_its_windows(name):
    model, x, given = build(name, **TWO, outputs=2).eval(), torch.randn(5, L, N), covariates(5)
    with torch.no_grad():
        torch.manual_seed(1)  # Informer draws the keys that it samples
        together = model(x, **given)
        torch.manual_seed(1)
        alone = model(x[3:4], **{role: tensor[3:4] for role, tensor in given.items()})
    torch.testing.assert_close(together[3:4], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("role", ROLES)
def test_covariates_of_another_number_are_refused(name, role):
    model, given = build(name, **TWO), covariates(2)
    for n, wrong in ((0, None), (1, given[role][..., :1])):
        with pytest.raises(ValueError, match=f"built for 2 {role} covariates, not {n}"):
            model(torch.randn(2, L, N), **{**given, role: wrong})
    with pytest.raises(ValueError, match=f"built for 0 {role} covariates, not 2"):
        build(name)(torch.randn(2, L, N), **{role: given[role]})


@pytest.mark.parametrize("name", MODELS)
def test_impossible_numbers_are_refused(name):
    with pytest.raises(UsageError, match=f"{name}: past must be the number of such covariates, not -1"):
        build(name, past=-1)
    with pytest.raises(UsageError, match=f"{name}: outputs must be a positive integer, not 0"):
        build(name, outputs=0)
    if name in NORMS:
        with pytest.raises(UsageError, match=f"{name}: outputs=3 needs use_norm=False"):
            build(name, use_norm=True, outputs=3)


@pytest.mark.parametrize("name", ["informer", "autoformer"])
def test_the_variates_are_those_to_forecast(name):
    assert build(name, **TWO, outputs=3).variates == N


def test_attention_maps_show_the_covariates_tokens():
    model, marks = build("itransformer", **TWO), torch.rand(3, L, 4)
    y, maps = model.forward_with_attention(torch.randn(3, L, N), marks, **covariates(3))
    assert y.shape == (3, P, N)
    assert [each.shape for each in maps] == [(3, 2, N + 4 + 6, N + 4 + 6)]


def test_the_trend_belongs_to_autoformers_first_output():
    model = build("autoformer", outputs=2).eval()
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)  # leaves the trend that the decoder begins with
    x = torch.randn(3, L, N)
    y = model(x)
    torch.testing.assert_close(y[..., 0], x.mean(1, keepdim=True).expand(-1, P, -1))
    assert not y[..., 1].any()
