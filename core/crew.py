"""Threads that go through one compiled function together: they share out its items, and wait at its meetings.

A computation of many short phases, each of which needs all of the one before, would wake its threads at every
phase: on a CPU that is half of the time. Here they are woken once. `slots` are numbers that all threads see,
zero at the beginning; each phase and each meeting has its own.

For kernels of `core.jit`; `core.parallel.together` runs them.
"""

# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

from manyheads.core.jit import kernel

APART = 8  # slots of 8 bytes from one to the next: a cache line
LOOKS = 2000  # before a thread that waits lets others have the CPU


def slots(count: int) -> np.ndarray[Any, Any]:
    """Slots for so many phases and meetings."""
    return np.zeros(count * APART, np.int64)


@kernel
def take(slots, phase):
    """Give the next item of a phase, from 0 on; every item to one thread."""
    return _add(slots, phase * APART)


@kernel
def meet(slots, meeting, threads):
    """Wait until all threads have come here: what they wrote before is then seen by all."""
    _add(slots, meeting * APART)
    looks = 0
    while _look(slots, meeting * APART) < threads:
        looks += 1
        if looks > LOOKS:
            _let_others_run()


def _place(context, builder, kind, x, i):
    data = make_array(kind)(context, builder, x).data
    return builder.gep(data, [i], inbounds=True)


@intrinsic
def _add(typing, x, i):
    """Add one to a number that other threads see too; what it was."""

    def build(context, builder, signature, args):
        place = _place(context, builder, signature.args[0], *args)
        return builder.atomic_rmw("add", place, ir.Constant(ir.IntType(64), 1), "seq_cst")

    return types.int64(x, types.intp), build


@intrinsic
def _look(typing, x, i):
    """A number that other threads change."""

    def build(context, builder, signature, args):
        return builder.load_atomic(_place(context, builder, signature.args[0], *args), "acquire", 8)

    return types.int64(x, types.intp), build


@intrinsic
def _let_others_run(typing):
    def build(context, builder, signature, args):
        kind = ir.FunctionType(ir.IntType(32), [])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, "sched_yield"), [])

    return types.int32(), build
