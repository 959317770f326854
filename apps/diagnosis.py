"""The report of `manyheads doctor`: the findings, and the backend that each op takes here, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby

import torch

from manyheads.apps.checkup import Finding
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


@dataclass(frozen=True)
class Row:
    """An op, the kind of call, the backend it would take here, why, and what keeps the earlier ones out."""

    op: str
    call: str
    backend: str
    reason: str
    passed_over: tuple[str, ...]


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


def as_json(found: Sequence[Finding], device: str, dtype: torch.dtype) -> dict[str, object]:
    """Everything as plain values."""
    return {
        "broken": any(finding.broken for finding in found),
        "problems": sum(bool(finding.problem) for finding in found),
        "findings": [asdict(finding) for finding in found],
        "device": device,
        "ops": [asdict(row) for row in rows(device, dtype)],
    }


def text(found: Sequence[Finding], device: str, dtype: torch.dtype, verbose: bool) -> str:
    """The report in lines; with `verbose` also why the better backends stand back."""
    lines: list[str] = []
    width = max(len(finding.name) for finding in found)
    for group, findings in groupby(found, key=lambda finding: finding.group):
        lines += [f"{group}:"]
        for finding in findings:
            lines.append(f"  {finding.name:{width}}  {finding.value}")
            if finding.problem:
                lines.append(f"  {'':{width}}  {_mark(finding)} {finding.problem}")
        lines.append("")
    lines += [f"ops on {device}, {dispatch.name_of(dtype)}:"]
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
    wrong = [finding for finding in found if finding.problem]
    lines += ["", f"{len(wrong)} to look at:" if wrong else "nothing to complain of"]
    return "\n".join(lines + [f"  {_mark(each)} {each.name.strip()}: {each.problem}" for each in wrong])


def _mark(finding: Finding) -> str:
    return "BROKEN" if finding.broken else "!"
