"""What comes over HTTP is what a batch job writes, in every domain."""

from __future__ import annotations

import base64
import io
import json
import math
import zipfile
from datetime import datetime

import pandas as pd
import pyarrow.parquet as pq
import pytest

from manyheads.apps.jobs import JobOptions, run_job

NAMES = (
    "vision",
    "vision_json",
    "timeseries",
    "timeseries_rows",
    "recognition",
    "separation",
    "graph",
    "graph_tables",
    "recsys",
)


def job_rows(case, output):
    """The rows of a job, as JSON has them."""
    job = JobOptions(str(case.model), list(map(str, case.inputs)), output, quiet=True, settings=case.settings)
    assert run_job(job).exit_code == 0
    tables = sorted(output.glob("part-*.parquet"))
    if case.results:
        tables = [output / "results" / case.results]
    rows = [row for table in tables for row in pq.read_table(table).to_pylist()]
    return [
        {key: value.isoformat() if isinstance(value, datetime) else value for key, value in row.items()}
        for row in rows
    ]


def compare(found, wanted):
    """Texts and whole numbers are the same, others to the last digits: batches are put together otherwise."""
    assert len(found) == len(wanted)
    for row, right in zip(found, wanted, strict=True):
        assert list(row) == list(right)
        for name, value in right.items():
            values, rights = (each if isinstance(each, list) else [each] for each in (row[name], value))
            assert len(values) == len(rights)
            for one, other in zip(values, rights, strict=True):
                if isinstance(other, float):
                    assert math.isclose(one, other, rel_tol=1e-5, abs_tol=1e-6), (name, one, other)
                else:
                    assert one == other, name


@pytest.fixture
def made(serving_tools, tmp_path, monkeypatch):
    monkeypatch.setenv("MANYHEADS_CACHE", str(tmp_path / "cache"))
    return lambda name: serving_tools.CASES[name](tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_those_of_the_batch_job(name, made, serving_tools, tmp_path):
    case = made(name)
    wanted = job_rows(case, tmp_path / "job")
    assert len(wanted) > 2
    assert len({json.dumps(row) for row in wanted}) == len(wanted)
    with serving_tools.Local({"model": case.model}, quiet=True) as server:
        answer = server.predict("model", **case.request)
        assert answer.status_code == 200, answer.text
        found = answer.json()
        assert found["model"] == "model"
        assert found["bad"] == []
        compare(found["rows"], wanted)
        if case.results:
            for row in wanted:
                content = base64.b64decode(found["files"][row["file"]])
                assert content == (tmp_path / "job" / "results" / row["file"]).read_bytes()
        schema = server.client.get("/openapi.json").json()["components"]["schemas"]["model.Rows"]
        row = schema["properties"]["rows"]["items"]
        assert "output_kind" in case.settings or case.results or list(row["properties"]) == list(wanted[0])
    assert server.code == 0


def test_files_come_as_a_zip_where_it_is_asked_for(made, serving_tools):
    case = made("separation")
    with serving_tools.Local({"model": case.model}, quiet=True) as server:
        answer = server.predict("model", **case.request, headers={"accept": "application/zip"})
        assert answer.headers["content-type"] == "application/zip"
        with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
            rows = json.loads(archive.read("rows.json"))["rows"]
            names = {row["file"] for row in rows}
            assert names | {"rows.json"} == set(archive.namelist())
            assert all(archive.read(name).startswith(b"RIFF") for name in names)


def test_bad_records_are_named_and_the_others_answered(made, serving_tools):
    case = made("graph")
    request = {"smiles": ["CCO", "CC(=O", "CCN"], "ids": ["a", "b", "c"]}
    with serving_tools.Local({"model": case.model}, quiet=True) as server:
        found = server.predict("model", json=request).json()
        assert [row["id"] for row in found["rows"]] == ["a", "c"]
        assert [each["id"] for each in found["bad"]] == ["b"]
        alone = server.predict("model", json={"smiles": ["CC(=O"]})
        assert alone.status_code == 422
        assert alone.json()["error"]["details"][0]["field"] == "smiles"


def test_requests_that_come_together_share_batches_and_get_their_own_rows(made, serving_tools):
    """With one worker that waits long enough, twenty requests of different sizes are one batch."""
    from concurrent.futures import ThreadPoolExecutor

    case = made("recsys")
    rows = case.request["json"]["interactions"]
    users = sorted({row["user_id"] for row in rows})
    with serving_tools.Local({"model": case.model}, quiet=True, wait_ms=300) as server:
        whole = pd.DataFrame(server.predict("model", **case.request).json()["rows"])
        server.service.models["model"].rate.each = 1e-6  # it has learnt that requests are short

        def ask(i):
            asked = users[: 1 + i % len(users)]
            part = [row for row in rows if row["user_id"] in asked]
            request = {"interactions": part, "settings": {"top_k": 1 + i % 5}}
            return asked, 1 + i % 5, server.predict("model", json=request)

        with ThreadPoolExecutor(20) as pool:
            answers = list(pool.map(ask, range(20)))
        for asked, k, answer in answers:
            assert answer.status_code == 200, answer.text
            right = whole[whole.user_id.isin(asked) & (whole["rank"] <= k)].sort_values(["user_id", "rank"])
            found = sorted(answer.json()["rows"], key=lambda row: (row["user_id"], row["rank"]))
            compare(found, right.to_dict("records"))
        text = server.client.get("/metrics").text
        batches = next(
            line for line in text.splitlines() if line.startswith("manyheads_batch_requests_count")
        )
        assert float(batches.split()[-1]) <= 6
