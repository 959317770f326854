"""Where a sequence of patches has its class tokens, and position embeddings that follow another image size.

Vim has its class token in the middle, so a row in the middle of its position embedding is no patch's. The
official code resizes the embedding as if that row were the first ("legacy" here); "middle" is exact.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.core.errors import DataError

ClassToken = Literal["middle", "head", "tail", "double", "none"]
PosResize = Literal["middle", "legacy"]
Grid = tuple[int, int]


def class_rows(class_token: ClassToken, patches: int) -> tuple[int, ...]:
    """Return the rows of the class tokens in a sequence that holds so many patches beside them."""
    rows: dict[ClassToken, tuple[int, ...]] = {
        "middle": (patches // 2,),
        "head": (0,),
        "tail": (patches,),
        "double": (0, patches + 1),
        "none": (),
    }
    return rows[class_token]


def split_rows(x: Tensor, rows: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Take a sequence apart: the patches, and the class tokens at these rows.

    Shape:
        x `[B, M + n, d]` -> `[B, M, d]` and `[B, n, d]`.
    """
    if not rows:
        return x, x[:, :0]
    between = [x[:, before + 1 : after] for before, after in pairwise((-1, *rows, x.shape[1]))]
    patches = between[0] if len(between) == 1 else torch.cat(between, 1)
    return patches, torch.cat([x[:, row : row + 1] for row in rows], 1)


def join_rows(patches: Tensor, extra: Tensor, rows: tuple[int, ...]) -> Tensor:
    """Put a sequence together again: the opposite of `split_rows`."""
    if not rows:
        return patches
    pieces, start = [], 0
    for number, row in enumerate(rows):
        end = row - number  # of the patches that stand before it
        pieces += [patches[:, start:end], extra[:, number : number + 1]]
        start = end
    return torch.cat([*pieces, patches[:, start:]], 1)


def resize_grid(
    rows: Tensor, old: Grid, new: Grid, mode: Literal["bicubic", "bilinear"] = "bicubic"
) -> Tensor:
    """Resize a grid of rows as the official fine-tunings do: Vim's bicubically, CCT's bilinearly.

    Shape:
        rows `[1, old height * old width, d]` -> `[1, new height * new width, d]`.
    """
    image = rows.transpose(1, 2).unflatten(2, old)
    image = image if image.dtype == torch.float64 else image.float()
    resized = F.interpolate(image, size=new, mode=mode, align_corners=False)
    return resized.flatten(2).transpose(1, 2).to(rows.dtype)


def resize_pos_embed(
    pos_embed: Tensor,
    old: Grid,
    new: Grid,
    class_token: ClassToken = "middle",
    pos_resize: PosResize = "middle",
) -> Tensor:
    """Resize a position embedding with its class tokens' rows to another grid of patches.

    Args:
        old, new: Patches from top to bottom and from left to right.
        class_token: Where the class token's row stands, in the old grid as in the new one.
        pos_resize: "middle" leaves out the class tokens' own rows, wherever they are; "legacy" takes the
            first rows for them, as the official code does, which is wrong where they are not.

    Shape:
        pos_embed `[1, old patches + n, d]` -> `[1, new patches + n, d]`, n class tokens.

    Raises:
        DataError: The embedding has another number of rows than the old grid.

    Example:
        >>> at_384 = resize_pos_embed(state["pos_embed"], (14, 14), (24, 24))
    """
    rows_old = class_rows(class_token, old[0] * old[1])
    rows_new = class_rows(class_token, new[0] * new[1])
    if pos_embed.shape[1] != old[0] * old[1] + len(rows_old):
        raise DataError(
            f"a position embedding of {pos_embed.shape[1]} rows is not one of {old[0]} x {old[1]} patches"
            f" and {len(rows_old)} class tokens"
        )
    if old == new:
        return pos_embed
    if pos_resize == "legacy":
        rows_old = rows_new = tuple(range(len(rows_old)))
    patches, extra = split_rows(pos_embed, rows_old)
    return join_rows(resize_grid(patches, old, new), extra, rows_new)


def square_grid(rows: int, class_token: ClassToken) -> Grid:
    """Return the square grid of an embedding of so many rows.

    Raises:
        DataError: The patches are no square: the grid must be said.
    """
    patches = rows - len(class_rows(class_token, 0))
    side = round(max(patches, 0) ** 0.5)
    if side < 1 or side * side != patches:
        raise DataError(f"{patches} patches make no square: say the grid that the weights were trained with")
    return side, side
