"""Batch jobs killed, stopped, crowded or starved of space: the final bytes are an undisturbed run's."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from manyheads.apps.jobs import JobOptions, run_job
from manyheads.core.errors import ManyheadsError

PARTS = [f"part-{i:05d}-of-00005.parquet" for i in range(5)]


@pytest.fixture(scope="module")
def undisturbed(job, tmp_path_factory, inspect_folder):
    """The hashes and rows of a job that nothing happened to, by its number of workers."""
    folder = tmp_path_factory.mktemp("undisturbed")
    source = inspect_folder.write_source(folder / "in.txt", bad=(3, 17, 18))
    assert job(source, folder / "out", max_bad=0.1)[0] == 0
    return inspect_folder.digests(folder / "out"), inspect_folder.rows(folder / "out")


def same(output, undisturbed, inspect_folder):
    assert inspect_folder.digests(output) == undisturbed[0]
    assert inspect_folder.rows(output) == undisturbed[1]


def wait_for(condition, process=None):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "waited for too long"
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("point", "shard", "parts"),
    [("written", 0, 0), ("written", 2, 2), ("bad", 2, 2), ("part", 2, 3), ("part", 4, 5), ("success", 5, 5)],
)
def test_killed_and_resumed(job, source, tmp_path, undisturbed, inspect_folder, point, shard, parts):
    out = tmp_path / "out"
    code, _, _ = job(source, out, max_bad=0.1, fault=[point, shard])
    assert code == -signal.SIGKILL
    names = {file.name for file in out.iterdir()}
    assert {name for name in names if name.startswith("part-")} == set(PARTS[:parts])
    assert "_SUCCESS" not in names
    assert any(name.startswith(".tmp-") for name in names) == (point in ("written", "bad"))
    assert ("bad-00002.jsonl" in names) == (
        (point, shard) in [("bad", 2), ("part", 2), ("part", 4), ("success", 5)]
    )
    assert job(source, out, max_bad=0.1, resume=True)[0] == 0
    same(out, undisturbed, inspect_folder)


def holder(out):
    """The process that holds a folder's lock."""
    try:
        return int((out / ".lock").read_text().split()[1])
    except (OSError, IndexError):
        return None


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("seed", range(4))
def test_killed_at_random_moments(job, source, tmp_path, inspect_folder, seed, workers):
    out, whole, moments = tmp_path / "out", tmp_path / "whole", random.Random(seed)
    options = {"max_bad": 0.1, "workers": workers, "shard_size": 2}
    assert job(source, whole, **options)[0] == 0
    ended = []
    while 0 not in ended:
        assert len(ended) < 40, "it gets nowhere"
        slow = '{"name": "fake", "delay": 0.05}'
        process = job.start(source, out, resume=True, model=slow, **options)
        wait_for(lambda of=process: holder(out) == of.pid or of.poll() is not None)
        try:
            process.wait(moments.uniform(0, 0.4) * 1.15 ** len(ended))  # a busy machine ends, too
        except subprocess.TimeoutExpired:
            process.kill()
        process.communicate()
        ended.append(process.returncode)
    assert ended[0] == -signal.SIGKILL  # the job takes longer than the first moment
    assert inspect_folder.digests(out) == inspect_folder.digests(whole)


def test_killed_again_and_again(job, source, tmp_path, undisturbed, inspect_folder):
    out = tmp_path / "out"
    for point, shard in (("written", 1), ("bad", 1), ("part", 1), ("written", 4), ("success", 5)):
        code, _, _ = job(source, out, max_bad=0.1, resume=True, fault=[point, shard])
        assert code == -signal.SIGKILL
    assert job(source, out, max_bad=0.1, resume=True)[0] == 0
    same(out, undisturbed, inspect_folder)


@pytest.mark.parametrize("shard", range(3))
def test_killed_runner_with_workers(job, source, tmp_path, undisturbed, inspect_folder, shard):
    out = tmp_path / "out"
    slow = '{"name": "fake", "delay": 0.05}'
    process = job.start(source, out, max_bad=0.1, model=slow, workers=2)
    wait_for((out / PARTS[shard]).exists, process)
    process.kill()
    process.communicate()
    assert job(source, out, max_bad=0.1, resume=True)[0] == 0
    assert inspect_folder.rows(out) == undisturbed[1]
    whole = tmp_path / "whole"
    assert job(source, whole, max_bad=0.1, workers=2)[0] == 0
    assert inspect_folder.digests(out) == inspect_folder.digests(whole)


def test_workers_write_the_same_parts(job, source, tmp_path, undisturbed, inspect_folder):
    out = tmp_path / "out"
    code, printed, _ = job(source, out, max_bad=0.1, workers=3)
    assert code == 0
    result = json.loads(printed)
    assert (result["records"], result["bad"], result["shards"]) == (40, 3, 5)
    parts = {name: digest for name, digest in undisturbed[0].items() if name.startswith(("bad-", "part-"))}
    assert parts.items() <= inspect_folder.digests(out).items()


def test_killed_worker_is_an_error_and_resumable(job, source, tmp_path, undisturbed, inspect_folder):
    out = tmp_path / "out"
    code, _, err = job(
        source, out, max_bad=0.1, workers=2, fault=["written", 2]
    )  # the hook runs in the worker
    assert code == 1
    assert "a worker process died" in err
    assert "--resume" in err
    assert not [file for file in out.iterdir() if file.name.startswith(".tmp-")]
    assert not (out / PARTS[2]).exists()
    assert job(source, out, max_bad=0.1, resume=True)[0] == 0
    assert inspect_folder.rows(out) == undisturbed[1]


def test_failure_in_a_worker_reaches_the_message(job, source, tmp_path):
    model = '{"name": "fake", "crash": "r20"}'
    code, _, err = job(source, tmp_path / "out", max_bad=0.1, workers=2, model=model)
    assert code == 1
    assert "shard 2: RuntimeError: the model failed" in err


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").exists(), reason="no /proc")
def test_workers_end_with_their_killed_runner(job, source, tmp_path):
    out = tmp_path / "out"
    process = job.start(source, out, model='{"name": "fake", "delay": 30}', workers=2)
    wait_for(lambda: len(list(out.glob(".tmp-*.parquet"))) == 2, process)
    workers = children(process.pid)
    assert len(workers) >= 2
    process.kill()
    process.communicate()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_stops_cleanly(job, source, tmp_path, undisturbed, inspect_folder, signum, code, workers):
    out = tmp_path / "out"
    slow = '{"name": "fake", "delay": 0.3}'
    process = job.start(source, out, max_bad=0.1, model=slow, workers=workers)
    wait_for(lambda: (out / PARTS[0]).exists() and list(out.glob(".tmp-*.parquet")), process)
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert f"stopped by {signal.Signals(signum).name}" in err
    assert "go on with --resume" in err
    names = {file.name for file in out.iterdir()}
    assert "_SUCCESS" not in names
    assert not {name for name in names if name.startswith(".")}
    assert not {PARTS[4]} & names
    assert job(source, out, max_bad=0.1, resume=True)[0] == 0
    assert inspect_folder.rows(out) == undisturbed[1]
    if not workers:
        same(out, undisturbed, inspect_folder)


def test_second_signal_ends_at_once(job, source, tmp_path):
    out = tmp_path / "out"
    process = job.start(source, out, model='{"name": "fake", "delay": 60}')
    wait_for(lambda: list(out.glob(".tmp-*.parquet")), process)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == -signal.SIGINT


def test_second_runner_is_refused_while_the_first_lives(
    job, fake, source, tmp_path, inspect_folder, undisturbed
):
    out = tmp_path / "out"
    first = job.start(source, out, max_bad=0.1, model='{"name": "fake", "delay": 0.3}')
    wait_for((out / PARTS[0]).exists, first)
    for resume in (False, True):
        options = JobOptions('{"name": "fake"}', [str(source)], out, shard_size=8, resume=resume)
        with pytest.raises(ManyheadsError, match=rf"another runner is at work here \(pid {first.pid} on "):
            run_job(options, load=fake.load)
    assert first.wait(timeout=60) == 0
    first.communicate()
    same(out, undisturbed, inspect_folder)


def test_lock_of_a_killed_runner_is_free(job, source, tmp_path):
    out = tmp_path / "out"
    first = job.start(source, out, model='{"name": "fake", "delay": 60}')
    wait_for(lambda: list(out.glob(".tmp-*.parquet")), first)
    first.kill()
    first.communicate()
    assert (out / ".lock").exists()
    assert job(source, out, max_bad=0.1, resume=True)[0] == 0
    assert not (out / ".lock").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_file_limit_is_an_error_and_resumable(job, tmp_path, inspect_folder, workers):
    source = inspect_folder.write_source(tmp_path / "in.txt", records=3000)
    out = tmp_path / "out"
    code, _, err = job(source, out, shard_size=2000, batch_size=50, workers=workers, file_limit=4096)
    assert code == 1
    assert f"cannot write to {out} (file too large)" in err
    assert "Traceback" not in err
    assert "Exception ignored" not in err
    assert [file.name for file in out.iterdir()] == ["job.json"]
    assert job(source, out, shard_size=2000, batch_size=50, resume=True)[0] == 0
    assert len(inspect_folder.rows(out)) == 6000


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 40 KiB, where this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system is not permitted here (RLIMIT_FSIZE is tested above)")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_is_an_error_and_resumable(job, tmp_path, inspect_folder, small_disk):
    source = inspect_folder.write_source(tmp_path / "in.txt", records=12_000)
    out = small_disk / "out"
    code, _, err = job(source, out, shard_size=2000, batch_size=50)
    assert code == 1
    assert f"cannot write to {out} (no space left): make room and go on with --resume" in err
    parts = list(out.glob("part-*"))
    assert 1 <= len(parts) < 6
    assert {file.name for file in out.iterdir()} == {"job.json", *(part.name for part in parts)}
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    assert job(source, out, shard_size=2000, batch_size=50, resume=True)[0] == 0
    assert job(source, tmp_path / "whole", shard_size=2000, batch_size=50)[0] == 0
    assert inspect_folder.digests(out) == inspect_folder.digests(tmp_path / "whole")
