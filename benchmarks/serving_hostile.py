"""Requests that no honest client sends, each with the answers that a server may give.

Those of `requests` are sent by any HTTP client, to models named after their domain; those of `raw` are bytes
on a socket, for what a client would not let through.
"""

from __future__ import annotations

import base64
import io
import json
import socket
import struct
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

JSON = {"content-type": "application/json"}
CSV = {"content-type": "text/csv"}
PNG = {"content-type": "image/png"}
WAV = {"content-type": "audio/wav"}
MIB = 1 << 20


@dataclass(frozen=True)
class Hostile:
    """A request.

    Args:
        name: What is wrong with it.
        model: Whom it is sent to.
        content: Its body, made anew for each sending.
        headers: Its headers.
        statuses: Answers that are right; 429 is in any case.
    """

    name: str
    model: str
    content: Callable[[], Any]
    headers: dict[str, str] = field(default_factory=dict)
    statuses: tuple[int, ...] = (422,)


def png(width: int, height: int, pixels: bytes = b"") -> bytes:
    """A PNG that claims a size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def bomb(side: int) -> bytes:
    """A PNG of black pixels, one bit each, which packs a thousandfold."""
    packer = zlib.compressobj(9)
    line = b"\0" * (1 + (side + 7) // 8)
    packed = b"".join(packer.compress(line) for _ in range(side)) + packer.flush()
    return png(side, side, packed)


def archive() -> bytes:
    """A zip of 200 MB of zeros."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as packed, packed.open("a.png", "w") as file:
        for _ in range(200):
            file.write(bytes(MIB))
    return out.getvalue()


def wav(frames: int, rate: int, content: bytes = b"", channels: int = 1) -> bytes:
    """A WAV whose header claims so many frames."""
    size = 2 * channels * frames
    form = struct.pack("<HHIIHH", 1, channels, rate, 2 * channels * rate, 2 * channels, 16)
    head = b"WAVEfmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", size & 0xFFFFFFFF)
    return b"RIFF" + struct.pack("<I", (len(head) + size) & 0xFFFFFFFF) + head + content


def flac(seconds: int, rate: int = 8000) -> bytes:
    """Silence that lasts, in few bytes."""
    import numpy as np
    import soundfile

    out = io.BytesIO()
    soundfile.write(out, np.zeros(seconds * rate, np.int16), rate, format="FLAC")
    return out.getvalue()


def huge(size: int) -> Callable[[], Iterator[bytes]]:
    """A body that is sent piece by piece, of a length that no header says."""

    def pieces() -> Iterator[bytes]:
        for _ in range(size // MIB):
            yield bytes(MIB)

    return pieces


def _json(name: str, model: str, value: object, statuses: tuple[int, ...] = (422,)) -> Hostile:
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return Hostile(name, model, lambda: body, JSON, statuses)


def _body(
    name: str, model: str, body: bytes, headers: dict[str, str], statuses: tuple[int, ...] = (422,)
) -> Hostile:
    return Hostile(name, model, lambda: body, headers, statuses)


def requests(largest: int = 16 * MIB) -> list[Hostile]:
    """All of them.

    Args:
        largest: Bytes that the server takes.
    """
    return [*_texts(), *_bodies(largest), *_images(), *_sounds(), *_tables(), *_forms()]


def _texts() -> Iterator[Hostile]:
    """JSON that is none, or of the wrong shape."""
    row = {"unique_id": "a", "ds": "2020-01-01", "y": 1.0}
    yield _json("broken JSON", "vision", b'{"images": [', (400,))
    yield _json("no UTF-8", "vision", b'{"images": "\xff\xfe"}', (400, 422))
    yield _json("JSON nested 100,000 deep", "vision", b"[" * 100_000, (400,))
    yield _json("objects nested 100,000 deep", "graph", b'{"smiles":' * 100_000, (400,))
    yield _json("an empty body", "vision", b"", (400,))
    yield _json("a list, not an object", "graph", [1, 2], (400, 422))
    yield _json("a number for a text", "graph", {"smiles": [5]})
    yield _json("a text for a list", "graph", {"smiles": "CCO"})
    yield _json("an unknown field", "graph", {"smiles": ["CCO"], "url": "http://127.0.0.1/"})
    yield _json("an address for an image", "vision", {"images": [{"data": "http://127.0.0.1/a.png"}]})
    yield _json("a path for an image", "vision", {"images": [{"data": "/etc/passwd"}]})
    yield _json("no base64", "vision", {"images": [{"data": "@@@@"}]})
    yield _json("100 images", "vision", {"images": [{"data": "AAAA"}] * 100})
    yield _json(
        "a file of the server as a setting", "recsys", {"csv": "a", "settings": {"deny": "/etc/passwd"}}
    )
    yield _json(
        "NaN", "timeseries", b'{"rows": [{"unique_id": "a", "ds": "2020-01-01", "y": NaN}]}', (400, 422)
    )
    yield _json(
        "an infinite number", "timeseries", b'{"rows": [{"ds": "2020-01-01", "y": 1e999}]}', (400, 422)
    )
    yield _json(
        "a number of 5,000 digits", "timeseries", b'{"rows": [{"y": ' + b"9" * 5000 + b"}]}", (400, 422)
    )
    yield _json("a row that is a list", "timeseries", {"rows": [[1, 2]]})
    yield _json("an object in a cell", "timeseries", {"rows": [{**row, "y": {"a": 1}}]})
    yield _json("one row", "timeseries", {"rows": [row]})
    yield _json("dates that are none", "timeseries", {"rows": [{**row, "ds": "soon"}] * 60})
    yield _json("the same date again and again", "timeseries", {"rows": [row] * 60})
    yield _json("no column that is known", "timeseries", {"rows": [{"a": "b"}] * 60})
    yield _json("half a character", "graph", b'{"smiles": ["\\ud800"]}', (400, 422))
    yield _json("a zero byte", "graph", {"smiles": ["C\0C"]})
    yield _json("2,000 open brackets", "graph", {"smiles": ["C(" * 999]})
    yield _json("a ring that never closes", "graph", {"smiles": ["C1" * 1000]})
    yield _json("a molecule of 2,000 atoms", "graph", {"smiles": ["C" * 2000]}, (200, 422, 504))
    yield _json("a SMILES of 1 MB", "graph", {"smiles": ["C" * MIB]})
    yield _json("times of all kinds", "recsys", {"interactions": [
        {"user_id": 1, "item_id": "1", "timestamp": each} for each in (1, "x", None, 2.5)
    ]})  # fmt: skip
    yield _json(
        "numbers beyond 64 bits",
        "recsys",
        b'{"interactions": [{"user_id": 1e400, "item_id": 1}]}',
        (400, 422),
    )


def _bodies(largest: int) -> Iterator[Hostile]:
    """Bodies that are too large, or of a kind that is not taken."""
    yield _body("a body that is too large", "vision", bytes(largest + 1), PNG, (413,))
    yield Hostile("a large body of no known length", "vision", huge(2 * largest), PNG, (413,))
    yield _body(
        "a packed body", "graph", zlib.compress(bytes(MIB)), {**JSON, "content-encoding": "gzip"}, (415,)
    )
    yield _body("no content type", "graph", b"{}", {}, (415,))
    yield _body("XML", "graph", b"<a/>", {"content-type": "application/xml"}, (415,))
    yield _body("a pickle", "vision", b"\x80\x04K\x01.", {"content-type": "application/octet-stream"})


def _images() -> Iterator[Hostile]:
    """Images that are none, or too large when they are unpacked."""
    yield _body("a PNG that claims 50,000 x 50,000", "vision", png(50_000, 50_000), PNG)
    yield _body("a PNG of 11,000 x 11,000 in 15 KB", "vision", bomb(11_000), PNG)
    yield _body("a PNG of 20,000 x 20,000 in 49 KB", "vision", bomb(20_000), PNG)
    yield _body("a PNG of 6,900 x 6,900, which is allowed", "vision", bomb(6_900), PNG, (200,))
    yield _body("a line of 400,000 pixels", "vision", png(400_000, 1, zlib.compress(bytes(50_001))), PNG)
    yield _body("half a PNG", "vision", bomb(300)[:-30], PNG)
    yield _body("an archive of 200 MB of zeros", "vision", archive(), PNG)
    yield _body("HTML", "vision", b"<html><script>alert(1)</script>", PNG)
    yield _body("an SVG that reads a file", "vision", b'<svg><image href="file:///etc/passwd"/></svg>', PNG)
    content = base64.b64encode(bomb(6_900)).decode()
    yield _json("64 images of 6,900 x 6,900", "vision", {"images": [{"data": content}] * 64})
    content = base64.b64encode(bomb(11_000)).decode()
    yield _json("64 images of 11,000 x 11,000", "vision", {"images": [{"data": content}] * 64})


def _sounds() -> Iterator[Hostile]:
    """Recordings that are none, or longer than they look."""
    yield _body("a recording that claims two hours", "speech", wav(8000 * 7200, 8000), WAV)
    yield _body("an hour of silence in few bytes", "speech", flac(3600), WAV)
    yield _body("a sample a second", "speech", wav(50_000, 1, bytes(100_000)), WAV)
    yield _body("no sample", "speech", wav(0, 8000), WAV)
    yield _body("a rate of two billion", "speech", wav(100, 2_000_000_000, bytes(200)), WAV)
    yield _body("1,000 channels", "speech", wav(100, 8000, bytes(200_000), 1000), WAV)
    yield _body("text", "speech", b"RIFF and nothing else", WAV)
    yield _body("an MP3 of noise", "speech", b"\xff\xfb\x90\x00" * 5000, WAV, (200, 422))


def _tables() -> Iterator[Hostile]:
    """Tables that are none."""
    yield _body("a CSV of zero bytes", "timeseries", bytes(10_000), CSV)
    yield _body("a CSV of noise", "timeseries", bytes(range(256)) * 100, CSV)
    yield _body("a CSV with a header alone", "timeseries", b"unique_id,ds,y\n", CSV)
    yield _body("100,000 columns", "timeseries", b",".join(b"c%d" % i for i in range(100_000)) + b"\n", CSV)
    yield _body("a quote that never closes", "timeseries", b'unique_id,ds,y\n"' + b"a" * 100_000, CSV)
    yield _body("rows of different lengths", "timeseries", b"unique_id,ds,y\na\na,b,c,d,e\n" * 50, CSV)
    yield _body("a parquet file as CSV", "recsys", b"PAR1" + bytes(1000) + b"PAR1", CSV)
    yield _body("a formula", "graph", b"smiles\n\"=cmd|' /C calc'!A0\"\n", CSV)
    yield _body("a log of one column", "recsys", b"user_id\n" + b"a\n" * 1000, CSV)


def _forms() -> Iterator[Hostile]:
    """Forms that are broken."""
    kind = "multipart/form-data"
    part = b'--x\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\nA\r\n'
    marked = {"content-type": f"{kind}; boundary=x"}
    yield _body("a form without a boundary", "vision", part, {"content-type": kind}, (400,))
    yield _body("a form of 1,000 files", "vision", part * 1000 + b"--x--\r\n", marked, (400,))
    yield _body("a form that ends in a file", "vision", part, marked, (400, 422))
    name = part.replace(b'"a"', b'"../../../etc/passwd"') + b"--x--\r\n"
    yield _body("a file name that leads elsewhere", "vision", name, marked)
    yield _body(
        "an unknown field in a form", "vision", part.replace(b'; filename="a"', b"") + b"--x--\r\n", marked
    )


Raw = Callable[[str, int], bytes]


def _talk(host: str, port: int, *pieces: bytes, pause: float = 0.0, wait: float = 5.0) -> bytes:
    """Send pieces and return what comes back, until the connection is closed."""
    found = b""
    with socket.create_connection((host, port), timeout=wait) as opened:
        try:
            for piece in pieces:
                opened.sendall(piece)
                time.sleep(pause)
            while piece := opened.recv(65536):
                found += piece
        except OSError:
            pass
    return found


def raw(model: str = "vision") -> dict[str, Raw]:
    """What is sent byte by byte; each returns what the server said."""
    post = b"POST /v1/models/" + model.encode() + b"/predict HTTP/1.1\r\nhost: 127.0.0.1\r\n"
    typed = post + b"content-type: image/png\r\n"
    chunked = typed + b"transfer-encoding: chunked\r\n\r\n"
    close = b"connection: close\r\n"

    def leave(*pieces: bytes) -> Raw:
        """Send, and go without waiting."""

        def talk(host: str, port: int) -> bytes:
            with socket.create_connection((host, port), timeout=5) as opened:
                for piece in pieces:
                    opened.sendall(piece)
                opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return b""

        return talk

    def say(*pieces: bytes) -> Raw:
        return lambda host, port: _talk(host, port, *pieces)

    return {
        "not HTTP": say(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 10 + b"\r\n\r\n"),
        "a header of 100 KB": say(b"GET / HTTP/1.1\r\nhost: 127.0.0.1\r\nx: " + b"a" * 100_000 + b"\r\n\r\n"),
        "an address of 100 KB": say(b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n"),
        "two lengths": say(typed + b"content-length: 5\r\ncontent-length: 9\r\n\r\n12345"),
        "a length and chunks": say(
            typed + close + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"
        ),
        "a negative length": say(typed + b"content-length: -5\r\n\r\n"),
        "a length of 30 digits": say(typed + b"content-length: " + b"9" * 30 + b"\r\n\r\n"),
        "a broken chunk": say(chunked + b"zz\r\nAAAA"),
        "100,000 chunks of a byte": say(chunked + b"1\r\nA\r\n" * 100_000 + b"0\r\n\r\n" + b"GET"),
        "another way to the models": say(
            b"GET /v1/models/..%2f..%2fetc/passwd HTTP/1.1\r\nhost: 127.0.0.1\r\n" + close + b"\r\n"
        ),
        "TRACE": say(b"TRACE / HTTP/1.1\r\nhost: 127.0.0.1\r\n" + close + b"\r\n"),
        "another host": say(b"GET /v1/models HTTP/1.1\r\nhost: evil.example\r\n" + close + b"\r\n"),
        "gone within the headers": leave(post),
        "gone within the body": leave(typed + b"content-length: 100000\r\n\r\n" + b"A" * 5000),
        "gone before the answer": leave(typed + b"content-length: 3\r\n\r\nAAA"),
    }


def slow(host: str, port: int, seconds: float, model: str = "vision") -> list[socket.socket]:
    """Open connections that send headers, or a body, a byte at a time; the caller closes them."""
    post = b"POST /v1/models/" + model.encode() + b"/predict HTTP/1.1\r\nhost: 127.0.0.1\r\n"
    found = [socket.create_connection((host, port), timeout=seconds) for _ in range(2)]
    found[0].sendall(post)
    found[1].sendall(post + b"content-type: image/png\r\ncontent-length: 100000\r\n\r\n")
    return found
