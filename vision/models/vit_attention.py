"""The attention of timm's vision transformers on our op: modules that take timm's layers over by their names.

Each is made from the timm module that it replaces and keeps that module's layers under their names, so that
state dicts, optimizers and weight decay groups do not notice.
"""

from __future__ import annotations

import torch
from timm.layers import Attention
from timm.models.vision_transformer import ParallelScalingBlock
from timm.models.vision_transformer_relpos import RelPosAttention
from torch import Tensor, nn

from manyheads.core.ops import attention
from manyheads.vision.models.linear import linear
from manyheads.vision.models.windows import dropout_of


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout_p: float) -> Tensor:
    """Attend as `scaled_dot_product_attention` would; a mask is boolean (True takes part) or added."""
    q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast a norm of q and k gives float32
    boolean = mask is not None and mask.dtype == torch.bool
    return attention(
        q,
        k,
        v,
        bias=None if boolean else mask,
        mask=mask if boolean else None,
        causal=causal,
        dropout_p=dropout_p,
    )


class SelfAttention(nn.Module):
    """Self-attention over tokens; replaces `timm.layers.Attention`.

    Args:
        old: timm's module, whose layers it takes over.

    Shape:
        `[B, N, C]` to `[B, N, C]`.
    """

    def __init__(self, old: Attention) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = old.num_heads, old.head_dim, old.attn_dim
        self.scale = old.scale
        self.qkv, self.q_norm, self.k_norm = old.qkv, old.q_norm, old.k_norm
        self.attn_drop, self.norm, self.gate = old.attn_drop, old.norm, old.gate
        self.proj, self.proj_drop = old.proj, old.proj_drop

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend; the mask is boolean (True takes part) or added to the scores."""
        q, k, v = (
            linear(self.qkv, x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)
        )  # [B, N, H, D]
        q, k = self.q_norm(q), self.k_norm(k)
        out = self.norm(attend(q, k, v, attn_mask, is_causal, dropout_of(self.attn_drop)).flatten(2))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(linear(self.proj, out))


class RelativeAttention(nn.Module):
    """Self-attention with a bias of relative positions; replaces timm's `RelPosAttention`.

    Args:
        old: timm's module, whose layers it takes over.

    Shape:
        `[B, N, C]` to `[B, N, C]`.
    """

    def __init__(self, old: RelPosAttention) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scale = old.num_heads, old.head_dim, old.scale
        self.qkv, self.q_norm, self.k_norm = old.qkv, old.q_norm, old.k_norm
        self.rel_pos, self.attn_drop = old.rel_pos, old.attn_drop
        self.proj, self.proj_drop = old.proj, old.proj_drop

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """Attend with this layer's bias, or with one that layers share."""
        q, k, v = (
            linear(self.qkv, x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)
        )  # [B, N, H, D]
        q, k = self.q_norm(q), self.k_norm(k)
        bias = shared_rel_pos if self.rel_pos is None else self.rel_pos.get_bias()
        out = attend(q, k, v, bias, False, dropout_of(self.attn_drop)).flatten(2)
        return self.proj_drop(linear(self.proj, out))


class ParallelBlock(nn.Module):
    """Attention and MLP side by side on one projection; replaces timm's `ParallelScalingBlock`.

    Args:
        old: timm's block, whose layers it takes over.

    Shape:
        `[B, N, C]` to `[B, N, C]`.

    Source:
        Dehghani et al. 2023 (ViT-22B, arXiv 2302.05442).
    """

    def __init__(self, old: ParallelScalingBlock) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scale = old.num_heads, old.head_dim, old.scale
        self.in_split, self.mlp_bias = old.in_split, old.mlp_bias
        self.in_norm, self.in_proj, self.q_norm, self.k_norm = (
            old.in_norm,
            old.in_proj,
            old.q_norm,
            old.k_norm,
        )
        self.attn_drop, self.mlp_drop, self.mlp_act = old.attn_drop, old.mlp_drop, old.mlp_act
        self.out_proj, self.attn_out_proj = old.out_proj, old.attn_out_proj
        self.mlp_out_proj, self.ls, self.drop_path = old.mlp_out_proj, old.ls, old.drop_path

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Add what attention and MLP make of x to x."""
        mlp, *qkv = torch.split(linear(self.in_proj, self.in_norm(x)), self.in_split, dim=-1)
        if self.mlp_bias is not None:
            mlp = mlp + self.mlp_bias
        q, k, v = (each.unflatten(-1, (self.num_heads, self.head_dim)) for each in qkv)
        q, k = self.q_norm(q), self.k_norm(k)
        out = attend(q, k, v, attn_mask, is_causal, dropout_of(self.attn_drop)).flatten(2)
        mlp = self.mlp_drop(self.mlp_act(mlp))
        if self.out_proj is not None:
            found = linear(self.out_proj, torch.cat((out, mlp), dim=-1))
        else:
            found = linear(self.attn_out_proj, out) + linear(self.mlp_out_proj, mlp)
        return x + self.drop_path(self.ls(found))
