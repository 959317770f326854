"""MossFormer: separates the speakers of a recording. arXiv 2302.11824.

A linear encoder of short frames, a network of gated attention that gives a mask a speaker, and a linear
decoder. The parameters have the names and shapes of the published checkpoint (ModelScope). Encoder, mask
network and decoder are MossFormer2's too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core import sizes
from manyheads.core.errors import UsageError
from manyheads.speech.models.mossformer_frames import Frames, frames_of, silence
from manyheads.speech.models.mossformer_layers import (
    GlobalNorm,
    MossFormerBlock,
    ScaledSinusoids,
    normed,
    pointwise,
)


class Encoder(nn.Module):
    """Frames of a waveform, each as non-negative features.

    Args:
        dim: Features.
        kernel_size: Samples of a frame; even, as a frame begins every half frame.

    Shape:
        waveform `[B, L]`; the result `[B, S, dim]`.
    """

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__()
        self.conv1d = nn.Conv1d(1, dim, kernel_size, stride=kernel_size // 2, bias=False)
        self.kernel_size = kernel_size

    def forward(self, waveform: Tensor) -> Tensor:
        """Encode; samples behind the last whole frame are left out, as published."""
        windows = waveform.unfold(1, self.kernel_size, self.kernel_size // 2)  # [B, S, K]
        return F.relu(F.linear(windows, self.conv1d.weight[:, 0]))


def overlap_add(features: Tensor, weight: Tensor) -> Tensor:
    """Decode frames and add them up, each half a frame after the one before.

    Shape:
        features `[B, S, speakers, dim]`; weight `[dim, 1, K]`; the result `[B, speakers, K + (S - 1) K / 2]`.
    """
    half = weight.shape[2] // 2
    frames = (features @ weight[:, 0]).transpose(1, 2)  # [B, speakers, S, K]
    first, second = frames.split(half, -1)
    halves = F.pad(first, (0, 0, 0, 1)) + F.pad(second, (0, 0, 1, 0))  # [B, speakers, S + 1, K / 2]
    return halves.flatten(2)


class MaskNet(nn.Module):
    """From the features of a mixture to a non-negative mask of them for each speaker.

    Args:
        dim: Features.
        num_spks: Speakers.
        mdl: What mixes the frames: `mdl(x, frames)`, `[B, S, dim]` to the same.

    Shape:
        x `[B, S, dim]`; the result `[B, S, num_spks, dim]`.
    """

    def __init__(self, dim: int, num_spks: int, mdl: nn.Module) -> None:
        super().__init__()
        self.norm = GlobalNorm(dim)
        self.conv1d_encoder = nn.Conv1d(dim, dim, 1, bias=False)
        self.pos_enc = ScaledSinusoids(dim)
        self.mdl = mdl
        self.conv1d_out = nn.Conv1d(dim, dim * num_spks, 1)
        self.conv1_decoder = nn.Conv1d(dim, dim, 1, bias=False)
        self.prelu = nn.PReLU()
        self.output = nn.ModuleList([nn.Conv1d(dim, dim, 1)])
        self.output_gate = nn.ModuleList([nn.Conv1d(dim, dim, 1)])
        self.num_spks = num_spks

    def forward(self, x: Tensor, frames: Frames | None = None) -> Tensor:
        """Give the masks; what they hold behind a row's end is meaningless."""
        x = pointwise(self.conv1d_encoder, self.norm(x, frames))
        x = self.prelu(self.mdl(x + self.pos_enc(x).to(x.dtype), frames))
        x = pointwise(self.conv1d_out, x).unflatten(-1, (self.num_spks, -1))  # [B, S, speakers, dim]
        x = pointwise(_only(self.output), x).tanh() * pointwise(_only(self.output_gate), x).sigmoid()
        return F.relu(pointwise(self.conv1_decoder, x))


def _only(layers: nn.ModuleList) -> nn.Conv1d:
    layer = layers[0]
    assert isinstance(layer, nn.Conv1d)
    return layer


def separate(
    encoder: Encoder,
    mask_net: MaskNet,
    decoder: nn.ConvTranspose1d,
    mixture: Tensor,
    lengths: Tensor | None,
    mapping: bool,
) -> Tensor:
    """Encode a mixture, mask it for each speaker, and decode; arguments as MossFormer's."""
    check_mixture(mixture, lengths)
    samples, kernel = mixture.shape[1], encoder.kernel_size
    own, frames = None, None
    if lengths is not None:
        lengths = lengths.to(mixture.device)
        own = torch.arange(samples, device=mixture.device) < lengths[:, None]  # [B, L]
        mixture = mixture.masked_fill(~own, 0.0)
    if samples < kernel:
        mixture = F.pad(mixture, (0, kernel - samples))
    features = encoder(mixture)  # [B, S, N]
    if lengths is not None:
        # A recording shorter than a frame has one frame, filled up with zeros.
        counts = ((lengths - kernel) // (kernel // 2) + 1).clamp(min=1)
        frames = frames_of(counts, features.shape[1])
        features = silence(features, frames)
    masks = mask_net(features, frames)  # [B, S, speakers, N]
    if mapping:
        parts = masks if frames is None else masks.masked_fill(~frames.valid[..., None], 0.0)
    else:
        parts = features[:, :, None] * masks
    sources = overlap_add(parts, decoder.weight).to(mixture.dtype)
    if samples < kernel:
        sources = sources[..., :samples]
    else:  # behind the last whole frame there is nothing
        sources = F.pad(sources, (0, (samples - kernel) % (kernel // 2)))
    return sources if own is None else sources.masked_fill(~own[:, None], 0.0)


def check_mixture(mixture: Tensor, lengths: Tensor | None) -> None:
    """Refuse what is no batch of waveforms.

    Raises:
        TypeError: The mixture is not floating point, or lengths are not whole numbers.
        ValueError: A shape is wrong, there is no sample, or a length is not from 1 to the mixture's.
    """
    if not mixture.is_floating_point():
        raise TypeError(f"mixture must be floating point, not {mixture.dtype}")
    if mixture.ndim != 2 or mixture.shape[1] == 0:
        raise ValueError(f"mixture must be [B, L] with at least one sample, not {list(mixture.shape)}")
    if lengths is None:
        return
    if lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise TypeError(f"lengths must be whole numbers, not {lengths.dtype}")
    if lengths.shape != mixture.shape[:1]:
        raise ValueError(f"lengths must be [{mixture.shape[0]}], not {list(lengths.shape)}")
    if torch.compiler.is_compiling() or lengths.is_meta or lengths.numel() == 0:
        return  # the numbers are not known
    least, most = (int(x) for x in lengths.aminmax())
    if least < 1 or most > mixture.shape[1]:
        raise ValueError(f"lengths must be from 1 to {mixture.shape[1]}, and are from {least} to {most}")


class _Blocks(nn.Module):
    """MossFormer blocks, one after the other."""

    def __init__(self, depth: int, dim: int, options: dict[str, int | float | bool]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MossFormerBlock(dim, **options) for _ in range(depth))  # type: ignore[arg-type]

    def forward(self, x: Tensor, frames: Frames | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, frames)
        return x


class _Attention(nn.Module):
    """The blocks, two norms and a skip connection; `norm.norm` is the checkpoint's name for the first."""

    def __init__(self, depth: int, dim: int, options: dict[str, int | float | bool]) -> None:
        super().__init__()
        norm = nn.ModuleDict({"norm": nn.LayerNorm(dim, eps=1e-6)})
        self.att_mdl = nn.ModuleDict({"mossformerM": _Blocks(depth, dim, options), "norm": norm})
        self.att_norm = GlobalNorm(dim)

    def forward(self, x: Tensor, frames: Frames | None = None) -> Tensor:
        y = self.att_mdl["mossformerM"](x, frames)
        y = normed(self.att_mdl["norm"]["norm"], y)  # type: ignore[index]
        return x + self.att_norm(y, frames)


class MossFormer(nn.Module):
    """Separates the speakers of a recording.

    Args:
        num_spks: Speakers that come out.
        dim: Features of a frame; even.
        depth: Blocks.
        kernel_size: Samples of a frame; even.
        query_key_dim: Channels of queries and keys; even.
        group_size: Frames within which attention is quadratic.
        dropout: Probability, in training, of what the convolution modules give.
        causal: Attention sees no later frame. The norms and convolutions do, as published.

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
        dropout: float,
        causal: bool,
    ) -> None:
        super().__init__()
        options: dict[str, int | float | bool] = {
            "query_key_dim": query_key_dim,
            "group_size": group_size,
            "dropout": dropout,
            "causal": causal,
        }
        self.encoder = Encoder(dim, kernel_size)
        self.decoder = nn.ConvTranspose1d(dim, 1, kernel_size, stride=kernel_size // 2, bias=False)
        self.mask_net = MaskNet(dim, num_spks, _Attention(depth, dim, options))

    def forward(self, mixture: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Separate; each speaker's waveform is as long as the mixture.

        Args:
            mixture: Waveforms, in any order of magnitude: the first norm takes it out of the masks.
            lengths: Samples of each recording; later ones are not looked at, and zero in the result. A batch
                of unequal lengths gives what its recordings give one by one, with the same gradients.

        Raises:
            TypeError: The mixture is not floating point, or lengths are not whole numbers.
            ValueError: A shape is wrong, there is no sample, or a length is not from 1 to L.
        """
        return separate(self.encoder, self.mask_net, self.decoder, mixture, lengths, mapping=False)


def check_sizes(
    name: str,
    positive: dict[str, int],
    even: tuple[str, ...] = ("dim", "kernel_size", "query_key_dim"),
    dropout: float = 0.0,
) -> None:
    """Refuse sizes that are not positive, or not even where they are halved.

    Raises:
        UsageError: Says which, and what it is.
    """
    sizes.check_sizes(name, positive, dropout=dropout)
    for key, value in positive.items():
        if key in even and value % 2:
            raise UsageError(f"{name}: {key} must be even, not {value}")


def mossformer(
    num_spks: int = 2,
    dim: int = 512,
    depth: int = 24,
    kernel_size: int = 16,
    query_key_dim: int = 128,
    group_size: int = 256,
    dropout: float = 0.1,
    causal: bool = False,
) -> MossFormer:
    """Build a MossFormer of any size.

    Args:
        num_spks: Speakers that come out.
        dim: Features of a frame; even.
        depth: Blocks.
        kernel_size: Samples of a frame; even. 16 at 8 kHz as published: 2 ms, a frame each millisecond.
        query_key_dim: Channels of queries and keys; even.
        group_size: Frames within which attention is quadratic.
        dropout: Probability, in training, of what the convolution modules give.
        causal: Attention sees no later frame. The norms and convolutions do, as published.

    Raises:
        UsageError: A size is not positive, or not even where it has to be; the dropout is no probability.

    Source:
        arXiv 2302.11824.

    Example:
        >>> mossformer(dim=64, depth=2)(torch.randn(1, 8000)).shape
        torch.Size([1, 2, 8000])
    """
    sizes = {
        "num_spks": num_spks,
        "dim": dim,
        "depth": depth,
        "kernel_size": kernel_size,
        "query_key_dim": query_key_dim,
        "group_size": group_size,
    }
    check_sizes("mossformer", sizes, dropout=dropout)
    return MossFormer(**sizes, dropout=dropout, causal=causal)


def mossformer_base(num_spks: int = 2, dropout: float = 0.1) -> MossFormer:
    """Build the middle size: 384 features, 25 blocks, 25.20 M parameters for two speakers.

    The paper gives 25.3 M for its MossFormer (M), not its sizes: these come nearest.

    Args:
        num_spks: Speakers that come out.
        dropout: Probability, in training.
    """
    return mossformer(num_spks, dim=384, depth=25, dropout=dropout)


def mossformer_large(num_spks: int = 2, dropout: float = 0.1) -> MossFormer:
    """Build the paper's MossFormer (L): 512 features, 24 blocks, 42.10 M parameters for two speakers.

    Args:
        num_spks: Speakers that come out.
        dropout: Probability, in training.
    """
    return mossformer(num_spks, dim=512, depth=24, dropout=dropout)
