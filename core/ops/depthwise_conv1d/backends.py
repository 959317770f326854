"""Which backend a call of `depthwise_conv1d` gets, and why."""

from __future__ import annotations

from manyheads.core.dispatch import Call, Candidate


def depthwise_conv1d(call: Call) -> list[Candidate]:
    """List the backends of `depthwise_conv1d`, best first."""
    return [
        Candidate("torch", "torch's convolution reads [B, L, D] as an image with its channels last"),
        Candidate("reference", "the plain sum over taps"),
    ]
