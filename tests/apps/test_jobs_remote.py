"""Batch jobs whose inputs and outputs lie elsewhere: fsspec's memory stands for an object store.

The bytes are a local job's, whatever fails on the way; nothing of it stays on this machine.
"""

from __future__ import annotations

import dataclasses
import json
import os
import posixpath
import signal

import fsspec
import pytest

from manyheads.apps import jobs_command, locks
from manyheads.apps.jobs import JobOptions, Stopped, run_job
from manyheads.apps.remote import RemoteStore
from manyheads.apps.stores import LocalStore, open_store
from manyheads.core.errors import ManyheadsError, UsageError

KINDS = ("plain", "filing", "joining", "consuming")


class Fault(Exception):
    """Ends a job at a point of the protocol, as a kill would in a process of its own."""


class Memory:
    """The file system, as an object store that other code can look into."""

    def __init__(self):
        self.system = fsspec.filesystem("memory")

    def write(self, path, content):
        self.system.pipe_file(path, content)

    def contents(self, folder):
        """What a folder holds."""
        found = {
            posixpath.relpath(path, folder): self.system.cat_file(path) for path in self.system.find(folder)
        }
        return {name: content for name, content in found.items() if not name.startswith("..")}


@pytest.fixture
def memory():
    """An empty file system in memory."""
    found = Memory()
    found.system.store.clear()
    found.system.pseudo_dirs[:] = [""]
    yield found
    found.system.store.clear()
    found.system.pseudo_dirs[:] = [""]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own, and leases that do not let wait."""
    monkeypatch.setenv("MANYHEADS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(locks, "BEAT_S", 0.05)
    monkeypatch.setattr(locks, "SETTLE_S", 0.05)
    return tmp_path / "cache"


@pytest.fixture
def options(source):
    return JobOptions("", [str(source)], "memory://bucket/out", shard_size=8, max_bad=0.1, quiet=True)


def start(options, fake, kind="joining", fault=None, **changes):
    model = json.dumps({"name": "fake", "kind": kind})
    return run_job(dataclasses.replace(options, model=model, **changes), load=fake.load, fault=fault)


@pytest.fixture(scope="module")
def undisturbed(fake, tmp_path_factory, inspect_folder):
    """What a local job leaves, by kind."""
    folder, found = tmp_path_factory.mktemp("undisturbed"), {}
    source = inspect_folder.write_source(folder / "in.txt", bad=(3, 17, 18))
    for kind in KINDS:
        out = folder / kind
        start(JobOptions("", [str(source)], out, shard_size=8, max_bad=0.1, quiet=True), fake, kind)
        found[kind] = {
            path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()
        }
    return found


def kept(cache):
    """Files that a job left on this machine."""
    return [path for path in cache.rglob("*") if path.is_file()]


@pytest.mark.parametrize("kind", KINDS)
def test_an_output_elsewhere_has_a_local_ones_bytes(options, fake, memory, undisturbed, cache, kind):
    result = start(options, fake, kind)
    assert (result.records, result.bad, result.shards, result.exit_code) == (40, 3, 5, 0)
    assert memory.contents("/bucket/out") == undisturbed[kind]
    assert kept(cache) == []
    assert start(options, fake, kind, resume=True).rows == result.rows
    with pytest.raises(UsageError, match="memory://bucket/out holds a finished job"):
        start(options, fake, kind)


POINTS = [
    ("written", 2), ("bad", 2), ("part", 2), ("part", 4), ("finishing", 3), ("finished", 5), ("results", 5),
    ("success", 5), ("cleaned", 1),
]  # fmt: skip


@pytest.mark.parametrize(("point", "shard"), POINTS)
def test_ended_at_any_point_and_resumed(options, fake, memory, undisturbed, cache, point, shard):
    def hook(reached, at):
        if (reached, at) == (point, shard):
            raise Fault

    with pytest.raises((Fault, ManyheadsError)):
        start(options, fake, "consuming", fault=hook)
    assert ("_SUCCESS" in memory.contents("/bucket/out")) == (point == "cleaned")
    assert start(options, fake, "consuming", resume=True).exit_code == 0
    assert memory.contents("/bucket/out") == undisturbed["consuming"]
    assert kept(cache) == []


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_half_a_part_under_its_final_name_is_found(options, fake, memory, undisturbed, share):
    """File systems that are no object stores may show one after a crash."""
    start(options, fake)
    memory.system.rm("/bucket/out/_SUCCESS")
    part = memory.contents("/bucket/out")["part-00001-of-00005.parquet"]
    memory.write("/bucket/out/part-00001-of-00005.parquet", part[: int(share * len(part))])
    assert start(options, fake, resume=True).exit_code == 0
    assert memory.contents("/bucket/out") == undisturbed["joining"]


def test_damage_to_a_finished_job_is_made_good(options, fake, memory, undisturbed):
    start(options, fake)
    memory.write("/bucket/out/results/r1.txt", b"0\n")
    memory.system.rm("/bucket/out/files-00002/00000.txt")
    assert start(options, fake, resume=True).exit_code == 0
    assert memory.contents("/bucket/out") == undisturbed["joining"]


def test_what_arrives_in_part_is_an_error(options, fake, memory, monkeypatch):
    whole = type(memory.system).put_file

    def half(self, path, target, **known):
        whole(self, path, target, **known)
        if "part-00002" in target:
            self.pipe_file(target, self.cat_file(target)[:-9])

    monkeypatch.setattr(type(memory.system), "put_file", half)
    with pytest.raises(ManyheadsError, match=r"part-00002-of-00005.parquet: \d+ bytes were stored, \d+ are"):
        start(options, fake)
    monkeypatch.undo()
    assert start(options, fake, resume=True).exit_code == 0


def test_no_more_than_a_few_shards_are_on_this_machine(
    options, fake, memory, cache, tmp_path, inspect_folder
):
    source = inspect_folder.write_source(tmp_path / "many.txt", records=400)
    most = 0

    def hook(point, index):
        nonlocal most
        most = max(most, sum(path.stat().st_size for path in kept(cache)))

    start(options, fake, fault=hook, inputs=[str(source)])
    whole = sum(map(len, memory.contents("/bucket/out").values()))
    assert 0 < most < whole / 8


def test_a_folder_with_other_files_is_refused_and_untouched(options, fake, memory):
    memory.write("/bucket/out/thesis.txt", b"mine")
    with pytest.raises(UsageError, match=r"memory://bucket/out is not empty and holds no job"):
        start(options, fake)
    assert memory.contents("/bucket/out") == {"thesis.txt": b"mine"}


def test_a_signal_stops_and_resume_goes_on(options, fake, memory, undisturbed):
    def hook(point, index):
        if (point, index) == ("part", 1):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped, match="what is done stays in memory://bucket/out: go on with --resume"):
        start(options, fake, fault=hook)
    assert ".lock" not in memory.contents("/bucket/out")
    assert start(options, fake, resume=True).exit_code == 0
    assert memory.contents("/bucket/out") == undisturbed["joining"]


def test_workers_cannot_reach_the_memory_of_another_process(options, fake, memory):
    with pytest.raises(UsageError, match="workers cannot reach it"):
        start(options, fake, workers=2)


# The lock: a lease.


def test_a_second_runner_is_refused_while_the_first_beats(options, fake, memory):
    def hook(point, index):
        if (point, index) == ("part", 1):
            with pytest.raises(
                ManyheadsError, match=rf"another runner is at work here \(pid {os.getpid()} on "
            ):
                start(options, fake, resume=True)

    assert start(options, fake, fault=hook).exit_code == 0


def test_a_dead_runners_lease_is_taken_over(options, fake, memory, undisturbed):
    memory.write("/bucket/out/.lock", b"pid 1 on elsewhere\nrun abc\nsince 0\nbeat 3 at 15\n")
    assert start(options, fake, resume=True).exit_code == 0
    assert memory.contents("/bucket/out") == undisturbed["joining"]


def test_a_runner_that_was_replaced_stores_nothing_more(options, fake, memory):
    def hook(point, index):
        if (point, index) == ("written", 2):
            memory.write("/bucket/out/.lock", b"pid 1 on elsewhere\nrun abc\nsince 0\n")

    with pytest.raises(
        ManyheadsError, match=r"no longer this run's: another runner took it over \(pid 1 on else"
    ):
        start(options, fake, fault=hook)
    names = memory.contents("/bucket/out")
    assert "part-00001-of-00005.parquet" in names and "part-00002-of-00005.parquet" not in names
    assert names[".lock"].startswith(b"pid 1 on elsewhere\n")  # the other's lease stands


def test_of_two_that_find_a_dead_lease_one_goes_on(memory, monkeypatch):
    memory.write("/bucket/out/.lock", b"pid 1 on elsewhere\nrun abc\nsince 0\n")
    store = RemoteStore("memory://bucket/out")

    def write(self, name, text):
        memory.write("/bucket/out/.lock", b"pid 2 on another\nrun def\nsince 0\n")  # right behind ours

    monkeypatch.setattr(RemoteStore, "write", write)
    with pytest.raises(ManyheadsError, match=r"at work here \(pid 2 on another\)"), store.locked("ghi"):
        pass


def test_a_local_folder_without_flock_is_leased(options, fake, tmp_path, monkeypatch, undisturbed):
    def no_flock(descriptor, how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", no_flock)
    out = tmp_path / "out"

    def hook(point, index):
        if (point, index) == ("part", 1):
            with pytest.raises(ManyheadsError, match="another runner is at work here"):
                start(options, fake, output=out, resume=True)

    assert start(options, fake, output=out, fault=hook).exit_code == 0
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert names == undisturbed["joining"].keys()


# Inputs.


def test_inputs_elsewhere_are_copied_and_removed(options, fake, memory, source, cache, undisturbed):
    memory.write("/data/in.txt", source.read_bytes())
    seen = []
    start(options, fake, inputs=["memory://data/in.txt"], fault=lambda point, index: seen.append(kept(cache)))
    assert memory.contents("/bucket/out") == undisturbed["joining"]
    assert cache / "jobs" in seen[0][0].parents
    assert kept(cache) == []


def test_patterns_and_folders_elsewhere(options, fake, memory, source):
    for name in ("b", "a", "deep/c"):
        memory.write(f"/data/{name}.txt", source.read_bytes())
    result = start(options, fake, inputs=["memory://data/*.txt", "memory://data/deep/c.txt"])
    assert result.records == 120
    job = json.loads(memory.contents("/bucket/out")["job.json"])
    assert [each["name"] for each in job["inputs"]] == ["a.txt", "b.txt", "c.txt"]


def test_copies_are_kept_for_a_job_that_goes_on(
    options, fake, memory, source, cache, monkeypatch, undisturbed
):
    memory.write("/data/in.txt", source.read_bytes())
    stopping = {"inputs": ["memory://data/in.txt"]}

    def hook(point, index):
        if (point, index) == ("part", 1):
            raise Fault

    with pytest.raises((Fault, ManyheadsError)):
        start(options, fake, fault=hook, **stopping)
    assert len([path for path in kept(cache) if path.name == "in.txt"]) == 1
    copies = []
    get = type(memory.system).get_file
    monkeypatch.setattr(
        type(memory.system),
        "get_file",
        lambda self, path, *rest, **k: copies.append(path) or get(self, path, *rest, **k),
    )
    assert start(options, fake, resume=True, **stopping).exit_code == 0
    assert "/data/in.txt" not in copies
    assert memory.contents("/bucket/out") == undisturbed["joining"]


def test_a_changed_input_elsewhere_is_another_job(options, fake, memory, source):
    memory.write("/data/in.txt", source.read_bytes())

    def hook(point, index):
        raise Fault

    with pytest.raises((Fault, ManyheadsError)):
        start(options, fake, fault=hook, inputs=["memory://data/in.txt"])
    memory.write("/data/in.txt", source.read_bytes().replace(b"r39 4", b"r39 3"))  # the same size
    with pytest.raises(UsageError, match=r"input in.txt has other content"):
        start(options, fake, resume=True, inputs=["memory://data/in.txt"])


@pytest.mark.parametrize("fails", [1, 3])
def test_a_copy_that_breaks_off_is_tried_again(options, fake, memory, source, monkeypatch, fails):
    monkeypatch.setattr("manyheads.apps.staging.PAUSE_S", 0.0)
    memory.write("/data/in.txt", source.read_bytes())
    get, tries = type(memory.system).get_file, []

    def broken(self, path, target, **known):
        tries.append(path)
        get(self, path, target, **known)
        if len(tries) <= fails:
            os.truncate(target, 10)

    monkeypatch.setattr(type(memory.system), "get_file", broken)
    if fails < 3:
        assert start(options, fake, "plain", inputs=["memory://data/in.txt"]).exit_code == 0
        return
    with pytest.raises(ManyheadsError, match=r"/data/in.txt cannot be copied: 10 bytes came of \d+"):
        start(options, fake, "plain", inputs=["memory://data/in.txt"])


def test_no_room_for_the_inputs_is_said_before_copying(options, fake, memory, source, monkeypatch):
    memory.write("/data/in.txt", source.read_bytes())
    room = type("Usage", (), {"free": 100})()
    monkeypatch.setattr("shutil.disk_usage", lambda path: room)
    with pytest.raises(UsageError, match="let MANYHEADS_CACHE name a larger disk"):
        start(options, fake, inputs=["memory://data/in.txt"])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"inputs": ["memory://data/none.txt"]}, "no input memory://data/none.txt"),
        ({"inputs": ["memory://data/*.csv"]}, r"no input memory://data/\*.csv"),
        ({"inputs": ["nosuch://data/x"]}, "nosuch://data/x: Protocol not known: nosuch"),
        ({"output": "nosuch://out"}, "nosuch://out: Protocol not known: nosuch"),
    ],
)
def test_addresses_that_mean_nothing_are_refused(options, fake, memory, changes, says):
    with pytest.raises(UsageError, match=says):
        start(options, fake, **changes)


def test_a_file_system_that_is_not_installed_names_its_package(options, fake):
    if "s3fs" in fsspec.available_protocols() or __import__("importlib.util").util.find_spec("s3fs"):
        pytest.skip("s3fs is installed")
    with pytest.raises(UsageError, match="s3://bucket/out: Install s3fs to access S3"):
        start(options, fake, output="s3://bucket/out")


def test_file_addresses_are_local_folders(options, fake, source, tmp_path, undisturbed):
    assert open_store("file:///x/y") == LocalStore(open_store("/x/y").root)
    out = tmp_path / "out"
    start(options, fake, inputs=[f"file://{source}"], output=f"file://{out}")
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert names == undisturbed["joining"].keys()


def test_the_status_of_a_job_elsewhere(options, fake, memory, capsys):
    found = []

    def hook(point, index):
        if (point, index) == ("part", 2):
            found.append(jobs_command.read_status(open_store(options.output)))

    start(options, fake, fault=hook)
    assert (found[0].state, found[0].done, found[0].left, found[0].records) == ("running", 3, 2, 24)
    assert jobs_command.main(["status", options.output]) == 0
    assert capsys.readouterr().out.startswith(
        "memory://bucket/out: finished (model fake)\nshards   5 of 5 done"
    )


def test_a_beat_that_is_half_written_does_not_end_the_run(options, fake, memory, monkeypatch):
    """Where files are not written at once."""
    looks = []
    read = RemoteStore.read

    def half(self, name):
        text = read(self, name)
        if name == ".lock":
            looks.append(text)
        return text[: len(looks) % 3 * 10] if name == ".lock" and len(looks) % 3 else text

    monkeypatch.setattr(RemoteStore, "read", half)
    monkeypatch.setattr(locks, "LOOK_S", 0.001)
    monkeypatch.setattr(locks, "BEAT_S", 60)
    assert start(options, fake).exit_code == 0
    assert len(looks) >= 15


@pytest.mark.slow
def test_s3_by_configuration_alone(options, fake, source, undisturbed, monkeypatch):
    """`pip install s3fs 'moto[server]'`, then `pytest -m slow tests/apps/test_jobs_remote.py`."""
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    server = pytest.importorskip("moto.server", reason="moto is not installed").ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("FSSPEC_S3_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    fsspec.config.set_conf_env(fsspec.config.conf)
    monkeypatch.setattr(locks, "BEAT_S", 1.0)
    system = fsspec.filesystem("s3")
    system.mkdir("bucket")
    system.pipe_file("bucket/in/in.txt", source.read_bytes())
    known = {"inputs": ["s3://bucket/in/*.txt"], "output": "s3://bucket/out"}

    def hook(point, index):
        if (point, index) == ("part", 2):
            with pytest.raises(ManyheadsError, match="another runner is at work here"):
                start(options, fake, resume=True, **known)
            raise Fault

    with pytest.raises((Fault, ManyheadsError)):
        start(options, fake, fault=hook, **known)
    assert start(options, fake, resume=True, **known).exit_code == 0
    found = {path.removeprefix("bucket/out/"): system.cat_file(path) for path in system.find("bucket/out")}
    assert found == undisturbed["joining"]
    with pytest.raises(ManyheadsError, match=r"s3://none/out cannot be (used|written)"):
        start(options, fake, output="s3://none/out")
    server.stop()
