"""S-Mamba against the official code's recorded tensors, and what must hold of any of them."""

import pytest
import torch

from manyheads.core.catalog import create_model
from manyheads.core.errors import DataError, UsageError
from manyheads.timeseries.models.itransformer import itransformer
from manyheads.timeseries.models.smamba import load_official_weights, s_mamba

SHARED = (
    "seq_len",
    "pred_len",
    "d_model",
    "d_state",
    "e_layers",
    "d_ff",
    "dropout",
    "activation",
    "use_norm",
)
DEAD = ("man", "man2", "a")


def small(**args):
    sizes = {"seq_len": 24, "pred_len": 5, "d_model": 16, "d_state": 2, "d_ff": 20} | args
    return s_mamba(**sizes).eval()


def official(golden, name="norm_mark"):
    case = golden("timeseries", f"smamba_a_{name}")
    return case, s_mamba(**{key: case.config[key] for key in SHARED}).eval()


@pytest.mark.parametrize("name", ["norm_mark", "nonorm_nomark"])
def test_outputs_and_every_gradient_are_the_official_ones(golden, name):
    case, model = official(golden, name)
    load_official_weights(model, case.group("param"))
    inputs = case.inputs()
    y = model(inputs["x_enc"], inputs.get("x_mark_enc"))
    case.check_all(inputs, {"y": y}, model)


def test_what_the_loader_leaves_out_is_what_the_official_code_never_runs(golden):
    case, model = official(golden)
    left = set(case.group("param")) - set(model.state_dict())
    assert {key.split(".")[3] for key in left} == set(DEAD)
    assert set(model.state_dict()) <= set(case.group("param"))


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda s: s.pop("encoder.attn_layers.1.attention_r.A_log"), "attention_r.A_log"),
        (lambda s: s.update({"encoder.attn_layers.0.more.weight": torch.zeros(1)}), "more.weight"),
        (lambda s: s.update({"encoder.attn_layers.2.man.D": torch.zeros(11)}), "layers.2.man.D"),
        (lambda s: s.update({"projector.bias": torch.zeros(6)}), "projector.bias"),
    ],
)
def test_weights_that_do_not_fit_are_refused(golden, spoil, complaint):
    case, model = official(golden)
    state = case.group("param")
    spoil(state)
    with pytest.raises(DataError, match=complaint):
        load_official_weights(model, state)


def test_weights_belong_into_an_s_mamba(golden):
    case, _ = official(golden)
    with pytest.raises(DataError, match="s_mamba"):
        load_official_weights(itransformer(37, 11, d_model=20, n_heads=2, d_ff=24), case.group("param"))


def test_parameter_count():
    """By hand: two Mamba blocks of inner width d, rank 16, two states, and the shell."""
    d, rank, states = 256, 16, 2
    mamba = 2 * d * d + 2 * d + d + d * (rank + 2 * states) + (rank * d + d) + d * states + d + d * d
    layer = 2 * mamba + 2 * (d * d + d) + 4 * d
    by_formula = 2 * layer + (96 * d + d) + 2 * d + (96 * d + 96)
    model = create_model("s_mamba", seq_len=96, pred_len=96, d_model=d, d_ff=d, d_state=states)
    assert sum(p.numel() for p in model.parameters()) == by_formula == 1_145_696


def test_order_of_variates_matters():
    model, order = small(), torch.tensor([3, 0, 4, 1, 2])
    x = torch.randn(2, 24, 5)
    assert (model(x[..., order]) - model(x)[..., order]).abs().max() > 1e-3


@pytest.mark.parametrize("variates", [1, 3, 50])
def test_any_number_of_variates(variates):
    assert small()(torch.randn(2, 24, variates), torch.randn(2, 24, 4)).shape == (2, 5, variates)


def test_every_token_takes_part_in_every_forecast():
    model, x, marks = small(e_layers=1), torch.randn(1, 24, 4), torch.randn(1, 24, 3).requires_grad_()
    x.requires_grad_()
    for variate in range(4):
        grads = torch.autograd.grad(model(x, marks)[..., variate].square().sum(), (x, marks))
        assert all((grad.abs().amax((0, 1)) > 0).all() for grad in grads)


def test_a_window_does_not_depend_on_its_batch():
    model, x = small(), torch.randn(5, 24, 3)
    torch.testing.assert_close(model(x)[2:3], model(x[2:3]))


def test_covariates_and_several_outputs():
    model = small(past=2, future=1, static=3, outputs=4, use_norm=False)
    given = {"past": torch.randn(2, 24, 2), "future": torch.randn(2, 29, 1), "static": torch.randn(2, 3)}
    y = model(torch.randn(2, 24, 3), torch.randn(2, 24, 4), **given)
    assert y.shape == (2, 5, 3, 4)


def test_there_are_no_attention_weights():
    with pytest.raises(UsageError, match="no attention weights"):
        small().forward_with_attention(torch.randn(2, 24, 3))


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        ({"d_state": 0}, "d_state"),
        ({"activation": "tanh"}, "tanh"),
        ({"dropout": 1.0}, "dropout"),
        ({"outputs": 2}, "use_norm=False"),
    ],
)
def test_impossible_sizes_are_refused(args, complaint):
    with pytest.raises(UsageError, match=f"s_mamba: .*{complaint}"):
        small(**args)
