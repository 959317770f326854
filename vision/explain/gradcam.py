"""Grad-CAM: where a layer's activations speak for a class.

Source: Selvaraju et al. 2017 (arXiv 1610.02391), equations 1 and 2. It needs activations and gradients
alone, so that every kernel stays as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from manyheads.core.errors import UsageError
from manyheads.vision.explain.capture import Place, evaluating, grids, reached, watched
from manyheads.vision.explain.families import Family


def gradcam_map(
    model: nn.Module, family: Family | None, place: Place, image: Tensor, target: int | None
) -> Tensor:
    """Return where a place's activations speak for a class.

    Args:
        family: Says which tokens are no patches; None for a model that makes maps.
        target: The class; None for the likeliest.

    Shape:
        image `[1, C, H, W]`; the result `[h, w]`, not below zero.

    Raises:
        UsageError: No such class, or the place holds no map and no patches.
    """
    with evaluating(model), torch.enable_grad(), watched([place], detach=True) as found, grids(model) as maps:
        logits = model(image)
        classes = logits.shape[-1]
        if target is not None and not 0 <= target < classes:
            raise UsageError(f"no class {target}: the model has {classes}, from 0")
        (activation,) = reached(found)
        score = logits[0, logits[0].argmax() if target is None else target]
        (gradient,) = torch.autograd.grad(score, activation, allow_unused=True)
    if gradient is None:
        raise UsageError("the classes do not depend on that layer")
    if activation.dim() == 4:
        if _channels_last(activation, image, model):
            activation, gradient = activation.permute(0, 3, 1, 2), gradient.permute(0, 3, 1, 2)
        value, slope = activation[0].float(), gradient[0].float()  # [C, h, w]
    elif activation.dim() == 3 and len(activation) == 1:
        tokens = activation.shape[1]
        kept = list(range(tokens)) if family is None else family.patches(tokens)
        grid = next((each for each in reversed(maps) if each[0] * each[1] == len(kept)), None)
        if grid is None:
            raise UsageError(f"that layer's {len(kept)} tokens are not the patches of the image")
        value, slope = (each[0, kept].float().T.unflatten(1, grid) for each in (activation, gradient))
    else:
        raise UsageError(f"that layer makes no map and no tokens: {list(activation.shape)}")
    return torch.relu((slope.mean((1, 2), keepdim=True) * value).sum(0)).detach()


def _channels_last(activation: Tensor, image: Tensor, model: nn.Module) -> bool:
    """Tell where a map `[1, ., ., .]` has its channels: its sides are in the ratio of the image's."""
    height, width = image.shape[-2:]

    def fits(h: int, w: int) -> bool:  # to a cell
        return abs(h * width - w * height) <= max(height, width)

    _, a, b, c = activation.shape
    if fits(a, b) and fits(b, c):
        return getattr(model, "output_fmt", "NCHW") == "NHWC"
    return fits(a, b)
