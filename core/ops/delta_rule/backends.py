"""Which backend a call of the delta rule gets, and why."""

from __future__ import annotations

from manyheads.core.dispatch import HALF_OR_SINGLE, Call, Candidate, cpu_blocked, name_of, triton_blocked


def delta_rule(call: Call) -> list[Candidate]:
    """List the backends of `delta_rule`, best first."""
    kernels, chunks = triton_blocked(call), cpu_blocked(call)
    if not kernels and call.features.get("size") == "wide":
        kernels = "the kernels take keys of at most 64 channels"
    if not chunks and call.dtype not in HALF_OR_SINGLE:
        chunks = f"its sums are float32, and the tensors are {name_of(call.dtype)}"
    if call.has("channels"):
        kernels = chunks = "a rate for each value channel leaves no system that the channels share"
    return [
        Candidate("triton", "chunks as matrix products, the states staying on the chip", kernels),
        Candidate("cpu", "chunks, as matrix products in torch, with the backward written out", chunks),
        Candidate("reference", "no faster path takes this call: step by step"),
    ]
