"""`manyheads jobs status`: how far a job is, from another process, without torch and at once."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import time

import pytest

from manyheads.apps import cli, jobs_command
from manyheads.apps.jobs import JobOptions, run_job
from manyheads.apps.stores import open_store
from manyheads.core.errors import ManyheadsError, UsageError


@pytest.fixture
def options(source, tmp_path):
    return JobOptions(
        '{"name": "fake"}', [str(source)], tmp_path / "out", shard_size=8, max_bad=0.1, quiet=True
    )


def status(options):
    return jobs_command.read_status(open_store(options.output))


def test_while_a_runner_is_at_work(options, fake):
    found = []

    def hook(point, index):
        if (point, index) == ("part", 2):
            found.append(status(options))

    run_job(options, load=fake.load, fault=hook)
    (seen,) = found
    assert (seen.state, seen.shards, seen.done, seen.left, seen.damaged) == ("running", 5, 3, 2, 0)
    assert (seen.records, seen.bad, seen.rows) == (
        24,
        3,
        sum(i % 5 for i in range(24) if i not in (3, 17, 18)),
    )
    assert seen.runner is not None and seen.runner.startswith(f"pid {os.getpid()} on ")
    assert seen.rate is not None and 0 < seen.rate <= 24  # of a job that has lasted a second, or longer
    assert seen.seconds_left == pytest.approx(16 / seen.rate)
    assert "wait, or stop it" in seen.advice


def test_states_of_an_ended_run(options, fake):
    class Fault(BaseException):
        pass

    def hook(point, index):
        if (point, index) == ("part", 2):
            raise Fault

    with pytest.raises(Fault):
        run_job(options, load=fake.load, fault=hook)
    seen = status(options)
    assert (seen.state, seen.done, seen.left, seen.runner, seen.rate) == ("stopped", 3, 2, None, None)
    assert seen.advice == "the same command with --resume goes on"
    again = dataclasses.replace(options, resume=True)
    run_job(dataclasses.replace(again, max_bad=0.0), load=fake.load)
    seen = status(options)
    assert (seen.state, seen.done, seen.left, seen.bad) == ("too many bad", 5, 0, 3)
    assert "--resume --max-bad 0.075 accepts them" in seen.advice
    run_job(again, load=fake.load)
    assert (status(options).state, status(options).rows) == ("finished", 72)


def test_damaged_and_foreign_parts_are_told(options, fake):
    run_job(options, load=fake.load)
    (options.output / "_SUCCESS").unlink()
    parts = [options.output / f"part-0000{i}-of-00005.parquet" for i in range(5)]
    parts[1].write_bytes(parts[1].read_bytes()[:-9])
    parts[3].write_bytes(b"")
    seen = status(options)
    assert (seen.state, seen.done, seen.left, seen.damaged) == ("stopped", 3, 2, 2)
    assert "3 of 5 done, 2 left, 2 damaged (to be made again)" in jobs_command.text(seen)
    job = options.output / "job.json"
    job.write_text(re.sub(r'"fingerprint": "\w+"', '"fingerprint": "0"', job.read_text()))
    assert status(options).damaged == 5


def test_what_is_no_job_is_refused(options, fake, tmp_path):
    with pytest.raises(UsageError, match="no folder"):
        status(options)
    options.output.mkdir()
    with pytest.raises(UsageError, match="holds no job"):
        status(options)
    with pytest.raises(UsageError, match="no folder"):
        jobs_command.main(["status", str(tmp_path / "in.txt")])
    (options.output / "job.json").write_text("{")
    with pytest.raises(ManyheadsError, match=r"job.json is damaged"):
        status(options)


def test_lines_and_json(options, fake, capsys):
    run_job(options, load=fake.load)
    assert cli.main(["jobs", "status", str(options.output)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{options.output}: finished (model fake)",
        "shards   5 of 5 done, 0 left",
        "records  40, 72 rows, 3 bad",
        f"next     nothing: the rows are in {options.output}/part-*.parquet",
    ]
    assert cli.main(["jobs", "status", str(options.output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "finished"
    assert cli.main(["jobs", "stats", str(options.output)]) == 2
    assert "invalid choice: 'stats'" in capsys.readouterr().err


def test_a_runner_that_starts_meanwhile_is_not_turned_away(options, fake, monkeypatch):
    """Looking at the lock holds it for a moment."""
    import fcntl

    options.output.mkdir()
    with (options.output / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        monkeypatch.setattr(time, "sleep", lambda seconds: fcntl.flock(file, fcntl.LOCK_UN))
        assert run_job(options, load=fake.load).exit_code == 0


def test_a_hundred_shards_in_under_a_second_without_torch(options, fake, tmp_path, inspect_folder):
    source = inspect_folder.write_source(tmp_path / "many.txt", 400)
    run_job(dataclasses.replace(options, inputs=[str(source)], shard_size=4), load=fake.load)
    code = (
        "import resource, sys\n"
        "from manyheads.apps.cli import main\n"
        "assert main(sys.argv[1:]) == 0\n"
        "assert 'torch' not in sys.modules\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(used.ru_utime + used.ru_stime)"
    )
    command = [sys.executable, "-c", code, "jobs", "status", str(options.output)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    seconds = []
    for _ in range(3):
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        assert "100 of 100 done" in done.stdout
        seconds.append(float(done.stdout.split()[-1]))
    assert sorted(seconds)[1] < 1.0
