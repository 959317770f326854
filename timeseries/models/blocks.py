"""Small pieces that several forecasting models share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core.errors import UsageError


class Pointwise(nn.Module):
    """A convolution of width one over channels-last input: a linear map.

    The weight is `[out_features, in_features, 1]`, as this family's checkpoints have it.

    Args:
        in_features: Channels in.
        out_features: Channels out.
        bias: Whether a bias is added.

    Shape:
        `[..., in_features]` -> `[..., out_features]`.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, 1))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights as `nn.Conv1d` does, in the same order."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight.shape[1])
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Map the last axis."""
        return F.linear(x, self.weight.squeeze(-1), self.bias)


def series_decomp(x: Tensor, kernel_size: int) -> tuple[Tensor, Tensor]:
    """Split series into what a centred moving average leaves (seasonal) and the average (trend).

    The first and last values are repeated so that the average has the length of the series; a kernel longer
    than the series is allowed.

    Args:
        kernel_size: Steps in the average; odd, since an even one has no centre.

    Shape:
        x `[B, L, N]` -> seasonal `[B, L, N]`, trend `[B, L, N]`.

    Raises:
        ValueError: `kernel_size` is even or not positive.

    Source:
        Autoformer, arXiv 2106.13008, section 3.1.
    """
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and positive, not {kernel_size}")
    half = kernel_size // 2
    # Not F.pad: its replicate mode has no deterministic backward pass on a GPU.
    ends = x[:, :1].expand(-1, half, -1), x[:, -1:].expand(-1, half, -1)
    padded = torch.cat([ends[0], x, ends[1]], dim=1)  # [B, L + 2 half, N]
    trend = F.avg_pool1d(padded.mT, kernel_size, stride=1).mT  # [B, L, N]
    return x - trend, trend


def check_positive(model: str, arguments: Mapping[str, object], names: Sequence[str]) -> None:
    """Refuse sizes below one.

    Raises:
        UsageError: Which of them, of which model.
    """
    for name in names:
        value = arguments[name]
        if not isinstance(value, int) or value < 1:
            raise UsageError(f"{model}: {name} must be a positive integer, not {value!r}")


def check_choices(
    model: str, arguments: Mapping[str, object], choices: Mapping[str, Sequence[str | int]]
) -> None:
    """Refuse options that there are not.

    Raises:
        UsageError: Which of them, of which model, and what there is.
    """
    for name, known in choices.items():
        if arguments[name] not in known:
            there = ", ".join(map(str, known))
            raise UsageError(f"{model}: no {name} {arguments[name]!r} ({there})")


def check_transformer(model: str, d_model: int, n_heads: int, dropout: float) -> None:
    """Refuse heads that do not divide the width, and a dropout that is no probability.

    Raises:
        UsageError: Which of them, of which model.
    """
    if d_model % n_heads:
        raise UsageError(f"{model}: n_heads={n_heads} does not divide d_model={d_model}")
    if not 0 <= dropout < 1:
        raise UsageError(f"{model}: dropout must be in [0, 1), not {dropout}")


def check_label(model: str, label_len: int, seq_len: int) -> None:
    """Refuse a decoder input that is longer than the history.

    Raises:
        UsageError: So it is, or negative.
    """
    if not 0 <= label_len <= seq_len:
        raise UsageError(f"{model}: label_len={label_len} is not in [0, seq_len={seq_len}]")


def known_label(x: Tensor, label_len: int) -> Tensor:
    """Return the last `label_len` steps, with which a decoder's input begins.

    Shape:
        `[B, L, N]` -> `[B, label_len, N]`.

    Raises:
        ValueError: There are fewer.
    """
    if x.shape[1] < label_len:
        raise ValueError(f"{x.shape[1]} steps of history are fewer than label_len={label_len}")
    return x[:, x.shape[1] - label_len :]


def check_marks(x_mark: Tensor | None, y_mark: Tensor | None) -> None:
    """Refuse calendar features of the history or of the horizon alone.

    Raises:
        ValueError: One of them is missing.
    """
    if (x_mark is None) != (y_mark is None):
        raise ValueError(f"calendar features of the {'history' if x_mark is None else 'horizon'} are missing")
