"""What `manyheads doctor` finds: each fault is made, seen, and answered with what to do."""

from __future__ import annotations

import http.server
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from manyheads.apps import checkup, cli
from manyheads.apps.checkup import Finding


def named(found: Iterator[Finding], name: str) -> Finding:
    (one,) = (finding for finding in found if finding.name == name)
    return one


def versions(monkeypatch: pytest.MonkeyPatch, **others: str | None) -> None:
    """Say that packages have other versions; None: they are not installed."""
    real = checkup.importlib.metadata.version

    def version(name: str) -> str:
        found = others.get(name.replace("-", "_"), real(name) if name not in others else None)
        if found is None:
            raise checkup.importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(checkup.importlib.metadata, "version", version)


def test_what_is_here_is_not_broken() -> None:
    found = list(checkup.versions())
    assert {"manyheads", "python", "torch", "lightning"} <= {finding.name for finding in found}
    assert not any(finding.broken for finding in found)


def test_a_missing_package_is_broken_and_a_missing_extra_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch, numba=None, fastapi=None, onnx="1.2.0")
    numba = named(checkup.versions(), "numba")
    assert (numba.value, numba.broken) == ("not installed", True)
    assert "pip install 'numba>=0.63'" in numba.problem
    serve = named(checkup.extras(), "serve")
    assert serve.value == "missing fastapi: pip install 'manyheads[serve]'"
    assert not serve.problem
    export = named(checkup.extras(), "export")
    assert "onnx 1.2.0: it does not fit >=1.19" in export.problem
    assert not export.broken


@pytest.mark.parametrize(
    ("version", "says"), [("2.6.2", "stole credentials"), ("2.0.0", "does not fit >=2.6.4")]
)
def test_lightning_that_may_not_be(version: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch, lightning=version)
    found = named(checkup.versions(), "lightning")
    assert says in found.problem
    assert "lightning>=2.6.4" in found.problem
    assert found.broken


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PYTHONDONTWRITEBYTECODE", "1"),
        ("TRITON_INTERPRET", "1"),
        ("CUDA_LAUNCH_BLOCKING", "1"),
        ("NUMBA_DISABLE_JIT", "1"),
        ("CUDA_VISIBLE_DEVICES", ""),
    ],
)
def test_variables_that_hurt(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    found = named(checkup.environment(), name)
    assert "unset it" in found.problem
    assert not found.broken
    monkeypatch.setenv(name, "0")
    assert all(not each.problem for each in checkup.environment() if each.name == name) or (
        name == "PYTHONDONTWRITEBYTECODE"  # any value counts
    )


def test_secrets_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert "hf_secret" not in str(list(checkup.environment()))


def test_more_threads_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch, "get_num_threads", lambda: 4096)
    assert "OMP_NUM_THREADS=" in named(checkup.machine(), "threads").problem


def test_folders_and_their_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYHEADS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cache/data").mkdir(parents=True)
    (tmp_path / "cache/data/file").write_bytes(b"x" * 3 * 1024)
    (tmp_path / "cache/data/link").symlink_to("file")
    assert named(checkup.folders(), "  data").value.startswith("3.0 KiB")
    monkeypatch.setattr(checkup, "LITTLE_DISK", 1 << 60)
    assert "make room" in named(checkup.folders(), "cache").problem
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["cache", "data", "file", "link"]


def test_a_cache_that_cannot_be_written_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MANYHEADS_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert cli.main(["doctor"]) == 1
    assert (
        "BROKEN cache: it cannot be written (Not a directory): set MANYHEADS_CACHE" in capsys.readouterr().out
    )
    assert cli.main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["broken"] is True


def test_folders_of_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYHEADS_DATA", f"{tmp_path}{os.pathsep}{tmp_path / 'gone'}")
    monkeypatch.setenv("MANYHEADS_CACHE", str(tmp_path))
    there, gone, sets = checkup.data_folders()
    assert not there.problem
    assert "no such folder" in gone.problem
    assert sets.value.startswith("1 of ")  # the one in the package


class Answer404(http.server.BaseHTTPRequestHandler):
    asked = 0

    def do_HEAD(self) -> None:
        type(self).asked += 1
        self.send_error(404)

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_hub_that_answers_and_one_that_may_not_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer404) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("HF_ENDPOINT", address)
        (found,) = checkup.hub()
        assert found.value.startswith(f"{address} answers after")
        assert Answer404.asked == 1
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        (found,) = checkup.hub()
        assert "not asked: HF_HUB_OFFLINE is set" in found.value
        assert Answer404.asked == 1
        server.shutdown()


def test_a_hub_that_is_silent_takes_two_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.perf_counter()
        (found,) = checkup.hub()
        assert time.perf_counter() - start < 2 * checkup.HUB_SECONDS
    assert "cannot be reached" in found.value
    assert "HF_HUB_OFFLINE=1" in found.problem
    assert not found.broken


def test_no_hub_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    (found,) = checkup.hub()
    assert "Connection refused" in found.value
    assert not found.broken


def test_a_hub_whose_address_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "ftp://example.org")
    (found,) = checkup.hub()
    assert "https" in found.problem
    assert not found.broken
