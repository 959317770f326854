"""What of a graph a prediction rests on: integrated gradients of its nodes and edges. arXiv 1703.01365.

Gradients are summed along the straight way from a baseline to the input; by the chain rule they add up to the
difference of the two predictions (completeness), which is measured here and told. Categories have no way
between them, so theirs is that of their embeddings. Edges stay where they are, and so do encodings, degrees
and distances: what is shared out is what nodes and edges are, not how they are joined.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from manyheads.core.errors import UsageError
from manyheads.graph.graphs import Graphs
from manyheads.graph.models.gps import GPS
from manyheads.graph.models.graph_transformer import GraphTransformer
from manyheads.graph.models.message_passing import KipfGCN, MessagePassingNet
from manyheads.graph.models.urpe import Urpe

Baseline: TypeAlias = Literal["zero", "mean"]
Score: TypeAlias = Callable[[Tensor], Tensor]  # from a model's outputs `[rows, outputs]` to numbers `[rows]`
BASELINES = ("zero", "mean")
STEPS, MOST_STEPS = 32, 1024
TOLERANCE = 0.01
CHUNK = 1_000_000  # numbers of the inputs that are in memory at once


@dataclass(frozen=True)
class Attributions:
    """What each node and edge adds to a prediction.

    Args:
        nodes: Of each node.
        edges: Of each edge; None where edges are nothing but there.
        features: Of each node's features; None where nodes have categories.
        value: The prediction.
        baseline: The prediction of the baseline; all attributions sum to the difference.
        start: What the baseline was.
        error: How far their sum is from it.
        steps: Gradients on the way.
        complete: Whether the error is within the tolerance.

    Shape:
        nodes `[N]`; edges `[E]`; features `[N, f]`.
    """

    nodes: Tensor
    edges: Tensor | None
    features: Tensor | None
    value: float
    baseline: float
    start: Baseline
    error: float
    steps: int
    complete: bool


class _Input(NamedTuple):
    """Something that nodes or edges are: where it goes in, and both ends of its way."""

    layer: nn.Module | None  # what embeds it; None for features, which are given to the model
    start: Tensor
    end: Tensor


def integrated_gradients(
    model: nn.Module,
    graphs: Graphs,
    score: Score,
    *,
    baseline: Baseline = "zero",
    steps: int = STEPS,
    tolerance: float = TOLERANCE,
) -> Attributions:
    """Share a prediction out to the nodes and edges of its graph.

    The steps (points between, with the weights of Gauss and Legendre) are doubled until the sum of all
    attributions is within `tolerance` of the difference of the predictions (where this is small, of a tenth
    of the sum of the attributions' sizes), to 1024 at most; the result says whether it is.

    Args:
        model: A graph model of the catalogue, in evaluation mode; it is left as it is.
        graphs: One graph, as the model takes it.
        score: From the model's outputs, a row a node, pair or graph of one graph, the number to explain; it
            gets the outputs of several copies: `[copies, rows, outputs]` to `[copies]`.
        baseline: "zero", embeddings or features of zero; "mean", those of the graph's average node and edge.
        steps: To begin with.
        tolerance: Relative.

    Raises:
        UsageError: The model is of no family known here, or the baseline is none.
        ValueError: There is more than one graph, or the model is in training.

    Source:
        Sundararajan et al. 2017, arXiv 1703.01365.
    """
    if graphs.starts.shape[0] != 2:
        raise ValueError(f"one graph is explained at a time, not {graphs.starts.shape[0] - 1}")
    if model.training:
        raise ValueError("a prediction is that of a model in evaluation mode: call model.eval()")
    if baseline not in BASELINES:
        raise UsageError(f"no baseline {baseline!r} (there are {', '.join(BASELINES)})")
    inputs = _inputs(model, graphs, baseline)
    ends = _ends(model, graphs, inputs, score)
    while True:
        parts = _integral(model, graphs, inputs, score, steps)
        shares = [part.sum(-1) for part in parts]
        total, sizes = (float(sum(f(each).sum() for each in shares)) for f in (torch.clone, torch.abs))
        difference = ends[1] - ends[0]
        error = abs(total - difference)
        complete = error <= tolerance * max(abs(difference), 0.1 * sizes)
        if complete or steps >= MOST_STEPS:
            break
        steps = min(2 * steps, MOST_STEPS)
    features = parts[0].float() if inputs[0].layer is None else None
    edges = shares[1].float() if len(shares) > 1 else None
    return Attributions(
        shares[0].float(), edges, features, ends[1], ends[0], baseline, error, steps, complete
    )


def layers_of(model: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """Return what brings a model's nodes, and its edges, to a width; None where features go in as they are.

    Raises:
        UsageError: The model is of no family known here.
    """
    if isinstance(model, GraphTransformer):
        return model.embedding_h, model.embedding_e
    if isinstance(model, GPS | MessagePassingNet):
        return model.node, model.edge
    if isinstance(model, Urpe):
        return model.node, model.edge_bias
    if isinstance(model, KipfGCN):
        return None, None
    raise UsageError(f"{type(model).__name__} is no graph model that can be explained")


def _inputs(model: nn.Module, graphs: Graphs, baseline: Baseline) -> list[_Input]:
    """Nodes, and edges where they are something."""
    found: list[_Input] = []
    for layer, given in zip(layers_of(model), (graphs.x, graphs.edge_attr), strict=True):
        if given is None or (layer is None and found):
            continue  # edges that the model does not look at
        if found and not model.of.edges:  # type: ignore[union-attr]
            continue
        embedded = None if given.is_floating_point() else layer
        if embedded is None:
            end = given[:, None] if given.dim() == 1 else given
        else:
            with torch.no_grad():
                end = embedded(given)
        mean = end.mean(0).expand_as(end) if baseline == "mean" and len(end) else torch.zeros_like(end)
        found.append(_Input(embedded, mean, end))
    return found


def _ends(model: nn.Module, graphs: Graphs, inputs: list[_Input], score: Score) -> list[float]:
    """The predictions of the baseline and of the input."""
    with torch.no_grad():
        return [
            float(_scores(model, graphs, inputs, [which(i)[None] for i in inputs], score))
            for which in (lambda i: i.start, lambda i: i.end)
        ]


def _integral(
    model: nn.Module, graphs: Graphs, inputs: list[_Input], score: Score, steps: int
) -> list[Tensor]:
    """Attributions of every number of each input, in float64."""
    places, weights = _points(steps)
    size = sum(each.end.numel() for each in inputs)
    totals = [torch.zeros_like(each.end, dtype=torch.float64) for each in inputs]
    for some in torch.arange(steps).split(max(1, CHUNK // max(1, size))):
        points = []
        for start, end in ((each.start, each.end) for each in inputs):
            place = places[some].to(end)[:, None, None]
            points.append((start + place * (end - start)).requires_grad_())
        found = _scores(model, graphs, inputs, points, score)
        share = weights[some].to(found)
        gradients = torch.autograd.grad((found * share).sum(), points, allow_unused=True)
        for total, gradient in zip(totals, gradients, strict=True):
            total.add_(0.0 if gradient is None else gradient.sum(0))
    return [total * (each.end - each.start) for total, each in zip(totals, inputs, strict=True)]


def _points(steps: int) -> tuple[Tensor, Tensor]:
    """Points between 0 and 1 and their weights: stretches of eight by Gauss and Legendre.

    Short stretches, as networks of ReLUs bend between them.
    """
    order = math.gcd(steps, 8)
    places, weights = (torch.from_numpy(each) for each in np.polynomial.legendre.leggauss(order))
    first = torch.arange(steps // order, dtype=torch.float64)[:, None]
    return ((first + (places + 1) / 2) * order / steps).flatten(), (weights / 2 * order / steps).repeat(
        len(first)
    )


def _scores(
    model: nn.Module, graphs: Graphs, inputs: list[_Input], points: list[Tensor], score: Score
) -> Tensor:
    """What is predicted where nodes and edges are these.

    Shape:
        points `[copies, N or E, width]`; the result `[copies]`.
    """
    copies = points[0].shape[0]
    batch = repeated(graphs, copies)
    flat = [point.flatten(0, 1) for point in points]
    given = {f: p for i, f, p in zip(inputs, ("x", "edge_attr"), flat, strict=False) if i.layer is None}
    if "edge_attr" in given and graphs.edge_attr is not None and graphs.edge_attr.dim() == 1:
        given["edge_attr"] = given["edge_attr"][:, 0]
    with _replaced([(i.layer, p) for i, p in zip(inputs, flat, strict=True) if i.layer is not None]):
        outputs = model(batch._replace(**given))
    return score(outputs.unflatten(0, (copies, -1)))


@contextmanager
def _replaced(outputs: list[tuple[nn.Module, Tensor]]) -> Iterator[None]:
    """Let layers give these, whatever they are given."""
    handles = [
        layer.register_forward_hook(lambda module, args, output, own=own: own) for layer, own in outputs
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def repeated(graphs: Graphs, copies: int) -> Graphs:
    """Return a batch of so many copies of one graph, or of one batch."""
    shift = torch.arange(copies, device=graphs.x.device) * graphs.nodes

    def rows(part: Tensor | None) -> Tensor | None:
        return None if part is None else part.repeat(copies, *(1,) * (part.dim() - 1))

    def shifted(part: Tensor | None) -> Tensor | None:
        return None if part is None else (part.long()[:, None] + shift[:, None]).flatten(1)

    starts = (graphs.starts[:-1] + shift.to(graphs.starts)[:, None]).flatten()
    end = graphs.starts.new_tensor([copies * graphs.nodes])
    edge_index = shifted(graphs.edge_index)
    assert edge_index is not None
    return graphs._replace(
        x=graphs.x.repeat(copies, *(1,) * (graphs.x.dim() - 1)),
        edge_index=edge_index,
        starts=torch.cat([starts, end]),
        edge_attr=rows(graphs.edge_attr),
        encoding=rows(graphs.encoding),
        roles=rows(graphs.roles),
        distances=rows(graphs.distances),
        pairs=shifted(graphs.pairs),
    )
