"""The server under load and under attack, for a minute each, on a machine with two free cores.

`pytest -m slow tests/apps/test_serving_load.py -s` prints the tables; it takes six minutes. The throughput,
of which it prints what share of a batch job's it is, is a figure of `benchmarks.serving`, not a test's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def run(output, *arguments):
    """Run the benchmark and return what it wrote."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-m", "benchmarks.serving", "--output", str(output), *arguments]
    subprocess.run(command, cwd=ROOT, env=environment, timeout=1200, check=False)
    return json.loads((output / "serving.json").read_text())


@pytest.mark.timeout(1500)
def test_three_hundred_clients_and_an_attack_beside_them(tmp_path):
    alone, attacked = run(tmp_path, "--only", "load")["load"]
    for row in (alone, attacked):
        assert set(row["statuses"]) <= {"200", "429"}
        assert row["statuses"]["429"] > 0, "it was no load"
        assert row["p99"] <= 30
        assert row["memory_after"] <= 1.05 * row["memory_before"] + 50
    assert attacked["wrong"] == {}
    assert attacked["answers"] > 0
    assert sum(attacked["hostile"].values()) > 50


def test_each_hostile_request_gets_its_answer(tmp_path):
    found = run(tmp_path, "--only", "hostile")["hostile"]
    assert len(found) > 60
    assert [each for each in found if not each["right"]] == []
