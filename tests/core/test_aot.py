"""The ahead-of-time gate: every shipped kernel compiles for sm_90 and sm_80 and spills nothing.

The whole table: `pytest -m slow tests/core/test_aot.py`; printed: `python benchmarks/aot.py --slow`.
"""

from __future__ import annotations

import pytest

from manyheads.core import aot
from manyheads.core.aot import ARCHITECTURES, HEADER, KERNEL_OPS, Report, Variant

pytest.importorskip("triton")


def gate(op: str, slow: bool) -> None:
    reports = list(aot.compile_all(aot.variants([op], slow=slow)))
    print(HEADER, *(r.row() for r in reports), sep="\n")
    assert {r.variant.arch for r in reports} == set(ARCHITECTURES)
    broken = [r.row() for r in reports if r.violations()]
    assert not broken, "\n".join([f"{len(broken)} of {len(reports)} break the gate", HEADER, *broken])


@pytest.mark.parametrize("op", KERNEL_OPS)
def test_gate(op):
    gate(op, slow=False)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("op", KERNEL_OPS)
def test_whole_table(op):
    gate(op, slow=True)


@pytest.mark.parametrize("op", KERNEL_OPS)
def test_variants_differ(op):
    listed = [str(v) + v.kernel for v in aot.variants([op], slow=True)]
    assert len(listed) == len(set(listed))


def report(arch: int = 90, tensor_cores: bool = True, **found: int) -> Report:
    numbers = {
        "registers": 100,
        "spilled": 0,
        "shared": 1024,
        "wgmma": 4,
        "mma": 0,
        "async_copies": 0,
    } | found
    return Report(Variant("m:f", {}, {}, arch, "fp16", tensor_cores=tensor_cores), **numbers)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (report(spilled=8), "8 bytes spilled"),
        (report(shared=232_449), "above 232448"),
        (report(arch=80, shared=166_913), "above 166912"),
        (report(wgmma=0), "no tensor-core"),
    ],
)
def test_violations(broken, message):
    assert message in "".join(broken.violations())
    assert message in broken.row()


def test_no_violations():
    assert not report().violations()
    assert not report(wgmma=0, mma=4).violations()
    assert not report(wgmma=0, tensor_cores=False).violations()


def test_not_in_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="unset it"):
        list(aot.compile_all([]))
