"""Which backend a call of `depthwise_conv1d` gets, and why."""

from __future__ import annotations

from manyheads.core.dispatch import (
    HALF_OR_SINGLE,
    Call,
    Candidate,
    cpu_blocked,
    name_of,
    numba_blocked,
    triton_blocked,
)


def depthwise_conv1d(call: Call) -> list[Candidate]:
    """List the backends of `depthwise_conv1d`, best first."""
    composed = cpu_blocked(call)
    if not composed and call.dtype not in HALF_OR_SINGLE:
        composed = f"its sums are float32, and the tensors are {name_of(call.dtype)}"
    return [
        Candidate("triton", "any width in one trip to memory, packed or not", triton_blocked(call)),
        Candidate("numba", "one pass over the tokens each way, states included", numba_blocked(call)),
        Candidate("cpu", "torch's convolution, [B, L, D] read as an image", composed),
        Candidate("reference", "no faster path takes this call: the plain sum over taps"),
    ]
