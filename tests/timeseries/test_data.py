from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from manyheads.core.errors import DataError, UsageError
from manyheads.timeseries.calendar import time_features
from manyheads.timeseries.data import ForecastData, split_rows
from manyheads.timeseries.frames import read
from manyheads.timeseries.preprocessing import Preprocessing
from manyheads.timeseries.windows import Batch

ETTH1 = Path(__file__).parents[2] / "timeseries" / "datasets" / "ETTh1.csv"


@pytest.fixture(scope="module")
def etth1() -> ForecastData:
    data = ForecastData("etth1")
    data.setup()
    return data


def hourly(rows: int, columns: int = 1, start: str = "2020-01-01") -> pd.DataFrame:
    rng = np.random.default_rng(rows)
    frame = pd.DataFrame({f"c{i}": rng.normal(i, 1 + i, rows) for i in range(columns)})
    frame.insert(0, "ds", pd.date_range(start, periods=rows, freq="h"))
    return frame


def long(lengths: dict[str, int]) -> pd.DataFrame:
    parts = [hourly(n).rename(columns={"c0": "y"}).assign(unique_id=name) for name, n in lengths.items()]
    return pd.concat(parts)


@pytest.mark.parametrize(
    ("seq_len", "pred_len", "counts"),
    [(96, 96, (8449, 2785, 2785)), (96, 720, (7825, 2161, 2161)), (336, 96, (8209, 2785, 2785))],
)
def test_published_window_counts(seq_len: int, pred_len: int, counts: tuple[int, int, int]) -> None:
    data = ForecastData("etth1", seq_len, pred_len)
    data.setup()
    assert (len(data.train_windows), len(data.val_windows), len(data.test_windows)) == counts


def test_no_test_window_is_dropped(etth1: ForecastData) -> None:
    for loader in (etth1.val_dataloader(), etth1.test_dataloader(), etth1.predict_dataloader()):
        sizes = [len(batch["x"]) for batch in loader]
        assert sum(sizes) == 2785
        assert sizes == [32] * 87 + [1]
    assert sum(len(batch["x"]) for batch in etth1.train_dataloader()) == 264 * 32


def test_windows_are_scaled_by_the_train_rows(etth1: ForecastData) -> None:
    frame = pd.read_csv(ETTH1, float_precision="round_trip")
    values = frame.iloc[:, 1:].to_numpy()
    train = values[:8640]
    scaled = ((values - train.mean(axis=0)) / train.std(axis=0)).astype(np.float32)
    marks = time_features(frame["date"].to_numpy("datetime64[us]"), "h")
    first = {"train_windows": 0, "val_windows": 8640 - 96, "test_windows": 11520 - 96}
    for name, start in first.items():
        windows = getattr(etth1, name)
        for k in (0, 17, len(windows) - 1):
            batch, i = windows.batch(torch.tensor([k])), start + k
            np.testing.assert_allclose(batch["x"][0], scaled[i : i + 96], atol=1e-5)
            np.testing.assert_allclose(batch["y"][0], scaled[i + 96 : i + 192], atol=1e-5)
            np.testing.assert_array_equal(batch["x_mark"][0], marks[i : i + 96])
            np.testing.assert_array_equal(batch["y_mark"][0], marks[i + 96 : i + 192])
    np.testing.assert_allclose(etth1.scaler.mean, train.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(etth1.scaler.scale, train.std(axis=0), rtol=1e-12)


def test_attributes(etth1: ForecastData) -> None:
    assert etth1.columns == ["HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT"]
    assert (etth1.freq, etth1.n_marks) == ("h", 4)
    windows = etth1.train_windows
    etth1.setup("test")
    assert etth1.train_windows is windows  # set up once


def test_preprocessing_survives_json(etth1: ForecastData) -> None:
    saved = json.loads(json.dumps(etth1.preprocessing()))
    made = Preprocessing.from_json(saved)
    assert (made.seq_len, made.pred_len, made.freq, made.missing) == (96, 96, "h", "refuse")
    assert made.scaler.mean.tobytes() == etth1.scaler.mean.tobytes()


@pytest.mark.parametrize(
    ("n", "split", "expected"),
    [
        (17420, "ett_hour", ((0, 8640), (8544, 11520), (11424, 14400))),
        (69680, "ett_minute", ((0, 34560), (34464, 46080), (45984, 57600))),
        (7588, "ratio", ((0, 5311), (5215, 6071), (5975, 7588))),  # int(0.7 n), the rest, int(0.2 n)
    ],
)
def test_split_rows(n: int, split: str, expected: object) -> None:
    assert split_rows(n, split, 96) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "freq", "counts"),
    [
        ("exchange_rate", "D", (5120, 665, 1422)),
        ("national_illness", "W-TUE", (617, 74, 170)),
    ],
)
def test_other_data_sets(name: str, freq: str, counts: tuple[int, int, int]) -> None:
    if not os.environ.get("MANYHEADS_DATA"):
        pytest.skip("MANYHEADS_DATA is not set: exchange_rate and national_illness are not downloaded")
    data = ForecastData(name, 96, 96) if name == "exchange_rate" else ForecastData(name, 36, 24)
    data.setup()
    assert data.freq == freq
    assert (len(data.train_windows), len(data.val_windows), len(data.test_windows)) == counts


def test_each_series_is_split_by_the_same_rule(tmp_path: Path) -> None:
    frame = long({"a": 200, "b": 300})
    frame.to_parquet(tmp_path / "t.parquet")
    data = ForecastData(str(tmp_path / "t.parquet"), seq_len=12, pred_len=6, batch_size=4)
    data.setup()
    assert len(data.train_windows) == (140 - 17) + (210 - 17)
    assert len(data.val_windows) == (20 + 12 - 17) + (30 + 12 - 17)
    assert len(data.test_windows) == (40 + 12 - 17) + (60 + 12 - 17)
    a, b = (s.values for s in read(frame))
    train = np.concatenate([a[:140], b[:210]])
    assert data.scaler.mean[0] == pytest.approx(train.mean(), rel=1e-12)
    last = data.test_windows.batch(torch.tensor([len(data.test_windows) - 1]))
    np.testing.assert_allclose(last["y"][0], data.scaler.transform(b[-6:]), atol=1e-6)
    border = data.test_windows.batch(torch.tensor([34, 35]))  # the last window of a, the first of b
    np.testing.assert_allclose(border["y"][0], data.scaler.transform(a[-6:]), atol=1e-6)
    np.testing.assert_allclose(border["x"][1], data.scaler.transform(b[228:240]), atol=1e-6)


def test_masked_values_are_filled_in_x_and_left_in_y(tmp_path: Path) -> None:
    frame = hourly(200, 2)
    frame.loc[[50, 51, 190], "c0"] = np.nan
    path = tmp_path / "t.csv"
    frame.to_csv(path, index=False)
    with pytest.raises(DataError, match=r"line 52 .*column 'c0': missing value"):
        ForecastData(str(path), 12, 6, 4).setup()
    data = ForecastData(str(path), 12, 6, 4, missing="mask")
    data.setup()
    batch = data.train_windows.batch(torch.tensor([45]))  # rows 45 to 62
    assert not batch["x"].isnan().any()
    assert batch["x"][0, 5, 0] == batch["x"][0, 6, 0] == batch["x"][0, 4, 0]
    ahead = data.train_windows.batch(torch.tensor([36]))  # y is rows 48 to 53
    assert ahead["y"][0].isnan().nonzero().tolist() == [[2, 0], [3, 0]]
    seen = frame["c0"][:140].dropna()
    assert data.scaler.mean[0] == pytest.approx(seen.mean(), rel=1e-12)


def test_too_short(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    long({"a": 200, "tiny": 60}).to_parquet(path)
    with pytest.raises(DataError, match=r"series 'tiny' of 60 rows is too short: the validation part"):
        ForecastData(str(path), 12, 12, 4).setup()
    with pytest.raises(
        DataError, match=r'series .a. has 200 rows; split "ett_hour" takes 14400, use split="ratio"'
    ):
        ForecastData(str(path), 12, 12, 4, split="ett_hour").setup()
    with pytest.raises(
        DataError, match=r"do not fill a batch of 4096; lower batch_size or set drop_last to false"
    ):
        ForecastData(str(path), 12, 1, 4096).setup()


def test_wrong_arguments() -> None:
    with pytest.raises(UsageError, match=r"no data set 'eth1'; did you mean 'etth1'\?"):
        ForecastData("eth1").setup()
    with pytest.raises(DataError, match=r"none.csv: no such file"):
        ForecastData("none.csv").setup()
    with pytest.raises(UsageError, match="seq_len must be 1 or more, not 0"):
        ForecastData(seq_len=0)
    with pytest.raises(DataError, match="unknown frequency 'fortnight'"):
        ForecastData(freq="fortnight")


class Recorder(LightningModule):
    """Notes the first value of each train batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, float]] = []

    def training_step(self, batch: Batch) -> Tensor:
        self.seen.append((self.current_epoch, batch["x"].double().sum().item()))
        return self.weight**2

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(
    data: ForecastData, folder: Path, max_steps: int = -1, ckpt: Path | None = None
) -> list[tuple[int, float]]:
    module = Recorder()
    saving = ModelCheckpoint(folder, save_last=True, every_n_train_steps=1, save_top_k=0)
    trainer = Trainer(
        max_epochs=3,
        max_steps=max_steps,
        accelerator="cpu",
        logger=False,
        callbacks=[saving],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt)
    return module.seen


@pytest.mark.parametrize("stop", [4, 8, 11])
def test_a_fit_resumes_at_the_right_batch(tmp_path: Path, stop: int) -> None:
    path = tmp_path / "t.parquet"
    hourly(100).to_parquet(path)

    def data() -> ForecastData:
        return ForecastData(str(path), 6, 3, batch_size=7, seed=5)  # 62 train windows: 8 batches

    whole = fit(data(), tmp_path / "whole")
    assert len(whole) == 24
    assert [epoch for epoch, _ in whole] == [0] * 8 + [1] * 8 + [2] * 8
    assert len({value for _, value in whole}) == 24  # three different orders
    begun = fit(data(), tmp_path / "parts", max_steps=stop)
    rest = fit(data(), tmp_path / "parts", ckpt=tmp_path / "parts" / "last.ckpt")
    assert begun + rest == whole
