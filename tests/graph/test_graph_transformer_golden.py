"""The Graph Transformer against tensors recorded from the published code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.core.errors import DataError
from manyheads.graph.graphs import Graphs
from manyheads.graph.models.graph_transformer import (
    Attention,
    GraphTransformer,
    GraphTransformerLayer,
    graph_transformer,
    graph_transformer_cluster,
    graph_transformer_pattern,
    graph_transformer_zinc,
    load_official,
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
LAYERS = [
    *(f"gt_{v}_layer_{n}" for v in ("node", "edge") for n in ("bn_eval", "bn_train", "ln")),
    *(f"gt_{v}_layer_isolated_{m}" for v in ("node", "edge") for m in ("eval", "train")),
    "gt_edge_layer_lnbn",
    "gt_node_layer_noresidual",
]
ZINC = ["full", "lappe_bn_eval", "lappe_bn_train", "ln_noedge", "wl"]
SBM = ["bn_eval", "bn_train", "ln_wl"]


def norm_of(config: dict) -> str:
    found = {(False, True): "batch", (True, False): "layer", (True, True): "both", (False, False): "none"}
    return found[config["layer_norm"], config["batch_norm"]]


def isolated_of(name: str) -> str:
    return "nan" if name.startswith("gt_node_layer_isolated") else "zero"


@DTYPES
@pytest.mark.parametrize("name", ["gt_node_attention", "gt_edge_attention"])
def test_attention(recorded, name, dtype):
    """Scores and their sums, which the published layer leaves on the graph, follow from its products."""
    case = recorded(name, dtype)
    config, given = case.about["config"], case.inputs()
    edges = "edge" in name
    sizes = config["in_dim"], config["out_dim"], config["num_heads"]
    model = case.load(Attention(*sizes, edges=edges, isolated="zero" if edges else "nan"))
    h, products = model(given["h"], given.get("e"), given["edge_index"])
    source, target = given["edge_index"]
    if products is None:
        q, k = (layer(given["h"]).unflatten(-1, (sizes[2], -1)) for layer in (model.Q, model.K))
        logits = (q[target] * k[source]).sum(-1, keepdim=True) * sizes[1] ** -0.5
    else:
        logits = products.sum(-1, keepdim=True)
    score = logits.clamp(-5, 5).exp()
    found = {"h": h, "score": score, "z": torch.zeros_like(h[..., :1]).index_add(0, target, score)}
    case.check(found if products is None else found | {"e_out": products}, given, model)


@DTYPES
@pytest.mark.parametrize("name", LAYERS)
def test_layer(recorded, name, dtype):
    case = recorded(name, dtype)
    config, given = case.about["config"], case.inputs()
    layer = GraphTransformerLayer(
        config["in_dim"],
        config["out_dim"],
        config["num_heads"],
        edges="edge" in name,
        norm=norm_of(config),
        residual=config.get("residual", True),
        use_bias=config.get("use_bias", False),
        isolated=isolated_of(name),
    )
    case.load(layer)
    h, e = layer(given["h"], given.get("e"), given["edge_index"])
    case.check({"h": h} | ({} if e is None else {"e": e}), given, layer)


def zinc(config: dict) -> GraphTransformer:
    return graph_transformer(
        1,
        node_types=[config["num_atom_type"]],
        edge_types=[config["num_bond_type"]] if config["edge_feat"] else None,
        encoding_dim=config["pos_enc_dim"] if config["lap_pos_enc"] else 0,
        roles=37 if config["wl_pos_enc"] else 0,
        hidden_dim=config["hidden_dim"],
        L=config["L"],
        n_heads=config["n_heads"],
        readout=config["readout"],
        norm=norm_of(config),
    )


@DTYPES
@pytest.mark.parametrize("name", ZINC)
def test_network_of_molecules(recorded, name, dtype):
    case = recorded(f"gt_zinc_net_{name}", dtype)
    given, config = case.inputs(), case.about["config"]["net_params"]
    model = zinc(config)
    load_official(model, case.group("param."))
    case.load(model)
    encoding = given.get("lap_pos_enc")
    if encoding is not None and "sign_flip" in given:
        encoding = encoding * given["sign_flip"]
    graphs = Graphs(
        given["atom_type"],
        given["edge_index"],
        case.starts(),
        given["bond_type"] if config["edge_feat"] else None,
        encoding,
        given.get("wl_pos_enc"),
    )
    states: list[Tensor] = []
    model.layers[-1].register_forward_hook(lambda _, __, out: states.append(out[0]))
    scores = model(graphs)
    loss = (scores - given["target"]).abs().mean()
    case.check({"scores": scores, "node_h": states[0], "l1_loss": loss}, given, model)


@DTYPES
@pytest.mark.parametrize("name", SBM)
def test_network_of_communities(recorded, name, dtype):
    case = recorded(f"gt_sbm_net_{name}", dtype)
    given, config = case.inputs(), case.about["config"]["net_params"]
    model = graph_transformer(
        config["n_classes"],
        node_types=[config["in_dim"]],
        encoding_dim=config["pos_enc_dim"] if config["lap_pos_enc"] else 0,
        roles=100 if config["wl_pos_enc"] else 0,
        edges=False,
        hidden_dim=config["hidden_dim"],
        L=config["L"],
        n_heads=config["n_heads"],
        readout="node",
        norm=norm_of(config),
    )
    case.load(model)
    encoding = given.get("lap_pos_enc")
    if encoding is not None and "sign_flip" in given:
        encoding = encoding * given["sign_flip"]
    graphs = Graphs(
        given["h"], given["edge_index"], case.starts(), None, encoding, given.get("wl_pos_enc")
    )  # fmt: skip
    scores = model(graphs)
    label = given["label"]
    counts = torch.bincount(label, minlength=config["n_classes"])
    weight = ((label.numel() - counts) / label.numel()) * (counts > 0)
    loss = F.cross_entropy(scores, label, weight=weight.to(dtype))
    case.check({"scores": scores, "weighted_ce": loss}, given, model)


def test_parameter_counts():
    path = Path(__file__).parents[1] / "golden" / "graph" / "gt_param_counts_a.json"
    counts = json.loads(path.read_text())["counts"]
    builders = {"ZINC": graph_transformer_zinc, "SBM_PATTERN": graph_transformer_pattern}
    builders["SBM_CLUSTER"] = graph_transformer_cluster
    seen = set()
    for row in counts.values():
        config, data = row["net_params"], row["dataset"]
        norm = norm_of(config)
        if config["wl_pos_enc"]:
            roles = {"ZINC": 37, "SBM_PATTERN": 100, "SBM_CLUSTER": 100}[data]
            if data == "ZINC":
                model = graph_transformer(1, node_types=[28], edge_types=[4], roles=roles)
            else:
                types, outputs = (3, 2) if data == "SBM_PATTERN" else (7, 6)
                model = graph_transformer(
                    outputs, node_types=[types], roles=roles, edges=False, hidden_dim=80, readout="node"
                )
        else:
            model = builders[data](config["pos_enc_dim"] if config["lap_pos_enc"] else 0, norm=norm)
        assert sum(p.numel() for p in model.parameters()) == row["parameters"]
        assert sum(b.numel() for k, b in model.state_dict().items() if _is_buffer(k)) == row["buffers"]
        seen.add(row["parameters"])
    assert seen >= {588929, 588353, 522982, 524026}
    assert len(counts) == 27


def _is_buffer(key: str) -> bool:
    return key.endswith(("running_mean", "running_var", "num_batches_tracked"))


def test_official_weights_load_strictly(recorded):
    case = recorded("gt_zinc_net_lappe_bn_eval", torch.float32)
    config, state = case.about["config"]["net_params"], case.group("param.")
    model = zinc(config)
    load_official(model, {f"module.{key}": tensor for key, tensor in state.items()})
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    missing = {key: tensor for key, tensor in state.items() if key != "layers.0.O_e.bias"}
    with pytest.raises(DataError, match=r"1 missing \(layers\.0\.O_e\.bias\)"):
        load_official(model, missing)
    with pytest.raises(DataError, match="1 left over"):
        load_official(model, state | {"more": torch.zeros(1)})
    with pytest.raises(DataError, match="of another shape"):
        load_official(model, state | {"embedding_e.weight": torch.zeros(5, 16)})
    with pytest.raises(DataError, match="of the edge variant, the model of the node one"):
        load_official(graph_transformer(1, node_types=[28], edges=False), state)
