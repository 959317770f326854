"""Which backend a call of `depthwise_conv1d` gets, and why."""

from __future__ import annotations

from manyheads.core.dispatch import Call, Candidate, numba_blocked, triton_blocked


def depthwise_conv1d(call: Call) -> list[Candidate]:
    """List the backends of `depthwise_conv1d`, best first."""
    return [
        Candidate(
            "numba", "one pass over the tokens each way, activation and states included", numba_blocked(call)
        ),
        Candidate("torch", "torch's convolution reads [B, L, D] as an image with its channels last"),
        Candidate("reference", "the plain sum over taps"),
    ]
