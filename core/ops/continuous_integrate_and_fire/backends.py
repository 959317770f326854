"""Which backend a call of continuous integrate-and-fire gets, and why."""

from __future__ import annotations

from manyheads.core.dispatch import Call, Candidate


def continuous_integrate_and_fire(call: Call) -> list[Candidate]:
    """List the backends of `continuous_integrate_and_fire`, best first."""
    return [
        Candidate("torch", "all tokens at once, as weighted sums over consecutive frames"),
        Candidate("reference", "frame by frame"),
    ]
