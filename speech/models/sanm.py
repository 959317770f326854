"""SAN-M: self-attention with a memory, a filter over a channel's values in time; and the encoder made of it.

Sources: Gao et al. 2020 (arXiv 2006.01713), Zhang et al. 2018 (FSMN, arXiv 1803.05030). Parameters have the
names and shapes of the published code, whose checkpoints load strictly.

Layout: B recordings, T rows of features, D channels, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core.errors import UsageError
from manyheads.core.ops import attention, depthwise_conv1d, varlen_attention
from manyheads.core.products import project

EPS = 1e-12  # of every LayerNorm in the published code

Past = tuple[Tensor, Tensor]  # keys and values of earlier rows, [B, T, D] each


@dataclass(frozen=True, eq=False)
class Rows:
    """Which rows belong to which recording.

    Attributes:
        mask: `[B, T]`, True where a row counts; None means all do.
        bounds: Where each recording begins in T, and the last ends, `[B + 1]` int32: they lie one after
            another in a batch of one, without padding. None means one recording a line, with padding.
    """

    mask: Tensor | None = None
    bounds: Tensor | None = None

    @classmethod
    def padded(cls, lengths: Tensor | None, size: int) -> Rows:
        """Recordings of these lengths, padded to a size."""
        if lengths is None or fills(lengths, size):
            return cls()
        return cls(mask=torch.arange(size, device=lengths.device) < lengths[:, None])

    @classmethod
    def packed(cls, lengths: Tensor) -> Rows:
        """Recordings of these lengths, one after another."""
        return cls(bounds=F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32))

    def clear(self, x: Tensor) -> Tensor:
        """Zeros in the place of padding."""
        return x if self.mask is None else x.masked_fill(~self.mask[..., None], 0.0)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, heads: int, dropout: float = 0.0, queries: Rows | None = None
    ) -> Tensor:
        """Attend within each recording: `[B, T, D]` each; `queries` tells which are whose, if they differ."""
        q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))
        if self.bounds is not None:
            ours = self.bounds if queries is None else queries.bounds
            if dropout or ours is None:
                raise UsageError(
                    "SAN-M: packed recordings are for evaluation (model.eval()), all of them packed"
                )
            return varlen_attention(q[0], k[0], v[0], ours, self.bounds).flatten(1)[None]
        mask = None if self.mask is None else self.mask[:, None, None]
        return attention(q, k, v, mask=mask, dropout_p=dropout).flatten(2)


def fills(lengths: Tensor, size: int) -> bool:
    """Tell whether no recording has padding, where that costs no wait and is no part of a graph."""
    plain = lengths.device.type == "cpu" and not torch.compiler.is_compiling()
    return plain and int(lengths.numel()) > 0 and int(lengths.min()) >= size


def remember(x: Tensor, weight: Tensor, shift: int, rows: Rows) -> Tensor:
    """FSMN's memory: each channel's own filter over time, and the input itself.

    Args:
        x: Values.
        weight: The filters, as `nn.Conv1d` has them.
        shift: How many rows the filter reaches further back, and less far ahead, than centred.
        rows: Padding counts as zero.

    Shape:
        x and the result `[B, T, D]`; weight `[D, 1, W]`.
    """
    filters = weight[:, 0]
    width = filters.shape[1]
    x = rows.clear(x)
    if shift == 0 or shift == width - 1 - (width - 1) // 2:
        return depthwise_conv1d(x, filters, causal=shift > 0, cu_seqlens=rows.bounds) + x
    if rows.bounds is not None:
        raise UsageError(f"SAN-M: a shift of {shift} of a filter of {width} has no packed form")
    return depthwise_conv1d(F.pad(x, (0, 0, shift, 0)), filters, causal=False)[:, : x.shape[1]] + x


class SanmAttention(nn.Module):
    """Attention and memory over the same values, added up.

    Args:
        in_dim: Width of the input.
        dim: Width of the output.
        heads: Of the attention; divides dim.
        width: Rows that the memory's filter spans.
        dropout: Of the attention's weights and of the memory.

    Shape:
        x `[B, T, in_dim]`; the result `[B, T, dim]`.
    """

    def __init__(self, in_dim: int, dim: int, heads: int, width: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.linear_q_k_v = nn.Linear(in_dim, 3 * dim)
        self.linear_out = nn.Linear(dim, dim)
        self.fsmn_block = nn.Conv1d(dim, dim, width, groups=dim, bias=False)

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        """Attend within each recording."""
        q, k, v = project(self.linear_q_k_v, x).chunk(3, -1)
        rate = self.dropout if self.training else 0.0
        memory = F.dropout(remember(v, self.fsmn_block.weight, 0, rows), rate)
        attended = project(self.linear_out, rows.attend(q, k, v, self.heads, rate))
        return attended + rows.clear(memory)

    def chunk(self, x: Tensor, past: Past | None) -> tuple[Tensor, Past]:
        """Attend to a window's rows and to earlier ones; the memory sees the window alone.

        Returns:
            The result, and the window's own keys and values.
        """
        q, k, v = project(self.linear_q_k_v, x).chunk(3, -1)
        memory = remember(v, self.fsmn_block.weight, 0, Rows())
        keys, values = (k, v) if past is None else (torch.cat((past[0], k), 1), torch.cat((past[1], v), 1))
        attended = project(self.linear_out, Rows().attend(q, keys, values, self.heads))
        return attended + memory, (k, v)


class FeedForward(nn.Module):
    """`w_2(relu(w_1(x)))`.

    Args:
        dim: Width of input and output.
        units: Width between.
        dropout: Of what is between.
        silu: SiLU in the place of the ReLU.

    Shape:
        x and the result `[..., dim]`.
    """

    def __init__(self, dim: int, units: int, dropout: float, silu: bool = False) -> None:
        super().__init__()
        self.dropout, self.silu = dropout, silu
        self.w_1, self.w_2 = nn.Linear(dim, units), nn.Linear(units, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to every row."""
        between = project(self.w_1, x)
        between = F.silu(between) if self.silu else between.relu()
        return project(self.w_2, F.dropout(between, self.dropout, self.training))


class EncoderLayer(nn.Module):
    """Norm, attention, norm, feed-forward; the first residual is left out where the widths differ.

    Args:
        in_dim, dim, heads, width: As `SanmAttention`.
        units: Of the feed-forward part.
        dropout: Of every part.

    Shape:
        x `[B, T, in_dim]`; the result `[B, T, dim]`.
    """

    def __init__(self, in_dim: int, dim: int, heads: int, units: int, width: int, dropout: float) -> None:
        super().__init__()
        self.residual, self.dropout = in_dim == dim, dropout
        self.self_attn = SanmAttention(in_dim, dim, heads, width, dropout)
        self.feed_forward = FeedForward(dim, units, dropout)
        self.norm1, self.norm2 = nn.LayerNorm(in_dim, EPS), nn.LayerNorm(dim, EPS)

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        """Attend within each recording."""
        return self._rest(x, self.self_attn(self.norm1(x), rows))

    def chunk(self, x: Tensor, past: Past | None) -> tuple[Tensor, Past]:
        """As `SanmAttention.chunk`."""
        attended, own = self.self_attn.chunk(self.norm1(x), past)
        return self._rest(x, attended), own

    def _rest(self, x: Tensor, attended: Tensor) -> Tensor:
        y = F.dropout(attended, self.dropout, self.training)
        y = x + y if self.residual else y
        return y + F.dropout(self.feed_forward(self.norm2(y)), self.dropout, self.training)


class SanmEncoder(nn.Module):
    """Paraformer's encoder: positions, SAN-M layers, a norm.

    Args:
        input_size: Channels of a row of features.
        dim, heads, units, width: Of the layers.
        blocks: How many, the first (of another input width) included.
        dropout: Of every part.

    Shape:
        features `[B, T, input_size]`; lengths `[B]`; the result `[B, T, dim]`, of which what lies behind a
        row's length means nothing.

    Raises:
        UsageError: A size is not positive, the heads do not divide dim, or input_size is odd.
    """

    stride = 1  # rows of features to an encoded row

    def __init__(
        self,
        input_size: int = 560,
        dim: int = 512,
        heads: int = 4,
        units: int = 2048,
        blocks: int = 50,
        width: int = 11,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        check_sizes("SAN-M encoder", dim, heads, units, blocks, width, dropout)
        if input_size < 4 or input_size % 2:
            raise UsageError(f"SAN-M encoder: input_size must be even and at least 4, not {input_size}")
        self.dim = dim
        self.encoders0 = nn.ModuleList([EncoderLayer(input_size, dim, heads, units, width, dropout)])
        self.encoders = nn.ModuleList(
            EncoderLayer(dim, dim, heads, units, width, dropout) for _ in range(blocks - 1)
        )
        self.after_norm = nn.LayerNorm(dim, EPS)

    @property
    def layers(self) -> list[EncoderLayer]:
        """All layers in order."""
        return [layer for group in (self.encoders0, self.encoders) for layer in group]  # type: ignore[misc]

    def spans(self, lengths: Tensor) -> Tensor:
        """Encoded rows of recordings of so many rows of features: as many."""
        return lengths

    def forward(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Encode padded recordings."""
        rows = Rows.padded(lengths, features.shape[1])
        return self._run(self.place(features), rows)

    def packed(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Encode recordings without their padding: one after another, then put back, zeros behind."""
        encoded = self._run(pack(self.place(features), lengths), Rows.packed(lengths))
        return unpack(encoded, lengths, features.shape[1])

    def place(self, features: Tensor, start: int = 0) -> Tensor:
        """Scale features and add their positions, the first being `start`."""
        table = positions(start, features.shape[1], features.shape[2], features.device)
        return features * self.dim**0.5 + table.to(features.dtype)

    def _run(self, x: Tensor, rows: Rows) -> Tensor:
        for layer in self.layers:
            x = layer(x, rows)
        result: Tensor = self.after_norm(x)
        return result


def pack(x: Tensor, lengths: Tensor) -> Tensor:
    """Lay padded recordings `[B, T, D]` one after another, without padding: `[1, T1 + T2 + ..., D]`."""
    inside = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
    return x[inside][None]


def unpack(x: Tensor, lengths: Tensor, size: int) -> Tensor:
    """Undo `pack`, zeros in the place of padding."""
    out = x.new_zeros(len(lengths), size, x.shape[2])
    out[torch.arange(size, device=x.device) < lengths[:, None]] = x[0]
    return out


def positions(start: int, count: int, dim: int, device: torch.device) -> Tensor:
    """Sines, then cosines, of positions counted from 1 on, at wavelengths from 2 pi to 10000 times that.

    float64: at row 10,000 (ten minutes) a float32 angle is a thousandth off.

    Shape:
        The result `[count, dim]`.
    """
    steps = torch.arange(start + 1, start + 1 + count, device=device, dtype=torch.float64)
    powers = torch.arange(dim // 2, device=device, dtype=torch.float64) / (dim // 2 - 1)
    angles = steps[:, None] * 10000.0**-powers
    return torch.cat((angles.sin(), angles.cos()), 1)


def check_sizes(what: str, dim: int, heads: int, units: int, blocks: int, width: int, dropout: float) -> None:
    """Refuse sizes that no layer can have.

    Raises:
        UsageError: One is not positive, the heads do not divide dim, or dropout is no probability.
    """
    for name, size in {"dim": dim, "heads": heads, "units": units, "blocks": blocks, "width": width}.items():
        if size < 1:
            raise UsageError(f"{what}: {name} must be positive, not {size}")
    if dim % heads:
        raise UsageError(f"{what}: {heads} heads do not divide {dim} channels")
    if not 0 <= dropout < 1:
        raise UsageError(f"{what}: dropout must be from 0 to below 1, not {dropout}")
