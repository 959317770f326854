from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manyheads.core.errors import DataError
from manyheads.core.tables import stem_of
from manyheads.timeseries.frames import read

LONG = "unique_id,ds,y\n" + "".join(
    f"{name},2020-01-01 {hour:02d}:00:00,{value}\n"
    for name, base in (("a", 0), ("b", 10))
    for hour, value in enumerate(range(base, base + 5))
)
WIDE = "date,OT,load\n" + "".join(f"2020-01-{day:02d},{day},{day * 0.5}\n" for day in range(1, 7))
HOURS = pd.date_range("2020-01-01", periods=5, freq="h")

Csv = Callable[..., Path]


@pytest.fixture
def csv(tmp_path: Path) -> Csv:
    def write(text: str, name: str = "t.csv") -> Path:
        path = tmp_path / name
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        return path

    return write


def test_long_csv(csv: Csv) -> None:
    a, b = read(csv(LONG))
    assert (a.id, b.id, a.freq, a.columns) == ("a", "b", "h", ("y",))
    assert a.ds.dtype == np.dtype("datetime64[us]")
    assert a.values.dtype == np.float64
    assert b.values[:, 0].tolist() == [10, 11, 12, 13, 14]
    assert a.ds.tolist() == HOURS.to_pydatetime().tolist()


def test_wide_csv(csv: Csv) -> None:
    (series,) = read(csv(WIDE, "meters.csv"))
    assert (series.id, series.columns, series.freq, series.values.shape) == (
        "meters",
        ("OT", "load"),
        "D",
        (6, 2),
    )
    (one,) = read(csv(WIDE), targets=["load"])
    assert one.columns == ("load",)
    assert one.values[:, 0].tolist() == [0.5, 1, 1.5, 2, 2.5, 3]


def test_a_panel_needs_its_targets_named(csv: Csv) -> None:
    text = LONG.replace("y\n", "y,price\n").replace(",ds,y,price", ",ds,y,price")
    text = "\n".join([text.splitlines()[0], *(line + ",7" for line in text.splitlines()[1:])])
    with pytest.raises(DataError, match=r'name the covariates with past, .* targets=\["y"\]'):
        read(csv(text))
    (a, _) = read(csv(text), targets=["price", "y"])
    assert a.columns == ("price", "y")
    assert a.values[:2].tolist() == [[7, 0], [7, 1]]


@pytest.mark.parametrize("ending", [".csv.gz", ".parquet", "frame", "frame with an index"])
def test_other_sources_equal_csv(csv: Csv, tmp_path: Path, ending: str) -> None:
    expected = read(csv(WIDE))[0]
    frame = pd.read_csv(csv(WIDE), parse_dates=["date"])
    if ending == ".csv.gz":
        found = read(csv(WIDE, "t.csv.gz"))[0]
    elif ending == ".parquet":
        frame.to_parquet(tmp_path / "t.parquet")
        found = read(tmp_path / "t.parquet")[0]
    else:
        found = read(frame.set_index("date") if "index" in ending else frame)[0]
    assert (found.columns, found.freq) == (expected.columns, expected.freq)
    np.testing.assert_array_equal(found.values, expected.values)
    np.testing.assert_array_equal(found.ds, expected.ds)


def test_rows_of_a_series_may_be_anywhere_in_time_order(csv: Csv) -> None:
    head, *rows = LONG.splitlines()
    mixed = [row for pair in zip(rows[:5], rows[5:], strict=True) for row in pair]
    found = read(csv("\n".join([head, *mixed])))
    assert [series.values[:, 0].tolist() for series in found] == [[0, 1, 2, 3, 4], [10, 11, 12, 13, 14]]


def test_named_columns(csv: Csv) -> None:
    text = LONG.replace("unique_id,ds,y", "meter,when,kWh")
    found = read(csv(text), time_column="when", id_column="meter")
    assert [series.id for series in found] == ["a", "b"]
    assert found[0].columns == ("kWh",)


@pytest.mark.parametrize(
    "stamp",
    [
        "2020-01-01T0{h}:00:00",
        "2020-01-01 0{h}:00",
        "2020/1/1 {h}:00",
        "2020-01-01T0{h}:00:00Z",
        "2020-01-01 0{h}:00:00.000000",
        "2020-01-01T0{g}:00:00+02:00",
        "2020-01-01 0{g}:00+0200",
        " 2020-01-01 0{h}:00:00 ",
    ],
)
def test_forms_of_timestamps(csv: Csv, stamp: str) -> None:
    rows = "".join(f"{stamp.format(h=h, g=h + 2)},{h}\n" for h in range(5))
    (series,) = read(csv("ds,y\n" + rows))
    assert series.ds.tolist() == HOURS.to_pydatetime().tolist()  # with a zone: in UTC


def test_months_and_years_without_a_day(csv: Csv) -> None:
    months = "".join(f"1949-{m:02d},{m}\n" for m in range(1, 13))
    assert read(csv("month,passengers\n" + months), time_column="month")[0].freq == "MS"
    years = "".join(f"{year},1\n" for year in range(1949, 1960))
    assert read(csv("time,y\n" + years))[0].freq == "YS-JAN"


def test_zoned_parquet_and_frames_are_read_in_utc(tmp_path: Path) -> None:
    frame = pd.DataFrame({"ds": HOURS.tz_localize("UTC").tz_convert("Asia/Tokyo"), "y": range(5)})
    frame.to_parquet(tmp_path / "t.parquet")
    for source in (frame, tmp_path / "t.parquet"):
        assert read(source)[0].ds.tolist() == HOURS.to_pydatetime().tolist()


def test_numbers_are_read_to_the_last_bit(csv: Csv) -> None:
    values = np.random.default_rng(0).normal(size=500) * 10.0 ** np.arange(-250, 250)
    rows = "".join(
        f"{d},{v!r}\n" for d, v in zip(pd.date_range("2020", periods=500), values.tolist(), strict=True)
    )
    assert read(csv("ds,y\n" + rows))[0].values[:, 0].tobytes() == values.tobytes()


@pytest.mark.parametrize("cell", ["", "NaN", "NA", "null", "None", " "])
def test_missing_values_are_refused_or_masked(csv: Csv, cell: str) -> None:
    path = csv(WIDE.replace("2020-01-03,3,", f"2020-01-03,{cell},"))
    with pytest.raises(DataError, match=r"t.csv, line 4 \(2020-01-03 00:00:00\), column 'OT': missing value"):
        read(path)
    values = read(path, missing="mask")[0].values
    assert np.isnan(values).sum() == 1
    assert np.isnan(values[2, 0])


def test_missing_values_in_a_frame(tmp_path: Path) -> None:
    frame = pd.DataFrame({"ds": HOURS, "y": [0.0, 1.0, np.nan, 3.0, 4.0]})
    frame.to_parquet(tmp_path / "t.parquet")
    for source in (frame, tmp_path / "t.parquet"):
        with pytest.raises(DataError, match=r"row 2 \(2020-01-01 02:00:00\), column 'y': missing"):
            read(source)


BAD = {
    "unsorted": (LONG.replace("b,2020-01-01 03", "b,2019-12-31 03"), r"line 10 .*sort each series by time"),
    "doubled": (
        LONG.replace("b,2020-01-01 03", "b,2020-01-01 02"),
        r"line 10 .*2020-01-01 02:00:00 is there twice",
    ),
    "gap": (
        LONG.replace("b,2020-01-01 03:00:00,13\n", ""),
        r"line 10 .*is not one step \(h\) after 2020-01-01 02",
    ),
    "irregular": (
        LONG.replace("b,2020-01-01 03:00", "b,2020-01-01 03:07"),
        r"line 10 .*03:07:00 is not one step",
    ),
    "another frequency": (
        LONG[: LONG.index("b,")] + "".join(f"b,2020-01-0{d},1\n" for d in range(1, 6)),
        r"series 'b' has frequency D, 'a' has h",
    ),
    "no frequency to see": (
        "ds,y\n2020-01-01,1\n2020-01-02,1\n",
        r"line 2 .*2 rows do not show a frequency; give freq",
    ),
    "not numeric": (WIDE.replace(",4,", ",four,"), r"t.csv, line 5, column 'OT': 'four' is not a number"),
    "underscored": (WIDE.replace(",4,", ",4_0,"), r"line 5, column 'OT': '4_0' is not a number"),
    "infinite": (WIDE.replace(",4,", ",-inf,"), r"line 5, column 'OT': infinite value"),
    "no date": (
        WIDE.replace("2020-01-04", "soon"),
        r"line 5, column 'date': 'soon' is not a date; write it year first",
    ),
    "day first": (
        WIDE.replace("2020-01-04", "04/01/2020"),
        r"line 5, column 'date': '04/01/2020' is not a date",
    ),
    "no such day": (
        WIDE.replace("2020-01-04", "2020-02-30"),
        r"line 5, column 'date': '2020-02-30' is not a date",
    ),
    "no timestamp": (WIDE.replace("2020-01-04", ""), r"line 5, column 'date': '' is not a date"),
    "mixed zones": (
        "ds,y\n2020-01-01 00:00+01:00,1\n2020-01-01 01:00+01:00,2\n2020-01-01 02:00+02:00,3\n",
        r"line 4, column 'ds': mixed time zones, '\+0200' after '\+0100'; write all timestamps in UTC",
    ),
    "a zone at times": (
        "ds,y\n2020-01-01 00:00Z,1\n2020-01-01 01:00,2\n",
        r"line 3.*mixed time zones, 'none' after",
    ),
    "no id": (
        LONG.replace("b,2020-01-01 02", ",2020-01-01 02"),
        r"t.csv, line 9: no id in column 'unique_id'",
    ),
    "short row": (WIDE.replace(",4,2.0", ",4"), r"t.csv: .*line 5: Expected 3 columns, got 2"),
    "blank line": (WIDE.replace("2020-01-04", "\n2020-01-04"), r"line 5, column 'date': '' is not a date"),
    "no rows": ("ds,y\n", r"t.csv: a header and no rows"),
    "empty": ("", r"t.csv: empty file"),
    "only newlines": ("\n\n", r"t.csv: empty file"),
    "no time column": (
        WIDE.replace("date", "dat"),
        r"no time column .* among dat, OT, load \(is it 'dat'\?\); name it",
    ),
    "two time columns": (WIDE.replace("load", "time"), r"'date' and 'time' could each be the time column"),
    "no target": ("ds\n2020-01-01\n", r"no column to forecast beside 'ds'"),
    "doubled column": (WIDE.replace("load", "OT"), r"two columns are named 'OT'"),
    "semicolons": (WIDE.replace(",", ";"), r"cells are parted by ;; write them with commas"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_csv_is_named_by_its_row(csv: Csv, what: str) -> None:
    text, message = BAD[what]
    with pytest.raises(DataError, match=message):
        read(csv(text))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"time_column": "dates"}, r"no time column 'dates'; did you mean 'date'\?"),
        ({"targets": ["OTT"]}, r"no target column 'OTT'; did you mean 'OT'\? \(columns: date, OT, load\)"),
        ({"id_column": "meter"}, r"no id column 'meter'"),
        ({"targets": ["date"]}, r"time or id column cannot be a target"),
        ({"freq": "h"}, r"line 3 .*2020-01-02 00:00:00 is not one step \(h\)"),
        ({"freq": "fortnight"}, r"unknown frequency 'fortnight'"),
    ],
)
def test_wrong_options(csv: Csv, options: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(csv(WIDE), **options)  # type: ignore[arg-type]


def test_given_frequency_serves_short_series(csv: Csv) -> None:
    assert read(csv("ds,y\n2020-01-31,1\n2020-02-29,2\n"), freq="M")[0].freq == "ME"


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read(tmp_path / "none.csv")
    with pytest.raises(DataError, match="a folder; name its files"):
        read(tmp_path)
    (tmp_path / "t.xlsx").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"not a .csv, .csv.gz or .parquet file"):
        read(tmp_path / "t.xlsx")
    for name in ("t.parquet", "t.csv.gz"):
        (tmp_path / name).write_bytes(b"neither")
        with pytest.raises(DataError, match=f"{name}: cannot be read"):
            read(tmp_path / name)
    cut = gzip.compress(WIDE.encode())[:-10]
    (tmp_path / "cut.csv.gz").write_bytes(cut)
    with pytest.raises(DataError, match=r"cut.csv.gz: cannot be read"):
        read(tmp_path / "cut.csv.gz")
    (tmp_path / "latin.csv").write_bytes(b"date,\xe4\n2020-01-01,1\n")
    with pytest.raises(DataError, match=r"latin.csv: not UTF-8"):
        read(tmp_path / "latin.csv")


def test_columns_of_the_wrong_kind(tmp_path: Path) -> None:
    table = pa.table({"ds": HOURS, "y": [["a"]] * 5})
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"row 0, column 'y': .* cells are not numbers; leave the column out"):
        read(tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"row 0, column 'ds': int64 cells are not dates"):
        read(pd.DataFrame({"ds": range(5), "y": range(5)}))
    with pytest.raises(DataError, match=r"row 3, column 'y': 'x' is not a number"):
        read(pd.DataFrame({"ds": HOURS, "y": [1, 2.5, None, "x", 4]}), missing="mask")
    with pytest.raises(DataError, match=r"row 1, column 'ds': no timestamp"):
        read(pd.DataFrame({"ds": [HOURS[0], None, HOURS[2]], "y": range(3)}))


def test_byte_order_mark_and_windows_line_ends(csv: Csv) -> None:
    (series,) = read(csv("\ufeff" + WIDE.replace("\n", "\r\n") + "\r\n\r\n"))
    assert series.columns == ("OT", "load")
    assert len(series.ds) == 6


def test_an_index_is_no_target(csv: Csv, tmp_path: Path) -> None:
    frame = pd.DataFrame({"ds": HOURS, "y": range(5)}, index=[3, 1, 4, 1, 5])
    frame.to_parquet(tmp_path / "t.parquet")
    assert read(tmp_path / "t.parquet")[0].columns == ("y",)
    with pytest.raises(DataError, match="a column has no name; write the table without its index"):
        read(csv(frame.to_csv()))
    assert read(csv(frame.to_csv()), targets=["y"])[0].columns == ("y",)


def test_ids_keep_their_text(csv: Csv) -> None:
    assert [s.id for s in read(csv(LONG.replace("a,", "007,").replace("b,", "NA,")))] == ["007", "NA"]


@pytest.mark.parametrize("name", ["ETTh1.csv", "ETTh1.csv.gz", "ETTh1.parquet", "ETTh1.CSV"])
def test_stem(name: str) -> None:
    assert stem_of(Path("folder.d") / name) == "ETTh1"
