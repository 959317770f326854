"""`manyheads doctor`: every op with its backend, here and as it would be on a GPU."""

from __future__ import annotations

import json

import pytest
import torch

from manyheads.apps import cli, diagnosis
from manyheads.core.dispatch import OPS


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    monkeypatch.delenv("MANYHEADS_BACKEND", raising=False)


def test_every_op_is_listed_with_a_reason(capsys):
    assert cli.main(["doctor", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for op in OPS:
        line = next(line for line in lines if line.split()[:1] in ([op], [f"{op},"]))
        assert len(line.split()) > 3
    assert any(line.startswith("  torch ") and torch.__version__.split("+")[0] in line for line in lines)


def test_json(capsys):
    assert cli.main(["doctor", "--json", "--device", "cuda", "--dtype", "bfloat16"]) == 0
    found = json.loads(capsys.readouterr().out)
    by_op = {(row["op"], row["call"]): row for row in found["ops"]}
    assert {op for op, _ in by_op} == set(OPS)
    assert by_op["attention", ""]["backend"] == "torch"
    assert by_op["attention", "learned bias"]["backend"] == "triton"
    assert {"torch", "triton", "threads", "cache", "hub"} <= {each["name"] for each in found["findings"]}
    assert found["broken"] is False


def test_verbose_says_what_keeps_the_better_backends_out(capsys):
    assert cli.main(["doctor", "--verbose", "--device", "cpu"]) == 0
    assert "not triton: it needs a CUDA device" in capsys.readouterr().out


def test_a_forced_backend_is_named(monkeypatch):
    monkeypatch.setenv("MANYHEADS_BACKEND", "reference")
    found = diagnosis.rows("cpu", torch.float32)
    assert {row.backend for row in found} == {"reference"}
    assert all("MANYHEADS_BACKEND" in row.reason for row in found)


def test_a_forced_backend_that_an_op_lacks_is_an_error(monkeypatch, capsys):
    monkeypatch.setenv("MANYHEADS_BACKEND", "triton")
    assert cli.main(["doctor", "--device", "cpu"]) == 2
    assert "MANYHEADS_BACKEND=triton asks for" in capsys.readouterr().err
