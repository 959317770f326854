"""Projections and MLPs on a CPU: at inference by oneDNN's kernels with bias and GELU inside.

Torch's own linear layer copies the bias, multiplies with another library, and takes a pass more for the GELU.
The kernels here are those that torch.compile would choose; they have no gradients: training takes the
products of `core.products`.
"""

from __future__ import annotations

import torch
from timm.layers import GELUTanh, Mlp
from torch import Tensor, nn

from manyheads.core.products import is_plain_inference, project


def fusible(layer: nn.Module, x: Tensor, kind: type[nn.Module]) -> bool:
    """Tell whether oneDNN may compute a layer here: plain, no hooks, float32, on a CPU, without gradients."""
    return bool(
        type(layer) is kind
        and is_plain_inference(x, layer.weight)  # type: ignore[arg-type]  # a Parameter, of these kinds
        and not (layer._forward_hooks or layer._forward_pre_hooks)
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
    )


def gelu_of(activation: nn.Module) -> str | None:
    """Which GELU an activation is, "none" (exact) or "tanh"; None if it is none."""
    if activation._forward_hooks or activation._forward_pre_hooks:
        return None
    if type(activation) is nn.GELU:
        return str(activation.approximate)
    return "tanh" if type(activation) is GELUTanh else None


def linear(layer: nn.Module, x: Tensor, gelu: str | None = None) -> Tensor:
    """Apply a linear layer, and a GELU if one is named; any layer without one.

    Shape:
        `[..., in]` to `[..., out]`.
    """
    if not fusible(layer, x, nn.Linear):
        x = project(layer, x)
        return x if gelu is None else torch.nn.functional.gelu(x, approximate=gelu)
    assert isinstance(layer, nn.Linear)
    flat = x.reshape(-1, x.shape[-1])
    kind = ("none", "") if gelu is None else ("gelu", gelu)
    out: Tensor = torch.ops.mkldnn._linear_pointwise(flat, layer.weight, layer.bias, kind[0], [], kind[1])
    return out.view(*x.shape[:-1], out.shape[-1])


class FusedMlp(nn.Module):
    """Two projections and an activation; replaces `timm.layers.Mlp`.

    Args:
        old: timm's module, whose layers it takes over.

    Shape:
        `[..., C]` to the same.
    """

    def __init__(self, old: Mlp) -> None:
        super().__init__()
        self.fc1, self.act, self.drop1, self.norm = old.fc1, old.act, old.drop1, old.norm
        self.fc2, self.drop2 = old.fc2, old.drop2

    def forward(self, x: Tensor) -> Tensor:
        """Project, activate, project back."""
        gelu = gelu_of(self.act)
        x = linear(self.fc1, x) if gelu is None else linear(self.fc1, x, gelu)
        x = self.act(x) if gelu is None else x
        return self.drop2(linear(self.fc2, self.norm(self.drop1(x))))
