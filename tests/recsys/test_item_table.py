"""Tables of items: attributes as text, from CSV, parquet and frames; what cannot be read is named."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manyheads.core.errors import DataError
from manyheads.recsys.item_table import read_items


def test_cells_become_text(tmp_path: Path) -> None:
    path = tmp_path / "items.parquet"
    columns = {
        "year": pa.array([1995, None, 1996]),
        "item_id": pa.array([7, 8, 9]),
        "price": pa.array([9.5, 3.0, float("nan")]),
        "genres": pa.array([["Comedy", None, " Crime "], [], ["Drama"]]),
        "title": pa.array([" Toy Story ", "", None]).dictionary_encode(),
        "sold": pa.array([True, None, False]),
    }
    pq.write_table(pa.table(columns), path)
    found = read_items(path)
    assert found.attributes == ("year", "price", "genres", "title", "sold")
    assert found.items == {
        "7": {
            "year": "1995",
            "price": "9.5",
            "genres": "Comedy, Crime",
            "title": "Toy Story",
            "sold": "True",
        },
        "8": {"year": None, "price": "3", "genres": None, "title": None, "sold": None},
        "9": {"year": "1996", "price": None, "genres": "Drama", "title": None, "sold": "False"},
    }
    titles = read_items(path, attributes=["title", "genres"])
    assert list(titles.items) == ["7", "9"]  # 8 has no text of these
    assert list(titles.items["7"]) == ["title", "genres"]
    assert titles.texts() == ["title", "Toy Story", "genres", "Comedy, Crime", "genres", "Drama"]
    assert list(titles.select(["9", "5", "7"]).items) == ["9", "7"]


@pytest.mark.parametrize("name", ["items.csv", "items.tsv", "items.csv.gz"])
def test_text_tables_and_frames(name: str, tmp_path: Path) -> None:
    frame = pd.DataFrame({"sku": ["a", "b"], "title": ["one, two", 'a "b"'], "size": [3, None]})
    path = tmp_path / name
    frame.to_csv(path, index=False, sep="\t" if ".tsv" in name else ",")
    wanted = {"a": {"title": "one, two", "size": "3"}, "b": {"title": 'a "b"', "size": None}}
    found = read_items(path, "sku").items
    assert {id: {**row, "size": row["size"] and row["size"][:1]} for id, row in found.items()} == wanted
    assert read_items(frame, "sku").items == wanted


def test_what_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "items.csv"
    for text, said in (
        ("item_id,title\n1,a\n1,b\n", r"items.csv, row 2: item '1' comes twice"),
        ("item_id,title\n1,a\n,b\n", r"items.csv, row 2: 'item_id' is missing"),
        ("item_id\n1\n", "no column of attributes"),
        ("item,title\n1,a\n", "has no column 'item_id'; did you mean 'item'"),
        ("item_id,title\n1,\n", "has no item with text"),
        ("item_id,title\n1,a,b\n", "line 2: 3 cells, not 2"),
        ("", "is empty"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=said):
            read_items(path)
    path.write_text("item_id,title\n1,a\n")
    with pytest.raises(DataError, match="has no column 'titel'; did you mean 'title'"):
        read_items(path, attributes=["titel"])
    pq.write_table(
        pa.table({"item_id": [1], "when": pa.array([0], pa.timestamp("s"))}), tmp_path / "i.parquet"
    )
    with pytest.raises(DataError, match="column 'when' holds timestamp"):
        read_items(tmp_path / "i.parquet")
