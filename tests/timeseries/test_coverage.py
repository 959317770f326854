"""What share of the truth 90 % intervals hold on ETTh1, with iTransformer trained by its shipped config.

Marked slow: `pytest -m slow tests/timeseries/test_coverage.py`, one to two minutes on two idle cores. The
months of validation are noisier than those of the test (MSE 0.67 and 0.39), so that split intervals, made of
the one, hold more than they promise of the other; rolling ones find the level.
"""

import json

import numpy as np
import pytest
import torch

from manyheads.apps import cli
from manyheads.core import hub
from manyheads.timeseries.calls import forecast
from manyheads.timeseries.conformal import RollingConformal, SplitConformal
from manyheads.timeseries.data import ForecastData


def errors(model, loader):
    """Absolute errors of all windows, in order."""
    with torch.inference_mode():
        found = [(batch["y"] - forecast(model, batch).point).abs() for batch in loader]
    return torch.cat(found).double().numpy()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_conformal_intervals_on_etth1(tmp_path):
    options = ["--config", "itransformer_etth1_96", "--output", str(tmp_path), "--trainer.accelerator", "cpu"]
    options += ["--model.conformal", "[0.9]"]
    for action in ("fit", "test"):
        assert cli.main(["timeseries", action, *options]) == 0
    figures = json.loads((tmp_path / "test.json").read_text())
    model, config = hub.load_model(tmp_path / "model")
    data = ForecastData("etth1")
    data.setup()
    before, after = errors(model, data.val_dataloader()), errors(model, data.test_dataloader())
    split = SplitConformal.from_json(config.preprocessing["conformal"])
    assert figures["test_coverage_0.9"] == pytest.approx((after <= split.radius).mean(), abs=1e-4)
    assert 0.93 < figures["test_coverage_0.9"] < 0.96
    for step in (24, 96):
        rolling, inside = RollingConformal(before, [0.9], step=step), []
        for each in after[::step]:
            inside.append(each <= rolling.radius()[0])
            rolling.add(each)
        assert 0.87 <= np.mean(inside) <= 0.93
