"""Batch jobs in this process: the folder, resuming, refusals, bad records."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading

import pyarrow.parquet as pq
import pytest

from manyheads.apps.jobs import JobOptions, run_job
from manyheads.core.errors import DataError, ManyheadsError, UsageError

MODEL = '{"name": "fake"}'


@pytest.fixture
def options(source, tmp_path):
    return JobOptions(MODEL, [str(source)], tmp_path / "out", shard_size=8, max_bad=0.1, quiet=True)


def again(options, **changes):
    return dataclasses.replace(options, resume=True, **changes)


def expected_rows():
    return {
        (f"r{i}", step, i % 5 + step / 7) for i in range(40) if i not in (3, 17, 18) for step in range(i % 5)
    }


def test_finished_job(options, fake, inspect_folder):
    result = run_job(options, load=fake.load)
    assert (result.records, result.bad, result.shards, result.exit_code) == (40, 3, 5, 0)
    assert result.rows == len(expected_rows())
    names = sorted(file.name for file in options.output.iterdir())
    parts = [f"part-{i:05d}-of-00005.parquet" for i in range(5)]
    assert names == sorted(["_SUCCESS", "job.json", "bad-00000.jsonl", "bad-00002.jsonl", *parts])
    found = inspect_folder.rows(options.output)
    assert set(found) == expected_rows()
    assert set(found.values()) == {1}
    bad = [json.loads(line) for line in (options.output / "bad-00002.jsonl").read_text().splitlines()]
    assert bad == [{"id": f"r{i}", "reason": "value 'x' is no number"} for i in (17, 18)]
    success = json.loads((options.output / "_SUCCESS").read_text())
    assert (success["records"], success["rows"], success["bad"], success["shards"]) == (40, result.rows, 3, 5)
    hashes = inspect_folder.digests(options.output)
    assert success["files"] == {k: v for k, v in hashes.items() if k not in ("_SUCCESS", "job.json")}


def test_job_json_and_footer_name_the_same_job(options, fake, source):
    run_job(options, load=fake.load)
    job = json.loads((options.output / "job.json").read_text())
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert job["inputs"] == [{"name": "in.txt", "bytes": source.stat().st_size, "sha256": digest}]
    assert job["options"] == {"batch_size": 4, "shard_size": 8}
    assert job["model"] == {"name": "fake", "sha256": "0"}
    assert str(source.parent) not in (options.output / "job.json").read_text()
    footer = pq.read_metadata(options.output / "part-00002-of-00005.parquet").metadata[b"manyheads"]
    footer = json.loads(footer)
    assert (footer["records"], footer["bad"], footer["shard"]) == (8, 2, 2)
    assert footer["fingerprint"] == job["fingerprint"]


def test_types_are_the_declared_ones_in_every_part_even_without_rows(tmp_path, fake, inspect_folder):
    source = inspect_folder.write_source(tmp_path / "in.txt", records=12, bad=tuple(range(4, 8)))
    result = run_job(
        JobOptions(MODEL, [str(source)], tmp_path / "out", shard_size=4, max_bad=1, quiet=True),
        load=fake.load,
    )
    schemas = [pq.read_schema(file) for file in sorted((tmp_path / "out").glob("part-*"))]
    assert len(schemas) == 3
    assert pq.read_metadata(tmp_path / "out" / "part-00001-of-00003.parquet").num_rows == 0
    assert all(schema.equals(schemas[0]) for schema in schemas)
    assert [str(kind) for kind in schemas[0].types] == ["string", "int64", "double"]
    assert result.bad == 4


def test_row_groups_have_a_fixed_size(options, fake, source, monkeypatch):
    monkeypatch.setattr("manyheads.apps.parts.ROW_GROUP", 5)
    run_job(options, load=fake.load)
    meta = pq.read_metadata(options.output / "part-00001-of-00005.parquet")
    sizes = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
    assert sum(sizes) == sum(i % 5 for i in range(8, 16))
    assert set(sizes[:-1]) == {5}


def test_row_with_other_columns_is_refused(options, fake):
    def load(reference):
        predictor, identity = fake.load(reference)
        del predictor.columns["step"]
        return predictor, identity

    with pytest.raises(ManyheadsError, match=r"columns \['id', 'step', 'yhat'\], the predictor declares"):
        run_job(options, load=load)


def test_existing_folder_without_resume_is_refused(options, fake, inspect_folder):
    run_job(options, load=fake.load)
    before = inspect_folder.digests(options.output)
    with pytest.raises(UsageError, match="holds a finished job"):
        run_job(options, load=fake.load)
    (options.output / "_SUCCESS").unlink()
    with pytest.raises(UsageError, match="unfinished job: go on with --resume"):
        run_job(options, load=fake.load)
    del before["_SUCCESS"]
    assert inspect_folder.digests(options.output) == before


@pytest.mark.parametrize("resume", [False, True])
def test_folder_with_other_files_is_refused_and_untouched(options, fake, resume):
    options.output.mkdir()
    (options.output / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds no job \(it has 'thesis.txt'\)"):
        run_job(dataclasses.replace(options, resume=resume), load=fake.load)
    assert [file.name for file in options.output.iterdir()] == ["thesis.txt"]


def test_empty_folder_is_taken_and_resume_without_a_job_starts_one(options, fake):
    options.output.mkdir()
    assert run_job(again(options), load=fake.load).exit_code == 0


def test_resume_of_a_finished_job_runs_no_model(options, fake, inspect_folder, monkeypatch):
    first = run_job(options, load=fake.load)
    before = inspect_folder.digests(options.output)
    monkeypatch.setattr(fake.FakePredictor, "forward", lambda self, batch: pytest.fail("the model ran"))
    second = run_job(again(options), load=fake.load)
    assert dataclasses.replace(second, seconds=first.seconds) == first
    assert inspect_folder.digests(options.output) == before


def stale(options):
    (options.output / ".tmp-1-part-00001-of-00005.parquet").write_bytes(b"PAR1 half")


def truncated(options):
    part = options.output / "part-00001-of-00005.parquet"
    part.write_bytes(part.read_bytes()[:-7])


def flipped(options):
    part = options.output / "part-00001-of-00005.parquet"
    content = bytearray(part.read_bytes())
    content[30] ^= 0xFF  # in a page: the footer still reads
    part.write_bytes(content)


def of_another_job(options):
    from manyheads.apps.parts import Part

    with Part(options.output / "part-00001-of-00005.parquet", {"id": "string"}) as part:
        part.close({"fingerprint": "0", "shard": 1, "records": 8, "rows": 0, "bad": 0, "bad_sha256": ""})


def of_another_shard(options):
    parts = [options.output / f"part-0000{i}-of-00005.parquet" for i in (1, 4)]
    parts[0].write_bytes(parts[1].read_bytes())


def without_footer(options):
    import pyarrow as pa

    pq.write_table(pa.table({"id": ["r8"]}), options.output / "part-00001-of-00005.parquet")


def bad_records_lost(options):
    (options.output / "bad-00002.jsonl").unlink()


def bad_records_changed(options):
    (options.output / "bad-00002.jsonl").write_text("{}\n")


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    "damage",
    [
        stale,
        truncated,
        flipped,
        of_another_job,
        of_another_shard,
        without_footer,
        bad_records_lost,
        bad_records_changed,
    ],
)
def test_damage_is_found_and_made_good(options, fake, inspect_folder, damage, finished):
    run_job(options, load=fake.load)
    before = inspect_folder.digests(options.output)
    if not finished:
        (options.output / "_SUCCESS").unlink()
    damage(options)
    assert run_job(again(options), load=fake.load).exit_code == 0
    assert inspect_folder.digests(options.output) == before


def test_damaged_success_is_written_again(options, fake, inspect_folder):
    run_job(options, load=fake.load)
    before = inspect_folder.digests(options.output)
    (options.output / "_SUCCESS").write_text("{")
    run_job(again(options), load=fake.load)
    assert inspect_folder.digests(options.output) == before


def test_damaged_job_json_is_an_error(options, fake):
    run_job(options, load=fake.load)
    (options.output / "job.json").write_text('{"fingerprint": "0"}')
    with pytest.raises(ManyheadsError, match=r"job.json is damaged"):
        run_job(again(options), load=fake.load)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": '{"name": "other"}'}, "model fake -> other"),
        ({"batch_size": 3}, "batch_size 4 -> 3"),
        ({"shard_size": 10}, "shard_size 8 -> 10"),
    ],
)
def test_resume_as_another_job_is_refused(options, fake, inspect_folder, changes, says):
    run_job(options, load=fake.load)
    before = inspect_folder.digests(options.output)
    with pytest.raises(UsageError, match=says):
        run_job(again(options, **changes), load=fake.load)
    assert inspect_folder.digests(options.output) == before


def test_resume_with_another_input_names_it(options, fake, source, tmp_path):
    run_job(options, load=fake.load)
    text = source.read_text()
    source.write_text(text.replace("r39 4", "r39 3"))  # the same size
    with pytest.raises(UsageError, match=r"input in.txt has other content"):
        run_job(again(options), load=fake.load)
    source.write_text(text)
    (tmp_path / "b.txt").write_text(text)
    with pytest.raises(UsageError, match=r"input b.txt instead of in.txt"):
        run_job(again(options, inputs=[str(tmp_path / "b.txt")]), load=fake.load)
    with pytest.raises(UsageError, match=r"1 inputs -> 2"):
        run_job(again(options, inputs=[str(source), str(tmp_path / "b.txt")]), load=fake.load)


def test_copied_input_with_another_time_resumes(options, fake, source, tmp_path):
    run_job(options, load=fake.load)
    (tmp_path / "copy").mkdir()
    source.rename(tmp_path / "copy" / "in.txt")
    assert run_job(again(options, inputs=[str(tmp_path / "copy" / "in.txt")]), load=fake.load).exit_code == 0


def test_input_that_changes_meanwhile_is_an_error(options, fake, source):
    def append(point, index):
        if (point, index) == ("part", 2):
            with source.open("a") as file:
                file.write("r40 2\n")

    with pytest.raises(DataError, match="an input changed while the job ran"):
        run_job(options, load=fake.load, fault=append)
    assert not (options.output / "_SUCCESS").exists()


def test_too_many_bad_records(options, fake, inspect_folder, capsys, monkeypatch):
    result = run_job(dataclasses.replace(options, max_bad=0.05), load=fake.load)
    assert (result.exit_code, result.bad, result.records) == (3, 3, 40)
    assert not (options.output / "_SUCCESS").exists()
    assert len(list(options.output.glob("part-*"))) == 5
    assert "3 of 40 records are bad" in capsys.readouterr().err  # though quiet
    monkeypatch.setattr(fake.FakePredictor, "forward", lambda self, batch: pytest.fail("the model ran"))
    assert run_job(again(options, max_bad=0.075), load=fake.load).exit_code == 0  # 3 / 40 exactly
    assert (options.output / "_SUCCESS").exists()


def test_failing_model_keeps_what_is_done_and_leaves_nothing_half(options, fake, inspect_folder, tmp_path):
    crashing = dataclasses.replace(options, model='{"name": "fake", "crash": "r20"}')
    with pytest.raises(ManyheadsError, match="shard 2: RuntimeError: the model failed"):
        run_job(crashing, load=fake.load)
    names = [file.name for file in sorted(options.output.iterdir())]
    assert names == [
        "bad-00000.jsonl",
        "job.json",
        "part-00000-of-00005.parquet",
        "part-00001-of-00005.parquet",
    ]
    run_job(again(options), load=fake.load)
    whole = dataclasses.replace(options, output=tmp_path / "whole")
    run_job(whole, load=fake.load)
    assert inspect_folder.digests(options.output) == inspect_folder.digests(whole.output)


def test_failure_before_the_start_leaves_no_folder(options):
    def load(reference):
        raise UsageError("no model folder")

    with pytest.raises(UsageError, match="no model folder"):
        run_job(options, load=load)
    assert not options.output.exists()
    options.output.mkdir()
    with pytest.raises(UsageError, match="no model folder"):
        run_job(options, load=load)
    assert list(options.output.iterdir()) == []  # it was there: it stays


def test_lines_and_summary(options, fake, capsys, monkeypatch):
    monkeypatch.setattr("manyheads.apps.progress.INTERVAL_S", 0.0)
    run_job(dataclasses.replace(options, quiet=False), load=fake.load)
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines[0] == "5 shards"
    assert "40 records" in lines[-2]
    assert "3 bad" in lines[-2]
    assert lines[-1].startswith(f"40 records, 72 rows, 3 bad -> {options.output} (40 records in ")
    assert " records/s, start-up 0.0 s, reading and preparing " in lines[-1]
    (options.output / "_SUCCESS").unlink()
    (options.output / "part-00004-of-00005.parquet").unlink()
    run_job(again(options, quiet=False), load=fake.load)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "5 shards, 4 done before"
    assert lines[-1].startswith(f"40 records, 72 rows, 3 bad -> {options.output} (8 records in ")
    run_job(again(options, quiet=False), load=fake.load)
    assert capsys.readouterr().err == f"40 records, 72 rows, 3 bad -> {options.output} (was done, verified)\n"


def test_quiet_is_quiet(options, fake, capsys):
    run_job(options, load=fake.load)
    assert capsys.readouterr() == ("", "")


def test_runs_outside_the_main_thread(options, fake):
    found = []
    thread = threading.Thread(target=lambda: found.append(run_job(options, load=fake.load)))
    thread.start()
    thread.join()
    assert found[0].exit_code == 0


def test_patterns_and_folders(options, fake, source, tmp_path):
    (tmp_path / "many").mkdir()
    for name in ("b.txt", "a.txt"):
        (tmp_path / "many" / name).write_text(source.read_text())
    result = run_job(dataclasses.replace(options, inputs=[str(tmp_path / "many" / "*.txt")]), load=fake.load)
    assert result.records == 80
    job = json.loads((options.output / "job.json").read_text())
    assert [each["name"] for each in job["inputs"]] == ["a.txt", "b.txt"]


def test_folder_input_is_described_by_all_its_files(tmp_path):
    from manyheads.apps.inputs import describe_input

    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "deep" / "x").write_text("1")
    (tmp_path / "in" / "y").write_text("23")
    before = describe_input(tmp_path / "in")
    assert (before["files"], before["bytes"]) == (2, 3)
    (tmp_path / "in" / "y").rename(tmp_path / "in" / "z")
    assert describe_input(tmp_path / "in")["sha256"] != before["sha256"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"batch_size": 0}, "batch size must be at least 1"),
        ({"shard_size": 0}, "shard size must be at least 1"),
        ({"workers": -1}, "workers must be at least 0"),
        ({"max_bad": 1.5}, "between 0 and 1"),
        ({"max_bad": float("nan")}, "between 0 and 1"),
        ({"engine": "locl"}, "did you mean 'local'"),
        ({"inputs": []}, "needs an input"),
        ({"inputs": ["no/such/*.csv"]}, r"no input no/such/\*.csv"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, fake, changes, says):
    with pytest.raises(UsageError, match=says):
        run_job(dataclasses.replace(options, **changes), load=fake.load)
    assert not options.output.exists()


def test_output_inside_the_input_is_refused(options, fake, tmp_path):
    with pytest.raises(UsageError, match="lies in the input folder"):
        run_job(dataclasses.replace(options, inputs=[str(tmp_path)]), load=fake.load)


def test_output_that_is_a_file_is_refused(options, fake, source):
    with pytest.raises(UsageError, match="is a file"):
        run_job(dataclasses.replace(options, output=source), load=fake.load)


def test_no_records_is_an_error(options, fake, source):
    source.write_text("")
    with pytest.raises(DataError, match="no records in"):
        run_job(options, load=fake.load)
