"""Fixtures of the recommenders' tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from manyheads.recsys.logs import Log
from manyheads.recsys.published import read_published
from manyheads.recsys.sequences import Sequences

FOLDERS = {"ml_100k": "ml-100k", "ml_1m": "ml-1m", "ml_latest_small": "ml-latest-small"}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors here are small: on a busy machine threads wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class MovieLens:
    """The MovieLens logs, each read once."""

    @staticmethod
    def folder(name: str) -> Path:
        """Where the files lie; skips where there are none."""
        path = (
            Path(os.environ.get("MANYHEADS_DATA", "nowhere").split(os.pathsep)[0]) / "recsys" / FOLDERS[name]
        )
        if not path.is_dir():
            pytest.skip(f"needs {path.name} in MANYHEADS_DATA")
        return path

    @staticmethod
    @cache
    def log(name: str) -> Log:
        """The log as it is."""
        return read_published(name, MovieLens.folder(name))

    @staticmethod
    def sequences(name: str) -> Sequences:
        """Its histories."""
        return Sequences.of(MovieLens.log(name))


@pytest.fixture
def movielens() -> MovieLens:
    """The MovieLens logs."""
    return MovieLens()


@pytest.fixture
def peak() -> Callable[[Callable[[], object]], int]:
    """Bytes that a call holds at most beside what was there, by the operations' own accounts."""

    def measure(call: Callable[[], object]) -> int:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
            call()
        held = most = 0
        for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
            if event.name() == "[memory]":
                held += event.nbytes()
                most = max(most, held)
        return most

    return measure
