"""Hydra: Mamba-2 in both directions, as one quasiseparable matrix over the sequence.

Parameters are named as in the official code, so that its weights load as they are.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core.layers.mamba2 import GatedRMSNorm, check_heads, first_decays, ssd, step_sizes
from manyheads.core.ops.depthwise_conv1d import depthwise_conv1d


class Hydra(nn.Module):
    """The Hydra block: what lies before a token, what lies after it, and the token itself, each its own.

    A scan from each end gives the parts below and above the diagonal, shifted by one so that neither has the
    token itself; the diagonal depends on the token, too. Both scans share their decay rates.

    Args:
        dim: Width of input and output.
        d_state: States a channel.
        d_conv: Width of the convolution, which is centred.
        expand: Channels inside, as a multiple of dim.
        head_dim: Channels a head; it divides `expand * dim`.
        groups: Groups of heads that share B and C.
        dt_limit: The least and the largest step size.
        learn_initial_states: Learn the state that both scans begin with.
        conv_bias, bias: Whether the convolution, and the two projections, have a bias.

    Shape:
        x: `[B, L, dim]`; the result `[B, L, dim]`.

    Raises:
        ValueError: The heads do not divide the channels, or the groups the heads; d_conv is even.

    Source:
        Hwang et al. 2024, arXiv 2407.09941.

    Example:
        >>> Hydra(192, head_dim=32)(torch.randn(2, 100, 192)).shape
        torch.Size([2, 100, 192])
    """

    def __init__(
        self,
        dim: int,
        *,
        d_state: int = 64,
        d_conv: int = 7,
        expand: int = 2,
        head_dim: int = 64,
        groups: int = 1,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        learn_initial_states: bool = False,
        conv_bias: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if d_conv % 2 == 0:
            raise ValueError(f"Hydra: d_conv must be odd, not {d_conv}: the convolution is centred")
        self.d_inner = inner = expand * dim
        self.num_heads = heads = check_heads("Hydra", inner, head_dim, groups)
        self.d_state, self.groups, self.dt_limit = d_state, groups, (dt_limit[0], dt_limit[1])
        channels = inner + 4 * groups * d_state
        self.in_proj = nn.Linear(dim, inner + channels + 2 * heads, bias=bias)
        self.conv1d = nn.Conv1d(
            channels, channels, d_conv, groups=channels, padding=d_conv // 2, bias=conv_bias
        )
        self.init_states = (
            nn.Parameter(torch.zeros(heads, head_dim, d_state)) if learn_initial_states else None
        )
        self.dt_bias, self.A_log = first_decays(heads)
        self.D = nn.Parameter(torch.ones(heads))
        self.fc_D = nn.Linear(inner, heads, bias=False)
        self.norm = GatedRMSNorm(inner, norm_before_gate=True)
        self.out_proj = nn.Linear(inner, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Run over whole sequences."""
        channels, shared = self.conv1d.weight.shape[0], self.groups * self.d_state
        z, u, dt = self.in_proj(x).split((self.d_inner, channels, 2 * self.num_heads), -1)
        u = depthwise_conv1d(u, self.conv1d.weight[:, 0], self.conv1d.bias, causal=False, activation="silu")
        u, *mixers = u.split((self.d_inner, *[shared] * 4), -1)
        B_ahead, C_ahead, B_back, C_back = (t.unflatten(-1, (self.groups, -1)) for t in mixers)
        value = u.unflatten(-1, (self.num_heads, -1))  # [B, L, H, P]
        sizes = step_sizes(dt, self.dt_bias.repeat(2), self.dt_limit)
        ahead, back = sizes.chunk(2, -1)
        rates = -torch.exp(self.A_log.to(sizes.dtype))
        start = None
        if self.init_states is not None:
            start = self.init_states.mT.expand(x.shape[0], -1, -1, -1)  # [B, H, N, P]
        below, _ = ssd(value, ahead, rates, B_ahead, C_ahead, initial_state=start)
        above, _ = ssd(value, back, rates, B_back, C_back, reverse=True, initial_state=start)
        diagonal = F.linear(u, self.fc_D.weight, self.D)  # [B, L, H]
        y = value * diagonal[..., None] + _shift(below, 1) + _shift(above, -1)
        return self.out_proj(self.norm(y.flatten(-2), z))


def _shift(x: Tensor, steps: int) -> Tensor:
    """Move `[B, L, H, P]` along L by one step, zeros coming in."""
    return F.pad(x, (0, 0, 0, 0, 1, -1) if steps == 1 else (0, 0, 0, 0, -1, 1))
