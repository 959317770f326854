"""Attention rollout: how much of each patch reaches the readout, through all layers or in one.

Source: Abnar and Zuidema 2020 (arXiv 2005.00928): residual connections are half of each layer, and the maps
of the layers multiply. Vim's are those of `hidden` (Ali et al. 2024, arXiv 2403.01590).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from manyheads.core.layers.mamba import BidirectionalMamba, Mamba
from manyheads.vision.explain import attention, hidden
from manyheads.vision.explain.attention import Fusion
from manyheads.vision.explain.capture import Place, run
from manyheads.vision.explain.families import Family


def rollout(layers: Iterable[Tensor]) -> Tensor:
    """Multiply the maps of layers, each with its residual connection.

    Args:
        layers: The maps, the first layer's first; one is held at a time.

    Shape:
        each map `[N, N]`, rows that sum to 1; so does the result.
    """
    total: Tensor | None = None
    for weights in layers:
        mixed = (weights + torch.eye(len(weights), device=weights.device)) / 2
        total = mixed if total is None else mixed @ total
    assert total is not None, "rollout needs a layer"
    return total


def drop_lowest(weights: Tensor, ratio: float, kept: Sequence[int]) -> Tensor:
    """Set the lowest weights of a map to zero, and let its rows sum to 1 again.

    Args:
        ratio: Which share of the map's weights goes.
        kept: Columns of tokens that are no patches: they stay.
    """
    patches = torch.ones(len(weights), dtype=torch.bool, device=weights.device)
    patches[list(kept)] = False
    ordered = weights[:, patches].flatten().sort().values
    count = int(ratio * len(ordered))
    if count:
        weights = weights.masked_fill((weights < ordered[count]) & patches, 0.0)
    return weights / weights.sum(1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)


def rollout_map(
    model: torch.nn.Module, family: Family, image: Tensor, layer: int | None, fusion: Fusion, discard: float
) -> Tensor:
    """Return what the readout takes of each patch.

    Args:
        layer: One layer's map, from 0, in place of all layers' rollout.

    Shape:
        image `[1, C, H, W]`; the result `[h, w]`, the patches' grid.
    """
    chosen = family.blocks if layer is None else family.blocks[layer : layer + 1]
    places = [Place(block, "input") for block in chosen]
    if family.pooling is not None:
        places.append(Place(family.pooling, "output"))
    found, grid = run(model, image, places)
    tokens = found[0].shape[1]
    extra, patches = family.extra(tokens), family.patches(tokens)

    def maps() -> Iterator[Tensor]:
        with torch.no_grad():
            for block, x in zip(chosen, found, strict=False):  # the pooling is no block
                if isinstance(block, BidirectionalMamba | Mamba):
                    weights = hidden.weights(block, x)
                else:
                    weights = attention.fuse(attention.weights(block, x), fusion)[0]
                yield drop_lowest(weights, discard, extra)

    flow = rollout(maps()) if layer is None else next(maps())
    if family.pooling is not None:
        readout = torch.softmax(found[-1].float().flatten(), 0)
    else:
        read = list(patches if family.readout is None else family.readout(tokens))
        readout = torch.zeros(tokens, device=flow.device)
        readout[read] = 1 / len(read)
    return (readout @ flow)[patches].reshape(grid)
