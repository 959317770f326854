from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from manyheads.core.catalog import create_model
from manyheads.core.errors import BadRecord, DataError, UsageError
from manyheads.core.predictor import run
from manyheads.timeseries import sources
from manyheads.timeseries.calls import Forecast
from manyheads.timeseries.conformal import SplitConformal
from manyheads.timeseries.covariates import Covariates, Role
from manyheads.timeseries.data import ForecastData
from manyheads.timeseries.predictor import Predictor
from manyheads.timeseries.preprocessing import Preprocessing
from manyheads.timeseries.scaling import SeriesScaler, StandardScaler
from manyheads.timeseries.windows import Batch

L, P, T = 12, 4, 40
NAMED = {
    "targets": ["y"],
    "past": ["wind"],
    "future": ["price", "promo"],
    "static": ["size", "shop"],
    "categorical": ["promo", "shop"],
}
COVARIATES = Covariates(
    Role(("wind",)), Role(("price",), {"promo": ("no", "yes")}), Role(("size",), {"shop": ("a", "b")})
)
SCALERS = {
    "covariates": COVARIATES.to_json(),
    "covariate_scaler": {
        "columns": ["wind", "price", "size"],
        "mean": [1.0, 2.0, 3.0],
        "scale": [2.0, 4.0, 5.0],
    },
    "unseen": "refuse",
}
GLOBAL = {"columns": ["y"], "mean": [10.0], "scale": [2.0]}


class Told(nn.Module):
    """Forecasts what it was told, so that all of it shows; quantiles lie 10 * level from that."""

    levels: tuple[float, ...] | None = (0.1, 0.9)

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[Batch] = []

    def predict(self, batch: Batch, levels: Sequence[float] = ()) -> Forecast:
        self.batches.append(batch)
        assert batch["y"].isnan().all()
        length = batch["x"].shape[1]
        told = batch["future"][:, length:].sum(-1, keepdim=True) + batch["past"].sum((1, 2))[:, None, None]
        point = batch["x"][:, -1:] + told + batch["static"].sum(-1)[:, None, None]
        return Forecast(point, point[..., None] + 10 * torch.tensor(levels) if levels else None)

    def loss(self, batch: Batch) -> Tensor:
        return batch["x"].sum()


def predictor(model: nn.Module | None = None, **changes: object) -> Predictor:
    saved: dict[str, Any] = {
        "seq_len": L,
        "pred_len": P,
        "columns": ["y"],
        "targets": ["y"],
        "time_column": None,
        "id_column": None,
        "freq": "h",
        "missing": "refuse",
        "time_features": ["hour_of_day", "day_of_week", "day_of_month", "day_of_year"],
        "scaler": GLOBAL,
        **SCALERS,
        **changes,
    }
    return Predictor(model or Told(), Preprocessing.from_json(saved))


def shop(name: str, rows: int = T, ahead: int = P) -> pd.DataFrame:
    rng = np.random.default_rng(sum(map(ord, name)))
    total = rows + ahead
    frame = pd.DataFrame(
        {
            "unique_id": name,
            "ds": pd.date_range("2020-01-01", periods=total, freq="h"),
            "y": rng.normal(10.0, 2.0, total).round(3),
            "wind": rng.normal(1.0, 2.0, total).round(3),
            "price": rng.normal(2.0, 4.0, total).round(3),
            "promo": rng.choice(["no", "yes"], total),
            "size": 4.0 + len(name),
            "shop": "ab"[sum(map(ord, name)) % 2],
        }
    ).astype({"promo": object, "shop": object})
    frame.loc[rows:, ["y", "wind"]] = np.nan
    return frame


def shops(*names: str) -> pd.DataFrame:
    return pd.concat([shop(name, T + i) for i, name in enumerate(names)], ignore_index=True)


def expected(frame: pd.DataFrame, mean: float = 10.0, scale: float = 2.0) -> np.ndarray:
    """What `Told` forecasts for one series whose last P rows are its future."""
    known, ahead = frame.iloc[-P - L : -P], frame.iloc[-P:]
    told = (ahead["price"] - 2) / 4 + np.where(ahead["promo"] == "yes", 2.0, 1.0)
    past, static = ((known["wind"] - 1) / 2).sum(), (frame["size"].iloc[0] - 3) / 5
    code = 1 + "ab".index(frame["shop"].iloc[0])
    x = (known["y"].iloc[-1] - mean) / scale
    return np.asarray((x + told + past + static + code) * scale + mean)


def save(frame: pd.DataFrame, path: Path, group: int = 17) -> Path:
    if path.name.endswith(".parquet"):
        frame.to_parquet(path, row_group_size=group)
    else:
        frame.to_csv(path, index=False)
    return path


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz", "t.parquet", "frame"])
def test_rows_hold_quantiles_in_their_own_units(tmp_path: Path, name: str) -> None:
    frame = shops("a", "bb", "c")
    made = predictor()
    found = made.predict(frame if name == "frame" else save(frame, tmp_path / name))
    assert list(found.columns) == ["unique_id", "ds", "yhat", "yhat_q0.1", "yhat_q0.9"] == list(made.columns)
    for i, ident in enumerate(["a", "bb", "c"]):
        mine, rows = frame[frame["unique_id"] == ident], found[found["unique_id"] == ident]
        np.testing.assert_allclose(rows["yhat"], expected(mine), rtol=1e-5)
        np.testing.assert_allclose(rows["yhat_q0.9"] - rows["yhat"], 10 * 0.9 * 2.0, rtol=1e-5)
        assert rows["ds"].tolist() == mine["ds"].iloc[-P:].tolist()
        assert rows["ds"].iloc[0] == pd.Timestamp("2020-01-01") + pd.Timedelta(T + i, "h")


@pytest.mark.parametrize("block", [40, 300, 8 << 20])
@pytest.mark.parametrize("ahead", [P, P + 1, 60])
def test_blocks_do_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, ahead: int
) -> None:
    """A long future, and empty stretches in the history, whatever is held at a time."""
    frame = pd.concat([shop("a", T, ahead), shop("b", T, ahead)], ignore_index=True)
    frame.loc[T - 20 : T - 2, ["y"]] = np.nan  # one value, the last, after a long gap
    made = predictor(missing="mask")
    whole = made.predict(frame)
    monkeypatch.setattr(sources, "BLOCK", block)
    monkeypatch.setattr(sources, "BATCH", block // 20)
    for name in ("t.csv", "t.parquet"):
        pd.testing.assert_frame_equal(made.predict(save(frame, tmp_path / name)), whole)


@pytest.mark.parametrize("name", ["t.csv", "t.parquet", "frame"])
def test_the_future_may_be_a_second_table(tmp_path: Path, name: str) -> None:
    frame = shops("a", "bb")
    whole = predictor().predict(frame)
    ahead = frame[frame["y"].isna()][["price", "ds", "promo", "unique_id"]].sort_values("ds")
    known = frame[frame["y"].notna()]
    future = ahead if name == "frame" else save(ahead, tmp_path / name)
    pd.testing.assert_frame_equal(predictor().predict(known, future=future), whole)
    source = save(known, tmp_path / "known.csv")
    pd.testing.assert_frame_equal(predictor().predict(str(source), future=future), whole)
    half = frame.drop(index=frame[frame["y"].isna()].groupby("unique_id").tail(2).index)
    rest = ahead.groupby("unique_id").tail(2)
    pd.testing.assert_frame_equal(predictor().predict(half, future=rest), whole)


def test_a_wide_table_has_a_future_too(tmp_path: Path) -> None:
    frame = shop("w").drop(columns="unique_id")
    found = predictor().predict(save(frame, tmp_path / "w.csv"))
    np.testing.assert_allclose(found["yhat"], expected(frame), rtol=1e-5)
    ahead = frame[frame["y"].isna()][["ds", "price", "promo"]]
    pd.testing.assert_frame_equal(predictor().predict(tmp_path / "w.csv"), found)
    known = save(frame[frame["y"].notna()], tmp_path / "v.csv")
    assert predictor().predict(known, future=ahead)["yhat"].tolist() == found["yhat"].tolist()


def test_a_shorter_horizon_is_cut_and_a_longer_one_refused() -> None:
    frame = shops("a", "bb")
    whole = predictor().predict(frame)
    two = predictor().predict(frame, horizon=2)
    assert two["yhat"].tolist() == [*whole["yhat"][:2], *whole["yhat"][P : P + 2]]
    pd.testing.assert_frame_equal(predictor().predict(frame, horizon=P), whole)
    for wrong in (P + 1, 0, -1):
        with pytest.raises(UsageError, match=f"horizon {wrong}: .* forecast 1 to 4 steps"):
            predictor().predict(frame, horizon=wrong)


def test_quantiles_asked_for() -> None:
    frame, made = shops("a"), predictor()
    upper = made.predict(frame, quantiles=[0.9])
    assert list(upper.columns) == ["unique_id", "ds", "yhat", "yhat_q0.9"]
    assert list(made.columns)[3:] == ["yhat_q0.1", "yhat_q0.9"]  # the predictor stays as it is
    for wrong, message in (
        ([0.9, 0.1], "quantiles out of order: 0.1 after 0.9"),
        ([0.2], "no quantile 0.2: the model has the quantiles 0.1, 0.9"),
        ([1.5], "1.5 is not between 0 and 1"),
    ):
        with pytest.raises(UsageError, match=message):
            made.predict(frame, quantiles=wrong)
    any_level = Told()
    any_level.levels = None
    assert list(predictor(any_level).columns)[3:] == ["yhat_q0.1", "yhat_q0.5", "yhat_q0.9"]
    assert list(predictor(any_level).predict(frame, quantiles=[0.25]).columns)[3:] == ["yhat_q0.25"]


def test_scaling_by_series_window_or_not_at_all() -> None:
    frame = shops("a", "bb")
    scaler = SeriesScaler({"bb": 0}, ("y",), np.array([[7.0]]), np.array([[3.0]]))
    found = predictor(scaling="series", series_scaler=scaler.to_json()).predict(frame)
    a, bb = (frame[frame["unique_id"] == name] for name in ("a", "bb"))
    context = a["y"].iloc[-P - L : -P]
    np.testing.assert_allclose(found["yhat"][:P], expected(a, context.mean(), context.std(ddof=0)), rtol=1e-5)
    np.testing.assert_allclose(found["yhat"][P:], expected(bb, 7.0, 3.0), rtol=1e-5)
    identity = StandardScaler.identity(["y"]).to_json()
    for scaling in ("window", "none"):
        raw = predictor(scaling=scaling, scaler=identity).predict(frame)
        np.testing.assert_allclose(raw["yhat"][P:], expected(bb, 0.0, 1.0), rtol=1e-5)


def test_masked_gaps_are_told_apart() -> None:
    frame = shop("a")
    frame.loc[T - 3, "y"] = np.nan
    frame.loc[T - L, "wind"] = np.nan
    frame.loc[T - 1, "promo"] = None
    frame.loc[T + 2, "price"] = np.nan
    model = Told()
    predictor(model, missing="mask").predict(frame)
    (batch,) = model.batches
    assert batch["observed"][0, :, 0].tolist() == [True] * 9 + [False, True, True]
    assert batch["x"][0, -3, 0] == batch["x"][0, -4, 0]
    assert batch["past"][0, 0, 0] == batch["past"][0, 1, 0]
    assert batch["future"][0, L - 1, 1] == 0.0
    assert batch["future"][0, L + 2, 0] == batch["future"][0, L + 1, 0]
    assert not any(value.isnan().any() for key, value in batch.items() if key != "y")  # type: ignore[attr-defined]


BAD: dict[str, tuple[Callable[[pd.DataFrame], object], str]] = {
    "no future": (
        lambda f: f.iloc[:T],
        r"4 of the 4 rows of the horizon are missing, those after 2020-01-02 15:00:00: the model needs "
        "price, promo there",
    ),
    "half a future": (
        lambda f: f.iloc[: T + 2],
        "2 of the 4 rows of the horizon are missing, those after 2020-01-02 17",
    ),
    "a future cell": (
        lambda f: f.loc.__setitem__((T + 1, "price"), np.nan),
        r"line 43, column 'price': missing value",
    ),
    "an unseen category": (
        lambda f: f.loc.__setitem__((T + 1, "promo"), "maybe"),
        r"line 43, column 'promo': 'maybe' is no category of the train rows \(no, yes\)",
    ),
    "an unseen shop": (
        lambda f: f.loc.__setitem__((slice(None), "shop"), "z"),
        r"line 30, column 'shop': 'z' is no category of the train rows \(a, b\)",
    ),
    "two shops": (
        lambda f: f.loc.__setitem__((7, "shop"), "z"),
        r"line 9, column 'shop': 'z', but 'b' at .*line 2; a static column has one value",
    ),
    "no target": (
        lambda f: f.loc.__setitem__((slice(None), "y"), np.nan),
        "line 2: this row and those after it, to the series' end, have no target value",
    ),
    "a past cell": (
        lambda f: f.loc.__setitem__((T - 2, "wind"), np.nan),
        r"line 40, column 'wind': missing value",
    ),
    "no number": (lambda f: f.loc.__setitem__((T - 2, "wind"), "calm"), "'calm' is not a number"),
    "a gap in the future": (
        lambda f: f.drop(index=T + 1),
        r"line 43: 2020-01-02 18:00:00 is not one step \(h\) after",
    ),
    "too short": (lambda f: f.iloc[T - 5 :], "too short, 5 rows; the model needs 12"),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("block", [300, 8 << 20])
def test_a_bad_record_is_named_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, block: int
) -> None:
    monkeypatch.setattr(sources, "BLOCK", block)
    change, message = BAD[what]
    frame = shop("a").astype({"wind": object})
    changed = change(frame)
    frame = changed if isinstance(changed, pd.DataFrame) else frame
    made = predictor()
    path = save(pd.concat([frame, shop("good")]), tmp_path / "t.csv")
    records = list(made.read(made.shards(path, 10)[0]))
    with pytest.raises(BadRecord, match=message):
        made.prepare(records[0])
    ((rows, bad, _),) = run(made, records, 10)
    assert [each.id for each in bad] == ["a"]
    assert len(rows) == P


def test_a_masked_horizon_without_any_value_is_refused() -> None:
    frame = shop("a")
    frame.loc[T:, "price"] = np.nan
    with pytest.raises(DataError, match="'price' has no value in the 4 rows of the horizon"):
        predictor(missing="mask").predict(frame)


def test_bad_second_tables(tmp_path: Path) -> None:
    frame = shops("a", "bb")
    known, ahead = frame[frame["y"].notna()], frame[frame["y"].isna()]
    cases: list[tuple[pd.DataFrame, str]] = [
        (ahead.drop(columns="price"), r"future: no column 'price' \(columns: unique_id, ds"),
        (ahead.rename(columns={"promo": "prono"}), "future: no column 'promo'; did you mean 'prono'"),
        (ahead.drop(columns="unique_id"), "future: no column 'unique_id'"),
        (ahead[ahead["unique_id"] == "a"], "record 'bb': 4 of the 4 rows of the horizon are missing"),
        (ahead.iloc[1:], r"record 'a': future, row 0: .* is not one step \(h\) after"),
        (ahead.assign(price=np.nan), "record 'a': column 'price' has no value in the 4 rows"),
        (ahead.assign(promo="?"), r"record 'a': future, row 0, column 'promo': '\?' is no category"),
        (frame, "record 'a': future, row 0: .* comes after"),
    ]
    for table, message in cases:
        with pytest.raises(DataError, match=message):
            predictor().predict(known, future=table)
    with pytest.raises(UsageError, match="a future is a CSV or parquet path, or a DataFrame"):
        predictor().predict(known, future=3)
    path = save(ahead.assign(promo="?"), tmp_path / "ahead.csv")
    with pytest.raises(DataError, match=r"ahead.csv, line 2, column 'promo'"):
        predictor().predict(known, future=path)


def test_covariates_that_a_table_lacks() -> None:
    with pytest.raises(DataError, match="DataFrame: no future column 'price'"):
        predictor().predict(shops("a").drop(columns="price"))
    with pytest.raises(DataError, match="DataFrame: no static column 'shop'; did you mean 'shops'"):
        predictor().predict(shops("a").rename(columns={"shop": "shops"}))


def test_conformal_ends_are_quantiles() -> None:
    class Last(nn.Module):
        def forward(self, x: Tensor, x_mark: Tensor, y_mark: Tensor) -> Tensor:
            return x[:, -1:].repeat(1, y_mark.shape[1], 1)

    radius = np.arange(1.0, P + 1)[None, :, None]
    intervals = SplitConformal(("y",), (0.9,), radius).to_json()
    none = {
        "covariates": Covariates().to_json(),
        "covariate_scaler": {"columns": [], "mean": [], "scale": []},
    }
    made = predictor(Last(), conformal=intervals, **none)
    frame = shop("a", ahead=0)[["unique_id", "ds", "y"]]
    found = made.predict(frame)
    assert list(found.columns)[3:] == ["yhat_q0.05", "yhat_q0.95"]
    np.testing.assert_allclose(found["yhat_q0.95"] - found["yhat"], 2.0 * radius[0, :, 0])  # original units
    np.testing.assert_allclose(found["yhat"] - found["yhat_q0.05"], 2.0 * radius[0, :, 0])
    other = predictor(Last(), conformal=intervals, targets=None, **none)
    with pytest.raises(DataError, match="no conformal interval was made for column 'z'"):
        other.predict(frame.rename(columns={"y": "z"}))
    with pytest.raises(UsageError, match=r"no quantile 0.1: the model has the quantiles 0.05, 0.95"):
        made.predict(frame, quantiles=[0.1])


@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
@pytest.mark.parametrize("shape", ["long", "wide", "long future"])
def test_memory_does_not_grow_with_the_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, shape: str
) -> None:
    monkeypatch.setattr(sources, "BLOCK", 1 << 16)
    monkeypatch.setattr(sources, "BATCH", 1 << 11)
    made, peaks = predictor(), []
    for times in (1, 10):
        if shape == "long":
            frame = pd.concat([shop(f"s{i:04d}", 300) for i in range(20 * times)])
        else:
            rows, ahead = (6000 * times, P) if shape == "wide" else (500, 5500 * times)
            frame = shop("w", rows, ahead).drop(columns="unique_id")
        path = save(frame, tmp_path / name, 3000)
        tracemalloc.start()
        for shard in made.shards(path, 16):
            for record in made.read(shard):
                assert len(made.prepare(record).inputs["future"]) == L + P
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] <= 1.2 * peaks[0] + (1 << 17)  # an index entry a series, 200 of them, is the rest


def trained(tmp_path: Path, **options: Any) -> Predictor:
    """An untrained model of real kind behind the preprocessing of real data."""
    save(shops(*(f"shop{i}" for i in range(6))), tmp_path / "train.parquet")
    data = ForecastData(str(tmp_path / "train.parquet"), 4, 2, batch_size=4, **{**NAMED, **options})
    model = create_model(
        "forecaster",
        base="itransformer",
        seq_len=4,
        pred_len=2,
        arguments={"d_model": 32, "d_ff": 32, "n_heads": 4},
        output="quantile",
        quantiles=[0.1, 0.5, 0.9],
        **data.covariate_sizes,
    )
    return Predictor(model, Preprocessing.from_json(data.preprocessing()))


@pytest.mark.parametrize("scaling", ["global", "series", "window"])
def test_a_batch_equals_its_records_one_by_one(tmp_path: Path, scaling: str) -> None:
    made = trained(tmp_path, scaling=scaling, missing="mask", unseen="unknown")
    frame = shops(*(f"shop{i}" for i in range(9)))
    frame.loc[np.random.default_rng(0).choice(len(frame), 60, replace=False), ["wind", "price"]] = np.nan
    path = save(frame, tmp_path / "new.parquet")
    records = [record for shard in made.shards(path, 4) for record in made.read(shard)]
    together = [row for rows, bad, _ in run(made, records, 100) for row in rows if not bad]
    alone = [row for record in records for rows, _, _ in run(made, [record], 1) for row in rows]
    assert len(together) == 9 * 2
    for column in made.columns:
        a, b = ([row[column] for row in rows] for rows in (together, alone))
        if column.startswith("yhat"):
            np.testing.assert_allclose(a, b, rtol=1e-6)  # type: ignore[arg-type]
        else:
            assert a == b
    levels = [f"yhat_q{level}" for level in (0.1, 0.5, 0.9)]
    assert all(row[low] <= row[high] for row in together for low, high in pairwise(levels))  # type: ignore[operator]


def test_prediction_gives_the_model_what_training_gave(tmp_path: Path) -> None:
    """The last test window of each series, and the same rows as a file to predict."""
    frame = shops("shop1", "shop2")
    made = trained(tmp_path, missing="mask")
    data = ForecastData(str(tmp_path / "train.parquet"), 4, 2, batch_size=4, missing="mask", **NAMED)  # type: ignore[arg-type]
    data.setup()
    frame = pd.read_parquet(tmp_path / "train.parquet")
    history = frame[frame["y"].notna()].copy()
    ends = history.groupby("unique_id").tail(2).index
    history.loc[ends, ["y", "wind"]] = np.nan  # what the last window forecasts is now the future
    (shard,) = made.shards(history, 100)
    samples = [made.prepare(record) for record in made.read(shard)]
    counts = np.bincount(data.test_windows.locate(np.arange(len(data.test_windows)))[0])
    windows = data.test_windows.gather(np.cumsum(counts) - 1)
    assert windows["series"].tolist() == list(range(6))
    for key in ("x", "x_mark", "y_mark", "observed", "past", "future", "static"):
        given = torch.stack([sample.inputs[key] for sample in samples])
        torch.testing.assert_close(given, windows[key], rtol=1e-6, atol=1e-6)  # type: ignore[literal-required]
