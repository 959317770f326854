"""The Conformer encoder of Paraformer's AISHELL recipe: every fourth frame, attention by relative position.

Sources: Gulati et al. 2020 (arXiv 2005.08100); relative positions: Dai et al. 2019 (arXiv 1901.02860).
Parameters have the names and shapes of the published code, whose checkpoints load strictly.

That code lets padding into a batch's shorter recordings (its convolutions, its batch norm in training, its
positions, and a row too many). Here a batch's rows are those of its recordings one by one.

Layout: B recordings, L frames of features, T encoded rows, D channels, H heads.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core.errors import UsageError
from manyheads.core.ops import attention, depthwise_conv1d
from manyheads.core.products import linear, project
from manyheads.speech.models.sanm import EPS, FeedForward, Rows, check_sizes, pack, unpack

LEAST = 7  # frames that two convolutions of width 3 and step 2 make a row of
TABLE = 5000  # rows of the published table of positions, which it counts from the end

Positions = Literal["legacy", "relative"]


class Subsample(nn.Module):
    """Two convolutions over time and frequency, each with a step of two, and a linear map.

    Args:
        input_size: Channels of a frame.
        dim: Width of the result.

    Shape:
        features `[B, L, input_size]`, L at least 7; the result `[B, T, dim]`.
    """

    def __init__(self, input_size: int, dim: int) -> None:
        super().__init__()
        convs = (nn.Conv2d(1, dim, 3, 2), nn.Conv2d(dim, dim, 3, 2))
        self.conv = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU())
        self.out = nn.ModuleList([nn.Linear(dim * rows_of(input_size), dim)])

    def forward(self, features: Tensor) -> Tensor:
        """Shorten recordings."""
        return project(self.out[0], self.conv(features[:, None]).transpose(1, 2).flatten(2))


def rows_of(frames: int) -> int:
    """Rows that a number of frames becomes."""
    return max(0, ((frames - 1) // 2 - 1) // 2)


class Places(NamedTuple):
    """What relative positions are computed from.

    Attributes:
        left: Positions of keys up to the query, the furthest first, `[B, T, D]`, or one for all, `[1, T, D]`.
        right: Of later keys, the nearest first, `[B or 1, R, D]`.
        legacy: As the first published code has it: positions are counted from the end of a table, and a later
            key is weighed by the row behind the query's, as one a step nearer; the next key not at all.
    """

    left: Tensor
    right: Tensor
    legacy: bool

    @classmethod
    def of(cls, kind: Positions, size: int, lengths: Tensor | None, like: Tensor, dim: int) -> Places:
        """The positions of recordings of these lengths, padded to a size; None if all fill it."""
        steps = torch.arange(size, device=like.device)
        if kind == "relative":
            left, right = steps.flip(0)[None], -steps[None, 1:]
        else:
            own = torch.full((1,), size, device=like.device) if lengths is None else lengths
            rows = own.clamp(min=TABLE)
            left = (rows - own)[:, None] + steps.flip(0)
            right = rows[:, None] - 1 - steps[: max(0, size - 2)]
        return cls(waves(left, dim, like), waves(right, dim, like), kind == "legacy")


def waves(positions: Tensor, dim: int, like: Tensor) -> Tensor:
    """Sines and cosines of positions side by side, `[..., dim]`, rounded as the published tables are."""
    steps = torch.arange(0, dim, 2, device=positions.device).float()
    angles = positions.float()[..., None] * torch.exp(steps * -(math.log(10000.0) / dim))
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(-2).to(like.dtype)


class RelativeAttention(nn.Module):
    """Attention whose scores have a term for how far a key is from the query.

    Args:
        dim: Width of input and output.
        heads: Divides dim.

    Shape:
        x and the result `[B, T, dim]`.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.linear_q, self.linear_k, self.linear_v = (nn.Linear(dim, dim) for _ in range(3))
        self.linear_out = nn.Linear(dim, dim)
        self.linear_pos = nn.Linear(dim, dim, bias=False)
        self.pos_bias_u = nn.Parameter(torch.empty(heads, dim // heads))
        self.pos_bias_v = nn.Parameter(torch.empty(heads, dim // heads))
        nn.init.xavier_uniform_(self.pos_bias_u)
        nn.init.xavier_uniform_(self.pos_bias_v)

    def forward(self, x: Tensor, rows: Rows, places: list[Places]) -> Tensor:
        """Attend within each recording; `places` are one of all if padded, one of each if packed."""
        q, k, v = (self._heads(layer, x) for layer in (self.linear_q, self.linear_k, self.linear_v))
        if rows.bounds is None:
            mask = None if rows.mask is None else rows.mask[:, None, None]
            return project(self.linear_out, self._attend(q, k, v, places[0], mask).flatten(2))
        ends = list(pairwise(rows.bounds.tolist()))
        parts = [
            self._attend(q[:, start:end], k[:, start:end], v[:, start:end], place, None)
            for (start, end), place in zip(ends, places, strict=True)
            if end > start
        ]
        return project(self.linear_out, torch.cat(parts, 1).flatten(2))

    def _heads(self, layer: nn.Module, x: Tensor) -> Tensor:
        return project(layer, x).unflatten(-1, (self.heads, -1))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, places: Places, mask: Tensor | None) -> Tensor:
        bias = self._distances(q + self.pos_bias_v, places) * q.shape[-1] ** -0.5
        return attention(q + self.pos_bias_u, k, v, bias=bias, mask=mask)

    def _distances(self, q: Tensor, places: Places) -> Tensor:
        """The scores' second term, `[B, H, T, T]`."""
        left = self._match(q, places.left)
        if places.legacy:
            behind = F.pad(q[:, 1:], (0, 0, 0, 0, 0, 1))
            right = F.pad(self._match(behind, places.right), (1, 0))[..., : q.shape[1] - 1]
        else:
            right = self._match(q, places.right)
        return _shift(torch.cat((left, right), -1))

    def _match(self, q: Tensor, waves: Tensor) -> Tensor:
        keys = self._heads(self.linear_pos, waves)
        return q.transpose(1, 2) @ keys.permute(0, 2, 3, 1)  # [B, H, T, R]


def _shift(scores: Tensor) -> Tensor:
    """From scores by distance, T - 1 rows back to as many ahead, to scores by key: a view `[B, H, T, T]`.

    Key j of query i is at T - 1 - i + j of its row: the next query's keys begin one place earlier.
    """
    scores = scores.contiguous()
    batch, heads, size, span = scores.shape
    steps = (heads * size * span, size * span, span - 1, 1)
    return scores.as_strided((batch, heads, size, size), steps, size - 1)


class ConvolutionModule(nn.Module):
    """A gated map, a filter a channel over neighbouring rows, batch norm, SiLU, a map.

    Args:
        dim: Width of input and output.
        width: Rows that a filter spans; odd.

    Shape:
        x and the result `[B, T, dim]`.
    """

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.pointwise_conv1 = nn.Conv1d(dim, 2 * dim, 1)
        self.depthwise_conv = nn.Conv1d(dim, dim, width, padding=width // 2, groups=dim)
        self.norm = nn.BatchNorm1d(dim)
        self.pointwise_conv2 = nn.Conv1d(dim, dim, 1)

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        """Convolve within each recording."""
        first, conv, last = self.pointwise_conv1, self.depthwise_conv, self.pointwise_conv2
        x = rows.clear(F.glu(linear(x, first.weight[..., 0], first.bias), -1))
        x = depthwise_conv1d(x, conv.weight[:, 0], conv.bias, causal=False, cu_seqlens=rows.bounds)
        return linear(F.silu(self._normed(x, rows)), last.weight[..., 0], last.bias)

    def _normed(self, x: Tensor, rows: Rows) -> Tensor:
        if rows.mask is None or not self.training:
            normed: Tensor = self.norm(x.flatten(0, 1))
            return normed.view_as(x)
        out = torch.zeros_like(x)  # padding is no part of the statistics
        out[rows.mask] = self.norm(x[rows.mask])
        return out


class ConformerLayer(nn.Module):
    """Half a feed-forward part, attention, convolution, the other half, a norm; each with a residual.

    Args:
        dim, heads, units, width: Of the parts.
        dropout: Of every part but the attention's weights, as in the recipe.

    Shape:
        x and the result `[B, T, dim]`.
    """

    def __init__(self, dim: int, heads: int, units: int, width: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.self_attn = RelativeAttention(dim, heads)
        self.feed_forward = FeedForward(dim, units, dropout, silu=True)
        self.feed_forward_macaron = FeedForward(dim, units, dropout, silu=True)
        self.conv_module = ConvolutionModule(dim, width)
        self.norm_ff, self.norm_mha, self.norm_ff_macaron = (nn.LayerNorm(dim, EPS) for _ in range(3))
        self.norm_conv, self.norm_final = nn.LayerNorm(dim, EPS), nn.LayerNorm(dim, EPS)

    def forward(self, x: Tensor, rows: Rows, places: list[Places]) -> Tensor:
        """Mix within each recording."""
        x = x + 0.5 * self._drop(self.feed_forward_macaron(self.norm_ff_macaron(x)))
        x = x + self._drop(self.self_attn(self.norm_mha(x), rows, places))
        x = x + self._drop(self.conv_module(self.norm_conv(x), rows))
        x = x + 0.5 * self._drop(self.feed_forward(self.norm_ff(x)))
        result: Tensor = self.norm_final(x)
        return result

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class ConformerEncoder(nn.Module):
    """Paraformer's encoder of the AISHELL recipe: every fourth frame, Conformer layers, a norm.

    Args:
        input_size: Channels of a frame of features; at least 7.
        dim, heads, units, width: Of the layers.
        blocks: How many.
        dropout: Of every part.
        positions: "legacy" as in the recipe, whose published weights need it; "relative" as in the paper.

    Shape:
        features `[B, L, input_size]`; lengths `[B]`; the result `[B, T, dim]`, T about a quarter of L, of
        which what lies behind a row's length, as `spans` gives it, means nothing.

    Raises:
        UsageError: A size is not positive or too small, heads do not divide dim, dim is odd or width even.
    """

    stride = 4  # frames of features to a row

    def __init__(
        self,
        input_size: int = 80,
        dim: int = 256,
        heads: int = 4,
        units: int = 2048,
        blocks: int = 12,
        width: int = 15,
        dropout: float = 0.1,
        positions: Positions = "legacy",
    ) -> None:
        super().__init__()
        check_sizes("Conformer", dim, heads, units, blocks, width, dropout)
        if input_size < LEAST or dim % 2 or width % 2 == 0:
            raise UsageError(
                f"Conformer: input_size ({input_size}) must be at least {LEAST}, dim ({dim}) even, width"
                f" ({width}) odd"
            )
        if positions not in ("legacy", "relative"):
            raise UsageError(f"Conformer: positions must be 'legacy' or 'relative', not {positions!r}")
        self.dim, self.dropout, self.positions = dim, dropout, positions
        self.embed = Subsample(input_size, dim)
        self.encoders = nn.ModuleList(
            ConformerLayer(dim, heads, units, width, dropout) for _ in range(blocks)
        )
        self.after_norm = nn.LayerNorm(dim, EPS)

    def spans(self, lengths: Tensor) -> Tensor:
        """Rows of recordings of so many frames; one of less than 7 frames has none."""
        return (((lengths - 1) // 2 - 1) // 2).clamp(min=0)

    def forward(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Encode padded recordings."""
        x, spans = self._shortened(features), None if lengths is None else self.spans(lengths)
        rows = Rows.padded(spans, x.shape[1])
        own = None if rows.mask is None else spans
        return self._run(x, rows, [self._places(x.shape[1], own, x)])

    def packed(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Encode recordings without their padding (but that of `Subsample`), then put it back, zeros."""
        x, spans = self._shortened(features), self.spans(lengths)
        if not int(spans.sum()):
            return torch.zeros_like(x)
        places = [self._places(span, None, x) for span in spans.tolist()]
        return unpack(self._run(pack(x, spans), Rows.packed(spans), places), spans, x.shape[1])

    def _shortened(self, features: Tensor) -> Tensor:
        short = max(0, LEAST - features.shape[1])
        x = self.embed(F.pad(features, (0, 0, 0, short)) if short else features) * self.dim**0.5
        return F.dropout(x, self.dropout, self.training)

    def _places(self, size: int, spans: Tensor | None, x: Tensor) -> Places:
        left, right, legacy = Places.of(self.positions, size, spans, x, self.dim)
        left, right = (F.dropout(x, self.dropout, self.training) for x in (left, right))
        return Places(left, right, legacy)

    def _run(self, x: Tensor, rows: Rows, places: list[Places]) -> Tensor:
        for layer in self.encoders:
            x = layer(x, rows, places)
        result: Tensor = self.after_norm(x)
        return result
