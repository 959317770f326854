from __future__ import annotations

import dataclasses
import gzip
import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from manyheads.core import catalog, datasets
from manyheads.core.catalog import DOMAINS
from manyheads.core.datasets import DataSet, File
from manyheads.core.errors import DataError, UsageError

BYTES = b"date,OT\n2020-01-01,1\n" * 20_000
PACKED = gzip.compress(BYTES)


class Handler(BaseHTTPRequestHandler):
    """Serves BYTES, more of them, others, half of them, packed ones, or a redirect off https."""

    def do_GET(self) -> None:
        bodies = {
            "/more": BYTES + b"x",
            "/other": BYTES[:-1] + b"!",
            "/data.csv.gz": PACKED,
            "/bomb.gz": gzip.compress(b"\0" * 100_000_000),
            "/other.gz": gzip.compress(BYTES[:-1] + b"!"),
            "/cut.gz": PACKED[:-600],
        }
        body = bodies.get(self.path, BYTES)
        if self.path in ("/moved", "/away"):
            self.send_response(302)
            self.send_header(
                "Location", "/data.csv" if self.path == "/moved" else "http://example.org/data.csv"
            )
            self.end_headers()
            return
        self.send_response(404 if self.path == "/gone" else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if self.path == "/half" else body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MANYHEADS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MANYHEADS_DATA", raising=False)
    return tmp_path / "cache"


def data_set(*addresses: str | None, name: str = "toy.csv") -> DataSet:
    """A set of one file an address."""
    digest = hashlib.sha256(BYTES).hexdigest()
    names = [name] if len(addresses) == 1 else [f"{i}-{name}" for i in range(len(addresses))]
    files = tuple(
        File(f"timeseries/{each}", len(BYTES), digest, address)
        for each, address in zip(names, addresses, strict=True)
    )
    return DataSet("toy", "timeseries", "a toy", "none", files, "ratio", (1, 1), ("OT",))


def left_over(cache: Path) -> list[str]:
    return sorted(str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file())


def test_table_is_sound() -> None:
    names = [each.name for each in datasets.datasets()]
    assert {"etth1", "exchange_rate", "national_illness", "fashion_mnist", "cifar10_10k"} <= set(names)
    assert len(set(names)) == len(names)
    for domain in DOMAINS:
        for each in datasets.datasets(domain):
            assert each.domain == domain
            assert domain != "timeseries" or len(each.columns) == each.shape[1]
            folder = Path(each.files[0].path).parent  # which stands for the data set
            assert all(folder in Path(file.path).parents for file in each.files)
            assert each.size == sum(file.size for file in each.files) > 0
            for file in each.files:
                assert file.path.startswith(f"{domain}/")
                assert len(file.sha256) == 64
                assert file.address is None or file.address.startswith("https://")


def test_unknown_names() -> None:
    with pytest.raises(UsageError, match=r"no data set 'ettH1'; did you mean 'etth1'\?"):
        datasets.locate("ettH1")
    with pytest.raises(UsageError, match=r"no domain 'timseries'; did you mean 'timeseries'\?"):
        datasets.datasets("timseries")


def test_embedded_etth1_is_unchanged() -> None:
    path = datasets.locate("etth1")
    entry = datasets.find("etth1")
    assert entry.files[0].sha256 == "f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == entry.files[0].sha256
    assert path.stat().st_size == entry.size
    for beside in ("ETT_LICENSE.txt", "README.md"):
        assert (path.parent / beside).is_file()
    assert "CC BY-ND 4.0" in (path.parent / "README.md").read_text()


def test_search_order(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def put(folder: Path, name: str = "ETTh1.csv") -> Path:
        path = folder / "timeseries" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x")
        return path

    cached = put(cache / "data")
    assert datasets.locate("etth1") == cached
    second = put(tmp_path / "second", "ETTh1.csv.gz")
    monkeypatch.setenv("MANYHEADS_DATA", f"{tmp_path / 'first'}{os.pathsep}{tmp_path / 'second'}")
    assert datasets.locate("etth1") == second
    first = put(tmp_path / "first")
    assert datasets.locate("etth1") == first


def test_without_an_address_the_error_says_where_to_put_it() -> None:
    with pytest.raises(
        DataError, match=r"'exchange_rate' has no address .* set MANYHEADS_DATA to that folder"
    ):
        datasets.locate("exchange_rate")


@pytest.mark.parametrize("page", ["/data.csv", "/moved", "/data.csv.gz"])
def test_download(server: str, cache: Path, page: str) -> None:
    steps: list[tuple[int, int]] = []
    path = datasets.download(data_set(server + page), lambda done, total: steps.append((done, total)))
    assert path.read_bytes() == BYTES
    assert left_over(cache) == ["data/timeseries/toy.csv"]
    assert steps[-1] == (len(BYTES), len(BYTES))
    assert steps == sorted(steps)
    assert len(steps) > 1 or page.endswith(".gz")


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("/more", "sends more than the 420000 bytes"),
        ("/other", "sent other bytes than expected"),
        ("/half", "sent other bytes|IncompleteRead"),
        ("/bomb.gz", "sends more than the 420000 bytes"),
        ("/other.gz", "sent other bytes than expected"),
        ("/cut.gz", "sent other bytes than expected"),
        ("/data.csv?.gz", "could not be downloaded from"),  # says that it is packed, and is not
        ("/gone", "could not be downloaded from .* set MANYHEADS_DATA"),
        ("/away", "only https addresses are downloaded from"),
    ],
)
def test_a_bad_download_leaves_nothing(server: str, cache: Path, page: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        datasets.download(data_set(server + page))
    assert left_over(cache) == []


def test_a_set_of_several_files_is_their_folder(server: str, cache: Path) -> None:
    steps: list[tuple[int, int]] = []
    several = data_set(f"{server}/data.csv", f"{server}/data.csv.gz")
    folder = datasets.download(several, lambda done, total: steps.append((done, total)))
    assert folder == cache / "data" / "timeseries"
    assert left_over(cache) == ["data/timeseries/0-toy.csv", "data/timeseries/1-toy.csv"]
    assert all((cache / name).read_bytes() == BYTES for name in left_over(cache))
    assert steps == sorted(steps)
    assert steps[-1] == (2 * len(BYTES), 2 * len(BYTES))


def test_what_is_lacking_of_several_files_is_fetched(
    server: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = catalog.table("timeseries", "datasets")
    monkeypatch.setattr(table, "DATASETS", (data_set(f"{server}/data.csv", f"{server}/other"),))
    with pytest.raises(DataError, match="sent other bytes"):
        datasets.locate("toy")
    assert left_over(cache) == ["data/timeseries/0-toy.csv"]
    monkeypatch.setattr(table, "DATASETS", (data_set(f"{server}/gone", f"{server}/data.csv"),))
    assert datasets.locate("toy") == cache / "data" / "timeseries"
    monkeypatch.setattr(table, "DATASETS", (data_set(None, None),))
    (cache / "data/timeseries/1-toy.csv").unlink()
    with pytest.raises(DataError, match=r"put the file at timeseries/1-toy.csv\[.gz\] below a folder"):
        datasets.locate("toy")
    for name in ("0-toy.csv", "1-toy.csv.gz"):  # elsewhere, one of them packed
        path = tmp_path / "mine" / "timeseries" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    monkeypatch.setenv("MANYHEADS_DATA", str(tmp_path / "mine"))
    assert datasets.locate("toy") == tmp_path / "mine" / "timeseries"


def test_no_connection(server: str) -> None:
    port = int(server.rpartition(":")[2])
    with pytest.raises(DataError, match="could not be downloaded"):
        datasets.download(data_set(f"http://127.0.0.1:{1 if port != 1 else 2}/data.csv"))


@pytest.mark.parametrize(
    "address", ["http://example.org/a.csv", "ftp://example.org/a.csv", "file:///etc/hostname"]
)
def test_only_https(address: str, cache: Path) -> None:
    with pytest.raises(DataError, match="only https"):
        datasets.download(data_set(address))
    assert left_over(cache) == []


def test_locate_downloads_what_is_nowhere(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table = catalog.table("timeseries", "datasets")
    monkeypatch.setattr(table, "DATASETS", (*table.DATASETS, data_set(server + "/data.csv")))
    path = datasets.locate("toy")
    assert path.read_bytes() == BYTES
    monkeypatch.setattr(table, "DATASETS", (dataclasses.replace(data_set(server + "/gone")),))
    assert datasets.locate("toy") == path  # from the cache now


def test_the_table_imports_nothing_heavy() -> None:
    code = (
        "import sys; from manyheads.core import datasets; datasets.datasets(); datasets.locate('etth1');"
        "print([m for m in ('torch', 'pandas', 'numpy', 'pyarrow', 'lightning') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
