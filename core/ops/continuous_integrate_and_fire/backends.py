"""Which backend a call of continuous integrate-and-fire gets, and why."""

from __future__ import annotations

from manyheads.core.dispatch import Call, Candidate, numba_blocked


def continuous_integrate_and_fire(call: Call) -> list[Candidate]:
    """List the backends of `continuous_integrate_and_fire`, best first."""
    blocked = numba_blocked(call)
    if not blocked and call.has("learns"):
        blocked = "it has no gradients, and torch.compile cannot trace it"
    return [
        Candidate("numba", "the frames cut by compiled loops, then weighted sums over them", blocked),
        Candidate("torch", "all tokens at once, as weighted sums over consecutive frames"),
        Candidate("reference", "frame by frame"),
    ]
