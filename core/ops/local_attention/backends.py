"""Which backend a call of `local_attention` gets, and why."""

from __future__ import annotations

import torch

from manyheads.core.dispatch import Call, Candidate, cpu_blocked, name_of, triton_blocked


def local_attention(call: Call) -> list[Candidate]:
    """List the backends of `local_attention`, best first."""
    kernel = triton_blocked(call)
    widest = 128 if call.dtype == torch.float32 else 256  # wider float32 tiles do not fit the registers
    if not kernel and int(call.features.get("head_dim", 0)) > widest:
        kernel = f"the {name_of(call.dtype)} kernels take a head dim of at most {widest}"
    cpu = cpu_blocked(call)
    if call.has("dropout"):
        kernel, cpu = "it has no dropout", "it has no dropout"
    return [
        Candidate("triton", "flash attention over the band and the global keys alone", kernel),
        Candidate("cpu", "blocks of queries, each against its strip of keys", cpu),
        Candidate("torch", "blocks of queries in plain torch, with dropout"),
        Candidate("reference", "no other path takes this call: dense attention under a mask"),
    ]
