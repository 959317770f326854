"""What MossFormer and MossFormer2 are made of: norms over a recording, convolution modules, gated attention.

Sequences are `[B, S, C]`, S frames of a recording. Where rows of a batch have unequal lengths, a `Frames`
goes with them, and nothing of a row's padding reaches its frames: a batch's rows are those of its
recordings one by one. Parameters have the names of the published code.

Source: Zhao and Ma 2023, MossFormer (arXiv 2302.11824).
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core import parallel
from manyheads.core.layers.positions import rotate
from manyheads.core.ops import depthwise_conv1d, gated_attention_unit, layer_norm
from manyheads.core.ops.dropout import dropout
from manyheads.core.products import is_plain_inference, linear

WIDTH = 17  # taps of a convolution module
ROTATED = 32  # channels of queries and keys that are rotated, at most
STRIPE = 1024  # frames that go through a convolution module at once on a CPU: they stay in its cache


class Frames(NamedTuple):
    """Which frames of a batch are a recording's own.

    Attributes:
        lengths: How many each row has, `[B]`.
        valid: True where a frame is the row's own, `[B, S, 1]`.
    """

    lengths: Tensor
    valid: Tensor


def frames_of(lengths: Tensor, size: int) -> Frames:
    """The first `lengths` of `size` frames."""
    return Frames(lengths, (torch.arange(size, device=lengths.device) < lengths[:, None])[..., None])


def silence(x: Tensor, frames: Frames | None) -> Tensor:
    """Put zeros, whatever stood there, behind each row's end."""
    return x if frames is None else x.masked_fill(~frames.valid, 0.0)


def pointwise(conv: nn.Conv1d, x: Tensor) -> Tensor:
    """Apply a convolution of width 1 to `[..., C]`."""
    return linear(x, conv.weight[..., 0], conv.bias)


def normed(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """Apply a LayerNorm by the core's op."""
    return layer_norm(x, norm.weight, norm.bias, eps=norm.eps)


def standardise(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, frames: Frames | None, *, together: bool
) -> Tensor:
    """Give a recording mean 0 and variance 1 over its own frames, then scale and shift each channel.

    Args:
        eps: Added to the variance.
        together: All channels have one mean and variance, not each its own.

    Shape:
        x and the result `[B, S, C]`; weight, bias `[C]`.
    """
    axes = (1, 2) if together else (1,)
    z = silence(x if x.dtype == torch.float64 else x.float(), frames)
    if frames is None:
        centred = z - z.mean(axes, keepdim=True)
        variance = centred.square().mean(axes, keepdim=True)
    else:
        count = (frames.lengths.clamp(min=1) * (x.shape[2] if together else 1))[:, None, None]
        centred = silence(z - z.sum(axes, keepdim=True) / count, frames)
        variance = centred.square().sum(axes, keepdim=True) / count
    scale = (variance + eps).rsqrt() * weight
    return torch.addcmul(bias.to(z.dtype), centred, scale).to(x.dtype)


class GlobalNorm(nn.Module):
    """GroupNorm of one group: one mean and variance for all frames and channels of a recording.

    Args:
        dim: Channels.
        eps: Added to the variance.

    Shape:
        x and the result `[B, S, dim]`.
    """

    def __init__(self, dim: int, eps: float = 1e-8) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, x: Tensor, frames: Frames | None = None) -> Tensor:
        """Normalise each row over its own frames."""
        return standardise(x, self.weight, self.bias, self.eps, frames, together=True)


class ScaleNorm(nn.Module):
    """Divide each frame by its root mean square, and scale all by one learnt number.

    Args:
        dim: Channels.
        eps: The least divisor.

    Source:
        Nguyen and Salazar 2019 (arXiv 1910.05895), as published for MossFormer.
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1))
        self.factor, self.eps = dim**-0.5, eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `[..., dim]`."""
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide) * self.factor
        return x * (self.g / length.clamp(min=self.eps)).to(x.dtype)


class ScaledSinusoids(nn.Module):
    """Sines, then cosines of the frame's number, times one learnt number.

    Args:
        dim: Channels; even.

    Shape:
        x `[B, S, dim]`; the result `[S, dim]`.
    """

    inv_freq: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("inv_freq", 1.0 / 10000 ** (torch.arange(0, dim, 2).float() / dim))

    def forward(self, x: Tensor) -> Tensor:
        """The vectors of x's frames."""
        angles = _angles(x.shape[1], self.inv_freq)
        return torch.cat((angles.sin(), angles.cos()), -1) * self.scale


class Rotation(nn.Module):
    """Rotary angles; their frequencies are stored with each layer, as the published checkpoints have them.

    Args:
        dim: Channels that are rotated, in pairs side by side; even.
    """

    freqs: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 1.0 / 10000 ** (torch.arange(0, dim, 2).float() / dim))

    def forward(self, x: Tensor) -> Tensor:
        """Rotate the first channels of `[B, S, H, D]` by the frame's number."""
        angles = _angles(x.shape[1], self.freqs)[:, None]  # [S, 1, dim / 2]
        return rotate(x, angles.cos(), angles.sin(), interleaved=True)


def _angles(count: int, frequencies: Tensor) -> Tensor:
    wide = frequencies if frequencies.dtype == torch.float64 else frequencies.float()
    return torch.arange(count, device=wide.device)[:, None] * wide


class OffsetScale(nn.Module):
    """Several scaled and shifted copies of one sequence.

    Args:
        dim: Channels.
        heads: Copies.

    Shape:
        x `[B, S, dim]`; the result `[B, S, heads, dim]`.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(heads, dim))
        self.beta = nn.Parameter(torch.zeros(heads, dim))
        nn.init.normal_(self.gamma, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift."""
        return torch.addcmul(self.beta, x[..., None, :], self.gamma)


class Neighbours(nn.Module):
    """`x + convolution(x)`: each channel with its neighbouring frames, by taps of its own.

    Args:
        dim: Channels.
        width: Taps; odd.
    """

    def __init__(self, dim: int, width: int = WIDTH) -> None:
        super().__init__()
        conv = nn.Conv1d(dim, dim, width, padding=width // 2, groups=dim, bias=False)
        self.sequential = nn.ModuleDict({"1": nn.ModuleDict({"conv": conv})})
        self.width = width

    @property
    def taps(self) -> Tensor:
        """The taps `[dim, width]` with the residual among them: one is added to the middle one."""
        weight: Tensor = self.sequential["1"]["conv"].weight[:, 0]  # type: ignore[index]
        wide = weight if weight.dtype == torch.float64 else weight.float()  # a half type would round the sum
        middle = self.width // 2
        return wide + F.pad(wide.new_ones(1), (middle, middle))

    def forward(self, x: Tensor) -> Tensor:
        """Convolve `[B, S, dim]`; what lies behind a row's end must be zero."""
        return depthwise_conv1d(x, self.taps, causal=False)


class ConvModule(nn.Module):
    """Norm, linear map, SiLU, and a convolution over neighbouring frames with a residual of its own.

    Args:
        in_dim, out_dim: Channels before and after.
        norm: "scale" for ScaleNorm, "layer" for LayerNorm.
        dropout: Probability, in training.

    Shape:
        x `[B, S, in_dim]`; the result `[B, S, out_dim]`.
    """

    def __init__(self, in_dim: int, out_dim: int, norm: str, dropout: float) -> None:
        super().__init__()
        first = ScaleNorm(in_dim) if norm == "scale" else nn.LayerNorm(in_dim)
        self.mdl = nn.Sequential(first, nn.Linear(in_dim, out_dim), nn.SiLU(), Neighbours(out_dim))
        self.dropout = dropout

    def forward(self, x: Tensor, frames: Frames | None = None) -> Tensor:
        """Map each row's own frames; what the result holds behind a row's end is meaningless."""
        mapping, mix = self.mdl[1], self.mdl[3]
        assert isinstance(mapping, nn.Linear) and isinstance(mix, Neighbours)
        if is_plain_inference(x, mapping.weight) and not self.training:
            return self._striped(x, frames, mapping.out_features, mix)
        return dropout(mix(self._mapped(x, frames)), self.dropout, self.training)

    def _mapped(self, x: Tensor, frames: Frames | None) -> Tensor:
        """What is convolved: zero behind a row's end."""
        norm, mapping = self.mdl[0], self.mdl[1]
        assert isinstance(mapping, nn.Linear)
        x = normed(norm, x) if isinstance(norm, nn.LayerNorm) else norm(x)
        x = linear(x, mapping.weight, mapping.bias)
        return silence(F.silu(x, inplace=not torch.is_grad_enabled()), frames)

    def _striped(self, x: Tensor, frames: Frames | None, width: int, mix: Neighbours) -> Tensor:
        """Map stretches of frames side by side; each maps a few of its neighbours' frames again."""
        batch, size, _ = x.shape
        stride, reach, taps = -(-STRIPE // batch), mix.width // 2, mix.taps
        out = x.new_empty(batch, size, width)

        def stripe(first: int, last: int) -> None:
            low, high = max(0, first - reach), min(size, last + reach)
            own = None if frames is None else Frames(frames.lengths, frames.valid[:, low:high])
            y = depthwise_conv1d(self._mapped(x[:, low:high], own), taps, causal=False)
            out[:, first:last] = y[:, first - low : last - low]

        starts = range(0, size, stride)
        parallel.run([partial(stripe, first, min(first + stride, size)) for first in starts])
        return out


class MossFormerBlock(nn.Module):
    """Gated attention, local and global, over convolution modules, with a residual.

    Args:
        dim: Channels; even.
        query_key_dim: Channels of queries and keys; even.
        group_size: Frames of a group, within which attention is quadratic.
        dropout: Probability, in training, of what the convolution modules give. Attention weights are not
            dropped, other than in the published training code: they are never written out.
        causal: Attention sees no later frame; convolutions still do, as published.

    Shape:
        x and the result `[B, S, dim]`; mask `[B, S]`.
    """

    def __init__(
        self,
        dim: int,
        query_key_dim: int = 128,
        group_size: int = 256,
        dropout: float = 0.1,
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.group_size, self.causal = group_size, causal
        self.rotary_pos_emb = Rotation(min(ROTATED, query_key_dim))
        self.to_hidden = ConvModule(dim, 4 * dim, "scale", dropout)
        self.to_qk = ConvModule(dim, query_key_dim, "scale", dropout)
        self.qk_offset_scale = OffsetScale(query_key_dim, 4)
        self.to_out = ConvModule(2 * dim, dim, "scale", dropout)

    def forward(self, x: Tensor, frames: Frames | None = None, mask: Tensor | None = None) -> Tensor:
        """Mix the frames.

        Args:
            frames: Each row's own frames; None for all.
            mask: True where a frame may be attended to, as published: others still attend, and count.
        """
        earlier, same = x.chunk(2, -1)
        shifted = torch.cat((F.pad(earlier, (0, 0, 1, -1)), same), -1)  # half of the channels, a frame late
        hidden = self.to_hidden(shifted, frames)  # [B, S, 4 dim]: v and u side by side
        four = self.rotary_pos_emb(self.qk_offset_scale(self.to_qk(shifted, frames))).to(hidden.dtype)
        quad_q, lin_q, quad_k, lin_k = four.unbind(2)
        gated = gated_attention_unit(
            quad_q,
            quad_k,
            lin_q,
            lin_k,
            hidden,
            group_size=self.group_size,
            causal=self.causal,
            mask=mask,
            lengths=None if frames is None else frames.lengths,
        )  # [B, S, 2 dim]
        mixed: Tensor = self.to_out(gated, frames)
        return x + mixed
