"""Every row of the table builds a model, without memory too, from arguments that a folder can keep."""

from __future__ import annotations

import inspect
import json

import pytest
import torch

from manyheads.core.catalog import arguments, builder
from manyheads.graph.catalog import MODELS
from manyheads.graph.encodings import shortest_paths

SIZES = {"graph_transformer_zinc": 588_929, "graph_transformer_pattern": 522_982}
SIZES |= {"graph_transformer_cluster": 524_026, "gps_zinc": 423_717}


def arguments_of(build) -> dict:
    given = {"outputs": 1, "node_types": [28], "edge_types": [4], "node_features": 7, "encoding_dim": 8}
    known = inspect.signature(build).parameters
    found = {key: value for key, value in given.items() if key in known}
    if "node_types" in known:
        found.pop("node_features")
    if known.get("outputs") is None:
        found.pop("encoding_dim")  # a model of one data set
    return json.loads(json.dumps(found))


@pytest.mark.parametrize("entry", MODELS, ids=lambda entry: entry.name)
def test_a_row_is_a_model(entry, random_graphs):
    build = builder(entry)
    kept = arguments_of(build)
    assert all(key in arguments(entry) for key in kept)
    with torch.device("meta"):
        model = build(**kept)
    if entry.name in SIZES:
        assert sum(p.numel() for p in model.parameters()) == SIZES[entry.name]
    model = build(**kept).eval()
    known = inspect.signature(build).parameters
    columns = kept.get("encoding_dim", known["encoding_dim"].default if "encoding_dim" in known else 0)
    graphs = random_graphs([9, 1, 12], encoding=columns)
    if entry.name.endswith(("pattern", "cluster")):
        graphs = graphs._replace(x=graphs.x % 3)
    if "node_features" in kept:
        graphs = graphs._replace(x=torch.randn(22, 7))
    if entry.name == "urpe":
        graphs = graphs._replace(distances=shortest_paths(graphs.edge_index, graphs.starts, 20))
    found = model(graphs)
    assert found.shape[0] in (3, 22)
    assert found.isfinite().all()


def test_names_are_one_each():
    assert len({entry.name for entry in MODELS}) == len(MODELS) == 12
