"""Intrinsics that make runs of x integers, and put their bytes in the order of the dots."""

from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.types.containers import Tuple
from numba.extending import intrinsic

from quantcore_backends.cpu_kernels.vectors import (
    DWORD,
    FLOAT,
    called,
    constant,
    offset,
    read,
    repeat,
    shuffled,
    write,
)

__all__ = ["place", "rounded"]

_TINY: Final = 1e-30
_SUMMED: Final = ("reassoc", "nsz", "contract")


@intrinsic(prefer_literal=True)
def rounded(typing: Any, x: Any, integers: Any, top: Any, run: Any) -> Any:
    """Round a run of x to int32 up to `top`: scale, sum, error, squared error, squared length, largest magnitude.

    The error is the sum of what each element loses.

    `x` and `integers` are addresses, `run` a compile-time constant. The largest is found among the magnitudes' bits, as
    integers: NaN is larger than all else then.
    """
    count = run.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        several, whole = ir.VectorType(FLOAT, count), ir.VectorType(DWORD, count)
        values, top = read(builder, args[0], several), args[2]
        magnitudes = builder.and_(builder.bitcast(values, whole), constant([0x7FFFFFFF] * count))
        largest = builder.bitcast(called(builder, f"llvm.vector.reduce.umax.v{count}i32", DWORD, [magnitudes]), FLOAT)
        nothing = ir.Constant(FLOAT, 0.0)
        serves = builder.fcmp_ordered(">=", largest, _float32(_TINY))
        inverse = builder.select(serves, builder.fdiv(top, largest), nothing)
        scale = builder.select(serves, builder.fdiv(largest, top), nothing)
        near = called(
            builder, f"llvm.rint.v{count}f32", several, [builder.fmul(values, repeat(builder, inverse, count))]
        )
        off = builder.fsub(
            values, builder.fmul(near, repeat(builder, scale, count), flags=["contract"]), flags=["contract"]
        )
        made = builder.fptosi(near, whole)
        write(builder, args[1], made)
        total = called(builder, f"llvm.vector.reduce.add.v{count}i32", DWORD, [made])
        squares = _summed_squares(builder, off), _summed_squares(builder, values)
        results = scale, total, _summed(builder, off), *squares, largest
        return context.make_tuple(builder, signature.return_type, results)

    single = types.float32
    return Tuple((single, types.int32, single, single, single, single))(types.intp, types.intp, single, run), generate


def _float32(value: float) -> Any:
    """A constant that LLVM can read: one that float32 holds exactly."""
    return ir.Constant(FLOAT, float(np.float32(value)))


def _summed(builder: Any, values: Any) -> Any:
    kind = ir.FunctionType(FLOAT, [FLOAT, values.type])
    add = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fadd.v{values.type.count}f32")
    return builder.call(add, [ir.Constant(FLOAT, 0.0), values], fastmath=_SUMMED)


def _summed_squares(builder: Any, values: Any) -> Any:
    return _summed(builder, builder.fmul(values, values, flags=["contract"]))


@intrinsic(prefer_literal=True)
def place(
    typing: Any,
    integers: Any,
    to: Any,
    count: Any,
    block: Any,
    planes: Any,
    apart: Any,
    layers: Any,
    below: Any,
    bits: Any,
) -> Any:
    """Put bytes of int32, or 16 bits, where those of their plane follow one another, layer by layer.

    From `count` on, compile-time constants. Integer i of a block goes to plane ``i % planes``. Bytes below others count
    from -128, hence the rounding.

    Parameters
    ----------
    integers, to : int
        Addresses.
    count, block, planes : int
        Integers, those of a block, and a block's planes.
    apart : int
        Elements from plane to plane; there are several blocks only where planes lie end to end.
    layers, below, bits : int
        Layers, the upper ones first, elements from one to the next, and bits of an element.
    """
    size, each, across, distance = (n.literal_value for n in (count, block, planes, apart))
    depth, next_layer, width = (n.literal_value for n in (layers, below, bits))
    element = ir.IntType(width)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values = read(builder, args[0], ir.VectorType(DWORD, size))
        by_plane = [
            [start + i for i in range(plane, each, across)] for start in range(0, size, each) for plane in range(across)
        ]
        if distance * across == each:
            by_plane = [[i for places in by_plane for i in places]]
        for layer in range(depth):
            lowest = width * (depth - 1 - layer)
            part = builder.add(values, constant([0x8080 >> 16 - lowest] * size)) if lowest else values
            part = builder.trunc(builder.ashr(part, constant([lowest] * size)), ir.VectorType(element, size))
            for plane, places in enumerate(by_plane):
                at = (layer * next_layer + plane * distance) * width // 8
                write(builder, offset(builder, args[1], at), shuffled(builder, part, places))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 2, count, block, planes, apart, layers, below, bits), generate
