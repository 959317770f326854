"""Which backend a call of ProbSparse attention gets, and why."""

from __future__ import annotations

from manyheads.core.dispatch import HALF_OR_SINGLE, Call, Candidate, cpu_blocked, name_of, numba_blocked


def prob_sparse_attention(call: Call) -> list[Candidate]:
    """List the backends of `prob_sparse_attention`, best first."""
    blocked = cpu_blocked(call)
    if not blocked and call.dtype not in HALF_OR_SINGLE:
        blocked = f"it computes in float32, and the tensors are {name_of(call.dtype)}"
    elif not blocked and call.has("union"):
        blocked = "a sample's queries are chosen by the whole batch (union)"
    compiled = numba_blocked(call) or blocked
    return [
        Candidate("numba", "dense products in the cache, compiled loops between them", compiled),
        Candidate("cpu", "sample by sample in the cache: dense products, the sampled ones picked", blocked),
        Candidate("torch", "all products by one dense multiplication cost less than gathering some"),
        Candidate("reference", "the published formula, with gathered keys"),
    ]
