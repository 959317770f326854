"""`manyheads serve`: models over HTTP, put together in batches, with everything bounded.

The server is a small process that never imports torch. Each model has worker processes of its own, so that
what goes wrong in one (a crash in a decoder, no memory, a loop) ends there: it is started anew.

Why not LitServe (0.2.19), which was tried first: it cannot be made to hold the contract from outside. A
request whose worker was killed got no answer (none in 15 s, with `timeout=5` and `restart_workers=True`: the
watchdog marks requests in the parent process, but they wait in another one). On SIGTERM the parent ended at
once with -15 and left four processes that kept the port. Its queue between processes has no bound and no way
to take a request out: one whose deadline passed, or whose client left, is still computed, and its place in
the table of answers is never freed. A record that makes a batch fail takes the whole batch along. What is
left of it, an application of FastAPI and uvicorn, is what this is made of.

SIGTERM or SIGINT: `/readyz` says 503, what was admitted is finished, new requests get 503; exit code 0. If
something admitted could not be finished before its deadline, or a second signal comes, 143 or 130.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from manyheads.apps.arguments import Parser, make_parser
from manyheads.core.errors import UsageError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
SHORTEST_TOKEN = 16
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Options:
    """What is served, and how.

    Args:
        models: References, each with a name in front (`name=reference`) or not.
        host, port: Where; port 0 takes a free one.
        token_file: A file whose content clients must show.
        ui: Add the page.
        workers: Processes a model.
        device: Where they run.
        batch: Requests that are answered together, at most.
        wait_ms: How long the first of a batch waits for others.
        queue: Requests a model that may wait.
        deadline: Seconds from a request's admission to its answer.
        max_body_mb: Of a request.
        max_seconds: Of sound in a request.
        max_pixels: Of an image.
        streams: Recordings that may go on at once.
        quiet: No line a request.
    """

    models: tuple[str, ...]
    host: str = "127.0.0.1"
    port: int = 8000
    token_file: Path | None = None
    ui: bool = False
    workers: int = 1
    device: str = "auto"
    batch: int = 64
    wait_ms: float = 5
    queue: int = 128
    deadline: float = 30
    max_body_mb: float = 16
    max_seconds: float = 600
    max_pixels: int = 50_000_000
    streams: int = 16
    quiet: bool = False

    def check(self) -> None:
        """Refuse values that mean nothing.

        Raises:
            UsageError: One is out of range.
        """
        above = ("workers", "batch", "queue", "deadline", "max_body_mb", "max_seconds", "max_pixels")
        for name in above:
            if not 0 < getattr(self, name) < float("inf"):
                raise UsageError(f"--{name.replace('_', '-')} must be above 0, not {getattr(self, name):g}")
        if not 0 <= self.port < 65536:
            raise UsageError(f"--port takes 0 to 65535, not {self.port}")
        if not 0 <= self.wait_ms < 1000 * self.deadline:
            raise UsageError(f"--wait-ms must be 0 or more, and below the deadline; not {self.wait_ms:g}")
        if self.streams < 0:
            raise UsageError(f"--streams must be 0 or more, not {self.streams}")

    def token(self) -> str | None:
        """Read the token.

        Raises:
            UsageError: The file cannot be read, or holds no safe token.
        """
        if self.token_file is None:
            return None
        try:
            found = self.token_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "no text"
            raise UsageError(f"--token-file {self.token_file} cannot be read: {reason}") from error
        if len(found) < SHORTEST_TOKEN or not found.isascii() or len(found.split()) != 1:
            words = f"one word of {SHORTEST_TOKEN} ASCII characters or more"
            raise UsageError(f"--token-file {self.token_file} must hold {words}")
        return found

    @property
    def hosts(self) -> frozenset[str]:
        """Names that requests may have for this server; any where others than this machine can ask."""
        if self.host not in LOOPBACK:
            return frozenset()
        return frozenset((*LOOPBACK, "[::1]"))


def split(reference: str) -> tuple[str, str]:
    """Return the name and the reference of a model, as the command line gives it.

    Example:
        >>> split("cats=runs/cats/model"), split("runs/cats/model"), split("org/cats@v1")
        (('cats', 'runs/cats/model'), ('cats', 'runs/cats/model'), ('cats', 'org/cats@v1'))

    Raises:
        UsageError: The name is none.
    """
    name, equals, rest = reference.partition("=")
    if not equals:
        parts = [part for part in reference.partition("@")[0].split("/") if part not in ("", ".")]
        name, rest = (
            (parts[-2] if len(parts) > 1 and parts[-1] == "model" else (parts or [""])[-1]),
            reference,
        )
    if not NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} is no name for an address: letters, digits, . _ - (give one: name={rest or reference})"
        )
    return name, rest


def parser() -> Parser:
    """Return the command's parser."""
    made = make_parser(
        "serve",
        "Serve models over HTTP: several at once, in batches, every queue and size bounded.",
        epilog="examples:\n"
        "  manyheads serve runs/cats/model runs/sales/model --port 8000\n"
        "  manyheads serve cats=runs/cats/model --token-file token.txt --ui\n\n"
        "addresses: /v1/models/NAME/predict  /v1/models  /openapi.json  /metrics  /livez  /readyz",
    )
    made.add_argument(
        "models", metavar="MODEL", nargs="+", help="a model folder or reference; with its name: name=MODEL"
    )
    add, known = made.add_argument, Options
    add("--host", default=known.host, help="address to listen at (127.0.0.1: this machine alone)")
    add("--port", type=int, default=known.port, help="port (8000); 0 takes a free one")
    add("--token-file", type=Path, metavar="F", help="file with the token that clients must show")
    add("--ui", action="store_true", help="add a page to try the models in a browser")
    _add_limits(made)
    add("--workers", type=int, default=known.workers, help="processes a model (1)")
    add("--device", choices=("auto", "cpu", "cuda"), default=known.device, help="where models run (auto)")
    add("--quiet", action="store_true", help="no line a request")
    return made


def _add_limits(made: argparse.ArgumentParser) -> None:
    group = made.add_argument_group("limits")
    numbers: dict[str, tuple[type, str]] = {
        "batch": (int, "requests that are answered together, at most"),
        "wait-ms": (float, "how long the first of a batch waits for others"),
        "queue": (int, "requests a model that may wait; beyond, 429"),
        "deadline": (float, "seconds from admission to answer; beyond, 504"),
        "max-body-mb": (float, "of a request; beyond, 413"),
        "max-seconds": (float, "of sound in a request"),
        "max-pixels": (int, "of an image"),
        "streams": (int, "recordings that are recognised while they go on, at once"),
    }
    for name, (kind, text) in numbers.items():
        default = getattr(Options, name.replace("-", "_"))
        shown = f"{default:g}" if default < 1_000_000 else f"{default:,}"
        group.add_argument(f"--{name}", type=kind, default=default, metavar="N", help=f"{text} ({shown})")


def main(args: Sequence[str]) -> int:
    """Serve until a signal comes."""
    parsed = parser().parse(args)
    options = Options(**{**vars(parsed), "models": tuple(parsed.models)})
    options.check()
    options.token()
    for reference in options.models:
        split(reference)
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UsageError(f"serving needs `pip install manyheads[serve]` ({error.name} is missing)") from error
    from manyheads.apps.serving.run import run

    return run(options)
