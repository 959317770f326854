"""Where the families of models have what explanations need: layers, class tokens, and what the head reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from timm.models.deit import VisionTransformerDistilled
from timm.models.maxxvit import MaxxVit
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.swin_transformer_v2_cr import SwinTransformerV2Cr
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import nn

from manyheads.core.errors import UsageError
from manyheads.vision.explain.attention import is_plain
from manyheads.vision.explain.capture import Place
from manyheads.vision.models.cct import CCT
from manyheads.vision.models.cct_layers import EncoderLayer
from manyheads.vision.models.class_tokens import class_rows
from manyheads.vision.models.vim import VisionMamba

Positions = Callable[[int], Sequence[int]]  # of the number of all tokens


def _none(tokens: int) -> Sequence[int]:
    return ()


@dataclass(frozen=True)
class Family:
    """What explanations need to know of a model.

    Args:
        target: The tensor that Grad-CAM explains by default.
        layers: The tensors that it explains by a layer's number.
        blocks: The modules whose attention rollout follows, the first layer's first; none where none is.
        refusal: Why rollout is not offered, where it is not.
        extra: Which tokens are no patches.
        readout: Which tokens' mean the head reads; the patches' by default.
        pooling: The module that scores tokens for the mean that the head reads.
    """

    target: Place
    layers: tuple[Place, ...]
    blocks: tuple[nn.Module, ...] = ()
    refusal: str = ""
    extra: Positions = _none
    readout: Positions | None = None
    pooling: nn.Module | None = None

    def patches(self, tokens: int) -> list[int]:
        """Return which tokens are patches."""
        extra = set(self.extra(tokens))
        return [token for token in range(tokens) if token not in extra]


def family_of(model: nn.Module) -> Family:
    """Tell what explanations need to know of a model.

    Raises:
        UsageError: It is of no family that is known here.
    """
    if isinstance(model, VisionMamba):
        return _vim(model)
    if isinstance(model, CCT):
        return _cct(model)
    if isinstance(model, VisionTransformer | VisionTransformerRelPos):
        return _vit(model)
    if isinstance(model, SwinTransformer | SwinTransformerV2 | SwinTransformerV2Cr):
        return _windows(model.layers if hasattr(model, "layers") else model.stages)
    if isinstance(model, MaxxVit):
        return _windows(model.stages)
    raise UsageError(
        f"{type(model).__name__} is none of ViT, DeiT, CCT, Swin, MaxViT and Vim: take gradcam with the"
        " name of a layer that makes a map"
    )


def _vim(model: VisionMamba) -> Family:
    mixers = tuple(cast(nn.Module, block.mixer) for block in model.layers)
    places = tuple(Place(mixer, "input") for mixer in mixers)  # behind the last, the patches count no more
    names, pool = len(model.class_names), model.global_pool

    def extra(tokens: int) -> Sequence[int]:
        return class_rows(model.class_token, tokens - names)

    readouts: dict[str, Positions | None] = {
        "token": extra,
        "avg": None,
        "last": lambda tokens: (tokens - 1,),
    }
    known = pool in readouts
    return Family(
        target=places[-1],
        layers=places,
        blocks=mixers if known else (),
        refusal="" if known else f"its head pools by {pool!r}",
        extra=extra,
        readout=readouts.get(pool),
    )


def _cct(model: CCT) -> Family:
    classifier = model.classifier
    blocks = [cast(EncoderLayer, block) for block in classifier.blocks]
    pooled = model.global_pool == "seq"
    return Family(
        target=Place(blocks[-1].pre_norm),
        layers=tuple(Place(block.pre_norm) for block in blocks),
        blocks=tuple(block.self_attn for block in blocks) if pooled else (),
        refusal="" if pooled else "its head does not pool",
        pooling=classifier.attention_pool,
    )


def _windows(stages: Any) -> Family:
    places = tuple(Place(block) for stage in stages for block in stage.blocks)
    refusal = "windows see no token outside of themselves, and from a stage to the next the tokens change"
    return Family(target=places[-1], layers=places, refusal=refusal)


def _vit(model: VisionTransformer | VisionTransformerRelPos) -> Family:
    found = [getattr(block, "attn", None) for block in model.blocks]
    refusal, pool = "", str(model.global_pool)
    if not all(map(is_plain, found)):
        refusal = "its attention has more to it than queries and keys"
    elif pool not in ("token", "avg"):
        refusal = f"its head pools by {pool!r}"
    # what enters an attention: behind the last, with a class token, the patches count no more
    places = tuple(
        Place(cast(nn.Module, block if attn is None else attn), "input")
        for block, attn in zip(model.blocks, found, strict=True)
    )
    prefix, classes = model.num_prefix_tokens, 2 if isinstance(model, VisionTransformerDistilled) else 1
    return Family(
        target=places[-1],
        layers=places,
        blocks=() if refusal else tuple(cast(nn.Module, each) for each in found),
        refusal=refusal,
        extra=lambda tokens: range(prefix),
        readout=(lambda tokens: range(classes)) if pool == "token" else None,
    )
