"""The seasonal naive forecast."""

import pytest
import torch

from manyheads.core.errors import UsageError
from manyheads.timeseries.models.seasonal_naive import seasonal_naive


@pytest.mark.parametrize("pred_len", [1, 4, 5, 11])
def test_a_periodic_series_is_forecast_exactly(pred_len):
    season = torch.randn(5, 3)
    series = season.repeat(6, 1)[None]  # [1, 30, 3]
    model = seasonal_naive(13, pred_len, season_length=5)
    torch.testing.assert_close(model(series[:, :13]), series[:, 13 : 13 + pred_len])


def test_a_season_of_one_repeats_the_last_value():
    x = torch.randn(2, 4, 3)
    torch.testing.assert_close(seasonal_naive(4, 3, season_length=1)(x), x[:, -1:].expand(2, 3, 3))


def test_has_nothing_to_save():
    assert not seasonal_naive(24, 24).state_dict()


@pytest.mark.parametrize("args", [(23, 5, 24), (24, 0, 24), (24, 5, 0)])
def test_impossible_lengths_are_refused(args):
    with pytest.raises(UsageError, match="seasonal_naive"):
        seasonal_naive(*args)
