"""Which backend a call of the gated attention unit gets, and why."""

from __future__ import annotations

from manyheads.core.dispatch import HALF_OR_SINGLE, Call, Candidate, cpu_blocked, name_of, numba_blocked


def gated_attention_unit(call: Call) -> list[Candidate]:
    """List the backends of `gated_attention_unit`, best first."""
    blocked = cpu_blocked(call)
    if not blocked and call.dtype not in HALF_OR_SINGLE:
        blocked = f"it computes in float32, and the tensors are {name_of(call.dtype)}"
    return [
        Candidate("numba", "group by group in the cache, the gates in a compiled loop", numba_blocked(call)),
        Candidate("cpu", "group by group in the cache, without filled-up copies", blocked),
        Candidate("reference", "no faster path takes this call: batched products of whole groups"),
    ]
