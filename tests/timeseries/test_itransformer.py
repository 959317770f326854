"""iTransformer against the official code's recorded tensors, and what must hold of any of them."""

import pytest
import torch

from manyheads.core.catalog import create_model
from manyheads.core.errors import DataError, UsageError
from manyheads.timeseries.models.inverted import InvertedForecaster
from manyheads.timeseries.models.itransformer import itransformer, load_library_weights

SHARED = ("seq_len", "pred_len", "d_model", "n_heads", "e_layers", "d_ff", "dropout", "activation")


def small(**args):
    sizes = {"seq_len": 24, "pred_len": 5, "d_model": 16, "n_heads": 2, "d_ff": 20} | args
    return itransformer(**sizes).eval()


def from_case(case):
    return itransformer(
        **{k: case.config[k] for k in SHARED}, use_norm=case.config.get("use_norm", True)
    ).eval()


@pytest.mark.parametrize("name", ["norm_mark", "norm_nomark", "nonorm_mark"])
def test_outputs_and_every_gradient_are_the_official_ones(golden, name):
    case = golden("timeseries", f"itransformer_a_{name}")
    model = from_case(case)
    model.load_state_dict(case.group("param"), strict=True)
    inputs = case.inputs()
    y = model(inputs["x_enc"], inputs.get("x_mark_enc"))
    case.check_all(inputs, {"y": y}, model)


def test_attention_maps_and_their_gradients_are_the_official_ones(golden):
    case = golden("timeseries", "itransformer_a_nonorm_nomark_attn")
    model = from_case(case)
    model.load_state_dict(case.group("param"), strict=True)
    inputs = case.inputs()
    y, maps = model.forward_with_attention(inputs["x_enc"])
    case.check_all(inputs, {"y": y} | {f"attn.{i}": each for i, each in enumerate(maps)}, model)


def test_library_weights_give_the_librarys_outputs_and_gradients(golden):
    case = golden("timeseries", "tsl_itransformer_a")
    model = from_case(case)
    load_library_weights(model, case.group("param"))
    inputs = case.inputs()
    y = model(inputs["x_enc"], inputs["x_mark_enc"])
    case.check_all(inputs, {"y": y}, model, rename=lambda key: key.replace("projector.", "projection."))


def library_state():
    return {k.replace("projector.", "projection."): v for k, v in small().state_dict().items()}


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda s: s.pop("encoder.norm.bias"), "encoder.norm.bias"),
        (lambda s: s.update({"encoder.extra": torch.zeros(1)}), "encoder.extra"),
        (lambda s: s.update({"projection.bias": torch.zeros(6)}), "projector.bias"),
        (lambda s: s.update({"encoder.attn_layers.0.conv1.weight": torch.zeros(20, 16)}), "conv1.weight"),
        (lambda s: s.update({"projector.bias": s["projection.bias"]}), "official weights"),
    ],
)
def test_library_weights_that_do_not_fit_are_refused(spoil, complaint):
    state = library_state()
    load_library_weights(small(), state)
    spoil(state)
    with pytest.raises(DataError, match=complaint):
        load_library_weights(small(), state)


def test_library_weights_need_normalisation():
    with pytest.raises(DataError, match="use_norm"):
        load_library_weights(small(use_norm=False), library_state())


@pytest.mark.parametrize(
    ("sizes", "count"),
    [
        ({"d_model": 256, "d_ff": 256}, 841_568),
        ({"d_model": 512, "d_ff": 512}, 3_255_904),
        ({"d_model": 128, "d_ff": 64, "e_layers": 3}, 274_464),
    ],
)
def test_parameter_count(sizes, count):
    e_layers, d, d_ff = sizes.get("e_layers", 2), sizes["d_model"], sizes["d_ff"]
    attention, feed_forward, norms = 4 * (d * d + d), 2 * d * d_ff + d_ff + d, 4 * d
    embedding, last_norm, head = 96 * d + d, 2 * d, 96 * d + 96
    by_formula = e_layers * (attention + feed_forward + norms) + embedding + last_norm + head
    model = create_model("itransformer", seq_len=96, pred_len=96, **sizes)
    assert sum(p.numel() for p in model.parameters()) == by_formula == count


def test_order_of_variates_does_not_matter():
    model, order = small(), torch.tensor([3, 0, 4, 1, 2])
    x, x_mark = torch.randn(2, 24, 5), torch.randn(2, 24, 4)
    torch.testing.assert_close(model(x[..., order], x_mark), model(x, x_mark)[..., order])


@pytest.mark.parametrize("variates", [1, 3, 50])
def test_any_number_of_variates(variates):
    assert small()(torch.randn(2, 24, variates), torch.randn(2, 24, 4)).shape == (2, 5, variates)


def test_calendar_features_take_part():
    model, x = small(), torch.randn(2, 24, 3)
    marks = torch.randn(2, 2, 24, 4)
    assert (model(x, marks[0]) - model(x, marks[1])).abs().max() > 1e-3
    assert (model(x, marks[0]) - model(x)).abs().max() > 1e-3


def test_normalisation_makes_forecasts_follow_scale_and_level():
    x, x_mark = torch.randn(2, 24, 3), torch.randn(2, 24, 4)
    scale, level = torch.tensor([100.0, 3.0, 7.0]), torch.tensor([-4.0, 50.0, 1.0])
    model = small()
    torch.testing.assert_close(
        model(x * scale + level, x_mark), model(x, x_mark) * scale + level, rtol=1e-4, atol=1e-4
    )
    model.use_norm = False
    assert (model(x * scale + level, x_mark) - model(x, x_mark) * scale - level).abs().max() > 0.1


def test_a_constant_window_stays_finite():
    assert small()(torch.full((1, 24, 2), 7.0)).sub(7).abs().max() < 1


def test_a_window_does_not_depend_on_its_batch():
    model, x = small(), torch.randn(5, 24, 3)
    torch.testing.assert_close(model(x)[2:3], model(x[2:3]))


def test_maps_are_those_of_the_plain_forecast():
    model, x, x_mark = small(e_layers=3), torch.randn(2, 24, 3), torch.randn(2, 24, 4)
    y, maps = model.forward_with_attention(x, x_mark)
    torch.testing.assert_close(y, model(x, x_mark))
    assert [m.shape for m in maps] == [(2, 2, 7, 7)] * 3
    torch.testing.assert_close(maps[0].sum(-1), torch.ones(2, 2, 7))


def test_dropout_acts_in_training_only_and_by_the_seed():
    model, x = small(dropout=0.5), torch.randn(2, 24, 3)
    torch.testing.assert_close(model(x), model(x), rtol=0, atol=0)
    model.train()
    torch.manual_seed(1)
    first = model(x)
    assert (first - model(x)).abs().max() > 1e-3
    torch.manual_seed(1)
    torch.testing.assert_close(first, model(x), rtol=0, atol=0)


def test_same_seed_same_initial_weights_as_convolutions_give():
    torch.manual_seed(3)
    layer = small().encoder.attn_layers[0]
    torch.manual_seed(3)
    torch.nn.Linear(24, 16)
    for _ in range(4):
        torch.nn.Linear(16, 16)
    conv = torch.nn.Conv1d(16, 20, 1)
    torch.testing.assert_close(layer.conv1.weight, conv.weight, rtol=0, atol=0)
    torch.testing.assert_close(layer.conv1.bias, conv.bias, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        ({"n_heads": 3}, "n_heads=3"),
        ({"activation": "tanh"}, "tanh"),
        ({"dropout": 1.0}, "dropout"),
        ({"d_ff": 0}, "d_ff"),
    ],
)
def test_impossible_sizes_are_refused(args, complaint):
    with pytest.raises(UsageError, match=complaint):
        small(**args)


def test_builder_returns_a_plain_module():
    assert type(create_model("itransformer", seq_len=8, pred_len=4, d_model=8)) is InvertedForecaster
