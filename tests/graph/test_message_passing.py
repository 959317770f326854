"""GPS and the message passing networks: torch-geometric's numbers, batches, gradients, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch_geometric.nn import GCNConv, GINEConv, GPSConv, ResGatedGraphConv

from manyheads.core.errors import UsageError
from manyheads.graph.graphs import graph_ids
from manyheads.graph.models.gps import GPSLayer, from_torch_geometric, gps
from manyheads.graph.models.message_passing import kipf_gcn, message_passing

CONVS = ["gcn", "gine", "res_gated", "gated_gcn"]
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


def build(name: str, **options) -> nn.Module:
    common = {"outputs": 1, "node_types": [28], "edge_types": [4], "encoding_dim": 4, "hidden_dim": 16}
    options = common | {"L": 2} | options
    if name.startswith("gps"):
        local = name.partition("_")[2] or "gine"
        return gps(**options, local=local, n_heads=4, encoding_width=4)
    return message_passing(name, **options)


MODELS = [*CONVS, "gps", "gps_gated_gcn"]


@DTYPES
@pytest.mark.parametrize("name", ["gineconv", "resgatedgraphconv"])
def test_the_layers_are_the_recorded_ones(recorded, name, dtype):
    """What the baselines stand on gives the numbers that were recorded."""
    case = recorded(f"pyg_{name}", dtype)
    config, given = case.about["config"], case.inputs()
    if name == "gineconv":
        inner = nn.Sequential(nn.Linear(16, 18), nn.ReLU(), nn.Linear(18, 18))
        layer = GINEConv(inner, eps=config["eps"])
    else:
        layer = ResGatedGraphConv(16, 16, edge_dim=config["edge_dim"])
    case.load(layer)
    case.check({"h": layer(given["x"], given["edge_index"], given["edge_attr"])}, given, layer)


@pytest.mark.parametrize("norm", ["batch_norm", "layer_norm"])
def test_a_gps_layer_is_torch_geometrics(random_graphs, norm):
    """The layer as installed, weights renamed, in training."""
    graphs = random_graphs([9, 1, 20])
    peer = GPSConv(
        16, GINEConv(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))), heads=4, norm=norm
    )
    ours = GPSLayer(16, 4, norm="batch" if norm == "batch_norm" else "graph")
    ours.load_state_dict(from_torch_geometric(peer.state_dict()), strict=True)
    h, e = torch.randn(30, 16), torch.randn(graphs.edge_index.shape[1], 16)
    wanted = peer(h, graphs.edge_index, graph_ids(graphs.starts, 30), edge_attr=e)
    found, _ = ours(h, e, graphs.edge_index, graphs.starts)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_is_its_graphs(random_graphs, split, name):
    graphs = random_graphs([9, 1, 20, 4, 2], encoding=4, seed=3)
    model = build(name).eval()
    alone = torch.cat([model(one) for one in split(graphs)])
    torch.testing.assert_close(model(graphs), alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_learns_every_parameter(random_graphs, name):
    graphs = random_graphs([9, 12, 30, 5, 17, 26], encoding=4)
    model = build(name, readout="node")
    model(graphs).pow(2).sum().backward()
    unreached = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    # the last layer's edges go nowhere
    assert all("bn_edge_e" in n and ".1." in n for n in unreached)


@pytest.mark.parametrize("name", MODELS)
def test_nodes_alone_and_no_edges(random_graphs, name):
    lonely = random_graphs([1], encoding=4)
    model = build(name)
    assert model.train()(lonely).isfinite().all()
    assert model.eval()(random_graphs([1, 0, 3], encoding=4)).isfinite().all()


def test_attention_dropout_pads_and_is_training_alone(random_graphs):
    graphs = random_graphs([9, 1, 20], encoding=4)
    model = build("gps", attn_dropout=0.5)
    torch.manual_seed(1)
    first = model.train()(graphs)
    torch.manual_seed(2)
    assert not torch.allclose(first, model(graphs))
    assert torch.equal(model.eval()(graphs), model(graphs))


def test_kipf_gcn_is_its_formula(random_graphs):
    """Two products with the normalised adjacency, self-loops added."""
    graphs = random_graphs([9, 12])
    graphs = graphs._replace(x=torch.randn(21, 7))
    model = kipf_gcn(7, 3).eval()
    a = torch.eye(21)
    a[graphs.edge_index[1], graphs.edge_index[0]] = 1
    a = a / (a.sum(1)[:, None] * a.sum(1)).sqrt()
    first, second = model.layers
    assert isinstance(first, GCNConv)
    h = (a @ graphs.x @ first.lin.weight.t() + first.bias).relu()
    torch.testing.assert_close(model(graphs), a @ h @ second.lin.weight.t() + second.bias)
    assert sum(p.numel() for p in kipf_gcn(1433, 7).parameters()) == 1433 * 16 + 16 + 16 * 7 + 7


def test_what_does_not_fit_is_refused():
    for options, why in (
        ({"local": "gat"}, "no local 'gat'"),
        ({"norm": "layer"}, "no norm 'layer'"),
        ({"n_heads": 7}, "not a multiple of 7 heads"),
        ({"encoding_dim": 4, "encoding_width": 64}, "encoding_width must be from 1 to 63"),
        ({"local": "none", "edge_types": [4]}, "no place for edge categories"),
        ({"attn_dropout": -0.1}, "attn_dropout must be"),
    ):
        with pytest.raises(UsageError, match=why):
            gps(1, node_types=[28], **options)
    with pytest.raises(UsageError, match="no message passing 'gat'"):
        message_passing("gat", 1, node_types=[28])
    with pytest.raises(UsageError, match="hidden_dim must be positive"):
        kipf_gcn(7, 3, hidden_dim=0)
