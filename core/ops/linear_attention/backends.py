"""Which backend a call of `linear_attention` gets, and why."""

from __future__ import annotations

from manyheads.core.dispatch import Call, Candidate
from manyheads.core.ops.decay_attention.backends import chunked


def linear_attention(call: Call) -> list[Candidate]:
    """List the backends of `linear_attention`, best first."""
    if not call.has("causal"):
        found = [
            Candidate("torch", "not causal: two products of matrices, keys with values first"),
            Candidate("reference", "few tokens: all weights at once are less work, and cancel exactly"),
        ]
        return found[::-1] if call.features.get("length") == "short" else found
    return [
        *chunked(call, compiled=False),
        Candidate("reference", "no faster path takes this call: the plain formula, step by step"),
    ]
