"""`manyheads quickstart`: iTransformer on ETTh1, 96 hours to the next 96, from data to a picture.

Trains a few epochs by the published protocol, measures on the test split beside the published figure and two
baselines, saves a model folder, runs a batch job over a history whose future is known, and draws both.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything

from manyheads.apps.callbacks import EpochLines
from manyheads.apps.jobs import JobOptions, run_job
from manyheads.apps.training import quieten, write_model_folder
from manyheads.core.errors import UsageError
from manyheads.timeseries.data import ForecastData
from manyheads.timeseries.plots import Panel, draw_forecasts
from manyheads.timeseries.task import Forecaster

if TYPE_CHECKING:
    import pandas as pd

SEQ_LEN = PRED_LEN = 96
TEST_END = 14_400  # rows of the published protocol; the forecast's truth is the last window of the test split
PUBLISHED = {"mse": 0.386, "mae": 0.405}  # iTransformer (ICLR 2024), table 10
SHOWN = 2 * SEQ_LEN  # hours of history in the picture


def train(task: LightningModule, data: LightningDataModule, epochs: int, lines: bool) -> dict[str, float]:
    """Fit for some epochs and return the test figures: mse, mae, windows."""
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="auto",
        devices=1,
        deterministic=True,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        callbacks=[EpochLines()] if lines else [],
    )
    if epochs:
        trainer.fit(task, data)
    figures = trainer.test(task, data, verbose=False)[0]
    return {
        "mse": figures["test_mse"],
        "mae": figures["test_mae"],
        "windows": int(figures["test_windows"]),
    }


def baselines(data: LightningDataModule, seed: int) -> dict[str, dict[str, float]]:
    """Measure what a forecaster must beat: repeating yesterday, and one linear map."""
    naive = Forecaster("seasonal_naive", {"season_length": 24}, SEQ_LEN, PRED_LEN)
    seed_everything(seed)
    linear = Forecaster("dlinear", None, SEQ_LEN, PRED_LEN, learning_rate=1e-3)
    return {
        "seasonal_naive": train(naive, data, 0, lines=False),
        "dlinear": train(linear, data, 10, lines=False),
    }


def run(output: Path, epochs: int = 4, seed: int = 2023) -> int:
    """Run the tour and fill a folder: `model/`, `forecasts/`, `metrics.json`, `forecast.png`, `history.csv`.

    Args:
        output: The folder; it must be empty or not exist.
        epochs: Epochs of training; the published run has ten.
        seed: Seed of weights, dropout and window order.

    Raises:
        UsageError: The folder holds something.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"{output} is not empty: remove it, or choose another folder with -o")
    start = time.perf_counter()
    quieten()
    data = ForecastData("etth1", SEQ_LEN, PRED_LEN, seed=seed)
    print(f"iTransformer on ETTh1, {SEQ_LEN} hours -> next {PRED_LEN}, {epochs} epochs")
    seed_everything(seed)
    sizes: dict[str, bool | int | float | str | None] = {"d_model": 256, "d_ff": 256, "e_layers": 2}
    task = Forecaster("itransformer", sizes, SEQ_LEN, PRED_LEN)
    metrics: dict[str, Any] = {**train(task, data, epochs, lines=True), "epochs": epochs, "seed": seed}
    metrics["baselines"] = baselines(data, seed)
    metrics["published"] = PUBLISHED
    output.mkdir(parents=True, exist_ok=True)
    write_model_folder(
        "timeseries",
        task,
        data,
        output / "model",
        {k: metrics[k] for k in ("mse", "mae", "windows", "epochs", "seed")},
    )
    history, truth = split_history(data.path, output / "history.csv")
    options = JobOptions(
        model=str(output / "model"), inputs=[str(output / "history.csv")], output=output / "forecasts"
    )
    run_job(options)
    draw(history, truth, read_job(output / "forecasts"), output / "forecast.png")
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    report(metrics, output, time.perf_counter() - start)
    return 0


def split_history(source: Path, target: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Write the rows before the last test window's future to a CSV; return its end and that future."""
    import pandas as pd

    table = pd.read_csv(source, parse_dates=["date"])
    cut = TEST_END - PRED_LEN
    table[:cut].to_csv(target, index=False)
    return table[cut - SHOWN : cut], table[cut:TEST_END]


def read_job(folder: Path) -> pd.DataFrame:
    """Read all parts of a job's output."""
    import pandas as pd

    return pd.concat([pd.read_parquet(part) for part in sorted(folder.glob("part-*.parquet"))])


def draw(history: pd.DataFrame, truth: pd.DataFrame, forecasts: pd.DataFrame, path: Path) -> None:
    """Draw history, truth and forecast, one panel a variate."""
    columns = [column for column in history.columns if column != "date"]
    by_column = {column: forecasts[forecasts["unique_id"] == column] for column in columns}
    panels = [
        Panel(
            column,
            history["date"].to_numpy(),
            history[column].to_numpy(),
            forecast["ds"].to_numpy(),
            forecast["yhat"].to_numpy(),
            truth=truth[column].to_numpy(),
        )
        for column, forecast in by_column.items()
    ]
    draw_forecasts(panels, path, "ETTh1: the last test window, 96 hours ahead")


def report(metrics: dict[str, Any], output: Path, seconds: float) -> None:
    """Print the figures side by side and say what to do next."""
    print(f"\ntest split, {metrics['windows']} windows     MSE     MAE")
    rows = [(f"iTransformer, {metrics['epochs']} epochs", metrics), ("  published, 10 epochs", PUBLISHED)]
    rows += [(name, figures) for name, figures in metrics["baselines"].items()]
    for name, figures in rows:
        print(f"{name:26} {figures['mse']:.4f}  {figures['mae']:.4f}")
    print(
        f"\n{output}/ filled in {seconds:.0f} s: model/  forecasts/  metrics.json  forecast.png  history.csv"
    )
    print("next, on a CSV or parquet file of yours (a date column and value columns, or unique_id, ds, y):")
    print(f"  manyheads predict {output / 'model'} YOUR.csv -o forecasts")
    print("or the full run of ten epochs:")
    print("  manyheads timeseries fit --config itransformer_etth1_96")
