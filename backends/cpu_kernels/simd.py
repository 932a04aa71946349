"""Portable float vectors for Numba: LLVM vector types behind a few intrinsics, so that a kernel reads like arithmetic.

LLVM picks the host's instructions; a vector wider than the host's registers is split. Addresses are integers: with
array arguments LLVM can't tell that results and operands don't overlap, and spills.
"""

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from quantcore_backends.cpu_kernels.vectors import (
    BYTE,
    DWORD,
    DWORDS,
    FLOAT,
    FLOATS,
    LANES,
    QWORD,
    SHORT,
    constant,
    floats,
    fused,
    half_as_float,
    pointer_to,
    prefetched,
    read,
    repeat,
    shuffled,
    write,
)

__all__ = [
    "LANES",
    "byte_at",
    "codes",
    "float_at",
    "fma",
    "greatest",
    "larger",
    "least",
    "load",
    "minus",
    "prefetch",
    "scale_at",
    "scaled",
    "smaller",
    "splat",
    "store",
    "store_four",
    "times",
    "total",
    "totals",
    "whole_words",
    "zero",
]


@intrinsic
def zero(typing: Any) -> Any:
    """All lanes 0."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(FLOATS, [0.0] * LANES)

    return floats(), generate


@intrinsic
def load(typing: Any, address: Any) -> Any:
    """LANES float32 from memory."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return read(builder, args[0], FLOATS)

    return floats(types.intp), generate


@intrinsic
def store(typing: Any, address: Any, value: Any) -> Any:
    """LANES float32 to memory."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        write(builder, args[0], args[1])
        return context.get_dummy_value()

    return types.void(types.intp, floats), generate


@intrinsic
def store_four(typing: Any, address: Any, value: Any, count: Any) -> Any:
    """The first four lanes to memory, or the first `count` of these."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        four = shuffled(builder, args[1], [0, 1, 2, 3])
        there = builder.icmp_signed("<", constant([0, 1, 2, 3]), repeat(builder, builder.trunc(args[2], DWORD), 4))
        pointer = pointer_to(builder, args[0], four.type)
        kind = ir.FunctionType(ir.VoidType(), [four.type, pointer.type, DWORD, there.type])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.masked.store.v4f32.p0")
        builder.call(function, [four, pointer, ir.Constant(DWORD, 4), there])
        return context.get_dummy_value()

    return types.void(types.intp, floats, types.intp), generate


@intrinsic
def splat(typing: Any, value: Any) -> Any:
    """All lanes one value."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return repeat(builder, args[0], LANES)

    return floats(types.float32), generate


@intrinsic
def fma(typing: Any, x: Any, y: Any, z: Any) -> Any:
    """``x * y + z`` with one rounding."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return fused(builder, *args)

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
        kind = ir.FunctionType(FLOAT, [FLOAT, FLOATS])
        add = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fadd.v{LANES}f32")
        return builder.call(add, [ir.Constant(FLOAT, 0.0), args[0]], fastmath=("reassoc",))

    return types.float32(floats), generate


@intrinsic
def totals(typing: Any, first: Any, second: Any, third: Any, fourth: Any) -> Any:
    """Sums of the lanes of four vectors, in the first four lanes."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def pairs(x: Any, y: Any, size: int) -> Any:
            """In turn `size` lanes of x and of y, each the sum of two such blocks that follow one another."""
            low = [lane + LANES - size if lane & size else lane for lane in range(LANES)]
            both = [builder.shuffle_vector(x, y, constant([lane + more for lane in low])) for more in (0, size)]
            return builder.fadd(*both)

        four = pairs(pairs(args[0], args[1], 1), pairs(args[2], args[3], 1), 2)
        size = LANES
        while size > 4:
            size //= 2
            four = builder.fadd(four, shuffled(builder, four, [(lane + size) % LANES for lane in range(LANES)]))
        return four

    return floats(floats, floats, floats, floats), generate


@intrinsic
def times(typing: Any, x: Any, y: Any) -> Any:
    """``x * y``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fmul(args[0], args[1])

    return floats(floats, floats), generate


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
            raw = builder.zext(read(builder, args[0], ir.VectorType(BYTE, LANES)), DWORDS)
            return builder.sitofp(raw, FLOATS)
        if 32 % width == 0:
            dwords, shifts = whole_words(builder, args[0], width)
        else:
            dwords, shifts = _bytes_in_place(builder, args[0], width)
        shifted = builder.lshr(dwords, constant(shifts))
        return builder.sitofp(builder.and_(shifted, constant([(1 << width) - 1] * LANES)), FLOATS)

    return floats(types.intp, bits), generate


def whole_words(builder: Any, address: Any, bits: int) -> tuple[Any, list[int]]:
    """The dword of each lane's code, and the shift to it, where no code crosses a dword."""
    shifts = [lane * bits % 32 for lane in range(LANES)]
    used = LANES * bits
    if used <= 32:
        raw = read(builder, address, ir.IntType(used))
        return repeat(builder, raw if used == 32 else builder.zext(raw, DWORD), LANES), shifts
    words = ir.VectorType(DWORD, used // 32)
    which = [lane * bits // 32 for lane in range(LANES)]
    return shuffled(builder, read(builder, address, words), which), shifts


def _bytes_in_place(builder: Any, address: Any, bits: int) -> tuple[Any, list[int]]:
    """Each lane's two bytes moved into its dword: one byte shuffle within blocks of 16 bytes."""
    block = read(builder, address, ir.IntType(8 * LANES))
    size = 16 if LANES == 16 else 8
    raw = repeat(builder, block, 4 * LANES // size)
    raw = builder.bitcast(raw, ir.VectorType(BYTE, 4 * LANES))
    places = []
    for lane in range(LANES):
        first = lane * bits // 8
        base = lane // 4 * 16
        places += [base + first, base + min(first + 1, size - 1), base + first, base + first]
    return builder.bitcast(shuffled(builder, raw, places), DWORDS), [lane * bits % 8 for lane in range(LANES)]


@intrinsic(prefer_literal=True)
def scale_at(typing: Any, address: Any, kind: Any) -> Any:
    """One float from memory as float32; `kind` is a compile-time constant: 0 float32, 1 float16, 2 bfloat16."""
    chosen = kind.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if chosen == 0:
            return read(builder, args[0], FLOAT)
        if chosen == 1:
            return half_as_float(builder, read(builder, args[0], SHORT))
        raw = builder.zext(read(builder, args[0], SHORT), DWORD)
        return builder.bitcast(builder.shl(raw, ir.Constant(DWORD, 16)), FLOAT)

    return types.float32(types.intp, kind), generate


@intrinsic
def byte_at(typing: Any, address: Any) -> Any:
    """One byte from memory."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.zext(read(builder, args[0], BYTE), QWORD)

    return types.intp(types.intp), generate


@intrinsic
def float_at(typing: Any, address: Any) -> Any:
    """One float32 from memory."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return read(builder, args[0], FLOAT)

    return types.float32(types.intp), generate


@intrinsic
def prefetch(typing: Any, address: Any) -> Any:
    """Begin to bring a cache line near, but not nearest: fewer are on the way there at a time.

    The address may be anything.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        prefetched(builder, args[0], 2)
        return context.get_dummy_value()

    return types.void(types.intp), generate


def _chosen(which: str) -> Any:
    """Lanes of one of two vectors, by a comparison."""

    def typed(typing: Any, x: Any, y: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.select(builder.fcmp_ordered(which, *args), *args)

        return floats(floats, floats), generate

    return intrinsic(typed)


def _extreme(which: str) -> Any:
    """The least or greatest lane."""

    def typed(typing: Any, vector: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kind = ir.FunctionType(FLOAT, [FLOATS])
            function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.{which}.v{LANES}f32")
            return builder.call(function, args, fastmath=("nnan",))

        return types.float32(floats), generate

    return intrinsic(typed)


smaller, larger = _chosen("<"), _chosen(">")
least, greatest = _extreme("fmin"), _extreme("fmax")
