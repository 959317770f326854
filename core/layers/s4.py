"""S4 and S4D: structured state spaces, a long convolution in training and a recurrence in streaming.

Keys and shapes of the state dicts are those of the official blocks. Source: Gu et al. 2021 (S4, arXiv
2111.00396), Gu et al. 2022 (S4D, arXiv 2206.11893).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core.layers.hippo import diagonal
from manyheads.core.layers.s4_kernels import (
    DiagonalKernel,
    DplrKernel,
    advance,
    as_complex,
    as_real,
    continuous,
    discretize,
    log_steps,
    vandermonde,
)
from manyheads.core.ops.fft_conv import fft_conv
from manyheads.core.ops.precision import wide


class S4State(NamedTuple):
    """What a stream carries from token to token: the states of every channel, `[B, dim, d_state / 2]`."""

    hidden: Tensor


class S4(nn.Module):
    """The S4 block: a state space for every channel, a skip, GELU, and a gated mixing of channels.

    Args:
        dim: Width of input and output.
        d_state: Real states a channel; even.
        mode: "dplr", S4's diagonal minus rank one from HiPPO-LegS, bilinear; or "diag", S4D.
        init: Of "diag": "diag-legs", "diag-inv" or "diag-lin".
        discretization: Of "diag": "zoh" or "bilinear".
        channels: State-space outputs a channel.
        bidirectional: A second kernel looks at the tokens after; the token itself belongs to the first.
        dropout: Probability in training, before the GELU.
        dt_min, dt_max: Range of the initial step sizes.

    Shape:
        x, y: `[B, L, dim]`; a step's: `[B, dim]`.

    Example:
        >>> layer = S4(64)
        >>> y, state = layer(torch.randn(2, 1000, 64), return_state=True)
        >>> y, state = layer.step(torch.randn(2, 64), state)
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 64,
        *,
        mode: str = "dplr",
        init: str = "diag-legs",
        discretization: str = "zoh",
        channels: int = 1,
        bidirectional: bool = False,
        dropout: float = 0.0,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
    ) -> None:
        super().__init__()
        if mode not in ("dplr", "diag"):
            raise ValueError(f"mode must be 'dplr' or 'diag', not {mode!r}")
        rows = channels * (2 if bidirectional else 1)
        kernel: DplrKernel | DiagonalKernel
        if mode == "dplr":
            kernel = DplrKernel(dim, d_state, channels=rows, dt_min=dt_min, dt_max=dt_max)
        else:
            kernel = DiagonalKernel(
                dim,
                d_state,
                channels=rows,
                init=init,
                discretization=discretization,
                dt_min=dt_min,
                dt_max=dt_max,
            )
        self.layer = _Convolution(kernel, dim, channels, bidirectional)
        self.dropout = nn.Dropout(dropout)
        self.output_linear = nn.Sequential(nn.Linear(dim * channels, 2 * dim), nn.GLU(-1))

    def forward(
        self, x: Tensor, state: S4State | None = None, return_state: bool = False
    ) -> Tensor | tuple[Tensor, S4State]:
        """Run over whole sequences, by convolution; from a state, and to the state after the last token.

        Raises:
            ValueError: A state of a bidirectional block.
        """
        if self.layer.bidirectional and (state is not None or return_state):
            raise ValueError("S4: a bidirectional block has no state to stream with")
        y = self._mix(self.layer(x, None if state is None else state.hidden))
        if not return_state:
            return y
        before = self.init_state(x.shape[0]) if state is None else state
        return y, S4State(self.layer.kernel.advance(wide(x), before.hidden))

    def step(self, x: Tensor, state: S4State) -> tuple[Tensor, S4State]:
        """Run over one more token, by recurrence."""
        if self.layer.bidirectional:
            raise ValueError("S4: a bidirectional block has no state to stream with")
        y, hidden = self.layer.kernel.step(wide(x), state.hidden)
        y = (y + self.layer.D * x[:, None]).flatten(1).to(x.dtype)  # [B, channels * dim]
        return self._mix(y), S4State(hidden)

    def init_state(self, batch_size: int) -> S4State:
        """The state before the first token."""
        return S4State(self.layer.kernel.init_state(batch_size))

    def _mix(self, y: Tensor) -> Tensor:
        return self.output_linear(F.gelu(self.dropout(y)))


class _Convolution(nn.Module):
    """Convolve with a state space's kernel and add the skip: `[B, L, dim]` to `[B, L, channels * dim]`."""

    def __init__(
        self, kernel: DplrKernel | DiagonalKernel, dim: int, channels: int, bidirectional: bool
    ) -> None:
        super().__init__()
        self.kernel, self.bidirectional = kernel, bidirectional
        self.D = nn.Parameter(torch.randn(channels, dim))

    def forward(self, x: Tensor, hidden: Tensor | None) -> Tensor:
        _, length, dim = x.shape
        channels = self.D.shape[0]
        kernels = self.kernel(length).flatten(0, 1)  # [rows * dim, L]
        u = x.repeat(1, 1, channels) if channels > 1 else x
        after = kernels[channels * dim :] if self.bidirectional else None
        y = fft_conv(u, kernels[: channels * dim], after)
        if hidden is not None:
            y = y + self.kernel.response(hidden, length).flatten(1, 2).transpose(1, 2)
        return (y + u * self.D.flatten()).to(x.dtype)


class S4D(nn.Module):
    """The standalone S4D block: a diagonal state space with B = 1 for every channel, ZOH, a skip, GELU, gate.

    Args:
        dim: Width of input and output.
        d_state: Real states a channel; even.
        dropout: Probability in training, after the GELU.
        dt_min, dt_max: Range of the initial step sizes.

    Shape:
        x, y: `[B, L, dim]`; a step's: `[B, dim]`.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 64,
        *,
        dropout: float = 0.0,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
    ) -> None:
        super().__init__()
        self.D = nn.Parameter(torch.randn(dim))
        self.kernel = _PlainDiagonal(dim, d_state, dt_min, dt_max)
        self.dropout = nn.Dropout(dropout)
        self.output_linear = nn.Sequential(nn.Conv1d(dim, 2 * dim, kernel_size=1), nn.GLU(dim=-2))

    def forward(
        self, x: Tensor, state: S4State | None = None, return_state: bool = False
    ) -> Tensor | tuple[Tensor, S4State]:
        """Run over whole sequences, by convolution; from a state, and to the state after the last token."""
        length = x.shape[1]
        log, drive, read = self.kernel.discrete()
        y = fft_conv(x, vandermonde(read * drive, log, length))
        if state is not None:
            kept = read * log.exp() * state.hidden
            y = y + vandermonde(kept, log, length).transpose(1, 2)
        y = self._mix((y + x * self.D).to(x.dtype))
        if not return_state:
            return y
        before = self.init_state(x.shape[0]) if state is None else state
        return y, S4State(advance(log, drive, wide(x), before.hidden))

    def step(self, x: Tensor, state: S4State) -> tuple[Tensor, S4State]:
        """Run over one more token, by recurrence."""
        log, drive, read = self.kernel.discrete()
        hidden = log.exp() * state.hidden + drive * wide(x)[..., None]
        y = 2 * (read * hidden).sum(-1).real
        return self._mix((y + x * self.D).to(x.dtype)), S4State(hidden)

    def init_state(self, batch_size: int) -> S4State:
        """The state before the first token."""
        read = as_complex(self.kernel.C)
        return S4State(read.new_zeros(batch_size, *read.shape))

    def _mix(self, y: Tensor) -> Tensor:
        conv = self.output_linear[0]
        assert isinstance(conv, nn.Conv1d)  # of width 1: a matrix, in the official shape
        return F.glu(F.linear(self.dropout(F.gelu(y)), conv.weight[..., 0], conv.bias), -1)


class _PlainDiagonal(nn.Module):
    """The parameters of a diagonal state space without B, by their official names."""

    def __init__(self, dim: int, d_state: int, dt_min: float, dt_max: float) -> None:
        super().__init__()
        states = diagonal("diag-lin", d_state).repeat(dim, 1)
        self.C = nn.Parameter(as_real(torch.randn(states.shape, dtype=torch.complex64)))
        self.log_dt = nn.Parameter(log_steps(dim, dt_min, dt_max))
        self.log_A_real = nn.Parameter((-states.real).log().float())
        self.A_imag = nn.Parameter(-states.imag.float())

    def forward(self, length: int) -> Tensor:
        """The kernel, `[H, L]`."""
        log, drive, read = self.discrete()
        return vandermonde(read * drive, log, length)

    def discrete(self) -> tuple[Tensor, Tensor, Tensor]:
        """log dA, dB and C, `[H, N]` each."""
        # The sign of the imaginary part is the other block's opposite.
        states = continuous(self.log_A_real, -self.A_imag)
        dt = wide(self.log_dt).exp()[:, None]
        log, step = discretize(dt * states, "zoh")
        return log, dt * step, as_complex(self.C)
