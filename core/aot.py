"""Ahead-of-time compilation of Triton kernels for GPUs that are not there: registers, spills, MMAs.

Each op's `triton.py` lists what it ships, `aot_variants()`, straight from its table of launch
configurations, so what is gated is what is launched. `compile_all` compiles for compute capability 9.0 and
8.0 with the tools that Triton brings; `violations` holds each result to the gate. Not to be used with
TRITON_INTERPRET=1.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from manyheads.core.dispatch import interpreting

# Every folder of core/ops with a triton.py: the gate and the interpreter tests go through this list.
KERNEL_OPS = tuple(sorted(path.parent.name for path in (Path(__file__).parent / "ops").glob("*/triton.py")))
ARCHITECTURES = (90, 80)
SHARED_LIMIT = {90: 232_448, 80: 166_912}  # bytes a block may use


@dataclass(frozen=True)
class Variant:
    """One kernel as it is launched: its types, compile-time constants and launch options.

    Attributes:
        kernel: "module:function" of the plain `@triton.jit` function.
        signature: Argument to Triton type ("*fp32", "i32", "i64", "fp32"); constants may be left out.
        constants: The constexpr arguments.
        arch: Compute capability, 90 or 80.
        label: What tells this variant from its siblings, such as "fp16 D64 128x64 aligned".
        divisible: Integer arguments that the launcher would find divisible by 16 (pointers always are).
            Without them Triton issues no asynchronous copies: gate aligned and unaligned forms.
        tensor_cores: Whether the kernel must use tensor cores.
        slow: Leave it to the slow gate.
    """

    kernel: str
    signature: Mapping[str, str]
    constants: Mapping[str, bool | int | float | str | None]
    arch: int
    label: str
    divisible: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    tensor_cores: bool = False
    slow: bool = False

    @property
    def name(self) -> str:
        """The kernel's function name."""
        return self.kernel.partition(":")[2]

    def __str__(self) -> str:
        """Name the variant in a test id or a table."""
        unaligned = "" if self.divisible else " unaligned"
        return f"{self.name} sm_{self.arch} {self.label} w{self.num_warps} s{self.num_stages}{unaligned}"


@dataclass(frozen=True)
class Report:
    """What the compiler made of a variant: registers a thread, bytes, instruction counts."""

    variant: Variant
    registers: int
    spilled: int
    shared: int
    wgmma: int
    mma: int
    async_copies: int

    def violations(self) -> list[str]:
        """Say which rules of the gate the variant breaks: spills, shared memory, missing tensor cores."""
        found = []
        if self.spilled:
            found.append(f"{self.spilled} bytes spilled")
        limit = SHARED_LIMIT[self.variant.arch]
        if self.shared > limit:
            found.append(f"{self.shared} bytes of shared memory, above {limit}")
        if self.variant.tensor_cores and not self.wgmma + self.mma:
            found.append("no tensor-core instruction")
        return found

    def row(self) -> str:
        """The variant's line in the table of `benchmarks/aot.py`."""
        broken = "; ".join(self.violations()) or "ok"
        return (
            f"{self.variant!s:<80} {self.registers:>4} {self.spilled:>5} {self.shared:>8} "
            f"{self.wgmma:>5}/{self.mma:<5} {self.async_copies:>8}  {broken}"
        )


HEADER = (
    f"{'kernel':<80} {'regs':>4} {'spill':>5} {'shared':>8} {'wgmma':>5}/{'mma':<5} {'cp.async':>8}  gate"
)


def variants(ops: Iterable[str] = KERNEL_OPS, *, slow: bool = False) -> list[Variant]:
    """List what the ops ship, from each one's `aot_variants()`; with `slow`, the long tail too."""
    found: list[Variant] = []
    for op in ops:
        listed = importlib.import_module(f"manyheads.core.ops.{op}.triton").aot_variants()
        found.extend(v for v in listed if slow or not v.slow)
    return found


def compile_all(todo: Iterable[Variant], workers: int | None = None) -> Iterator[Report]:
    """Compile variants on all processor cores; reports come in the order of the variants.

    Raises:
        RuntimeError: Triton's interpreter is on, and nothing could be compiled.
    """
    if interpreting():
        raise RuntimeError("TRITON_INTERPRET=1 replaces the compiler: unset it to compile ahead of time")
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers or os.cpu_count(), mp_context=spawn) as pool:
        yield from pool.map(compile_variant, todo)


def compile_variant(variant: Variant) -> Report:
    """Compile one variant to a cubin and count what is in it.

    Source: Triton's own compiler interface, `triton.compile(ASTSource(...), target=GPUTarget("cuda", arch,
    32))`.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, name = variant.kernel.partition(":")
    function = getattr(importlib.import_module(module), name)
    names = [p.name for p in function.params]
    missing = [n for n in names if n not in variant.constants and n not in variant.signature]
    assert not missing, f"{variant}: no type for {missing}"
    types = {n: "constexpr" if n in variant.constants else variant.signature[n] for n in names}
    aligned = {n for n in names if types[n].startswith("*")} | set(variant.divisible)
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if n in aligned and types[n] != "constexpr"
    }
    source = ASTSource(
        fn=function,
        signature=types,
        constexprs={(names.index(n),): value for n, value in variant.constants.items()},
        attrs=attributes,
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", variant.arch, 32), options=options)
    registers, stack = _resources(
        compiled.asm["cubin"], Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    )
    ptx = compiled.asm["ptx"]
    return Report(
        variant,
        registers,
        stack,
        compiled.metadata.shared,
        ptx.count("wgmma.mma_async"),
        len(re.findall(r"\bmma\.sync", ptx)),
        len(re.findall(r"cp\.async\.c[ag]", ptx)) + ptx.count("cp.async.bulk.tensor"),
    )


def _resources(cubin: bytes, tool: Path) -> tuple[int, int]:
    """Registers a thread and stack bytes (the spills) of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout + done.stderr)
    assert found is not None, f"cuobjdump reported no resources: {done.stdout}{done.stderr}"
    return int(found[1]), int(found[2])
