"""Published figures, trained from scratch by the shipped configs: `manyheads timeseries fit` and `test`.

The runs are marked slow: `pytest -m slow tests/timeseries/test_reproduction.py`. On two idle cores each takes
one to two minutes, PatchTST nine. The bounds of MSE are the published figures and 0.005, of S-Mamba 0.01.
"""

import json
import os

import pytest
from lightning.pytorch import Trainer

from manyheads.apps import cli
from manyheads.timeseries.data import ForecastData
from manyheads.timeseries.task import Forecaster


def figures_of(config, folder):
    """Fit and test a shipped config; return what `test` wrote."""
    options = ["--config", config, "--output", str(folder), "--trainer.accelerator", "cpu"]
    for action in ("fit", "test"):
        assert cli.main(["timeseries", action, *options]) == 0
    return json.loads((folder / "test.json").read_text())


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("config", "windows", "mse", "mae"),
    [
        # Published: 0.386 and 0.405 (arXiv 2310.06625, table 10); its code here: 0.3858 and 0.4045.
        ("itransformer_etth1_96", 2785, 0.388, 0.407),
        # The same table: 0.441 and 0.436, 0.487 and 0.458, 0.503 and 0.491, 0.086 and 0.206.
        ("itransformer_etth1_192", 2689, 0.446, 0.441),
        ("itransformer_etth1_336", 2545, 0.492, 0.463),
        ("itransformer_etth1_720", 2161, 0.508, 0.496),
        ("itransformer_exchange_96", 1422, 0.091, 0.211),
        # The same table: 0.386 and 0.400.
        ("dlinear_etth1_96", 2785, 0.386, 0.400),
        # Published: 0.386 and 0.405 (arXiv 2403.11144).
        ("s_mamba_etth1_96", 2785, 0.396, 0.415),
        # Published: 0.414 and 0.419 (arXiv 2310.06625, table 10); the library's own script: 0.381 and 0.398.
        ("patchtst_etth1_96", 2785, 0.386, 0.403),
    ],
)
def test_published_figures(tmp_path, config, windows, mse, mae):
    if "exchange" in config and not os.environ.get("MANYHEADS_DATA"):
        pytest.skip("MANYHEADS_DATA is not set: exchange_rate is not downloaded")
    figures = figures_of(config, tmp_path)
    assert figures["test_windows"] == windows
    assert figures["test_mse"] <= mse
    assert figures["test_mae"] <= mae


def test_seasonal_naive_on_etth1_96():
    """Needs no training: guards splits, scaling and metrics. The figures were checked in plain numpy."""
    task = Forecaster("seasonal_naive", {"season_length": 24})
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    (figures,) = trainer.test(task, ForecastData("etth1"), verbose=False)
    assert figures["test_windows"] == 2785
    assert figures["test_mse"] == pytest.approx(0.512225, abs=1e-6)
    assert figures["test_mae"] == pytest.approx(0.433303, abs=1e-6)
