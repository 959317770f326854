"""Time our op and its peer in turn, in one run, and print the ratio: what the op benchmarks share.

Every `benchmarks/<op>.py` of the core table has `cases(device) -> Iterator[Case]`.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

Step = Callable[[], object]
Output = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One line of the table: our op and the peer's on the same numbers.

    Attributes:
        name: The op and the pass, such as "selective_scan forward".
        shape: Sizes in words, such as "B1 L1024 D384 N16".
        peer: The peer with its version.
        ours, theirs: One call each; what they return is thrown away.
        target: The least ratio theirs / ours; None where none is set.
        difference: The largest difference of outputs (and gradients) between the two, relative to the largest
            value; printed, and refused above `tolerance`.
        tolerance: The largest difference that still counts as the same result.
        memory: The largest share of the peer's peak memory; None where none is set.
        rounds: The least number of rounds; calls that take minutes need few, and below 7 no warming up.
    """

    name: str
    shape: str
    peer: str
    ours: Step
    theirs: Step
    target: float | None = None
    difference: Callable[[], float] | None = None
    tolerance: float = 1e-4
    memory: float | None = None
    rounds: int = 7


@dataclass(frozen=True)
class Note:
    """A line that compares nothing: a figure by itself, or why a peer is not measured.

    Attributes:
        name: As a case's.
        shape: As a case's.
        say: Says it, and whether it is as it should be; takes the seconds that a line may take.
    """

    name: str
    shape: str
    say: Callable[[float], tuple[str, bool]]


@dataclass(frozen=True)
class Said:
    """What a note said."""

    name: str
    shape: str
    text: str
    met: bool

    def line(self) -> str:
        """The row of the printed table."""
        return f"{self.name:<44} {self.shape:<34} {'' if self.met else 'MISSED: '}{self.text}"


def missing(name: str, shape: str, peer: str) -> Note:
    """Return the line of a peer that is not installed."""
    return Note(name, shape, lambda _: (f"not measured: {peer} is not installed here", True))


@dataclass(frozen=True)
class Row:
    """What was measured: medians in milliseconds, their ratio, peak memory in bytes where asked for."""

    name: str
    shape: str
    peer: str
    ours_ms: float
    peer_ms: float
    ratio: float
    target: float | None
    difference: float | None
    ours_bytes: int | None
    peer_bytes: int | None
    met: bool

    def line(self) -> str:
        """The row of the printed table."""
        target = "" if self.target is None else f"{self.target:.1f}x"
        verdict = "ok" if self.met else "MISSED"
        memory = ""
        if self.ours_bytes is not None and self.peer_bytes is not None:
            memory = f"; peak {self.ours_bytes / 2**20:.1f} of {self.peer_bytes / 2**20:.1f} MiB"
        differ = "" if self.difference is None else f"{self.difference:.0e}"
        return (
            f"{self.name:<44} {self.shape:<34} {self.ours_ms:>9.2f} {self.peer_ms:>9.2f} {self.ratio:>7.2f}x "
            f"{target:>6} {differ:>7}  {verdict:<6} {self.peer}{memory}"
        )


HEADER = (
    f"{'op':<44} {'shape':<34} {'ours ms':>9} {'peer ms':>9} {'ratio':>8} {'least':>6} {'differ':>7}  "
    f"{'':<6} peer"
)


def measure(case: Case, seconds: float = 6.0, cpu_time: bool = False) -> Row:
    """Check that the two agree, then time them call by call in a shuffled order; medians.

    Args:
        cpu_time: Count the seconds of this process, not those of the clock on the wall.

    Raises:
        AssertionError: The two do not compute the same thing.
    """
    difference = None if case.difference is None else case.difference()
    if difference is not None and not difference <= case.tolerance:
        raise AssertionError(
            f"{case.name}: differs from its peer by {difference:.1e}, above {case.tolerance}"
        )
    clock = time.process_time if cpu_time else time.perf_counter
    ours, theirs = _medians(case, seconds, clock)
    used = (None, None) if case.memory is None else (peak_bytes(case.ours), peak_bytes(case.theirs))
    met = case.target is None or theirs / ours >= case.target
    if case.memory is not None:
        met = met and used[0] <= case.memory * used[1]  # type: ignore[operator]
    return Row(
        case.name,
        case.shape,
        case.peer,
        ours,
        theirs,
        theirs / ours,
        case.target,
        difference,
        *used,
        met,
    )


def _medians(case: Case, seconds: float, clock: Callable[[], float]) -> tuple[float, float]:
    steps, times = (case.ours, case.theirs), ([], [])  # type: ignore[var-annotated]
    for step in steps * 2 if case.rounds >= 7 else ():
        step()
    start, number = time.perf_counter(), 0
    while number < case.rounds or (time.perf_counter() - start < seconds and number < 300):
        for which in random.Random(number).sample((0, 1), 2):
            times[which].append(_milliseconds(steps[which], clock))
        number += 1
    return statistics.median(times[0]), statistics.median(times[1])


def _milliseconds(step: Step, clock: Callable[[], float]) -> float:
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.synchronize()
    start = clock()
    step()
    if gpu:
        torch.cuda.synchronize()
    return (clock() - start) * 1e3


def peak_bytes(step: Step, warm: bool = True) -> int:
    """How far a call raises the process's memory above where it stood (Linux; resident bytes)."""
    if warm:
        step()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = _status("VmRSS")
    step()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field + ":")))


def training(
    function: Callable[..., Output], *inputs: Tensor, cotangent: Tensor | Sequence[Tensor] | None = None
) -> Step:
    """A forward and backward pass: gradients of all inputs; without a cotangent for one fixed draw."""
    leaves = [x.detach().clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    wanted = [x for x in leaves if x.requires_grad]
    if cotangent is None:  # the same for ours and theirs
        with torch.no_grad():
            out = function(*leaves)
        drawn = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
        cotangent = drawn.to(out.device, out.dtype)
    return lambda: torch.autograd.grad(function(*leaves), wanted, cotangent)


def inference(function: Callable[..., Output], *inputs: Tensor) -> Step:
    """A forward pass without gradients."""

    def step() -> Output:
        with torch.no_grad():
            return function(*inputs)

    return step


def difference(ours: Step, theirs: Step) -> Callable[[], float]:
    """The largest difference between what two steps return, each tensor relative to its largest value."""

    def compute() -> float:
        pairs = zip(_tensors(ours()), _tensors(theirs()), strict=True)
        return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)

    return compute


def _tensors(found: object) -> Sequence[Tensor]:
    return (found,) if isinstance(found, Tensor) else found  # type: ignore[return-value]


def machine() -> dict[str, str | int]:
    """The machine's facts, for the header and the stored results."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line
        ]
        cpu = names[0] if names else cpu
    facts: dict[str, str | int] = {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", ""),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def as_json(rows: Sequence[Row | Said]) -> list[dict[str, object]]:
    """The rows as plain values."""
    return [asdict(row) for row in rows]
