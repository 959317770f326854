"""DLinear and the decomposition against the library's recorded tensors."""

import pytest
import torch

from manyheads.core.errors import UsageError
from manyheads.timeseries.models.blocks import series_decomp
from manyheads.timeseries.models.dlinear import dlinear


@pytest.mark.parametrize("name", ["shared", "individual"])
def test_outputs_and_every_gradient_are_the_librarys(golden, name):
    case = golden("timeseries", f"tsl_dlinear_a_{name}")
    config = case.config
    model = dlinear(
        config["seq_len"], config["pred_len"], config["moving_avg"], config["individual"], config["enc_in"]
    )
    model.load_state_dict(case.group("param"), strict=True)
    inputs = case.inputs()
    case.check_all(inputs, {"y": model(inputs["x_enc"])}, model)


@pytest.mark.parametrize("name", ["k25", "k25_short"])
def test_decomposition_is_the_official_one(golden, name):
    case = golden("timeseries", f"series_decomp_a_{name}")
    inputs = case.inputs()
    seasonal, trend = series_decomp(inputs["x"], case.config["kernel_size"])
    case.check_all(inputs, {"seasonal": seasonal, "trend": trend})


def test_decomposition_of_a_line_keeps_its_middle():
    line = torch.arange(20.0).view(1, 20, 1)
    seasonal, trend = series_decomp(line, 5)
    torch.testing.assert_close(seasonal[:, 2:-2], torch.zeros(1, 16, 1))
    torch.testing.assert_close(seasonal + trend, line)


@pytest.mark.parametrize("kernel", [0, 4])
def test_a_moving_average_without_centre_is_refused(kernel):
    with pytest.raises(ValueError, match=str(kernel)):
        series_decomp(torch.zeros(1, 8, 1), kernel)
    with pytest.raises(UsageError, match=str(kernel)):
        dlinear(8, 2, moving_avg=kernel)


def test_starts_as_the_mean_of_the_history():
    model, x = dlinear(24, 6), torch.randn(2, 24, 3)
    bias = model.Linear_Seasonal.bias + model.Linear_Trend.bias
    torch.testing.assert_close(model(x), x.mean(1, keepdim=True) + bias[:, None])


def test_individual_maps_touch_their_own_variate_only():
    model, x = dlinear(24, 6, individual=True, n_variates=3), torch.randn(2, 24, 3)
    before = model(x)
    with torch.no_grad():
        model.Linear_Seasonal[1].weight.add_(1)
    changed = (model(x) - before).abs().amax((0, 1)) > 0
    assert changed.tolist() == [False, True, False]


def test_individual_maps_know_their_number_of_variates():
    with pytest.raises(UsageError, match="n_variates"):
        dlinear(24, 6, individual=True)
    with pytest.raises(ValueError, match="3 variates; the input has 4"):
        dlinear(24, 6, individual=True, n_variates=3)(torch.zeros(1, 24, 4))


def test_parameter_count():
    assert sum(p.numel() for p in dlinear(96, 96).parameters()) == 2 * (96 * 96 + 96)
    assert sum(p.numel() for p in dlinear(96, 96, individual=True, n_variates=7).parameters()) == 14 * (
        96 * 96 + 96
    )
