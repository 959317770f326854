"""What a model looks at: attention rollout and Grad-CAM, for models that run fused kernels, and for Vim.

Example:
    >>> heat = explain(model, image)  # [H, W] in 0 to 1
    >>> cat = explain(model, image, "gradcam", target=281)
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core.errors import UsageError
from manyheads.vision.explain.attention import Fusion
from manyheads.vision.explain.capture import Place
from manyheads.vision.explain.families import Family, family_of
from manyheads.vision.explain.gradcam import gradcam_map
from manyheads.vision.explain.rollout import rollout_map

Method = Literal["auto", "rollout", "gradcam"]


def methods_for(model: nn.Module) -> tuple[str, ...]:
    """Return the methods that a model can be explained by, the usual one first.

    Raises:
        UsageError: The model is of no family that is known here.
    """
    return ("rollout", "gradcam") if family_of(model).blocks else ("gradcam",)


def explain(
    model: nn.Module,
    image: Tensor,
    method: Method = "auto",
    target: int | None = None,
    *,
    layer: int | str | None = None,
    fusion: Fusion = "mean",
    discard: float = 0.0,
) -> Tensor:
    """Return what a model looks at in an image.

    Args:
        model: An image model; it is left as it is.
        image: One image, as the model takes it.
        method: "rollout", what reaches the readout, whatever the class; "gradcam", what speaks for a class;
            "auto", rollout where the model has one and no class is asked for.
        target: The class; None for the likeliest.
        layer: Rollout: this layer's map alone, from 1, in place of all layers'. Grad-CAM: the layer, from 1,
            or a module's name, in place of the family's usual one.
        fusion: Rollout: how the heads' maps become one.
        discard: Rollout: the share of each map's lowest weights that is dropped.

    Shape:
        image `[1, C, H, W]`; the result `[H, W]` from 0 to 1, float32.

    Raises:
        UsageError: The model has no such method, class or layer.

    Source:
        Abnar and Zuidema 2020, arXiv 2005.00928; Ali et al. 2024, arXiv 2403.01590; Selvaraju et al. 2017,
        arXiv 1610.02391.
    """
    if image.dim() != 4 or len(image) != 1:
        raise UsageError(f"one image [1, C, H, W] is explained at a time, not {list(image.shape)}")
    if not 0 <= discard < 1:
        raise UsageError(f"discard is a share from 0 to below 1, not {discard}")
    named = isinstance(layer, str)
    family = None if named and method == "gradcam" else family_of(model)
    if method == "auto":
        asked = target is not None or named or not (family and family.blocks)
        method = "gradcam" if asked else "rollout"
    if method == "gradcam":
        heat = gradcam_map(model, _known(model), _place(model, family, layer), image, target)
    else:
        assert family is not None
        heat = rollout_map(model, family, image, _layer(model, family, layer, target), fusion, discard)
        heat = heat - heat.min()
    heat = F.interpolate(heat[None, None], image.shape[-2:], mode="bilinear", align_corners=False)[0, 0]
    highest = heat.max()
    return heat / highest if highest > 0 else heat


def _known(model: nn.Module) -> Family | None:
    try:
        return family_of(model)
    except UsageError:
        return None


def _layer(model: nn.Module, family: Family, layer: int | str | None, target: int | None) -> int | None:
    """Check what rollout is asked for, and return the layer from 0."""
    if not family.blocks:
        raise UsageError(f"no rollout for {type(model).__name__}: {family.refusal}; take gradcam")
    if target is not None:
        raise UsageError("rollout is the same for every class: ask for none, or take gradcam")
    if isinstance(layer, str):
        raise UsageError(f"rollout takes a layer's number from 1 to {len(family.blocks)}, not {layer!r}")
    return None if layer is None else _number(layer, len(family.blocks))


def _number(layer: int, layers: int) -> int:
    if not 1 <= layer <= layers:
        raise UsageError(f"no layer {layer}: the model has {layers}, from 1")
    return layer - 1


def _place(model: nn.Module, family: Family | None, layer: int | str | None) -> Place:
    if isinstance(layer, str):
        try:
            return Place(model.get_submodule(layer))
        except AttributeError:
            raise UsageError(f"the model has no module {layer!r}") from None
    assert family is not None
    return family.target if layer is None else family.layers[_number(layer, len(family.layers))]
