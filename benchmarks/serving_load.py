"""What puts load on a served model: honest clients, hostile ones, and a watch over the server's processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from benchmarks import serving_hostile as hostile

DEADLINE = 30
SIDES = 8  # from which hostile requests come
SLOW = 20  # pairs of connections that send a byte at a time
ENVIRONMENT = {
    **{key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"},
    "OMP_NUM_THREADS": "1",
}


@dataclass
class Load:
    """What honest clients met.

    Args:
        statuses: Answers by status, or the error's name where there was none.
        seconds: Of each answer with rows.
        began, ended: Of the whole.
    """

    statuses: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    began: float = 0.0
    ended: float = 0.0

    @property
    def rate(self) -> float:
        """Answers with rows a second."""
        return len(self.seconds) / (self.ended - self.began)

    def quantile(self, share: float) -> float:
        """A quantile of the answers' times."""
        found = sorted(self.seconds)
        return found[min(len(found) - 1, int(share * len(found)))] if found else float("nan")


@contextlib.contextmanager
def served(models: dict[str, Path]) -> Iterator[tuple[str, int]]:
    """A server, its address and process."""
    references = [f"{name}={path}" for name, path in models.items()]
    command = [sys.executable, "-m", "manyheads.apps.cli", "serve", *references, "--port", "0", "--quiet"]
    process = subprocess.Popen(
        [*command, "--deadline", str(DEADLINE)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=ENVIRONMENT,
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        found = re.search(r"http://\S+\d", line)
        if found is None:
            raise RuntimeError(f"no server: {line}")
        threading.Thread(target=process.stdout.read, daemon=True).start()
        yield found[0], process.pid
        process.send_signal(signal.SIGTERM)
        code = process.wait(DEADLINE + 30)
        print(f"the server ended with {code}", flush=True)
    finally:
        process.kill()


def family(pid: int) -> list[int]:
    """A process and its children."""
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return [pid, *(int(child) for each in lists for child in each.read_text().split())]


def memory_of(pid: int) -> dict[int, float]:
    """MiB of a server's processes."""
    found = {}
    for each in family(pid):
        with contextlib.suppress(OSError, StopIteration):
            lines = Path(f"/proc/{each}/status").read_text().splitlines()
            found[each] = int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024
    return found


def cpu_of(pid: int) -> float:
    """CPU seconds of a server's processes so far."""
    ticks, found = os.sysconf("SC_CLK_TCK"), 0.0
    for each in family(pid):
        with contextlib.suppress(OSError):
            cells = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
            found += (int(cells[11]) + int(cells[12])) / ticks
    return found


class Client:
    """One honest client: a connection that is kept, and asyncio's streams, for it must cost little itself."""

    def __init__(self, url: str, photos: Sequence[bytes], number: int, load: Load) -> None:
        address = urlsplit(url)
        self.host, self.port = str(address.hostname), address.port or 80
        self.photos, self.number, self.load = photos, number, load
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def run(self, end: float) -> None:
        """Ask until it is time to end; what is under way is waited for."""
        i = self.number
        while time.perf_counter() < end:
            begin = time.perf_counter()
            try:
                status, after = await asyncio.wait_for(
                    self._ask(self.photos[i % len(self.photos)]), DEADLINE + 10
                )
            except (OSError, TimeoutError, asyncio.IncompleteReadError, ValueError) as error:
                self.load.statuses[type(error).__name__] += 1
                self._leave()
                continue
            self.load.statuses[str(status)] += 1
            if status == 200:
                self.load.seconds.append(time.perf_counter() - begin)
                i += 1
            else:
                self._leave()  # the server would not keep the connection that long
                await asyncio.sleep(min(after or 1, max(0, end - time.perf_counter())))
        self._leave()

    def _leave(self) -> None:
        if self.streams is not None:
            self.streams[1].close()
            self.streams = None

    async def _ask(self, photo: bytes) -> tuple[int, float]:
        if self.streams is None:
            self.streams = await asyncio.open_connection(self.host, self.port)
        reader, writer = self.streams
        writer.write(
            b"POST /v1/models/vision/predict HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: image/jpeg\r\n"
            b"content-length: %d\r\n\r\n" % len(photo) + photo
        )
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        headers = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line)
        body = await reader.readexactly(int(headers["content-length"]))
        status = int(head.split(" ", 2)[1])
        if status == 200 and b'"rows":[{"id":"0","label":"class ' not in body:
            raise ValueError("no row")
        if headers.get("connection") == "close":
            self._leave()
        return status, float(headers.get("retry-after", 0))


def honest(url: str, photos: Sequence[bytes], clients: int, seconds: float) -> Load:
    """Let honest clients ask."""

    async def run() -> Load:
        load = Load(began=time.perf_counter())
        end = load.began + seconds
        await asyncio.gather(*(Client(url, photos, i, load).run(end) for i in range(clients)))
        load.ended = time.perf_counter()
        return load

    return asyncio.run(run())


class Attack:
    """Hostile requests from several sides, until it is left."""

    def __init__(self, url: str) -> None:
        self.url, self.over = url, threading.Event()
        self.sent: Counter[str] = Counter()
        self.wrong: Counter[str] = Counter()
        self.threads = [threading.Thread(target=self._run, args=(i,), daemon=True) for i in range(SIDES)]
        self.threads.append(threading.Thread(target=self._hold, daemon=True))

    def __enter__(self) -> Attack:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join(DEADLINE + 30)

    def _run(self, side: int) -> None:
        address = urlsplit(self.url)
        requests = hostile.requests()
        raw = list(hostile.raw().values())
        with httpx.Client(base_url=self.url, timeout=DEADLINE + 20) as client:
            place = side * len(requests) // SIDES
            while not self.over.is_set():
                request = requests[place % len(requests)]
                status = send(client, request)
                self.sent[str(status)] += 1
                if status not in (*request.statuses, 429):
                    self.wrong[f"{request.name}: {status}"] += 1
                with contextlib.suppress(OSError):
                    raw[place % len(raw)](str(address.hostname), address.port or 80)
                place += 1

    def _hold(self) -> None:
        address = urlsplit(self.url)
        while not self.over.is_set():
            opened = [
                each
                for _ in range(SLOW)
                for each in hostile.slow(str(address.hostname), address.port or 80, DEADLINE)
            ]
            self.over.wait(5)
            for each in opened:
                each.close()


def send(client: httpx.Client, request: hostile.Hostile) -> int | str:
    """Send a hostile request; return the status, or what went wrong."""
    try:
        answer = client.post(
            f"/v1/models/{request.model}/predict", content=request.content(), headers=request.headers
        )
    except httpx.HTTPError as error:
        return type(error).__name__
    return answer.status_code


class Watch:
    """Memory of the server's processes, each second."""

    def __init__(self, pid: int) -> None:
        self.pid, self.over = pid, threading.Event()
        self.found: list[dict[int, float]] = []
        self.thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self.cpu = -cpu_of(self.pid)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.thread.join()
        self.cpu += cpu_of(self.pid)

    def _run(self) -> None:
        while not self.over.wait(1):
            self.found.append(memory_of(self.pid))

    def grown(self) -> tuple[float, float]:
        """MiB of all processes: the median of the second fifth of the time, and of the last."""
        sums = [sum(each.values()) for each in self.found]
        fifth = max(1, len(sums) // 5)
        return statistics.median(sums[fifth : 2 * fifth] or sums), statistics.median(sums[-fifth:])
