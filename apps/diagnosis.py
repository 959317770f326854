"""`manyheads doctor`: what this machine has, and the backend that each op of the core takes here, and why."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import asdict, dataclass

import torch

from manyheads import __version__
from manyheads.core import dispatch
from manyheads.core.dispatch import OPS, Feature

# Calls of an op that its clause tells apart beside the plain one, each with what it is in words.
_SPECIAL: dict[str, tuple[tuple[str, dict[str, Feature]], ...]] = {
    "attention": (
        ("learned bias", {"learned_bias": True}),
        ("sigmoid", {"kind": "sigmoid"}),
        ("post-scale", {"post_scale": True}),
    ),
    "linear_attention": (("causal", {"causal": True}),),
}
_PACKAGES = ("torch", "triton", "numba", "lightning", "timm", "torch-geometric", "pyarrow", "safetensors")


@dataclass(frozen=True)
class Row:
    """An op, the kind of call, the backend it would take here, why, and what keeps the earlier ones out."""

    op: str
    call: str
    backend: str
    reason: str
    passed_over: tuple[str, ...]


def machine() -> dict[str, str]:
    """Versions and devices, by name; what is absent says so."""
    facts = {"manyheads": __version__, "python": platform.python_version(), "system": platform.platform()}
    for package in _PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "not installed"
    facts["cpu threads"] = str(torch.get_num_threads())
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        facts["gpu"] = f"{torch.cuda.get_device_name()} (compute capability {major}.{minor})"
    else:
        facts["gpu"] = "none that torch can use: everything runs on the CPU paths"
    return facts


def rows(device: str, dtype: torch.dtype) -> list[Row]:
    """Each op's choice for tensors of a dtype on a device.

    Raises:
        UsageError: A backend that MANYHEADS_BACKEND forces cannot run one of the ops.
    """
    found = []
    for op in OPS:
        for call, features in (("", {}), *_SPECIAL.get(op, ())):
            choice = dispatch.choose(op, device=device, dtype=dtype, **features)
            explained = dispatch.explain(op, device=device, dtype=dtype, **features)
            passed = tuple(line.strip() for line in explained.splitlines()[1:])
            found.append(Row(op, call, choice.backend, choice.reason, passed))
    return found


def as_json(device: str, dtype: torch.dtype) -> dict[str, object]:
    """Everything as plain values."""
    return {"machine": machine(), "device": device, "ops": [asdict(row) for row in rows(device, dtype)]}


def text(device: str, dtype: torch.dtype, verbose: bool) -> str:
    """The report in lines; with `verbose` also why the better backends stand back."""
    lines = [f"{name:16} {value}" for name, value in machine().items()]
    lines += ["", f"Ops on {device}, {dispatch.name_of(dtype)}:"]
    listed = rows(device, dtype)
    width = max(len(row.op) + len(row.call) + 2 for row in listed)
    for row in listed:
        name = f"{row.op}, {row.call}" if row.call else row.op
        lines.append(f"  {name:{width}}  {row.backend:9}  {row.reason}")
        if verbose:
            lines += [f"  {'':{width}}             {line}" for line in row.passed_over]
    if not verbose:
        lines += ["", "`manyheads doctor --verbose` also says why the backends before stand back;"]
        lines += ["MANYHEADS_BACKEND=reference forces one everywhere, =selective_scan=cpu for one op."]
    return "\n".join(lines)
