"""One way to ask any forecasting module: plain ones and those that take a whole batch."""

import math

import pytest
import torch
from torch import nn

from manyheads.core.catalog import create_model
from manyheads.core.errors import UsageError
from manyheads.timeseries.calls import Forecast, check_levels, forecast, training_loss


def batch(n=3):
    return {
        "x": torch.randn(2, 24, n),
        "y": torch.randn(2, 8, n),
        "x_mark": torch.rand(2, 24, 4) - 0.5,
        "y_mark": torch.rand(2, 8, 4) - 0.5,
    }


class Asked(nn.Module):
    """Answers with what it was asked."""

    levels = (0.1, 0.5, 0.9)

    def predict(self, batch, levels=()):
        point = batch["x"][:, -1:] + batch["static"].sum()
        return Forecast(point, torch.stack([point + level for level in levels], -1) if levels else None)

    def loss(self, batch):
        return batch["static"].sum()


def plain():
    sizes = {"d_model": 8, "n_heads": 2, "e_layers": 1, "d_ff": 8}
    return create_model("itransformer", seq_len=24, pred_len=8, **sizes).eval()


def test_a_plain_module_gets_values_and_marks():
    model, given = plain(), batch()
    got = forecast(model, given)
    assert got.quantiles is None
    assert torch.equal(got.point, model(given["x"], given["x_mark"], given["y_mark"]))


def test_a_plain_modules_loss_is_the_squared_error_of_what_is_there():
    model, given = plain(), batch()
    given["y"][0, 3:, 1] = math.nan
    error = (forecast(model, given).point - given["y"]).square()
    torch.testing.assert_close(training_loss(model, given), error[~error.isnan()].mean())


def test_a_module_with_its_own_answers_is_asked():
    given = {**batch(), "static": torch.tensor([[2.0], [3.0]])}
    got = forecast(Asked(), given, [0.1, 0.9])
    torch.testing.assert_close(got.point, given["x"][:, -1:] + 5)
    torch.testing.assert_close(got.quantiles, got.point[..., None] + torch.tensor([0.1, 0.9]))
    assert training_loss(Asked(), given) == 5


@pytest.mark.parametrize(
    ("model", "message"), [(plain, "the model has no quantiles"), (Asked, "has the quantiles 0.1, 0.5, 0.9")]
)
def test_levels_that_a_model_has_not_are_refused(model, message):
    given = {**batch(), "static": torch.zeros(2, 1)}
    with pytest.raises(UsageError, match=f"no quantile 0.2: .*{message}"):
        forecast(model(), given, [0.2])


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ([0.5, 0.1], "quantiles out of order: 0.1 after 0.5"),
        ([0.5, 0.5], "quantiles out of order: 0.5 after 0.5"),
        ([0.0, 0.5], "quantiles: 0.0 is not between 0 and 1"),
        ([0.1, 1.5], "quantiles: 1.5 is not between"),
        ([math.nan], "nan is not between"),
    ],
)
def test_levels_must_rise_between_0_and_1(levels, message):
    with pytest.raises(UsageError, match=message):
        forecast(Asked(), {**batch(), "static": torch.zeros(2, 1)}, levels)
    with pytest.raises(UsageError, match=message.replace("quantiles", "coverages")):
        check_levels(levels, "coverages")
