"""What `manyheads doctor` looks at beside the ops: packages, machine, folders, hub, environment; with advice.

Each look returns findings; one with a `problem` says what to do, and a broken one makes the exit code 1.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from manyheads import __version__
from manyheads.core import datasets
from manyheads.core.catalog import ROOMS
from manyheads.core.errors import ManyheadsError

HUB_SECONDS = 2.0  # that the hub has to answer
MALICIOUS = {"lightning": ("2.6.2", "2.6.3"), "pytorch-lightning": ("2.6.2", "2.6.3")}  # GHSA-w37p-236h-pfx3
LITTLE_DISK, LITTLE_MEMORY = 2 << 30, 1 << 30  # bytes
COUNTED = 200_000  # files of a folder, of which sizes are added
HARMFUL: dict[str, tuple[Callable[[str], bool], str]] = {
    "PYTHONDONTWRITEBYTECODE": (bool, "every start compiles all sources again, 20 s for training: unset it"),
    "TRITON_INTERPRET": (
        lambda v: v not in ("", "0"),
        "Triton's kernels run in Python, very slowly: unset it",
    ),
    "CUDA_LAUNCH_BLOCKING": (
        lambda v: v not in ("", "0"),
        "each kernel is waited for: unset it but to debug",
    ),
    "NUMBA_DISABLE_JIT": (
        lambda v: v not in ("", "0"),
        "compiled loops run in Python, very slowly: unset it",
    ),
    "CUDA_VISIBLE_DEVICES": (lambda v: v in ("", "-1"), "it hides every GPU: unset it to use one"),
}  # variables that hurt: when, and what to do


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        group: The heading it stands under.
        name: What was looked at.
        value: What was found.
        problem: What is wrong and what to do; nothing where all is well.
        broken: Whether something does not work by it.
    """

    group: str
    name: str
    value: str
    problem: str = ""
    broken: bool = False


def look() -> list[Finding]:
    """Return all findings, in the order of the report."""
    looks = (versions, extras, machine, gpus, folders, data_folders, hub, environment)
    return [finding for each in looks for finding in each()]


def versions() -> Iterator[Finding]:
    """Look at Python, this package and what it needs."""
    yield Finding("versions", "manyheads", __version__)
    yield Finding("versions", "python", f"{platform.python_version()} ({sys.executable})")
    for requirement in sorted(required().get("", {}).items()):
        yield _package(*requirement)
    yield _package("triton", "", optional=True)


def required() -> dict[str, dict[str, str]]:
    """Return the packages that ours needs with their bounds, by extra; "" needs none."""
    from packaging.requirements import Requirement

    found: dict[str, dict[str, str]] = {}
    for line in importlib.metadata.requires("manyheads") or []:
        needed = Requirement(line)
        extra = str(needed.marker).partition('extra == "')[2].rstrip('"') if needed.marker else ""
        if needed.name != "manyheads":
            found.setdefault(extra, {})[needed.name] = str(needed.specifier)
    return found


def _package(name: str, bounds: str, optional: bool = False) -> Finding:
    """Compare an installed version with what is needed, and with those known to be malicious."""
    from packaging.specifiers import SpecifierSet

    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        problem = "" if optional else f"it is missing: pip install '{name}{bounds}'"
        return Finding("versions", name, "not installed", problem, broken=not optional)
    if version in MALICIOUS.get(name, ()):
        problem = f"{version} stole credentials: remove it, change your keys, pip install '{name}>=2.6.4'"
        return Finding("versions", name, version, problem, broken=True)
    if not SpecifierSet(bounds).contains(version, prereleases=True):
        problem = f"it does not fit {bounds}: pip install '{name}{bounds}'"
        return Finding("versions", name, version, problem, broken=not optional)
    return Finding("versions", name, version)


def extras() -> Iterator[Finding]:
    """Look at the optional packages: what is absent is no problem, one too old is."""
    for extra, needed in sorted(required().items()):
        if extra in ("", "all"):
            continue
        found = [_package(name, bounds, optional=True) for name, bounds in needed.items()]
        missing = [each.name for each in found if each.value == "not installed"]
        value = ", ".join(f"{each.name} {each.value}" for each in found if each.name not in missing)
        if missing:
            value = f"missing {', '.join(missing)}: pip install 'manyheads[{extra}]'"
        problems = [f"{each.name} {each.value}: {each.problem}" for each in found if each.problem]
        yield Finding("extras", extra, value, "; ".join(problems))


def machine() -> Iterator[Finding]:
    """Look at the system, the processor and the memory."""
    import torch

    yield Finding("machine", "system", platform.platform())
    flags = _fields("/proc/cpuinfo")
    units = [
        name
        for name in ("avx2", "avx512f", "avx512_bf16", "amx_tile", "asimd", "sve")
        if name in (flags.get("flags") or flags.get("Features") or "").split()
    ]
    name = flags.get("model name") or platform.processor() or platform.machine()
    yield Finding("machine", "cpu", name)
    used = torch.backends.cpu.get_cpu_capability()
    yield Finding("machine", "vector units", f"{', '.join(units) or 'not known'}; torch takes {used}")
    threads = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    problem = (
        f"more threads than cores: they wait for each other; set OMP_NUM_THREADS={cores} or less"
        if threads > cores
        else ""
    )
    yield Finding("machine", "threads", f"{threads} of {cores} cores", problem)
    memory = _fields("/proc/meminfo")
    if memory:
        total, free = (int(memory[key].split()[0]) << 10 for key in ("MemTotal", "MemAvailable"))
        few = (
            "less than 1 GiB is free: end other programs, or take smaller batches"
            if free < LITTLE_MEMORY
            else ""
        )
        yield Finding("machine", "memory", f"{_size(free)} free of {_size(total)}", few)


def gpus() -> Iterator[Finding]:
    """Look at the graphics cards, their driver, and whether Triton's kernels run there."""
    import torch

    driver = _driver()
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            value = (
                f"{about.name}, {_size(about.total_memory)}, compute capability {about.major}.{about.minor}"
            )
            yield Finding("gpu", f"gpu {index}", value)
        yield Finding(
            "gpu", "driver", f"{driver or 'not known'}; torch was built for CUDA {torch.version.cuda}"
        )
        yield _triton()
    elif driver:
        why = (
            "this torch was built without CUDA: install a build with it"
            if torch.version.cuda is None
            else f"torch (CUDA {torch.version.cuda}) finds no GPU: is the driver new enough, is one visible?"
        )
        yield Finding("gpu", "gpu", f"driver {driver}, but torch sees none", why)
    else:
        yield Finding("gpu", "gpu", "none: everything runs on the CPU paths")


def _triton() -> Finding:
    """Run a small kernel."""
    import torch

    from manyheads.core.dispatch import use_backend
    from manyheads.core.ops import rms_norm

    try:
        with use_backend("rms_norm=triton"):
            rms_norm(torch.ones(4, 64, device="cuda"), torch.ones(64, device="cuda"))
            torch.cuda.synchronize()
    except Exception as error:  # whatever the compiler, the driver or the card says
        why = " ".join(str(error).split())[:200]
        return Finding(
            "gpu", "triton", "does not run", f"{why}: Triton needs a C compiler and a fitting driver", True
        )
    return Finding("gpu", "triton", "a kernel ran")


def _driver() -> str:
    text = _text("/proc/driver/nvidia/version").split()
    return next((word for word in text if word[:1].isdigit() and "." in word), "")


def folders() -> Iterator[Finding]:
    """Look at the caches: where they are, how large, whether they can be written, what the disk has left."""
    cache = datasets.cache_folder()
    yield _writable("cache", cache, "set MANYHEADS_CACHE to a folder that can be written", broken=True)
    for folder in sorted(each for each in cache.glob("*") if each.is_dir()):
        yield Finding("folders", f"  {folder.name}", f"{_size(folder_size(folder))}, {folder}")
    numba = Path(os.environ.get("NUMBA_CACHE_DIR") or ROOMS)
    compiled = sum(
        (Path(folder) / name).stat().st_size
        for folder, _, names in os.walk(numba, followlinks=True)  # of a clone, the rooms are links
        for name in names
        if name.endswith((".nbc", ".nbi"))
    )
    yield _writable(
        "compiled loops", numba, "set NUMBA_CACHE_DIR to one, else each start compiles them again"
    )
    yield Finding("folders", "  numba", f"{_size(compiled)} in *.nbc and *.nbi")
    yield _writable("working folder", Path.cwd(), "runs and jobs go to --output then: name another folder")
    yield _writable(
        "temporary files", Path(tempfile.gettempdir()), "set TMPDIR to another folder", broken=True
    )


def _writable(name: str, folder: Path, remedy: str, broken: bool = False) -> Finding:
    """Write a file, and look how much room is left."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return Finding(
            "folders", name, str(folder), f"it cannot be written ({error.strerror}): {remedy}", broken
        )
    little = f"less than {_size(LITTLE_DISK)} are free: make room, or {remedy}" if free < LITTLE_DISK else ""
    return Finding("folders", name, f"{folder}, {_size(free)} free", little)


def folder_size(folder: Path) -> int:
    """Return the bytes of a folder's files, of the first ones where there are very many."""
    total = 0
    for count, path in enumerate(folder.rglob("*")):
        if count >= COUNTED:
            break
        try:
            total += 0 if path.is_symlink() or not path.is_file() else path.stat().st_size
        except OSError:  # removed while it was looked at
            continue
    return total


def data_folders() -> Iterator[Finding]:
    """Look at the folders of MANYHEADS_DATA, and count the data sets that are here."""
    named = [each for each in os.environ.get("MANYHEADS_DATA", "").split(os.pathsep) if each]
    for each in named:
        there = Path(each).is_dir()
        gone = "" if there else "there is no such folder: correct MANYHEADS_DATA"
        yield Finding("data", "MANYHEADS_DATA", each, gone)
    known = datasets.datasets()
    here = sum(datasets.present(each) is not None for each in known)
    yield Finding("data", "data sets", f"{here} of {len(known)} are here (`manyheads data list`)")


def hub() -> Iterator[Finding]:
    """Ask the hub for anything, for two seconds at most; without it all that is here works."""
    from manyheads.core.hub_api import endpoint, offline

    try:
        address = endpoint()
    except ManyheadsError as error:
        yield Finding("hub", "hub", "HF_ENDPOINT is no address that may be asked", str(error))
        return
    if offline():
        yield Finding("hub", "hub", f"{address}, not asked: HF_HUB_OFFLINE is set")
        return
    answer: list[str] = []
    start = time.perf_counter()
    asking = threading.Thread(target=lambda: answer.append(_ask(address)), daemon=True)
    asking.start()
    asking.join(HUB_SECONDS)
    said = answer[0] if answer else f"no answer within {HUB_SECONDS:.0f} s"
    if said:
        advice = "models that are here work; HF_ENDPOINT names another hub, HF_HUB_OFFLINE=1 stops asking"
        yield Finding("hub", "hub", f"{address} cannot be reached ({said})", advice)
    else:
        yield Finding("hub", "hub", f"{address} answers after {1000 * (time.perf_counter() - start):.0f} ms")


def _ask(address: str) -> str:
    """Return what kept an answer away; nothing where one came, whatever it says."""
    import urllib.error
    import urllib.request

    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=HUB_SECONDS):
            return ""
    except urllib.error.HTTPError:
        return ""
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return str(getattr(reason, "strerror", None) or reason)


def environment() -> Iterator[Finding]:
    """Look at variables: ours, and those that hurt."""
    for name in sorted(os.environ):
        value = os.environ[name]
        hurts, advice = HARMFUL.get(name, (None, ""))
        if hurts is not None and hurts(value):
            yield Finding("environment", name, value or "(empty)", advice)
        elif name.startswith(("MANYHEADS_", "HF_", "OMP_", "MKL_")) and "TOKEN" not in name:
            yield Finding("environment", name, value)


def _fields(path: str) -> Mapping[str, str]:
    """Read the first block of a file of `name: value`."""
    lines = _text(path).split("\n\n")[0].splitlines()
    return {
        name.strip(): value.strip() for name, colon, value in (line.partition(":") for line in lines) if colon
    }


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
