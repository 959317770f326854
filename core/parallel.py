"""Independent parts of a CPU computation, each on a thread of its own with its share of torch's threads.

Torch splits every operation over all its threads, and waits for the slowest after each. Where a computation
is many small operations on independent parts, whole parts side by side wait once; on a machine that others
use too, where a thread may be away for milliseconds, that is several times faster.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

# More workers than this spend their time waiting for Python's lock; they get several of torch's threads each.
MOST = 8

_lock = threading.Lock()
_together = threading.Lock()
_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}
_worker = threading.local()


def workers() -> int:
    """How many parts can run side by side here: 1 inside a part."""
    return 1 if getattr(_worker, "inside", False) else min(MOST, torch.get_num_threads())


def run(parts: Sequence[Callable[[], None]]) -> None:
    """Run the parts and wait for all of them.

    Raises:
        BaseException: Whatever a part raised; the first part's comes first.
    """
    if len(parts) == 1 or workers() == 1:
        for part in parts:
            part()
        return
    inference = torch.is_inference_mode_enabled()
    found = [_pool(workers()).submit(_without_gradients, part, inference) for part in parts]
    for future in found:
        future.result()


def together(loop: Callable[[int], object]) -> None:
    """Run a compiled loop in all workers at once, which may wait for each other in it (`core.crew`).

    Args:
        loop: Takes the number of threads that go through it; uses nothing of torch.
    """
    count = workers()
    if count == 1 or not _together.acquire(
        blocking=False
    ):  # two of these could wait for each other's threads
        loop(1)
        return
    try:
        pool = _pool(count)
        found = [pool.submit(loop, count) for _ in range(count - 1)]
        loop(count)
        for future in found:
            future.result()
    finally:
        _together.release()


def _without_gradients(part: Callable[[], None], inference: bool) -> None:
    # Both modes belong to a thread, and a worker starts with gradients on and inference mode off, where it
    # could not write tensors of a caller who is in it.
    with torch.inference_mode() if inference else torch.no_grad():
        part()


def _pool(count: int) -> ThreadPoolExecutor:
    """The workers of this process: a forked child has none of its parent's threads and makes its own."""
    with _lock:
        key = (os.getpid(), count)
        if key not in _pools:
            _pools[key] = _start(count, torch.get_num_threads())
        return _pools[key]


def _start(count: int, threads: int) -> ThreadPoolExecutor:
    """Start all workers, each set to its share of the threads for good."""
    ready = threading.Barrier(count + 1)

    def begin() -> None:
        torch.set_num_threads(max(1, threads // count))
        torch.get_num_threads()  # a thread takes up its number on first use: now, before it is put back below
        _worker.inside = True

    pool = ThreadPoolExecutor(count, "manyheads-parallel", initializer=begin)
    started = [pool.submit(ready.wait) for _ in range(count)]
    ready.wait()
    for future in started:
        future.result()
    # set_num_threads also leaves the number for threads to come; those are none of ours.
    torch.set_num_threads(threads)
    return pool


def _forget() -> None:
    global _lock, _together
    _lock, _together = threading.Lock(), threading.Lock()  # the parent's may have been held at the fork
    _pools.clear()


os.register_at_fork(after_in_child=_forget)
