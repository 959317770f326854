"""What a graph model's nodes attend to: each layer's weights, computed again from what the layer was given.

Fused kernels keep no weights. The layer's own queries and keys go through its formula in plain torch here, so
that weights times values are what the layer mixed. The Graph Transformer has a weight for each edge, GPS and
URPE for each pair of nodes of a graph.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from manyheads.core.errors import UsageError
from manyheads.graph.graphs import Graphs, graph_ids, padding
from manyheads.graph.models import graph_transformer
from manyheads.graph.models.attention import GraphAttention
from manyheads.graph.models.graph_transformer import CLAMP, EPS
from manyheads.graph.models.urpe import UrpeAttention

if TYPE_CHECKING:
    import pandas as pd

MOST = 50_000_000  # weights of a batch, of all layers and heads together


class Attention(NamedTuple):
    """The attention weights of a batch.

    Attributes:
        edge_index: The node that is attended to in row 0, the node that attends in row 1.
        weights: Of each layer, each head's. Those of the edges that lead to a node, or of all pairs of a node
            in GPS, sum to one; the Graph Transformer with edges adds 1e-6 to the sum that it divides by, and
            URPE multiplies by a factor behind the softmax.
        of: Whether rows are the batch's edges, in their order, or all pairs of nodes of each graph.

    Shape:
        edge_index `[2, E]`; weights: layers times `[E, heads]`.
    """

    edge_index: Tensor
    weights: tuple[Tensor, ...]
    of: Literal["edges", "pairs"]

    def mean(self) -> Tensor:
        """The mean over layers and heads, `[E]`."""
        return torch.stack([each.mean(1) for each in self.weights]).mean(0)


def attends(model: nn.Module) -> bool:
    """Whether a model has attention that can be shown."""
    return any(isinstance(each, _KINDS) for each in model.modules())


def attention(model: nn.Module, graphs: Graphs) -> Attention:
    """Return the weights of every layer.

    Args:
        model: A graph transformer, in evaluation mode; it is left as it is.
        graphs: A batch as the model takes it.

    Raises:
        UsageError: The model has no attention, or there are too many weights to hold.
    """
    layers = [each for each in model.modules() if isinstance(each, _KINDS)]
    if not layers:
        raise UsageError(f"{type(model).__name__} passes messages: it has no attention to show")
    if model.training:
        raise ValueError("attention is that of a model in evaluation mode: call model.eval()")
    along_edges = isinstance(layers[0], graph_transformer.Attention)
    rows = graphs.edge_index.shape[1] if along_edges else int(graphs.sizes.long().square().sum())
    if (count := rows * len(layers) * int(layers[0].num_heads)) > MOST:  # type: ignore[arg-type]
        raise UsageError(f"attention of this input has {count} weights, more than {MOST}: take fewer nodes")
    found: dict[nn.Module, Tensor] = {}

    def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = inspect.signature(layer.forward).bind(*args, **kwargs).arguments
        found[layer] = _weights_of(layer, given, graphs)

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        with torch.inference_mode():
            model(graphs)
    finally:
        for handle in handles:
            handle.remove()
    edge_index = graphs.edge_index if along_edges else pairs_of(graphs.starts, graphs.nodes)
    return Attention(edge_index, tuple(found[each] for each in layers), "edges" if along_edges else "pairs")


def pairs_of(starts: Tensor, nodes: int) -> Tensor:
    """Return all pairs of nodes of each graph, in the order of `Graphs.distances`.

    Shape:
        starts `[B + 1]`; the result `[2, n1 ** 2 + n2 ** 2 + ...]`, its row 1 the slower.
    """
    graph = graph_ids(starts, nodes)
    sizes = starts.diff().long()[graph]  # of each node's graph
    target = torch.repeat_interleave(torch.arange(nodes, device=starts.device), sizes)
    within = torch.arange(target.shape[0], device=starts.device) - (sizes.cumsum(0) - sizes)[target]
    return torch.stack([starts.long()[graph][target] + within, target])


def table(
    found: Attention,
    graphs: Graphs,
    ids: Sequence[str],
    names: Sequence[str] | None = None,
    *,
    each: bool = True,
) -> pd.DataFrame:
    """Return a row a weight: `id, source, target, layer, head, weight`; layers and heads count from 1.

    Args:
        found: The weights of a batch.
        graphs: The batch.
        ids: Its graphs' names.
        names: Its nodes' names; their numbers within their graph, from 0, if None.
        each: One row for each layer and head; else their mean, without these two columns.

    Shape:
        ids `[B]`; names `[N]`.
    """
    import numpy as np
    import pandas as pd

    source, target = found.edge_index.cpu().numpy()
    graph = graph_ids(graphs.starts, graphs.nodes).cpu().numpy()
    first = graphs.starts.cpu().numpy()[graph]
    called = np.arange(graphs.nodes) - first if names is None else np.asarray(names, dtype=object)
    base = {"id": np.asarray(ids, dtype=object)[graph[target]], "source": called[source]}
    base["target"] = called[target]
    if not each:
        return pd.DataFrame({**base, "weight": found.mean().float().cpu().numpy()})
    weights = torch.stack(found.weights, 1).float().cpu().numpy()  # [E, L, heads]
    rows, layers, heads = weights.shape
    repeated = {key: np.repeat(part, layers * heads) for key, part in base.items()}
    repeated["layer"] = np.tile(np.repeat(np.arange(1, layers + 1, dtype=np.int16), heads), rows)
    repeated["head"] = np.tile(np.arange(1, heads + 1, dtype=np.int16), rows * layers)
    return pd.DataFrame({**repeated, "weight": weights.reshape(-1)})


def _weights_of(layer: nn.Module, given: dict[str, Any], graphs: Graphs) -> Tensor:
    if isinstance(layer, graph_transformer.Attention):
        return edge_weights(layer, given["h"], given["e"], given["edge_index"])
    if isinstance(layer, UrpeAttention):
        q, k = (_heads(each(given["x"]), layer.num_heads) for each in (layer.q_proj, layer.k_proj))
        valid, bias, factor = given["mask"], given["bias"], given["factor"]
    else:
        assert isinstance(layer, GraphAttention)
        padded = padding(graphs.starts, graphs.nodes)
        packed = nn.functional.linear(given["h"], layer.in_proj_weight, layer.in_proj_bias)
        q, k, _ = (_heads(padded.pad(each), layer.num_heads) for each in packed.chunk(3, -1))
        valid, bias, factor = padded.valid, given.get("bias"), given.get("post_scale")
    weights = pair_weights(q, k, valid, bias, factor).permute(0, 2, 3, 1)  # [B, n, n, heads]
    return weights[valid[:, :, None] & valid[:, None, :]]


def edge_weights(
    layer: graph_transformer.Attention, h: Tensor, e: Tensor | None, edge_index: Tensor
) -> Tensor:
    """Return the weights of the edges, from what a Graph Transformer's attention was given.

    Shape:
        h `[N, dim]`; e `[E, dim]` or None; edge_index `[2, E]`; the result `[E, heads]`.
    """
    source, target = edge_index.long()
    q, k = (_heads(each(h), layer.num_heads) for each in (layer.Q, layer.K))
    product = k[source] * q[target] * q.shape[-1] ** -0.5
    if layer.proj_e is not None:
        product = product * _heads(layer.proj_e(e), layer.num_heads)
    weight = product.sum(-1).clamp(-CLAMP, CLAMP).exp()
    total = weight.new_zeros(h.shape[0], layer.num_heads).index_add(0, target, weight)
    return weight / (total + (EPS if layer.proj_e is not None else 0.0))[target]


def pair_weights(q: Tensor, k: Tensor, valid: Tensor, bias: Tensor | None, factor: Tensor | None) -> Tensor:
    """Return the weights of all pairs of a padded batch: `softmax(q k / sqrt(d) + bias) * factor`.

    Shape:
        q, k `[B, n, heads, d]`; valid `[B, n]`; bias, factor `[B, heads, n, n]`; the result likewise, row i
        says what node i takes from the others.
    """
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    scores = scores if bias is None else scores + bias
    weights = scores.masked_fill(~valid[:, None, None], float("-inf")).softmax(-1)
    return weights if factor is None else weights * factor


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1))


_KINDS: tuple[type[nn.Module], ...] = (graph_transformer.Attention, GraphAttention, UrpeAttention)
