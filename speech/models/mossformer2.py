"""MossFormer2: MossFormer with a memory of its own behind each block, in place of a recurrent network.

The memory is a gated FSMN: convolutions over 39 frames, the second of them with gaps, wherever a recurrent
network would go frame by frame. arXiv 2312.11825. The parameters have the names and shapes of the published
checkpoints (ClearerVoice, ModelScope).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core.ops import depthwise_conv1d
from manyheads.core.products import linear
from manyheads.speech.models.mossformer import Encoder, MaskNet, check_sizes, separate
from manyheads.speech.models.mossformer_frames import Frames, Stripe, silence, stripes
from manyheads.speech.models.mossformer_layers import (
    ConvModule,
    GlobalNorm,
    MossFormerBlock,
    normed,
    pointwise,
    standardise,
)

REACH = 19  # frames to each side that a memory sees, and twice that with gaps
EPS = 1e-5  # of the norms over a recording inside a memory


class DilatedDenseNet(nn.Module):
    """Two convolutions over 39 frames, each with a norm over the recording; the second sees the input too.

    Args:
        dim: Channels.

    Shape:
        x and the result `[B, S, dim]`.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        width = 2 * REACH + 1
        self.conv1 = nn.Conv2d(dim, dim, (width, 1), groups=dim, bias=False)
        self.norm1 = nn.InstanceNorm2d(dim, EPS, affine=True)
        self.prelu1 = nn.PReLU(dim)
        self.conv2 = nn.Conv2d(2 * dim, dim, (width, 1), dilation=(2, 1), groups=dim, bias=False)
        self.norm2 = nn.InstanceNorm2d(dim, EPS, affine=True)
        self.prelu2 = nn.PReLU(dim)

    def forward(self, x: Tensor, frames: Frames | None = None) -> Tensor:
        """Convolve each row's own frames."""
        x = silence(x, frames)
        first = depthwise_conv1d(x, self.conv1.weight[:, 0, :, 0], causal=False)
        first = silence(_activate(self.norm1, self.prelu1, first, frames), frames)
        second = dilated_pairs(torch.cat((first, x), -1), self.conv2.weight[..., 0])
        return _activate(self.norm2, self.prelu2, second, frames)


def _activate(norm: nn.InstanceNorm2d, prelu: nn.PReLU, x: Tensor, frames: Frames | None) -> Tensor:
    x = standardise(x, norm.weight, norm.bias, norm.eps, frames, together=False)
    return F.prelu(x.transpose(1, 2), prelu.weight.to(x.dtype)).transpose(
        1, 2
    )  # channels second, as it wants


def dilated_pairs(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve over every other frame, two neighbouring channels giving one: a grouped, dilated convolution.

    Even and odd frames do not meet: side by side as channels of half as many frames, they are one depthwise
    convolution without gaps. The two channels of a group are added up behind it.

    Shape:
        x `[B, S, 2 C]`; weight `[C, 2, W]`, W odd; the result `[B, S, C]`.
    """
    batch, size, channels = x.shape
    apart = F.pad(x, (0, 0, 0, size % 2)).reshape(batch, (size + 1) // 2, 2 * channels)  # even, odd frames
    taps = weight.flatten(0, 1).repeat(2, 1)  # [4 C, W]
    y = depthwise_conv1d(apart, taps, causal=False)
    first, second = y.view(batch, (size + 1) // 2 * 2, channels // 2, 2).unbind(-1)
    return (first + second)[:, :size]  # ten times faster than a sum over an axis of two


class Fsmn(nn.Module):
    """A feed-forward sequential memory: two linear maps, and convolutions that remember, with a residual.

    Args:
        dim: Channels.

    Shape:
        x and the result `[B, S, dim]`.

    Source:
        Zhang et al. 2015 (arXiv 1512.08301), with the dilated convolutions of MossFormer2.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        self.project = nn.Linear(dim, dim, bias=False)
        self.conv = DilatedDenseNet(dim)

    def forward(self, x: Tensor, frames: Frames | None = None) -> Tensor:
        """Remember each row's own frames."""
        remembered: Tensor = self.conv(self.mapped(x), frames)
        return x + remembered

    def mapped(self, x: Tensor) -> Tensor:
        """What is remembered of each frame."""
        hidden = linear(x, self.linear.weight, self.linear.bias, relu=True)
        return linear(hidden, self.project.weight)


class GatedFsmn(nn.Module):
    """A memory, multiplied by a gate that is computed beside it.

    Args:
        dim: Channels.
        dropout: Probability, in training.
    """

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.to_u = ConvModule(dim, dim, "layer", dropout)
        self.to_v = ConvModule(dim, dim, "layer", dropout)
        self.fsmn = Fsmn(dim)

    def forward(self, x: Tensor, frames: Frames | None = None) -> Tensor:
        """Remember `[B, S, dim]`, gate, and add x."""
        return torch.addcmul(x, self.to_v(x, frames), self.fsmn(self.to_u(x, frames), frames))


class MemoryBlock(nn.Module):
    """The gated memory in a narrower space, with a residual around it: what follows each attention block.

    Args:
        dim: Channels outside.
        inner: Channels inside.
        dropout: Probability, in training.

    Shape:
        x and the result `[B, S, dim]`.
    """

    def __init__(self, dim: int, inner: int = 256, dropout: float = 0.1) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv1d(dim, inner, 1), nn.PReLU())
        self.norm1 = nn.LayerNorm(inner)
        self.gated_fsmn = GatedFsmn(inner, dropout)
        self.norm2 = nn.LayerNorm(inner)
        self.conv2 = nn.Conv1d(inner, dim, 1)

    def forward(self, x: Tensor, frames: Frames | None = None) -> Tensor:
        """Remember each row's own frames."""
        if self.gated_fsmn.to_u.is_striped(x):
            return self._striped(x, frames)
        y = self.gated_fsmn(self._narrow(x), frames)
        return x + pointwise(self.conv2, normed(self.norm2, y))

    def _narrow(self, x: Tensor) -> Tensor:
        narrow, prelu = self.conv1
        assert isinstance(narrow, nn.Conv1d)
        return normed(self.norm1, prelu(pointwise(narrow, x)))

    def _striped(self, x: Tensor, frames: Frames | None) -> Tensor:
        """The same on a CPU, stretches of frames side by side; all but the norms over a recording."""
        gated = self.gated_fsmn
        batch, size, _ = x.shape
        inner = (batch, size, self.conv2.in_channels)
        y, u, v, z, out = *(x.new_empty(inner) for _ in range(4)), torch.empty_like(x)

        def before(stripe: Stripe) -> None:
            own, near = stripe.own, self._narrow(x[:, stripe.wide])
            y[:, own] = near[:, stripe.inner]
            v[:, own] = gated.to_v.striped(near, frames, stripe)
            u[:, own] = gated.to_u.striped(near, frames, stripe)
            z[:, own] = gated.fsmn.mapped(u[:, own])

        stripes(batch, size, gated.to_u.reach, before)
        remembered = gated.fsmn.conv(z, frames)

        def after(stripe: Stripe) -> None:
            own = stripe.own
            mixed = torch.addcmul(y[:, own], v[:, own], u[:, own] + remembered[:, own])
            out[:, own] = pointwise(self.conv2, normed(self.norm2, mixed), add=x[:, own])

        stripes(batch, size, 0, after)
        return out


class MemoryBlocks(nn.Module):
    """Attention and memory blocks in turn.

    Args:
        depth: How many of each.
        dim, query_key_dim, group_size, dropout: As in `mossformer2`.
        inner: Channels of a memory.

    Shape:
        x and the result `[B, S, dim]`.
    """

    def __init__(
        self, depth: int, dim: int, query_key_dim: int, group_size: int, inner: int, dropout: float
    ) -> None:
        super().__init__()
        self.fsmn = nn.ModuleList(MemoryBlock(dim, inner, dropout) for _ in range(depth))
        self.layers = nn.ModuleList(
            MossFormerBlock(dim, query_key_dim, group_size, dropout) for _ in range(depth)
        )

    def forward(self, x: Tensor, frames: Frames | None = None) -> Tensor:
        """Mix each row's own frames."""
        for attention, memory in zip(self.layers, self.fsmn, strict=True):
            x = memory(attention(x, frames), frames)
        return x


class _Recurrence(nn.Module):
    """The blocks between two norms and a skip connection."""

    def __init__(self, blocks: MemoryBlocks, dim: int) -> None:
        super().__init__()
        self.intra_mdl = nn.ModuleDict({"mossformerM": blocks, "norm": nn.LayerNorm(dim, eps=1e-6)})
        self.intra_norm = GlobalNorm(dim)

    def forward(self, x: Tensor, frames: Frames | None = None) -> Tensor:
        norm = self.intra_mdl["norm"]
        assert isinstance(norm, nn.LayerNorm)
        y = normed(norm, self.intra_mdl["mossformerM"](x, frames))
        return x + self.intra_norm(y, frames)


class MossFormer2(nn.Module):
    """Separates the speakers of a recording.

    Args:
        num_spks, dim, depth, kernel_size, query_key_dim, group_size, dropout: As MossFormer's.
        inner: Channels of a memory.
        mapping: The network gives the sources' features, not masks of the mixture's.

    Shape:
        mixture `[B, L]`; lengths `[B]`; the result `[B, num_spks, L]`.
    """

    def __init__(
        self,
        num_spks: int,
        dim: int,
        depth: int,
        kernel_size: int,
        query_key_dim: int,
        group_size: int,
        inner: int,
        dropout: float,
        mapping: bool,
    ) -> None:
        super().__init__()
        blocks = MemoryBlocks(depth, dim, query_key_dim, group_size, inner, dropout)
        self.enc = Encoder(dim, kernel_size)
        self.mask_net = MaskNet(dim, num_spks, _Recurrence(blocks, dim))
        self.dec = nn.ConvTranspose1d(dim, 1, kernel_size, stride=kernel_size // 2, bias=False)
        self.mapping = mapping

    def forward(self, mixture: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Separate; arguments, result and errors as MossFormer's."""
        return separate(self.enc, self.mask_net, self.dec, mixture, lengths, self.mapping)


def mossformer2(
    num_spks: int = 2,
    dim: int = 512,
    depth: int = 24,
    kernel_size: int = 16,
    query_key_dim: int = 128,
    group_size: int = 256,
    inner: int = 256,
    dropout: float = 0.1,
    mapping: bool = False,
) -> MossFormer2:
    """Build a MossFormer2; the defaults are the published sizes, 55.74 M parameters for two speakers.

    Args:
        num_spks: Speakers that come out.
        dim: Features of a frame; even.
        depth: Attention blocks, and memory blocks.
        kernel_size: Samples of a frame; even. 16 as published, at 8 and at 16 kHz.
        query_key_dim: Channels of queries and keys; even.
        group_size: Frames within which attention is quadratic.
        inner: Channels of a memory; even.
        dropout: Probability, in training, of what the convolution modules give.
        mapping: The network gives the sources' features themselves, as the published one for WHAMR! does, and
            not masks of the mixture's.

    Raises:
        UsageError: A size is not positive, or not even where it has to be; the dropout is no probability.

    Source:
        arXiv 2312.11825.

    Example:
        >>> mossformer2(dim=64, depth=2, inner=32)(torch.randn(1, 8000)).shape
        torch.Size([1, 2, 8000])
    """
    sizes = {
        "num_spks": num_spks,
        "dim": dim,
        "depth": depth,
        "kernel_size": kernel_size,
        "query_key_dim": query_key_dim,
        "group_size": group_size,
        "inner": inner,
    }
    check_sizes("mossformer2", sizes, dropout=dropout)
    return MossFormer2(**sizes, dropout=dropout, mapping=mapping)
