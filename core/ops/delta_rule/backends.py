"""Which backend a call of the delta rule gets, and why."""

from __future__ import annotations

from manyheads.core.dispatch import HALF_OR_SINGLE, Call, Candidate, cpu_blocked, name_of


def delta_rule(call: Call) -> list[Candidate]:
    """List the backends of `delta_rule`, best first."""
    blocked = cpu_blocked(call)
    if not blocked and call.dtype not in HALF_OR_SINGLE:
        blocked = f"its sums are float32, and the tensors are {name_of(call.dtype)}"
    channels = "a rate for each value channel leaves no system that the channels share"
    if call.has("channels"):
        blocked = channels
    return [
        Candidate("cpu", "chunks, as matrix products in torch, with the backward written out", blocked),
        Candidate("reference", "no faster path takes this call: step by step"),
    ]
