"""Mamba: a short convolution and a selective scan between two projections, and its bidirectional form.

Parameters are named as in the official code, so that its weights load as they are.

Source: Gu and Dao 2023 (arXiv 2312.00752); in both directions, as Vision Mamba has it, Zhu et al. 2024 (arXiv
2401.09417).
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core.ops.depthwise_conv1d import depthwise_conv1d, depthwise_conv1d_step
from manyheads.core.ops.precision import wide
from manyheads.core.ops.selective_scan import selective_scan, selective_scan_step
from manyheads.core.products import project

DT_MIN, DT_MAX = 0.001, 0.1  # the range of the first step sizes


class MambaState(NamedTuple):
    """What a Mamba block remembers between two pieces of a sequence.

    Attributes:
        conv: The last inputs of the convolution, `[B, expand * dim, d_conv - 1]`.
        ssm: The state of the scan, `[B, expand * dim, d_state]`, float32.
    """

    conv: Tensor
    ssm: Tensor


class Mamba(nn.Module):
    """The Mamba-1 block: what it keeps of the past, and for how long, depends on the input.

    Args:
        dim: Width of input and output.
        d_state: States a channel.
        d_conv: Width of the convolution.
        expand: Channels inside, as a multiple of dim.
        dt_rank: Rank of the step size's projection; None means dim / 16, rounded up.
        conv_bias, bias: Whether the convolution, and the two projections, have a bias.

    Shape:
        x: `[B, L, dim]`; the result `[B, L, dim]`.

    Source:
        Gu and Dao 2023, arXiv 2312.00752.

    Example:
        >>> block = Mamba(192)
        >>> y, state = block(x, return_state=True)
        >>> next_y, state = block.step(token, state)
    """

    def __init__(
        self,
        dim: int,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        conv_bias: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.d_inner = inner = expand * dim
        rank = math.ceil(dim / 16) if dt_rank is None else dt_rank
        self.in_proj = nn.Linear(dim, 2 * inner, bias=bias)
        self.conv1d = nn.Conv1d(inner, inner, d_conv, groups=inner, bias=conv_bias)
        self.x_proj = nn.Linear(inner, rank + 2 * d_state, bias=False)
        self.dt_proj = _step_size_projection(rank, inner)
        self.A_log = nn.Parameter(_first_A_log(inner, d_state))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, dim, bias=bias)

    @overload
    def forward(
        self,
        x: Tensor,
        state: MambaState | None = ...,
        *,
        return_state: Literal[False] = ...,
        cu_seqlens: Tensor | None = ...,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        x: Tensor,
        state: MambaState | None = ...,
        *,
        return_state: Literal[True],
        cu_seqlens: Tensor | None = ...,
    ) -> tuple[Tensor, MambaState]: ...
    def forward(
        self,
        x: Tensor,
        state: MambaState | None = None,
        *,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, MambaState]:
        """Run over a sequence, or its next piece.

        Args:
            state: What the piece before it returned; None at the beginning.
            return_state: Return the state after the last token too.
            cu_seqlens: Where packed sequences begin and end along L, int32 `[S + 1]`; the batch is then 1,
                and the states' first axis is the sequences'.
        """
        u, z = project(self.in_proj, x).chunk(2, -1)  # [B, L, E] each
        conv, ssm = (None, None) if state is None else state
        u, conv = depthwise_conv1d(
            u, self.conv1d.weight[:, 0], self.conv1d.bias, activation="silu",
            initial_state=conv, return_state=True, cu_seqlens=cu_seqlens,
        )  # fmt: skip
        y, ssm = selective_scan(
            u, *_coefficients(u, self.x_proj, self.dt_proj, self.A_log), D=self.D, z=z,
            delta_bias=self.dt_proj.bias, delta_softplus=True,
            initial_state=ssm, return_state=True, cu_seqlens=cu_seqlens,
        )  # fmt: skip
        y = project(self.out_proj, y)
        return (y, MambaState(conv, ssm)) if return_state else y

    def step(self, x: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        """Run over one token.

        Shape:
            x: `[B, dim]`; the result `[B, dim]`.
        """
        u, z = self.in_proj(x).chunk(2, -1)  # [B, E] each
        u, conv = depthwise_conv1d_step(
            u, state.conv, self.conv1d.weight[:, 0], self.conv1d.bias, activation="silu"
        )
        y, ssm = selective_scan_step(
            state.ssm, u, *_coefficients(u, self.x_proj, self.dt_proj, self.A_log), D=self.D, z=z,
            delta_bias=self.dt_proj.bias, delta_softplus=True,
        )  # fmt: skip
        return self.out_proj(y), MambaState(conv, ssm)

    def init_state(self, batch_size: int) -> MambaState:
        """The state before the first token."""
        weight = self.conv1d.weight
        conv = weight.new_zeros(batch_size, self.d_inner, weight.shape[2] - 1)
        wide = torch.promote_types(weight.dtype, torch.float32)
        return MambaState(conv, weight.new_zeros(batch_size, *self.A_log.shape, dtype=wide))


class BidirectionalMamba(nn.Module):
    """Mamba over a sequence from both ends, as Vision Mamba has it: the sum of two scans, gated alike.

    Args:
        dim: Width of input and output.
        d_state: States a channel.
        d_conv: Width of the convolutions.
        expand: Channels inside, as a multiple of dim.
        dt_rank: Rank of the step sizes' projection; None means dim / 16, rounded up.
        conv_bias, bias: Whether the convolutions, and the two outer projections, have a bias.
        kind: "v2", a convolution and projections for each direction; "v1", for both the same causal
            convolution and projections, and only the decays of the backward scan its own.
        divide: Halve the sum of the directions ("v1" never does).
        layer_scale: First value of a factor for each channel of the result; None for no factor.

    Shape:
        x: `[B, L, dim]`; the result `[B, L, dim]`.

    Raises:
        ValueError: No such kind.

    Source:
        Zhu et al. 2024, arXiv 2401.09417. The backward direction's step sizes begin as those of any linear
        layer, not in the forward's range, as in the official code.
    """

    def __init__(
        self,
        dim: int,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        conv_bias: bool = True,
        bias: bool = False,
        kind: Literal["v1", "v2"] = "v2",
        divide: bool = True,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        if kind not in ("v1", "v2"):
            raise ValueError(f"BidirectionalMamba: kind must be 'v1' or 'v2', not {kind!r}")
        self.kind, self.divide = kind, divide and kind == "v2"
        inner = expand * dim
        rank = math.ceil(dim / 16) if dt_rank is None else dt_rank
        self.gamma = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))
        self.in_proj = nn.Linear(dim, 2 * inner, bias=bias)
        self.conv1d = nn.Conv1d(inner, inner, d_conv, groups=inner, bias=conv_bias)
        self.x_proj = nn.Linear(inner, rank + 2 * d_state, bias=False)
        self.dt_proj = _step_size_projection(rank, inner)
        self.A_log = nn.Parameter(_first_A_log(inner, d_state))
        self.D = nn.Parameter(torch.ones(inner))
        self.A_b_log = nn.Parameter(_first_A_log(inner, d_state))
        if kind == "v2":
            self.conv1d_b = nn.Conv1d(inner, inner, d_conv, groups=inner, bias=conv_bias)
            self.x_proj_b = nn.Linear(inner, rank + 2 * d_state, bias=False)
            self.dt_proj_b = nn.Linear(rank, inner)
            self.D_b = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, dim, bias=bias)

    def forward(self, x: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """Run over whole sequences; `cu_seqlens` as for `Mamba`."""
        u, z = project(self.in_proj, x).chunk(2, -1)  # [B, L, E] each
        ahead = _convolve(u, self.conv1d, cu_seqlens)
        found = _coefficients(ahead, self.x_proj, self.dt_proj, self.A_log)
        y = _scan(ahead, found, self.dt_proj, self.D, z, cu_seqlens)
        if self.kind == "v1":
            delta, _, B, C = found
            y = y + _scan(
                ahead, (delta, _decays(self.A_b_log), B, C), self.dt_proj, self.D, z, cu_seqlens, reverse=True
            )
        else:
            back = _convolve(u, self.conv1d_b, cu_seqlens, reverse=True)
            found = _coefficients(back, self.x_proj_b, self.dt_proj_b, self.A_b_log)
            y = y + _scan(back, found, self.dt_proj_b, self.D_b, z, cu_seqlens, reverse=True)
        y = project(self.out_proj, y / 2 if self.divide else y)
        return y if self.gamma is None else y * self.gamma


Coefficients = tuple[Tensor, Tensor, Tensor, Tensor]


def _convolve(x: Tensor, conv: nn.Conv1d, cu_seqlens: Tensor | None, reverse: bool = False) -> Tensor:
    return depthwise_conv1d(
        x, conv.weight[:, 0], conv.bias, activation="silu", reverse=reverse, cu_seqlens=cu_seqlens
    )


def _coefficients(u: Tensor, x_proj: nn.Linear, dt_proj: nn.Linear, A_log: Tensor) -> Coefficients:
    """What the scan needs of its input: delta `[..., E]` without its bias, A, B and C `[..., N]`."""
    n = A_log.shape[1]
    dt, B, C = project(x_proj, u).split([dt_proj.in_features, n, n], -1)
    return F.linear(dt, dt_proj.weight), _decays(A_log), B, C


def _decays(A_log: Tensor) -> Tensor:
    """A, at least in float32."""
    return -torch.exp(wide(A_log))


def _scan(
    u: Tensor,
    coefficients: Coefficients,
    dt_proj: nn.Linear,
    D: Tensor,
    z: Tensor,
    cu_seqlens: Tensor | None,
    reverse: bool = False,
) -> Tensor:
    return selective_scan(
        u, *coefficients, D=D, z=z, delta_bias=dt_proj.bias, delta_softplus=True, reverse=reverse,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip


def _step_size_projection(rank: int, inner: int) -> nn.Linear:
    """A projection whose step sizes begin in Mamba's range."""
    layer = nn.Linear(rank, inner)
    nn.init.uniform_(layer.weight, -(rank**-0.5), rank**-0.5)
    with torch.no_grad():
        layer.bias.copy_(first_step_biases(inner))
    return layer


def first_step_biases(count: int) -> Tensor:
    """Biases whose softplus is log-uniform between DT_MIN and DT_MAX: where Mamba's step sizes begin."""
    dt = torch.exp(torch.empty(count).uniform_(math.log(DT_MIN), math.log(DT_MAX)))
    return dt + torch.log(-torch.expm1(-dt))  # the softplus's inverse


def _first_A_log(inner: int, d_state: int) -> Tensor:
    """The diagonal -1, -2, ..., -N for each channel, S4D's real one."""
    return torch.log(torch.arange(1, d_state + 1, dtype=torch.float32)).repeat(inner, 1)
