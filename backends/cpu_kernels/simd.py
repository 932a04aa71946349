"""Portable vectors for Numba: LLVM vector types behind a few intrinsics, so that a kernel reads like arithmetic.

LLVM picks the host's instructions; a vector wider than the host's registers is split. Addresses are integers: with
array arguments LLVM can't tell that results and operands don't overlap, and spills.
"""

import os
from typing import Any, Final

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, models, register_model

__all__ = [
    "LANES",
    "byte_at",
    "codes",
    "float_at",
    "fma",
    "load",
    "minus",
    "scale_at",
    "scaled",
    "splat",
    "store",
    "total",
    "zero",
]


def _lanes() -> int:
    """float32 lanes of a vector: 16 with AVX-512, else 8, which LLVM splits where registers are narrower."""
    named = os.environ.get("NUMBA_CPU_FEATURES")
    if named is not None:
        return 16 if "+avx512f" in named.split(",") else 8
    return 16 if llvm.get_host_cpu_features().get("avx512f") else 8


LANES: Final = _lanes()

_FLOAT, _BYTE, _DWORD, _QWORD = ir.FloatType(), ir.IntType(8), ir.IntType(32), ir.IntType(64)
_FLOATS, _DWORDS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_DWORD, LANES)


class _Floats(types.Type):
    def __init__(self) -> None:
        super().__init__(name=f"float32x{LANES}")


floats: Final = _Floats()


@register_model(_Floats)
class _FloatsModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _FLOATS)


def _constant(values: list[int], kind: Any = _DWORD) -> Any:
    return ir.Constant(ir.VectorType(kind, len(values)), values)


def _undefined(vector: Any) -> Any:
    return ir.Constant(vector, ir.Undefined)


def _read(builder: Any, address: Any, kind: Any) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)


def _repeat(builder: Any, value: Any, count: int) -> Any:
    """A vector whose lanes, or blocks of lanes, are all `value`."""
    vector = ir.VectorType(value.type, count)
    first = builder.insert_element(_undefined(vector), value, ir.Constant(_DWORD, 0))
    return builder.shuffle_vector(first, _undefined(vector), _constant([0] * count))


@intrinsic
def zero(typing: Any) -> Any:
    """All lanes 0."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(_FLOATS, [0.0] * LANES)

    return floats(), generate


@intrinsic
def load(typing: Any, address: Any) -> Any:
    """LANES float32 from memory."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _read(builder, args[0], _FLOATS)

    return floats(types.intp), generate


@intrinsic
def store(typing: Any, address: Any, value: Any) -> Any:
    """LANES float32 to memory."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[1], builder.inttoptr(args[0], _FLOATS.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(types.intp, floats), generate


@intrinsic
def splat(typing: Any, value: Any) -> Any:
    """All lanes one value."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _repeat(builder, args[0], LANES)

    return floats(types.float32), generate


@intrinsic
def fma(typing: Any, x: Any, y: Any, z: Any) -> Any:
    """``x * y + z`` with one rounding."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32"), args)

    return floats(floats, floats, floats), generate


@intrinsic
def scaled(typing: Any, x: Any, y: Any, z: Any) -> Any:
    """``x * y + z`` with two roundings, as the contract has dequantize."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fadd(builder.fmul(args[0], args[1]), args[2])

    return floats(floats, floats, floats), generate


@intrinsic
def total(typing: Any, vector: Any) -> Any:
    """Sum of the lanes."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(_FLOAT, [_FLOAT, _FLOATS])
        add = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fadd.v{LANES}f32")
        return builder.call(add, [ir.Constant(_FLOAT, 0.0), args[0]], fastmath=("reassoc",))

    return types.float32(floats), generate


@intrinsic
def minus(typing: Any, x: Any, y: Any) -> Any:
    """``x - y``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fsub(args[0], args[1])

    return floats(floats, floats), generate


@intrinsic(prefer_literal=True)
def codes(typing: Any, address: Any, bits: Any) -> Any:
    """LANES codes from a bitstream that starts at a byte, as float32; `bits` is a compile-time constant.

    For 3, 5 and 6 bits, 8 or 16 bytes are read, which is past the LANES codes: the caller sees to it that they exist.
    """
    width = bits.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if width == 8:
            raw = builder.zext(_read(builder, args[0], ir.VectorType(_BYTE, LANES)), _DWORDS)
            return builder.sitofp(raw, _FLOATS)
        if 32 % width == 0:
            dwords, shifts = _whole_words(builder, args[0], width)
        else:
            dwords, shifts = _bytes_in_place(builder, args[0], width)
        shifted = builder.lshr(dwords, _constant(shifts))
        return builder.sitofp(builder.and_(shifted, _constant([(1 << width) - 1] * LANES)), _FLOATS)

    return floats(types.intp, bits), generate


def _whole_words(builder: Any, address: Any, bits: int) -> tuple[Any, list[int]]:
    """The dword of each lane's code, and the shift to it, where no code crosses a dword."""
    shifts = [lane * bits % 32 for lane in range(LANES)]
    used = LANES * bits
    if used <= 32:
        raw = _read(builder, address, ir.IntType(used))
        return _repeat(builder, raw if used == 32 else builder.zext(raw, _DWORD), LANES), shifts
    words = ir.VectorType(_DWORD, used // 32)
    which = _constant([lane * bits // 32 for lane in range(LANES)])
    return builder.shuffle_vector(_read(builder, address, words), _undefined(words), which), shifts


def _bytes_in_place(builder: Any, address: Any, bits: int) -> tuple[Any, list[int]]:
    """Each lane's two bytes moved into its dword: one byte shuffle within blocks of 16 bytes."""
    block = _read(builder, address, ir.IntType(8 * LANES))
    size = 16 if LANES == 16 else 8
    raw = _repeat(builder, block, 4 * LANES // size)
    raw = builder.bitcast(raw, ir.VectorType(_BYTE, 4 * LANES))
    places = []
    for lane in range(LANES):
        first = lane * bits // 8
        base = lane // 4 * 16
        places += [base + first, base + min(first + 1, size - 1), base + first, base + first]
    moved = builder.shuffle_vector(raw, _undefined(raw.type), _constant(places))
    return builder.bitcast(moved, _DWORDS), [lane * bits % 8 for lane in range(LANES)]


@intrinsic(prefer_literal=True)
def scale_at(typing: Any, address: Any, kind: Any) -> Any:
    """One float from memory as float32; `kind` is a compile-time constant: 0 float32, 1 float16, 2 bfloat16."""
    chosen = kind.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if chosen == 0:
            return _read(builder, args[0], _FLOAT)
        if chosen == 1:
            return builder.fpext(_read(builder, args[0], ir.HalfType()), _FLOAT)
        raw = builder.zext(_read(builder, args[0], ir.IntType(16)), _DWORD)
        return builder.bitcast(builder.shl(raw, ir.Constant(_DWORD, 16)), _FLOAT)

    return types.float32(types.intp, kind), generate


@intrinsic
def byte_at(typing: Any, address: Any) -> Any:
    """One byte from memory."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.zext(_read(builder, args[0], _BYTE), _QWORD)

    return types.intp(types.intp), generate


@intrinsic
def float_at(typing: Any, address: Any) -> Any:
    """One float32 from memory."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _read(builder, args[0], _FLOAT)

    return types.float32(types.intp), generate
