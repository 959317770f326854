"""The selective state space scan of Mamba-1 (S6): the public functions and their dispatch.

The backward's derivation is in README.md beside this file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.core.dispatch import choose
from manyheads.core.ops import packed
from manyheads.core.ops.selective_scan import reference
from manyheads.core.ops.selective_scan.custom_op import selective_scan_op

__all__ = ["selective_scan", "selective_scan_step"]


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = ...,
    z: Tensor | None = ...,
    delta_bias: Tensor | None = ...,
    delta_softplus: bool = ...,
    reverse: bool = ...,
    initial_state: Tensor | None = ...,
    return_state: Literal[False] = ...,
    cu_seqlens: Tensor | None = ...,
) -> Tensor: ...
@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = ...,
    z: Tensor | None = ...,
    delta_bias: Tensor | None = ...,
    delta_softplus: bool = ...,
    reverse: bool = ...,
    initial_state: Tensor | None = ...,
    return_state: Literal[True],
    cu_seqlens: Tensor | None = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = ...,
    z: Tensor | None = ...,
    delta_bias: Tensor | None = ...,
    delta_softplus: bool = ...,
    reverse: bool = ...,
    initial_state: Tensor | None = ...,
    return_state: bool = ...,
    cu_seqlens: Tensor | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan a diagonal state space whose step size, input and output depend on the input.

    With `dt = softplus(delta + delta_bias)`, or `delta + delta_bias` without `delta_softplus`, and for each
    channel d: `h[n] = exp(dt A[d, n]) h[n] + dt B[n] u`, `y = sum over n of C[n] h[n]`, then `y + D u`, then
    `y silu(z)`.

    Args:
        u, delta, B, C, z: float32, bfloat16 or float16; states and sums are float32. Slices of larger tensors
            are read without a copy. With a float64 tensor among the arguments all is float64, step by step.
        A: Of the continuous system, negative where it decays.
        B, C: Of all channels, or with a group axis each of a share of them.
        reverse: Scan from the last step to the first.
        initial_state: The state before the first step that is scanned; zeros if None.
        return_state: Return the state after the last step that is scanned, too.
        cu_seqlens: Where packed sequences begin and end along L, int32; then the batch is 1, and the states'
            first axis is the sequences'. On a GPU its values are not checked.

    Shape:
        u, delta, z, y: `[B, L, D]`; A: `[D, N]`; B, C: `[B, L, N]`, or `[B, L, G, N]` with G dividing D; D,
        delta_bias: `[D]`; states: `[B, D, N]`; cu_seqlens: `[S + 1]`, with states `[S, D, N]`.

    Returns:
        y, in u's dtype; with `return_state` also the last state, float32.

    Raises:
        TypeError: A tensor is not floating point, or cu_seqlens is not int32.
        ValueError: Shapes do not fit.
        UsageError: The backend that was asked for cannot run this call.

    Source:
        Gu and Dao 2023, arXiv 2312.00752.

    Example:
        >>> y, state = selective_scan(u, delta, -A_log.exp(), B, C, delta_softplus=True, return_state=True)
    """
    _check(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens)
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    options: Any = {"cu_seqlens": cu_seqlens, "delta_softplus": delta_softplus, "reverse": reverse}
    if B.ndim == 4:
        found = [_scan(*group, **options) for group in _groups(*tensors)]
        y, last = torch.cat([part[0] for part in found], 2), torch.cat([part[1] for part in found], 1)
    else:
        y, last = _scan(*tensors, **options)
    return (y, last) if return_state else y


def selective_scan_step(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """One step of `selective_scan`, in plain torch.

    Args:
        state: float32 (or float64), as the scan returns it; it is not changed.
        u, delta, A, B, C, D, z, delta_bias, delta_softplus: As `selective_scan`, without the time axis.

    Shape:
        state: `[B, D, N]`; u, delta, z, y: `[B, D]`; A: `[D, N]`; B, C: `[B, N]`; D, delta_bias: `[D]`.

    Returns:
        y, in u's dtype, and the next state.

    Raises:
        ValueError: Shapes do not fit.

    Source:
        Gu and Dao 2023, arXiv 2312.00752.
    """
    if state.shape != (u.shape[0], *A.shape):
        raise ValueError(
            f"selective_scan_step: state must be {[u.shape[0], *A.shape]}, not {tuple(state.shape)}"
        )
    steps = [None if x is None else x[:, None] for x in (u, delta, B, C, z)]
    _check(steps[0], steps[1], A, steps[2], steps[3], D, steps[4], delta_bias, state, None)  # type: ignore[arg-type]
    wide = torch.float64 if torch.float64 in (u.dtype, state.dtype) else torch.float32
    dt = delta.to(wide) if delta_bias is None else delta.to(wide) + delta_bias.to(wide)
    if delta_softplus:
        dt = F.softplus(dt)
    state = torch.exp(dt[..., None] * A.to(wide)) * state.to(wide)
    state = state + (dt * u.to(wide))[..., None] * B.to(wide)[:, None]
    y = torch.matmul(state, C.to(wide)[..., None])[..., 0]
    if D is not None:
        y = y + D.to(wide) * u.to(wide)
    if z is not None:
        y = y * F.silu(z.to(wide))
    return y.to(u.dtype), state


def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    *,
    cu_seqlens: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    given = [x for x in (u, delta, A, B, C, D, z, delta_bias, initial_state) if x is not None]
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in given) else u.dtype
    # In words: torch.compile, for which sizes may be symbols, takes these for constants.
    states = "many" if A.shape[1] > 256 else "few"
    backend = choose("selective_scan", device=u.device.type, dtype=dtype, states=states).backend
    if backend == "reference":
        y, last = reference.selective_scan(
            u, delta, A, B, C, D=D, z=z, delta_bias=delta_bias, delta_softplus=delta_softplus,
            reverse=reverse, initial_state=initial_state, return_state=True, cu_seqlens=cu_seqlens,
        )  # fmt: skip
        return y, last
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    y, last, _ = selective_scan_op(
        u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, reverse,
        backend, learns,
    )  # fmt: skip
    return y, last


def _groups(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
) -> Iterator[tuple[Any, ...]]:
    """The arguments of each group: its share of the channels, and its own B and C."""
    share = u.shape[2] // B.shape[2]
    for group in range(B.shape[2]):
        channels = slice(group * share, (group + 1) * share)
        D_, bias = (None if x is None else x[channels] for x in (D, delta_bias))
        z_ = None if z is None else z[..., channels]
        state = None if initial_state is None else initial_state[:, channels]
        rows = (u[..., channels], delta[..., channels], A[channels], B[:, :, group], C[:, :, group])
        yield *rows, D_, z_, bias, state


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    if u.ndim != 3 or A.ndim != 2:
        raise ValueError(
            f"selective_scan: u must be [B, L, D] and A [D, N], not {tuple(u.shape)} and {tuple(A.shape)}"
        )
    batch, length, d = u.shape
    n = A.shape[1]
    sequences = batch
    if cu_seqlens is not None:
        packed.check("selective_scan", cu_seqlens, length, batch=batch)
        sequences = cu_seqlens.shape[0] - 1
    grouped = (B.shape[2],) if B.ndim == 4 else ()
    if grouped and (grouped[0] == 0 or d % grouped[0]):
        raise ValueError(f"selective_scan: the {grouped[0]} groups of B do not divide the {d} channels")
    rows, inputs = (batch, length, d), (batch, length, *grouped, n)
    for name, x, shape in (
        ("u", u, rows),
        ("delta", delta, rows),
        ("A", A, (d, n)),
        ("B", B, inputs),
        ("C", C, inputs),
        ("D", D, (d,)),
        ("z", z, rows),
        ("delta_bias", delta_bias, (d,)),
        ("initial_state", initial_state, (sequences, d, n)),
    ):
        if x is None:
            continue
        if not x.is_floating_point():
            raise TypeError(f"selective_scan: {name} must be floating point, not {x.dtype}")
        if tuple(x.shape) != shape:
            raise ValueError(f"selective_scan: {name} must be {list(shape)}, not {list(x.shape)}")
