"""Parts side by side: all are run, errors come back, and torch's thread counts stay as they were."""

from __future__ import annotations

import multiprocessing
import threading

import pytest
import torch

from manyheads.core import parallel


def record(into, value):
    return lambda: into.append(
        (value, threading.get_ident(), torch.get_num_threads(), torch.is_grad_enabled())
    )


@pytest.fixture
def threads():
    """Two of torch's threads, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_all_parts_run_on_other_threads(threads):
    found = []
    parallel.run([record(found, i) for i in range(5)])
    assert sorted(value for value, *_ in found) == [0, 1, 2, 3, 4]
    assert all(thread != threading.get_ident() for _, thread, *_ in found)
    assert {(n, grad) for *_, n, grad in found} == {(1, False)}


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_parts_write_the_callers_tensors_in_its_mode(threads, mode):
    found = []

    def write(out, i):
        out[i] = torch.full((3,), i + 1.0)
        found.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))

    with mode():
        out = torch.zeros(2, 3)
        parallel.run([lambda: write(out, 0), lambda: write(out, 1)])
    assert out[:, 0].tolist() == [1, 2]
    assert found == [(mode is torch.inference_mode, False)] * 2


def test_the_callers_threads_stay(threads):
    parallel.run([record([], 0), record([], 1)])
    later = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert torch.get_num_threads() == 2 and later == [2]


def test_one_part_stays_here(threads):
    found = []
    parallel.run([record(found, 0)])
    assert found[0][1] == threading.get_ident()


def test_parts_inside_a_part_run_in_place(threads):
    found = []

    def outer():
        parallel.run([record(found, 0), record(found, 1)])
        assert found[0][1] == found[1][1] == threading.get_ident()

    parallel.run([outer, lambda: None])
    assert len(found) == 2


def test_an_error_comes_back(threads):
    def fail():
        raise ValueError("part 1")

    with pytest.raises(ValueError, match="part 1"):
        parallel.run([lambda: None, fail])


def _in_a_child(queue):
    torch.set_num_threads(2)
    found = []
    parallel.run([record(found, i) for i in range(2)])
    queue.put(len(found))


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_forked_child_makes_its_own_workers(threads):
    parallel.run([record([], 0), record([], 1)])
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_a_child, args=(queue,))
    child.start()
    assert queue.get(timeout=60) == 2
    child.join()
