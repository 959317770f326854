"""Jobs whose rows carry files, and domains that make something of all parts: same bytes after every fault."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess

import pyarrow.parquet as pq
import pytest

from manyheads.apps import jobs, progress
from manyheads.apps.jobs import JobOptions, run_job
from manyheads.core.errors import ManyheadsError

KINDS = ("filing", "joining", "consuming")


def model(kind):
    return json.dumps({"name": "fake", "kind": kind})


@pytest.fixture
def options(source, tmp_path):
    return JobOptions("", [str(source)], tmp_path / "out", shard_size=8, max_bad=0.1, quiet=True)


def start(options, fake, kind, **changes):
    return run_job(dataclasses.replace(options, model=model(kind), **changes), load=fake.load)


@pytest.fixture(scope="module")
def undisturbed(job, tmp_path_factory, inspect_folder):
    """The hashes of each kind's job that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    source = inspect_folder.write_source(folder / "in.txt", bad=(3, 17, 18))
    for kind in KINDS:
        assert job(source, folder / kind, max_bad=0.1, model=model(kind))[0] == 0
    return {kind: inspect_folder.digests(folder / kind) for kind in KINDS}


def values(folder):
    """What the results hold, by record."""
    return {file.stem: [float(line) for line in file.read_text().split()] for file in folder.iterdir()}


EXPECTED = {
    f"r{i}": [i % 5 + s / 7 for s in range(i % 5)] for i in range(40) if i not in (3, 17, 18) and i % 5
}


@pytest.mark.parametrize("kind", KINDS)
def test_files_lie_beside_their_part_and_count(options, fake, kind, inspect_folder):
    result = start(options, fake, kind)
    assert result.exit_code == 0
    out = options.output
    hashes = inspect_folder.digests(out)
    success = json.loads((out / "_SUCCESS").read_text())
    assert success["files"] == {k: v for k, v in hashes.items() if k not in ("_SUCCESS", "job.json")}
    rows = [row for part in sorted(out.glob("part-*")) for row in pq.read_table(part).to_pylist()]
    assert len(rows) == result.rows == sum(map(len, EXPECTED.values()))
    assert len({row["file"] for row in rows}) == len(rows)
    for row in rows:
        assert (out / row["file"]).exists() == (kind != "consuming")
        if kind != "consuming":
            assert float((out / row["file"]).read_text()) == row["yhat"]
    assert (out / "results").exists() == (kind != "filing")
    if kind != "filing":
        assert values(out / "results") == EXPECTED


@pytest.mark.parametrize(
    ("kind", "point", "shard"),
    [
        ("filing", "written", 2),
        ("filing", "bad", 2),
        ("filing", "part", 4),
        ("joining", "finishing", 0),
        ("joining", "finishing", 3),
        ("joining", "finished", 5),
        ("joining", "results", 5),
        ("joining", "success", 5),
        ("consuming", "success", 5),
        ("consuming", "cleaned", 1),
    ],
)
def test_killed_and_resumed(job, source, tmp_path, undisturbed, inspect_folder, kind, point, shard):
    out = tmp_path / "out"
    code, _, _ = job(source, out, max_bad=0.1, model=model(kind), fault=[point, shard])
    assert code == -signal.SIGKILL
    assert (out / "_SUCCESS").exists() == (point == "cleaned")
    assert (out / "results").exists() == (point in ("results", "success", "cleaned"))
    assert job(source, out, max_bad=0.1, model=model(kind), resume=True)[0] == 0
    assert inspect_folder.digests(out) == undisturbed[kind]
    assert not [file for file in out.iterdir() if file.name.startswith(".")]


def test_killed_in_every_step_after_another(job, source, tmp_path, undisturbed, inspect_folder):
    out = tmp_path / "out"
    for fault in (
        ["bad", 1],
        ["finishing", 2],
        ["finished", 5],
        ["results", 5],
        ["success", 5],
        ["cleaned", 0],
    ):
        code, _, _ = job(source, out, max_bad=0.1, model=model("consuming"), resume=True, fault=fault)
        assert code == -signal.SIGKILL, fault
    assert job(source, out, max_bad=0.1, model=model("consuming"), resume=True)[0] == 0
    assert inspect_folder.digests(out) == undisturbed["consuming"]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_moments(job, source, tmp_path, inspect_folder, seed, workers):
    out, whole, moments = tmp_path / "out", tmp_path / "whole", random.Random(seed)
    options = {"max_bad": 0.1, "workers": workers, "shard_size": 2}
    assert job(source, whole, model=model("consuming"), **options)[0] == 0
    slow = json.dumps({"name": "fake", "kind": "consuming", "delay": 0.05})
    ended = []
    while 0 not in ended:
        assert len(ended) < 40, "it gets nowhere"
        process = job.start(source, out, resume=True, model=slow, **options)
        try:
            process.wait(moments.uniform(0.3, 1.5) * 1.15 ** len(ended))  # a busy machine ends, too
        except subprocess.TimeoutExpired:
            process.kill()
        process.communicate()
        ended.append(process.returncode)
    assert ended[0] == -signal.SIGKILL
    assert inspect_folder.digests(out) == inspect_folder.digests(whole)


def test_workers_store_the_same_files(job, source, tmp_path, undisturbed, inspect_folder):
    out = tmp_path / "out"
    assert job(source, out, max_bad=0.1, model=model("joining"), workers=2)[0] == 0
    found = inspect_folder.digests(out)
    assert found.keys() == undisturbed["joining"].keys()
    carried = {name: digest for name, digest in found.items() if name not in ("job.json", "_SUCCESS")}
    assert carried.items() <= undisturbed["joining"].items()


def lost(out):
    (out / "files-00001" / "00002.txt").unlink()


def changed(out):
    (out / "files-00003" / "00000.txt").write_text("0\n")


def stale(out):
    (out / ".tmp-1-files-00001").mkdir()
    (out / ".tmp-1-files-00001" / "00000.txt").write_text("half")


def result_lost(out):
    (out / "results" / "r1.txt").unlink()


def result_changed(out):
    (out / "results" / "r2.txt").write_text("")


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        *(("joining", damage) for damage in (lost, changed, stale, result_lost, result_changed)),
        *(("consuming", damage) for damage in (stale, result_lost, result_changed)),
    ],
)
def test_damage_is_found_and_made_good(options, fake, inspect_folder, kind, damage, finished):
    start(options, fake, kind)
    before = inspect_folder.digests(options.output)
    if not finished:
        (options.output / "_SUCCESS").unlink()
    damage(options.output)
    assert start(options, fake, kind, resume=True).exit_code == 0
    assert inspect_folder.digests(options.output) == before


def test_resume_of_a_finished_job_does_nothing(options, fake, inspect_folder, monkeypatch):
    start(options, fake, "consuming")
    before = inspect_folder.digests(options.output)
    monkeypatch.setattr(fake.FakePredictor, "forward", lambda self, batch: pytest.fail("the model ran"))
    monkeypatch.setattr(fake.Joining, "finish", lambda *args: pytest.fail("it was made again"))
    assert start(options, fake, "consuming", resume=True).exit_code == 0
    assert inspect_folder.digests(options.output) == before


def test_results_wait_until_the_bad_records_are_accepted(options, fake):
    assert start(options, fake, "consuming", max_bad=0.0).exit_code == 3
    assert not (options.output / "results").exists()
    assert (options.output / "files-00001").exists()
    assert start(options, fake, "consuming", resume=True).exit_code == 0
    assert values(options.output / "results") == EXPECTED
    assert not (options.output / "files-00001").exists()


def test_a_failure_says_where_and_keeps_the_parts(options, fake, monkeypatch):
    (options.output.parent / "stumble").touch()
    with pytest.raises(ManyheadsError, match="the results: RuntimeError: the disk stumbled"):
        start(options, fake, "joining")
    assert not (options.output / "results").exists()
    assert not list(options.output.glob(".tmp-*"))
    (options.output.parent / "stumble").unlink()
    monkeypatch.setattr(fake.FakePredictor, "forward", lambda self, batch: pytest.fail("the model ran"))
    assert start(options, fake, "joining", resume=True).exit_code == 0


def test_a_signal_stops_it_between_parts(options, fake, tmp_path, inspect_folder):
    """The check for signals runs at each part that the step reads."""

    def hook(point, index):
        if (point, index) == ("finishing", 2):
            os.kill(os.getpid(), signal.SIGTERM)

    chosen = dataclasses.replace(options, model=model("joining"))
    with pytest.raises(jobs.Stopped, match="go on with --resume"):
        run_job(chosen, load=fake.load, fault=hook)
    assert not (options.output / "results").exists()
    assert run_job(dataclasses.replace(chosen, resume=True), load=fake.load).exit_code == 0
    assert values(options.output / "results") == EXPECTED


def test_no_folder_where_no_row_carries_a_file(options, fake, tmp_path, inspect_folder):
    source = inspect_folder.write_source(tmp_path / "in.txt", records=12, bad=tuple(range(4, 12)))
    start(options, fake, "filing", inputs=[str(source)], shard_size=4, max_bad=1)
    assert sorted(file.name for file in options.output.glob("files-*")) == ["files-00000"]


def test_no_results_where_there_is_nothing_to_make(options, fake, tmp_path, inspect_folder):
    source = inspect_folder.write_source(tmp_path / "in.txt", records=8, bad=tuple(range(8)))
    assert start(options, fake, "joining", inputs=[str(source)], max_bad=1).exit_code == 0
    assert not (options.output / "results").exists()
    assert not list(options.output.glob(".tmp-*"))


def test_the_time_left_goes_by_the_records_that_shards_have(options, fake, monkeypatch):
    """Where a shard's size is a limit that few reach, the limit would make the job look endless."""
    seen = []
    monkeypatch.setattr(jobs, "Progress", lambda *args: seen.append(args[2]) or jobs_progress(*args))
    jobs_progress = progress.Progress
    start(options, fake, "filing")
    monkeypatch.setattr(fake.FakePredictor, "count", lambda self, shard: 3, raising=False)
    start(options, fake, "filing", output=options.output.parent / "other")
    assert seen == [8, 3]
