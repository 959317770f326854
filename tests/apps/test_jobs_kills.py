"""Two hundred kills of jobs of a hundred shards, at random moments: the same bytes every time.

`pytest -m slow tests/apps/test_jobs_kills.py -s` prints kills and seconds; MANYHEADS_KILLS names another
number, MANYHEADS_WRITE_RESULTS=1 writes the figures to benchmarks/results/kills.json.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "kills.json"
SHARDS, RECORDS = 100, 8
KILLS = int(os.environ.get("MANYHEADS_KILLS", "200"))
# Of so many kills each: shards in the runner; in workers; on a file system without rename or flock, which
# shows half files; on a Ray cluster, where the runner outlives its workers.
KINDS = {"runner": 0.35, "workers": 0.35, "elsewhere": 0.2, "ray": 0.1}


def model(kind):
    """A fake model; one kind in two has files and results beside the rows."""
    return json.dumps(
        {"name": "fake", "kind": "consuming" if kind in ("workers", "ray") else "plain", "delay": 0.01}
    )


@pytest.fixture
def source(tmp_path, inspect_folder):
    bad = tuple(random.Random(0).sample(range(SHARDS * RECORDS), 30))
    return inspect_folder.write_source(tmp_path / "in.txt", SHARDS * RECORDS, bad)


def options(kind, out, cluster):
    known = {"shard_size": RECORDS, "max_bad": 0.1, "model": model(kind)}
    if kind == "runner":
        return str(out), known
    if kind == "workers":
        return str(out), {**known, "workers": 2}
    if kind == "elsewhere":
        return f"disk://{out}", {**known, "beat": 0.02}
    return str(out), {**known, "engine": "ray", "address": cluster(), "workers": 2}


def writers(out, cache):
    """The processes that are writing a part."""
    found = [*out.glob(".tmp-*-part-*"), *cache.rglob(".tmp-*-part-*")]
    return [int(path.name.split("-")[2]) for path in found]


def parts(out):
    return len(list(out.glob("part-*")))


def kill_one(process, out, cache, draw):
    """Kill the runner, or one that writes for it, some parts from now; False where the job ended first."""
    goal, wait = parts(out) + draw.randrange(1, 40), draw.uniform(0, 0.05)
    if draw.random() < 0.2:  # as it starts: while it loads, reads the inputs, or verifies what is there
        goal, wait = 0, draw.uniform(0, 2)
    while process.poll() is None and parts(out) < goal:
        time.sleep(0.005)
    time.sleep(wait)
    others = [pid for pid in writers(out, cache) if pid != process.pid]
    victim = draw.choice(others) if others and draw.random() < 0.5 else process.pid
    if process.poll() is not None:
        return None
    try:
        os.kill(victim, signal.SIGKILL)
    except ProcessLookupError:
        return None
    return "runner" if victim == process.pid else "worker"


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_random_moments(job, source, tmp_path, inspect_folder, monkeypatch, request, kind):
    monkeypatch.setenv("MANYHEADS_CACHE", str(tmp_path / "cache"))
    draw, begin = random.Random(KINDS[kind]), time.perf_counter()

    def start(out, **more):
        place, known = options(kind, out, lambda: request.getfixturevalue("cluster"))
        return job.start(source, place, **{**known, **more})

    undisturbed = tmp_path / "undisturbed"
    process = start(undisturbed)
    assert process.wait(timeout=600) == 0, process.communicate()
    wanted = inspect_folder.digests(undisturbed)
    assert len([name for name in wanted if name.startswith("part-")]) == SHARDS
    killed, jobs, survived = Counter(), 0, 0
    while killed.total() < KILLS * KINDS[kind]:
        out, jobs = tmp_path / f"out{jobs}", jobs + 1
        while True:
            process = start(out, resume=True)
            while (which := kill_one(process, out, tmp_path / "cache", draw)) is not None:
                killed[which] += 1
                if which == "runner" or kind != "ray":
                    break  # a worker of a cluster is replaced, and the runner goes on
            _, err = process.communicate(timeout=600)
            assert process.returncode in (0, 1, -signal.SIGKILL), err
            assert process.returncode != 1 or "worker" in err, err
            if process.returncode == 0:
                break
        found = inspect_folder.digests(out)
        assert found == wanted
        survived += 1
    if os.environ.get("MANYHEADS_WRITE_RESULTS"):
        known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        found = {"runner": killed["runner"], "worker": killed["worker"], "jobs": survived, "shards": SHARDS}
        RESULTS.write_text(json.dumps({**known, kind: found}, indent=1) + "\n")
    seconds = time.perf_counter() - begin
    print(f"\n{kind}: {dict(killed)} killed, {survived} jobs of {SHARDS} shards, same bytes, {seconds:.0f} s")
