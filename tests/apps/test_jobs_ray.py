"""Batch jobs on a Ray cluster: the local engine's bytes, whatever dies; what cannot work is refused."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from importlib.metadata import version

import pytest

from manyheads.apps.engines import ray as engine
from manyheads.apps.engines.worker import Site
from manyheads.apps.jobfolder import software
from manyheads.apps.jobs import JobOptions, run_job
from manyheads.apps.parts import Task
from manyheads.apps.stores import LocalStore
from manyheads.core.errors import ManyheadsError, UsageError

PARTS = [f"part-{i:05d}-of-00005.parquet" for i in range(5)]


def model(**known):
    return json.dumps({"name": "fake", "kind": "joining", **known})


@pytest.fixture(scope="module")
def ray_job(job, cluster):
    """Runs fake jobs on the cluster."""

    class RayJob:
        def start(self, source, out, **options):
            known = {"engine": "ray", "address": cluster, "workers": 2, "max_bad": 0.1, "model": model()}
            return job.start(source, out, **{**known, **options})

        def __call__(self, source, out, **options):
            process = self.start(source, out, **options)
            printed, err = process.communicate(timeout=300)
            return process.returncode, printed, err

    return RayJob()


@pytest.fixture(scope="module")
def undisturbed(job, tmp_path_factory, inspect_folder):
    """The hashes of a local job that nothing happened to, with the threads that workers on a cluster get."""
    folder = tmp_path_factory.mktemp("undisturbed")
    source = inspect_folder.write_source(folder / "in.txt", bad=(3, 17, 18))
    assert job(source, folder / "out", max_bad=0.1, model=model(), workers=os.cpu_count())[0] == 0
    assert json.loads((folder / "out" / "job.json").read_text())["threads"] == 1
    return inspect_folder.digests(folder / "out")


def wait_for(condition, process):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "waited for too long"
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def test_the_same_bytes_as_locally_though_a_worker_was_killed(
    ray_job, source, tmp_path, undisturbed, inspect_folder
):
    out = tmp_path / "out"
    fault = {"fault": ["bad", 2], "marker": str(tmp_path / "killed")}
    code, printed, err = ray_job(source, out, **fault)
    assert code == 0, err
    assert (tmp_path / "killed").exists()
    assert inspect_folder.digests(out) == undisturbed
    result = json.loads(printed)
    assert 0 < result["starting"] < result["seconds"]


def test_a_shard_that_kills_every_worker_ends_the_job_which_resumes(
    ray_job, job, source, tmp_path, undisturbed, inspect_folder
):
    out = tmp_path / "out"
    code, _, err = ray_job(source, out, fault=["written", 2])
    assert code == 1
    assert "shard 2 ended 3 workers one after another" in err
    assert "go on with --resume" in err
    names = {file.name for file in out.iterdir()}
    assert PARTS[2] not in names and "_SUCCESS" not in names
    assert not {name for name in names if name.startswith(".")}
    assert job(source, out, max_bad=0.1, model=model(), resume=True)[0] == 0  # where it began does not matter
    assert inspect_folder.digests(out) == undisturbed


def test_a_killed_runner_is_resumed_on_the_cluster(ray_job, source, tmp_path, undisturbed, inspect_folder):
    out = tmp_path / "out"
    process = ray_job.start(source, out, model=model(delay=0.3))
    wait_for((out / PARTS[0]).exists, process)
    process.kill()
    process.communicate()
    assert not (out / "_SUCCESS").exists()
    code, _, err = ray_job(source, out, resume=True)
    assert code == 0, err
    assert inspect_folder.digests(out) == undisturbed


def test_a_failing_model_reaches_the_message(ray_job, source, tmp_path):
    code, _, err = ray_job(source, tmp_path / "out", model=model(crash="r20"))
    assert code == 1
    assert err.strip().splitlines()[-1] == "shard 2: RuntimeError: the model failed"


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_cleanly(ray_job, source, tmp_path, undisturbed, inspect_folder, signum, code):
    """`pytest -m slow tests/apps/test_jobs_ray.py`."""
    out = tmp_path / "out"
    process = ray_job.start(source, out, model=model(delay=0.5))
    wait_for((out / PARTS[0]).exists, process)
    process.send_signal(signum)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert "go on with --resume" in err
    assert not {file.name for file in out.iterdir() if file.name.startswith(".")}
    assert ray_job(source, out, resume=True)[0] == 0
    assert inspect_folder.digests(out) == undisturbed


@pytest.mark.slow
def test_without_an_address_a_cluster_is_started_and_ended(
    job, source, tmp_path, monkeypatch, inspect_folder, undisturbed
):
    """`pytest -m slow tests/apps/test_jobs_ray.py`."""
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray keeps a token there
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    out = tmp_path / "out"
    process = job.start(source, out, engine="ray", max_bad=0.1, model=model(), quiet=False)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert err.startswith("5 shards\nno --address: starting Ray on this machine")
    assert inspect_folder.digests(out) == undisturbed


def test_more_workers_than_the_cluster_has_room_for_are_refused(ray_job, source, tmp_path):
    code, _, err = ray_job(source, tmp_path / "out", workers=9)
    assert code == 2
    assert "--workers 9: the cluster has 3 processors, room for 3" in err


def options(source, tmp_path, **changes):
    known = {"output": tmp_path / "out", "engine": "ray", "quiet": True, "max_bad": 1.0}
    return JobOptions(model(), [str(source)], **{**known, **changes})


def test_a_cluster_that_does_not_answer_is_an_error_at_once(fake, source, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begin = time.monotonic()
    with pytest.raises(
        ManyheadsError, match=f"no Ray cluster answers at 127.0.0.1:{port} .Connection refused"
    ):
        run_job(options(source, tmp_path, address=f"127.0.0.1:{port}"), load=fake.load)
    assert time.monotonic() - begin < engine.REACH_S + 5


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("MANYHEADS_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"address": "ray://head:10001"}, "HOST:PORT of the cluster's head is needed"),
        ({"address": "head"}, "HOST:PORT of the cluster's head is needed"),
        ({"workers": 0}, "a job needs a worker"),
        ({"engine": "local", "address": "head:6379"}, "it goes with --engine ray"),
        ({"output": "memory://out"}, "is in this process's memory: workers cannot reach it"),
    ],
)
def test_options_that_cannot_work_are_refused(fake, source, tmp_path, changes, says):
    with pytest.raises(UsageError, match=says):
        run_job(options(source, tmp_path, **changes), load=fake.load)


def test_without_ray_the_package_is_named(fake, source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"--engine ray needs Ray: pip install 'manyheads\[ray\]'"):
        run_job(options(source, tmp_path), load=fake.load)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def actor(fake, source, tmp_path, monkeypatch):
    """A worker, in this process, of a job in `tmp_path`; its folder's lock is held by the run `abc`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".lock").write_text("pid 1 on head\nrun abc\nsince 0\n")
    task = Task(
        model(), {"name": "fake", "sha256": "0"}, fake.load, LocalStore(tmp_path), "abc", 5, 4, 1, "f"
    )
    sample = ((str(source), source.stat().st_size),)
    site = Site(None, str(tmp_path), str(source), None, sample, software())
    return engine._Actor((task, site))


def test_a_worker_that_has_all_it_needs_starts(actor):
    assert actor.start()
    assert actor.worker.predictor is not None


@pytest.mark.parametrize("lock", [None, "", "pid 7 on another\nrun abd\nsince 0\n"])
def test_a_node_that_does_not_see_the_output_folder_is_named(actor, tmp_path, lock):
    (tmp_path / ".lock").unlink()
    if lock is not None:
        (tmp_path / ".lock").write_text(lock)
    with pytest.raises(UsageError, match=rf"the node .* does not see the output folder {tmp_path}"):
        actor.start()


@pytest.mark.parametrize("content", [None, "r0 1\n"])
def test_a_node_that_does_not_see_the_inputs_is_named(actor, source, content):
    source.unlink()
    if content is not None:
        source.write_text(content)
    with pytest.raises(UsageError, match=rf"the node .*: the input {source} is not here as it is where"):
        actor.start()


def test_a_node_with_other_software_is_named(actor):
    actor.site.software["torch"] = "1.0"
    says = rf"the node .*: torch {version('torch')} is installed here, the job runs with 1.0".replace(
        "+", "."
    )
    with pytest.raises(UsageError, match=says):
        actor.start()


def test_a_node_with_another_model_is_named(actor):
    actor.task.identity["sha256"] = "1"
    with pytest.raises(ManyheadsError, match="was replaced while the job ran"):
        actor.start()
