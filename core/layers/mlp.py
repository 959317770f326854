"""Feed-forward layers: two linear maps with an activation or a gate between them.

Source: GLU variants, Shazeer 2020 (arXiv 2002.05202); squared ReLU, So et al. 2021 (arXiv 2109.08668).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core.errors import UsageError, did_you_mean


def squared_relu(x: Tensor) -> Tensor:
    """Square what relu leaves."""
    return F.relu(x).square()


def identity(x: Tensor) -> Tensor:
    """Leave x as it is: the bilinear gate."""
    return x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "squared_relu": squared_relu,
}
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "glu": torch.sigmoid,
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": ACTIVATIONS["gelu_tanh"],
    "reglu": F.relu,
    "bilinear": identity,
}


class Mlp(nn.Module):
    """`fc2(activation(fc1(x)))`.

    Args:
        dim: Width of the input.
        hidden_dim: Width between the two maps.
        out_dim: Width of the output; None means `dim`.
        activation: A name in `ACTIVATIONS`.
        bias: Whether both maps have one.
        dropout: Probability that a hidden element is dropped in training.

    Shape:
        x: `[..., dim]`; the result `[..., out_dim]`.

    Raises:
        UsageError: No such activation.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        out_dim: int | None = None,
        activation: str = "gelu",
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.activation = _named(ACTIVATIONS, activation, "activation")
        self.fc1 = nn.Linear(dim, hidden_dim, bias=bias)
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(hidden_dim, dim if out_dim is None else out_dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Apply both maps."""
        hidden = self.activation(self.fc1(x))  # [..., hidden_dim]
        return self.fc2(self.dropout(hidden))


class GatedMlp(nn.Module):
    """`fc2(gate(a) * b)` with `a, b` the halves of `fc1(x)`: the gated half comes first.

    Args:
        hidden_dim: Width of one half; two thirds of a plain Mlp's keeps the number of parameters.
        gate: A name in `GATES`; the others as in `Mlp`.

    Shape:
        As `Mlp`; `fc1.weight` is `[2 * hidden_dim, dim]`.

    Raises:
        UsageError: No such gate.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        out_dim: int | None = None,
        gate: str = "swiglu",
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.gate = _named(GATES, gate, "gate")
        self.fc1 = nn.Linear(dim, 2 * hidden_dim, bias=bias)
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(hidden_dim, dim if out_dim is None else out_dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Apply both maps and the gate."""
        gated, value = self.fc1(x).chunk(2, dim=-1)  # [..., hidden_dim] each
        return self.fc2(self.dropout(self.gate(gated) * value))


def _named(table: dict[str, Callable[[Tensor], Tensor]], name: str, what: str) -> Callable[[Tensor], Tensor]:
    if name not in table:
        raise UsageError(f"no {what} {name!r}{did_you_mean(name, table)} (there are {', '.join(table)})")
    return table[name]
