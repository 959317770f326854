"""The public operations. Layout: B batch, N tokens, H heads, D head dim, L length; docs give shapes."""

from manyheads.core.ops.attention import attention
from manyheads.core.ops.depthwise_conv1d import depthwise_conv1d, depthwise_conv1d_step
from manyheads.core.ops.norm import crms_norm, layer_norm, rms_norm

__all__ = [
    "attention",
    "crms_norm",
    "depthwise_conv1d",
    "depthwise_conv1d_step",
    "layer_norm",
    "rms_norm",
]
