"""Nodes and graphs of tables: whole and sampled, in any batch and shard; large graphs kept as arrays."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from manyheads.core import hub
from manyheads.core import predictor as core
from manyheads.core.catalog import create_model
from manyheads.core.errors import DataError, ManyheadsError, UsageError
from manyheads.graph import records, stored
from manyheads.graph.columns import Column
from manyheads.graph.preprocessing import Encoding, Preprocessing, Target

FEATURE = Column("f", None, (0.5,) * 3, (2.0,) * 3, 3)
KIND = Column("kind", ("x", "y", "z"))
CLASSES = Target("classification", ("topic",), ("a", "b", "c"))
NODES = Preprocessing("tables", node_columns=(FEATURE, KIND), level="node", target=CLASSES)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MANYHEADS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(folder, nodes=120, edges=500, seed=0, ending="csv"):
    """A graph's tables: two hubs, some isolated nodes, names in no order."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    names = [f"n{i}" for i in rng.permutation(nodes)]
    frame = pd.DataFrame(rng.normal(size=(nodes, 3)), columns=["f_0", "f_1", "f_2"])
    frame.insert(0, "id", names)
    frame["kind"] = rng.choice(["x", "y", "z", "new"], nodes)
    ends = rng.integers(0, nodes - 4, (2, edges))
    ends[1, : edges // 3] = rng.integers(0, 2, edges // 3)
    ends = ends[:, ends[0] != ends[1]]
    ends = np.unique(np.sort(ends, axis=0), axis=1)
    links = pd.DataFrame(
        {
            "source": [names[i] for i in ends[0]],
            "target": [names[i] for i in ends[1]],
            "w": rng.normal(size=ends.shape[1]),
        }
    )
    for name, table in (("nodes", frame), ("edges", links)):
        if ending == "csv":
            table.to_csv(folder / f"{name}.csv", index=False)
        else:
            table.to_parquet(folder / f"{name}.parquet")
    return names


def load(path, preprocessing, name="gated_gcn", **arguments):
    torch.manual_seed(0)
    arguments = {"hidden_dim": 16, "L": 2, "readout": "node", **preprocessing.model_inputs(), **arguments}
    hub.save(
        path,
        create_model(name, **arguments),
        domain="graph",
        name=name,
        arguments=arguments,
        preprocessing=preprocessing.to_json(),
    )
    return hub.load(path)


def rows(predictor, source, size, batch):
    """All rows by shards and batches of these sizes."""
    found = []
    for shard in predictor.shards(source, size):
        assert predictor.count(shard) <= size
        for some, bad, _ in core.run(predictor, predictor.read(shard), batch):
            assert not bad
            found += some
    return pd.DataFrame(found, columns=list(predictor.columns))


def close(a, b):
    assert a.id.tolist() == b.id.tolist() and a.label.tolist() == b.label.tolist()
    np.testing.assert_allclose(a.probability, b.probability, atol=1e-5, rtol=1e-5)


MODELS = {
    "gated_gcn": replace(
        NODES, edge_columns=(Column("w", None, (0.0,), (1.0,)),), encoding=Encoding("laplacian", 4)
    ),
    "gcn": NODES,
    "gine": replace(NODES, node_columns=(KIND,), encoding=Encoding("degree", 6)),
    "urpe": replace(NODES, distances=4),
    "gps": replace(NODES, encoding=Encoding("random_walk", 4)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("fanouts", [None, (4, 3)])
def test_batches_and_shards_change_nothing(tmp_path, name, fanouts, monkeypatch):
    names = write(tmp_path / "g")
    more = {"n_heads": 4} if name in ("urpe", "gps") else {}
    more |= {"encoding_width": 4} if name == "gps" else {}
    predictor = load(tmp_path / "model", replace(MODELS[name], fanouts=fanouts), name, **more)
    together = predictor.predict(tmp_path / "g")
    assert together.id.tolist() == names and together.probability.nunique() > 40
    close(rows(predictor, tmp_path / "g", 1000, 1), together)
    close(rows(predictor, tmp_path / "g", 17, 5), together)
    monkeypatch.setattr(records, "MOST_NODES", 50)
    close(rows(predictor, tmp_path / "g", 64, 64), together)


@pytest.mark.parametrize("name", ["gated_gcn", "gcn", "gine"])
def test_all_neighbours_are_the_whole_graph(tmp_path, name):
    write(tmp_path / "g", ending="parquet")
    every = load(tmp_path / "every", replace(MODELS[name], fanouts=(-1, -1)), name)
    some = load(tmp_path / "some", replace(MODELS[name], fanouts=(3, 3)), name)
    whole = load(tmp_path / "whole", MODELS[name], name).predict(tmp_path / "g")
    close(every.predict(tmp_path / "g"), whole)
    close(every.predict(tmp_path / "g", neighbours="all"), whole)
    close(some.predict(tmp_path / "g", neighbours="all"), whole)
    assert np.abs(some.predict(tmp_path / "g").probability - whole.probability).max() > 1e-3
    assert every.settings == {"output_kind": "label", "neighbours": "sampled"}
    with pytest.raises(UsageError, match=r"--neighbours al: it takes sampled, all; did you mean 'all'\?"):
        some.predict(tmp_path / "g", neighbours="al")


def test_a_large_graph_is_read_once(tmp_path, cache, monkeypatch):
    write(tmp_path / "g")
    predictor = load(tmp_path / "model", replace(NODES, fanouts=(4, 3), encoding=Encoding("laplacian", 3)))
    shards = predictor.shards(tmp_path / "g", 30)
    (kept,) = (cache / "graphs").iterdir()
    assert len(shards) == 4 and {arrays for shard in shards for (_, arrays), _, _ in shard} == {kept}
    first = predictor.predict(tmp_path / "g")
    monkeypatch.setattr(records, "read", None)  # nothing is read again
    stored.load.cache_clear()
    close(predictor.predict(tmp_path / "g"), first)
    monkeypatch.undo()
    monkeypatch.setenv("MANYHEADS_CACHE", str(cache))
    (tmp_path / "g" / "nodes.csv").write_text(
        (tmp_path / "g" / "nodes.csv").read_text().replace(",x\n", ",y\n")
    )
    assert not np.allclose(predictor.predict(tmp_path / "g").probability, first.probability)
    assert len(list((cache / "graphs").iterdir())) == 2
    other = load(tmp_path / "other", replace(NODES, fanouts=(5, 5), encoding=Encoding("laplacian", 3)))
    other.shards(tmp_path / "g", 30)  # the same numbers, other samples
    assert len(list((cache / "graphs").iterdir())) == 2


def test_a_whole_graph_that_was_written_again_is_read_again(tmp_path):
    write(tmp_path / "g")
    predictor = load(tmp_path / "model", NODES)
    first = predictor.predict(tmp_path / "g")
    close(predictor.predict(tmp_path / "g"), first)
    text = (tmp_path / "g" / "edges.csv").read_text().splitlines(keepends=True)
    (tmp_path / "g" / "edges.csv").write_text("".join(text[: len(text) // 2]))
    assert not np.allclose(predictor.predict(tmp_path / "g").probability, first.probability)


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    write(tmp_path / "g")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MANYHEADS_CACHE", str(tmp_path / "file"))
    predictor = load(tmp_path / "model", replace(NODES, fanouts=(4, 3)))
    with pytest.raises(
        ManyheadsError, match=r"cannot write to the cache .* MANYHEADS_CACHE names another place"
    ):
        predictor.predict(tmp_path / "g")


@pytest.mark.parametrize("fanouts", [None, (4, 3)])
def test_nodes_of_several_graphs(tmp_path, fanouts):
    sizes = {"a": 20, "b/c": 5, "d": 40}
    names = [
        f"{g}/{n}" for i, (g, n) in enumerate(sizes.items()) for n in write(tmp_path / "in" / g, n, 4 * n, i)
    ]
    predictor = load(tmp_path / "model", replace(NODES, fanouts=fanouts))
    found = predictor.predict(tmp_path / "in")
    wanted = [
        f"{g}/{n}"
        for (g, _), ns in zip(sizes.items(), _names(tmp_path / "in", sizes), strict=True)
        for n in ns
    ]
    assert found.id.tolist() == wanted and len(names) == 65
    close(rows(predictor, tmp_path / "in", 23, 7), found)
    alone = predictor.predict(tmp_path / "in" / "b" / "c")
    assert alone.id.tolist() == [name.rpartition("/")[2] for name in wanted[20:25]]
    np.testing.assert_allclose(alone.probability, found.probability[20:25], atol=1e-5)


def _names(folder, sizes):
    return [pd.read_csv(folder / name / "nodes.csv").id.tolist() for name in sizes]


@pytest.mark.parametrize("name", ["gine", "gps"])
def test_graphs_a_row_each(tmp_path, name):
    graphs = replace(
        NODES, level="graph", target=Target("regression", ("y",)), encoding=Encoding("laplacian", 3)
    )
    more = {"n_heads": 4, "encoding_width": 4} if name == "gps" else {}
    predictor = load(tmp_path / "model", graphs, name, readout="mean", **more)
    for i in range(9):
        write(tmp_path / "in" / f"g{i}", 7 + 4 * i, 12 * (i + 1), i)
    (tmp_path / "in" / "g3" / "edges.csv").write_text("source,target,w\nn0,nowhere,1\n")
    found, bad = [], []
    for shard in predictor.shards(tmp_path / "in", 4):
        for some, wrong, _ in core.run(predictor, predictor.read(shard), 3):
            found, bad = found + some, bad + wrong
    assert [row["id"] for row in found] == [f"g{i}" for i in range(9) if i != 3]
    assert [each.id for each in bad] == ["g3"] and "nowhere" in bad[0].reason
    for row in found:
        alone = predictor.predict(tmp_path / "in" / row["id"])
        assert alone.id.tolist() == [row["id"]] and alone.y[0] == pytest.approx(row["y"], abs=1e-5)
    assert len({row["y"] for row in found}) == 8


def together(folder, ids):
    """Tables of many graphs, whose nodes have the same names."""
    (folder / "all").mkdir(parents=True)
    for name in ("nodes", "edges"):
        tables = [pd.read_csv(folder / id / f"{name}.csv").assign(graph_id=id) for id in ids]
        pd.concat(tables).to_csv(folder / "all" / f"{name}.csv", index=False)
    return folder / "all"


def test_tables_of_many_graphs(tmp_path):
    ids, sizes = ("u", "v", "w"), (9, 30, 12)
    for i, (id, size) in enumerate(zip(ids, sizes, strict=True)):
        write(tmp_path / id, size, 4 * size, i)
    folder = together(tmp_path, ids)
    graphs = replace(
        NODES, level="graph", target=Target("regression", ("y",)), encoding=Encoding("laplacian", 3)
    )
    predictor = load(tmp_path / "model", graphs, "gine", readout="mean")
    found = predictor.predict(folder)
    assert found.id.tolist() == list(ids) and [predictor.count(s) for s in predictor.shards(folder, 2)] == [
        2,
        1,
    ]
    for id, y in zip(found.id, found.y, strict=True):
        assert predictor.predict(tmp_path / id).y[0] == pytest.approx(y, abs=1e-5)
    for fanouts in (None, (4, 3)):
        nodes = load(tmp_path / "nodes", replace(NODES, fanouts=fanouts, encoding=Encoding("laplacian", 3)))
        found = nodes.predict(folder)
        close(rows(nodes, folder, 20, 7), found)
        names = [f"{id}/{n}" for id in ids for n in pd.read_csv(tmp_path / id / "nodes.csv").id]
        assert found.id.tolist() == names
        alone = [] if fanouts else [nodes.predict(tmp_path / id) for id in ids]
        if alone:
            np.testing.assert_allclose(pd.concat(alone).probability, found.probability, atol=1e-5)
    (folder / "edges.csv").write_text("source,target,graph_id\nn0,nowhere,u\n")
    with pytest.raises(DataError, match="nowhere"):
        predictor.predict(folder)


def test_a_table_without_a_column(tmp_path):
    write(tmp_path / "g")
    missing = replace(NODES, node_columns=(FEATURE, Column("colour", ("r", "g"))))
    with pytest.raises(DataError, match="no column 'colour'"):
        load(tmp_path / "model", missing).predict(tmp_path / "g")
