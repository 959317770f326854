"""Fixtures for the job tests: the fake domain, in this process and as a script."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).with_name("fake_job.py")
CLUSTER = """
import sys
import ray
ray.init(
    address="local", num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
    object_store_memory=200 << 20, _temp_dir=sys.argv[1], _node_ip_address="127.0.0.1",
)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()  # until the tests close it
"""


def load(path: Path) -> ModuleType:
    """Import a helper, for tests cannot import each other."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def fake() -> ModuleType:
    """The fake domain's module."""
    return load(SCRIPT)


@pytest.fixture(scope="session")
def load_helper() -> Callable[[Path], ModuleType]:
    """Imports a file that is no module of the package."""
    return load


@pytest.fixture(scope="session")
def serving_tools() -> ModuleType:
    """Tiny models of all domains, and servers."""
    return load(SCRIPT.with_name("serving_tools.py"))


class JobScript:
    """Runs fake jobs as processes."""

    def arguments(self, source: Path, output: Path, **options: object) -> list[str]:
        """The command line of a job."""
        known = {"model": '{"name": "fake"}', "inputs": [str(source)], "output": str(output), "quiet": True}
        return [sys.executable, str(SCRIPT), json.dumps({**known, "shard_size": 8, **options})]

    def start(self, source: Path, output: Path, **options: object) -> subprocess.Popen[str]:
        """Start a job."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        return subprocess.Popen(
            self.arguments(source, output, **options), text=True, env=environment, **pipes
        )

    def __call__(self, source: Path, output: Path, **options: object) -> tuple[int, str, str]:
        """Run a job to its end; exit code, output and errors."""
        process = self.start(source, output, **options)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err


@pytest.fixture(scope="session")
def job() -> JobScript:
    """Runs fake jobs as processes."""
    return JobScript()


def write_source(path: Path, records: int = 40, bad: tuple[int, ...] = ()) -> Path:
    """Write a source of the fake domain."""
    lines = [f"r{i} {'x' if i in bad else i % 5}" for i in range(records)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Five shards of eight records, of which r3, r17 and r18 are bad; r5 has no rows."""
    return write_source(tmp_path / "in.txt", bad=(3, 17, 18))


def digests(folder: Path) -> dict[str, str]:
    """The hash of every file of a folder, and of the folders in it."""
    found = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in found}


def rows(folder: Path) -> Counter[tuple[object, ...]]:
    """The rows of all parts, as a multiset."""
    import pyarrow.parquet as pq

    tables = [pq.read_table(file) for file in sorted(folder.glob("part-*.parquet"))]
    return Counter(tuple(row.values()) for table in tables for row in table.to_pylist())


@pytest.fixture(scope="session")
def inspect_folder() -> ModuleType:
    """The helpers above, for tests cannot import each other."""
    helpers = ModuleType("inspect_folder")
    helpers.digests, helpers.rows, helpers.write_source = digests, rows, write_source  # type: ignore[attr-defined]
    return helpers


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """The address of a Ray cluster of three processors, on this machine alone."""
    pytest.importorskip("ray", reason="Ray is not installed")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with (
        tempfile.TemporaryDirectory(prefix="mh-", dir="/tmp", ignore_cleanup_errors=True) as folder,
        pytest.MonkeyPatch.context() as patch,
        subprocess.Popen(
            [sys.executable, "-c", CLUSTER, folder], text=True, env=environment, **pipes
        ) as holder,
    ):
        assert holder.stdout is not None
        address = holder.stdout.readline().strip()
        assert address, "no cluster came up"
        patch.setenv("RAY_AUTH_MODE", "disabled")
        yield address
        # not by closing its input: workers that this process forked meanwhile hold that open, too
        holder.send_signal(signal.SIGINT)
        try:
            holder.wait(60)
        except subprocess.TimeoutExpired:
            holder.kill()
