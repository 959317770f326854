from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from manyheads.core.errors import DataError, UsageError
from manyheads.timeseries import readers
from manyheads.timeseries.covariates import Covariates, Role
from manyheads.timeseries.data import ForecastData
from manyheads.timeseries.frames import Series, read
from manyheads.timeseries.preprocessing import Preprocessing
from manyheads.timeseries.tables import Cells, Coded

L, P, T = 12, 6, 100  # of 100 rows, 70 train and 20 test ones
NAMED = {
    "targets": ["y"],
    "past": ["wind", "sky"],
    "future": ["promo", "price"],
    "static": ["size", "shop"],
    "categorical": ["sky", "promo", "shop"],
}


def store(name: str, level: float, rows: int = T) -> pd.DataFrame:
    rng = np.random.default_rng(len(name) + int(level))
    return pd.DataFrame(
        {
            "unique_id": name,
            "ds": pd.date_range("2020-01-01", periods=rows, freq="h"),
            "y": rng.normal(level, 1 + level / 10, rows),
            "wind": rng.normal(3.0, 2.0, rows),
            "sky": rng.choice(["clear", "rain"], rows),
            "promo": rng.choice([0, 1], rows),
            "price": rng.normal(9.0, 1.0, rows),
            "size": level * 2,
            "shop": f"shop {name}",
        }
    )


def stores() -> pd.DataFrame:
    return pd.concat([store("a", 5.0), store("b", 500.0, 120)], ignore_index=True)


def made(frame: pd.DataFrame, folder: Path, **options: object) -> ForecastData:
    path = folder / "t.parquet"
    frame.to_parquet(path)
    data = ForecastData(str(path), L, P, batch_size=4, **{**NAMED, **options})  # type: ignore[arg-type]
    data.setup()
    return data


def test_a_batch_has_its_covariates(tmp_path: Path) -> None:
    frame = stores()
    data = made(frame, tmp_path)
    a, b = frame[frame["unique_id"] == "a"], frame[frame["unique_id"] == "b"]
    train = pd.concat([a[:70], b[:84]])
    at = 83 - L - P  # of series b; a has 53 windows
    batch = data.train_windows.batch(torch.tensor([3, 53 + at]))
    assert batch["series"].tolist() == [0, 1]
    for k, (mine, first) in enumerate([(a, 3), (b, at)]):
        rows = mine.iloc[first : first + L + P]

        def scaled(name: str, rows: pd.DataFrame = rows) -> np.ndarray:
            known = train[name]
            return ((rows[name] - known.mean()) / known.std(ddof=0)).to_numpy(np.float32)

        past = np.stack([scaled("wind")[:L], 1.0 + (rows["sky"] == "rain")[:L]], axis=1)
        future = np.stack([scaled("price"), 1.0 + rows["promo"]], axis=1)
        np.testing.assert_allclose(batch["past"][k], past, atol=1e-5)
        np.testing.assert_allclose(batch["future"][k], future, atol=1e-5)
        np.testing.assert_allclose(batch["y"][k][:, 0], scaled("y")[L:], atol=1e-5)
        assert batch["x_mark"].shape == (2, L, 4)
    # one value a series: 10 and 1000, so that they are one deviation from their mean
    np.testing.assert_allclose(batch["static"], [[-1.0, 1.0], [1.0, 2.0]], rtol=1e-6)
    assert "observed" not in batch


def test_roles_and_sizes(tmp_path: Path) -> None:
    data = made(stores(), tmp_path)
    assert data.treatment.covariates == Covariates(
        Role(("wind",), {"sky": ("clear", "rain")}),
        Role(("price",), {"promo": ("0", "1")}),
        Role(("size",), {"shop": ("shop a", "shop b")}),
    )
    expected = {"past": 1, "past_categories": [3], "future": 1, "future_categories": [3]}
    assert data.covariate_sizes == {**expected, "static": 1, "static_categories": [3]}


def test_sizes_are_asked_before_anything_is_read(tmp_path: Path) -> None:
    stores().to_parquet(tmp_path / "t.parquet")
    data = ForecastData(str(tmp_path / "t.parquet"), L, P, batch_size=4, **NAMED)  # type: ignore[arg-type]
    assert data.covariate_sizes["static_categories"] == [3]
    assert ForecastData("nowhere.csv").covariate_sizes == Covariates().sizes()  # nothing is there to read


def test_csv_and_parquet_are_one(tmp_path: Path) -> None:
    frame = stores().round(6)
    frame.to_csv(tmp_path / "t.csv", index=False)
    text = ForecastData(str(tmp_path / "t.csv"), L, P, batch_size=4, **NAMED)  # type: ignore[arg-type]
    text.setup()
    typed = made(frame, tmp_path)
    assert torch.equal(text.train_windows.rows, typed.train_windows.rows)
    assert text.preprocessing() == typed.preprocessing()


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_csv_blocks_do_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, end: str
) -> None:
    frame = stores()
    frame.loc[[5, 130], ["y", "sky"]] = None
    frame.to_csv(tmp_path / name, index=False, lineterminator=end)
    options = {**NAMED, "missing": "mask"}

    def rows() -> list[Series]:
        return read(tmp_path / name, **options)  # type: ignore[arg-type]

    whole = rows()
    monkeypatch.setattr(readers, "_read_compact", lambda *_: None)  # all of the text at once
    texts = rows()
    monkeypatch.undo()
    monkeypatch.setattr(readers, "_BLOCK", 500)
    blocks = rows()
    for one, two, three in zip(whole, texts, blocks, strict=True):
        for other in (two, three):
            assert (one.id, one.columns, one.freq) == (other.id, other.columns, other.freq)
            np.testing.assert_array_equal(one.ds, other.ds)
            np.testing.assert_array_equal(one.values, other.values)
            for column, cells in one.covariates.items():
                np.testing.assert_array_equal(texts_of(cells), texts_of(other.covariates[column]))


def texts_of(cells: Cells) -> np.ndarray:
    return np.array([*cells.values, ""])[cells.codes] if isinstance(cells, Coded) else cells


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("2020-01-03 12:00:00", "2020/01/03 12:00", None),  # another form of the same
        ("2020-01-03 12:00:00", "someday", r"t.csv, line 62, column 'ds': 'someday' is not a date"),
        (",clear,", ",cle\nar,", r"t.csv: .*line \d+: Expected 9 columns, got \d"),
    ],
)
def test_a_cell_that_is_not_plain_is_read_or_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, message: str | None
) -> None:
    monkeypatch.setattr(readers, "_BLOCK", 500)
    path = tmp_path / "t.csv"
    stores()[:T].to_csv(path, index=False)
    whole = read(path, **NAMED)  # type: ignore[arg-type]
    path.write_text(path.read_text().replace(old, new, 1))
    if message is None:
        np.testing.assert_array_equal(read(path, **NAMED)[0].ds, whole[0].ds)  # type: ignore[arg-type]
    else:
        with pytest.raises(DataError, match=message):
            read(path, **NAMED)  # type: ignore[arg-type]


def test_the_order_of_rows_between_series_does_not_matter(tmp_path: Path) -> None:
    frame = stores()
    mixed = frame.sort_values(["ds", "unique_id"])
    assert torch.equal(made(mixed, tmp_path).train_windows.rows, made(frame, tmp_path).train_windows.rows)


@pytest.mark.parametrize("scaling", ["global", "series", "window", "none"])
def test_scaling_and_its_inverse(tmp_path: Path, scaling: str) -> None:
    frame = stores()
    data = made(frame, tmp_path, scaling=scaling)
    batch = data.test_windows.batch(torch.tensor([0, len(data.test_windows) - 1]))
    raw = [frame["y"][80 : 80 + P], frame["y"][-P:]]
    back = data.inverse(batch["y"], batch["series"])
    assert back.dtype == torch.float64
    np.testing.assert_allclose(back[..., 0], np.stack(raw), rtol=1e-5)
    np.testing.assert_allclose(data.inverse(batch["y"][..., None], batch["series"])[..., 0, 0], back[..., 0])
    train = {"a": frame["y"][:70], "b": frame["y"][100:184]}
    if scaling in ("window", "none"):
        np.testing.assert_allclose(batch["y"][..., 0], np.stack(raw), rtol=1e-6)
    for k, rows in enumerate(train.values()):
        known = pd.concat(train.values()) if scaling == "global" else rows
        if scaling in ("global", "series"):
            scaled = (raw[k] - known.mean()) / known.std(ddof=0)
            np.testing.assert_allclose(batch["y"][k, :, 0], scaled, atol=1e-4)
    np.testing.assert_allclose(batch["static"][:, 0], [-1.0, 1.0], rtol=1e-6)  # whatever the scaling


@pytest.mark.parametrize("scaling", ["global", "series", "window", "none"])
def test_preprocessing_survives_json(tmp_path: Path, scaling: str) -> None:
    data = made(stores(), tmp_path, scaling=scaling, unseen="unknown", missing="mask")
    saved = json.loads(json.dumps(data.preprocessing()))
    read_back = Preprocessing.from_json(saved)
    assert read_back.treatment.to_json() == data.treatment.to_json()
    assert read_back.treatment.scaling == scaling
    assert read_back.named == {
        **{key: list(value) for key, value in NAMED.items()},
        "future": ["price", "promo"],
        "time_column": None,
        "id_column": None,
    }
    mean, scale = read_back.treatment.statistics("a", ("y",), np.zeros((L, 1)))
    wanted = data.treatment.statistics("a", ("y",), np.zeros((L, 1)))
    assert (mean.tobytes(), scale.tobytes()) == (wanted[0].tobytes(), wanted[1].tobytes())


def test_a_wide_table_is_scaled_by_column_whatever_is_said(tmp_path: Path) -> None:
    wide = store("w", 5.0)[["ds", "y", "wind"]]
    wide.to_csv(tmp_path / "w.csv", index=False)
    data = ForecastData(str(tmp_path / "w.csv"), L, P, batch_size=4, scaling="series")
    data.setup()
    assert "scaling" not in data.preprocessing()


def test_an_unknown_series_takes_its_own_window(tmp_path: Path) -> None:
    treatment = made(stores(), tmp_path, scaling="series").treatment
    context = np.random.default_rng(0).normal(70.0, 3.0, (L, 1))
    mean, scale = treatment.statistics("new", ("y",), context)
    np.testing.assert_allclose([mean[0], scale[0]], [context.mean(), context.std()], rtol=1e-12)


def test_gaps_are_masked(tmp_path: Path) -> None:
    frame = stores()
    frame.loc[[20, 21], "y"] = np.nan
    frame.loc[[18, 30], "wind"] = np.nan
    frame.loc[19, "sky"] = None
    frame.loc[33, "price"] = np.nan
    frame.loc[frame["unique_id"] == "a", "size"] = np.nan
    data = made(frame, tmp_path, missing="mask")
    batch = data.train_windows.batch(torch.tensor([18]))  # rows 18 to 35, of which 30 to 35 are y
    assert batch["observed"][0, :, 0].tolist() == [True, True, False, False] + [True] * 8
    assert torch.equal(batch["x"][0, 2:4, 0], batch["x"][0, 1, 0].repeat(2))
    assert batch["past"][0, 0, 0] == batch["past"][0, 1, 0]  # nothing before it in the window
    assert batch["past"][0, 1, 1] == 0.0
    assert batch["future"][0, 15, 0] == batch["future"][0, 14, 0]
    assert batch["static"][0, 0] == 0.0  # the mean
    for key in ("x", "past", "future", "static"):
        assert not batch[key].isnan().any()  # type: ignore[literal-required]
    full = data.val_windows.batch(torch.tensor([0]))
    assert full["observed"].all()  # the key is there whether or not this part has gaps


BAD: dict[str, tuple[Callable[[pd.DataFrame], object], dict[str, object], str]] = {
    "past missing": (
        lambda f: f.loc.__setitem__((110, "wind"), np.nan),
        {},
        r"row 110 \(2020-01-01 10:00:00\), column 'wind': missing value; fill it, or read with missing",
    ),
    "category missing": (lambda f: f.loc.__setitem__((7, "sky"), None), {}, r"row 7 .*'sky': missing"),
    "static missing": (
        lambda f: f.loc.__setitem__((slice(100, None), "shop"), None),
        {},
        r"row 100 .*column 'shop': missing value",
    ),
    "static varies": (
        lambda f: f.loc.__setitem__((130, "size"), 7.5),
        {},
        r"row 130 .*, column 'size': 7.5, but 1000.0 at .*row 100 .*; a static column has one value a series",
    ),
    "static category varies": (
        lambda f: f.loc.__setitem__((50, "shop"), "other"),
        {},
        r"row 50 .*, column 'shop': 'other', but 'shop a' at .*row 0 ",
    ),
    "unseen": (
        lambda f: f.loc.__setitem__((90, "sky"), "snow"),
        {},
        r"series 'a' at 2020-01-04 18:00:00, column 'sky': 'snow' is no category of the train rows "
        r"\(clear, rain\); train with it, or with unseen=\"unknown\"",
    ),
    "not a number": (
        lambda f: f,
        {"categorical": ["promo", "shop"]},
        r"row 0, column 'sky': .* is not a number",
    ),
    "no such column": (lambda f: f, {"past": ["wimd"], "categorical": []}, "no past column 'wimd'; did you"),
    "nothing known": (
        lambda f: f.assign(sky=None),
        {"missing": "mask"},
        "column 'sky' has no value in the train rows; leave it out",
    ),
    "no numbers known": (
        lambda f: f.assign(price=np.nan),
        {"missing": "mask"},
        "column 'price' has no value in the train rows; leave it out",
    ),
    "targets not told": (
        lambda f: f.assign(more=1.0),
        {"targets": None},
        r"y, more are not all plainly targets; name the covariates",
    ),
    "a series without train values": (
        lambda f: f.loc.__setitem__((slice(0, 69), "y"), np.nan),
        {"missing": "mask", "scaling": "series"},
        "series 'a': column 'y' has no value in the train rows",
    ),
    "only a future": (
        lambda f: f.loc.__setitem__((slice(0, 99), "y"), np.nan),
        {},
        r"row 0 .*: this row and those after it, to the series' end, have no target value",
    ),
    "the id as covariate": (lambda f: f, {"past": ["unique_id"], "categorical": []}, "cannot be a covariate"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_covariates_are_named(tmp_path: Path, what: str) -> None:
    change, options, message = BAD[what]
    frame = stores().astype({"shop": object, "sky": object})
    changed = change(frame)
    with pytest.raises(DataError, match=message):
        made(changed if isinstance(changed, pd.DataFrame) else frame, tmp_path, **options)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"past": ["u"], "future": ["u"]}, "column 'u' is named twice: in past and in future"),
        ({"targets": ["y"], "past": ["y"]}, "'y' is named twice: in targets and in past"),
        ({"time_column": "t", "static": ["t"]}, "'t' is named twice: in time_column and in static"),
        (
            {"past": ["price"], "categorical": ["prise"]},
            "categorical 'prise' is in none of past, future, static; did you mean 'price'",
        ),
        ({"targets": ["y"], "categorical": ["y"]}, "categorical 'y' is in none of"),
    ],
)
def test_names_that_contradict_each_other(named: dict[str, list[str]], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ForecastData("t.csv", **named)  # type: ignore[arg-type]


def test_unseen_may_be_unknown(tmp_path: Path) -> None:
    frame = stores()
    frame.loc[90, "sky"] = "snow"
    data = made(frame, tmp_path, unseen="unknown")
    batch = data.test_windows.batch(torch.tensor([0]))  # the test part of a: rows 68 and on
    assert batch["past"][0, :, 1].min() >= 1.0
    after = data.test_windows.batch(torch.tensor([12]))
    assert after["past"][0, 90 - 68 - 12, 1] == 0.0


def test_rows_after_the_last_target_are_the_future(tmp_path: Path) -> None:
    frame = stores()
    ahead = store("a", 5.0, T + 5)[T:].assign(y=np.nan, wind=np.nan, sky=None)
    whole = pd.concat([frame[:T], ahead, frame[T:]], ignore_index=True)
    assert torch.equal(made(whole, tmp_path).train_windows.rows, made(frame, tmp_path).train_windows.rows)
    series = read(whole, **NAMED)  # type: ignore[arg-type]
    assert [len(each.ds) for each in series] == [T, 120]
    without = {key: value for key, value in NAMED.items() if key != "future"} | {
        "categorical": ["sky", "shop"]
    }
    with pytest.raises(DataError, match=r"row 100 .*column 'y': missing value"):
        read(whole.drop(columns=["promo", "price"]), **without)  # type: ignore[arg-type]
