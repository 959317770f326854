"""Tables of molecules, and of nodes and edges: as a loop would read them, and what is refused."""

from __future__ import annotations

import logging
import time

import numpy as np
import pandas as pd
import pytest
import torch

from manyheads.core.errors import DataError, UsageError
from manyheads.graph.preprocessing import Names, Preprocessing
from manyheads.graph.splits import Split
from manyheads.graph.tables import Attributes, read_graph, read_graphs, read_smiles
from manyheads.graph.targets import Labels

CLASS = Labels(["topic"], "classification")
BY_COLUMN = Split("column")


def write(folder, ending="csv", **tables):
    folder.mkdir(parents=True, exist_ok=True)
    for name, cells in tables.items():
        frame = pd.DataFrame(cells)
        if ending == "csv":
            frame.to_csv(folder / f"{name}.csv", index=False)
        else:
            frame.to_parquet(folder / f"{name}.parquet")
    return folder


def papers(folder, ending="csv", **change):
    """One graph of six nodes."""
    nodes = {
        "id": ["a", "b", "c", "d", "e", "f"],
        "kind": ["x", "y", "x", None, "z", "y"],
        "size": [1.0, 2.0, 3.0, 4.0, None, 5.0],
        "topic": ["u", "v", "u", "v", None, "u"],
        "split": ["train", "train", "val", "val", None, "test"],
    }
    edges = {"source": ["a", "c", "b", "e"], "target": ["b", "a", "f", "d"], "w": [0.5, 1.5, 2.5, 3.5]}
    return write(folder, ending, nodes=nodes | change.get("nodes", {}), edges=change.get("edges", edges))


def pairs(graphs, i=0):
    low, high = graphs.edges[i : i + 2].tolist()
    return list(map(tuple, graphs.edge_index[:, low:high].t().tolist()))


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_nodes_of_one_graph(tmp_path, ending):
    graphs, parts, about = read_graphs(papers(tmp_path, ending), CLASS, BY_COLUMN, "node")
    assert {name: part.tolist() for name, part in parts.items()} == {
        "train": [0, 1],
        "val": [2, 3],
        "test": [5],
    }
    assert graphs.node_ids == list("abcdef")
    assert graphs.level == "node"
    assert graphs.y[:, 0].tolist()[:4] == [0, 1, 0, 1]
    assert graphs.y[4, 0].isnan()
    assert about.target.classes == ("u", "v")
    # kind as one column a category and one for all else, beside the size, standardised by all nodes
    assert graphs.x[:, :4].argmax(1).tolist() == [0, 1, 0, 3, 2, 1]
    sizes = np.array([1, 2, 3, 4, 3, 5])
    np.testing.assert_allclose(graphs.x[:, 4], (sizes - 3) / np.std([1, 2, 3, 4, 5]), atol=1e-6)
    assert sorted(pairs(graphs)) == [(0, 1), (0, 2), (1, 0), (1, 5), (2, 0), (3, 4), (4, 3), (5, 1)]
    # both directions of an edge have its attributes
    found = {pair: float(w) for pair, w in zip(pairs(graphs), graphs.edge_attr[:, 0], strict=True)}
    assert found[0, 1] == found[1, 0] == pytest.approx((0.5 - 2) / np.std([0.5, 1.5, 2.5, 3.5]))
    assert about.model_inputs() == {"node_features": 5, "edge_features": 1, "outputs": 2}


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_what_is_predicted_for_is_read_as_what_was_trained_on(tmp_path, ending):
    graphs, _, about = read_graphs(papers(tmp_path / "one"), CLASS, BY_COLUMN, "node")
    again = Preprocessing.from_json(about.to_json())
    papers(tmp_path / "two", ending)
    found = read_graph(tmp_path / "two" / f"nodes.{ending}", tmp_path / "two" / f"edges.{ending}", again)
    for name in ("x", "edge_index", "edge_attr", "nodes", "edges"):
        assert torch.equal(getattr(found, name), getattr(graphs, name)), name
    other = {"id": ["f", "g"], "kind": ["y", "new"], "size": ["3", ""]}
    write(tmp_path / "three", nodes=other, edges={"source": ["g"], "target": ["f"], "w": [2]})
    found = read_graph(tmp_path / "three" / "nodes.csv", tmp_path / "three" / "edges.csv", again)
    assert found.x.tolist() == [[0, 1, 0, 0, 0], [0, 0, 0, 1, 0]]
    assert found.edge_attr.tolist() == [[0.0], [0.0]]


def naive(edges, directed):
    """Edges of a list of (source, target, attribute), by a loop; a set of edges with their attributes."""
    found = set()
    for source, target, kind in edges:
        found.add((source, target, kind))
        if not directed:
            found.add((target, source, kind))
    return found


@pytest.mark.parametrize("directed", [False, True])
def test_edges_are_those_of_a_loop(tmp_path, directed, caplog):
    rng = np.random.default_rng(0)
    rows = [
        (int(a), int(b), str(c))
        for a, b, c in zip(*rng.integers(0, 12, (2, 150)), rng.choice(["p", "q"], 150), strict=True)
    ]
    source, target, kind = zip(*rows, strict=True)
    nodes = {"id": range(12), "topic": rng.choice(["u", "v"], 12)}
    write(tmp_path, nodes=nodes, edges={"source": source, "target": target, "kind": kind})
    with caplog.at_level(logging.INFO):
        graphs, _, about = read_graphs(
            tmp_path, CLASS, level="node", attributes=Attributes(directed=directed)
        )
    names = about.edge_columns[0].categories
    found = [
        (*pair, names[k]) for pair, k in zip(pairs(graphs), graphs.edge_attr[:, 0].tolist(), strict=True)
    ]
    assert len(found) == len(set(found))
    assert set(found) == naive(rows, directed)
    assert sum(a == b for a, b, _ in found) == len({row for row in rows if row[0] == row[1]})
    distinct = len({(*((a, b) if directed else sorted((a, b))), c) for a, b, c in rows})
    assert f"edges: {150 - distinct} rows say what another one does" in caplog.text
    assert graphs.x.tolist() == [[0]] * 12  # nodes without columns


def many(folder, graph_in_edges=True, ending="csv"):
    """Three graphs, their rows mixed, the nodes of two called alike."""
    nodes = {
        "graph_id": ["g2", "g1", "g2", "g3", "g1", "g2"],
        "id": ["a", "b", "c", "z", "a", "d"],
        "size": [1.0, 2.0, 3.0, 9.0, 4.0, 5.0],
    }
    edges = {"graph_id": ["g1", "g2", "g2"], "source": ["a", "d", "a"], "target": ["b", "a", "c"]}
    if not graph_in_edges:
        nodes["id"] = [f"{graph}{own}" for graph, own in zip(nodes["graph_id"], nodes["id"], strict=True)]
        graph = edges.pop("graph_id")
        edges = {k: [f"{g}{own}" for g, own in zip(graph, v, strict=True)] for k, v in edges.items()}
    graphs = {
        "graph_id": ["g1", "g3", "g2"],
        "y": [1.0, 3.0, 2.0],
        "w": [1, 3, 2],
        "split": ["train", "test", "val"],
    }
    return write(folder, ending, nodes=nodes, edges=edges, graphs=graphs)


@pytest.mark.parametrize("ending", ["csv", "parquet"])
@pytest.mark.parametrize("graph_in_edges", [True, False])
def test_many_graphs_of_one_pair_of_tables(tmp_path, graph_in_edges, ending):
    labels = Labels(["y"], weight="w")
    graphs, parts, about = read_graphs(many(tmp_path, graph_in_edges, ending), labels, BY_COLUMN)
    assert graphs.ids == ["g2", "g1", "g3"]
    assert graphs.sizes.tolist() == [3, 2, 1]
    assert [name[-1] for name in graphs.node_ids] == ["a", "c", "d", "b", "a", "z"]
    assert [sorted(pairs(graphs, i)) for i in range(3)] == [
        [(0, 1), (0, 2), (1, 0), (2, 0)],
        [(0, 1), (1, 0)],
        [],
    ]
    assert graphs.y[:, 0].tolist() == [2, 1, 3]
    assert graphs.weight.tolist() == [2, 1, 3]
    assert {name: part.tolist() for name, part in parts.items()} == {"train": [1], "val": [0], "test": [2]}
    assert about.target.mean == (1.0,)
    assert about.node_columns[0].mean == (3.0,)  # of g1, the training part
    assert graphs.x[:, 0].tolist() == [-2.0, 0.0, 2.0, -1.0, 1.0, 6.0]
    assert len(read_graph(*(tmp_path / f"{name}.{ending}" for name in ("nodes", "edges")), about)) == 3


def test_a_folder_a_graph(tmp_path):
    for name, count in (("first", 3), ("second", 2), ("third", 4)):
        ends = {"source": range(count - 1), "target": range(1, count)}
        write(tmp_path / name, nodes={"id": range(count), "kind": ["x"] * count}, edges=ends)
    write(tmp_path, graphs={"graph_id": ["third", "first", "second"], "topic": ["b", "a", "a"]})
    graphs, parts, _ = read_graphs(tmp_path, CLASS, Split("random", (0.34, 0.33, 0.33)))
    assert graphs.ids == ["first", "second", "third"]
    assert graphs.sizes.tolist() == [3, 2, 4]
    assert graphs.y[:, 0].tolist() == [0, 0, 1]
    assert pairs(graphs, 1) == [(0, 1), (1, 0)]
    assert sum(map(len, parts.values())) == 3
    write(tmp_path / "third", nodes={"id": [1], "sort": ["x"]}, edges={"source": [], "target": []})
    with pytest.raises(DataError, match=r"third/nodes\.csv has other columns than the tables of 'first'"):
        read_graphs(tmp_path, CLASS)


def test_nodes_of_many_graphs(tmp_path):
    folder = many(tmp_path)
    nodes = pd.read_csv(folder / "nodes.csv").assign(charge=[1.0, 2.0, 3.0, 4.0, None, 6.0])
    nodes.to_csv(folder / "nodes.csv", index=False)
    graphs, parts, about = read_graphs(folder, Labels(["charge"]), BY_COLUMN, "node")
    assert graphs.level == "node"
    assert graphs.y[:, 0].nan_to_num(-1).tolist() == [1, 3, 6, 2, -1, 4]
    assert parts["train"].tolist() == [1]  # of graphs
    assert about.target.mean == (2.0,)
    assert [column.name for column in about.node_columns] == ["size"]


def test_pairs_need_no_targets(tmp_path):
    graphs, parts, about = read_graphs(papers(tmp_path), None, level="pair")
    assert graphs.y is None
    assert parts == {}
    assert about.level == "pair"
    assert about.model_inputs()["outputs"] == 1


def test_columns_by_other_names(tmp_path):
    folder = papers(tmp_path)
    for name, change in (
        ("nodes", {"id": "paper", "size": "n"}),
        ("edges", {"source": "from", "target": "to"}),
    ):
        pd.read_csv(folder / f"{name}.csv").rename(columns=change).to_csv(folder / f"{name}.csv", index=False)
    names = Names(id="paper", source="from", target="to")
    attributes = Attributes(["n"], [], ["n"])
    graphs, _, about = read_graphs(folder, CLASS, BY_COLUMN, "node", attributes, names)
    assert graphs.x.dtype == torch.int64  # a number as a category
    assert graphs.edge_attr is None
    assert Preprocessing.from_json(about.to_json()).names == names
    again = read_graph(folder / "nodes.csv", folder / "edges.csv", about)
    assert torch.equal(again.x, graphs.x)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            {"edges": {"source": ["a", "q", "r"], "target": ["b", "a", "a"]}},
            r"edges.csv, line 3: source 'q' is no node of .*nodes.csv; so are those of 1 more of the 3 edges",
        ),
        (
            {"edges": {"source": ["a", None], "target": ["b", "a"]}},
            r"edges.csv, line 3: column 'source' is empty, here and in 0 more rows",
        ),
        ({"edges": {"source": ["a"], "goal": ["b"]}}, "no column 'target'"),
        ({"nodes": {"id": ["a", "b", "c", "d", "e", "a"]}}, "1 rows name a node again, the first is 'a'"),
        ({"nodes": {"id": ["a", "b", None, "d", "e", "f"]}}, r"nodes.csv, line 4: column 'id' is empty"),
        ({"nodes": {"topic": ["u"] * 6}}, "column 'topic' has 1 classes, and two are needed"),
        ({"nodes": {"topic": [None] * 6}}, "has 0 classes"),
        ({"nodes": {"split": ["train"] * 6}}, "leaves the part 'val' empty"),
        ({"nodes": {"split": ["tain"] * 6}}, "'tain'; did you mean 'train'"),
        ({"nodes": {"size": [1.0, float("inf")] * 3}}, "infinite"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, change, why):
    with pytest.raises(DataError, match=why):
        read_graphs(papers(tmp_path, **change), CLASS, BY_COLUMN, "node")


def test_many_graphs_that_cannot_be_used(tmp_path):
    folder, labels = many(tmp_path), Labels(["y"])

    def refused(name, why, change):
        kept = (folder / f"{name}.csv").read_text()
        change(pd.read_csv(folder / f"{name}.csv")).to_csv(folder / f"{name}.csv", index=False)
        with pytest.raises(DataError, match=why):
            read_graphs(folder, labels, BY_COLUMN)
        (folder / f"{name}.csv").write_text(kept)

    refused(
        "edges", "where graphs share nodes' names, the table of edges", lambda t: t.drop(columns="graph_id")
    )
    refused(
        "edges", r"edges.csv, line 3: target 'g2: b' is no node", lambda t: t.assign(target=["b", "b", "c"])
    )
    refused("nodes", r"nodes.csv, line 3: column 'id' is empty", lambda t: t.assign(id=["a", None, *"czad"]))
    refused("graphs", "has no row for 1 graphs, the first is 'g3'", lambda t: t.drop(index=1))
    refused("graphs", "'g1' twice", lambda t: t.assign(graph_id=["g1", "g1", "g2"]))
    refused("nodes", "a row without nodes for 1 graphs, the first is 'g3'", lambda t: t.drop(index=3))
    refused("graphs", "column 'y' must be of numbers", lambda t: t.assign(y=["1", "x", "2"]))
    (folder / "graphs.csv").unlink()
    with pytest.raises(DataError, match="no table `graphs`"):
        read_graphs(folder, labels)


def test_columns_of_names_are_refused(tmp_path):
    count = 5000
    nodes = {
        "id": range(count),
        "title": [f"paper {i}" for i in range(count)],
        "topic": ["u", "v"] * (count // 2),
    }
    write(tmp_path, nodes=nodes, edges={"source": [0], "target": [1]})
    with pytest.raises(DataError, match="column 'title' has 5000 different texts"):
        read_graphs(tmp_path, CLASS, level="node")
    assert read_graphs(tmp_path, CLASS, level="node", attributes=Attributes([])).graphs.x.shape == (count, 1)
    with pytest.raises(UsageError, match="has a column 'colour'"):
        read_graphs(tmp_path, CLASS, level="node", attributes=Attributes([], categories=["colour"]))


def test_a_cell_with_a_line_break_is_refused(tmp_path):
    folder = papers(tmp_path)
    (folder / "edges.csv").write_text('source,target\n"a\nb",c\n')
    with pytest.raises(DataError, match=r"edges.csv"):
        read_graphs(folder, CLASS, level="node")


def test_an_edge_between_graphs_is_refused(tmp_path):
    folder = many(tmp_path, graph_in_edges=False)
    pd.DataFrame({"source": ["g1a"], "target": ["g2a"]}).to_csv(folder / "edges.csv", index=False)
    with pytest.raises(DataError, match="line 2: an edge joins graph 'g1' with graph 'g2'"):
        read_graphs(folder, Labels(["y"]))


def test_levels_and_targets_belong_together(tmp_path):
    for labels, level in ((None, "node"), (CLASS, "pair")):
        with pytest.raises(UsageError, match="pairs"):
            read_graphs(papers(tmp_path), labels, level=level)


@pytest.mark.parametrize("size", [100_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_large_tables_are_read_without_a_loop(tmp_path, size):
    rng = np.random.default_rng(0)
    names = np.array([f"n{i}" for i in range(size // 10)])
    nodes = {"id": names, "size": rng.normal(size=len(names)), "topic": rng.choice(["u", "v"], len(names))}
    ends = rng.integers(0, len(names), (2, size))
    write(tmp_path, nodes=nodes, edges={"source": names[ends[0]], "target": names[ends[1]]})
    begin = time.process_time()
    graphs, _, _ = read_graphs(tmp_path, CLASS, level="node")
    assert time.process_time() - begin < 20e-6 * size  # a loop takes several times as long
    ordered = np.sort(ends[:, ends[0] != ends[1]], axis=0)
    distinct = np.unique(ordered, axis=1).shape[1]
    loops = len(np.unique(ends[0, ends[0] == ends[1]]))
    assert graphs.edge_index.shape[1] == 2 * distinct + loops


def molecules(folder, **change):
    cells = {
        "smiles": ["CCO", "c1ccccc1", "xx", "CC(=O)O", "CCN", "C1CC1"],
        "id": ["m1", "m2", "m3", "m4", None, "m6"],
        "a": [1, 0, 1, None, None, 0],
        "b": [0, None, 1, 1, None, 0],
        "part": ["train", "train", "train", "val", "test", "test"],
        "weight": [1, 2, 3, 4, 5, 6],
    }
    return write(folder, table=cells | change) / "table.csv"


def test_molecules_with_gaps_and_bad_rows(tmp_path):
    labels, split = Labels(["a", "b"], "multilabel", "weight"), Split("column", column="part")
    path = molecules(tmp_path)
    graphs, parts, about = read_smiles(path, labels, split, features="zinc", errors="skip")
    assert graphs.ids == ["m1", "m2", "m4", "4", "m6"]
    assert graphs.sizes.tolist() == [3, 6, 4, 3, 3]
    assert graphs.y.nan_to_num(-1).tolist() == [[1, 0], [0, -1], [-1, 1], [-1, -1], [0, 0]]
    assert graphs.weight.tolist() == [1, 2, 4, 5, 6]
    # the fifth row knows nothing: it is in no part
    assert {name: part.tolist() for name, part in parts.items()} == {"train": [0, 1], "val": [2], "test": [4]}
    assert (about.target.kind, about.target.names) == ("multilabel", ("a", "b"))
    with pytest.raises(DataError, match=r"table.csv, line 4: not a SMILES: 'xx'"):
        read_smiles(path, labels, split)


def test_molecules_by_class_and_by_number(tmp_path):
    cells = {
        "smiles": ["C" * (i + 1) for i in range(20)],
        "y": [float(i) for i in range(20)],
        "c": ["10", "9"] * 10,
    }
    path = write(tmp_path, "parquet", table=cells) / "table.parquet"
    graphs, parts, about = read_smiles(path, Labels(["y"]))
    train = graphs.y[parts["train"]]
    assert about.target.mean == (pytest.approx(float(train.mean())),)
    assert about.target.std == (pytest.approx(float(train.std(unbiased=False))),)
    assert graphs.ids == [str(i) for i in range(20)]
    graphs, parts, about = read_smiles(path, Labels(["c"], "classification"), Split("folds", folds=10))
    assert about.target.classes == ("9", "10")  # whole numbers in their order
    assert graphs.y[:2, 0].tolist() == [1, 0]
    assert sorted(graphs.y[parts["test"], 0].tolist()) == [0, 1]


@pytest.mark.parametrize(
    ("labels", "change", "why"),
    [
        (Labels(["a"], "multilabel"), {"a": [1, 0, 2, 0, 1, 1]}, "labels are 0, 1 or empty, and there is 2"),
        (Labels(["a"]), {"a": ["1", "x", "2", "3", "4", "5"]}, "column 'a' must be of numbers"),
        (Labels(["a"]), {"a": [None] * 6}, "every target is empty"),
        (Labels(["z"]), {}, "no column 'z'"),
        (Labels(["b"], weight="a"), {}, "weights in column 'a'"),
        (Labels(["b"], weight="a"), {"a": [-1] * 6}, "weights in column 'a'"),
    ],
)
def test_targets_that_cannot_be_used(tmp_path, labels, change, why):
    with pytest.raises(DataError, match=why):
        read_smiles(molecules(tmp_path, smiles=["CC"] * 6, **change), labels)


def test_labels_say_what_they_can():
    with pytest.raises(UsageError, match="classification of the columns"):
        Labels(["a", "b"], "classification")
    with pytest.raises(UsageError):
        Labels([])
