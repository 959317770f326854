"""What MossFormer and MossFormer2 are made of: norms over a recording, convolution modules, gated attention.

Sequences are `[B, S, C]`, S frames of a recording. Where rows of a batch have unequal lengths, a `Frames`
goes with them, and nothing of a row's padding reaches its frames: a batch's rows are those of its
recordings one by one. Parameters have the names of the published code.

Source: Zhao and Ma 2023, MossFormer (arXiv 2302.11824).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core.layers.positions import rotate
from manyheads.core.ops import depthwise_conv1d, gated_attention_unit, layer_norm
from manyheads.core.ops.dropout import dropout
from manyheads.core.products import is_plain_inference, linear
from manyheads.speech.models.mossformer_frames import Frames, Stripe, silence, stripes

WIDTH = 17  # taps of a convolution module
ROTATED = 32  # channels of queries and keys that are rotated, at most
STRIPE, LEAST = 1024, 256


def pointwise(conv: nn.Conv1d, x: Tensor, *, add: Tensor | None = None) -> Tensor:
    """Apply a convolution of width 1 to `[..., C]`, and `+ add`."""
    return linear(x, conv.weight[..., 0], conv.bias, add=add)


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

    def forward(self, x: Tensor, first: int = 0) -> Tensor:
        """Rotate the first channels of `[B, S, H, D]` by the frame's number, counted from `first`."""
        angles = _angles(x.shape[1], self.freqs, first)[:, None]  # [S, 1, dim / 2]
        return rotate(x, angles.cos(), angles.sin(), interleaved=True)


def _angles(count: int, frequencies: Tensor, first: int = 0) -> Tensor:
    wide = frequencies if frequencies.dtype == torch.float64 else frequencies.float()
    return torch.arange(first, first + count, device=wide.device)[:, None] * wide


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

    def forward(self, x: Tensor, frames: Frames | None = None, *, add: Tensor | None = None) -> Tensor:
        """Map each row's own frames, and `+ add`; what the result holds behind a row's end is meaningless."""
        if not self.is_striped(x):
            y = dropout(self.mdl[3](self._mapped(x, frames)), self.dropout, self.training)
            return y if add is None else add + y
        batch, size, _ = x.shape
        out = x.new_empty(batch, size, self._mapping.out_features)

        def work(stripe: Stripe) -> None:
            y = self.striped(x[:, stripe.wide], frames, stripe)
            if add is None:
                out[:, stripe.own] = y
            else:
                torch.add(add[:, stripe.own], y, out=out[:, stripe.own])

        stripes(batch, size, self.reach, work)
        return out

    @property
    def reach(self) -> int:
        """Neighbouring frames on each side that the convolution sees."""
        mix = self.mdl[3]
        assert isinstance(mix, Neighbours)
        return mix.width // 2

    @property
    def _mapping(self) -> nn.Linear:
        mapping = self.mdl[1]
        assert isinstance(mapping, nn.Linear)
        return mapping

    def is_striped(self, x: Tensor) -> bool:
        """Tell whether x can go through in stripes: on a CPU, without gradients."""
        learns = self.training or torch.is_grad_enabled()
        return not learns and is_plain_inference(x, self._mapping.weight)

    def striped(self, x: Tensor, frames: Frames | None, stripe: Stripe) -> Tensor:
        """Map a stripe, with its neighbours `[B, high - low, in_dim]`, to `[B, last - first, out_dim]`."""
        y: Tensor = self.mdl[3](self._mapped(x, stripe.of(frames)))
        return y[:, stripe.inner]

    def _mapped(self, x: Tensor, frames: Frames | None) -> Tensor:
        """What is convolved: zero behind a row's end."""
        norm, mapping = self.mdl[0], self._mapping
        x = normed(norm, x) if isinstance(norm, nn.LayerNorm) else norm(x)
        return silence(linear(x, mapping.weight, mapping.bias, silu=True), frames)


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
        hidden, four = self._striped(x, frames) if self.to_hidden.is_striped(x) else self._mapped(x, frames)
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
        mixed: Tensor = self.to_out(gated, frames, add=x)
        return mixed

    def _mapped(self, x: Tensor, frames: Frames | None) -> tuple[Tensor, Tensor]:
        """v and u side by side, `[B, S, 4 dim]`; queries and keys, `[B, S, 4, query_key_dim]`."""
        shifted = _shifted(x, slice(0, x.shape[1]))
        hidden: Tensor = self.to_hidden(shifted, frames)
        four: Tensor = self.rotary_pos_emb(self.qk_offset_scale(self.to_qk(shifted, frames)))
        return hidden, four.to(hidden.dtype)

    def _striped(self, x: Tensor, frames: Frames | None) -> tuple[Tensor, Tensor]:
        """The same on a CPU, stretches of frames side by side."""
        batch, size, dim = x.shape
        hidden = x.new_empty(batch, size, 4 * dim)
        four = x.new_empty(batch, size, *self.qk_offset_scale.gamma.shape)

        def work(stripe: Stripe) -> None:
            shifted, own = _shifted(x, stripe.wide), four[:, stripe.own]
            hidden[:, stripe.own] = self.to_hidden.striped(shifted, frames, stripe)
            qk = self.to_qk.striped(shifted, frames, stripe)
            torch.addcmul(self.qk_offset_scale.beta, qk[..., None, :], self.qk_offset_scale.gamma, out=own)
            turned = own[..., : 2 * len(self.rotary_pos_emb.freqs)]
            turned.copy_(self.rotary_pos_emb(turned, stripe.first))

        stripes(batch, size, self.to_hidden.reach, work)
        return hidden, four


def _shifted(x: Tensor, frames: slice) -> Tensor:
    """These frames, half of their channels those of the frame before; zero before the first."""
    earlier, same = x.chunk(2, -1)
    late = earlier[:, max(frames.start - 1, 0) : frames.stop - 1]
    return torch.cat((late if frames.start else F.pad(late, (0, 0, 1, 0)), same[:, frames]), -1)
