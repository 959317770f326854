"""Which backend a call of `fft_conv` gets, and why."""

from __future__ import annotations

from manyheads.core.dispatch import Call, Candidate


def fft_conv(call: Call) -> list[Candidate]:
    """List the backends of `fft_conv`, best first."""
    return [
        Candidate("torch", "torch's transforms are the fast ones, and six of them do forward and backward"),
        Candidate("reference", "the plain sum over lags"),
    ]
