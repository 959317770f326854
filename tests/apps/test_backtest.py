"""`manyheads timeseries backtest` and `plot`: figures, folders, training again, errors in a line or two."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib import image

from manyheads.apps import cli, rolling
from manyheads.apps.backtest import read_options
from manyheads.core.errors import UsageError
from manyheads.timeseries.backtest import RollingModel
from manyheads.timeseries.layout import ColumnNames

FILES = {"backtest.json", "backtest.csv", "windows.csv", "backtest.png"}


def call(*args: object) -> int:
    return cli.main([str(arg) for arg in args])


def table(rows: int = 600, seed: int = 0) -> pd.DataFrame:
    hours = pd.date_range("2024-01-01", periods=rows, freq="h", name="date")
    phase = np.arange(rows)[:, None] * 2 * np.pi / 24 + np.array([0.0, 1.0, 2.0])
    noise = np.random.default_rng(seed).normal(size=(rows, 3))
    return pd.DataFrame(np.sin(phase) + 0.3 * noise, columns=["a", "b", "c"], index=hours)


@pytest.fixture(scope="session")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with hours.csv, tiny.yaml and the run of it, tested."""
    folder = tmp_path_factory.mktemp("fitted")
    table().to_csv(folder / "hours.csv")
    (folder / "tiny.yaml").write_text(
        f"""seed_everything: 3
model:
  name: itransformer
  arguments: {{d_model: 16, d_ff: 16, n_heads: 2, e_layers: 1}}
  learning_rate: 1.0e-3
data:
  dataset: {folder / "hours.csv"}
  seq_len: 24
  pred_len: 12
  batch_size: 32
trainer:
  max_epochs: 2
output: {folder / "run"}
"""
    )
    for action in ("fit", "test"):
        assert call("timeseries", action, "--config", folder / "tiny.yaml") == 0
    return folder


def results(folder: Path) -> dict[str, Any]:
    assert {file.name for file in folder.iterdir()} == FILES
    return dict(json.loads((folder / "backtest.json").read_text()))


def test_a_run_is_measured_as_test_measures_it(
    fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("timeseries", "backtest", "--config", fitted / "tiny.yaml", "-o", tmp_path / "out") == 0
    printed = capsys.readouterr()
    found, tested = results(tmp_path / "out"), json.loads((fitted / "run/test.json").read_text())
    assert found["windows"] == tested["test_windows"] == 109
    assert found["overall"]["mse_scaled"] == pytest.approx(tested["test_mse"], rel=1e-6)
    assert found["overall"]["mae_scaled"] == pytest.approx(tested["test_mae"], rel=1e-6)
    assert found["overall"]["targets"] == 109 * 12 * 3
    assert [row["unique_id"] for row in found["series"]] == ["a", "b", "c"]
    assert (found["seed"], found["season"], found["published"], found["refits"]) == (3, 24, None, [])
    mean = np.mean([row["mae"] for row in found["series"]])
    assert found["overall"]["mae"] == pytest.approx(mean)
    train = table().to_numpy()[:420]
    naive = np.abs(train[24:] - train[:-24]).mean(axis=0)
    for row, scale in zip(found["series"], naive, strict=True):
        assert row["mase"] == pytest.approx(row["mae"] / scale)
    with (tmp_path / "out/windows.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 109
    assert (rows[0]["ds"], rows[-1]["ds"]) == ("2024-01-21 00:00:00", "2024-01-25 12:00:00")
    mse = np.mean([float(row["mse_scaled"]) for row in rows])
    assert mse == pytest.approx(tested["test_mse"], rel=1e-5)
    assert pd.read_csv(tmp_path / "out/backtest.csv")["mase"].tolist() == [r["mase"] for r in found["series"]]
    assert "109 windows" in printed.err
    assert f"{tested['test_mse']:.4f}" in printed.out
    assert "published" not in printed.out
    assert image.imread(tmp_path / "out/backtest.png").shape[0] > 400


def test_a_folder_and_a_file_take_the_last_windows(
    fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = table(80, 1).reset_index().melt("date", var_name="unique_id", value_name="y")
    long.rename(columns={"date": "ds"}).to_parquet(tmp_path / "long.parquet")
    args = (fitted / "run/model", tmp_path / "long.parquet", "--windows", 3, "--step", 5)
    options = ("--conformal", "split", "--levels", "0.2,0.8", "--json", "-o", tmp_path / "out")
    assert call("timeseries", "backtest", *args, *options) == 0
    printed = capsys.readouterr()
    found = results(tmp_path / "out")
    assert json.loads(printed.out) == found
    assert printed.err == ""
    assert (found["windows"], found["split"]) == (9, "last rows")
    overall = found["overall"]
    assert 0 < overall["coverage_0.6"] < 1
    assert overall["below_0.2"] < overall["below_0.8"]
    assert overall["width_0.6"] > 0 < overall["wql"]
    assert [row["windows"] for row in found["series"]] == [3, 3, 3]


def test_rolling_intervals_cover(fitted: Path, tmp_path: Path) -> None:
    args = ("--conformal", "rolling", "--levels", "0.1,0.9", "--quiet", "-o", tmp_path / "out")
    assert call("timeseries", "backtest", fitted / "run", *args) == 0
    found = results(tmp_path / "out")
    assert 0.7 < found["overall"]["coverage_0.8"] < 0.9
    rows = pd.read_csv(tmp_path / "out/windows.csv")
    assert rows["coverage_0.8"].mean() == pytest.approx(found["overall"]["coverage_0.8"], rel=1e-5)


def test_training_again_takes_what_is_known_and_no_more(
    fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows after the second training changed: both trainings, and the figures before them, are the same."""
    plain_ask = RollingModel.ask

    def ask(model: RollingModel, *args: Any) -> Any:
        assert not any(module.training for module in model.model.modules())
        return plain_ask(model, *args)

    monkeypatch.setattr(RollingModel, "ask", ask)
    second = table()
    second.iloc[560:] += 5.0  # the second training's cutoff is row 540
    second.to_csv(tmp_path / "changed.csv")
    config = (fitted / "tiny.yaml").read_text()
    (tmp_path / "changed.yaml").write_text(
        config.replace(str(fitted / "hours.csv"), f"{tmp_path}/changed.csv")
    )
    found = {}
    for name, path in (("plain", fitted / "tiny.yaml"), ("changed", tmp_path / "changed.yaml")):
        args = ("--config", path, "--refit", 3, "--step", 20, "--quiet", "-o", tmp_path / name)
        assert call("timeseries", "backtest", *args) == 0
        found[name] = results(tmp_path / name)
        for each in found[name]["refits"]:
            del each["seconds"]
    plain = found["plain"]
    assert plain["refits"] == found["changed"]["refits"]
    assert [each["before_window"] for each in plain["refits"]] == [0, 3]
    assert [each["train_rows"] for each in plain["refits"]] == [428, 488]
    assert {each["seed"] for each in plain["refits"]} == {3}
    assert plain["refits"][0]["best_val_loss"] != plain["refits"][1]["best_val_loss"]
    rows = {name: pd.read_csv(tmp_path / name / "windows.csv") for name in found}
    assert len(rows["plain"]) == 6
    figures = ["ds", "targets", "mae_scaled", "mse_scaled"]
    pd.testing.assert_frame_equal(rows["plain"][figures][:4], rows["changed"][figures][:4])
    assert rows["plain"]["mse_scaled"][4] != rows["changed"]["mse_scaled"][4]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_backtest_leaves_nothing(
    fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signum: signal.Signals
) -> None:
    plain = RollingModel.ask

    def ask(*args: Any) -> Any:
        os.kill(os.getpid(), signum)
        return plain(*args)

    monkeypatch.setattr(RollingModel, "ask", ask)
    assert call("timeseries", "backtest", fitted / "run", "-o", tmp_path / "out") == 128 + signum
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_backtest_is_replaced_and_nothing_else(
    fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ("timeseries", "backtest", fitted / "run", "--windows", 1, "--quiet", "-o", tmp_path / "out")
    assert call(*args) == 0
    assert call(*args, "--step", 2) == 0
    assert results(tmp_path / "out")["step"] == 2
    (tmp_path / "out/mine.txt").write_text("kept")
    assert call(*args) == 2
    assert "holds other files" in capsys.readouterr().err
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--step", "0"], "--step must be at least 1, not 0"),
        (["--windows", "0"], "--windows must be at least 1, not 0"),
        (["--refit", "often"], "--refit takes `none` or a number of windows"),
        (["--levels", "0.9,0.1"], "--levels takes numbers between 0 and 1, rising"),
        (["--levels", "0.1,1.5"], "--levels takes numbers between 0 and 1, rising"),
        (["--leves", "0.1"], "did you mean '--levels'?"),
        (["--split", "ratio"], "--split is for a FILE"),
        (["--levels", "0.1,0.9"], "the model has no quantiles; --conformal split or rolling makes intervals"),
        (
            ["--conformal", "split", "--levels", "0.1,0.8"],
            "conformal intervals have two ends: level 0.8 needs 0.2 too",
        ),
        (["--windows", "110"], "has 109 windows in its test part at step 1, not 110"),
    ],
)
def test_wrong_options_of_a_run(
    fitted: Path, tmp_path: Path, args: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("timeseries", "backtest", fitted / "run", *args, "-o", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert says in error
    assert len(error.strip().splitlines()) <= 2
    assert list(tmp_path.iterdir()) == []


def test_what_a_folder_and_a_file_are_refused_for(
    fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table(40).to_csv(tmp_path / "short.csv")
    model = fitted / "run/model"
    for args, code, says in (
        ([], 2, "--config is needed, or MODEL and FILE"),
        ([model], 2, "is no run folder: give a FILE"),
        ([tmp_path / "none", "x.csv"], 2, "no folder"),
        ([model, "x.csv", "--config", "itransformer_etth1_96"], 2, "not both"),
        ([model, tmp_path / "short.csv", "--refit", "2"], 2, "--refit trains by a config"),
        ([model, tmp_path / "short.csv"], 1, "its last fifth has no window of 24 + 12 rows; give --windows"),
        (
            [model, tmp_path / "short.csv", "--windows", "9"],
            1,
            "take 24 + 20 rows; lower --windows or --step",
        ),
        ([model, tmp_path / "none.csv"], 1, "no such file"),
        ([model, "etth9"], 2, "did you mean 'etth1'?"),
        (["--config", fitted / "tiny.yaml", "--conformal", "spilt"], 2, "invalid choice"),
    ):
        assert call("timeseries", "backtest", *args) == code
        error = capsys.readouterr().err
        assert says in error
        assert len(error.strip().splitlines()) <= 2


def test_help_and_wrong_options_import_no_torch() -> None:
    code = """import sys; from manyheads.apps import cli
for tool in ("backtest", "plot"):
    try:
        cli.main(["timeseries", tool, "--help"])
    except SystemExit as done:
        assert done.code == 0
    assert cli.main(["timeseries", tool, "m", "f", "-o", "x.png", "--steb", "1"]) == 2
assert cli.main(["timeseries", "backtest", "--config", "itransformer_etth1_96", "--step", "0"]) == 2
assert cli.main(["timeseries", "backtst"]) == 2
assert not {"torch", "numpy", "pandas", "lightning"} & set(sys.modules)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "did you mean '--step'?" in done.stderr
    assert "did you mean 'backtest'?" in done.stderr
    assert "--conformal" in done.stdout


def test_options_of_a_config_by_name() -> None:
    read = read_options(["--config", "itransformer_etth1_96", "--refit", "7", "--levels", "[0.1,0.9]"])
    assert read.config is not None
    assert read.config.name == "itransformer_etth1_96.yaml"
    assert (read.refit, read.levels, read.step, read.windows) == (7, (0.1, 0.9), 1, None)


def test_the_published_figure_stands_where_the_protocol_is_its_own() -> None:
    def subject(**changes: Any) -> Any:
        treatment = SimpleNamespace(covariates=(), scaling=changes.pop("scaling", "global"))
        names: ColumnNames = {"targets": changes.pop("targets", None)}
        of = SimpleNamespace(
            treatment=treatment, seq_len=96, pred_len=96, missing=changes.pop("missing", "refuse"), **names
        )
        made = {"dataset": "etth1", "split": "ett_hour", "config": SimpleNamespace(name="itransformer")}
        return SimpleNamespace(of=of, **{**made, **changes})

    found = rolling.published_figure(subject())
    assert found is not None
    assert (found.mse, found.mae) == (0.386, 0.405)
    for change in (
        {"split": "ratio"},
        {"dataset": "ETTh1.csv", "split": "ratio"},
        {"scaling": "series"},
        {"targets": ["OT"]},
        {"missing": "mask"},
    ):
        assert rolling.published_figure(subject(**change)) is None


def test_plots(fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, file = fitted / "run/model", fitted / "hours.csv"
    sizes = {}
    for name, args in {
        "all": [],
        "one": ["--series", "b"],
        "truth": ["--truth"],
        "attention": ["--attention"],
        "head": ["--attention", "--head", "2", "--windows", "3"],
    }.items():
        assert call("timeseries", "plot", model, file, "-o", tmp_path / f"{name}.png", *args) == 0
        sizes[name] = image.imread(tmp_path / f"{name}.png")
    assert sizes["all"].shape[0] > 1.4 * sizes["one"].shape[0]
    assert sizes["all"].shape == sizes["truth"].shape
    assert not np.array_equal(sizes["all"], sizes["truth"])
    assert not np.array_equal(sizes["attention"], sizes["head"])
    capsys.readouterr()
    for args, code, says in (
        (["-o", tmp_path / "x.png", "--series", "d"], 2, "has no series 'd'"),
        (["-o", tmp_path / "x.png", "--attention", "--head", "3"], 2, "the model has 2 heads"),
        (["-o", tmp_path / "x.png", "--attention", "--layer", "2"], 2, "the model has 1 layers"),
        (["-o", tmp_path / "x.png", "--levels", "0.1,0.9"], 2, "the model has no quantiles"),
        (["-o", tmp_path / "x.doc"], 2, "a picture ends in .png, .pdf, .svg"),
        (["-o", tmp_path / "x.png", "--head", "1"], 2, "--head is for --attention"),
    ):
        assert call("timeseries", "plot", model, file, *args) == code
        assert says in capsys.readouterr().err
    assert len(list(tmp_path.iterdir())) == 5


def test_split_must_be_one_of_the_rules() -> None:
    with pytest.raises(UsageError, match="invalid choice"):
        read_options(["m", "f", "--split", "half"])
