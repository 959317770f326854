"""Memory that is used again once nobody holds it."""

from __future__ import annotations

import pytest
import torch

from manyheads.core import buffers


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(buffers, "_kept", [])


def test_what_is_dropped_comes_again_and_what_is_held_does_not():
    first = buffers.empty(1000)
    place, part = first.data_ptr(), first[5:]
    del first
    assert buffers.empty(1000).data_ptr() != place  # a view holds it
    del part
    again = buffers.empty(900)
    assert again.data_ptr() == place
    assert again.shape == (900,)
    array = again.numpy()
    del again
    assert buffers.empty(900).data_ptr() != place  # numpy holds it
    del array
    assert buffers.empty(400).data_ptr() != place  # it is more than twice as large
    assert buffers.empty(900).data_ptr() == place


def test_rows_begin_where_cache_lines_do():
    assert all(buffers.empty(size).data_ptr() % 64 == 0 for size in (16, 1000, 1 << 20))


def test_a_bound(monkeypatch):
    monkeypatch.setattr(buffers, "MOST", 4 * 1500)
    held = [buffers.empty(1000) for _ in range(3)]
    assert len(buffers._kept) == 1
    assert all(x.dtype == torch.float32 for x in held)
