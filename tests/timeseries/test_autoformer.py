"""Autoformer against recorded tensors of its authors' code and of the time-series library."""

import pytest
import torch

from manyheads.core.catalog import create_model
from manyheads.core.errors import UsageError
from manyheads.timeseries.models.autoformer import Autoformer, SeasonalNorm, autoformer
from manyheads.timeseries.models.checkpoints import load_weights

SHARED = ("seq_len", "pred_len", "label_len", "enc_in", "moving_avg", "factor", "d_model", "n_heads")
SHARED += ("e_layers", "d_layers", "d_ff", "dropout", "embed", "freq", "activation")
SIZES = {"seq_len": 24, "pred_len": 6, "enc_in": 3, "label_len": 10, "d_model": 16, "n_heads": 2, "d_ff": 20}


def small(**args):
    return autoformer(**(SIZES | {"moving_avg": 7} | args)).eval()


def batch(n=2, freq_features=4, **sizes):
    sizes = SIZES | sizes
    x = torch.randn(n, sizes["seq_len"], sizes["enc_in"])
    marks = torch.rand(n, sizes["seq_len"] + sizes["pred_len"], freq_features) - 0.5
    return x, marks[:, : sizes["seq_len"]], marks[:, sizes["seq_len"] :]


def check(case, dialect, mode):
    model = autoformer(**{k: case.config[k] for k in SHARED}, even_lags=dialect == "library")
    load_weights(model, case.group("param"), dialect)
    model.train(mode == "train")
    inputs, encoded = case.inputs(), []
    model.encoder.register_forward_hook(lambda module, args, out: encoded.append(out))
    y = model.forecast(*(inputs[k] for k in ("x_enc", "x_mark_enc", "x_dec", "x_mark_dec")))
    case.check_all(inputs, {"y": y, "encoder": encoded[0]}, model)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", ["fixed", "pad", "trunc"])
def test_outputs_and_every_gradient_are_the_official_ones(golden, name, mode):
    check(golden("timeseries", f"autoformer_a_{name}_{mode}"), "autoformer", mode)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", ["even", "odd"])
def test_outputs_and_every_gradient_are_the_librarys(golden, name, mode):
    check(golden("timeseries", f"tsl_autoformer_a_{name}_{mode}"), "library", mode)


def test_the_norm_is_the_official_one_and_its_bias_has_no_effect(golden):
    case = golden("timeseries", "my_layernorm_a")
    norm = SeasonalNorm(case.config["channels"])
    norm.load_state_dict(case.group("param"), strict=True)
    inputs = case.inputs()
    case.check_all(inputs, {"y": norm(inputs["x"])}, norm)
    assert norm.layernorm.bias.grad.abs().max() < 1e-4


def test_parameter_count_is_the_official_codes():
    d, d_ff = 512, 2048
    attention, feed_forward, norm = 4 * (d * d + d), 2 * d * d_ff, 2 * d
    embedding = 3 * 7 * d + 4 * d
    encoder = 2 * (attention + feed_forward) + norm
    decoder = 2 * attention + feed_forward + 3 * d * 7 + norm + 7 * d + 7
    model = create_model("autoformer", seq_len=96, pred_len=96, enc_in=7)
    assert sum(p.numel() for p in model.parameters()) == 2 * embedding + encoder + decoder == 10_535_943


def test_the_decoder_reads_the_calendar_of_the_history_and_of_the_horizon():
    model = small()
    x, x_mark, y_mark = batch()
    y = model(x, x_mark, y_mark)
    again = model.forecast(x, x_mark, None, torch.cat([x_mark[:, -10:], y_mark], dim=1))
    torch.testing.assert_close(y, again, rtol=0, atol=0)
    assert (model(x, x_mark, y_mark + 0.1) - y).abs().max() > 1e-4
    assert (model(x) - y).abs().max() > 1e-4


@pytest.mark.parametrize("label_len", [0, 24])
def test_the_decoder_may_read_none_or_all_of_the_history(label_len):
    assert small(label_len=label_len)(*batch()).shape == (2, 6, 3)


def test_the_level_of_a_series_passes_through():
    model, (x, x_mark, y_mark) = small(), batch()
    for parameter in (*model.decoder.projection.parameters(), model.decoder.layers[0].projection.weight):
        torch.nn.init.zeros_(parameter)
    expected = x.mean(1, keepdim=True).expand(-1, 6, -1)
    torch.testing.assert_close(model(x, x_mark, y_mark), expected)


def test_a_window_does_not_depend_on_its_batch_in_evaluation_only():
    model, inputs = small(factor=1), batch(5)
    y = model(*inputs)
    torch.testing.assert_close(model(*inputs), y, rtol=0, atol=0)
    torch.testing.assert_close(model(*(each[2:3] for each in inputs)), y[2:3])
    model = small(factor=1, dropout=0.0).train()
    assert (model(*(each[2:3] for each in inputs)) - model(*inputs)[2:3]).abs().max() > 1e-4


@pytest.mark.parametrize(("seq_len", "differ"), [(24, False), (25, True)])
def test_lags_differ_at_odd_lengths_only(seq_len, differ):
    ours, library = small(seq_len=seq_len), small(seq_len=seq_len, even_lags=True)
    library.load_state_dict(ours.state_dict())
    inputs = batch(seq_len=seq_len)
    assert ((ours(*inputs) - library(*inputs)).abs().max() > 1e-4) == differ


def test_dropout_acts_in_training_only_and_by_the_seed():
    model, inputs = small(dropout=0.5), batch()
    model.train()
    torch.manual_seed(1)
    first = model(*inputs)
    assert (first - model(*inputs)).abs().max() > 1e-3
    torch.manual_seed(1)
    torch.testing.assert_close(first, model(*inputs), rtol=0, atol=0)


def test_all_parameters_train():
    model = small().train()
    model(*batch()).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_missing_value_gives_no_number():
    x, x_mark, y_mark = batch()
    x[0, 3, 1] = float("nan")
    y = small()(x, x_mark, y_mark)
    assert y[0].isnan().all()
    assert y[1].isfinite().all()


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        ({"n_heads": 3}, "n_heads=3"),
        ({"activation": "tanh"}, "tanh"),
        ({"dropout": -0.1}, "dropout"),
        ({"e_layers": 0}, "e_layers"),
        ({"label_len": -1}, "label_len=-1"),
        ({"moving_avg": 4}, "moving_avg"),
        ({"embed": "time"}, "timeF"),
        ({"freq": "x"}, "'x'"),
    ],
)
def test_impossible_arguments_are_refused(args, complaint):
    with pytest.raises(UsageError, match=complaint):
        small(**args)


def test_another_number_of_variates_is_refused():
    x, x_mark, y_mark = batch()
    with pytest.raises(ValueError, match="enc_in"):
        small()(x[..., :2], x_mark, y_mark)


def test_builder_returns_a_plain_module():
    assert type(create_model("autoformer", **SIZES)) is Autoformer


def test_it_exports():
    model = small()
    inputs = batch()
    exported = torch.export.export(model, inputs, strict=False).module()
    again = batch()
    torch.testing.assert_close(exported(*again), model(*again))


def test_a_history_or_calendar_of_another_length_is_refused():
    x, x_mark, y_mark = batch()
    with pytest.raises(ValueError, match="fewer than label_len=10"):
        small()(x[:, :9], x_mark[:, :9], y_mark)
    with pytest.raises(ValueError, match="calendar features"):
        small()(x, x_mark, y_mark[:, :-1])
    with pytest.raises(ValueError, match="of the horizon are missing"):
        small()(x, x_mark)
    with pytest.raises(ValueError, match="of the history are missing"):
        small()(x, None, y_mark)


def test_inference_mode_gives_the_same_forecasts():
    model, inputs = small(seq_len=96, pred_len=48).eval(), batch(seq_len=96, pred_len=48)
    with torch.inference_mode():
        y = model(*inputs)
    torch.testing.assert_close(y, model(*inputs).detach())
