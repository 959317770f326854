"""Whole series in, filled cells or scored rows out: windows, units, refusals, jobs, memory."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import manyheads
from manyheads.apps import cli
from manyheads.core import hub
from manyheads.core.catalog import create_model
from manyheads.core.errors import DataError
from manyheads.core.predictor import predict, run
from manyheads.timeseries.calendar import feature_names
from manyheads.timeseries.preprocessing import Preprocessing
from manyheads.timeseries.reconstruction.predictor import AnomalyPredictor, ImputationPredictor

L = 8
NAN = float("nan")


class Mean(nn.Module):
    """Rebuilds every cell as the mean of what is observed of its column."""

    def forward(self, x: Tensor, observed: Tensor, x_mark: Tensor) -> Tensor:
        assert x.dtype == x_mark.dtype == torch.float32
        assert x_mark.shape[:2] == x.shape[:2]
        count = observed.sum(dim=1, keepdim=True).clamp(min=1)
        return (torch.where(observed, x, 0.0).sum(dim=1, keepdim=True) / count).expand_as(x)


def saved(columns: list[str], **changes: object) -> dict[str, Any]:
    n = len(columns)
    return {
        "seq_len": L,
        "pred_len": L,
        "columns": columns,
        "targets": None,
        "time_column": None,
        "id_column": None,
        "freq": "h",
        "missing": "mask",
        "time_features": list(feature_names("h")),
        "scaler": {"columns": columns, "mean": [2.0] * n, "scale": [4.0] * n},
        **changes,
    }


def imputer(columns: tuple[str, ...] = ("y",), **changes: object) -> ImputationPredictor:
    return ImputationPredictor(Mean(), Preprocessing.from_json(saved(list(columns), **changes)))


def detector(
    columns: tuple[str, ...] = ("y",), threshold: float = 1.0, **changes: object
) -> AnomalyPredictor:
    of = Preprocessing.from_json(saved(list(columns), **changes))
    return AnomalyPredictor(Mean(), of, [threshold] * (1 + len(columns)))


def series(values: object, name: str | None = "s", columns: tuple[str, ...] = ("y",)) -> pd.DataFrame:
    cells = np.asarray(values, np.float64).reshape(-1, len(columns))
    made = {"ds": pd.date_range("2020-01-01", periods=len(cells), freq="h")}
    made |= dict(zip(columns, cells.T, strict=True))
    return pd.DataFrame(({"unique_id": name} if name else {}) | made)


def test_gaps_are_filled_from_their_window_and_the_last_one_ends_with_the_series() -> None:
    values = np.arange(20.0)
    values[[3, 13, 18]] = NAN
    frame = series(values)
    found = imputer().predict(frame)
    assert found["unique_id"].tolist() == ["s"] * 3
    assert found["ds"].tolist() == [frame["ds"][i] for i in (3, 13, 18)]
    windows = [values[0:8], values[8:16], values[12:20]]
    np.testing.assert_allclose(found["y"], [np.nanmean(w) for w in windows], rtol=1e-6)
    whole = imputer().predict(frame, every=True)
    assert whole["ds"].tolist() == frame["ds"].tolist()
    there = ~np.isnan(values)
    np.testing.assert_array_equal(whole["y"][there], values[there])  # to the last bit
    assert list(imputer().predict(series(np.arange(20.0))).columns) == ["unique_id", "ds", "y"]


def test_ids_of_wide_panel_and_several_files(tmp_path: Path) -> None:
    cells = np.arange(18.0).reshape(9, 2)
    cells[2, 0] = cells[8, 1] = NAN
    series(cells, None, ("u", "v")).to_csv(tmp_path / "w.csv", index=False)
    series(cells, "k", ("u", "v")).to_parquet(tmp_path / "p.parquet")
    wide = imputer(("u", "v"))
    assert wide.predict(tmp_path / "w.csv")["unique_id"].tolist() == ["u", "v"]
    panel = imputer(("u", "v"), targets=["u", "v"])
    assert panel.predict(tmp_path / "p.parquet")["unique_id"].tolist() == ["k/u", "k/v"]
    both = panel.predict([tmp_path / "w.csv", tmp_path / "p.parquet"])
    assert both["unique_id"].tolist() == ["w/u", "w/v", "p/k/u", "p/k/v"]


def test_scores_are_those_of_rows_and_then_of_each_column(tmp_path: Path) -> None:
    cells = np.ones((10, 2))
    cells[4] = [41.0, NAN]
    cells[9, 1] = 5.0
    series(cells, None, ("u", "v")).to_csv(tmp_path / "w.csv", index=False)
    found = detector(("u", "v"), threshold=30.0).predict(tmp_path / "w.csv")
    assert found.groupby("unique_id").size().to_dict() == {"w": 10, "w/u": 10, "w/v": 10}
    assert (found.groupby("unique_id")["ds"].nunique() == 10).all()
    by = {name: rows["score"].to_numpy() for name, rows in found.groupby("unique_id")}
    scaled = (cells - 2) / 4
    u, v = ((scaled[:, j] - np.nanmean(scaled[:8, j])) ** 2 for j in (0, 1))
    np.testing.assert_allclose(by["w/u"][:8], u[:8], rtol=1e-5)
    assert np.isnan(by["w/v"][4])
    np.testing.assert_allclose(by["w"][:8], np.nanmean([u, v], axis=0)[:8], rtol=1e-5, atol=1e-12)
    last = (scaled[9, 1] - np.nanmean(scaled[2:10, 1])) ** 2
    np.testing.assert_allclose(by["w/v"][9], last, rtol=1e-5)
    flagged = found[found["anomaly"]]
    assert flagged["unique_id"].tolist() == ["w", "w/u"]
    assert set(flagged["ds"]) == {pd.Timestamp("2020-01-01 04:00")}
    one = detector().predict(series(np.ones(9)))
    assert one["unique_id"].tolist() == ["s"] * 9


@pytest.mark.parametrize("kind", ["csv", "parquet", "frame"])
@pytest.mark.parametrize("task", ["imputation", "anomaly"])
def test_a_batch_gives_the_rows_of_its_windows_one_by_one(tmp_path: Path, kind: str, task: str) -> None:
    rng = np.random.default_rng(0)
    frames = [series(rng.normal(size=rows), name) for name, rows in (("a", 30), ("b", 8), ("c", 21))]
    frame = pd.concat(frames, ignore_index=True)
    frame.loc[rng.choice(len(frame), 12, replace=False), "y"] = NAN
    source: object = frame
    if kind == "csv":
        frame.to_csv(source := tmp_path / "t.csv", index=False)
    elif kind == "parquet":
        frame.to_parquet(source := tmp_path / "t.parquet", row_group_size=7)
    model = create_model("imputer", base="itransformer", seq_len=L, channels=1, arguments={"d_model": 16})
    of = Preprocessing.from_json(saved(["y"]))
    predictor = (
        ImputationPredictor(model, of) if task == "imputation" else AnomalyPredictor(model, of, [1, 1], 2, 2)
    )
    found = predictor.predict(source)
    cells = frame[frame["y"].isna()] if task == "imputation" else frame
    assert list(zip(found["unique_id"], found["ds"], strict=True)) == list(
        zip(cells["unique_id"], cells["ds"], strict=True)
    )
    one = predict(predictor, source, batch_size=1)
    pd.testing.assert_frame_equal(found, one, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "bad"),
    [
        (lambda v: v[:5], "s: t.csv: too short, 5 rows; the model needs 8"),
        (
            lambda v: [*v[:8], *[NAN] * 8, *v[16:]],
            "s[8:16]: .*08:00:00 to .*15:00:00: column 'y' has no value",
        ),
        (lambda v: [*v[:17], np.inf, *v[18:]], "s: t.csv, line 19, column 'y': infinite value"),
    ],
)
def test_what_cannot_be_filled_is_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change, bad: str
) -> None:
    monkeypatch.chdir(tmp_path)
    series(change(list(np.arange(20.0)))).to_csv("t.csv", index=False)
    predictor = imputer()
    shards = predictor.shards("t.csv", 4)
    refused = [each for _, some, _ in run(predictor, predictor.read(shards[0]), 3) for each in some]
    assert len(refused) == 1
    import re

    pattern = re.escape(bad).replace(re.escape(".*"), ".*")
    assert re.match(pattern, f"{refused[0].id}: {refused[0].reason}")
    with pytest.raises(DataError, match="record 's"):
        predictor.predict("t.csv")


def test_rows_before_a_broken_block_are_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("manyheads.timeseries.sources.BATCH", 10)
    frame = series(np.arange(40.0))
    frame["y"] = frame["y"].where(frame.index != 35, np.inf)
    pd.concat([frame, series(np.arange(9.0), "t")]).to_parquet(tmp_path / "t.parquet")
    predictor = detector()
    rows, bad = [], []
    for some, others, _ in run(predictor, predictor.read(predictor.shards(tmp_path / "t.parquet", 4)[0]), 3):
        rows, bad = rows + some, bad + others
    assert [row["unique_id"] for row in rows] == ["s"] * 24 + ["t"] * 9
    assert [each.id for each in bad] == ["s[24:]"]
    assert "row 35" in bad[0].reason
    assert bad[0].reason.endswith("the series' rows from 24 on are left out")


def test_columns_and_missing_values_that_the_model_does_not_take() -> None:
    with pytest.raises(
        DataError, match="takes the columns that it was trained on, in their order: u, v; not v, u"
    ):
        detector(("u", "v")).predict(series(np.ones((9, 2)), None, ("v", "u")))
    with pytest.raises(DataError, match="column 'y': missing value"):
        detector(missing="refuse").predict(series([NAN, *range(9)]))
    scores = detector().predict(series([NAN, *range(9)]))
    assert scores["score"].isna().tolist() == [True] + [False] * 9
    assert not scores["anomaly"][0]
    with pytest.raises(DataError, match="column 'w' has no value"):  # nothing is known of its scale
        imputer().predict(series([[i, NAN] for i in range(9)], None, ("y", "w")))


def folder(path: Path, name: str, **more: object) -> Path:
    arguments = {"base": "dlinear", "seq_len": L, "channels": 1}
    hub.save(
        path,
        create_model(name, **arguments),
        domain="timeseries",
        name=name,
        arguments=arguments,
        preprocessing=saved(["y"]) | more,
    )
    return path


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"thresholds": [1.0]}, "1 thresholds for 1 columns"),
        ({"thresholds": "high"}, "thresholds = high"),
        ({"passes": 0}, "passes and gap = "),
        ({"season": 3}, "has unknown \\['season'\\]"),
    ],
)
def test_folders_that_are_wrong(tmp_path: Path, change: dict, says: str) -> None:
    right = {"thresholds": [1.0, 2.0], "passes": 2, "gap": 3}
    found = manyheads.load(folder(tmp_path / "right", "detector", **right))
    assert found.thresholds.tolist() == [1.0, 2.0]
    assert (found.passes, found.gap) == (2, 3)
    with pytest.raises(DataError, match=says):
        manyheads.load(folder(tmp_path / "wrong", "detector", **right | change))


def test_a_job_of_either_task(tmp_path: Path) -> None:
    frame = pd.concat([series(np.sin(np.arange(30.0)), "a"), series(np.ones(5), "b")])
    frame.iloc[[4, 11], 2] = NAN
    frame.to_csv(tmp_path / "t.csv", index=False)
    counts = {}
    for name, more in (("imputer", {}), ("detector", {"thresholds": [1.0, 1.0], "passes": 1, "gap": 1})):
        out, model = tmp_path / f"{name}_out", folder(tmp_path / name, name, **more)
        args = ["predict", str(model), str(tmp_path / "t.csv"), "-o", str(out), "--quiet"]
        assert cli.main(args) == 3  # b is too short
        assert cli.main([*args, "--resume", "--max-bad", "0.5"]) == 0
        rows = pd.concat(pd.read_parquet(part) for part in out.glob("part-*.parquet"))
        (bad,) = [json.loads(line) for line in next(out.glob("bad-*")).read_text().splitlines()]
        assert bad["id"] == "b"
        counts[name] = len(rows), list(rows.columns)
    assert counts["imputer"] == (2, ["unique_id", "ds", "y"])
    assert counts["detector"] == (30, ["unique_id", "ds", "score", "anomaly"])


def test_memory_does_not_grow_with_a_series(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manyheads.timeseries.sources.BATCH", 2000)

    def peak(rows: int) -> int:
        path = tmp_path / f"{rows}.parquet"
        series(np.random.default_rng(0).normal(size=rows)).to_parquet(path, row_group_size=2000)
        predictor = detector()
        predictor.predict(series(np.ones(9)))  # what is loaded on use
        tracemalloc.start()
        count = 0
        for shard in predictor.shards(path, 4):
            for rows_, _, _ in run(predictor, predictor.read(shard), 64):
                count += len(rows_)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count == rows
        return most

    assert peak(40_000) < 1.5 * peak(10_000)
