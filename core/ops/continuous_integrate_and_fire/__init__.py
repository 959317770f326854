"""Continuous integrate-and-fire: frames with weights, added up until the weights reach a threshold: a token.

README.md beside this file says how the frames' shares are found without a loop.
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor

from manyheads.core.dispatch import choose
from manyheads.core.ops.continuous_integrate_and_fire import pieces, reference
from manyheads.core.ops.continuous_integrate_and_fire.reference import Fired, FireState

__all__ = ["FireState", "Fired", "continuous_integrate_and_fire"]

OP = "continuous_integrate_and_fire"


def continuous_integrate_and_fire(
    hidden: Tensor,
    alpha: Tensor,
    *,
    threshold: float = 1.0,
    lengths: Tensor | None = None,
    tail: float | None = None,
    max_tokens: int | None = None,
    state: FireState | None = None,
    return_state: bool = False,
) -> Fired:
    """Cut the frames, weighted by alpha and laid end to end, into tokens of weight `threshold` each.

    Where a token ends inside a frame, the frame's weight is divided between it and the next; a weight of
    several thresholds ends several tokens. What is left at the end makes no token.

    Positions are float64 sums. A sum that misses a multiple of the threshold by less than a millionth of
    itself has reached it: weights that were scaled in float32 to add up to a number of tokens give that many.

    Args:
        hidden: Frames.
        alpha: Their weights, not negative. One that is NaN or infinite makes its row NaN.
        threshold: Weight of a token.
        lengths: Frames of each row; later ones do not count, whatever they hold. None means all.
        tail: Weight of one more frame, of zeros, after each row's last (Paraformer's `tail_threshold`).
        max_tokens: Size of the result's token axis, without a look at the weights (which on a GPU waits for
            them); tokens beyond it are dropped. None is the most that a row fires.
        state: What is left of the frames before these; None at the start.
        return_state: Return what is left, for the next call. A row's state ends at its length.

    Shape:
        hidden `[B, T, D]`; alpha `[B, T]`; lengths `[B]`; tokens `[B, N, D]`; counts `[B]`; fires `[B, T]`,
        or `[B, T + 1]` with a tail.

    Returns:
        `Fired(tokens, counts, fires, state)`: the tokens, zero from a row's count on; how many fired
        (max_tokens does not cut the count); after each frame the weight since the last token's end, plus the
        threshold where a token ended; the state, if asked for.

    Raises:
        TypeError: hidden or alpha is not floating point, lengths not whole numbers.
        ValueError: A shape or number is wrong.
        UsageError: The backend that was asked for cannot run this call.

    Source:
        Dong and Xu 2020 (arXiv 1905.11235); in parallel, with the tail: Gao et al. 2022 (arXiv 2206.08317).

    Example:
        >>> hidden = torch.tensor([[[1.0], [10.0], [100.0]]])
        >>> continuous_integrate_and_fire(hidden, torch.tensor([[0.5, 0.75, 0.75]])).tokens
        tensor([[[ 5.5000],
                 [77.5000]]])
    """
    _check(hidden, alpha, threshold, lengths, tail, max_tokens, state)
    return _module(hidden, alpha, state).continuous_integrate_and_fire(
        hidden, alpha, threshold=threshold, lengths=lengths, tail=tail, max_tokens=max_tokens, state=state,
        return_state=return_state,
    )  # fmt: skip


def _module(hidden: Tensor, alpha: Tensor, state: FireState | None) -> ModuleType:
    """The backend's."""
    given = (hidden, alpha) if state is None else (hidden, alpha, *state)
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    learns = learns or torch.compiler.is_compiling()
    backend = choose(OP, device=hidden.device.type, dtype=hidden.dtype, learns=learns).backend
    if backend == "numba":
        from manyheads.core.ops.continuous_integrate_and_fire import numba

        return numba
    return reference if backend == "reference" else pieces


def _check(
    hidden: Tensor,
    alpha: Tensor,
    threshold: float,
    lengths: Tensor | None,
    tail: float | None,
    max_tokens: int | None,
    state: FireState | None,
) -> None:
    for name, x in (("hidden", hidden), ("alpha", alpha)):
        if not x.is_floating_point():
            raise TypeError(f"{OP}: {name} must be floating point, not {x.dtype}")
    if hidden.ndim != 3 or 0 in hidden.shape[1:]:
        raise ValueError(f"{OP}: hidden must be [B, T, D] with T and D > 0, not {tuple(hidden.shape)}")
    batch, _, dim = hidden.shape
    if alpha.shape != hidden.shape[:2]:
        raise ValueError(f"{OP}: alpha must be {list(hidden.shape[:2])}, as hidden, not {list(alpha.shape)}")
    if not 0 < threshold < math.inf:
        raise ValueError(f"{OP}: threshold must be positive and finite, not {threshold}")
    if tail is not None and not 0 <= tail < math.inf:
        raise ValueError(f"{OP}: tail must be finite and not negative, not {tail}")
    if max_tokens is not None and max_tokens < 0:
        raise ValueError(f"{OP}: max_tokens must not be negative, and is {max_tokens}")
    if lengths is not None and (lengths.is_floating_point() or lengths.dtype == torch.bool):
        raise TypeError(f"{OP}: lengths must be whole numbers, not {lengths.dtype}")
    if lengths is not None and lengths.shape != (batch,):
        raise ValueError(f"{OP}: lengths must be [{batch}], not {list(lengths.shape)}")
    if state is not None and (state.partial.shape != (batch, dim) or state.total.shape != (batch,)):
        raise ValueError(
            f"{OP}: state must be of [{batch}, {dim}] and [{batch}], not {list(state.partial.shape)} and "
            f"{list(state.total.shape)}"
        )
