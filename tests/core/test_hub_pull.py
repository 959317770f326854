"""References: from a hub to the cache, pinned, verified, offline, side by side; hostile answers refused."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time

import pytest

from manyheads.core import hub, hub_api, hub_cache, network, pull, references
from manyheads.core.catalog import create_model
from manyheads.core.errors import DataError, ManyheadsError, UsageError
from manyheads.core.hub_api import NotThere
from manyheads.core.network import NetworkError
from manyheads.core.references import Reference, parse
from manyheads.core.verifying import verify

ARGUMENTS = {"seq_len": 48, "pred_len": 12}
NAME = Reference("org/name")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The files of a model folder."""
    folder = tmp_path_factory.mktemp("published") / "model"
    model = create_model("dlinear", **ARGUMENTS)
    hub.save(folder, model, domain="timeseries", name="dlinear", arguments=ARGUMENTS, preprocessing={"a": 1})
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def server(fake_hub, published):
    fake_hub.repositories["org/name"].commit(published)
    return fake_hub


def commit_of(server):
    return server.repositories["org/name"].revisions["main"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", Reference("org/name")),
        ("org/name@v1.0", Reference("org/name", "v1.0")),
        ("org/na.me-2@refs/pr/1", Reference("org/na.me-2", "refs/pr/1")),
        ("org/name@" + "a" * 40, Reference("org/name", "a" * 40)),
    ],
)
def test_references(text, expected):
    assert parse(text) == expected
    assert str(expected) == text
    assert expected.commit == ("a" * 40 if "aaa" in text else None)


@pytest.mark.parametrize(
    "text",
    ["", "name", "/org/name", "org/name/", "org//name", "a/b/c", "../b", "org/..", "org/.git", "org/na me",
     "org/name@",
     "org/name@../..", "org/name@/etc", "org/name@-x", "org/n--n", "org/name@a..b", "~/name", "org/naïve",
     "org/name\n",
     "org\\name", "https://a/b", "org/" + "n" * 97, "org/name.git", "org/name@a\x00", "-/b"],
)  # fmt: skip
def test_what_is_no_reference(text):
    assert parse(text) is None


@pytest.mark.parametrize("name", ["a", "a/b.bin", "é/ü.txt", ".gitattributes", "a b.txt"])
def test_file_names(name):
    assert references.is_path(name)


@pytest.mark.parametrize(
    "name",
    ["", "..", "../a", "a/../b", "a/..", "/a", "a//b", "a/", "C:a", "a\\b", "a\x00b", "a\nb", ".", "./a",
     "a/.", "a.",
     "a ", " ", "a/ /b", "a" * 201, "é" * 101, "a|b", "a*", "a?", "con\x7f", "\u202egnp.exe"],
)  # fmt: skip
def test_file_names_that_lead_out(name, tmp_path):
    assert not references.is_path(name)
    with pytest.raises(ManyheadsError, match="leads out of its folder: refused"):
        hub_cache.place(tmp_path, name)
    assert list(tmp_path.iterdir()) == []


def test_pull_pins_verifies_and_records(server, published):
    pulled = pull.pull(NAME)
    assert (pulled.commit, pulled.name, pulled.dialect) == (commit_of(server), "dlinear", "")
    assert pulled.received == pulled.size == sum(map(len, published.values()))
    assert pulled.tensors == 4
    assert pulled.licence == "apache-2.0"
    assert {p.name for p in pulled.folder.iterdir()} == {*published, "manyheads.lock"}
    record = json.loads((pulled.folder / "manyheads.lock").read_text())
    assert record["commit"] == commit_of(server)
    assert record["files"]["model.safetensors"][1] == hub.read_config(pulled.folder).weights_sha256
    assert all(f"/resolve/{commit_of(server)}/" in path for _, path, _ in server.asked("/resolve/"))
    assert verify(pulled.folder).source == f"org/name at {commit_of(server)}"


def test_second_pull_asks_for_the_commit_alone(server):
    pull.pull(NAME)
    server.requests.clear()
    assert pull.pull(NAME).received == 0
    assert [path for _, path, _ in server.requests] == ["/api/models/org/name/revision/main"]


def test_found_without_network_until_pulled_again(server, published):
    folder = hub.find_folder("org/name")
    server.requests.clear()
    new = server.repositories["org/name"].commit({**published, "README.md": b"---\nlicense: mit\n---\n"})
    assert hub.find_folder("org/name") == folder
    assert server.requests == []
    again = pull.pull(NAME)
    assert again.commit == new
    assert again.licence == "mit"
    assert hub.find_folder("org/name") == again.folder != folder
    assert hub.find_folder(f"org/name@{folder.name}") == folder


def test_load_and_start_take_references(server):
    model, config = hub.load_model(hub.find_folder("org/name"))
    assert config.name == "dlinear"
    assert not model.training


def test_offline(server, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match="org/name is not in the cache, and HF_HUB_OFFLINE forbids to ask"):
        hub.find_folder("org/name")
    assert server.requests == []
    monkeypatch.delenv("HF_HUB_OFFLINE")
    folder = pull.pull(NAME).folder
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    server.requests.clear()
    assert hub.find_folder("org/name") == folder
    assert pull.pull(NAME).folder == folder
    assert server.requests == []


def test_server_gone_and_cached(server, monkeypatch):
    folder = pull.pull(NAME).folder
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert hub.find_folder("org/name") == folder
    with pytest.raises(NetworkError, match="after 5 tries"):
        pull.pull(NAME)


def test_revisions(server, published):
    repository = server.repositories["org/name"]
    first = commit_of(server)
    repository.revisions["v1.0"] = first
    repository.commit({**published, "new.txt": b"1"}, branch="feature/x")
    assert pull.pull(Reference("org/name", "v1.0")).commit == first
    assert pull.pull(Reference("org/name", "feature/x")).commit != first
    assert pull.pull(Reference("org/name", first)).commit == first


def test_a_revision_that_changes_in_the_middle(server, published, monkeypatch):
    """The branch moves after its commit was asked for: all files are still of one commit."""
    first, listing = commit_of(server), hub_api.list_files

    def moved(reference, commit):
        server.repositories["org/name"].commit({**published, "config.json": b"{}"})
        return listing(reference, commit)

    monkeypatch.setattr(hub_api, "list_files", moved)
    pulled = pull.pull(NAME)
    assert pulled.commit == first != commit_of(server)
    assert verify(pulled.folder).name == "dlinear"


def test_broken_download_goes_on_in_the_next_pull(server, published):
    server.faults.cuts = [None, None, 5000, 0, 0, 0, 0, 0]
    with pytest.raises(NetworkError, match=r"model.safetensors broke off at 5000 bytes"):
        pull.pull(NAME)
    with pytest.raises(NetworkError):
        server.faults.cuts = [0] * 9
        hub.find_folder("org/name")
    server.faults.cuts = []
    server.requests.clear()
    assert verify(pull.pull(NAME).folder).name == "dlinear"
    weights = [headers.get("Range") for _, _, headers in server.asked("model.safetensors")]
    assert weights == ["bytes=5000-"]


def test_corrupted_weights_never_get_a_name(server, published):
    bad = bytearray(published["model.safetensors"])
    bad[-1] ^= 1
    server.faults.corrupt = {"model.safetensors": bytes(bad)}
    with pytest.raises(DataError, match=r"sends other bytes for model.safetensors than it lists \(SHA-256"):
        pull.pull(NAME)
    assert not list(hub_cache.snapshot(NAME, commit_of(server)).glob("model*"))
    server.faults.corrupt = {}
    assert verify(pull.pull(NAME).folder).name == "dlinear"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "README.md"])
def test_a_damaged_cache_is_seen(server, name):
    folder = pull.pull(NAME).folder
    content = bytearray((folder / name).read_bytes())
    content[-3] ^= 1
    (folder / name).write_bytes(bytes(content))
    for check in (lambda: hub.find_folder("org/name"), lambda: pull.pull(NAME), lambda: verify(folder)):
        with pytest.raises(ManyheadsError, match=r"is not what was downloaded \(its SHA-256 differs\)"):
            check()


def test_a_swapped_pair_of_config_and_weights_is_seen(server):
    """Weights and the hash in the config replaced together."""
    folder = pull.pull(NAME).folder
    other = create_model("dlinear", **ARGUMENTS)
    record = (folder / "manyheads.lock").read_bytes()
    about = {"domain": "timeseries", "name": "dlinear", "arguments": ARGUMENTS, "preprocessing": {}}
    hub.save(folder, other, **about)
    (folder / "manyheads.lock").write_bytes(record)
    with pytest.raises(ManyheadsError, match="damaged or replaced"):
        hub.find_folder("org/name")


@pytest.mark.parametrize("where", ["repository", "snapshot", "file", "lock", "record", "refs"])
def test_links_in_the_cache_are_refused(server, tmp_path, where):
    outside = tmp_path / "outside"
    folder = pull.pull(NAME).folder
    moved = {
        "repository": folder.parents[1],
        "snapshot": folder,
        "file": folder / "model.safetensors",
        "lock": folder.parents[1] / ".lock",
        "record": folder / "manyheads.lock",
        "refs": folder.parents[1] / "refs",
    }[where]
    moved.rename(outside)
    moved.symlink_to(outside)
    with pytest.raises(ManyheadsError, match="is a symbolic link"):
        pull.pull(NAME)


@pytest.mark.parametrize(
    ("setup", "says"),
    [
        (
            {"name": "org/none"},
            r"no model org/none at 127.0.0.1:\d+; a private one needs a token \(HF_TOKEN\)",
        ),
        ({"name": "org/none", "token": "hf_secret"}, r"no model org/none at 127.0.0.1:\d+$"),
        ({"name": "org/name@v9"}, "org/name has no revision 'v9' at"),
        ({"name": "org/name@" + "f" * 40}, "org/name has no revision 'f{40}' at"),
        ({"gated": True}, "org/name is gated: ask for access on its page at .*, then set HF_TOKEN"),
        ({"private": True}, "no model org/name at .*; a private one needs a token"),
        ({"status": 401}, r"wants a token \(HF_TOKEN\) for org/name"),
        ({"status": 401, "token": "hf_bad"}, r"refuses the token \(HF_TOKEN\) for org/name"),
        ({"status": 403}, "forbids org/name to this user"),
        ({"status": 418}, "answers 418 I'm a Teapot: made to fail"),
        ({"status": 429}, r"answers 429 Too Many Requests \(after 5 tries\)"),
        ({"status": 503}, r"answers 503 Service Unavailable \(after 5 tries\)"),
    ],
)
def test_refusals_are_told(server, monkeypatch, setup, says):
    repository = server.repositories["org/name"]
    repository.gated, repository.private = setup.get("gated", False), setup.get("private", False)
    if "token" in setup:
        monkeypatch.setenv("HF_TOKEN", setup["token"])
    if "status" in setup:
        server.faults.status = {"/revision/": [(setup["status"], {})] * 9}
    with pytest.raises(ManyheadsError, match=says) as raised:
        hub.find_folder(setup.get("name", "org/name"))
    assert "\n" not in str(raised.value)
    assert "hf_secret" not in str(raised.value)
    if setup.get("status") not in (418, 429, 503):
        assert isinstance(raised.value, NotThere)


@pytest.mark.parametrize("source", ["HF_TOKEN", "login"])
def test_private_with_a_token(server, monkeypatch, source, tmp_path):
    server.repositories["org/name"].private = True
    if source == "HF_TOKEN":
        monkeypatch.setenv("HF_TOKEN", " hf_secret\n")
    else:
        (tmp_path / "hf_home").mkdir()
        (tmp_path / "hf_home" / "token").write_text("hf_secret\n")
    assert pull.pull(NAME).name == "dlinear"


def test_a_token_with_a_line_break_is_no_header(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a\r\nX-Evil: 1")
    with pytest.raises(UsageError, match="holds letters that no token has"):
        pull.pull(NAME)
    assert server.requests == []


def test_redirect_to_a_store_drops_the_token(server, monkeypatch):
    import fake_hub

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.repositories["org/name"].private = True
    with fake_hub.FakeHub() as store:
        store.objects, server.faults.redirect = server.objects, store.address
        assert pull.pull(NAME).name == "dlinear"
        assert len(store.requests) == 1
        assert not any("Authorization" in headers for *_, headers in store.requests)


def test_pages_of_a_listing(server):
    server.faults.page = 1
    assert pull.pull(NAME).files == 3
    assert len(server.asked("/tree/")) == 3


def entry(**changes):
    known = {"type": "file", "path": "config.json", "size": 2, "oid": "0" * 40}
    return {key: value for key, value in {**known, **changes}.items() if value is not ...}


@pytest.mark.parametrize(
    ("part", "body", "says"),
    [
        ("/revision/", b"", "answers what cannot be read: not JSON"),
        ("/revision/", b"<html>", "not JSON"),
        ("/revision/", b"[]", "names no commit of org/name"),
        ("/revision/", b'{"sha": "main"}', "names no commit of org/name"),
        ("/revision/", b'{"sha": "' + b"A" * 40 + b'"}', "names no commit"),
        ("/revision/", b'{"sha": "../../../../../../tmp/evil/evil/evil/evi"}', "names no commit"),
        ("/revision/", b"[" * 100_000, "nested deeper than 16"),
        ("/revision/", b'{"sha": NaN}', "NaN is no JSON number"),
        ("/tree/", b"{}", "the list of files is no list"),
        ("/tree/", b"[1]", "an entry of the list of files is no object"),
        ("/tree/", json.dumps([entry(path=...)]).encode(), "the entry of 'None' is none"),
        ("/tree/", json.dumps([entry(oid="evil")]).encode(), "the entry of 'config.json' is none"),
        ("/tree/", json.dumps([entry(size=-1)]).encode(), "'config.json' has the size -1"),
        ("/tree/", json.dumps([entry(size=1.5)]).encode(), "'config.json' has the size 1.5"),
        ("/tree/", json.dumps([entry(size=True)]).encode(), "'config.json' has the size True"),
        ("/tree/", json.dumps([entry(lfs={"oid": "x", "size": 3})]).encode(), "'config.json' has no SHA-256"),
        ("/tree/", json.dumps([entry(lfs=3)]).encode(), "the entry of 'config.json' is none"),
        ("/tree/", b"[]", r"no published layout that is known here \(files: \)"),
        ("/tree/", json.dumps([entry(path="../../evil"), entry(path="/etc/x")]).encode(), r"\(files: \)"),
        ("/tree/", json.dumps([entry(size=1 << 45, lfs=...)]).encode(), "no published layout"),
    ],
)  # fmt: skip
def test_hostile_answers(server, tmp_path, part, body, says):
    server.faults.body = {part: body}
    with pytest.raises(ManyheadsError, match=says):
        pull.pull(NAME)
    assert not list(tmp_path.rglob("*evil*"))


def test_an_answer_without_end(server, monkeypatch):
    monkeypatch.setattr(hub_api, "MAX_ANSWER", 1000)
    server.faults.body = {"/revision/": b" " * 1001}
    with pytest.raises(NetworkError, match="sends more than 1000 bytes: refused"):
        pull.pull(NAME)


def test_an_answer_in_a_trickle(server, monkeypatch):
    monkeypatch.setattr(network, "TIMEOUT", 0.3)
    monkeypatch.setattr(network, "TRIES", 2)
    server.faults.body, server.faults.drip = {"/revision/": b"{" * 900}, 0.1
    with pytest.raises(NetworkError, match=r"sends almost nothing \(after 2 tries\)"):
        pull.pull(NAME)


def test_a_listing_that_goes_on_elsewhere_or_for_ever(server):
    server.faults.body = {"/tree/": b"[]"}
    server.faults.headers = {"Link": '<https://example.org/next>; rel="next"'}
    with pytest.raises(NetworkError, match="continues its list elsewhere: refused"):
        pull.pull(NAME)
    server.faults.headers = {"Link": f'<{server.address}/api/models/org/name/tree/{"0" * 40}>; rel="next"'}
    with pytest.raises(NetworkError, match="does not end"):
        pull.pull(NAME)


def test_a_file_that_is_too_large(server, monkeypatch):
    monkeypatch.setattr(pull, "MAX_FILE", 1000)
    with pytest.raises(DataError, match=r"more than is taken"):
        pull.pull(NAME)


def test_a_config_that_names_other_weights(server, published):
    config = json.loads(published["config.json"])
    config["weights_sha256"] = "0" * 64
    server.repositories["org/name"].commit({**published, "config.json": json.dumps(config).encode()})
    with pytest.raises(DataError, match=r"model.safetensors is not the file that its config.json names"):
        pull.pull(NAME)


def test_records_that_are_none(server):
    folder = pull.pull(NAME).folder
    known = json.loads((folder / "manyheads.lock").read_text())
    wrong = [b"", b"[]", b"{}", b"\xff", b"[" * 9000]
    wrong += [json.dumps({**known, key: value}).encode() for key, value in
              {"version": 2, "files": [], "options": {"a": []}, "more": 1, "commit": 3}.items()]  # fmt: skip
    for files in ({"../x": [1, "0" * 64]}, {"x": 1}, {"x": ["1", "0" * 64]}, {"x": [1, "0"]}, {"x": [1]}):
        wrong.append(json.dumps({**known, "files": files}).encode())
    for content in wrong:
        (folder / "manyheads.lock").write_bytes(content)
        with pytest.raises(ManyheadsError, match="is no record of a download"):
            hub.find_folder("org/name")


def test_threads_that_pull_one_model(server):
    """Flocks hold between descriptors, so between threads too."""
    server.faults.slow = 0.0005
    found, errors = [], []

    def one():
        try:
            found.append(pull.pull(NAME))
        except Exception as error:  # shown by the assertion
            errors.append(error)

    threads = [threading.Thread(target=one) for _ in range(4)]
    [each.start() for each in threads]
    [each.join() for each in threads]
    assert errors == []
    assert len(server.asked("model.safetensors")) == 1
    assert sum(each.received > 0 for each in found) == 1


def test_two_processes_pull_one_model(server):
    server.faults.slow = 0.001
    code = (
        "import sys; from manyheads.core import pull, references;"
        "print(pull.pull(references.parse('org/name')).received)"
    )
    known = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    run = [
        subprocess.Popen([sys.executable, "-c", code], env=known, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    received = sorted(int(each.communicate()[0]) for each in run)
    assert [each.returncode for each in run] == [0, 0]
    assert received[0] == 0 < received[1]
    assert len(server.asked("model.safetensors")) == 1
    assert verify(hub.find_folder("org/name")).name == "dlinear"


def test_a_killed_pull_goes_on(server):
    """SIGKILL in the middle of the weights: the lock is free, and the rest alone is asked for."""
    server.faults.slow = 0.005
    code = "from manyheads.core import pull, references; pull.pull(references.parse('org/name'))"
    known = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    run = subprocess.Popen([sys.executable, "-c", code], env=known)
    part = hub_cache.snapshot(NAME, commit_of(server)) / ".model.safetensors.part"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (not part.exists() or part.stat().st_size < 500):
        time.sleep(0.01)
    run.kill()
    run.wait()
    size = part.stat().st_size
    assert size >= 500
    server.faults.slow = 0.0
    server.requests.clear()
    assert verify(pull.pull(NAME).folder).name == "dlinear"
    asked = [headers.get("Range") for _, _, headers in server.asked("model.safetensors")]
    assert asked == [f"bytes={size}-"]


def test_catalogue_names(fake_hub, monkeypatch):
    with pytest.raises(UsageError, match="no published weights of dlinear are known here: train it"):
        hub.find_folder("dlinear")
    with pytest.raises(NotThere, match="no model hustvl/Vim-tiny-midclstok at"):
        hub.find_folder("vim_tiny_patch16_224")
    assert len(fake_hub.requests) == 1


def test_copy_out_of_the_cache(server, tmp_path, published):
    server.repositories["org/name"].commit({**published, "config.yaml": b"more: 1"})
    pulled = pull.copy(pull.pull(NAME), tmp_path / "out" / "model")
    assert verify(tmp_path / "out" / "model").source == f"org/name at {pulled.commit}"
    with pytest.raises(UsageError, match="is there: choose another place"):
        pull.copy(pulled, tmp_path / "out" / "model")
    assert dataclasses.asdict(pulled)["folder"] == tmp_path / "out" / "model"


def test_endpoints(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://example.org")
    with pytest.raises(DataError, match="only https addresses"):
        hub_api.endpoint()
    monkeypatch.setenv("HF_ENDPOINT", "https://example.org/hub/")
    assert hub_api.endpoint() == "https://example.org/hub"
    monkeypatch.delenv("HF_ENDPOINT")
    assert hub_api.endpoint().startswith("https://")
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "7")
    assert network.timeout() == 7
