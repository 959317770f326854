"""Which backend a call of `flow_attention` gets, and why."""

from __future__ import annotations

from manyheads.core.dispatch import Call, Candidate


def flow_attention(call: Call) -> list[Candidate]:
    """List the backends of `flow_attention`, best first."""
    found = [
        Candidate("torch", "two products of matrices, keys with values first, and sums along the tokens"),
        Candidate("reference", "few tokens: all weights at once are less work, and cancel more closely"),
    ]
    return found[::-1] if call.features.get("length") == "short" else found
