"""The one place that chooses a backend, and says why.

Each op has one clause, in its folder's `backends.py`: a function that lists the backends it has, best first,
with what keeps each from running this call. `choose` takes the first that can run. `use_backend`, or the
variable `MANYHEADS_BACKEND`, forces one, and a forced backend that cannot run the call is an error, never a
silent fallback.

Backends: `reference` (the readable formula), `torch` (torch's own fused op), `cpu` (our CPU path in torch),
`numba` (loops compiled for this CPU at first use), `triton`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache

import torch

from manyheads.core.errors import UsageError, did_you_mean

BACKENDS = ("reference", "torch", "cpu", "numba", "triton")
HALF_OR_SINGLE = (torch.float32, torch.float16, torch.bfloat16)
_forced: ContextVar[dict[str, str] | None] = ContextVar("manyheads_backend", default=None)

Feature = bool | int | str


@dataclass(frozen=True)
class Choice:
    """The backend a call gets, and why, in words."""

    op: str
    backend: str
    reason: str


@dataclass(frozen=True)
class Call:
    """What a clause looks at: where the tensors are, their dtype, and the op's own features."""

    device: str
    dtype: torch.dtype
    features: dict[str, Feature]

    def has(self, name: str) -> bool:
        """Tell whether a feature is set (absent counts as not set)."""
        return bool(self.features.get(name, False))


@dataclass(frozen=True)
class Candidate:
    """A backend of an op: why it is taken when it can run, and what stands in its way (empty: nothing)."""

    backend: str
    reason: str
    blocked: str = ""


def interpreting() -> bool:
    """Tell whether Triton's interpreter is on (TRITON_INTERPRET=1), so that kernels run on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@cache
def triton_installed() -> bool:
    """Tell whether triton can be imported (it comes with torch on Linux only)."""
    return importlib.util.find_spec("triton") is not None


def triton_blocked(call: Call) -> str:
    """Say what keeps Triton kernels from running a call, or return an empty string."""
    if not triton_installed():
        return "triton is not installed"
    if call.dtype not in HALF_OR_SINGLE:
        return f"the kernels take float32, float16 and bfloat16, not {name_of(call.dtype)}"
    if interpreting():
        if call.dtype == torch.bfloat16:
            return "bfloat16 products are wrong in Triton's interpreter (TRITON_INTERPRET=1)"
        return (
            ""
            if call.device == "cpu"
            else "Triton's interpreter is on (TRITON_INTERPRET=1) and runs CPU tensors"
        )
    return "" if call.device == "cuda" else f"it needs a CUDA device, and the tensors are on {call.device}"


def cpu_blocked(call: Call) -> str:
    """Say what keeps a path for CPU tensors from running a call, or return an empty string."""
    return "" if call.device == "cpu" else f"it runs CPU tensors, and these are on {call.device}"


@cache
def numba_installed() -> bool:
    """Tell whether numba can be imported."""
    return importlib.util.find_spec("numba") is not None


def numba_blocked(call: Call) -> str:
    """Say what keeps loops compiled by numba from running a call, or return an empty string."""
    if not numba_installed():
        return "numba is not installed"
    if call.dtype not in HALF_OR_SINGLE:
        return f"the loops compute in float32, and the tensors are {name_of(call.dtype)}"
    return cpu_blocked(call)


def name_of(dtype: torch.dtype) -> str:
    """A dtype's name without its module."""
    return str(dtype).removeprefix("torch.")


# Each op and the folder of core/ops that holds it; the folder's backends.py has a clause by the op's name.
OPS = {
    "attention": "attention",
    "auto_correlation": "auto_correlation",
    "continuous_integrate_and_fire": "continuous_integrate_and_fire",
    "crms_norm": "norm",
    "decay_attention": "decay_attention",
    "delta_rule": "delta_rule",
    "depthwise_conv1d": "depthwise_conv1d",
    "fft_conv": "fft_conv",
    "flow_attention": "flow_attention",
    "gated_attention_unit": "gated_attention_unit",
    "layer_norm": "norm",
    "linear_attention": "linear_attention",
    "local_attention": "local_attention",
    "prob_sparse_attention": "prob_sparse_attention",
    "rms_norm": "norm",
    "segment_attention": "segment_attention",
    "selective_scan": "selective_scan",
    "varlen_attention": "varlen_attention",
    "window_attention": "window_attention",
}


def choose(op: str, *, device: str, dtype: torch.dtype, **features: Feature) -> Choice:
    """Choose the backend of a call.

    Args:
        op: The public function's name.
        device: The tensors' device type, "cpu" or "cuda".
        dtype: The tensors' dtype.
        features: What the op's clause asks about, such as `learned_bias=True`; absent means no.

    Raises:
        UsageError: The op is unknown, or the forced backend is, or it cannot run this call.

    Example:
        >>> choose("attention", device="cpu", dtype=torch.float32).backend
        'torch'
    """
    candidates = _candidates(op, device, dtype, features)
    forced = _forced_for(op)
    if forced is None:
        best = next(c for c in candidates if not c.blocked)
        return Choice(op, best.backend, best.reason)
    backend, source = forced
    named = [c for c in candidates if c.backend == backend]
    if not named:
        has = ", ".join(dict.fromkeys(c.backend for c in candidates))
        raise UsageError(f"{op} has no backend {backend!r}, which {source} asks for (it has {has})")
    free = [c for c in named if not c.blocked]
    if not free:
        raise UsageError(
            f"backend {backend!r}, which {source} asks for, cannot run this {op}: {named[0].blocked}"
        )
    return Choice(op, backend, f"asked for by {source}")


# torch.compile runs `choose` while it traces and keeps the answer, as torch.compiler.assume_constant_result
# has it; setting the mark by hand spares the seconds that importing the compiler takes.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def explain(op: str, *, device: str, dtype: torch.dtype, **features: Feature) -> str:
    """Say in words which backend a call gets, why, and why not the ones before it.

    Raises:
        UsageError: As `choose`.

    Example:
        >>> print(explain("attention", device="cpu", dtype=torch.float32, learned_bias=True))
        attention on cpu float32 -> cpu: torch has no fast gradient of a bias
          not triton: it needs a CUDA device, and the tensors are on cpu
    """
    choice = choose(op, device=device, dtype=dtype, **features)
    lines = [f"{op} on {device} {name_of(dtype)} -> {choice.backend}: {choice.reason}"]
    for candidate in _candidates(op, device, dtype, features):
        if candidate.backend == choice.backend:
            break
        lines.append(f"  not {candidate.backend}: {candidate.blocked or 'another was asked for'}")
    return "\n".join(lines)


@contextmanager
def use_backend(backend: str, *, op: str | None = None) -> Iterator[None]:
    """Force a backend inside a `with` block, for every op or for one; per thread and per async task.

    Args:
        backend: One of `BACKENDS`.
        op: The op it holds for; None for all.

    Raises:
        UsageError: No such backend or op.

    Example:
        >>> with use_backend("reference"):
        ...     y = attention(q, k, v)
    """
    _check(backend, op, "use_backend")
    key = op or "*"
    # A new "*" replaces what an outer block asked of single ops: the innermost block decides.
    outer = {} if op is None else dict(_forced.get() or {})
    token = _forced.set({**outer, key: backend})
    try:
        yield
    finally:
        _forced.reset(token)


def _forced_for(op: str) -> tuple[str, str] | None:
    """The backend asked for, and by whom; a `with` block goes before the environment."""
    asked = _forced.get() or {}
    backend = asked.get(op, asked.get("*"))
    if backend is not None:
        return backend, f"use_backend({backend!r})"
    value = os.environ.get("MANYHEADS_BACKEND", "").strip()
    found = _parse(value)
    backend = found.get(op, found.get("*"))
    return None if backend is None else (backend, f"MANYHEADS_BACKEND={value}")


def _parse(value: str) -> dict[str, str]:
    """Read "triton", or "attention=triton,rms_norm=reference"; "auto" and nothing force nothing."""
    found: dict[str, str] = {}
    for part in value.split(","):
        op, equals, backend = part.strip().rpartition("=")
        if backend in ("", "auto"):
            continue
        _check(backend, op if equals else None, f"MANYHEADS_BACKEND={value}")
        found[op or "*"] = backend
    return found


def _check(backend: str, op: str | None, source: str) -> None:
    if backend not in BACKENDS:
        hint = did_you_mean(backend, BACKENDS)
        raise UsageError(f"{source}: no backend {backend!r}{hint} (backends: {', '.join(BACKENDS)})")
    if op is not None and op not in OPS:
        raise UsageError(f"{source}: no op {op!r}{did_you_mean(op, OPS)} (ops: {', '.join(OPS)})")


def _candidates(op: str, device: str, dtype: torch.dtype, features: dict[str, Feature]) -> list[Candidate]:
    if op not in OPS:
        raise UsageError(f"no op {op!r}{did_you_mean(op, OPS)} (ops: {', '.join(OPS)})")
    clauses = importlib.import_module(f"manyheads.core.ops.{OPS[op]}.backends")
    found: list[Candidate] = getattr(clauses, op)(Call(device, dtype, features))
    return found
