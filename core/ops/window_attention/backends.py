"""Which backend a call of `window_attention` gets, and why."""

from __future__ import annotations

import torch

from manyheads.core.dispatch import (
    HALF_OR_SINGLE,
    Call,
    Candidate,
    cpu_blocked,
    name_of,
    numba_blocked,
    triton_blocked,
)


def window_attention(call: Call) -> list[Candidate]:
    """List the backends of `window_attention`, best first."""
    kernel = triton_blocked(call)
    single = call.dtype == torch.float32
    if not kernel and call.features.get("head") in (("wide", "widest") if single else ("widest",)):
        widest = 128 if single else 256  # wider tiles do not fit the registers
        kernel = f"the {name_of(call.dtype)} kernels take a head dim of at most {widest}"
    blocks = cpu_blocked(call)
    if not blocks and call.dtype not in HALF_OR_SINGLE:
        blocks = f"it computes in float32, and the tensors are {name_of(call.dtype)}"
    return [
        Candidate("triton", "windows are read from the image as it lies, without copies", kernel),
        Candidate("numba", "compiled gathers and softmax between torch's products", numba_blocked(call)),
        Candidate("cpu", "a few windows at a time, gathered once, in the cache", blocks),
        Candidate("reference", "no faster path takes this call: the plain formula"),
    ]
