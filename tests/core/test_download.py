"""Downloads from a server with faults: the right bytes under the right name, or a plain message alone."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import time

import pytest

from manyheads.core import download as module
from manyheads.core import network
from manyheads.core.download import Wanted, download
from manyheads.core.errors import DataError, ManyheadsError
from manyheads.core.network import NetworkError, Refused

CONTENT = random.Random(0).randbytes(300_000)


@pytest.fixture
def served(fake_hub):
    """The hub, with one large file."""
    fake_hub.repositories["org/name"].commit({"w.bin": CONTENT, "small.txt": b"hello"})
    return fake_hub


def wanted(hub, name="w.bin", **changes):
    repository = hub.repositories["org/name"]
    commit = repository.revisions["main"]
    data = repository.commits[commit][name]
    known = {
        "address": f"{hub.address}/org/name/resolve/{commit}/{name}",
        "size": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "commit": commit,
    }
    return Wanted(**{**known, **changes})


def ranges(hub):
    return [headers.get("Range") for _, _, headers in hub.asked("/resolve/")]


def fetch(hub, tmp_path, **changes):
    target = tmp_path / "w.bin"
    digest = download(wanted(hub, **changes), target)
    assert hashlib.sha256(target.read_bytes()).hexdigest() == digest
    return target


def test_plain(served, tmp_path):
    seen = []
    target = tmp_path / "w.bin"
    assert download(wanted(served), target, {}, seen.append) == hashlib.sha256(CONTENT).hexdigest()
    assert target.read_bytes() == CONTENT
    assert sorted(seen) == seen
    assert seen[-1] == len(CONTENT)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["w.bin"]


def test_small_file_by_gits_hash(served, tmp_path):
    import fake_hub

    found = wanted(served, "small.txt", sha256=None, git_sha1=fake_hub.git_sha1(b"hello"))
    assert download(found, tmp_path / "s") == hashlib.sha256(b"hello").hexdigest()
    with pytest.raises(DataError, match="git hash differs"):
        download(wanted(served, "small.txt", sha256=None, git_sha1="0" * 40), tmp_path / "t")
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("cut", [0, 1, 65_535, 65_536, 150_000, 299_999])
def test_cut_connection_goes_on_where_it_stopped(served, tmp_path, cut):
    served.faults.cuts = [cut]
    assert fetch(served, tmp_path).read_bytes() == CONTENT
    assert ranges(served) == [None, f"bytes={cut}-" if cut else None]


def test_cut_again_and_again(served, tmp_path):
    served.faults.cuts = [
        70_000,
        70_000,
        70_000,
        1,
        1,
        1,
        70_000,
    ]  # three in a row that hardly bring anything
    assert fetch(served, tmp_path).read_bytes() == CONTENT
    assert ranges(served)[-1] == "bytes=280003-"


def test_resumed_by_a_later_call(served, tmp_path):
    served.faults.cuts = [100_000, 0, 0, 0, 0, 0]
    with pytest.raises(NetworkError, match=r"broke off at 100000 bytes \(after 5 tries\)"):
        fetch(served, tmp_path)
    assert not (tmp_path / "w.bin").exists()
    assert (tmp_path / ".w.bin.part").stat().st_size == 100_000
    served.faults.cuts, served.requests[:] = [], []
    assert fetch(served, tmp_path).read_bytes() == CONTENT
    assert ranges(served) == ["bytes=100000-"]
    asked = served.asked("/resolve/")[0][2]
    assert asked["If-Range"] == f'"{hashlib.sha256(CONTENT).hexdigest()}"'


def test_a_server_that_knows_no_ranges_and_breaks_off_gets_nowhere(served, tmp_path):
    served.faults.ignore_ranges, served.faults.cuts = True, [200_000] * 50
    with pytest.raises(NetworkError, match="after 5 tries"):
        fetch(served, tmp_path)
    assert len(served.asked("/resolve/")) == 5
    served.faults.cuts = [200_000]
    assert fetch(served, tmp_path).read_bytes() == CONTENT


def test_another_etag_begins_anew(served, tmp_path):
    right = f'"{hashlib.sha256(CONTENT).hexdigest()}"'
    served.faults.etags, served.faults.cuts = ['"old"', right], [100_000]
    assert fetch(served, tmp_path).read_bytes() == CONTENT
    assert ranges(served) == [
        None,
        "bytes=100000-",
    ]  # answered by 200 and the whole file, for If-Range failed


def test_a_part_of_content_with_another_etag_is_not_appended(served, tmp_path):
    """A server that ignores If-Range: the part's ETag in the 206 is looked at."""
    served.faults.etags, served.faults.cuts = ['W/"weak"', 'W/"other"'], [100_000]
    assert fetch(served, tmp_path).read_bytes() == CONTENT
    assert ranges(served) == [None, "bytes=100000-", None]


@pytest.mark.parametrize("where", [0, 150_000, 299_999])
def test_corrupted_bytes_of_equal_length(served, tmp_path, where):
    bad = bytearray(CONTENT)
    bad[where] ^= 1
    served.faults.corrupt = {"w.bin": bytes(bad)}
    with pytest.raises(DataError, match=r"sends other bytes for w\.bin than it lists"):
        fetch(served, tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == []
    served.faults.corrupt = {}
    assert fetch(served, tmp_path).read_bytes() == CONTENT


def test_a_damaged_part_is_fetched_anew(served, tmp_path):
    served.faults.cuts = [100_000, 0, 0, 0, 0, 0]
    with pytest.raises(NetworkError):
        fetch(served, tmp_path)
    part = bytearray((tmp_path / ".w.bin.part").read_bytes())
    part[50_000] ^= 1
    (tmp_path / ".w.bin.part").write_bytes(bytes(part))
    served.faults.cuts, served.requests[:] = [], []
    assert fetch(served, tmp_path).read_bytes() == CONTENT
    assert ranges(served) == ["bytes=100000-", None]


@pytest.mark.parametrize(
    "side", [b"", b"[]", b"{", b'{"size": 300000, "hash": "no"}', b"\xff" * 9, b"[" * 9000, None, "link"]
)
def test_a_part_of_another_file_is_left_out(served, tmp_path, side):
    (tmp_path / ".w.bin.part").write_bytes(b"other")
    if side == "link":
        (tmp_path / "evil").write_text("{}")
        (tmp_path / ".w.bin.part.json").symlink_to(tmp_path / "evil")
    elif side is not None:
        (tmp_path / ".w.bin.part.json").write_bytes(side)
    assert fetch(served, tmp_path).read_bytes() == CONTENT
    assert ranges(served) == [None]


def test_a_link_in_the_parts_place_is_not_written_through(served, tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / ".w.bin.part").symlink_to(tmp_path / "victim")
    assert fetch(served, tmp_path).read_bytes() == CONTENT
    assert (tmp_path / "victim").read_text() == "mine"


def test_wrong_content_length(served, tmp_path):
    served.faults.length = [400_000]
    assert fetch(served, tmp_path).read_bytes() == CONTENT
    served.faults.length = [10] * 9
    (tmp_path / "w.bin").unlink()
    with pytest.raises(NetworkError, match="announces 10 bytes, and lists 300000"):
        fetch(served, tmp_path)


def test_more_than_listed(served, tmp_path):
    with pytest.raises(NetworkError, match="announces 300000 bytes, and lists 1000"):
        download(wanted(served, size=1000), tmp_path / "w.bin")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == []


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_passing_errors_are_tried_again(served, tmp_path, status):
    served.faults.status = {"/resolve/": [(status, {}), (status, {"Retry-After": "0"})]}
    assert fetch(served, tmp_path).read_bytes() == CONTENT
    assert len(served.asked("/resolve/")) == 3


def test_retry_after_is_waited_for_but_not_for_ever(served, tmp_path, monkeypatch):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    served.faults.status = {"/resolve/": [(429, {"Retry-After": "7"}), (503, {"Retry-After": "3"})]}
    assert fetch(served, tmp_path).read_bytes() == CONTENT
    assert slept == [7, 3]
    served.faults.status = {"/resolve/": [(429, {"Retry-After": "86400"})]}
    (tmp_path / "w.bin").unlink()
    with pytest.raises(NetworkError, match=r"answers 429 .*asks for 86400 s of patience: try again later"):
        fetch(served, tmp_path)
    date = "Wed, 21 Oct 2099 07:28:00 GMT"
    served.faults.status = {"/resolve/": [(503, {"Retry-After": date})]}
    with pytest.raises(NetworkError, match="patience"):
        fetch(served, tmp_path)


def test_errors_that_stay(served, tmp_path):
    served.faults.status = {"/resolve/": [(503, {})] * 9}
    with pytest.raises(NetworkError, match=r"answers 503 Service Unavailable \(after 5 tries\)"):
        fetch(served, tmp_path)
    served.faults.status = {"/resolve/": [(403, {})]}
    with pytest.raises(Refused, match="answers 403"):
        fetch(served, tmp_path)


def test_range_beyond_the_end(served, tmp_path):
    """A part that the server calls too long (416) is thrown away."""
    served.faults.cuts = [100_000]
    served.faults.status = {"/resolve/": []}
    original = network.open_address
    calls = []

    def once(address, headers=None):
        calls.append(dict(headers or {}))
        if len(calls) == 2:
            served.faults.status = {"/resolve/": [(416, {})]}
        return original(address, headers)

    module.open_address, before = once, module.open_address
    try:
        assert fetch(served, tmp_path).read_bytes() == CONTENT
    finally:
        module.open_address = before
    assert [call.get("Range") for call in calls] == [None, "bytes=100000-", None]


def test_silence_is_given_up(served, tmp_path, monkeypatch):
    monkeypatch.setattr(network, "TIMEOUT", 0.2)
    monkeypatch.setattr(network, "TRIES", 2)
    served.faults.slow = 5.0
    with pytest.raises(NetworkError, match="after 2 tries"):
        fetch(served, tmp_path)


def test_a_trickle_is_given_up(served, tmp_path, monkeypatch):
    monkeypatch.setattr(network, "TIMEOUT", 0.5)
    monkeypatch.setattr(network, "TRIES", 1)
    served.faults.slow = 0.1
    with pytest.raises(NetworkError, match="sends almost nothing"):
        fetch(served, tmp_path)


def test_nobody_there(tmp_path):
    gone = Wanted("http://127.0.0.1:9/x", 10, sha256="0" * 64)
    network.BACKOFF, before = 0.01, network.BACKOFF
    try:
        with pytest.raises(NetworkError, match=r"127.0.0.1:9: .*refused.* \(after 5 tries\)"):
            download(gone, tmp_path / "x")
    finally:
        network.BACKOFF = before


def test_redirects(served, tmp_path):
    import fake_hub

    with fake_hub.FakeHub() as store:
        store.objects = served.objects
        served.faults.redirect = store.address
        served.faults.cuts, store.faults.cuts = [], [100_000]
        target = tmp_path / "w.bin"
        download(wanted(served), target, {"Authorization": "Bearer hf_secret"})
        assert target.read_bytes() == CONTENT
        assert all(headers["Authorization"] == "Bearer hf_secret" for *_, headers in served.requests)
        assert len(store.requests) == 2
        assert not any("Authorization" in headers for *_, headers in store.requests)
        assert store.requests[1][2]["Range"] == "bytes=100000-"


def test_redirect_loop(served, tmp_path):
    served.faults.loop = True
    with pytest.raises(NetworkError, match="redirects more than 5 times: a loop"):
        fetch(served, tmp_path)
    assert len(served.asked("/resolve/")) == 6


@pytest.mark.parametrize(
    "where",
    ["http://example.org", "file:///etc/passwd#", "ftp://example.org", "http://[", "", "https://u:p@example.org",
     "data:text/plain,x#", "https://"],
)  # fmt: skip
def test_redirects_that_are_not_followed(served, tmp_path, where, monkeypatch):
    served.faults.redirect = where or "https:"
    asked = []
    original = network._ask
    monkeypatch.setattr(
        network, "_ask", lambda address, headers: asked.append(address) or original(address, headers)
    )
    with pytest.raises(ManyheadsError, match="only https addresses are downloaded from"):
        fetch(served, tmp_path)
    assert len(asked) == 1


@pytest.mark.parametrize(
    "address",
    ["http://example.org/x", "file:///etc/passwd", "https:///x", "https://user:word@example.org/x", "//x",
     "https://example.org/a b", "https://example.org/\n", "https://exämple.org/", "https://[", "http://127.0.0.1.evil.org/"],
)  # fmt: skip
def test_addresses_that_are_not_asked(address):
    with pytest.raises(DataError, match="only https addresses are downloaded from"):
        network.checked(address)


def test_packed_content_is_refused(served, tmp_path):
    served.faults.body = {"/resolve/": b"\x1f\x8b"}
    served.faults.headers = {"Content-Encoding": "gzip"}
    with pytest.raises(NetworkError, match="sends packed content"):
        fetch(served, tmp_path)


def test_another_commit_is_refused(served, tmp_path):
    served.faults.commit = "1" * 40
    with pytest.raises(NetworkError, match="answers for another commit than"):
        fetch(served, tmp_path)


def test_no_room(served, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(ManyheadsError, match=r"w\.bin has 0.3 MB, and .* has room for 0.0 MB: make room"):
        fetch(served, tmp_path)
    assert served.requests == []


def test_a_full_disk_keeps_the_part(served, tmp_path, monkeypatch):
    original = module._Part._count
    left = [2]

    def full(part, block):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        original(part, block)

    monkeypatch.setattr(module, "BLOCK", 1 << 16)
    monkeypatch.setattr(module._Part, "_count", full)
    with pytest.raises(ManyheadsError, match=r"cannot write .*No space left on device"):
        fetch(served, tmp_path)
    monkeypatch.undo()
    assert json.loads((tmp_path / ".w.bin.part.json").read_bytes())["size"] == len(CONTENT)
