"""The gates in compiled loops: one pass over a group for what takes torch four, and nine backward."""

from __future__ import annotations

from torch import Tensor

from manyheads.core.ops.gated_attention_unit import numba_kernels


def gates(attended: Tensor, values: Tensor, out: Tensor) -> None:
    """Write att(u) * v * sigmoid(att(v) * u); as `cpu.gates`."""
    numba_kernels.gates(attended.numpy(), values.detach().contiguous().numpy(), out.numpy())


def pull_gates(dy: Tensor, values: Tensor, attended: Tensor, dx: Tensor, pull: Tensor) -> None:
    """Pull back through the gates; as `cpu.pull_gates`."""
    numba_kernels.pull_gates(
        dy.contiguous().numpy(),
        values.detach().contiguous().numpy(),
        attended.numpy(),
        dx.numpy(),
        pull.numpy(),
    )
