"""Mamba-2: state space duality (SSD), and the block around it.

Parameters are named as in the official code, so that its weights load as they are.

Source: Dao and Gu 2024 (arXiv 2405.21060).
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core.layers.mamba import first_step_biases
from manyheads.core.ops.decay_attention import decay_attention, decay_attention_step
from manyheads.core.ops.depthwise_conv1d import depthwise_conv1d, depthwise_conv1d_step
from manyheads.core.ops.norm import rms_norm
from manyheads.core.ops.precision import wide

DECAY_RANGE = (1.0, 16.0)  # of the first decay rates
NORM_EPS = 1e-5


class Mamba2State(NamedTuple):
    """What a Mamba-2 block remembers between two pieces of a sequence.

    Attributes:
        conv: The last inputs of the convolution, `[B, channels, d_conv - 1]`.
        ssm: The state of the scan, `[B, H, d_state, head_dim]`, float32.
    """

    conv: Tensor
    ssm: Tensor


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scan `S_t = exp(dt_t A) S_{t-1} + dt_t B_t x_t^T`, and read `y_t = C_t S_t + D x_t`.

    Args:
        x: Input of each head.
        dt: Step sizes, positive (see `step_sizes`).
        A: Decay rates, negative.
        B, C: What writes to the state and what reads from it; a group of heads shares one.
        D: Of the direct path.
        reverse: Scan from the last step to the first.
        initial_state: Before the first step; zeros by default.
        cu_seqlens: int32 bounds of packed sequences; the batch is then 1.

    Shape:
        x, y `[B, L, H, P]`; dt `[B, L, H]`; A `[H]`; B, C `[B, L, G, N]`, G divides H; D `[H]` or `[H, P]`;
        states `[S, H, N, P]` (the official code keeps `[S, H, P, N]`), S the batch or the number of packed
        sequences; cu_seqlens `[S + 1]`.

    Returns:
        y in x's dtype, and the state after the last step, float32.
    """
    y, state = decay_attention(
        C, B, _write(x, dt), dt * A, scale=1.0, reverse=reverse,
        initial_state=initial_state, return_state=True, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    return _direct(y, x, D), state


def ssd_step(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, D: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Take one step of `ssd`; shapes as there, without L."""
    y, state = decay_attention_step(state, C, B, _write(x, dt), dt * A, scale=1.0)
    return _direct(y, x, D), state


def _write(x: Tensor, dt: Tensor) -> Tensor:
    return (x * dt[..., None]).to(x.dtype)


def _direct(y: Tensor, x: Tensor, D: Tensor | None) -> Tensor:
    if D is None:
        return y
    return (y + x * (D[:, None] if D.dim() == 1 else D)).to(x.dtype)


def step_sizes(dt: Tensor, bias: Tensor, limit: tuple[float, float]) -> Tensor:
    """Step sizes from their projection, at least float32: softplus, then clamped to the limit."""
    sizes = F.softplus(wide(dt) + bias)
    return sizes if limit == (0.0, math.inf) else sizes.clamp(*limit)


def first_decays(num_heads: int) -> tuple[nn.Parameter, nn.Parameter]:
    """`dt_bias` and `A_log` as the official code begins them: log-uniform step sizes, uniform rates."""
    rates = torch.empty(num_heads).uniform_(*DECAY_RANGE)
    return nn.Parameter(first_step_biases(num_heads)), nn.Parameter(rates.log())


class GatedRMSNorm(nn.Module):
    """RMSNorm in groups of channels, gated by silu(z) before it or after it.

    Args:
        dim: Width of the input.
        groups: Groups of channels, each with a mean square of its own.
        norm_before_gate: Norm first, then gate.

    Shape:
        x, z and the result: `[..., dim]`.
    """

    def __init__(self, dim: int, groups: int = 1, *, norm_before_gate: bool = False) -> None:
        super().__init__()
        self.groups, self.norm_before_gate = groups, norm_before_gate
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Norm and gate."""
        gate = F.silu(z)
        if not self.norm_before_gate:
            x = x * gate
        if self.groups == 1:
            x = rms_norm(x, self.weight, eps=NORM_EPS)
        else:
            x = rms_norm(x.unflatten(-1, (self.groups, -1)), eps=NORM_EPS).flatten(-2) * self.weight
        return x * gate if self.norm_before_gate else x


class Mamba2(nn.Module):
    """The Mamba-2 block: SSD between a short convolution and a gated norm.

    Args:
        dim: Width of input and output.
        d_state: States a channel.
        d_conv: Width of the convolution.
        expand: Channels inside, as a multiple of dim.
        head_dim: Channels a head; it divides `expand * dim`.
        groups: Groups of heads that share B and C; also of the norm.
        norm: "rms" or None: with None the scan's output is only gated.
        norm_before_gate: Norm first, then gate.
        dt_limit: The least and the largest step size.
        D_per_channel: A direct path of each channel, not of each head.
        conv_bias, bias: Whether the convolution, and the two projections, have a bias.

    Shape:
        x: `[B, L, dim]`; the result `[B, L, dim]`.

    Raises:
        ValueError: The heads do not divide the channels, or the groups the heads; no such norm.

    Source:
        Dao and Gu 2024, arXiv 2405.21060. With several groups the norm is grouped, as in the official
        `Mamba2` (and not over all channels, as in the unfused path of its `Mamba2Simple`).

    Example:
        >>> block = Mamba2(192)
        >>> y, state = block(x, return_state=True)
        >>> next_y, state = block.step(token, state)
    """

    def __init__(
        self,
        dim: int,
        *,
        d_state: int = 128,
        d_conv: int = 4,
        expand: int = 2,
        head_dim: int = 64,
        groups: int = 1,
        norm: Literal["rms"] | None = "rms",
        norm_before_gate: bool = False,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        D_per_channel: bool = False,
        conv_bias: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.d_inner = inner = expand * dim
        self.num_heads = check_heads("Mamba2", inner, head_dim, groups)
        if norm not in ("rms", None):
            raise ValueError(f"Mamba2: norm must be 'rms' or None, not {norm!r}")
        self.d_state, self.groups, self.dt_limit = d_state, groups, (dt_limit[0], dt_limit[1])
        channels = inner + 2 * groups * d_state
        self.in_proj = nn.Linear(dim, inner + channels + self.num_heads, bias=bias)
        self.conv1d = nn.Conv1d(channels, channels, d_conv, groups=channels, bias=conv_bias)
        self.dt_bias, self.A_log = first_decays(self.num_heads)
        self.D = nn.Parameter(torch.ones(inner if D_per_channel else self.num_heads))
        self.norm = None if norm is None else GatedRMSNorm(inner, groups, norm_before_gate=norm_before_gate)
        self.out_proj = nn.Linear(inner, dim, bias=bias)

    @overload
    def forward(
        self,
        x: Tensor,
        state: Mamba2State | None = ...,
        *,
        return_state: Literal[False] = ...,
        cu_seqlens: Tensor | None = ...,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        x: Tensor,
        state: Mamba2State | None = ...,
        *,
        return_state: Literal[True],
        cu_seqlens: Tensor | None = ...,
    ) -> tuple[Tensor, Mamba2State]: ...
    def forward(
        self,
        x: Tensor,
        state: Mamba2State | None = None,
        *,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Mamba2State]:
        """Run over a sequence, or its next piece.

        Args:
            state: What the piece before it returned; None at the beginning.
            return_state: Return the state after the last token too.
            cu_seqlens: Where packed sequences begin and end along L, int32 `[S + 1]`; the batch is then 1,
                and the states' first axis is the sequences'.
        """
        z, u, dt = self._project(x)
        conv, ssm = (None, None) if state is None else state
        u, conv = depthwise_conv1d(
            u, self.conv1d.weight[:, 0], self.conv1d.bias, activation="silu",
            initial_state=conv, return_state=True, cu_seqlens=cu_seqlens,
        )  # fmt: skip
        u, *rest = self._scanned(u, dt)
        y, ssm = ssd(u, *rest, D=self._direct(), initial_state=ssm, cu_seqlens=cu_seqlens)
        y = self._finish(y, z)
        return (y, Mamba2State(conv, ssm)) if return_state else y

    def step(self, x: Tensor, state: Mamba2State) -> tuple[Tensor, Mamba2State]:
        """Run over one token.

        Shape:
            x: `[B, dim]`; the result `[B, dim]`.
        """
        z, u, dt = self._project(x)
        u, conv = depthwise_conv1d_step(
            u, state.conv, self.conv1d.weight[:, 0], self.conv1d.bias, activation="silu"
        )
        u, *rest = self._scanned(u, dt)
        y, ssm = ssd_step(state.ssm, u, *rest, D=self._direct())
        return self._finish(y, z), Mamba2State(conv, ssm)

    def init_state(self, batch_size: int) -> Mamba2State:
        """The state before the first token."""
        weight = self.conv1d.weight
        conv = weight.new_zeros(batch_size, weight.shape[0], weight.shape[2] - 1)
        wide = torch.promote_types(weight.dtype, torch.float32)
        shape = (batch_size, self.num_heads, self.d_state, self.d_inner // self.num_heads)
        return Mamba2State(conv, weight.new_zeros(shape, dtype=wide))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gate z, the convolution's input (x, B and C) and the step sizes' projection."""
        channels = self.conv1d.weight.shape[0]
        z, u, dt = self.in_proj(x).split((self.d_inner, channels, self.num_heads), -1)
        return z, u, dt

    def _scanned(self, u: Tensor, dt: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x, step sizes, A, B and C."""
        shared = self.groups * self.d_state
        u, B, C = u.split((self.d_inner, shared, shared), -1)
        sizes = step_sizes(dt, self.dt_bias, self.dt_limit)
        B, C = (t.unflatten(-1, (self.groups, -1)) for t in (B, C))
        return u.unflatten(-1, (self.num_heads, -1)), sizes, -torch.exp(self.A_log.to(sizes.dtype)), B, C

    def _direct(self) -> Tensor:
        return self.D if self.D.shape[0] == self.num_heads else self.D.unflatten(0, (self.num_heads, -1))

    def _finish(self, y: Tensor, z: Tensor) -> Tensor:
        y = y.flatten(-2)
        return self.out_proj(y * F.silu(z) if self.norm is None else self.norm(y, z))


def check_heads(layer: str, channels: int, head_dim: int, groups: int) -> int:
    """How many heads there are.

    Raises:
        ValueError: The heads do not divide the channels, or the groups the heads.
    """
    if channels % head_dim:
        raise ValueError(f"{layer}: head_dim {head_dim} must divide the {channels} channels")
    if channels // head_dim % groups:
        raise ValueError(f"{layer}: {groups} groups must divide the {channels // head_dim} heads")
    return channels // head_dim
