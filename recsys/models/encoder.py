"""A post-norm transformer over histories, padded or packed: what BERT4Rec and SASRec share.

Parameters have the names of RecBole's. A token is 0 for a pad, and item number n's is n + 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core.errors import UsageError
from manyheads.core.layers.norm import LayerNorm
from manyheads.core.ops import attention, varlen_attention
from manyheads.core.products import linear, project
from manyheads.core.sizes import check_sizes

PAD = 0
FIRST = 1  # the token of item number 0
GROUPS = 8  # that a batch is padded in, where weights are dropped
Positions = Literal["start", "end"]


class Items(NamedTuple):
    """What states are compared with: `states @ weight.T + bias` are the scores of items, by their numbers.

    Shape:
        weight `[items, H]`; bias `[items]`.
    """

    weight: Tensor
    bias: Tensor | None = None


class Packed(NamedTuple):
    """Histories one behind the other.

    Shape:
        tokens `[T]`; starts `[B + 1]`, int32: where each begins, and the end of all.
    """

    tokens: Tensor
    starts: Tensor

    @property
    def lengths(self) -> Tensor:
        """Tokens of each, `[B]`."""
        return self.starts.diff()

    def rows(self) -> Tensor:
        """Whose each token is, `[T]`."""
        return torch.repeat_interleave(self.lengths, output_size=len(self.tokens))

    def places(self) -> Tensor:
        """Where in its history each token stands, `[T]`."""
        return torch.arange(len(self.tokens), device=self.tokens.device) - self.starts[self.rows()]


def pack(tokens: Tensor) -> Packed:
    """Leave the pads out of rows, wherever they are.

    Shape:
        tokens `[B, N]`.
    """
    real = tokens != PAD
    return Packed(tokens[real], starts_of(real.sum(1)))


def by_length(batch: Packed) -> tuple[Packed, Tensor]:
    """Bring histories in the order of their lengths; return where each token was, too.

    Shape:
        the places `[T]`.
    """
    ranks = batch.lengths.argsort().argsort()
    order = ranks[batch.rows()].argsort(stable=True)
    return Packed(batch.tokens[order], starts_of(batch.lengths.sort().values)), order


def starts_of(lengths: Tensor) -> Tensor:
    """Return where histories of these lengths begin, and the end of all."""
    return F.pad(lengths.cumsum(0), (1, 0)).int()


def positions(batch: Tensor | Packed, max_len: int, count_from: Positions) -> Tensor:
    """Return each token's position: from its history's start, or so that the newest has the last one.

    A pad gets a neighbouring one: what is computed for it means nothing.

    Args:
        batch: Tokens `[B, N]`, or packed.
        max_len: Positions that there are.
        count_from: Which end of a history keeps its place when the history grows.

    Raises:
        ValueError: A history is longer than `max_len` (looked at on a CPU, where packed).
    """
    if isinstance(batch, Packed):
        lengths = batch.lengths
        if lengths.is_cpu and not torch.compiler.is_compiling() and len(lengths):
            _check_length(int(lengths.max()), max_len)
        places = batch.places()
        return places if count_from == "start" else places + (max_len - lengths)[batch.rows()]
    _check_length(batch.shape[1], max_len)
    real = (batch != PAD).int()
    places = torch.arange(batch.shape[1], device=batch.device)
    if count_from == "start":
        places = places - real.argmax(1, keepdim=True)
    else:
        places = places + real.flip(1).argmax(1, keepdim=True) + max_len - batch.shape[1]
    return places.clamp(0, max_len - 1)


def _check_length(length: int, max_len: int) -> None:
    if length > max_len:
        raise ValueError(f"a history of {length} tokens, and the model has {max_len} positions")


class Attention(nn.Module):
    """Self-attention with its residual and norm.

    Args:
        dim: Width.
        num_heads: Heads.
        dropout: Probability, in training, of what is added to the residual.
        attn_dropout: Probability that an attention weight is dropped, in training.
        causal: A token sees none that comes later.

    Shape:
        x and the result `[B, N, dim]` with mask `[B, N]` (True where a token is real), or `[T, dim]` with
        starts `[B + 1]`.
    """

    def __init__(
        self, dim: int, num_heads: int, dropout: float, attn_dropout: float, causal: bool, eps: float
    ) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))
        self.dense = nn.Linear(dim, dim)
        self.LayerNorm = LayerNorm(dim, eps)
        self.num_heads, self.causal = num_heads, causal
        self.dropout, self.attn_dropout = dropout, attn_dropout

    def forward(self, x: Tensor, mask: Tensor | None, starts: Tensor | None) -> Tensor:
        """Attend within each history."""
        parts = (self.query, self.key, self.value)
        weight, bias = torch.cat([p.weight for p in parts]), torch.cat([p.bias for p in parts])
        q, k, v = linear(x, weight, bias).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        dropped = self.attn_dropout if self.training else 0.0
        if starts is None:
            seen = None if mask is None else mask[:, None, None]
            out = attention(q, k, v, mask=seen, causal=self.causal, dropout_p=dropped)
        elif dropped:
            out = self._padded(q, k, v, starts, dropped)
        else:
            out = varlen_attention(q, k, v, starts, causal=self.causal)
        out = F.dropout(project(self.dense, out.flatten(-2)), self.dropout, self.training)
        return cast(Tensor, self.LayerNorm(out, residual=x)[0])

    def _padded(self, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, dropped: float) -> Tensor:
        """The same with dropped weights, which packed attention does not know: a few histories at a time."""
        if q.shape[0] == 0:
            return q
        lengths = starts.diff()
        few = lengths.split(-(-len(lengths) // (GROUPS if q.is_cpu else 1)))
        tokens = [int(each.sum()) for each in few]
        found = []
        for each, *parts in zip(few, *(x.split(tokens) for x in (q, k, v)), strict=True):
            real = torch.arange(int(each.max()), device=q.device) < each[:, None]  # [b, n]
            q, k, v = (x.new_zeros(*real.shape, *x.shape[1:]).index_put((real,), x) for x in parts)
            out = attention(q, k, v, mask=real[:, None, None], causal=self.causal, dropout_p=dropped)
            found.append(out[real])
        return torch.cat(found)


class FeedForward(nn.Module):
    """Two linear maps with GELU between them, their residual and norm.

    Shape:
        x and the result `[..., dim]`.
    """

    def __init__(self, dim: int, inner: int, dropout: float, eps: float) -> None:
        super().__init__()
        self.dense_1, self.dense_2 = nn.Linear(dim, inner), nn.Linear(inner, dim)
        self.LayerNorm = LayerNorm(dim, eps)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """Apply both maps."""
        out = project(self.dense_2, F.gelu(project(self.dense_1, x)))
        out = F.dropout(out, self.dropout, self.training)
        return cast(Tensor, self.LayerNorm(out, residual=x)[0])


class Layer(nn.Module):
    """Attention, then the feed-forward net."""

    def __init__(self, attention: Attention, feed_forward: FeedForward) -> None:
        super().__init__()
        self.multi_head_attention, self.feed_forward = attention, feed_forward

    def forward(self, x: Tensor, mask: Tensor | None, starts: Tensor | None) -> Tensor:
        """Give the tokens' new states."""
        return cast(Tensor, self.feed_forward(self.multi_head_attention(x, mask, starts)))


class Layers(nn.Module):
    """A stack of layers, which lie under `layer`."""

    def __init__(self, layers: list[Layer]) -> None:
        super().__init__()
        self.layer = nn.ModuleList(layers)

    def forward(self, x: Tensor, mask: Tensor | None, starts: Tensor | None) -> Tensor:
        """Give the tokens' states behind the last layer."""
        for layer in self.layer:
            x = layer(x, mask, starts)
        return x


@dataclass(frozen=True)
class Sizes:
    """How large an encoder is.

    Args:
        rows: Of the table of items: the pad, the items, and other tokens.
        max_len: Tokens of a history at most.
        hidden_size: Width, a multiple of heads.
        layers: Layers.
        heads: Heads of attention.
        inner_size: Width within the feed-forward nets; 0 is four times hidden_size.
        hidden_dropout: Probability, in training, for what layers add, and for the embeddings.
        attn_dropout: Probability that an attention weight is dropped, in training.
        count_from: Positions are counted from the "start" of a history, as the published code does, or from
            its "end": the newest item then has the same one in all.

    Raises:
        UsageError: A size is not positive or does not fit, an option is unknown.
    """

    rows: int
    max_len: int
    hidden_size: int
    layers: int
    heads: int
    inner_size: int
    hidden_dropout: float
    attn_dropout: float
    count_from: Positions

    def __post_init__(self) -> None:
        names = ("max_len", "hidden_size", "layers", "heads")
        chances = {"hidden_dropout": self.hidden_dropout, "attn_dropout": self.attn_dropout}
        check_sizes("recommender", {name: getattr(self, name) for name in names}, **chances)
        if self.hidden_size % self.heads:
            raise UsageError(f"hidden_size {self.hidden_size} is not a multiple of {self.heads} heads")
        if self.inner_size < 0:
            raise UsageError(f"inner_size must be positive, or 0, not {self.inner_size}")
        if self.count_from not in ("start", "end"):
            raise UsageError(f"count_from must be 'start' or 'end', not {self.count_from!r}")


class HistoryEncoder(nn.Module):
    """Embeddings of items and positions, a norm, and the layers.

    Args:
        sizes: How large it is.
        causal: A token sees none that comes later.
        eps: Of the norms.
    """

    def __init__(self, sizes: Sizes, causal: bool, eps: float = 1e-12) -> None:
        super().__init__()
        self.sizes = sizes
        dim, dropout = sizes.hidden_size, sizes.hidden_dropout
        self.item_embedding = nn.Embedding(sizes.rows, dim, padding_idx=PAD)
        self.position_embedding = nn.Embedding(sizes.max_len, dim)
        self.LayerNorm = LayerNorm(dim, eps)
        self.trm_encoder = Layers(
            [
                Layer(
                    Attention(dim, sizes.heads, dropout, sizes.attn_dropout, causal, eps),
                    FeedForward(dim, sizes.inner_size or 4 * dim, dropout, eps),
                )
                for _ in range(sizes.layers)
            ]
        )

    def forward(self, batch: Tensor | Packed) -> Tensor:
        """Give tokens their states.

        A row's states do not depend on its pads, on whichever side they are, nor on the rows beside it. Those
        of pads mean nothing.

        Args:
            batch: Rows with pads, or packed histories without.

        Shape:
            Tokens `[B, N]`, states `[B, N, H]`; packed `[T]`, `[T, H]`.

        Raises:
            ValueError: A history is longer than `max_len`.
        """
        if isinstance(batch, Packed) and self.training and self.sizes.attn_dropout:
            batch, order = by_length(batch)  # histories of like length are padded together
            return self._states(batch)[order.argsort()]
        return self._states(batch)

    def _states(self, batch: Tensor | Packed) -> Tensor:
        tokens = batch.tokens if isinstance(batch, Packed) else batch
        where = positions(batch, self.sizes.max_len, self.sizes.count_from)
        x = self.LayerNorm(self.item_embedding(tokens), residual=self.position_embedding(where))[0]
        x = F.dropout(x, self.sizes.hidden_dropout, self.training)
        mask, starts = (None, batch.starts) if isinstance(batch, Packed) else (tokens != PAD, None)
        return cast(Tensor, self.trm_encoder(x, mask, starts))


def initialise(model: nn.Module) -> None:
    """Draw weights as BERT does: normal with deviation 0.02, cut at two of them; biases are zero."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


def from_recbole(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of RecBole's BERT4Rec or SASRec to ours."""
    own = ("item_embedding.", "position_embedding.", "LayerNorm.", "trm_encoder.")
    return {f"encoder.{key}" if key.startswith(own) else key: value for key, value in state.items()}
