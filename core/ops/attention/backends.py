"""Which backend a call of `attention` gets, and why."""

from __future__ import annotations

import torch

from manyheads.core.dispatch import Call, Candidate, cpu_blocked, name_of, triton_blocked


def attention(call: Call) -> list[Candidate]:
    """List the backends of `attention`, best first."""
    fused = ""
    if call.features.get("kind", "softmax") != "softmax":
        fused = "torch's attention has no sigmoid kind"
    elif call.has("post_scale"):
        fused = "torch's attention has no post_scale"
    kernel = triton_blocked(call)
    widest = 128 if call.dtype == torch.float32 else 256  # wider float32 tiles do not fit the registers
    if not kernel and int(call.features.get("head_dim", 0)) > widest:
        kernel = f"the {name_of(call.dtype)} kernels take a head dim of at most {widest}"
    cpu = "it has no dropout" if call.has("dropout") else cpu_blocked(call)
    reference = Candidate("reference", "no other path takes this call: the plain formula")
    if call.has("learned_bias"):
        return [
            Candidate("triton", "flash attention with the gradient of the bias", kernel),
            Candidate("cpu", "torch has no fast gradient of a bias", cpu),
            Candidate("torch", "no blockwise path takes this call: torch's unfused attention", fused),
            reference,
        ]
    return [
        Candidate("torch", "no learned bias: torch's fused attention is the fast path", fused),
        Candidate("triton", "torch has no fused path for this kind or post_scale", kernel),
        Candidate("cpu", "torch has no fused path for this kind or post_scale", cpu),
        reference,
    ]
