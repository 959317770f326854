"""DeltaNet: short convolutions and the delta rule between two projections; with a decay, Gated DeltaNet.

Parameters are named as in flash-linear-attention's layers.

Source: Yang et al. 2024 (arXiv 2406.06484); with the decay, Yang et al. 2024 (arXiv 2412.06464).
"""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core.layers.mamba2 import first_decays
from manyheads.core.layers.norm import RMSNorm
from manyheads.core.ops.delta_rule import delta_rule, delta_rule_step
from manyheads.core.ops.depthwise_conv1d import depthwise_conv1d, depthwise_conv1d_step
from manyheads.core.ops.precision import wide


class DeltaNetState(NamedTuple):
    """What a DeltaNet layer remembers between two pieces of a sequence.

    Attributes:
        conv: The last inputs of the three convolutions, `[B, 2 keys + values, d_conv - 1]`.
        memory: The state of the delta rule, `[B, H, K, V]`, float32.
    """

    conv: Tensor
    memory: Tensor


class DeltaNet(nn.Module):
    """Causal attention in linear time whose memory corrects what it stored under a key.

    Args:
        dim: Width of input and output.
        num_heads: Heads; they divide the widths of keys and values.
        head_dim: Width of a head's queries and keys; None for dim / num_heads.
        expand: Width of all values, as a multiple of dim.
        d_conv: Width of the convolutions.
        gate: Multiply the normed output by silu of a projection of the input.
        decay: Let the memory fade, by a gate of each head and token (Gated DeltaNet).
        norm_eps: Of the output norm.

    Shape:
        x: `[B, L, dim]`; the result `[B, L, dim]`.

    Raises:
        ValueError: num_heads does not divide a width.

    Source:
        Yang et al. 2024, arXiv 2406.06484 and 2412.06464.

    Example:
        >>> layer = DeltaNet(256, 4)
        >>> y, state = layer(x, return_state=True)
        >>> next_y, state = layer.step(token, state)
    """

    dt_bias: nn.Parameter | None
    A_log: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        expand: int = 1,
        d_conv: int = 4,
        gate: bool = False,
        decay: bool = False,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if (head_dim is None and dim % num_heads) or expand * dim % num_heads:
            raise ValueError(f"DeltaNet: num_heads {num_heads} must divide dim {dim} and expand * dim")
        self.num_heads = num_heads
        self.head_dim, self.value_dim = head_dim or dim // num_heads, expand * dim // num_heads
        keys, values = num_heads * self.head_dim, num_heads * self.value_dim
        self.q_proj = nn.Linear(dim, keys, bias=False)
        self.k_proj = nn.Linear(dim, keys, bias=False)
        self.v_proj = nn.Linear(dim, values, bias=False)
        self.b_proj = nn.Linear(dim, num_heads, bias=False)
        self.q_conv1d = nn.Conv1d(keys, keys, d_conv, groups=keys, bias=False)
        self.k_conv1d = nn.Conv1d(keys, keys, d_conv, groups=keys, bias=False)
        self.v_conv1d = nn.Conv1d(values, values, d_conv, groups=values, bias=False)
        self.g_proj = nn.Linear(dim, values, bias=False) if gate else None
        self.a_proj = nn.Linear(dim, num_heads, bias=False) if decay else None
        self.dt_bias, self.A_log = first_decays(num_heads) if decay else (None, None)
        self.o_norm = RMSNorm(self.value_dim, eps=norm_eps)
        self.o_proj = nn.Linear(values, dim, bias=False)

    @overload
    def forward(
        self,
        x: Tensor,
        state: DeltaNetState | None = ...,
        *,
        return_state: Literal[False] = ...,
        cu_seqlens: Tensor | None = ...,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        x: Tensor,
        state: DeltaNetState | None = ...,
        *,
        return_state: Literal[True],
        cu_seqlens: Tensor | None = ...,
    ) -> tuple[Tensor, DeltaNetState]: ...
    def forward(
        self,
        x: Tensor,
        state: DeltaNetState | None = None,
        *,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, DeltaNetState]:
        """Run over a sequence, or its next piece.

        Args:
            state: What the piece before it returned; None at the beginning.
            return_state: Return the state after the last token too.
            cu_seqlens: Where packed sequences begin and end along L, int32 `[S + 1]`; the batch is then 1,
                and the states' first axis is the sequences'.
        """
        conv, memory = (None, None) if state is None else state
        qkv, conv = depthwise_conv1d(
            self._project(x), self._filters(), activation="silu",
            initial_state=conv, return_state=True, cu_seqlens=cu_seqlens,
        )  # fmt: skip
        y, memory = delta_rule(
            *self._heads(qkv), self.b_proj(x).sigmoid(), log_decay=self._log_decay(x), normalize=True,
            initial_state=memory, return_state=True, cu_seqlens=cu_seqlens,
        )  # fmt: skip
        y = self._output(x, y)
        return (y, DeltaNetState(conv, memory)) if return_state else y

    def step(self, x: Tensor, state: DeltaNetState) -> tuple[Tensor, DeltaNetState]:
        """Run over one token.

        Shape:
            x: `[B, dim]`; the result `[B, dim]`.
        """
        qkv, conv = depthwise_conv1d_step(self._project(x), state.conv, self._filters(), activation="silu")
        y, memory = delta_rule_step(
            state.memory, *self._heads(qkv), self.b_proj(x).sigmoid(),
            log_decay=self._log_decay(x), normalize=True,
        )  # fmt: skip
        return self._output(x, y), DeltaNetState(conv, memory)

    def init_state(self, batch_size: int) -> DeltaNetState:
        """The state before the first token."""
        filters = self._filters()
        conv = filters.new_zeros(batch_size, filters.shape[0], filters.shape[1] - 1)
        wide = torch.promote_types(filters.dtype, torch.float32)
        memory = conv.new_zeros(batch_size, self.num_heads, self.head_dim, self.value_dim, dtype=wide)
        return DeltaNetState(conv, memory)

    def _project(self, x: Tensor) -> Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)

    def _filters(self) -> Tensor:
        return torch.cat([self.q_conv1d.weight, self.k_conv1d.weight, self.v_conv1d.weight])[:, 0]

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, `[..., H, K or V]`."""
        keys, values = self.q_proj.out_features, self.v_proj.out_features
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)) for x in qkv.split([keys, keys, values], -1))
        return q, k, v

    def _log_decay(self, x: Tensor) -> Tensor | None:
        if self.a_proj is None or self.A_log is None or self.dt_bias is None:
            return None
        return -wide(self.A_log).exp() * F.softplus(wide(self.a_proj(x)) + self.dt_bias)

    def _output(self, x: Tensor, y: Tensor) -> Tensor:
        normed = self.o_norm(y).flatten(-2)  # [..., values]
        return self.o_proj(normed if self.g_proj is None else normed * F.silu(self.g_proj(x)))
