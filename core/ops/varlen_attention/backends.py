"""Which backend a call of `varlen_attention` gets, and why."""

from __future__ import annotations

import torch

from manyheads.core.dispatch import Call, Candidate, cpu_blocked, name_of, triton_blocked


def varlen_attention(call: Call) -> list[Candidate]:
    """List the backends of `varlen_attention`, best first."""
    kernel = triton_blocked(call)
    widest = 128 if call.dtype == torch.float32 else 256  # wider float32 tiles do not fit the registers
    if not kernel and int(call.features.get("head_dim", 0)) > widest:
        kernel = f"the {name_of(call.dtype)} kernels take a head dim of at most {widest}"
    return [
        Candidate("triton", "packed flash attention, with the gradient of a relative bias", kernel),
        Candidate("cpu", "one fused call a sequence, sequences side by side", cpu_blocked(call)),
        Candidate("reference", "no other path takes this call: one dense attention a sequence"),
    ]
