"""The wrapper: covariates, scaled windows and outputs of any kind around the base models."""

import math

import pytest
import torch

from manyheads.core import catalog, hub
from manyheads.core.catalog import create_model
from manyheads.core.errors import DataError, UsageError
from manyheads.timeseries.calls import forecast, training_loss
from manyheads.timeseries.heads import OUTPUTS
from manyheads.timeseries.models.forecaster import CategoryEmbedding, window_statistics

L, P, N = 24, 8, 2
SIZES = {"d_model": 16, "n_heads": 2, "d_ff": 16, "e_layers": 1, "dropout": 0.0}
STEPS = {"enc_in": N, "label_len": 8, "factor": 3, "d_layers": 1}
BASES = {
    "itransformer": SIZES,
    "informer": {**SIZES, **STEPS},
    "autoformer": {**SIZES, **STEPS, "moving_avg": 5},
    "dlinear": {"moving_avg": 5},
    "patchtst": {**SIZES, "patch_len": 8, "stride": 4},
}
EVERY = {
    "past": 1,
    "past_categories": [3],
    "future": 2,
    "future_categories": [4, 9],
    "static": 0,
    "static_categories": [5],
}
LEVELS = [0.1, 0.5, 0.9]


def build(base="itransformer", output="point", arguments=None, **more):
    if output == "quantile":
        more = {"quantiles": LEVELS, **more}
    return create_model(
        "forecaster",
        base=base,
        seq_len=L,
        pred_len=P,
        arguments=arguments or BASES[base],
        output=output,
        **more,
    )


def batch(size=3, covariates=True, counts=False):
    x, y = 5 + 2 * torch.randn(size, L, N), 5 + 2 * torch.randn(size, P, N)
    made = {"x": x, "y": y, "x_mark": torch.rand(size, L, 4) - 0.5, "y_mark": torch.rand(size, P, 4) - 0.5}
    if counts:
        made |= {"x": x.clamp(min=0).round(), "y": y.clamp(min=0).round()}
    if covariates:
        made["past"] = torch.cat([torch.randn(size, L, 1), torch.randint(0, 3, (size, L, 1))], -1)
        codes = [torch.randint(0, k, (size, L + P, 1)) for k in (4, 9)]
        made["future"] = torch.cat([torch.randn(size, L + P, 2), *codes], -1)
        made["static"] = torch.randint(0, 5, (size, 1)).float()
    return made


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("base", BASES)
def test_every_base_has_every_output_and_takes_covariates(base, output):
    model, given = build(base, output, **EVERY), batch(counts=True)
    loss = training_loss(model, given)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        got = forecast(model.eval(), given, [] if output == "point" else LEVELS)
    assert got.point.shape == (3, P, N)
    if output != "point":
        assert got.quantiles.shape == (3, P, N, 3)
        assert (got.quantiles.diff(dim=-1) >= 0).all()


@pytest.mark.parametrize("output", ["quantile", "student_t"])
def test_a_folder_gives_back_the_model(output, tmp_path):
    wanted = {
        "base": "itransformer",
        "seq_len": L,
        "pred_len": P,
        "arguments": SIZES,
        **EVERY,
        "output": output,
    }
    wanted |= {"quantiles": LEVELS} if output == "quantile" else {}
    model, given = create_model("forecaster", **wanted).eval(), batch()
    hub.save(
        tmp_path / "m", model, domain="timeseries", name="forecaster", arguments=wanted, preprocessing={}
    )
    back, _ = hub.load_model(tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(forecast(back, given, LEVELS).quantiles, forecast(model, given, LEVELS).quantiles)


@pytest.mark.parametrize("output", ["point", "quantile", "student_t"])
def test_a_shifted_and_stretched_window_has_a_shifted_and_stretched_forecast(output):
    model, given = build(output=output).eval(), batch(covariates=False)
    other = {**given, "x": given["x"] * 40 - 9}
    levels = [] if output == "point" else LEVELS
    with torch.no_grad():
        one, two = forecast(model, given, levels), forecast(model, other, levels)
    torch.testing.assert_close(two.point, one.point * 40 - 9, rtol=1e-4, atol=1e-3)
    if levels:
        torch.testing.assert_close(two.quantiles, one.quantiles * 40 - 9, rtol=1e-4, atol=1e-3)


def test_standard_windows_are_those_of_the_base_models_own():
    base = create_model("itransformer", seq_len=L, pred_len=P, **SIZES).eval()
    model, given = build(arguments={**SIZES, "use_norm": True}).eval(), batch(covariates=False)
    model.base.load_state_dict(base.state_dict())
    wanted = base(given["x"], given["x_mark"], given["y_mark"])
    torch.testing.assert_close(forecast(model, given).point, wanted)
    torch.testing.assert_close(model(given["x"], given["x_mark"], given["y_mark"]), wanted)


@pytest.mark.parametrize("scaling", ["standard", "mean"])
def test_what_was_not_observed_does_not_reach_the_statistics(scaling):
    x, observed = torch.randn(3, L, N), torch.rand(3, L, N) > 0.4
    wild = torch.where(observed, x, 1e3)
    for one, two in zip(*(window_statistics(each, observed, scaling) for each in (x, wild)), strict=True):
        assert (one is None and two is None) or torch.equal(one, two)
    loc, scale = window_statistics(x, observed, scaling)
    there = x[1, observed[1, :, 0], 0]
    if scaling == "standard":
        assert loc[1, 0, 0].item() == pytest.approx(there.mean().item(), abs=1e-6)
        assert scale[1, 0, 0].item() == pytest.approx(there.std(correction=0).item(), rel=1e-4)
    else:
        assert scale[1, 0, 0].item() == pytest.approx(there.abs().mean().item(), rel=1e-6)


@pytest.mark.parametrize("scaling", ["standard", "mean"])
def test_a_window_of_which_nothing_is_known_is_left_alone(scaling):
    x, observed = torch.zeros(1, L, N), torch.zeros(1, L, N, dtype=torch.bool)
    loc, scale = window_statistics(x, observed, scaling)
    assert loc is None or not loc.any()
    assert (scale == 1).all()


def test_a_batchs_mask_is_used():
    model, given = build(output="quantile").eval(), batch(covariates=False)
    observed = torch.rand(3, L, N) > 0.3
    with torch.no_grad():
        plain = forecast(model, given).point
        masked = forecast(model, {**given, "observed": observed}).point
    assert not torch.allclose(plain, masked)


def test_an_unknown_category_adds_nothing_and_is_not_trained():
    embed = CategoryEmbedding(1, [4, 120])
    assert embed.channels == 1 + 2 + 50
    out = embed(torch.tensor([[7.0, 0.0, 0.0], [7.0, 3.0, 119.0]]))
    assert out[0, 0] == 7 and not out[0, 1:].any() and out[1, 1:].all()
    out.sum().backward()
    assert not embed.tables[0].weight.grad[0].any()
    assert embed.tables[0].weight.grad[3].all()


@pytest.mark.parametrize("role", ["past", "future", "static"])
def test_a_category_that_decides_the_target_is_learnt(role):
    """The category's values stand for -1, 0 and 1; without it the error would be 2/3."""
    model = build("itransformer", **{f"{role}_categories": [4]}, window_scaling="none")
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    shape = {"past": (L, 1), "future": (L + P, 1), "static": (1,)}[role]

    def draw(size):
        code = torch.randint(1, 4, (size, *shape))
        code = code if role == "future" else code[:, :1].expand_as(code)
        of = code[:, -P:, :] if role == "future" else code.flatten(1)[:, :1, None]
        x = torch.randn(size, L, N)
        y = (of - 2).float().expand(-1, P, N)
        return {"x": x, "y": y, "x_mark": None, "y_mark": None, role: code.float()}

    for _ in range(150):
        adam.zero_grad()
        training_loss(model, draw(32)).backward()
        adam.step()
    with torch.no_grad():
        assert training_loss(model.eval(), draw(256)) < 0.1


@pytest.mark.parametrize(
    ("base", "more", "message"),
    [
        ("itransformer", {"output": "quantile", "quantiles": [0.9, 0.1]}, "quantiles out of order"),
        ("seasonal_naive", {"past": 1}, "seasonal_naive takes no past covariates"),
        ("seasonal_naive", {"output": "normal"}, "seasonal_naive forecasts points only.*conformal"),
        ("forecaster", {}, "forecaster is no base model"),
        ("itransfomer", {}, "did you mean 'itransformer'"),
        ("itransformer", {"window_scaling": "max"}, "no window_scaling 'max'"),
        ("itransformer", {"output": "negative_binomial", "window_scaling": "standard"}, "would shift"),
        ("itransformer", {"arguments": {"use_norm": False}}, "use_norm=False contradicts"),
        ("itransformer", {"arguments": {"use_norm": True}, "window_scaling": "mean"}, "use_norm=True contra"),
        ("itransformer", {"arguments": {"outputs": 3}}, "outputs is no option of the base model here"),
        ("itransformer", {"arguments": {"d_modl": 3}}, "did you mean 'd_model'"),
    ],
)
def test_impossible_combinations_are_refused(base, more, message):
    with pytest.raises(UsageError, match=message):
        create_model("forecaster", **{"base": base, "seq_len": L, "pred_len": P, **more})


@pytest.mark.parametrize("role", ["past", "future", "static"])
def test_covariates_that_are_missing_or_left_over_are_refused(role):
    given = batch()
    with pytest.raises(ValueError, match=f"built for {given[role].shape[-1]} {role} covariates, not 0"):
        forecast(build(**EVERY), {key: value for key, value in given.items() if key != role})
    with pytest.raises(ValueError, match=f"built for 0 {role} covariates, not {given[role].shape[-1]}"):
        forecast(build(), {**batch(covariates=False), role: given[role]})


def test_fractional_targets_of_counts_are_refused():
    with pytest.raises(DataError, match="counts, and a target is"):
        training_loss(build(output="negative_binomial"), batch(covariates=False))


def test_levels_are_the_heads():
    assert build(output="quantile").levels == (0.1, 0.5, 0.9)
    assert build(output="normal").levels is None
    assert build().levels == ()
    with pytest.raises(UsageError, match=r"no quantile 0\.3: the model has the quantiles"):
        forecast(build(output="quantile"), batch(covariates=False), [0.3])


def test_variates_are_the_bases():
    assert build("informer", **EVERY).variates == N
    assert build("itransformer", **EVERY).variates is None


def test_the_catalogue_says_what_it_takes():
    assert "quantiles" in catalog.arguments(catalog.find("forecaster"))


def test_gaps_in_the_targets_leave_the_gradients_finite():
    model, given = build(output="student_t"), batch(covariates=False)
    given["y"][0] = math.nan
    training_loss(model, given).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
