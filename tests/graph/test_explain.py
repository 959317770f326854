"""Explanations: weights give again what layers mixed, attributions sum to the prediction's difference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import manyheads
from manyheads.core.errors import UsageError
from manyheads.graph.attributions import integrated_gradients, layers_of, repeated
from manyheads.graph.encodings import shortest_paths
from manyheads.graph.explain import attends, attention, pairs_of, table
from manyheads.graph.graphs import Graphs, graph_ids
from manyheads.graph.models.attention import GraphAttention
from manyheads.graph.models.graph_transformer import Attention
from manyheads.graph.models.urpe import UrpeAttention

SIZES = [9, 1, 14, 5]
MODELS: dict[str, dict[str, Any]] = {
    "graph_transformer": {"L": 3, "hidden_dim": 32, "n_heads": 4, "encoding_dim": 3},
    "gps": {"L": 2, "hidden_dim": 32, "n_heads": 4, "encoding_dim": 3, "encoding_width": 8},
    "urpe": {"L": 2, "hidden_dim": 32, "ffn_dim": 32, "n_heads": 4, "max_distance": 4},
    "gine": {"L": 2, "hidden_dim": 32},
    "gcn": {"L": 2, "hidden_dim": 32},
}


def build(name: str, *, seed: int = 0, **options: Any) -> nn.Module:
    """A random model of molecules whose batch norms have seen something."""
    torch.manual_seed(seed)
    arguments = {"outputs": 2, "node_types": [28], "edge_types": [4], **MODELS[name], **options}
    if name == "gcn":
        del arguments["edge_types"]
    model = manyheads.create_model(name, **arguments)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    if name == "urpe":
        nn.init.normal_(model.bias)
        nn.init.normal_(model.factor, 1.0, 0.3)
    return model.eval()


def batch(random_graphs: Callable[..., Graphs], name: str, sizes: list[int] = SIZES) -> Graphs:
    graphs = random_graphs(sizes, encoding=3 if "encoding_dim" in MODELS[name] else 0)
    if name == "urpe":
        return graphs._replace(distances=shortest_paths(graphs.edge_index, graphs.starts, 4))
    return graphs


@dataclass
class Mixed:
    """The values that each attention layer mixed, and what it made of them, by hooks of our own."""

    values: list[Tensor] = field(default_factory=list)
    results: list[Tensor] = field(default_factory=list)

    def watch(self, model: nn.Module) -> None:
        for layer in model.modules():
            if isinstance(layer, Attention):
                layer.V.register_forward_hook(lambda m, a, out: self.values.append(out))
                layer.register_forward_hook(lambda m, a, out: self.results.append(out[0].flatten(1)))
            elif isinstance(layer, UrpeAttention):
                layer.v_proj.register_forward_hook(lambda m, a, out: self.values.append(out))
                layer.out_proj.register_forward_pre_hook(lambda m, a: self.results.append(a[0]))
            elif isinstance(layer, GraphAttention):
                layer.register_forward_pre_hook(self._values)
                layer.out_proj.register_forward_pre_hook(lambda m, a: self.results.append(a[0]))

    def _values(self, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, GraphAttention)
        packed = nn.functional.linear(args[0], layer.in_proj_weight, layer.in_proj_bias)
        self.values.append(packed.chunk(3, -1)[2])


def mix(weights: Tensor, values: Tensor, edge_index: Tensor) -> Tensor:
    """Weights times values, `[N, dim]`."""
    source, target = edge_index
    parts = values.unflatten(-1, (weights.shape[1], -1))[source] * weights[..., None]
    return (
        torch.zeros(len(values), *parts.shape[1:], dtype=torch.float64).index_add(0, target, parts).flatten(1)
    )


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("graph_transformer", {}),
        ("graph_transformer", {"edges": False, "edge_types": None}),
        ("gps", {}),
        ("gps", {"local": "gated_gcn", "norm": "graph", "attn_dropout": 0.5}),
        ("urpe", {}),
    ],
)
def test_weights_times_values_are_what_the_layer_mixed(
    random_graphs: Callable[..., Graphs], name: str, options: dict[str, Any]
) -> None:
    model, graphs = build(name, **options).double(), batch(random_graphs, name)
    # logits far apart: weights that only look alike would not pass
    for layer in model.modules():
        if isinstance(layer, Attention):
            layer.Q.weight.data.mul_(3)
        elif isinstance(layer, GraphAttention):
            layer.in_proj_weight.data[:32].mul_(5)
    before = model(graphs)
    found = attention(model, graphs)
    torch.testing.assert_close(model(graphs), before, rtol=0, atol=0)
    mixed = Mixed()
    mixed.watch(model)
    with torch.no_grad():
        model(graphs)
    assert len(found.weights) == len(mixed.results) == MODELS[name]["L"]
    valid = torch.arange(max(SIZES)) < torch.tensor(SIZES)[:, None]
    for weights, values, result in zip(found.weights, mixed.values, mixed.results, strict=True):
        assert weights.shape == (found.edge_index.shape[1], 4)
        assert weights.std() > 0.02
        if result.dim() == 3:  # padded
            values, result = values[valid], result[valid]  # noqa: PLW2901
        torch.testing.assert_close(mix(weights, values, found.edge_index), result, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize(
    ("name", "slack"), [("graph_transformer", 1.5e-4), ("gps", 1e-5)]
)  # 1e-6 beside a sum of at least exp(-5)
def test_weights_of_a_node_sum_to_one(random_graphs: Callable[..., Graphs], name: str, slack: float) -> None:
    graphs = batch(random_graphs, name)
    found = attention(build(name), graphs)
    for weights in found.weights:
        total = torch.zeros(graphs.nodes, 4).index_add(0, found.edge_index[1], weights)
        reached = torch.bincount(found.edge_index[1], minlength=graphs.nodes) > 0
        assert reached.sum() >= sum(SIZES) - 3
        assert ((total - reached[:, None].float()).abs() < slack).all()
    assert found.of == ("edges" if name == "graph_transformer" else "pairs")


def test_pairs_lie_as_distances_do() -> None:
    starts = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    assert pairs_of(starts, 5).T.tolist() == [
        *([a, b] for b in (0, 1) for a in (0, 1)),
        *([a, b] for b in (2, 3, 4) for a in (2, 3, 4)),
    ]  # fmt: skip


def test_the_table_has_a_row_a_weight(random_graphs: Callable[..., Graphs]) -> None:
    model, graphs = build("graph_transformer"), batch(random_graphs, "graph_transformer")
    found, ids = attention(model, graphs), ["a", "b", "c", "d"]
    rows = table(found, graphs, ids)
    edges = graphs.edge_index.shape[1]
    assert list(rows.columns) == ["id", "source", "target", "layer", "head", "weight"]
    assert len(rows) == edges * 3 * 4
    edge, layer, head = 17, 2, 3
    graph = int(graph_ids(graphs.starts, graphs.nodes)[graphs.edge_index[0, edge]])
    first = int(graphs.starts[graph])
    one = rows.iloc[(edge * 3 + layer - 1) * 4 + head - 1]
    assert (one.id, one.layer, one["head"]) == (ids[graph], layer, head)
    assert [one.source, one.target] == (graphs.edge_index[:, edge] - first).tolist()
    assert one.weight == found.weights[layer - 1][edge, head - 1].item()
    sums = rows.groupby(["id", "target", "layer", "head"]).weight.sum()
    assert np.allclose(sums, 1, atol=1.5e-4)
    short = table(found, graphs, ids, [f"n{i}" for i in range(graphs.nodes)], each=False)
    assert list(short.columns) == ["id", "source", "target", "weight"]
    assert short.source[edge] == f"n{int(graphs.edge_index[0, edge])}"
    assert np.allclose(short.weight, rows.weight.to_numpy().reshape(edges, -1).mean(1), atol=1e-6)


def test_attention_that_is_not_there_is_said(random_graphs: Callable[..., Graphs]) -> None:
    model = build("gine")
    assert not attends(model)
    with pytest.raises(UsageError, match="no attention to show"):
        attention(model, batch(random_graphs, "gine"))
    with pytest.raises(ValueError, match="evaluation"):
        attention(build("gps").train(), batch(random_graphs, "gps"))


@pytest.mark.parametrize("baseline", ["zero", "mean"])
@pytest.mark.parametrize("name", MODELS)
def test_attributions_sum_to_the_difference(
    random_graphs: Callable[..., Graphs], name: str, baseline: Any
) -> None:
    model, graphs = build(name), batch(random_graphs, name, [12])
    with torch.no_grad():
        value = float(model(graphs)[0, 1])
    found = integrated_gradients(model, graphs, lambda out: out[:, 0, 1], baseline=baseline)
    assert found.complete
    assert found.value == pytest.approx(value, abs=1e-5)
    assert found.value != pytest.approx(found.baseline, abs=1e-4)
    assert found.nodes.shape == (12,)
    assert (found.edges is None) == (name == "gcn")
    total = found.nodes.double().sum() + (0 if found.edges is None else found.edges.double().sum())
    sizes = found.nodes.abs().sum() + (0 if found.edges is None else found.edges.abs().sum())
    allowed = 0.01 * max(abs(found.value - found.baseline), 0.1 * float(sizes))
    assert abs(float(total) - (found.value - found.baseline)) <= allowed + 1e-6
    assert found.error <= allowed + 1e-6


def test_of_a_model_without_bends_few_steps_are_exact() -> None:
    """A sum of embeddings: each node gets what it adds, each edge nothing, whatever the steps."""

    graphs = Graphs(
        torch.tensor([[1.0, 2.0], [0.5, -1.0], [3.0, 0.0]]),
        torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]),
        torch.tensor([0, 3], dtype=torch.int32),
    )
    torch.manual_seed(0)
    model = manyheads.create_model("kipf_gcn", node_features=2, outputs=1, L=1).eval()
    with torch.no_grad():
        row = model(graphs)
        weight, bias = model.layers[0].lin.weight, float(model.layers[0].bias[0])
    found = integrated_gradients(model, graphs, lambda out: out[:, 2, 0], steps=1)
    assert found.steps == 1
    assert found.features is not None
    # node 2's output takes x of itself and of its neighbour, by 1 / sqrt(degrees), loops counted
    share = torch.tensor([0.0, 1 / 6**0.5, 1 / 2])
    torch.testing.assert_close(found.features, (share[:, None] * graphs.x * weight).detach())
    torch.testing.assert_close(found.nodes, found.features.sum(1))
    assert found.value - found.baseline == pytest.approx(float(row[2, 0]) - bias, abs=1e-6)


def test_categories_and_the_same_as_features_agree(random_graphs: Callable[..., Graphs]) -> None:
    """A linear layer over one-hot features is an embedding: attributions of nodes are the same."""
    embedded = build("graph_transformer", encoding_dim=0)
    linear = build("graph_transformer", encoding_dim=0, node_types=None, node_features=28)
    state = embedded.state_dict()
    state["embedding_h.bias"] = torch.zeros(32)
    state["embedding_h.weight"] = state["embedding_h.weight"].T.contiguous()
    linear.load_state_dict(state)
    graphs = random_graphs([10])
    hot = graphs._replace(x=nn.functional.one_hot(graphs.x, 28).float())
    a, b = (
        integrated_gradients(model, given, lambda out: out[:, 0, 0], steps=64, tolerance=1)
        for model, given in ((embedded, graphs), (linear, hot))
    )
    assert a.value == pytest.approx(b.value, abs=1e-5)
    torch.testing.assert_close(a.nodes, b.nodes, atol=2e-5, rtol=1e-3)
    torch.testing.assert_close(a.edges, b.edges, atol=2e-5, rtol=1e-3)


def test_what_cannot_be_complete_is_said(random_graphs: Callable[..., Graphs]) -> None:
    model, graphs = build("graph_transformer"), batch(random_graphs, "graph_transformer", [12])
    found = integrated_gradients(model, graphs, lambda out: out[:, 0, 0], steps=256, tolerance=1e-12)
    assert found.steps == 1024
    assert not found.complete
    assert found.error > 0


def test_copies_are_the_graph_again(random_graphs: Callable[..., Graphs]) -> None:
    graphs = batch(random_graphs, "urpe", [7])._replace(pairs=torch.tensor([[0, 3], [5, 1]]))
    many = repeated(graphs, 3)
    model = build("urpe", readout="pair")
    torch.testing.assert_close(model(many), model(graphs).repeat(3, 1), atol=1e-5, rtol=1e-5)
    assert many.starts.tolist() == [0, 7, 14, 21]


def test_wrong_calls_are_refused(random_graphs: Callable[..., Graphs]) -> None:
    model = build("gine")
    with pytest.raises(ValueError, match="one graph is explained at a time, not 4"):
        integrated_gradients(model, batch(random_graphs, "gine"), lambda out: out[:, 0, 0])
    with pytest.raises(UsageError, match="no baseline 'carbon'"):
        integrated_gradients(
            model, random_graphs([5]), lambda out: out[:, 0, 0], baseline="carbon"  # type: ignore[arg-type]
        )  # fmt: skip
    with pytest.raises(UsageError, match="Linear is no graph model"):
        layers_of(nn.Linear(1, 1))
