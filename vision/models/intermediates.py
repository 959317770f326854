"""Maps from the middle of a model, in the forms that timm's `forward_intermediates` gives them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Literal, cast

from timm.models._features import feature_take_indices
from torch import Tensor

Layout = Literal["NCHW", "NLC"]
Intermediates = (
    list[Tensor]
    | list[tuple[Tensor, Tensor]]
    | tuple[Tensor, list[Tensor] | list[tuple[Tensor, Tensor]]]
    | dict[str, Tensor | list[Tensor]]
)


def wanted(depth: int, indices: int | list[int] | None) -> tuple[Collection[int], int]:
    """Return which blocks' maps are wanted, and the last of them: the last n if a number, all if None."""
    return cast("tuple[Collection[int], int]", feature_take_indices(depth, indices))


def arranged(maps: list[Tensor], grid: tuple[int, int], output_fmt: Layout) -> list[Tensor]:
    """Lay sequences of patches `[B, M, d]` out as images `[B, d, H, W]`, where asked.

    Raises:
        ValueError: No such format.
    """
    if output_fmt not in ("NCHW", "NLC"):
        raise ValueError(f"output_fmt must be NCHW or NLC, not {output_fmt!r}")
    if output_fmt == "NLC":
        return maps
    return [x.transpose(1, 2).unflatten(2, grid).contiguous() for x in maps]


def packed(
    final: Callable[[], Tensor],
    maps: list[Tensor],
    prefix: list[Tensor] | None,
    *,
    only: bool,
    as_dict: bool,
) -> Intermediates:
    """Return the maps, with the class tokens beside them and the model's last features where asked.

    Args:
        final: Computes the last features; called only where they are wanted.
        maps: One each wanted block.
        prefix: The class tokens of each, where asked for.
        only: Leave the last features out.
        as_dict: By name.
    """
    if as_dict:
        found: dict[str, Tensor | list[Tensor]] = {"image_intermediates": maps}
        if prefix is not None:
            found["image_intermediates_prefix"] = prefix
        if not only:
            found["image_features"] = final()
        return found
    pairs = maps if prefix is None else list(zip(maps, prefix, strict=True))
    return pairs if only else (final(), pairs)
