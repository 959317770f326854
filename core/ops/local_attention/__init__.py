"""Attention within a band, with a few tokens that see and are seen by all (Longformer's pattern).

Derivations are in README.md beside this file.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.core.dispatch import choose
from manyheads.core.ops.local_attention import plain, reference
from manyheads.core.ops.local_attention.custom_op import local_attention_op

__all__ = ["local_attention"]


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    *,
    global_tokens: int | Tensor = 0,
    global_rows: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attend to the tokens at most `window` away and to the global tokens; these attend to all tokens.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        window: Tokens to each side that a token sees, besides itself (half of Longformer's attention_window).
        global_tokens: How many of the first tokens are global, or the places of those that are: in each row
            different ones, -1 where there are fewer (checked on a CPU, not on a GPU). Every token sees them
            through k and v, once.
        global_rows: What the global tokens get, if they attend in another way than with q, k and v:
            Longformer has projections of their own for them (see `core.layers.local_attention`). None: they
            attend to all real tokens with q, k and v.
        mask: True where a token is real. One that is not takes part as no one's key, is never global, and
            gets zeros.
        scale: Of the products; None means `1 / sqrt(D)`.
        dropout_p: Chance that a weight is set to zero, the others being scaled by `1 / (1 - p)`; given rows
            of global tokens have theirs behind them. It applies whenever it is not zero: pass 0 outside
            training. `torch.manual_seed` decides the draw.

    Shape:
        q, k, v `[B, N, H, D]`; global_tokens, if places, integers `[B, G]`; global_rows `[B, G, H, D]`; mask
        `[B, N]`; the result `[B, N, H, D]`.

    Raises:
        TypeError: The tensors are not of one floating dtype, mask not boolean, places not integers.
        ValueError: A shape or a device is wrong, or `window`, `global_tokens` or `dropout_p` out of range.
        UsageError: The backend that was asked for cannot run this call.

    Source:
        Beltagy et al. 2020, Longformer (arXiv 2004.05150).

    Example:
        >>> q = k = v = torch.randn(2, 1000, 12, 64)
        >>> local_attention(q, k, v, 32, global_tokens=1).shape
        torch.Size([2, 1000, 12, 64])
    """
    _check(q, k, v, window, mask)
    _check_global(q, global_tokens, global_rows)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"local_attention: dropout_p must be in 0 <= p < 1, not {dropout_p}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _run(q, k, v, window, global_tokens, global_rows, mask, scale, dropout_p)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    global_tokens: int | Tensor,
    global_rows: Tensor | None,
    mask: Tensor | None,
    scale: float,
    dropout_p: float,
) -> Tensor:
    features: dict[str, bool | int] = {"head_dim": q.shape[-1], "dropout": dropout_p > 0}
    backend = choose("local_attention", device=q.device.type, dtype=q.dtype, **features).backend
    if backend == "reference":
        return reference.local_attention(
            q, k, v, window, global_tokens=global_tokens, global_rows=global_rows, mask=mask, scale=scale,
            dropout_p=dropout_p,
        )  # fmt: skip
    index = reference.global_index(global_tokens, q, mask)
    if index is not None and global_rows is None:
        global_rows = reference.rows_of_all(q, k, v, index, mask, scale, dropout_p)
    if backend == "torch":
        return plain.local_attention(q, k, v, index, mask, global_rows, window, scale, dropout_p)
    return local_attention_op(q, k, v, index, mask, global_rows, window, scale, backend)[0]


def _check(q: Tensor, k: Tensor, v: Tensor, window: int, mask: Tensor | None) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"local_attention: {name} must be [B, N, H, D], not {list(x.shape)}")
        if x.shape != q.shape or x.device != q.device:
            raise ValueError(
                f"local_attention: q, k and v must have one shape and device; {name} is {list(x.shape)} on "
                f"{x.device}, q is {list(q.shape)} on {q.device}"
            )
        if not x.is_floating_point() or x.dtype != q.dtype:
            raise TypeError(
                f"local_attention: q, k and v must have one floating dtype; {name} is {x.dtype}, q is "
                f"{q.dtype}"
            )
    if q.shape[3] == 0:
        raise ValueError("local_attention: D must be at least 1")
    if window < 0:
        raise ValueError(f"local_attention: window must be at least 0, not {window}")
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"local_attention: mask must be boolean (True takes part), not {mask.dtype}")
    if mask.shape != q.shape[:2] or mask.device != q.device:
        raise ValueError(
            f"local_attention: mask must be [B, N] = {list(q.shape[:2])} on {q.device}, not "
            f"{list(mask.shape)} on {mask.device}"
        )


def _check_places(places: Tensor, tokens: int) -> None:
    for row in places.tolist():
        used = [place for place in row if place != -1]
        if len(set(used)) < len(used) or not all(0 <= place < tokens for place in used):
            raise ValueError(
                f"local_attention: global_tokens must be different places below {tokens}, or -1, not {row}"
            )


def _check_global(q: Tensor, global_tokens: int | Tensor, global_rows: Tensor | None) -> None:
    batch, tokens, heads, dim = q.shape
    if isinstance(global_tokens, Tensor):
        if global_tokens.dtype not in (torch.int32, torch.int64):
            raise TypeError(
                f"local_attention: global_tokens must be a count or int32 or int64, not {global_tokens.dtype}"
            )
        if global_tokens.dim() != 2 or len(global_tokens) != batch or global_tokens.device != q.device:
            raise ValueError(
                f"local_attention: global_tokens must be [B, G] with B = {batch} on {q.device}, not "
                f"{list(global_tokens.shape)} on {global_tokens.device}"
            )
        count = global_tokens.shape[1]
        if global_tokens.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_places(global_tokens, tokens)
    elif not 0 <= global_tokens <= tokens:
        raise ValueError(f"local_attention: global_tokens must be in 0..N = {tokens}, not {global_tokens}")
    else:
        count = global_tokens
    if global_rows is None:
        return
    if global_rows.dtype != q.dtype:
        raise TypeError(f"local_attention: global_rows is {global_rows.dtype}, q is {q.dtype}")
    if global_rows.shape != (batch, count, heads, dim) or global_rows.device != q.device:
        raise ValueError(
            f"local_attention: global_rows must be {[batch, count, heads, dim]} on {q.device}, not "
            f"{list(global_rows.shape)} on {global_rows.device}"
        )
