"""GPS and GatedGCN against tensors recorded from the published code and from torch-geometric."""

from __future__ import annotations

import pytest
import torch

from manyheads.core.dispatch import use_backend
from manyheads.graph.graphs import padding
from manyheads.graph.models.gated_gcn import GatedGCNLayer
from manyheads.graph.models.gps import GPSLayer, from_torch_geometric, gps_zinc

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
OFFICIAL = [
    *(f"gps_layer_{local}_{mode}" for local in ("gine", "customgatedgcn") for mode in ("eval", "train")),
    "gps_layer_biased_ln",
]
PEER = ["bn_eval", "bn_train", "noconv", "nodeorgraphnorm"]


def renamed(key: str) -> str:
    (found,) = from_torch_geometric({key: torch.zeros(0)})
    return found


@DTYPES
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_gated_gcn(recorded, mode, dtype):
    case = recorded(f"gps_gatedgcn_{mode}", dtype)
    layer, given = case.load(GatedGCNLayer(case.about["config"]["in_dim"])), case.inputs()
    x, e = layer(given["x"], given["edge_attr"], given["edge_index"])
    case.check({"x": x, "edge_attr": e}, given, layer)


@DTYPES
@pytest.mark.parametrize("name", OFFICIAL)
def test_layer(recorded, name, dtype):
    case = recorded(name, dtype)
    config, given = case.about["config"], case.inputs()
    layer = case.load(
        GPSLayer(
            config["dim_h"],
            config["num_heads"],
            local="gine" if config["local_gnn_type"] == "GINE" else "gated_gcn",
            norm="graph" if config["layer_norm"] else "batch",
            activation=config["act"],
        )
    )
    bias = given.get("attn_bias")
    bias = None if bias is None else bias.unflatten(0, (-1, config["num_heads"]))
    x, e = layer(given["x"], given["edge_attr"], given["edge_index"], case.starts(), bias=bias)
    case.check({"x": x, "edge_attr": e}, given, layer)


@DTYPES
@pytest.mark.parametrize("name", PEER)
def test_layer_of_torch_geometric(recorded, name, dtype):
    case = recorded(f"pyg_gpsconv_{name}", dtype)
    config, given = case.about["config"], case.inputs()
    norms = {"batch_norm": "batch", "layer_norm": "graph", None: "none"}
    layer = GPSLayer(
        config["channels"],
        config["heads"],
        local="none" if config["conv"] is None else "gine",
        norm=norms[config["norm"]],
        activation=config.get("act", "relu"),
    )
    if "nodeorgraphnorm" in name:  # its messages keep their ReLU, the feed-forward net has GELU
        layer.local_model.nn[1] = torch.nn.ReLU()
    case.load(layer, renamed)
    edges = given.get("edge_attr", torch.zeros(0))
    h, _ = layer(given["x"], edges, given["edge_index"], case.starts())
    case.check({"h": h}, given, layer, renamed)


def test_packed_attention_is_padded_attention(recorded):
    case = recorded("gps_layer_gine_eval", torch.float32)
    layer, given = case.load(GPSLayer(16, 4)), case.inputs()
    starts = case.starts()
    padded = padding(starts, given["x"].shape[0])
    zero = torch.zeros(starts.shape[0] - 1, 1, *padded.valid.shape[1:] * 2)
    packed = layer.self_attn(given["x"], starts)
    torch.testing.assert_close(packed, layer.self_attn(given["x"], starts, bias=zero), rtol=1e-5, atol=1e-6)
    with use_backend("reference"):
        torch.testing.assert_close(packed, layer.self_attn(given["x"], starts), rtol=1e-5, atol=1e-6)


def test_parameter_count():
    """The paper's table says 423,717."""
    assert sum(p.numel() for p in gps_zinc().parameters()) == 423_717
