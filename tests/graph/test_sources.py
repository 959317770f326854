"""Sources of prediction: tables of SMILES in stretches, folders of graphs, and what is refused."""

from __future__ import annotations

import gzip

import pandas as pd
import pytest

from manyheads.core.errors import DataError, UsageError
from manyheads.graph.sources import Columns, Stretch, cut_smiles, graph_folders, read_smiles

SMILES = ["CCO", "c1ccccc1", "", "C(=O)O", "N#N", None, "[Na+].[Cl-]"]
NO_ID = Columns()


def pairs(stretches, columns=NO_ID):
    return [(each.id, each.text) for stretch in stretches for each in read_smiles(stretch, columns)]


@pytest.mark.parametrize("ending", ["csv", "csv.gz", "parquet"])
@pytest.mark.parametrize("ids", [None, "id", "name"])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_a_table(tmp_path, ending, ids, size):
    frame = pd.DataFrame({"y": range(7), "structure": SMILES})
    if ids:
        frame[ids] = [f"m{i}" if i != 4 else None for i in range(7)]
    path = tmp_path / f"in.{ending}"
    frame.to_parquet(path, row_group_size=2) if ending == "parquet" else frame.to_csv(path, index=False)
    columns = Columns("structure", ids or "id")
    stretches = cut_smiles(str(path), columns, size)
    assert [each.count for each in stretches] == [size] * (7 // size) + [7 % size] * (7 % size > 0)
    found = pairs(stretches, columns)
    assert [id for id, _ in found] == [f"m{i}" if ids and i != 4 else str(i) for i in range(7)]
    texts = SMILES if ending == "parquet" else [text or "" for text in SMILES]
    assert [text for _, text in found] == texts
    assert pairs([stretches[-1]], columns) == found[-stretches[-1].count :]


def test_several_tables_and_a_folder_of_them(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    pd.DataFrame({"smiles": ["C", "N"]}).to_csv(folder / "b.csv", index=False)
    pd.DataFrame({"smiles": ["O"], "id": ["w"]}).to_parquet(folder / "a.parquet")
    (folder / "_SUCCESS").write_text("{}")
    (folder / ".tmp-1.csv").write_text("half a line")
    wanted = [("a/w", "O"), ("b/0", "C"), ("b/1", "N")]
    assert pairs(cut_smiles(folder, NO_ID, 1)) == wanted
    assert pairs(cut_smiles([str(folder / "a.parquet"), str(folder / "b.csv")], NO_ID, 9)) == wanted
    assert pairs(cut_smiles(folder / "b.csv", NO_ID, 9)) == [("0", "C"), ("1", "N")]
    with pytest.raises(UsageError, match="two sources are called 'b'"):
        cut_smiles([folder / "b.csv", folder / "b.csv"], NO_ID, 9)


def test_a_frame():
    frame = pd.DataFrame({"smiles": ["C", None, "N"], "id": [7, 8, 9]})
    stretches = cut_smiles(frame, NO_ID, 2)
    assert [each.count for each in stretches] == [2, 1]
    assert pairs(stretches) == [("7", "C"), ("8", None), ("9", "N")]


def test_what_is_no_table_of_smiles(tmp_path):
    path = tmp_path / "in.csv"
    path.write_text("smile,y\nC,1\n")
    with pytest.raises(DataError, match=r"no column 'smiles'; did you mean 'smile'\? \(it has: smile, y\)"):
        cut_smiles(path, NO_ID, 9)
    with pytest.raises(DataError, match="no column 'key'"):
        cut_smiles(path, Columns("smile", "key", needed=True), 9)
    assert pairs(cut_smiles(path, Columns("smile", "key"), 9), Columns("smile", "key")) == [("0", "C")]
    with pytest.raises(UsageError, match="no file or folder"):
        cut_smiles(tmp_path / "none.csv", NO_ID, 9)
    with pytest.raises(UsageError, match="graphs come from a CSV or parquet table with a column of SMILES"):
        cut_smiles(7, NO_ID, 9)
    (tmp_path / "text.md").write_text("C")
    with pytest.raises(DataError, match=r"not a \.csv"):
        cut_smiles(tmp_path / "text.md", NO_ID, 9)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no table"):
        cut_smiles(tmp_path / "empty", NO_ID, 9)
    broken = tmp_path / "b.csv.gz"
    broken.write_bytes(gzip.compress(b"smiles\n" + b"CCO\n" * 1000)[:-20])
    with pytest.raises(DataError, match=r"b\.csv\.gz: cannot be read"):
        pairs(cut_smiles(broken, NO_ID, 9))
    assert isinstance(cut_smiles(pd.DataFrame({"smiles": ["C"]}), NO_ID, 9)[0], Stretch)


def graph(folder, nodes="nodes.csv", edges="edges.csv"):
    folder.mkdir(parents=True)
    (folder / nodes).write_text("id\n0\n1\n")
    (folder / edges).write_text("source,target\n0,1\n")
    return folder


def test_folders(tmp_path):
    one = graph(tmp_path / "one")
    (only,) = graph_folders(str(one))
    assert (only.id, only.nodes, only.edges) == ("", str(one / "nodes.csv"), str(one / "edges.csv"))
    many = tmp_path / "many"
    for name in ("b", "a/y", "a/x", ".hidden"):
        graph(many / name, "nodes.csv.gz", "Edges.csv")
    assert [each.id for each in graph_folders(many)] == ["a/x", "a/y", "b"]
    assert [each.id for each in graph_folders([many, one])] == ["many/a/x", "many/a/y", "many/b", "one"]


def test_what_is_no_graph(tmp_path):
    (graph(tmp_path / "half") / "edges.csv").unlink()
    with pytest.raises(DataError, match="half has a table `nodes` and no table `edges`"):
        graph_folders(tmp_path)
    (graph(tmp_path / "twice") / "nodes.parquet").write_text("")
    with pytest.raises(DataError, match=r"several tables `nodes`: nodes\.csv, nodes\.parquet"):
        graph_folders(tmp_path / "twice")
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="none holds no graph"):
        graph_folders(tmp_path / "none")
    with pytest.raises(UsageError, match="is no folder; graphs come from a folder with tables"):
        graph_folders(tmp_path / "half" / "nodes.csv")
    with pytest.raises(UsageError, match="no file or folder"):
        graph_folders(tmp_path / "nowhere")
