"""Requests to servers that may be slow, broken or hostile: checked addresses, bounded redirects, told errors.

In the standard library: `http.client` bounds lines and headers, and a proxy is taken from the environment.
"""

from __future__ import annotations

import email.utils
import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from email.message import Message
from typing import TypeVar

from manyheads.core.errors import DataError, ManyheadsError

LOOPBACK = ("127.0.0.1", "::1", "localhost")
MAX_REDIRECTS = 5
TRIES = 5  # in a row without progress
RETRIED = (408, 429, 500, 502, 503, 504)
BACKOFF = 0.5  # seconds before the second try; twice that before the third, and so on
LONGEST_WAIT = 60.0  # seconds of a Retry-After that are waited for
TIMEOUT = 30.0  # seconds without any byte
SLOWEST = 1024  # bytes that must come within that time
BLOCK = 1 << 18

T = TypeVar("T")


class NetworkError(ManyheadsError):
    """A server cannot be reached, or does not do what it should."""


class Broken(Exception):
    """A connection failed or ended early: another try may do better."""


class Refused(Exception):
    """A server answered with an error.

    Args:
        address: What was asked for.
        status: The answer's number.
        headers: The answer's headers.
        message: The first words of its body.
    """

    def __init__(self, address: str, status: int, headers: Message, message: str = "") -> None:
        super().__init__(f"{host(address)} answers {status} {http.client.responses.get(status, '')}".strip())
        self.address, self.status, self.headers, self.message = address, status, headers, message


@dataclass(frozen=True)
class Answer:
    """An answer, after redirects.

    Args:
        response: To be read and closed.
        first: Headers of the first answer, which a redirect may have been.
    """

    response: http.client.HTTPResponse
    first: Message


def checked(address: str) -> str:
    """Return an address that may be asked: https, or http on this machine.

    Raises:
        DataError: Another one.
    """
    try:
        parts = urllib.parse.urlsplit(address)
        local = parts.scheme == "http" and parts.hostname in LOOPBACK
        fine = (parts.scheme == "https" and bool(parts.hostname)) or local
        fine = fine and parts.port != 0 and "@" not in parts.netloc
    except ValueError:
        fine = False
    if not fine or any(ord(letter) <= 32 or ord(letter) > 126 for letter in address):
        raise DataError(f"{address[:200]!r}: only https addresses are downloaded from")
    return address


def host(address: str) -> str:
    """Return the server of an address, as messages name it."""
    return urllib.parse.urlsplit(address).netloc.rpartition("@")[2]


def timeout() -> float:
    """Return the seconds without a byte after which a connection is given up (HF_HUB_DOWNLOAD_TIMEOUT)."""
    given = os.environ.get("HF_HUB_DOWNLOAD_TIMEOUT", "")
    return float(given) if given.isdecimal() and int(given) > 0 else TIMEOUT


def open_address(address: str, headers: Mapping[str, str] | None = None) -> Answer:
    """Ask once, and follow redirects; a token is sent to the first server alone.

    Raises:
        Refused: The server answers with an error.
        Broken: No connection, no answer in time, or an answer that is none.
        NetworkError: Too many redirects, or packed content that was not asked for.
        DataError: An address that is not asked.
    """
    sent = {"User-Agent": "manyheads", "Accept-Encoding": "identity", **(headers or {})}
    first: Message | None = None
    for _ in range(MAX_REDIRECTS + 1):
        response = _ask(checked(address), sent)
        first = first or response.headers
        if response.status // 100 != 3:
            if response.headers.get("Content-Encoding", "identity") != "identity":
                response.close()
                raise NetworkError(f"{host(address)} sends packed content, which was not asked for")
            return Answer(response, first)
        response.close()
        try:
            there = urllib.parse.urljoin(address, response.headers.get("Location", ""))
        except ValueError:
            there = ""
        if _origin(there) != _origin(address):
            sent.pop("Authorization", None)
        if address.startswith("https:") and not there.startswith("https:"):
            raise NetworkError(f"{host(address)} redirects away from https: refused")
        address = there
    raise NetworkError(f"{host(address)} redirects more than {MAX_REDIRECTS} times: a loop")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Redirects come back as answers: `open_address` follows them."""

    def http_error_302(self, req, fp, code, msg, headers):  # type: ignore[no-untyped-def]
        return fp

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def _ask(address: str, headers: Mapping[str, str]) -> http.client.HTTPResponse:
    request = urllib.request.Request(address, headers=dict(headers))
    try:
        found = urllib.request.build_opener(_NoRedirects).open(request, timeout=timeout())
    except urllib.error.HTTPError as error:
        with error:
            raise Refused(address, error.code, error.headers, _words(error)) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise Broken(f"{host(address)}: {reason}" if str(reason) else f"{host(address)}: cut off") from error
    return found


def _words(response: urllib.error.HTTPError) -> str:
    try:
        body = response.read(2000).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException, ValueError):
        return ""
    with suppress(ValueError, KeyError, TypeError, RecursionError):
        body = str(json.loads(body)["error"])
    return "".join(letter if letter.isprintable() else " " for letter in body)[:200].strip()


def _origin(address: str) -> tuple[str, str]:
    parts = urllib.parse.urlsplit(address)
    return parts.scheme, parts.netloc


def wait(tries: int, error: Broken | Refused) -> None:
    """Wait before another try; as long as the server asks for, where it does.

    Raises:
        NetworkError: These were enough tries, or the server asks for too long a time.
    """
    asked = _retry_after(error.headers) if isinstance(error, Refused) else 0.0
    if asked > LONGEST_WAIT:
        raise NetworkError(f"{error}, and asks for {asked:.0f} s of patience: try again later") from error
    if tries >= TRIES:
        raise NetworkError(f"{error} (after {tries} tries)") from error
    time.sleep(max(asked, BACKOFF * 2 ** (tries - 1)))


def _retry_after(headers: Message) -> float:
    given = headers.get("Retry-After", "").strip()
    if given.isdecimal() and given.isascii():
        return float(given[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(given).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0


def retried(ask: Callable[[], T]) -> T:
    """Call until it works, is refused for good, or has been tried often enough.

    Raises:
        Refused: With an answer that no further try would change.
        NetworkError: As `wait`.
    """
    tries = 0
    while True:
        try:
            return ask()
        except (Broken, Refused) as error:
            if isinstance(error, Refused) and error.status not in RETRIED:
                raise
            tries += 1
            wait(tries, error)


def blocks(response: http.client.HTTPResponse, what: str) -> Iterator[bytes]:
    """Yield an answer's body as it comes.

    Raises:
        Broken: It breaks off, or comes too slowly to ever end.
    """
    start, came = time.monotonic(), 0
    while True:
        try:
            block = response.read1(BLOCK)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Broken(f"{what} broke off ({error})") from error
        if not block:
            return
        yield block
        came += len(block)
        if time.monotonic() - start > timeout():
            if came < SLOWEST:
                raise Broken(f"{what} sends almost nothing")
            start, came = time.monotonic(), 0


def read_all(address: str, headers: Mapping[str, str], limit: int) -> tuple[bytes, Message]:
    """Return a small answer's body and headers.

    Raises:
        Refused: With an answer that no further try would change.
        NetworkError: It cannot be had, or has more bytes than the limit.
    """

    def ask() -> tuple[bytes, Message]:
        answer = open_address(address, headers)
        with answer.response as response:
            body = b""
            for block in blocks(response, host(address)):
                body += block
                if len(body) > limit:
                    raise NetworkError(f"{host(address)} sends more than {limit} bytes: refused")
            if response.length:
                raise Broken(f"{host(address)}: the answer broke off")
            return body, response.headers

    return retried(ask)
