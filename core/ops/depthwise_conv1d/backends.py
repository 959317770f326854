"""Which backend a call of `depthwise_conv1d` gets, and why."""

from __future__ import annotations

from manyheads.core.dispatch import Call, Candidate, numba_blocked


def depthwise_conv1d(call: Call) -> list[Candidate]:
    """List the backends of `depthwise_conv1d`, best first."""
    small = call.features.get("size") == "small"
    loops = Candidate(
        "numba", "one pass over the tokens each way, activation and states included", numba_blocked(call)
    )
    why = "too little work for an op of our own" if small else "no compiled loop takes this call"
    composed = Candidate("torch", f"{why}: torch's convolution, [B, L, D] read as an image")
    return [
        *([composed, loops] if small else [loops, composed]),
        Candidate("reference", "the plain sum over taps"),
    ]
