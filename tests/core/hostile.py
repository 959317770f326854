"""Hostile inputs: mutated configs, headers of safetensors, pickles, a hub's answers; a watch on what runs."""

from __future__ import annotations

import importlib
import io
import json
import pickle
import random
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

# Values that have broken readers elsewhere.
NASTY: tuple[object, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**40, 0.0, -0.0, 1e308, -1e-308, "", "a",
    "../../evil", "/etc/passwd", "os.system", "subprocess.Popen", "evilmod.Model",
    "\x00", "\ud800", "é" * 50, "a" * 5000, [], {}, [[]], [None], [0] * 50,
    {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "CANARY"]}},
    {"_target_": "os.system"}, {"auto_map": {"AutoModel": "evil.Model"}}, {"__class__": "x"},
    {"a": {"b": {"c": {}}}},
    "${oc.env:HOME}", "!!python/object/apply:os.system", "{{7*7}}", "%s%n", "0" * 40, "f" * 64, float("inf"),
    float("nan"), ["a"], [1.5, "x"], {"": ""},
)  # fmt: skip
TOKENS = (
    b"cos\nsystem\n(S'touch CANARY'\ntR.", b"cposix\nsystem\n(X\x0c\x00\x00\x00touch CANARYtR.",
    b"cbuiltins\nexec\n(S'open(\"CANARY\",\"w\")'\ntR.", b"csubprocess\nPopen\n((S'touch'\nS'CANARY'\nltR.",
    b"\x93", b"R", b".", b"\x81", b"(ios\nsystem\n", b"\x8c\x02os\x8c\x06system\x93", b"c__builtin__\neval\n",
    b"ctorch.serialization\nload\n", b"ctorch\nhub\n", b"\x80\x02",
    b"\x80\x05\x95\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"PK\x03\x04", b'{"', b"\xff\xff\xff\xff", b"\x00" * 16, b"[" * 500, b"{" * 500, b'"' * 9, b"1e999",
    b"NaN", b"..", b"Q", b"0", b"2", b"a", b"b",
)  # fmt: skip
WATCHED = (
    "os.system",
    "subprocess.Popen",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "pty.spawn",
    "socket.connect",
)
_seen: list[str] = []
_watching: list[bool] = []


def _hook(event: str, args: tuple[object, ...]) -> None:
    if _watching and (event in WATCHED or (event == "import" and str(args[0]).startswith("evil"))):
        _seen.append(f"{event} {args[:1]}")


sys.addaudithook(_hook)


@contextmanager
def watched(canary: Path) -> Iterator[list[str]]:
    """Watch for processes, connections and imports; the canary is what the payloads would touch."""
    _seen.clear()
    _watching.append(True)
    try:
        yield _seen
    finally:
        _watching.clear()
    assert _seen == []
    assert not canary.exists()


class Mutator:
    """Makes inputs worse, by chance; the same ones for the same seed."""

    def __init__(self, seed: int, canary: Path) -> None:
        self.random = random.Random(seed)
        self.canary = str(canary)

    def named(self, content: bytes) -> bytes:
        return content.replace(b"CANARY", self.canary.encode())

    def content(self, content: bytes) -> bytes:
        """Change bytes: flipped, cut, doubled, or with something nasty between them."""
        found = bytearray(content)
        for _ in range(self.random.choice((1, 1, 2, 5))):
            at = self.random.randrange(len(found) + 1)
            what = self.random.randrange(7)
            if what == 0 and at < len(found):
                found[at] ^= 1 << self.random.randrange(8)
            elif what == 1 and at < len(found):
                found[at] = self.random.randrange(256)
            elif what == 2:
                del found[at : at + self.random.choice((1, 4, 50, len(found)))]
            elif what == 3:
                end = at + self.random.choice((1, 8, 60))
                found[at:at] = found[at:end] * self.random.choice((1, 2, 9))
            elif what == 4:
                found[at:at] = self.named(self.random.choice(TOKENS))
            elif what == 5:
                token = self.named(self.random.choice(TOKENS))
                found[at : at + len(token)] = token
            else:
                number = self.random.choice((0, 1, 2**31 - 1, 2**32, 2**63 - 1, 2**64 - 1))
                found[at : at + 8] = struct.pack("<Q", number)
        return bytes(found)

    def value(self, value: Any) -> Any:
        """Change one thing somewhere in a JSON value."""
        kind = self.random.randrange(5)
        if isinstance(value, dict) and value and kind:
            key = self.random.choice(sorted(value, key=str))
            if kind == 1:
                return {k: v for k, v in value.items() if k != key}
            if kind == 2:
                return {**value, str(self.random.choice(NASTY)): self.nasty()}
            return {**value, key: self.value(value[key])}
        if isinstance(value, list) and value and kind:
            at = self.random.randrange(len(value))
            if kind == 1:
                return value * self.random.choice((0, 2, 40))
            return [*value[:at], self.value(value[at]), *value[at + 1 :]]
        return self.nasty()

    def nasty(self) -> Any:
        if self.random.random() < 0.02:
            deep: Any = 1
            for _ in range(self.random.choice((15, 17, 200))):
                deep = [deep] if self.random.random() < 0.5 else {"a": deep}
            return deep
        return self.random.choice(NASTY)

    def text(self, value: Any) -> bytes:
        """A mutated value as JSON; now and then its bytes are mutated, too."""
        content = self.named(json.dumps(self.value(value)).encode())
        return self.content(content) if self.random.random() < 0.25 else content

    def safetensors(self, content: bytes) -> bytes:
        """A safetensors file with another header, or with other bytes."""
        if self.random.random() < 0.4:
            return self.content(content)
        size = struct.unpack("<Q", content[:8])[0]
        header = self.text(json.loads(content[8 : 8 + size]))
        length = len(header) if self.random.random() < 0.9 else self.random.choice((0, 1, 2**40, 2**64 - 1))
        return struct.pack("<Q", length) + header + content[8 + size :]

    def checkpoint(self, content: bytes) -> bytes:
        """A file of torch's with another pickle in it, or with other bytes."""
        kind = self.random.randrange(10)
        if kind < 3 or content[:2] != b"PK":
            return self.content(content)
        if kind == 3:
            return evil(self.random, self.canary)
        written = io.BytesIO()
        packing = zipfile.ZIP_DEFLATED if kind == 4 else zipfile.ZIP_STORED
        with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(written, "w", packing) as made:
            for entry in archive.infolist():
                data = archive.read(entry)
                if entry.filename.endswith("data.pkl"):
                    data = evil(self.random, self.canary) if kind == 5 else self.content(data)
                elif kind == 6 and self.random.random() < 0.5:
                    data = self.content(data)
                made.writestr(entry.filename, data)
        return written.getvalue()


class _Evil:
    def __init__(self, function: Callable[..., Any], *args: object) -> None:
        self.called = (function, args)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return self.called


def evil(chance: random.Random, canary: str) -> bytes:
    """A pickle that would touch the canary when it is read."""
    import os
    import subprocess

    code = f"open({canary!r}, 'w').close()"
    made = chance.choice(
        [
            _Evil(os.system, f"touch {canary}"),
            _Evil(exec, code),
            _Evil(eval, f"__import__('os').system('touch {canary}')"),
            _Evil(subprocess.Popen, ["touch", canary]),
            _Evil(importlib.import_module, "evilmod"),
            _Evil(Path.touch, Path(canary)),
            _Evil(open, canary, "w"),
            _Evil(torch.load, canary),
            _Evil(torch.hub.load_state_dict_from_url, "http://127.0.0.1:9/x"),
        ]
    )
    wrapped = chance.choice([made, {"state_dict": {"a": made}}, [made], {"a": torch.zeros(2), "b": made}])
    try:
        return pickle.dumps(wrapped, protocol=chance.choice((0, 2, 4)))
    except (pickle.PicklingError, TypeError):
        return pickle.dumps(made, protocol=2)
