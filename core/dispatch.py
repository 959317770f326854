"""The one place that chooses a backend, and says why.

Each op has one clause below: a function that lists the backends it has, best first, with what keeps each from
running this call. `choose` takes the first that can run. `use_backend`, or the variable `MANYHEADS_BACKEND`,
forces one, and a forced backend that cannot run the call is an error, never a silent fallback.

Backends: `reference` (the readable formula), `torch` (torch's own fused op), `cpu` (our CPU path), `triton`.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache

import torch

from manyheads.core.errors import UsageError, did_you_mean

BACKENDS = ("reference", "torch", "cpu", "triton")
_HALF_OR_SINGLE = (torch.float32, torch.float16, torch.bfloat16)
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
    if call.dtype not in _HALF_OR_SINGLE:
        return f"the kernels take float32, float16 and bfloat16, not {_name(call.dtype)}"
    if interpreting():
        if call.dtype == torch.bfloat16:
            return "bfloat16 products are wrong in Triton's interpreter (TRITON_INTERPRET=1)"
        return (
            ""
            if call.device == "cpu"
            else "Triton's interpreter is on (TRITON_INTERPRET=1) and runs CPU tensors"
        )
    return "" if call.device == "cuda" else f"it needs a CUDA device, and the tensors are on {call.device}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _attention(call: Call) -> list[Candidate]:
    fused = ""
    if call.features.get("kind", "softmax") != "softmax":
        fused = "torch's attention has no sigmoid kind"
    elif call.has("post_scale"):
        fused = "torch's attention has no post_scale"
    kernel = triton_blocked(call)
    widest = 128 if call.dtype == torch.float32 else 256  # wider float32 tiles do not fit the registers
    if not kernel and int(call.features.get("head_dim", 0)) > widest:
        kernel = f"the {_name(call.dtype)} kernels take a head dim of at most {widest}"
    cpu = _cpu(call, "it has no dropout" if call.has("dropout") else "")
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


def _cpu(call: Call, blocked: str) -> str:
    return blocked if call.device == "cpu" else f"it runs CPU tensors, and these are on {call.device}"


def _rms_norm(call: Call) -> list[Candidate]:
    composed = Candidate("torch", "too little work for an op of our own: torch's RMSNorm", _norm_torch(call))
    blockwise = _norm_cpu(call)
    small = call.features.get("size") == "small" or blockwise.blocked
    return _norm(call, [composed, blockwise] if small else [blockwise, composed])


def _layer_norm(call: Call) -> list[Candidate]:
    native = Candidate("torch", "torch's own LayerNorm is one fused pass each way", _norm_torch(call))
    # Its CPU backward adds up the gradients of weight and bias row by row, in x's dtype.
    exact = not call.has("learns") or (call.dtype == torch.float32 and call.features.get("rows") == "few")
    return _norm(call, [native, _norm_cpu(call)] if exact else [_norm_cpu(call), native])


def _crms_norm(call: Call) -> list[Candidate]:
    small = call.features.get("size") == "small"
    return _norm(call, [] if small else [_norm_cpu(call)], last=[_norm_cpu(call)] if small else [])


def _norm(call: Call, middle: list[Candidate], last: Sequence[Candidate] = ()) -> list[Candidate]:
    blocked = triton_blocked(call)
    if not blocked and call.features.get("row") == "long":
        blocked = "the kernels take rows of at most 8192 elements"
    kernel = Candidate("triton", "one fused pass over the rows each way, with the residual", blocked)
    if call.features.get("row") == "short":
        why = "rows of fewer than 16 elements cancel in the gradient: the plain formula bears it best"
        return [Candidate("reference", why), kernel, *middle, *last]
    return [
        kernel,
        *middle,
        Candidate("reference", "no faster path takes this call: the plain formula"),
        *last,
    ]


def _norm_cpu(call: Call) -> Candidate:
    blocked = _cpu(call, "")
    if not blocked and call.dtype not in _HALF_OR_SINGLE:
        blocked = f"its statistics are float32, and the tensors are {_name(call.dtype)}"
    return Candidate("cpu", "the backward goes block by block in the cache, with steady sums", blocked)


def _norm_torch(call: Call) -> str:
    return "torch wants weight and bias in the dtype of x" if call.has("mixed") else ""


_CLAUSES: dict[str, Callable[[Call], list[Candidate]]] = {
    "attention": _attention,
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "crms_norm": _crms_norm,
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
    lines = [f"{op} on {device} {_name(dtype)} -> {choice.backend}: {choice.reason}"]
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
    if op is not None and op not in _CLAUSES:
        raise UsageError(f"{source}: no op {op!r}{did_you_mean(op, _CLAUSES)} (ops: {', '.join(_CLAUSES)})")


def _candidates(op: str, device: str, dtype: torch.dtype, features: dict[str, Feature]) -> list[Candidate]:
    if op not in _CLAUSES:
        raise UsageError(f"no op {op!r}{did_you_mean(op, _CLAUSES)} (ops: {', '.join(_CLAUSES)})")
    return _CLAUSES[op](Call(device, dtype, features))
