"""The bound on what oneDNN keeps: set where the environment says nothing, and felt by the library."""

from __future__ import annotations

import os
import subprocess
import sys

from manyheads.core.onednn import _CACHES, forget_shapes

GROWTH = """
import ctypes, sys, torch
from manyheads.core.onednn import forget_shapes
if sys.argv[1] == "bounded":
    forget_shapes()
torch.set_num_threads(1)
weight = torch.randn(64, 64)
def used():
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status["RssAnon"].split()[0])
def run(first, last):
    for rows in range(first, last):
        torch.ops.mkldnn._linear_pointwise(torch.zeros(rows, 64), weight, None, "none", [], "")
run(2000, 2020)
before = used()
run(2020, 2420)
print(used() - before)
"""


def test_what_the_environment_says_stays(monkeypatch):
    found = {_CACHES[0]: "77"}
    monkeypatch.setattr(os, "environ", found)
    forget_shapes()
    assert found[_CACHES[0]] == "77" and int(found[_CACHES[1]]) < 100


def test_memory_of_four_hundred_shapes():
    environment = {name: value for name, value in os.environ.items() if name not in _CACHES}

    def growth(how):
        command = [sys.executable, "-c", GROWTH, how]
        return int(
            subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
        )

    assert growth("bounded") < 0.2 * growth("free")  # KiB
