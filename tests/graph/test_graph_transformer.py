"""The Graph Transformer against a loop over nodes and edges, and its promises."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from manyheads.core.errors import UsageError
from manyheads.graph.encodings import flip_signs
from manyheads.graph.models.graph_transformer import (
    GraphTransformer,
    GraphTransformerLayer,
    graph_transformer,
    graph_transformer_zinc,
)

EDGES = pytest.mark.parametrize("edges", [True, False], ids=["edge", "node"])


def by_loops(layer: GraphTransformerLayer, h: Tensor, e: Tensor, edge_index: Tensor) -> tuple[Tensor, Tensor]:
    """The attention of a layer, an edge and a head at a time: the formula of the paper as it stands."""
    attention = layer.attention
    heads, dim = attention.num_heads, attention.Q.out_features // attention.num_heads
    q, k, v = (f(h).detach() for f in (attention.Q, attention.K, attention.V))
    p = None if attention.proj_e is None else attention.proj_e(e).detach()
    out, products = torch.zeros_like(q), torch.zeros(len(e), heads * dim, dtype=h.dtype)
    for i in range(len(h)):
        for head in range(heads):
            c = slice(head * dim, (head + 1) * dim)
            total, mixed = 0.0, torch.zeros(dim, dtype=h.dtype)
            for n, (source, target) in enumerate(edge_index.t().tolist()):
                if target != i:
                    continue
                t = k[source, c] * q[i, c] / math.sqrt(dim)
                if p is not None:
                    t = t * p[n, c]
                    products[n, c] = t
                weight = math.exp(min(5.0, max(-5.0, t.sum().item())))
                total, mixed = total + weight, mixed + weight * v[source, c]
            if total:
                out[i, c] = mixed / (total + (0.0 if p is None else 1e-6))
    return out, products


@EDGES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_layer_by_loops(random_graphs, edges, dtype):
    """To 1e-5 in float32; logits are large enough that the clamp holds many."""
    graphs = random_graphs([9, 1, 6])
    layer = GraphTransformerLayer(16, 16, 4, edges=edges, norm="layer").to(dtype)
    with torch.no_grad():
        layer.attention.Q.weight.mul_(20 if edges else 6)
    h, e = torch.randn(16, 16, dtype=dtype), torch.randn(graphs.edge_index.shape[1], 16, dtype=dtype)
    out, products = by_loops(layer, h, e, graphs.edge_index)
    found, found_e = layer.attention(h, e if edges else None, graphs.edge_index)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(found.flatten(1), out, atol=tolerance, rtol=tolerance)
    if edges:
        torch.testing.assert_close(found_e.flatten(1), products, atol=tolerance, rtol=tolerance)
        logits = products.unflatten(1, (4, 4)).sum(-1)
        assert 0.02 < (logits.abs() > 5).float().mean() < 0.9
    s = "_h" if edges else ""
    x = layer.get_submodule(f"layer_norm1{s}")(h + layer.get_submodule(f"O{s}")(out))
    y = layer.get_submodule(f"FFN{s}_layer2")(layer.get_submodule(f"FFN{s}_layer1")(x).relu())
    wanted = layer.get_submodule(f"layer_norm2{s}")(x + y)
    torch.testing.assert_close(
        layer(h, e if edges else None, graphs.edge_index)[0], wanted, atol=tolerance, rtol=tolerance
    )


def small(edges: bool = True, **options) -> GraphTransformer:
    options = {"encoding_dim": 4, "hidden_dim": 16, "L": 2, "n_heads": 4} | options
    return graph_transformer(1, [28], edge_types=[4] if edges else None, edges=edges, **options)


@EDGES
@pytest.mark.parametrize("readout", ["mean", "sum", "max", "node"])
def test_a_batch_is_its_graphs(random_graphs, split, edges, readout):
    graphs = random_graphs([9, 1, 20, 4, 2], encoding=4, seed=3)
    model = small(edges, readout=readout).eval()
    found = model(graphs)
    assert found.shape == (36 if readout == "node" else 5, 1)
    alone = torch.cat([model(one) for one in split(graphs)])
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)


@EDGES
def test_the_order_of_nodes_and_edges_does_not_matter(random_graphs, edges):
    graphs = random_graphs([30], encoding=4, seed=3)
    model = small(edges, norm="layer").eval()
    places, order = torch.randperm(30), torch.randperm(graphs.edge_index.shape[1])
    moved = graphs._replace(
        x=graphs.x[places],
        edge_index=places.argsort()[graphs.edge_index[:, order]],
        edge_attr=graphs.edge_attr[order],
        encoding=graphs.encoding[places],
    )
    torch.testing.assert_close(model(moved), model(graphs), atol=1e-5, rtol=1e-5)


def test_pairs_are_scored_alike_both_ways(random_graphs):
    graphs = random_graphs([9, 12], encoding=4)._replace(pairs=torch.tensor([[0, 3, 20], [3, 0, 9]]))
    found = small(readout="pair").eval()(graphs)
    assert found.shape == (3, 1)
    assert torch.equal(found[0], found[1])
    with pytest.raises(ValueError, match="needs pairs"):
        small(readout="pair")(graphs._replace(pairs=None))


@EDGES
def test_learns_every_parameter_that_is_used(random_graphs, edges):
    graphs = random_graphs([9, 12, 30, 5], encoding=4)
    model = small(edges, readout="node", roles=5)
    model(graphs._replace(roles=torch.arange(56) % 5)).pow(2).sum().backward()
    unreached = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    for (
        name
    ) in unreached:  # edges of the last layer go nowhere; a batch norm takes a bias before it off again
        off = name.endswith(".bias") and (".O" in name or "_layer2" in name)
        assert off or ("layers.1" in name and "_e" in name), name


def test_node_features_edge_features_and_columns(random_graphs):
    graphs = random_graphs([9, 12])
    edges = graphs.edge_index.shape[1]
    model = graph_transformer(3, node_features=7, edge_features=2, hidden_dim=16, L=1, n_heads=2)
    assert model(graphs._replace(x=torch.randn(21, 7), edge_attr=torch.randn(edges, 2))).shape == (2, 3)
    model = graph_transformer(3, node_types=[5, 3], edge_types=[2, 2], hidden_dim=16, L=1, n_heads=2)
    columns = torch.stack([torch.arange(21) % 5, torch.arange(21) % 3], 1)
    bonds = torch.stack([torch.arange(edges) % 2] * 2, 1)
    assert model(graphs._replace(x=columns, edge_attr=bonds)).shape == (2, 3)
    table = model.embedding_h.weight
    assert torch.equal(model.embedding_h(columns), table[columns[:, 0]] + table[5 + columns[:, 1]])
    with pytest.raises(IndexError, match="category 3 of column 1, which has 3"):
        model(graphs._replace(x=columns + torch.tensor([0, 1]), edge_attr=bonds))
    with pytest.raises(ValueError, match=r"must have 2 columns, not \[21, 1\]"):
        model(graphs._replace(x=columns[:, 0], edge_attr=bonds))


@EDGES
def test_graphs_without_edges_and_training_on_one_node(random_graphs, edges):
    graphs = random_graphs([1], encoding=4)
    model = small(edges)
    assert model.train()(graphs).isfinite().all()
    model(graphs).sum().backward()
    assert model.eval()(graphs).isfinite().all()
    empty = random_graphs([3, 0, 1], encoding=4)
    for readout in ("mean", "sum", "max"):
        assert small(edges, readout=readout).eval()(empty).isfinite().all()


def test_isolated_nodes_are_zeros_or_as_published(random_graphs):
    graphs = random_graphs([5, 1], encoding=4)
    model = small(False, readout="node", isolated="nan").eval()
    assert model(graphs).isnan().flatten().tolist() == [False] * 5 + [True]
    other = small(False, readout="node").eval()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(graphs)[:5], model(graphs)[:5])
    assert other(graphs).isfinite().all()


def test_signs_are_the_callers(random_graphs):
    """The model takes encodings as they are, in training too: another sign is another answer."""
    graphs = random_graphs([9, 12], encoding=8)
    model = graph_transformer_zinc().eval()
    flipped = graphs._replace(encoding=flip_signs(graphs.encoding, torch.Generator().manual_seed(1)))
    assert not torch.allclose(model(graphs), model(flipped))
    assert torch.equal(model(graphs), model(graphs))


def test_dropout_is_where_it_is_published(random_graphs):
    """The edge variant drops embedded atoms only, the node variant atoms with their encodings."""
    graphs = random_graphs([30], encoding=4)
    for edges in (True, False):
        model = small(edges, in_feat_dropout=0.999, norm="none")
        nn.init.zeros_(model.embedding_lap_pos_enc.weight)
        nn.init.ones_(model.embedding_lap_pos_enc.bias)
        seen: list[Tensor] = []
        model.layers[0].register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        model.train()(graphs)
        assert (seen[0] == (1.0 if edges else 0.0)).float().mean() > 0.95


def test_compiles(random_graphs):
    graphs = random_graphs([9, 12], encoding=4)
    model = small().eval()
    compiled = torch.compile(model, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(graphs), model(graphs))


def test_what_does_not_fit_is_refused(random_graphs):
    graphs = random_graphs([9, 12])
    for options, why in (
        ({"node_types": [28], "node_features": 3}, "either node_types or node_features"),
        ({}, "either node_types or node_features"),
        ({"node_types": [28], "n_heads": 7}, "not a multiple of 7 heads"),
        ({"node_types": [28], "L": 0}, "L must be positive"),
        ({"node_types": [28], "readout": "median"}, "no readout 'median'"),
        ({"node_types": [28], "norm": "group"}, "no norm 'group'"),
        ({"node_types": [28], "dropout": 1.0}, "dropout must be at least 0 and less than 1"),
        ({"node_types": [28], "edge_types": [4], "edges": False}, "takes no edge categories"),
        ({"node_types": [28], "isolated": "one"}, "isolated is 'zero' or 'nan'"),
    ):
        with pytest.raises(UsageError, match=why):
            graph_transformer(1, **options)
    with pytest.raises(ValueError, match="needs encoding"):
        small()(graphs)
    with pytest.raises(ValueError, match=r"encoding must be \[21, 4\], not \[21, 3\]"):
        small()(graphs._replace(encoding=torch.zeros(21, 3)))
    with pytest.raises(ValueError, match="needs edge_attr"):
        small(encoding_dim=0)(graphs._replace(edge_attr=None))
    with pytest.raises(TypeError, match="categories must be whole numbers"):
        small(encoding_dim=0)(graphs._replace(x=graphs.x.float()))
