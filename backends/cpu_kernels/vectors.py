"""What the vector intrinsics are made of: the host's width, vector types that Numba knows, pieces of LLVM code."""

import os
import platform
from collections.abc import Sequence
from typing import Any, Final

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import models, register_model

__all__ = [
    "BYTE",
    "BYTES",
    "DWORD",
    "DWORDS",
    "FLOAT",
    "FLOATS",
    "HALF",
    "LANES",
    "QWORD",
    "SHORT",
    "SHORTS",
    "VECTOR_BYTES",
    "called",
    "constant",
    "floats",
    "fused",
    "half_as_float",
    "ints",
    "offset",
    "pointer_to",
    "prefetched",
    "read",
    "repeat",
    "shuffled",
    "target_has",
    "undefined",
    "write",
]


def target_has(feature: str) -> bool:
    """Whether the code that Numba makes may use a feature of the CPU, as LLVM names it."""
    named = os.environ.get("NUMBA_CPU_FEATURES")
    if named is None and os.environ.get("NUMBA_CPU_NAME", "").lower() == "generic":
        named = ""
    if named is not None:
        return f"+{feature}" in named.split(",")
    return bool(llvm.get_host_cpu_features().get(feature))


_HALVES: Final = target_has("f16c") or platform.machine().lower() not in ("x86_64", "amd64")
"""Whether the target converts float16; elsewhere LLVM calls a function that isn't there."""

LANES: Final = 16 if target_has("avx512f") and target_has("avx512bw") else 8
"""32-bit lanes of a vector: 16 with AVX-512, else 8, which LLVM splits where registers are narrower."""

VECTOR_BYTES: Final = 4 * LANES
"""Bytes of a vector: with AVX-512, those of a cache line."""

FLOAT, HALF = ir.FloatType(), ir.HalfType()
BYTE, SHORT, DWORD, QWORD = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
FLOATS, DWORDS = ir.VectorType(FLOAT, LANES), ir.VectorType(DWORD, LANES)
SHORTS, BYTES = ir.VectorType(SHORT, 2 * LANES), ir.VectorType(BYTE, 4 * LANES)


class _Floats(types.Type):
    def __init__(self) -> None:
        super().__init__(name=f"float32x{LANES}")


class _Ints(types.Type):
    def __init__(self) -> None:
        super().__init__(name=f"int32x{LANES}")


@register_model(_Floats)
class _FloatsModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, FLOATS)


@register_model(_Ints)
class _IntsModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, DWORDS)


floats: Final = _Floats()
ints: Final = _Ints()


def constant(values: list[int], kind: Any = DWORD) -> Any:
    """A vector of constants."""
    return ir.Constant(ir.VectorType(kind, len(values)), values)


def undefined(vector: Any) -> Any:
    """A vector of that type whose lanes are anything."""
    return ir.Constant(vector, ir.Undefined)


def offset(builder: Any, address: Any, bytes_: int) -> Any:
    """An address that many bytes further."""
    return builder.add(address, ir.Constant(QWORD, bytes_)) if bytes_ else address


def pointer_to(builder: Any, address: Any, kind: Any) -> Any:
    """An address as a pointer to a type; all of a kernel's pointers are made here.

    Numba optimizes a function's code anew, with that of its callers, after LLVM has prepared it for the machine. That
    turns such a pointer into an offset from null, which says nothing to the machine, but to the optimizer that the
    access can't be: it then takes it, and what comes after, out of the caller. Unless null is a valid pointer there.
    """
    set.add(builder.function.attributes, "null_pointer_is_valid")  # of the attributes that llvmlite doesn't list
    return builder.inttoptr(address, kind.as_pointer())


def read(builder: Any, address: Any, kind: Any) -> Any:
    """A value from memory, wherever it lies."""
    return builder.load(pointer_to(builder, address, kind), align=1)


def write(builder: Any, address: Any, value: Any) -> None:
    """A value to memory, wherever it lies."""
    builder.store(value, pointer_to(builder, address, value.type), align=1)


def called(builder: Any, name: str, result: Any, arguments: Sequence[Any]) -> Any:
    """Result of one of LLVM's intrinsic functions."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), list(arguments))


def prefetched(builder: Any, address: Any, nearness: int) -> None:
    """Begin to bring a cache line near: 3 is the nearest cache, 2 the next. The address may be anything."""
    how = (ir.Constant(DWORD, value) for value in (0, nearness, 1))
    called(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer_to(builder, address, BYTE), *how])


def shuffled(builder: Any, vector: Any, places: list[int]) -> Any:
    """Elements of a vector by their places in it."""
    return builder.shuffle_vector(vector, undefined(vector.type), constant(places))


def repeat(builder: Any, value: Any, count: int) -> Any:
    """A vector whose lanes are all `value`."""
    vector = ir.VectorType(value.type, count)
    first = builder.insert_element(undefined(vector), value, ir.Constant(DWORD, 0))
    return shuffled(builder, first, [0] * count)


def fused(builder: Any, one: Any, two: Any, three: Any) -> Any:
    """``one * two + three``, vectors of float32, rounded once."""
    return called(builder, f"llvm.fma.v{LANES}f32", FLOATS, [one, two, three])


def half_as_float(builder: Any, stored: Any) -> Any:
    """float16, given as 16-bit integers, one or a vector of them, as float32."""
    count = stored.type.count if isinstance(stored.type, ir.VectorType) else 0

    def kind(one: Any) -> Any:
        return ir.VectorType(one, count) if count else one

    def number(one: Any, value: float) -> Any:
        return ir.Constant(kind(one), [value] * count if count else value)

    if _HALVES:
        return builder.fpext(builder.bitcast(stored, kind(HALF)), kind(FLOAT))
    bits = builder.zext(stored, kind(DWORD))
    sign = builder.shl(builder.and_(bits, number(DWORD, 0x8000)), number(DWORD, 16))
    magnitude = builder.shl(builder.and_(bits, number(DWORD, 0x7FFF)), number(DWORD, 13))
    value = builder.fmul(builder.bitcast(magnitude, kind(FLOAT)), number(FLOAT, 2.0**112))  # the exponents' biases
    finite = builder.icmp_unsigned("<", magnitude, number(DWORD, 0x7C00 << 13))
    whole = builder.or_(magnitude, number(DWORD, 0x7F800000))
    merged = builder.select(finite, builder.bitcast(value, kind(DWORD)), whole)
    return builder.bitcast(builder.or_(merged, sign), kind(FLOAT))
