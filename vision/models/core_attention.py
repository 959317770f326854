"""Our attention in timm's models: `with_core_attention` puts it in place of timm's, module by module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from timm.layers import Attention, Mlp
from timm.models import maxxvit, swin_transformer, swin_transformer_v2, swin_transformer_v2_cr
from timm.models.vision_transformer import ParallelScalingBlock
from timm.models.vision_transformer_relpos import RelPosAttention
from torch import nn

from manyheads.core.errors import UsageError
from manyheads.vision.models.linear import FusedMlp
from manyheads.vision.models.maxvit_blocks import (
    ImageAttention,
    ParallelPartitionAttention,
    PartitionAttention,
)
from manyheads.vision.models.mbconv import FoldedMbConv
from manyheads.vision.models.swin_blocks import SwinBlock
from manyheads.vision.models.vit_attention import ParallelBlock, RelativeAttention, SelfAttention

REPLACEMENTS: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    Attention: SelfAttention,
    ParallelScalingBlock: ParallelBlock,
    RelPosAttention: RelativeAttention,
    swin_transformer.SwinTransformerBlock: SwinBlock,
    swin_transformer_v2.SwinTransformerV2Block: SwinBlock,
    swin_transformer_v2_cr.SwinTransformerV2CrBlock: SwinBlock,
    maxxvit.PartitionAttentionCl: PartitionAttention,
    maxxvit.PartitionAttention2d: PartitionAttention,
    maxxvit.ParallelPartitionAttention: ParallelPartitionAttention,
    maxxvit.Attention2d: ImageAttention,
}
OURS = tuple(dict.fromkeys(REPLACEMENTS.values()))
BESIDE: dict[type[nn.Module], Callable[[Any], nn.Module]] = {Mlp: FusedMlp, maxxvit.MbConvBlock: FoldedMbConv}


def with_core_attention(model: nn.Module) -> nn.Module:
    """Put our attention in place of timm's, in the model itself, and return it.

    Parameters, their names, state dicts and results stay what they were; timm's own methods (features,
    `reset_classifier`, `set_input_size`, gradient checkpointing) work as before. `model.core_attention` is
    the number of our attention modules in it. MLPs and MBConv blocks are replaced beside them, for inference
    on a CPU. Call it before hooks are set on attention modules and before compiling.
    What is not self-attention, such as the pooling head of SigLIP, and differential attention stay timm's.

    Args:
        model: Any model of timm with ViT's, Swin's or MaxViT's attention, or one that contains such a model.

    Raises:
        UsageError: There is nothing to replace.

    Example:
        >>> import timm
        >>> with_core_attention(timm.create_model("swin_tiny_patch4_window7_224")).core_attention
        12
    """
    if not replace_attention(model):
        raise UsageError(
            f"{type(model).__name__} has no attention of timm's ViT, Swin, MaxViT or CoAtNet to replace"
        )
    return model


def replace_attention(model: nn.Module) -> int:
    """Replace what can be replaced; return, and note as `model.core_attention`, how many modules are ours."""
    _replace(model, REPLACEMENTS, {})
    if not any(isinstance(module, OURS) for module in model.modules()):  # type: ignore[arg-type]
        model.core_attention = 0  # type: ignore[assignment]
        return 0
    _replace(model, BESIDE, {})
    count = sum(isinstance(module, OURS) for module in model.modules())  # type: ignore[arg-type]
    model.core_attention = count  # type: ignore[assignment]
    return count


def _replace(
    module: nn.Module,
    table: Mapping[type[nn.Module], Callable[[Any], nn.Module]],
    done: dict[nn.Module, nn.Module],
) -> None:
    """Replace a module's children, and theirs; a module that stands in two places is replaced once."""
    for name, child in list(module._modules.items()):
        if child is None:
            continue
        make = table.get(type(child))
        if make is None:
            if table is BESIDE or not isinstance(child, OURS):  # type: ignore[arg-type]  # `attn` stays timm's
                _replace(child, table, done)
            continue
        if child not in done:
            done[child] = make(child)
            done[child].training = child.training  # its layers keep their own modes
        setattr(module, name, done[child])
