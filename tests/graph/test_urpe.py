"""URPE against tensors recorded from the released code, and its graph form against a loop and its limits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from manyheads.core.dispatch import use_backend
from manyheads.core.errors import UsageError
from manyheads.graph.encodings import shortest_paths
from manyheads.graph.graphs import Graphs, pad_pairs
from manyheads.graph.models.urpe import Urpe, UrpeAttention, UrpeLayer, urpe

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


@DTYPES
def test_attention(recorded, dtype):
    """The recorded weights are those before the factor: made here from the layer's projections."""
    case = recorded("urpe_attention", dtype)
    given = case.inputs()
    layer = case.load(UrpeAttention(case.about["config"]["embed_dim"], 4))
    x, valid = given["query"].transpose(0, 1), ~given["key_padding_mask"]
    bias, factor = (given[f"{name}rel_pos_bias"].unflatten(0, (-1, 4)) for name in ("", "ur_"))
    out = layer(x, valid, bias, factor).transpose(0, 1)
    q, k = (f(x).unflatten(-1, (4, -1)).transpose(1, 2) for f in (layer.q_proj, layer.k_proj))
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5 + bias
    weights = scores.masked_fill(~valid[:, None, None], float("-inf")).softmax(-1)
    case.check({"out": out, "softmax_weights": weights.transpose(0, 1)}, given, layer)


class Encoder(nn.Module):
    """The released encoder of sequences, around our layers."""

    def __init__(self, config: dict, index: Tensor) -> None:
        super().__init__()
        dim, heads = config["embedding_dim"], config["num_attention_heads"]
        self.embed_tokens = nn.Embedding(config["vocab_size"], dim, padding_idx=config["padding_idx"])
        self.emb_layer_norm = nn.LayerNorm(dim)
        self.layers = nn.ModuleList(
            UrpeLayer(dim, config["ffn_embedding_dim"], heads, norm_first=False)
            for _ in range(config["num_encoder_layers"])
        )
        offsets = 2 * config["max_seq_len"] - 1
        self.rp_bias, self.ur_rp_bias = nn.Embedding(offsets, heads), nn.Embedding(offsets, heads)
        self.index, self.padding = index, config["padding_idx"]

    def forward(self, tokens: Tensor) -> Tensor:
        valid = tokens != self.padding
        index = self.index[: tokens.shape[1], : tokens.shape[1]]
        bias, factor = (table(index).permute(2, 0, 1)[None] for table in (self.rp_bias, self.ur_rp_bias))
        x = self.emb_layer_norm(self.embed_tokens(tokens)) * valid[..., None]
        for layer in self.layers:
            x = layer(x, valid, bias, factor)
        return x


@DTYPES
def test_encoder_of_sequences(recorded, dtype):
    case = recorded("urpe_encoder", dtype)
    given = case.inputs()
    model = case.load(Encoder(case.about["config"], case.tensors["extra.ur_bucket"]))
    last = model(given["tokens"])
    case.check({"last": last, "sentence_rep": last[:, 0]}, given, model)


def with_distances(graphs: Graphs, most: int = 20) -> Graphs:
    return graphs._replace(distances=shortest_paths(graphs.edge_index, graphs.starts, most))


def small(**options) -> Urpe:
    return urpe(
        1, node_types=[28], edge_types=[4], hidden_dim=16, ffn_dim=24, L=2, n_heads=4, dropout=0.0,
        attn_dropout=0.0, **options,
    )  # fmt: skip


def test_an_attention_layer_by_a_loop(random_graphs):
    """Softmax with a bias, times a factor, both by shortest path, in Python's own numbers."""
    graphs = with_distances(random_graphs([5, 1, 8]))
    layer = UrpeAttention(8, 2).double()
    tables = [torch.randn(22, 2, dtype=torch.float64) for _ in range(2)]
    x = torch.randn(3, 8, 8, dtype=torch.float64)
    distance = pad_pairs(graphs.distances.long(), graphs.starts, 8, 21)
    valid = torch.arange(8) < graphs.sizes[:, None]
    found = layer(x, valid, *(t[distance].permute(0, 3, 1, 2) for t in tables))
    q, k, v = (f(x) for f in (layer.q_proj, layer.k_proj, layer.v_proj))
    flat, at = graphs.distances.tolist(), 0
    for b, size in enumerate(graphs.sizes.tolist()):
        for i in range(size):
            mixed = []
            for head in range(2):
                c = slice(4 * head, 4 * head + 4)
                row = flat[at + i * size : at + i * size + size]
                scores = [q[b, i, c] @ k[b, j, c] / 2 + tables[0][row[j], head] for j in range(size)]
                exps = [s.exp() for s in scores]
                weights = [e / sum(exps) * tables[1][row[j], head] for j, e in enumerate(exps)]
                mixed.append(sum(w * v[b, j, c] for j, w in enumerate(weights)))
            torch.testing.assert_close(found[b, i], layer.out_proj(torch.cat(mixed)), atol=1e-12, rtol=1e-12)
        at += size * size


def test_a_factor_of_one_is_attention_with_a_bias(random_graphs):
    """It begins as that, to the bit."""
    graphs = with_distances(random_graphs([7, 12]))
    layer = UrpeAttention(16, 4)
    x, valid = torch.randn(2, 12, 16), torch.arange(12) < graphs.sizes[:, None]
    bias = torch.randn(2, 4, 12, 12)
    with use_backend("reference"):
        assert torch.equal(layer(x, valid, bias, torch.ones(1)), layer(x, valid, bias, None))
    assert torch.equal(small().factor, torch.ones(22, 4))


def test_a_batch_is_its_graphs(random_graphs, split):
    graphs = random_graphs([9, 1, 20, 4, 2], seed=3)
    model = small(readout="mean").eval()
    nn.init.normal_(model.bias)
    nn.init.normal_(model.factor)
    found = model(with_distances(graphs))
    alone = torch.cat([model(with_distances(one)) for one in split(graphs)])
    torch.testing.assert_close(found, alone, atol=2e-5, rtol=1e-5)


def test_the_factor_sees_what_no_bias_can():
    """The paper's case: alike nodes on unlike graphs: one answer with a bias, two with a factor."""
    ring = torch.tensor([[0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 0]])
    triangles = torch.tensor([[0, 1, 2, 3, 4, 5], [1, 2, 0, 4, 5, 3]])
    model = urpe(1, node_types=[1], hidden_dim=16, ffn_dim=16, L=1, n_heads=2).double().eval()
    nn.init.normal_(model.bias)
    starts = torch.tensor([0, 6], dtype=torch.int32)

    def score(edges: Tensor) -> Tensor:
        both = torch.cat([edges, edges.flip(0)], 1)
        return model(with_distances(Graphs(torch.zeros(6, dtype=torch.int64), both, starts)))

    assert torch.allclose(score(ring), score(triangles), rtol=0, atol=1e-12)
    nn.init.normal_(model.factor)
    assert not torch.allclose(score(ring), score(triangles), rtol=0, atol=1e-6)


def test_learns_every_parameter(random_graphs):
    model = small(readout="node")
    graphs = with_distances(random_graphs([9, 12, 30, 5, 21, 16]))
    (model(graphs).sum() + model.embed(graphs).pow(3).sum()).backward()
    unreached = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not unreached


def test_what_does_not_fit_is_refused(random_graphs):
    graphs = random_graphs([9, 12])
    with pytest.raises(ValueError, match="needs distances"):
        small()(graphs)
    with pytest.raises(ValueError, match="distances must be from 0 to 21, and are from 0 to 31"):
        small()(graphs._replace(distances=torch.full((225,), 31).index_fill(0, torch.tensor([0]), 0)))
    with pytest.raises(ValueError, match="225 pairs of nodes, not 224"):
        small()(graphs._replace(distances=torch.zeros(224, dtype=torch.int16)))
    with pytest.raises(UsageError, match="not a multiple of 3 heads"):
        urpe(1, node_types=[28], n_heads=3)
