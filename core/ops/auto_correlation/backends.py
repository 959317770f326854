"""Which backend a call of auto-correlation gets, and why."""

from __future__ import annotations

from manyheads.core.dispatch import Call, Candidate


def auto_correlation(call: Call) -> list[Candidate]:
    """List the backends of `auto_correlation`, best first."""
    blocked = "lags of each channel need each channel's correlation" if call.has("channel") else ""
    return [
        Candidate("torch", "two products of L x L matrices (long series: transforms) for all lags", blocked),
        Candidate("reference", "each channel has lags of its own: the plain formula"),
    ]
