"""Which backend a call of ProbSparse attention gets, and why."""

from __future__ import annotations

from manyheads.core.dispatch import Call, Candidate


def prob_sparse_attention(call: Call) -> list[Candidate]:
    """List the backends of `prob_sparse_attention`, best first."""
    return [
        Candidate("torch", "all products by one dense multiplication cost less than gathering some"),
        Candidate("reference", "the published formula, with gathered keys"),
    ]
