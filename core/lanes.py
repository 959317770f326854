"""Vectors of eight float64 in compiled loops: eight small problems side by side, one in each lane.

Where a problem is a chain of short loops, a compiler finds no vectors in it. Eight problems of like sizes
make some: `Lanes` is one number of each of the eight, `Mask` one yes or no. They live in registers alone;
in memory they are the rows of a contiguous array of float64, read by `load` and written by `store`.
`+ - * /` work on lanes and numbers, `>`, `<` and `equal` give masks, `&` joins them, and `choose` stands
for an `if`. Products may be fused with sums, but sums keep their order: what a lane gives does not depend
on its place or its neighbours.

For kernels of `core.jit`. On CPUs with shorter vectors a lane operation becomes several.
"""

# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, models, overload, register_model
from numba.np.arrayobj import make_array

from manyheads.core.jit import kernel

COUNT = 8

_FLOATS = ir.VectorType(ir.DoubleType(), COUNT)
_BITS = ir.VectorType(ir.IntType(1), COUNT)


class _Vector(types.Type):  # type: ignore[misc]
    def __init__(self, name: str, vector: ir.VectorType) -> None:
        super().__init__(name)
        self.vector = vector


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, of: _Vector) -> None:
        super().__init__(manager, of, of.vector)


LANES, MASK = _Vector("Lanes", _FLOATS), _Vector("Mask", _BITS)


def _row(context, builder, kind, x, row):
    """Where a row of eight numbers lies."""
    data = make_array(kind)(context, builder, x).data
    place = builder.gep(data, [builder.mul(row, row.type(COUNT))], inbounds=True)
    return builder.bitcast(place, _FLOATS.as_pointer())


@kernel
def empty(rows):
    """An array of rows, `[rows, 8]`, that begin where the machine's cache lines do."""
    memory = np.empty((rows + 1) * COUNT)
    first = -memory.ctypes.data // 8 % COUNT
    return memory[first : first + rows * COUNT].reshape(rows, COUNT)


@intrinsic
def load(typing, x, row):
    """The eight numbers of a row; rows are those of the flattened array."""

    def build(context, builder, signature, args):
        return builder.load(_row(context, builder, signature.args[0], *args), align=8)

    return LANES(x, types.intp), build


@intrinsic
def store(typing, x, row, value):
    """Write the eight numbers of a row."""

    def build(context, builder, signature, args):
        builder.store(args[2], _row(context, builder, signature.args[0], *args[:2]), align=8)
        return context.get_dummy_value()

    return types.void(x, types.intp, LANES), build


@intrinsic
def spread(typing, x):
    """One number in all lanes."""

    def build(context, builder, signature, args):
        nothing = ir.Constant(_FLOATS, ir.Undefined)
        one = builder.insert_element(nothing, args[0], ir.IntType(32)(0))
        return builder.shuffle_vector(one, nothing, ir.VectorType(ir.IntType(32), COUNT)([0] * COUNT))

    return LANES(types.float64), build


def _of_one(name: str) -> Any:
    @intrinsic
    def apply(typing, x):
        def build(context, builder, signature, args):
            kind = ir.FunctionType(_FLOATS, [_FLOATS])
            found = cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v{COUNT}f64")
            return builder.call(found, args)

        return LANES(LANES), build

    return apply


sqrt, absolute = _of_one("sqrt"), _of_one("fabs")


def _of_two(result: _Vector, build: Callable[..., Any]) -> Any:
    @intrinsic
    def apply(typing, x, y):
        return result(x, y), lambda context, builder, signature, args: build(builder, *args)

    return apply


def _arithmetic(name: str) -> Any:
    return _of_two(LANES, lambda builder, x, y: getattr(builder, name)(x, y, flags=("contract", "nsz")))


def _comparison(sign: str) -> Any:
    return _of_two(MASK, lambda builder, x, y: builder.fcmp_ordered(sign, x, y))


equal = _comparison("==")


@intrinsic
def choose(typing, mask, x, y):
    """Give x where the mask says yes, else y."""
    return LANES(MASK, LANES, LANES), lambda context, builder, signature, args: builder.select(*args)


@intrinsic
def any_of(typing, mask):
    """Tell whether the mask says yes anywhere."""

    def build(context, builder, signature, args):
        bits = ir.IntType(COUNT)
        return builder.icmp_unsigned("!=", builder.bitcast(args[0], bits), bits(0))

    return types.boolean(MASK), build


def _lanes_and_numbers(symbol: Callable[..., Any], apply: Any) -> None:
    """Give an operator its meaning on lanes, and on lanes and a number."""

    def on_lanes(x, y):
        return apply(x, y)

    def on_the_left(x, y):
        return apply(x, spread(y))

    def on_the_right(x, y):
        return apply(spread(x), y)

    def meaning(x, y):
        if x is LANES and y is LANES:
            return on_lanes
        if x is LANES and isinstance(y, types.Float):
            return on_the_left
        return on_the_right if isinstance(x, types.Float) and y is LANES else None

    overload(symbol)(meaning)


_lanes_and_numbers(operator.add, _arithmetic("fadd"))
_lanes_and_numbers(operator.sub, _arithmetic("fsub"))
_lanes_and_numbers(operator.mul, _arithmetic("fmul"))
_lanes_and_numbers(operator.truediv, _arithmetic("fdiv"))
_lanes_and_numbers(operator.gt, _comparison(">"))
_lanes_and_numbers(operator.lt, _comparison("<"))

_both = _of_two(MASK, lambda builder, x, y: builder.and_(x, y))


@overload(operator.and_)
def _and(x, y):
    def on_masks(x, y):
        return _both(x, y)

    return on_masks if x is MASK and y is MASK else None
