"""Integer vectors for Numba that the products of 24-bit activations need beside those of :mod:`simd_int`."""

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from quantcore_backends.cpu_kernels.vectors import (
    DWORD,
    DWORDS,
    FLOATS,
    LANES,
    floats,
    ints,
    read,
    shuffled,
    write,
)

__all__ = ["minus_products", "spread_integers", "store_integers", "to_integers", "zero_codes"]


@intrinsic
def to_integers(typing: Any, vector: Any) -> Any:
    """float32 lanes, which int32 must hold, as int32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fptosi(args[0], DWORDS)

    return ints(floats), generate


@intrinsic
def minus_products(typing: Any, sums: Any, x: Any, y: Any) -> Any:
    """``sums - x * y`` of int32 lanes."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.sub(args[0], builder.mul(args[1], args[2]))

    return ints(ints, ints, ints), generate


@intrinsic
def zero_codes(typing: Any, scales: Any, biases: Any, top: Any) -> Any:
    """The codes that stand nearest to 0, up to `top`; 0 where that is NaN."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        scales, biases, top = args
        kind = ir.FunctionType(FLOATS, [FLOATS])
        rint = cgutils.get_or_insert_function(builder.module, kind, f"llvm.rint.v{LANES}f32")
        nearest = builder.call(rint, [builder.fdiv(builder.fneg(biases), scales)])
        none = ir.Constant(FLOATS, None)
        above = builder.select(builder.fcmp_ordered(">", nearest, none), nearest, none)
        return builder.select(builder.fcmp_ordered("<", above, top), above, top)

    return floats(floats, floats, floats), generate


@intrinsic(prefer_literal=True)
def spread_integers(typing: Any, address: Any, count: Any) -> Any:
    """`count` int32 from memory over the lanes, each in a run of them."""
    number = count.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        several = read(builder, args[0], ir.VectorType(DWORD, number))
        return shuffled(builder, several, [lane * number // LANES for lane in range(LANES)])

    return ints(types.intp, count), generate


@intrinsic
def store_integers(typing: Any, address: Any, value: Any) -> Any:
    """int32 lanes to memory."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        write(builder, args[0], args[1])
        return context.get_dummy_value()

    return types.void(types.intp, ints), generate
