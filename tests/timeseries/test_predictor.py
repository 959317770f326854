from __future__ import annotations

import json
import pickle
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn

from manyheads.core.catalog import create_model
from manyheads.core.errors import BadRecord, DataError, UsageError
from manyheads.core.predictor import run
from manyheads.timeseries import sources
from manyheads.timeseries.calendar import feature_names, time_features
from manyheads.timeseries.predictor import Predictor
from manyheads.timeseries.preprocessing import Preprocessing
from manyheads.timeseries.tails import Tail

ETTH1 = Path(__file__).parents[2] / "timeseries" / "datasets" / "ETTh1.csv"
L, P = 12, 4


class Last(nn.Module):
    """Repeats the last scaled value, and adds the hour: so that scaling and marks both show."""

    def forward(self, x: Tensor, x_mark: Tensor, y_mark: Tensor) -> Tensor:
        assert x.dtype == x_mark.dtype == y_mark.dtype == torch.float32
        assert x_mark.shape[:2] == x.shape[:2]
        return x[:, -1:, :].repeat(1, y_mark.shape[1], 1) + y_mark[:, :, :1]


def saved(**changes: object) -> dict[str, Any]:
    columns = changes.get("columns", ["y"])
    n = len(columns)  # type: ignore[arg-type]
    freq = changes.get("freq", "h")
    return {
        "seq_len": L,
        "pred_len": P,
        "columns": columns,
        "targets": None,
        "time_column": None,
        "id_column": None,
        "freq": freq,
        "missing": "refuse",
        "time_features": list(feature_names(str(freq))),
        "scaler": {"columns": columns, "mean": [2.0] * n, "scale": [3.0] * n},
        **changes,
    }


def predictor(model: nn.Module | None = None, **changes: object) -> Predictor:
    return Predictor(model or Last(), Preprocessing.from_json(saved(**changes)))


def series(
    name: str, rows: int = 30, columns: tuple[str, ...] = ("y",), start: str = "2020-01-01"
) -> pd.DataFrame:
    rng = np.random.default_rng(sum(map(ord, name)))
    made = {column: rng.normal(5.0, 2.0, rows).round(6) for column in columns}
    return pd.DataFrame({"unique_id": name, "ds": pd.date_range(start, periods=rows, freq="h"), **made})


def long(*names: str, rows: int = 30, columns: tuple[str, ...] = ("y",)) -> pd.DataFrame:
    return pd.concat([series(name, rows, columns) for name in names], ignore_index=True)


def save(frame: pd.DataFrame, path: Path) -> Path:
    if path.name.endswith(".parquet"):
        frame.to_parquet(path, row_group_size=17)
    else:
        frame.to_csv(path, index=False)
    return path


def expected(last: float, ds: pd.DatetimeIndex, scale: float = 3.0) -> np.ndarray:
    return last + scale * time_features(ds.to_numpy(), "h")[:, 0]


def test_rows_of_a_long_file(tmp_path: Path) -> None:
    frame = long("a", "b")
    found = predictor().predict(save(frame, tmp_path / "t.csv"))
    assert found.columns.tolist() == ["unique_id", "ds", "yhat"] == list(predictor().columns)
    assert found["unique_id"].tolist() == ["a"] * P + ["b"] * P
    ahead = pd.date_range("2020-01-02 06:00", periods=P, freq="h")
    assert found["ds"].tolist() == ahead.tolist() * 2
    for name in "ab":
        last = frame[frame["unique_id"] == name]["y"].iloc[-1]
        np.testing.assert_allclose(
            found[found["unique_id"] == name]["yhat"], expected(last, ahead), rtol=1e-5
        )


def test_rows_of_wide_panel_and_several_files(tmp_path: Path) -> None:
    wide = series("w", columns=("OT", "load")).drop(columns="unique_id")
    found = predictor().predict(save(wide, tmp_path / "w.csv"))
    assert found["unique_id"].tolist() == ["OT"] * P + ["load"] * P
    panel = save(long("a", "b", columns=("u", "v")), tmp_path / "panel.parquet")
    found = predictor(columns=["u", "v"], targets=["u", "v"]).predict(panel)
    assert list(dict.fromkeys(found["unique_id"])) == ["a/u", "a/v", "b/u", "b/v"]
    several = [tmp_path / "w.csv", save(long("a"), tmp_path / "x.csv")]
    found = predictor().predict(several)
    assert list(dict.fromkeys(found["unique_id"])) == ["w/OT", "w/load", "x/a"]
    (tmp_path / "sub").mkdir()
    with pytest.raises(UsageError, match="have one name, so ids would not differ"):
        predictor().predict([*several, save(wide, tmp_path / "sub" / "w.csv")])


@pytest.mark.parametrize("shape", ["long", "wide"])
def test_all_sources_give_the_same_rows(tmp_path: Path, shape: str) -> None:
    frame = (
        long("a", "b", "c")
        if shape == "long"
        else series("w", columns=("OT", "load")).drop(columns="unique_id")
    )
    whole = predictor().predict(frame)
    for name in ("t.csv", "t.csv.gz", "t.parquet"):
        path = save(frame, tmp_path / name)
        pd.testing.assert_frame_equal(predictor().predict(str(path)), whole)
        pd.testing.assert_frame_equal(predictor().predict([path]), whole)


def test_known_columns_take_the_train_scale_and_others_their_own_window() -> None:
    frame = series("w", columns=("y", "new")).drop(columns="unique_id")
    found = predictor().predict(frame)
    window = frame["new"].iloc[-L:]
    ahead = pd.date_range("2020-01-02 06:00", periods=P, freq="h")
    for name, scale in (("y", 3.0), ("new", window.std(ddof=0))):
        yhat = found[found["unique_id"] == name]["yhat"]
        np.testing.assert_allclose(yhat, expected(frame[name].iloc[-1], ahead, scale), rtol=1e-5)


def models() -> dict[str, Callable[[], nn.Module]]:
    return {
        "dlinear": lambda: create_model("dlinear", seq_len=L, pred_len=P),
        "itransformer": lambda: create_model("itransformer", seq_len=L, pred_len=P, d_model=32, d_ff=32),
    }


@pytest.mark.parametrize("name", ["dlinear", "itransformer"])
def test_a_batch_equals_its_records_one_by_one(tmp_path: Path, name: str) -> None:
    made = predictor(models()[name]())
    wide = [save(series(s, columns=c).drop(columns="unique_id"), tmp_path / f"{s}.csv") for s, c in WIDE]
    source = [*wide, save(long(*"abcdefg"), tmp_path / "long.csv")]
    records = [record for shard in made.shards(source, 100) for record in made.read(shard)]
    assert [record.values.shape[1] for record in map(tail, records)] == [2, 5, 1, 2] + [1] * 7
    together = [row for rows, bad, _ in run(made, records, 100) for row in rows if not bad]
    alone = [row for record in records for rows, _, _ in run(made, [record], 1) for row in rows]
    assert [(r["unique_id"], r["ds"]) for r in together] == [(r["unique_id"], r["ds"]) for r in alone]
    a, b = (np.array([row["yhat"] for row in rows]) for rows in (together, alone))
    np.testing.assert_allclose(a, b, rtol=1e-6)


WIDE = [("p", ("y", "z")), ("q", ("a", "b", "c", "d", "y")), ("r", ("y",)), ("s", ("m", "n"))]


def tail(record: Any) -> Tail:
    assert isinstance(record.tail, Tail)
    return record.tail


BAD: dict[str, tuple[Callable[[pd.DataFrame], object], str]] = {
    "too short": (lambda f: f.drop(index=f.index[35:]), r"too short, 5 rows; the model needs 12"),
    "missing": (lambda f: f.loc.__setitem__((58, "y"), np.nan), r"line 60, column 'y': missing value"),
    "not numeric": (
        lambda f: f.loc.__setitem__((58, "y"), "n/a?"),
        r"line 60, column 'y': 'n/a\?' is not a number",
    ),
    "infinite": (lambda f: f.loc.__setitem__((58, "y"), np.inf), r"line 60, column 'y': infinite value"),
    "doubled": (
        lambda f: f.loc.__setitem__((33, "ds"), f["ds"][32]),
        r"line 35: 2020-01-01 02:00:00 is there twice",
    ),
    "unsorted": (
        lambda f: f.loc.__setitem__((33, "ds"), f["ds"][30]),
        r"line 35: 2020-01-01 00:00:00 comes after",
    ),
    "a gap": (lambda f: f.drop(index=40), r"line 42: .* is not one step \(h\) after 2020-01-01 09:00:00"),
    "no date": (
        lambda f: f.loc.__setitem__((50, "ds"), "soon"),
        r"line 52, column 'ds': 'soon' is not a date",
    ),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("block", [8 << 20, 100])
def test_bad_records_are_named_by_row_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, block: int
) -> None:
    monkeypatch.setattr(sources, "BLOCK", block)
    change, message = BAD[what]
    frame = long("a", "b", "c").astype({"ds": str, "y": object})
    middle = frame.iloc[:60].copy()
    changed = change(middle)
    middle = changed if isinstance(changed, pd.DataFrame) else middle
    path = save(pd.concat([middle, frame.iloc[60:]]), tmp_path / "t.csv")
    made = predictor()
    (shard,) = made.shards(path, 100)
    records = list(made.read(shard))
    with pytest.raises(BadRecord, match=message):
        made.prepare(records[1])
    ((rows, bad, taken),) = run(made, records, 100)
    assert ([b.id for b in bad], taken) == (["b"], 3)
    assert list(dict.fromkeys(row["unique_id"] for row in rows)) == ["a", "c"]
    with pytest.raises(DataError, match="record 'b': "):
        made.predict(path)


def test_values_before_the_window_do_not_matter() -> None:
    frame = series("a")
    whole = predictor().predict(frame)
    frame.loc[3, "y"] = np.nan
    pd.testing.assert_frame_equal(predictor().predict(frame), whole)


def test_wrong_frequency_is_a_bad_record() -> None:
    frame = series("a").assign(ds=pd.date_range("2020-01-01", periods=30, freq="2h"))
    with pytest.raises(DataError, match=r"is not one step \(h\) after"):
        predictor().predict(frame)


class Fixed(Last):
    """A model of so many variates."""

    def __init__(self, variates: int | None) -> None:
        super().__init__()
        self.variates = variates


@pytest.mark.parametrize(
    ("variates", "columns", "fits"),
    [
        (2, "uv", True),
        (2, "vu", False),
        (2, "u", False),
        (1, "z", True),
        (1, "uv", False),
        (None, "vu", True),
    ],
)
def test_a_model_of_fixed_variates_takes_the_columns_of_its_training(
    variates: int | None, columns: str, fits: bool
) -> None:
    trained = ["u"] if variates == 1 else ["u", "v"]
    frame = series("a", columns=tuple(columns)).drop(columns="unique_id")
    made = predictor(Fixed(variates), columns=trained)
    if fits:
        assert len(made.predict(frame)) == P * len(columns)
    else:
        with pytest.raises(
            DataError, match=f"in their order: {', '.join(trained)}; not {', '.join(columns)}"
        ):
            made.predict(frame)


def test_masked_gaps_take_the_value_before() -> None:
    frame = series("a")
    filled = frame.copy()
    frame.loc[29, "y"] = np.nan
    filled.loc[29, "y"] = filled.loc[28, "y"]
    pd.testing.assert_frame_equal(predictor(missing="mask").predict(frame), predictor().predict(filled))


@pytest.mark.parametrize("column", ["y", "new"])
def test_a_window_without_any_value_is_a_bad_record(column: str) -> None:
    frame = series("a", columns=(column,))
    frame.loc[10:, column] = np.nan
    with pytest.raises(DataError, match=f"column '{column}' has no value in the last 12 rows"):
        predictor(missing="mask").predict(frame)


def test_an_id_in_two_places_names_both(tmp_path: Path) -> None:
    frame = pd.concat([long("a", "b"), series("a")])
    with pytest.raises(
        DataError, match=r"t.csv, line 62: series 'a' began before, at .*t.csv, line 2; put the rows"
    ):
        predictor().shards(save(frame, tmp_path / "t.csv"), 10)
    with pytest.raises(DataError, match=r"t.parquet, row 60: series 'a' began before, at .*, row 0"):
        predictor().shards(save(frame, tmp_path / "t.parquet"), 10)
    with pytest.raises(DataError, match=r"DataFrame, row 60: .*DataFrame, row 0"):
        predictor().shards(frame, 10)


@pytest.mark.parametrize("end", ["\n", "\r\n", "", "\n\n\n", "\r\n\r\n"])
@pytest.mark.parametrize("block", [7, 64, 1000])
def test_index_does_not_depend_on_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, block: int
) -> None:
    frame = pd.concat([long("a", rows=3), long("bb", rows=1), long("c", rows=40)])
    text = frame.to_csv(index=False, lineterminator="\r\n" if end.startswith("\r") else "\n").rstrip() + end
    path = tmp_path / "t.csv"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    monkeypatch.setattr(sources, "BLOCK", block)
    runs = sources.index(sources.open_file(path)) if block > 20 else None
    monkeypatch.undo()
    whole = sources.index(sources.open_file(path))
    assert [(r.id, r.first, r.end) for r in whole] == [("a", 0, 3), ("bb", 3, 4), ("c", 4, 44)]
    data = path.read_bytes()
    assert [data[r.start_byte : r.end_byte].count(b"2020-") for r in whole] == [3, 1, 40]
    if runs is not None:
        assert [(r.id, r.first, r.end, r.start_byte) for r in runs] == [
            (r.id, r.first, r.end, r.start_byte) for r in whole
        ]


def test_blocks_and_batches_give_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = long("a", "bb", "c", "d", rows=40)
    whole = predictor().predict(frame)
    monkeypatch.setattr(sources, "BLOCK", 150)
    monkeypatch.setattr(sources, "BATCH", 7)
    for name in ("t.csv", "t.csv.gz", "t.parquet"):
        pd.testing.assert_frame_equal(predictor().predict(save(frame, tmp_path / name)), whole)


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz", "t.parquet"])
def test_shards_are_the_same_each_time_and_stand_alone(tmp_path: Path, name: str) -> None:
    path = save(long(*"abcdefg"), tmp_path / name)
    made = predictor()
    shards = made.shards(path, 3)
    assert shards == made.shards(path, 3)
    assert [[run.id for _, run in shard.runs] for shard in shards] == [
        ["a", "b", "c"],
        ["d", "e", "f"],
        ["g"],
    ]
    whole = {record.id: tail(record).values for shard in made.shards(path, 99) for record in made.read(shard)}
    for shard in reversed(shards):
        for record in made.read(pickle.loads(pickle.dumps(shard))):
            np.testing.assert_array_equal(tail(record).values, whole[record.id])


def test_shards_pack_small_files(tmp_path: Path) -> None:
    wide = series("w").drop(columns="unique_id")
    paths = [save(wide, tmp_path / f"w{i}.csv") for i in range(5)]
    shards = predictor().shards(paths, 2)
    assert [[file.stem for file in shard.files] for shard in shards] == [["w0", "w1"], ["w2", "w3"], ["w4"]]
    assert [record.names[0] for record in predictor().read(shards[1])] == ["w2/y", "w3/y"]


def test_broken_files(tmp_path: Path) -> None:
    text = long("a", "b").to_csv(index=False)
    cases = {
        "row.csv": (
            text.replace("b,2020-01-01 03:00:00,", "b,"),
            r"row.csv: .*line 35: Expected 3 columns, got 2",
        ),
        "noid.csv": (
            text.replace("b,2020-01-01 03", ",2020-01-01 03"),
            r"noid.csv, line 35: no id in column",
        ),
        "blank.csv": (
            text.replace("b,2020-01-01 03", "\nb,2020-01-01 03"),
            r"blank.csv, line 35: no id in column",
        ),
        "quoted.csv": (text.replace("b,2020", '"b\nb",2020', 1), r"a quoted cell holds a line break"),
        "rows.csv": ("unique_id,ds,y\n", r"rows.csv: a header and no rows"),
        "extra.csv": (
            "unique_id,ds,y,price\na,2020-01-01,1,2\n",
            r"are not all plainly targets; name the covariates",
        ),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=message):
            predictor().shards(tmp_path / name, 10)
    with pytest.raises(DataError, match="no such file"):
        predictor().shards(tmp_path / "none.csv", 10)
    with pytest.raises(UsageError, match="a source is a CSV or parquet path"):
        predictor().shards(3, 10)
    (tmp_path / "wide.csv").write_text("ds,y\n")
    with pytest.raises(DataError, match="a header and no rows"):
        predictor().predict(tmp_path / "wide.csv")


def peak(path: Path) -> tuple[int, int]:
    """Return the most bytes that Arrow, and Python with numpy, held while a file was indexed and read."""
    made, pool, before = predictor(), pa.proxy_memory_pool(pa.default_memory_pool()), pa.default_memory_pool()
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        for shard in made.shards(path, 16):
            for record in made.read(shard):
                assert len(tail(record).ds) == L
        return pool.max_memory(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(before)


@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
@pytest.mark.parametrize("shape", ["long", "wide"])
def test_memory_does_not_grow_with_the_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, shape: str
) -> None:
    monkeypatch.setattr(sources, "BLOCK", 1 << 16)
    monkeypatch.setattr(sources, "BATCH", 1 << 11)
    peaks = []
    for times in (1, 10):
        if shape == "long":
            frame = long(*(f"s{i:04d}" for i in range(20 * times)), rows=300)
        else:
            frame = series("w", rows=6000 * times).drop(columns="unique_id")
        path = tmp_path / name
        frame.to_parquet(path, row_group_size=3000) if name == "t.parquet" else frame.to_csv(
            path, index=False
        )
        peaks.append(peak(path))
    for small, large in zip(*peaks, strict=True):
        assert large <= 1.2 * small + (1 << 17)  # an index entry a series, 200 of them, is the rest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, r"has unknown \['extra'\]"),
        ({"seq_len": 0}, "seq_len = 0"),
        ({"seq_len": True}, "seq_len = True"),
        ({"pred_len": "4"}, "pred_len = '4'"),
        ({"missing": "ignore"}, "missing = 'ignore'"),
        ({"freq": "fortnight", "time_features": ["x"]}, "unknown frequency"),
        ({"time_features": ["hour_of_day"]}, "are not those of freq 'h'"),
        ({"scaler": None}, "scaler = None"),
        (
            {"scaler": {"columns": ["z"], "mean": [0.0], "scale": [1.0]}},
            "columns are not those of its scaler",
        ),
        ({"targets": "y"}, "targets = 'y'"),
    ],
)
def test_preprocessing_is_read_strictly(change: dict[str, object], message: str) -> None:
    whole = saved()
    whole.update(change)
    with pytest.raises(DataError, match=message):
        Preprocessing.from_json(whole)
    for key in saved():
        with pytest.raises(DataError, match=f"lacks .*{key}"):
            Preprocessing.from_json({k: v for k, v in saved().items() if k != key})


def test_from_folder() -> None:
    config = SimpleNamespace(preprocessing=json.loads(json.dumps(saved())))
    model = Last().train()
    made = Predictor.from_folder(model, config)  # type: ignore[arg-type]
    assert not model.training
    assert len(made.predict(series("a"))) == P


def test_targets_named_in_training_are_taken_where_they_are(tmp_path: Path) -> None:
    frame = series("w", columns=("OT", "load")).drop(columns="unique_id")
    named = predictor(columns=["OT"], targets=["OT"])
    assert set(named.predict(frame)["unique_id"]) == {"OT"}
    other = frame.rename(columns={"OT": "u", "load": "v"})
    assert set(named.predict(other)["unique_id"]) == {"u", "v"}


def test_the_predictor_imports_no_lightning(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(json.dumps(saved()))
    save(long("a"), tmp_path / "t.csv")
    code = f"""
import json, sys, torch
from manyheads.timeseries.predictor import Predictor
from manyheads.timeseries.preprocessing import Preprocessing
from manyheads.timeseries.tails import Tail
class Zero(torch.nn.Module):
    def forward(self, x, x_mark, y_mark):
        return x.new_zeros(len(x), y_mark.shape[1], x.shape[2])
made = Predictor(Zero(), Preprocessing.from_json(json.load(open({str(tmp_path / "p.json")!r}))))
print(made.predict({str(tmp_path / "t.csv")!r})["yhat"].tolist(), "lightning" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{[2.0] * P} False"
