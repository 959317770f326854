"""The public operations. Layout: B batch, N tokens, H heads, D head dim, L length; docs give shapes."""

from manyheads.core.ops.attention import attention
from manyheads.core.ops.auto_correlation import auto_correlation
from manyheads.core.ops.continuous_integrate_and_fire import (
    Fired,
    FireState,
    continuous_integrate_and_fire,
)
from manyheads.core.ops.decay_attention import decay_attention, decay_attention_step
from manyheads.core.ops.delta_rule import delta_rule, delta_rule_step
from manyheads.core.ops.depthwise_conv1d import depthwise_conv1d, depthwise_conv1d_step
from manyheads.core.ops.fft_conv import fft_conv
from manyheads.core.ops.flow_attention import flow_attention
from manyheads.core.ops.gated_attention_unit import gated_attention_unit
from manyheads.core.ops.linear_attention import LinearState, linear_attention, linear_attention_step
from manyheads.core.ops.local_attention import local_attention
from manyheads.core.ops.norm import crms_norm, layer_norm, rms_norm
from manyheads.core.ops.prob_sparse_attention import prob_sparse_attention
from manyheads.core.ops.segment_attention import EdgeOrder, edge_order, segment_attention
from manyheads.core.ops.selective_scan import selective_scan, selective_scan_step
from manyheads.core.ops.varlen_attention import varlen_attention
from manyheads.core.ops.window_attention import window_attention

__all__ = [
    "EdgeOrder",
    "FireState",
    "Fired",
    "LinearState",
    "attention",
    "auto_correlation",
    "continuous_integrate_and_fire",
    "crms_norm",
    "decay_attention",
    "decay_attention_step",
    "delta_rule",
    "delta_rule_step",
    "depthwise_conv1d",
    "depthwise_conv1d_step",
    "edge_order",
    "fft_conv",
    "flow_attention",
    "gated_attention_unit",
    "layer_norm",
    "linear_attention",
    "linear_attention_step",
    "local_attention",
    "prob_sparse_attention",
    "rms_norm",
    "segment_attention",
    "selective_scan",
    "selective_scan_step",
    "varlen_attention",
    "window_attention",
]
