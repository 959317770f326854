"""The state of a job in words, and on a terminal."""

from __future__ import annotations

import io
import re

import pytest

from manyheads.apps import progress
from manyheads.apps.progress import Count, Progress, clock


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that the test sets."""
    time = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: time[0])
    return time


def test_clock() -> None:
    assert [clock(s) for s in (0, 59.6, 187, 3600, 3723)] == ["0:00", "1:00", "3:07", "1:00:00", "1:02:03"]


def test_rate_and_time_left_count_this_run_only(now: list[float]) -> None:
    with Progress(79, 12, 10, quiet=True) as bar:
        assert bar.describe() == "12/79 shards, 0 records, 0.0 records/s, 0 bad, ETA ?"
        now[0] += 2
        bar.advance(10, 1)
        bar.finish_shard()
        assert bar.describe() == "13/79 shards, 10 records, 5.0 records/s, 1 bad, ETA 2:12"
        now[0] += 1
        bar.advance(5, 0)
        assert bar.position() == 13.5
        assert bar.describe() == "13/79 shards, 15 records, 5.0 records/s, 1 bad, ETA 2:11"


def test_position_stays_within_the_shard(now: list[float]) -> None:
    with Progress(2, 0, 10, quiet=True) as bar:
        bar.advance(25, 0)  # more records than shards have on average
        assert bar.position() == 1.0


def test_lines_now_and_then(now: list[float]) -> None:
    stream = io.StringIO()
    with Progress(4, 1, 10, stream=stream) as bar:
        for _ in range(25):
            now[0] += 1
            bar.advance(1, 0)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "4 shards, 1 done before"
    assert lines[1:] == [
        "1/4 shards, 10 records, 1.0 records/s, 0 bad, ETA 0:20",
        "1/4 shards, 20 records, 1.0 records/s, 0 bad, ETA 0:40",
    ]


def test_bar_on_a_terminal(now: list[float]) -> None:
    stream = Terminal()
    with Progress(2, 0, 10, stream=stream) as bar:
        now[0] += 1
        bar.advance(10, 3)
        bar.finish_shard()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    assert "2 shards" in text
    assert "1/2 shards, 10 records, 10.0 records/s, 3 bad, ETA 0:01" in text


def test_quiet_prints_nothing(now: list[float]) -> None:
    stream = Terminal()
    with Progress(2, 0, 10, quiet=True, stream=stream) as bar:
        now[0] += 60
        bar.advance(10, 0)
    assert stream.getvalue() == ""


def test_a_count_says_rate_and_time_left(now: list[float]) -> None:
    stream = io.StringIO()
    with Count(100, "windows", stream=stream) as count:
        assert count.describe() == "0/100 windows, 0.0 windows/s, ETA ?"
        for _ in range(4):
            now[0] += 5
            count.advance(20)
    assert stream.getvalue().splitlines() == [
        "100 windows",
        "40/100 windows, 4.0 windows/s, ETA 0:15",
        "80/100 windows, 4.0 windows/s, ETA 0:05",
    ]


def test_a_count_on_a_terminal_and_quiet(now: list[float]) -> None:
    for quiet in (False, True):
        stream = Terminal()
        with Count(4, "windows", quiet, stream) as count:
            now[0] += 1
            count.advance(2)
        assert ("2/4 windows, 2.0 windows/s, ETA 0:01" in stream.getvalue()) is not quiet
