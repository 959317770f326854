"""Fixtures of the recommenders' tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from manyheads.core.products import linear
from manyheads.recsys import retrieval
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
def blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all blocks of scores that a test makes."""
    found: list[int] = []

    def noted(*args: Tensor) -> Tensor:
        scores = linear(*args)
        found.append(scores.numel())
        return scores

    monkeypatch.setattr(retrieval, "linear", noted)
    return found
