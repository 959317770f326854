"""Pairs of nodes as records: whole and sampled graphs, by any batch, with what is wrong said."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from manyheads.core import hub
from manyheads.core import predictor as core
from manyheads.core.catalog import create_model
from manyheads.core.errors import DataError
from manyheads.graph.columns import Column
from manyheads.graph.link_parts import EDGE
from manyheads.graph.predictor import Predictor
from manyheads.graph.preprocessing import Preprocessing

PAIRS = Preprocessing("tables", node_columns=(Column("f", size=3),), level="pair", target=EDGE)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYHEADS_CACHE", str(tmp_path / "cache"))


def write(folder: Path, nodes: int = 50, edges: int = 160, pairs: int = 40) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    folder.mkdir()
    names = np.array([f"n{i}" for i in rng.permutation(nodes)])
    frame = pd.DataFrame(rng.normal(size=(nodes, 3)), columns=["f_0", "f_1", "f_2"])
    frame.insert(0, "id", names)
    frame.to_csv(folder / "nodes.csv", index=False)
    for name, rows in (("edges", edges), ("pairs", pairs)):
        ends = rng.integers(0, nodes, (2, rows))
        ends[1] = np.where(ends[0] == ends[1], (ends[1] + 1) % nodes, ends[1])
        table = pd.DataFrame({"source": names[ends[0]], "target": names[ends[1]]})
        table.to_csv(folder / f"{name}.csv", index=False)
    return table


def predictor(path: Path, fanouts: Sequence[int] | None = None, name: str = "gine") -> Predictor:
    torch.manual_seed(0)
    of = Preprocessing(**{**vars(PAIRS), "fanouts": None if fanouts is None else tuple(fanouts)})
    arguments: dict[str, Any] = {"hidden_dim": 16, "L": 2, "readout": "pair"}
    arguments |= {key: value for key, value in of.model_inputs().items() if key != "max_distance"}
    model = create_model(name, **arguments)
    hub.save(path, model, domain="graph", name=name, arguments=arguments, preprocessing=of.to_json())
    found = hub.make_predictor(*hub.load_model(path))
    assert isinstance(found, Predictor)
    return found


def test_a_row_a_pair(tmp_path: Path) -> None:
    table = write(tmp_path / "graph")
    found = predictor(tmp_path / "model").predict(tmp_path / "graph")
    assert list(found.columns) == ["id", "source", "target", "edge"]
    assert found.source.tolist() == table.source.tolist()
    assert found.target.tolist() == table.target.tolist()
    assert found.id[3] == f"{table.source[3]} - {table.target[3]}"
    assert found.edge.between(0, 1).all()
    assert found.edge.std() > 1e-4


@pytest.mark.parametrize("fanouts", [None, [3, 2]])
def test_a_pairs_row_is_the_same_in_any_batch_and_shard(tmp_path: Path, fanouts: list[int] | None) -> None:
    write(tmp_path / "graph")
    of = predictor(tmp_path / "model", fanouts)
    assert of.count(of.shards(tmp_path / "graph", 1 << 20)[0]) == 40
    whole = list(core.rows(of, tmp_path / "graph"))
    shards = of.shards(tmp_path / "graph", 7)
    assert [of.count(shard) for shard in shards] == [7, 7, 7, 7, 7, 5]
    parts = [row for shard in shards for rows, _, _ in core.run(of, of.read(shard), 3) for row in rows]
    assert [row["id"] for row in parts] == [row["id"] for row in whole]
    one, other = ([float(row["edge"]) for row in rows] for rows in (whole, parts))  # type: ignore[arg-type]
    assert one == pytest.approx(other, abs=1e-6)


def test_all_neighbours_are_the_whole_graph(tmp_path: Path) -> None:
    write(tmp_path / "graph")
    whole = predictor(tmp_path / "whole").predict(tmp_path / "graph")
    sampled = predictor(tmp_path / "sampled", [-1, -1]).predict(tmp_path / "graph")
    few = predictor(tmp_path / "few", [1, 1]).predict(tmp_path / "graph")
    np.testing.assert_allclose(sampled.edge, whole.edge, atol=1e-6)
    assert np.abs(few.edge - whole.edge).max() > 1e-4
    asked = predictor(tmp_path / "again", [1, 1]).predict(tmp_path / "graph", neighbours="all")
    np.testing.assert_allclose(asked.edge, whole.edge, atol=1e-6)


def test_wrong_pairs_are_bad_records(tmp_path: Path) -> None:
    table = write(tmp_path / "graph").iloc[:3]
    first = table.source[0]
    wrong = pd.DataFrame({"source": ["nobody", None, first], "target": [first, first, first]})
    pd.concat([table, wrong]).to_csv(tmp_path / "graph" / "pairs.csv", index=False)
    of = predictor(tmp_path / "model")
    (shard,) = of.shards(tmp_path / "graph", 100)
    ((rows, bad, count),) = core.run(of, of.read(shard), 100)
    assert (len(rows), count) == (3, 6)
    assert [each.reason for each in bad] == [
        "the graph has no node 'nobody'", "a pair with an empty cell", f"a pair of one node: {first!r}"
    ]  # fmt: skip


def test_tables_without_pairs_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "graph")
    of = predictor(tmp_path / "model")
    (tmp_path / "graph" / "pairs.csv").write_text("source,other\na,b\n")
    with pytest.raises(DataError, match="no column 'target'"):
        of.shards(tmp_path / "graph", 9)
    (tmp_path / "graph" / "pairs.csv").unlink()
    with pytest.raises(DataError, match="no table `pairs`"):
        of.shards(tmp_path / "graph", 9)
