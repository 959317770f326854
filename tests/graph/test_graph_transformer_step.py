"""All layers as one step of autograd against the layers' modules, and where the step must not run."""

from __future__ import annotations

import copy

import pytest
import torch

from manyheads.core.dispatch import numba_installed
from manyheads.graph.models import graph_transformer as room
from manyheads.graph.models import graph_transformer_step as step
from manyheads.graph.models.graph_transformer import GraphTransformer, graph_transformer

pytestmark = pytest.mark.skipif(not numba_installed(), reason="needs numba")
EDGES = pytest.mark.parametrize("edges", [True, False], ids=["edge", "node"])


@pytest.fixture(autouse=True)
def any_cpu(monkeypatch):
    monkeypatch.setattr(step, "wide_vectors_unused", lambda: True)


@pytest.fixture
def count(monkeypatch):
    """How often the step was taken."""
    taken = []
    whole = room.layers_step
    monkeypatch.setattr(room, "layers_step", lambda *given: taken.append(1) or whole(*given))
    return taken


def build(edges: bool, width: int = 32, **options) -> GraphTransformer:
    options = {"L": 3, "n_heads": 4, "encoding_dim": 4} | options
    model = graph_transformer(
        1, [28], edge_types=[4] if edges else None, edges=edges, hidden_dim=width, **options
    )
    for norm in model.modules():
        if isinstance(norm, torch.nn.BatchNorm1d):
            torch.nn.init.normal_(norm.weight, 1.0, 0.3)
            torch.nn.init.normal_(norm.bias)
            norm.running_mean.normal_()
    return model.train()


def run(model, graphs):
    """Output, gradients by name, and the buffers after the pass."""
    out = model(graphs)
    out.pow(2).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return out.detach(), grads, dict(model.named_buffers())


def off(found, truth) -> float:
    return (found.double() - truth).abs().max().item() if found is not None else 0.0


@EDGES
@pytest.mark.parametrize("width", [32, 64, 80])
@pytest.mark.parametrize("kind", ["closed", "shuffled", "one"])
def test_float64_rule(random_graphs, monkeypatch, count, edges, width, kind):
    """Molecules one after another, their edges in any order, and one graph that cannot be cut."""
    graphs = random_graphs([2000] if kind == "one" else [9, 1, 30, 5, 23] * 30, encoding=4)
    if kind == "shuffled":
        order = torch.randperm(graphs.edge_index.shape[1])
        graphs = graphs._replace(edge_index=graphs.edge_index[:, order], edge_attr=graphs.edge_attr[order])
    model = build(edges, width, readout="node")
    plain, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    found = run(model, graphs)
    assert count
    truth = run(exact, graphs._replace(encoding=graphs.encoding.double()))
    monkeypatch.setattr(room, "fits", lambda *given: False)
    theirs = run(plain, graphs)
    assert len(count) == 1
    assert off(found[0], truth[0]) <= 2 * off(theirs[0], truth[0]) + 1e-6 * truth[0].abs().max()
    for name, gradient in truth[1].items():
        assert (found[1][name] is None) == (gradient is None), name
        if gradient is not None:
            layer = [g.norm().item() for n, g in truth[1].items() if g is not None and n[:8] == name[:8]]
            # a ReLU's input may round to the other side of zero, and a row's gradient is then off
            limit = 3 * (theirs[1][name].double() - gradient).norm() + 1e-3 * max(layer)
            assert (found[1][name].double() - gradient).norm() <= limit, name
    for name, buffer in truth[2].items():
        torch.testing.assert_close(found[2][name].to(buffer.dtype), buffer, rtol=1e-5, atol=1e-5, msg=name)


@EDGES
def test_threads_give_the_same(random_graphs, edges):
    graphs = random_graphs([9, 14, 30, 5, 23] * 60, encoding=4)
    model, before, found = build(edges), torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        out, grads, buffers = run(copy.deepcopy(model), graphs)
        found.append([out, *(g for g in grads.values() if g is not None), *buffers.values()])
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_step_can_be_taken_back_twice_and_by_two_graphs(random_graphs, count):
    """Memory that is used again is not used while somebody may look."""
    one, two = (random_graphs([9, 14, 30] * 9, encoding=4) for _ in range(2))
    model = build(True)
    first, second = model(one).sum(), model(two).square().sum()
    weight = model.layers[0].attention.Q.weight
    (a,) = torch.autograd.grad(first, [weight], retain_graph=True)
    (b,) = torch.autograd.grad(second, [weight])
    (again,) = torch.autograd.grad(first, [weight])
    assert torch.equal(a, again)
    (fresh,) = torch.autograd.grad(model(two).square().sum(), [weight])
    assert torch.equal(b, fresh)
    assert len(count) == 3


def test_edges_that_somebody_looks_at(random_graphs):
    """The results of both streams have gradients; each alone too."""
    graphs = random_graphs([9, 14, 30], encoding=4)
    model = build(True, L=2)
    order = room.edge_order(graphs.edge_index, graphs.nodes)
    h = torch.randn(graphs.nodes, 32, requires_grad=True)
    e = torch.randn(graphs.edge_index.shape[1], 32, requires_grad=True)

    def by_modules(h, e):
        for layer in copy.deepcopy(model.layers):
            h, e = layer(h, e, graphs.edge_index, order)
        return h, e

    def by_step(h, e):
        layers = [layer.plain() for layer in model.layers]
        assert step.fits(layers, h, e)
        return step.layers_step(layers, model.layers[0].attention.edges(graphs.edge_index, order), h, e)

    for weights in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0)):
        found, wanted = (
            torch.autograd.grad(
                sum(w * y.sin().sum() for w, y in zip(weights, run(h, e), strict=True) if w), [h, e]
            )
            for run in (by_step, by_modules)
        )
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_where_it_does_not_run(random_graphs, monkeypatch, count):
    graphs = random_graphs([9, 14], encoding=4)

    def taken(model) -> bool:
        count.clear()
        model(graphs)
        return bool(count)

    assert taken(build(True))
    assert taken(build(False))
    for options in (
        {"dropout": 0.1},
        {"norm": "layer"},
        {"norm": "both"},
        {"norm": "none"},
        {"n_heads": 3, "width": 24},
    ):
        assert not taken(build(True, **options))
    assert not taken(build(False, isolated="nan"))
    assert not taken(build(True).eval())
    model = build(True)
    with torch.no_grad():
        assert not taken(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert not taken(model)
    handle = model.layers[1].register_forward_hook(lambda module, given, out: out)
    assert not taken(model)
    handle.remove()
    handle = model.layers[1].O_e.register_forward_hook(lambda module, given, out: out)
    assert not taken(model)
    handle.remove()
    assert taken(model)
    model.layers[0].batch_norm1_h.eval()
    assert not taken(model)
    model.layers[0].batch_norm1_h.train()
    model.layers[0].batch_norm1_h.momentum = None
    assert not taken(model)
    model = build(True)
    model.layers[2] = torch.nn.Module()
    model.layers[2].forward = lambda h, e, edge_index, order: (h, e)
    assert not taken(model)
    monkeypatch.setattr(step, "wide_vectors_unused", lambda: False)
    assert not taken(build(True))
