"""What a model hub answers: the commit of a revision, the files of a commit, where they are.

Four requests of the hub's protocol, each checked before use. HF_ENDPOINT names another hub, HF_TOKEN (or the
file that huggingface_hub's login writes) opens private models, HF_HUB_OFFLINE forbids asking at all.
"""

from __future__ import annotations

import os
import re
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import cast

from manyheads.core.download import Wanted
from manyheads.core.errors import ManyheadsError, UsageError
from manyheads.core.network import NetworkError, Refused, checked, host, read_all
from manyheads.core.references import Reference, is_commit, is_path
from manyheads.core.strict_json import Json, Wrong, parse

MAX_ANSWER = 16 << 20  # bytes of one
MAX_PAGES = 50  # of a listing
MAX_FILES = 100_000
_YES = ("1", "ON", "YES", "TRUE")


@dataclass(frozen=True)
class Remote:
    """A file in a repository.

    Args:
        path: Its name there.
        size: Its bytes.
        git_sha1: What git calls it: the hash of a small file, or of a pointer to a large one.
        sha256: The hash of a large file.
    """

    path: str
    size: int
    git_sha1: str
    sha256: str | None = None


@dataclass(frozen=True)
class Listing:
    """The files of a commit; those with names that leave the folder are left out."""

    reference: Reference
    commit: str
    files: Mapping[str, Remote]


class NotThere(UsageError):
    """The hub has no such model, revision or file."""


def endpoint() -> str:
    """Return the hub's address."""
    given = os.environ.get("HF_ENDPOINT", "").rstrip("/")
    if given:
        return checked(given)
    from huggingface_hub import constants

    return str(constants.ENDPOINT).rstrip("/")


def offline() -> bool:
    """Tell whether the hub may not be asked."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in _YES


def token() -> str | None:
    """Return the user's token, from HF_TOKEN or the file of a login; None without one."""
    given = os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN")
    if not given:
        home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
        try:
            given = Path(os.environ.get("HF_TOKEN_PATH") or home / "token").read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return None
    given = given.strip()
    if not re.fullmatch(r"[\x21-\x7e]*", given):
        raise UsageError("the hub's token (HF_TOKEN) holds letters that no token has")
    return given or None


def headers() -> dict[str, str]:
    """Return the headers of a request: the token's, where there is one."""
    found = token()
    return {"Authorization": f"Bearer {found}"} if found else {}


def find_commit(reference: Reference) -> str:
    """Return the commit that a revision is now.

    Raises:
        NotThere: No such model or revision, or not for this user.
        NetworkError: The hub cannot be asked, or its answer is none.
    """
    revision = urllib.parse.quote(reference.revision or "main", safe="")
    address = f"{endpoint()}/api/models/{reference.repository}/revision/{revision}"
    answer, _ = _ask(address, reference)
    commit = answer.get("sha") if isinstance(answer, dict) else None
    if not isinstance(commit, str) or not is_commit(commit):
        raise NetworkError(f"{host(address)} names no commit of {reference}")
    if reference.commit not in (None, commit):
        raise NetworkError(f"{host(address)} answers for another commit than {reference}")
    return commit


def list_files(reference: Reference, commit: str) -> Listing:
    """Return the files of a commit, with their sizes and hashes; errors as `find_commit`."""
    address: str | None = f"{endpoint()}/api/models/{reference.repository}/tree/{commit}?recursive=true"
    found: dict[str, Remote] = {}
    for _ in range(MAX_PAGES):
        assert address is not None
        answer, received = _ask(address, reference)
        try:
            if not isinstance(answer, list):
                raise Wrong("the list of files is no list")
            for each in answer:
                file = _file(each)
                if file is not None and is_path(file.path):
                    found[file.path] = file
        except Wrong as error:
            raise NetworkError(f"{host(address)}: {error}") from error
        if len(found) > MAX_FILES:
            raise NetworkError(f"{reference} has more than {MAX_FILES} files: refused")
        address = _next(address, received)
        if address is None:
            return Listing(reference, commit, found)
    raise NetworkError(f"the list of {reference}'s files does not end")


def wanted(listing: Listing, file: Remote) -> Wanted:
    """Return a file as the downloader takes it."""
    path = urllib.parse.quote(file.path)
    return Wanted(
        address=f"{endpoint()}/{listing.reference.repository}/resolve/{listing.commit}/{path}",
        size=file.size,
        sha256=file.sha256,
        git_sha1=None if file.sha256 else file.git_sha1,
        commit=listing.commit,
    )


def explain(error: Refused, reference: Reference) -> ManyheadsError:
    """Say what a refusal means, and what to do."""
    code, where, name = error.headers.get("X-Error-Code", ""), host(error.address), reference.repository
    private = "" if token() else "; a private one needs a token (HF_TOKEN)"
    file = urllib.parse.unquote(error.address.rpartition("/")[2])
    by_code = {
        "GatedRepo": f"{name} is gated: ask for access on its page at {where}, then set HF_TOKEN",
        "RepoNotFound": f"no model {name} at {where}{private}",
        "RevisionNotFound": f"{name} has no revision {reference.revision or 'main'!r} at {where}",
        "EntryNotFound": f"{reference} has no file {file} at {where}",
    }
    by_status = {
        401: f"{where} {'refuses the token' if token() else 'wants a token'} (HF_TOKEN) for {name}",
        403: f"{where} forbids {name} to this user{private}",
        404: by_code["RepoNotFound"],
        410: by_code["RepoNotFound"],
    }
    if text := by_code.get(code) or by_status.get(error.status):
        return NotThere(text)
    return NetworkError(f"{error}" + (f": {error.message}" if error.message else ""))


def _ask(address: str, reference: Reference) -> tuple[Json, Message]:
    try:
        body, received = read_all(address, headers(), MAX_ANSWER)
    except Refused as error:
        raise explain(error, reference) from error
    try:
        return parse(body), received
    except Wrong as error:
        raise NetworkError(f"{host(address)} answers what cannot be read: {error}") from error


def _file(entry: Json) -> Remote | None:
    """Read an entry of a listing; None where it is a folder."""
    if not isinstance(entry, dict):
        raise Wrong("an entry of the list of files is no object")
    if entry.get("type") != "file":
        return None
    large = entry.get("lfs")
    path, size, name = entry.get("path"), entry.get("size"), entry.get("oid")
    sha256: Json = None
    if large is not None:
        if not isinstance(large, dict):
            raise Wrong(f"the entry of {str(path)[:80]!r} is none")
        size, sha256 = large.get("size"), large.get("oid")
        if not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256):
            raise Wrong(f"{str(path)[:80]!r} has no SHA-256")
    if not isinstance(path, str) or not isinstance(name, str) or not is_commit(name):
        raise Wrong(f"the entry of {str(path)[:80]!r} is none")
    if type(size) is not int or not 0 <= size < 1 << 50:
        raise Wrong(f"{path[:80]!r} has the size {str(size)[:30]}")
    return Remote(path, size, name, cast("str | None", sha256))


def _next(address: str, received: Message) -> str | None:
    """Return the address of a listing's next page, which must be at the same hub."""
    found = re.search(r'<([^<>]{1,2000})>;\s*rel="next"', received.get("Link", ""))
    if found is None:
        return None
    there = urllib.parse.urljoin(address, found[1])
    if not there.startswith(f"{endpoint()}/"):
        raise NetworkError(f"{host(address)} continues its list elsewhere: refused")
    return there
