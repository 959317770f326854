"""Logs: whatever stands in the file, what becomes of it is defined, counted and told."""

from __future__ import annotations

import gzip
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manyheads.core.errors import DataError, UsageError
from manyheads.recsys.logs import Columns, Log, Rules, read_log
from manyheads.recsys.published import read_published, read_titles
from manyheads.recsys.tables import Tables
from manyheads.recsys.vocabulary import Vocabulary

SKIP = Rules(bad="skip")


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def rows(log: Log) -> list[tuple[str, str]]:
    return [
        (log.user_ids.ids[user], log.item_ids.ids[item])
        for user, item in zip(log.users.tolist(), log.items.tolist(), strict=True)
    ]


def test_rows_stand_by_user_and_time_and_equal_times_in_the_files_order(tmp_path: Path) -> None:
    path = write(
        tmp_path / "log.csv",
        "user_id,item_id,timestamp\nb,x,5\na,z,9\na,y,3\nb,w,5\na,x,9\nb,y,5\na,w,3\n",
    )
    log = read_log(path)
    assert rows(log) == [("b", i) for i in "xwy"] + [("a", i) for i in "ywzx"]
    assert log.times is not None and log.times.tolist() == [5, 5, 5, 3, 3, 9, 9]
    assert log.summary.unsorted == 2  # y is earlier than z, w than x
    assert str(log.summary) == "7 rows, unsorted 2, kept 7: 2 users, 4 items"


def test_every_kind_of_bad_row_is_counted_and_left_out(tmp_path: Path) -> None:
    path = write(
        tmp_path / "log.csv",
        "user_id,item_id,timestamp,rating\n"
        "u1,i1,10,5\n"
        ",i2,11,5\n"  # no user
        " ,i3,11,5\n"  # blanks alone
        "u1,,12,5\n"  # no item
        "u1,i4,soon,5\n"  # no time
        "u1,i5,,5\n"
        "u1,i5,inf,5\n"
        "u1,i6,13\n"  # a cell too few
        "u1,i7,14,well\n"  # no rating
        "u1,i8,15,2\n"  # rated low
        "u1,i1,10,4\n"  # again
        " u1 ,i9,9.5,4.0\n",
    )
    log = read_log(path, rules=Rules("skip", "first", min_rating=3))
    assert rows(log) == [("u1", "i9"), ("u1", "i1")]
    assert vars(log.summary) == {
        "rows": 11, "broken": 1, "no_user": 2, "no_item": 1, "no_time": 3, "no_rating": 1, "low_rating": 1,
        "duplicates": 1, "unsorted": 1, "kept": 2, "users": 1, "items": 2,
    }  # fmt: skip
    assert log.item_ids.ids == ["i1", "i9"]  # what is left out gets no number


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (",i1,3", r"row 2: 'user_id' is missing"),
        ("u1,,3", r"row 2: 'item_id' is missing"),
        ("u1,i1,never", r"row 2: 'timestamp' cannot be used"),
        ("u1,i1", r"line 3: 2 cells, not 3"),
    ],
)
def test_a_bad_row_is_an_error_that_says_where(tmp_path: Path, line: str, said: str) -> None:
    path = write(tmp_path / "log.csv", f"user_id,item_id,timestamp\nu1,i1,1\n{line}\n")
    with pytest.raises(DataError, match=said) as error:
        read_log(path)
    assert "`bad: skip`" in str(error.value)


@pytest.mark.parametrize("batch", [1, 3, 1000])
def test_the_same_log_whatever_the_batches(
    tmp_path: Path, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "user_id": rng.integers(0, 9, 200),
            "item_id": rng.integers(0, 20, 200),
            "timestamp": rng.integers(0, 50, 200),
        }
    )
    whole = read_log(frame)
    monkeypatch.setattr("manyheads.recsys.tables.ROWS", batch)
    frame.to_parquet(tmp_path / "log.parquet", row_group_size=7)
    for log in (read_log(frame), read_log(tmp_path / "log.parquet")):
        assert rows(log) == rows(whole)
        assert log.summary == whole.summary
    order = frame.assign(
        row=range(200), first=frame["user_id"].map(frame["user_id"].drop_duplicates().tolist().index)
    )
    wanted = order.sort_values(["first", "timestamp", "row"])
    assert rows(whole) == [
        (str(u), str(i)) for u, i in zip(wanted["user_id"], wanted["item_id"], strict=True)
    ]


def test_first_of_equal_rows_stays_and_others_too(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {"user_id": [1, 1, 1, 1, 2], "item_id": [7, 8, 7, 7, 7], "timestamp": [3, 3, 3, 4, 3]}
    )
    assert read_log(frame).summary.duplicates == 1
    assert len(read_log(frame).items) == 5
    kept = read_log(frame, rules=Rules(duplicates="first"))
    assert rows(kept) == [("1", "7"), ("1", "8"), ("1", "7"), ("2", "7")]
    assert kept.times is not None and kept.times.tolist() == [3, 3, 4, 3]
    without = read_log(frame, Columns(timestamp=None), Rules(duplicates="first"))
    assert rows(without) == [("1", "7"), ("1", "8"), ("2", "7")]
    assert without.times is None


def test_ids_of_any_kind_are_text() -> None:
    users = [1, 1, 1, 1]
    for items in (
        pd.Series([10, 11, 12, 13]),
        pd.Series(["10", " 11", "12 ", "13"]),
        pd.Series([10.0, 11.0, 12.0, 13.0]),
        pd.Series([10, "11", 12.0, "13"], dtype=object),
        pd.Series(["10", "11", "12", "13"], dtype="category"),
        pd.Series([10, 11, 12, 13], dtype="Int64"),
    ):
        log = read_log(pd.DataFrame({"user_id": users, "item_id": items}), Columns(timestamp=None))
        assert log.item_ids.ids == ["10", "11", "12", "13"], items.dtype
    gaps = pd.DataFrame({"user_id": users, "item_id": [1.0, np.nan, 2.5, 3.0]})
    log = read_log(gaps, Columns(timestamp=None), SKIP)
    assert (log.item_ids.ids, log.summary.no_item) == (["1", "3"], 2)
    with pytest.raises(DataError, match="'item_id' holds timestamp"):
        read_log(pd.DataFrame({"user_id": users, "item_id": pd.to_datetime(users)}), Columns(timestamp=None))


def test_times_are_numbers_or_dates_and_never_both(tmp_path: Path) -> None:
    def times(*values: object) -> list[float]:
        frame = pd.DataFrame({"user_id": 1, "item_id": range(len(values)), "timestamp": list(values)})
        log = read_log(frame, rules=SKIP)
        assert log.times is not None
        return [float(time) for time in log.times]

    assert times(3, 1, 2) == [1, 2, 3]
    assert times(1.5, 1.25) == [1.25, 1.5]
    assert times("1.5", "x", "1") == [1, 1.5]
    midnight = 86_400_000_000.0
    assert times("1970-01-02", "1970-01-01") == [0, midnight]
    assert times("1970-01-02T00:00:00Z", "1970-01-02 02:00:00+02:00", "never") == [midnight, midnight]
    assert times(pd.Timestamp("1970-01-02"), pd.Timestamp("1970-01-01")) == [0, midnight]
    first = write(tmp_path / "1.csv", "user_id,item_id,timestamp\nu,i,5\n")
    second = write(tmp_path / "2.csv", "user_id,item_id,timestamp\nu,i,2020-01-01\n")
    assert read_log([first, second], rules=SKIP).summary.no_time == 1
    with pytest.raises(DataError, match=r"2\.csv, row 1: 'timestamp' cannot be used"):
        read_log(tmp_path)


def test_files_packed_tabbed_and_several_are_one_log(tmp_path: Path) -> None:
    text = "who\twhat\twhen\n" + "".join(f"{n % 3}\t{n}\t{n}\n" for n in range(30))
    with gzip.open(tmp_path / "a.tsv.gz", "wt") as file:
        file.write(text)
    table = {"who": [str(n % 3) for n in range(30, 60)], "what": [str(n) for n in range(30, 60)]}
    pq.write_table(pa.table({**table, "when": list(range(30, 60))}), tmp_path / "b.parquet")
    log = read_log(tmp_path, Columns("who", "what", "when"))
    assert rows(log) == [(str(u), str(n)) for u in range(3) for n in range(u, 60, 3)]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("log.csv", b"", "is empty"),
        ("log.csv", b"user_id,item_id,timestamp\n", "no row that can be used"),
        ("log.csv", b"user,item_id,timestamp\nu,i,1\n", "no column 'user_id'.*did you mean 'user'"),
        ("log.csv", b"user_id,item_id,item_id,timestamp\nu,i,i,1\n", "two columns 'item_id'"),
        ("log.csv", b"user_id,item_id,timestamp\n\xff\xfe,i,1\n", "cannot be read"),
        ("log.parquet", b"PAR1", "cannot be read"),
        ("log.csv.gz", b"no gzip", "cannot be read"),
    ],
)
def test_a_table_that_is_none_is_an_error_with_its_name(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said):
        read_log(tmp_path / name)


def test_no_source_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no file"):
        read_log(tmp_path / "none.csv")
    write(tmp_path / "notes.txt", "")
    with pytest.raises(UsageError, match="holds no table"):
        read_log(tmp_path)
    with pytest.raises(UsageError, match="is no table"):
        read_log(tmp_path / "notes.txt")


def test_a_vocabulary_grows_at_its_end_and_keeps_its_numbers() -> None:
    first = read_log(pd.DataFrame({"user_id": [1, 1], "item_id": ["b", "a"], "timestamp": [1, 2]}))
    later = pd.DataFrame({"user_id": [1, 2, 2], "item_id": ["c", "a", "b"], "timestamp": [3, 4, 5]})
    grown = read_log(later, item_ids=first.item_ids)
    assert grown.item_ids.ids == ["b", "a", "c"]
    assert first.item_ids.ids == ["b", "a"]
    fixed = read_log(later, item_ids=first.item_ids, grow=False)
    assert fixed.items.tolist() == [-1, 1, 0]
    assert fixed.item_ids is first.item_ids
    assert fixed.summary.items == 2


def test_a_vocabulary_is_written_and_read() -> None:
    ids = ["a", "b\n", "ü", *map(str, range(10_000))]
    text = Vocabulary(ids).to_json()
    assert len(text) < 40_000
    assert Vocabulary.from_json(text).ids == ids
    for broken in (text[:-8], "no base64!", "", Vocabulary(["a"]).to_json()[::-1], None, 3):
        with pytest.raises(DataError, match="list of ids"):
            Vocabulary.from_json(broken)
    with pytest.raises(DataError, match="twice"):
        Vocabulary(["a", "a"])


def test_the_movielens_logs_are_what_their_readmes_say(movielens) -> None:
    found = {name: movielens.log(name).summary for name in ("ml_100k", "ml_1m", "ml_latest_small")}
    assert {n: (s.kept, s.users, s.items, s.duplicates) for n, s in found.items()} == {
        "ml_100k": (100_000, 943, 1682, 0),
        "ml_1m": (1_000_209, 6040, 3706, 0),
        "ml_latest_small": (100_836, 610, 9724, 0),
    }
    liked = read_published("ml_100k", movielens.folder("ml_100k"), Rules(min_rating=4))
    assert (liked.summary.kept, liked.summary.low_rating) == (55_375, 44_625)
    with pytest.raises(UsageError, match="no ratings"):
        read_published("ml_1m", movielens.folder("ml_1m"), Rules(min_rating=4))


@pytest.mark.parametrize("name", ["ml_100k", "ml_1m", "ml_latest_small"])
def test_every_item_has_a_title(name: str, movielens) -> None:
    titles = read_titles(name, movielens.folder(name))
    assert set(movielens.log(name).item_ids.ids) <= set(titles)
    assert titles["1"]["title"] == "Toy Story (1995)"
    assert "Animation" in titles["1"]["genres"] and "|" not in titles["1"]["genres"]


def test_a_headerless_table_takes_names(tmp_path: Path) -> None:
    path = write(tmp_path / "u.data", "1\t2\t3\t4\n1\t3\t3\t5\n")
    log = read_log(Tables(path, ("user_id", "item_id", "rating", "timestamp")))
    assert rows(log) == [("1", "2"), ("1", "3")]


MANY = 10_000_000


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_ten_million_rows_are_prepared_within_4_gib(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"log.{kind}"
    write_many(path)
    code = (
        "import sys, time; from manyheads.recsys.logs import read_log\n"
        "from manyheads.recsys.sequences import Sequences, k_core\n"
        "from manyheads.recsys.splits import leave_one_out\n"
        "log = read_log(sys.argv[1]); kept, _ = k_core(Sequences.of(log), 5, 5)\n"
        "print(log.summary, leave_one_out(kept), f'{time.process_time():.1f} s of CPU', sep='; ')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"{kind}: {used:.2f} GiB; {done.stdout.strip()}")
    assert f"kept {MANY:,}" in done.stdout
    assert used < 4


def write_many(path: Path) -> None:
    """Write a log of 10 million rows out of order: 500,000 users, 200,000 items by Zipf's law."""
    rng = np.random.default_rng(0)
    writer = None
    for part in range(20):
        size = MANY // 20
        columns = {
            "user_id": rng.integers(0, 500_000, size),
            "item_id": (200_000 * rng.random(size) ** 3).astype(np.int64),
            "timestamp": rng.integers(1_500_000_000, 1_700_000_000, size),
        }
        if path.suffix == ".csv":
            pd.DataFrame(columns).to_csv(path, mode="a", header=part == 0, index=False)
        else:
            table = pa.table(columns)
            writer = writer or pq.ParquetWriter(str(path), table.schema)
            writer.write_table(table)
    if writer is not None:
        writer.close()
