"""Vectors of 64 bytes in compiled loops: eight float64 or sixteen float32, a number in each lane.

Where a problem is a chain of short loops, a compiler finds no vectors in it; where sums should stay in
registers, it seldom leaves them there. `Lanes` says so: they live in registers alone; in memory they are the
rows of a contiguous array of 8 or 16 columns, or of any contiguous array taken 8 or 16 numbers at a time,
read by `load` and written by `store`. `+ - * /` work on lanes and numbers, `>`, `<` and `equal` give masks,
`&` joins them, and `choose` stands for an `if`. Products may be fused with sums, but sums keep their order:
what a lane gives does not depend on its place or its neighbours.

For kernels of `core.jit`. On CPUs with shorter vectors a lane operation becomes several.
"""

# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, types
from numba.extending import intrinsic, models, overload, register_model
from numba.np.arrayobj import make_array

from manyheads.core.jit import kernel

COUNT = 8  # float64


class _Lanes(types.Type):
    def __init__(self, name: str, element: ir.Type, count: int) -> None:
        super().__init__(f"{name} x {count}")
        self.vector, self.count = ir.VectorType(element, count), count


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, of: _Lanes) -> None:
        super().__init__(manager, of, of.vector)


_LANES = {
    types.float64: _Lanes("float64", ir.DoubleType(), 8),
    types.float32: _Lanes("float32", ir.FloatType(), 16),
}
_MASKS = {count: _Lanes("bool", ir.IntType(1), count) for count in (8, 16)}


def _is_lanes(x: types.Type) -> bool:
    return x in _LANES.values()


@kernel
def empty(rows):
    """An array of rows of eight, `[rows, 8]`, that begin where the machine's cache lines do."""
    memory = np.empty((rows + 1) * COUNT)
    first = -memory.ctypes.data // 8 % COUNT
    return memory[first : first + rows * COUNT].reshape(rows, COUNT)


def _row(context, builder, kind, x, row):
    """Where a row of 64 bytes lies."""
    lanes = _LANES[kind.dtype]
    data = make_array(kind)(context, builder, x).data
    place = builder.gep(data, [builder.mul(row, row.type(lanes.count))], inbounds=True)
    return builder.bitcast(place, lanes.vector.as_pointer())


@intrinsic
def load(typing, x, row):
    """The numbers of a row; rows are those of the flattened array."""

    def build(context, builder, signature, args):
        return builder.load(_row(context, builder, signature.args[0], *args), align=4)

    return _LANES[x.dtype](x, types.intp), build


@intrinsic
def store(typing, x, row, value):
    """Write the numbers of a row."""

    def build(context, builder, signature, args):
        builder.store(args[2], _row(context, builder, signature.args[0], *args[:2]), align=4)
        return context.get_dummy_value()

    return types.void(x, types.intp, _LANES[x.dtype]), build


def _spread(builder, lanes, number):
    nothing = ir.Constant(lanes.vector, ir.Undefined)
    one = builder.insert_element(nothing, number, ir.IntType(32)(0))
    places = ir.VectorType(ir.IntType(32), lanes.count)([0] * lanes.count)
    return builder.shuffle_vector(one, nothing, places)


@intrinsic
def spread_from(typing, x, place):
    """A number of the flattened array in all lanes."""
    lanes = _LANES[x.dtype]

    def build(context, builder, signature, args):
        data = make_array(signature.args[0])(context, builder, args[0]).data
        return _spread(builder, lanes, builder.load(builder.gep(data, [args[1]], inbounds=True)))

    return lanes(x, types.intp), build


@intrinsic
def spread(typing, x):
    """One number in all lanes: eight of a float64, sixteen of a float32."""
    lanes = _LANES[x]
    return lanes(x), lambda context, builder, signature, args: _spread(builder, lanes, args[0])


@intrinsic
def _like(typing, lanes, x):
    """One number in all lanes, in the precision of others."""
    number = next(number for number, kind in _LANES.items() if kind is lanes)

    def build(context, builder, signature, args):
        return _spread(builder, lanes, context.cast(builder, args[1], signature.args[1], number))

    return lanes(lanes, x), build


def _of_one(name: str) -> Any:
    @intrinsic
    def apply(typing, x):
        def build(context, builder, signature, args):
            suffix = f"v{x.count}f{512 // x.count}"
            kind = ir.FunctionType(x.vector, [x.vector])
            found = cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.{suffix}")
            return builder.call(found, args)

        return x(x), build

    return apply


sqrt, absolute = _of_one("sqrt"), _of_one("fabs")


def _arithmetic(name: str) -> Any:
    @intrinsic
    def apply(typing, x, y):
        def build(context, builder, signature, args):
            return getattr(builder, name)(*args, flags=("contract", "nsz"))

        return x(x, x), build

    return apply


def _comparison(sign: str) -> Any:
    @intrinsic
    def apply(typing, x, y):
        def build(context, builder, signature, args):
            return builder.fcmp_ordered(sign, *args)

        return _MASKS[x.count](x, x), build

    return apply


equal = _comparison("==")


@intrinsic
def choose(typing, mask, x, y):
    """Give x where the mask says yes, else y."""
    return x(mask, x, x), lambda context, builder, signature, args: builder.select(*args)


@intrinsic
def any_of(typing, mask):
    """Tell whether the mask says yes anywhere."""

    def build(context, builder, signature, args):
        bits = ir.IntType(mask.count)
        return builder.icmp_unsigned("!=", builder.bitcast(args[0], bits), bits(0))

    return types.boolean(mask), build


def _lanes_and_numbers(symbol: Callable[..., Any], apply: Any) -> None:
    """Give an operator its meaning on lanes, and on lanes and a number."""

    def on_lanes(x, y):
        return apply(x, y)

    def on_the_left(x, y):
        return apply(x, _like(x, y))

    def on_the_right(x, y):
        return apply(_like(y, x), y)

    def meaning(x, y):
        if _is_lanes(x) and x is y:
            return on_lanes
        if _is_lanes(x) and isinstance(y, types.Float):
            return on_the_left
        return on_the_right if isinstance(x, types.Float) and _is_lanes(y) else None

    overload(symbol)(meaning)


_lanes_and_numbers(operator.add, _arithmetic("fadd"))
_lanes_and_numbers(operator.sub, _arithmetic("fsub"))
_lanes_and_numbers(operator.mul, _arithmetic("fmul"))
_lanes_and_numbers(operator.truediv, _arithmetic("fdiv"))
_lanes_and_numbers(operator.gt, _comparison(">"))
_lanes_and_numbers(operator.lt, _comparison("<"))


@intrinsic
def _both(typing, x, y):
    return x(x, x), lambda context, builder, signature, args: builder.and_(*args)


@overload(operator.and_)
def _and(x, y):
    def on_masks(x, y):
        return _both(x, y)

    return on_masks if x in _MASKS.values() and x is y else None
