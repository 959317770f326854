"""Stretches of a table's rows: where they are cut, and that what is read back is all of it."""

from __future__ import annotations

import gzip

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manyheads.core import tables
from manyheads.core.errors import DataError

COLUMNS = {"smiles": [f"C{'C' * (i % 7)}, é" for i in range(100)], "n": [str(i) for i in range(100)]}


def csv_of(columns, end="\n"):
    rows = zip(*columns.values(), strict=True)
    lines = [",".join(columns), *(",".join(f'"{cell}"' for cell in row) for row in rows)]
    return (end.join(lines) + end).encode()


@pytest.fixture(params=["csv", "crlf", "gzip", "parquet"])
def file(request, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "BLOCK", 200)  # some ten lines
    monkeypatch.setattr(tables, "BATCH", 8)
    if request.param == "parquet":
        path = tmp_path / "t.parquet"
        pq.write_table(pa.table(COLUMNS), path, row_group_size=17)
        return path
    data = csv_of(COLUMNS, "\r\n" if request.param == "crlf" else "\n")
    path = tmp_path / ("t.csv.gz" if request.param == "gzip" else "t.csv")
    path.write_bytes(gzip.compress(data) if request.param == "gzip" else data)
    return path


@pytest.mark.parametrize("size", [1, 7, 10, 17, 99, 100, 1000])
def test_stretches_are_the_table(file, size):
    stretches = tables.cut(file, size)
    assert [each.count for each in stretches] == [size] * (100 // size) + [100 % size] * (100 % size > 0)
    assert [each.first for each in stretches] == list(range(0, 100, size))
    found = [table for each in stretches for table in tables.read_rows(each, ["n", "smiles"])]
    assert all(len(table) for table in found)
    assert pa.concat_tables(found).to_pydict() == {"n": COLUMNS["n"], "smiles": COLUMNS["smiles"]}
    for each in (stretches[0], stretches[-1]):
        own = pa.concat_tables(tables.read_rows(each, ["n"]))["n"].to_pylist()
        assert own == COLUMNS["n"][each.first : each.first + each.count]
    assert stretches[-1].where(0) == f"{'row' if file.suffix == '.parquet' else 'line'} " + str(
        stretches[-1].first + (0 if file.suffix == ".parquet" else 2)
    )


@pytest.mark.parametrize("text", ["s\nC\n\n\nO\n\nN\n\n\n", "s\n\n\nC\nO\n\nN"])
def test_empty_lines_are_rows_but_at_the_end(tmp_path, text):
    path = tmp_path / "t.csv"
    path.write_text(text)
    wanted = text.rstrip("\n").split("\n")[1:]
    for size in range(1, 8):
        found = [t for each in tables.cut(path, size) for t in tables.read_rows(each, ["s"])]
        assert pa.concat_tables(found)["s"].to_pylist() == wanted


def test_refused(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(b'a,b\n1,"x\ny"\n2,z\n')
    with pytest.raises(DataError, match="line 2 or below: a quoted cell holds a line break"):
        tables.cut(path, 10)
    path.write_bytes(b"a,b\n1,x\n2\n")
    with pytest.raises(DataError, match="line 3: Expected 2 columns, got 1"):
        tables.cut(path, 10)
    path.write_bytes(b"a,a,image\n1,x,y\n")
    (rows,) = tables.cut(path, 10)
    with pytest.raises(DataError, match=r"no column 'imge'; did you mean 'image'\? \(it has: a, a, image\)"):
        list(tables.read_rows(rows, ["imge"]))
    with pytest.raises(DataError, match="has two columns 'a'"):
        list(tables.read_rows(rows, ["a"]))
    path.write_bytes(b"a\n")
    assert tables.cut(path, 10) == []
    path.write_bytes(b"")
    with pytest.raises(DataError, match="empty file"):
        tables.cut(path, 10)
    path = tmp_path / "t.parquet"
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"t\.parquet: cannot be read"):
        tables.cut(path, 10)
