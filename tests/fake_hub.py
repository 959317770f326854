"""A server on loopback that speaks the hub's protocol, with faults to order."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
import time
import urllib.parse
from collections import defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LARGE = 4096  # bytes from which a file is an LFS object


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repository:
    """Commits, oldest first; branches and tags."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        content = repr(sorted((name, git_sha1(data)) for name, data in files.items())) + str(
            len(self.commits)
        )
        sha = hashlib.sha1(content.encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.revisions[branch] = sha
        return sha


@dataclass
class Faults:
    """What goes wrong; each list is used up from its front, one item an answer with a file's content.

    Args:
        cuts: Bytes of a body after which the connection is closed; None leaves it whole.
        corrupt: A file's name to the content sent in its stead (of the same length).
        status: A part of the path to the statuses answered first, each with headers.
        etags: ETags in place of the right ones, one an answer.
        slow: Seconds after each 16 bytes of a file.
        drip: Seconds after each 16 bytes of any other answer.
        length: Content-Length in place of the right one, one an answer.
        ignore_ranges: Answer 200 to every Range.
        redirect: The origin that files are redirected to.
        loop: Files redirect to themselves.
        commit: X-Repo-Commit in place of the right one.
        page: Entries a page of a listing.
        body: A part of the path to the bytes of the answer.
    """

    cuts: list[int | None] = field(default_factory=list)
    corrupt: dict[str, bytes] = field(default_factory=dict)
    status: dict[str, list[tuple[int, dict[str, str]]]] = field(default_factory=dict)
    etags: list[str] = field(default_factory=list)
    slow: float = 0.0
    drip: float = 0.0
    length: list[int] = field(default_factory=list)
    ignore_ranges: bool = False
    redirect: str = ""
    loop: bool = False
    commit: str = ""
    page: int = 1000
    body: dict[str, bytes] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)


class FakeHub:
    """The server; `with FakeHub() as hub`."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = defaultdict(Repository)
        self.faults = Faults()
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.objects: dict[str, bytes] = {}
        self.token = "hf_secret"
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> FakeHub:
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def asked(self, part: str) -> list[tuple[str, str, dict[str, str]]]:
        return [each for each in self.requests if part in each[1]]


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        with contextlib.suppress(OSError):  # the client left
            self._route()

    def _route(self) -> None:
        hub, path = self.hub, urllib.parse.unquote(self.path.partition("?")[0])
        hub.requests.append((self.command, self.path, dict(self.headers)))
        for part, answers in hub.faults.status.items():
            if part in path and answers:
                status, headers = answers.pop(0)
                return self._json({"error": "made to fail"}, status, headers)
        for part, body in hub.faults.body.items():
            if part in path:
                return self._send(body, 200, hub.faults.headers)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path):
            return self._revision(*found.groups())
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([0-9a-f]{40})", path):
            return self._tree(*found.groups())
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._file(*found.groups())
        if path.startswith("/objects/"):
            return self._content(
                path.removeprefix("/objects/"), hub.objects[path.removeprefix("/objects/")], {}
            )
        self._json({"error": "no such page"}, 404)

    def _allowed(self, name: str) -> Repository | None:
        hub = self.hub
        repository = hub.repositories.get(name)
        known = self.headers.get("Authorization") == f"Bearer {hub.token}"
        if repository is None or (repository.private and not known):
            status = 404 if known else 401
            self._json({"error": "Repository not found"}, status, {"X-Error-Code": "RepoNotFound"})
            return None
        if repository.gated and not known:
            self._json({"error": "gated"}, 401, {"X-Error-Code": "GatedRepo"})
            return None
        return repository

    def _revision(self, name: str, revision: str) -> None:
        repository = self._allowed(name)
        if repository is None:
            return
        sha = repository.revisions.get(revision, revision)
        if sha not in repository.commits:
            return self._json({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
        siblings = [{"rfilename": each} for each in repository.commits[sha]]
        about = {"_id": "1", "id": name, "modelId": name, "sha": sha, "private": repository.private}
        self._json({**about, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings})

    def _tree(self, name: str, sha: str) -> None:
        repository = self._allowed(name)
        if repository is None:
            return
        if sha not in repository.commits:
            return self._json({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
        entries: list[dict[str, object]] = []
        for path, data in repository.commits[sha].items():
            entry: dict[str, object] = {
                "type": "file",
                "path": path,
                "size": len(data),
                "oid": git_sha1(data),
            }
            if len(data) >= LARGE:
                digest = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 130}
            entries.append(entry)
        query = urllib.parse.parse_qs(self.path.partition("?")[2])
        start, size = int(query.get("cursor", ["0"])[0]), self.hub.faults.page
        headers = {}
        if start + size < len(entries):
            here = f"{self.hub.address}{self.path.partition('?')[0]}?cursor={start + size}"
            headers["Link"] = f'<{here}>; rel="next"'
        self._json(entries[start : start + size], 200, headers)

    def _file(self, name: str, revision: str, path: str) -> None:
        repository, faults = self._allowed(name), self.hub.faults
        if repository is None:
            return
        sha = repository.revisions.get(revision, revision)
        files = repository.commits.get(sha)
        if files is None:
            return self._json({"error": "no"}, 404, {"X-Error-Code": "RevisionNotFound"})
        if path not in files:
            return self._json({"error": "no"}, 404, {"X-Error-Code": "EntryNotFound"})
        data = files[path]
        digest = hashlib.sha256(data).hexdigest() if len(data) >= LARGE else git_sha1(data)
        headers = {"X-Repo-Commit": faults.commit or sha, "ETag": f'"{digest}"', "Accept-Ranges": "bytes"}
        if len(data) >= LARGE:
            headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))}
            if faults.loop or faults.redirect:
                where = self.path if faults.loop else f"{faults.redirect}/objects/{digest}"
                self.hub.objects[digest] = faults.corrupt.get(path, data)
                return self._send(b"", 302, headers | {"Location": where})
        self._content(path, data, headers)

    def _content(self, path: str, data: bytes, headers: dict[str, str]) -> None:
        faults = self.hub.faults
        data, status = faults.corrupt.get(path, data), 200
        headers.setdefault("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        if faults.etags:
            headers["ETag"] = faults.etags.pop(0)
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        wanted = self.headers.get("If-Range")
        if asked and not faults.ignore_ranges and wanted in (None, headers["ETag"]):
            start = int(asked[1])
            if start >= len(data):
                return self._send(b"", 416, {"Content-Range": f"bytes */{len(data)}"})
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            data, status = data[start:], 206
        self._send(data, status, headers, body=True)

    def _json(self, found: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(
            json.dumps(found).encode(), status, {"Content-Type": "application/json", **(headers or {})}
        )

    def _send(self, data: bytes, status: int, headers: dict[str, str], body: bool = False) -> None:
        faults = self.hub.faults
        cut = faults.cuts.pop(0) if body and faults.cuts and self.command == "GET" else None
        length = faults.length.pop(0) if body and faults.length else len(data)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command == "HEAD":
            return
        sent = data if cut is None else data[:cut]
        if pause := faults.slow if body else faults.drip:
            for start in range(0, len(sent), 16):
                self.wfile.write(sent[start : start + 16])
                self.wfile.flush()
                time.sleep(pause)
        else:
            self.wfile.write(sent)
        if len(sent) != length:
            self.close_connection = True
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)

    # Publishing: what `huggingface_hub` asks for when it makes a repository and a commit.

    def do_POST(self) -> None:
        hub, path = self.hub, urllib.parse.unquote(self.path.partition("?")[0])
        hub.requests.append((self.command, self.path, dict(self.headers)))
        content = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        if self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self._json({"error": "Invalid token"}, 401)
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(content)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if name in hub.repositories:
                return self._json({"error": "You already created it", "url": f"{hub.address}/{name}"}, 409)
            hub.repositories[name].private = asked.get("visibility") == "private"
            hub.repositories[name].commit({})
            return self._json({"url": f"{hub.address}/{name}", "name": name, "id": "1"})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/(.+)", path):
            repository = hub.repositories[found[1]]
            repository.revisions.setdefault(found[2], repository.revisions["main"])
            return self._json({})
        if re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", path):
            files = [
                {"path": each["path"], "uploadMode": "lfs" if each["size"] >= LARGE else "regular"}
                for each in json.loads(content)["files"]
            ]
            return self._json({"files": [{**each, "shouldIgnore": False, "oid": None} for each in files]})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{hub.address}/upload/{each['oid']}"}}}
                for each in json.loads(content)["objects"]
            ]
            return self._json({"transfer": "basic", "objects": objects})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            return self._commit(found[1], found[2], content)
        self._json({"error": f"no such page {path}"}, 404)

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        self.hub.requests.append((self.command, self.path, dict(self.headers)))
        self.hub.objects[self.path.rpartition("/")[2]] = content
        self._json({})

    def _commit(self, name: str, branch: str, content: bytes) -> None:
        hub = self.hub
        repository = hub.repositories[name]
        files = dict(repository.commits[repository.revisions[branch]])
        for line in content.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = hub.objects[value["oid"]]
        sha = repository.commit(files, branch)
        about = {"commitUrl": f"{hub.address}/{name}/commit/{sha}", "commitOid": sha, "success": True}
        self._json({**about, "pullRequestUrl": None})
