"""Intrinsics of the products of many rows of x: words and scales of the weight's rows put side by side."""

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from quantcore_backends.cpu_kernels.simd_int import codes_of_words, crossing, first_floats
from quantcore_backends.cpu_kernels.vectors import (
    BYTE,
    BYTES,
    DWORDS,
    FLOATS,
    LANES,
    QWORD,
    constant,
    fused,
    offset,
    read,
    write,
)

__all__ = ["codes_side_by_side", "floats_of_words", "scales_side_by_side", "side_by_side", "widen"]


_SHORT_BYTES = ir.VectorType(BYTE, 2 * LANES)


@intrinsic
def side_by_side(typing: Any, rows: Any, start: Any, to: Any, stride: Any) -> Any:
    """LANES words of each of LANES rows, as vectors of one word of each row.

    `rows` points to the rows' addresses, `start` is the byte in them, `stride` the bytes from vector to vector. Each
    row's words are read in one go: a few at a time, rows that lie a multiple of 4 KiB apart, which share a set of the
    nearest cache, would push each other's lines out before these are read to their end.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows, start, to, stride = args
        words = [read(builder, address, DWORDS) for address in _addresses(builder, rows, start)]
        for word, vector in enumerate(_transposed(builder, words)):
            write(builder, builder.add(to, builder.mul(stride, ir.Constant(QWORD, word))), vector)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp, types.intp), generate


@intrinsic
def scales_side_by_side(typing: Any, rows: Any, start: Any, left: Any, to: Any, stride: Any, kind: Any) -> Any:
    """As :func:`side_by_side`, of LANES scales a row, the first `left` of which are read; `kind` as in `scale_at`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows, start, left, to, stride, kind = args
        scales = first_floats(builder, _addresses(builder, rows, start), left, kind, LANES)
        for group, vector in enumerate(_transposed(builder, scales)):
            write(builder, builder.add(to, builder.mul(stride, ir.Constant(QWORD, group))), vector)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp, types.intp, types.intp, types.intp), generate


@intrinsic(prefer_literal=True)
def codes_side_by_side(typing: Any, rows: Any, start: Any, to: Any, stride: Any, bits: Any, parts: Any) -> Any:
    """As :func:`side_by_side`, each word unpacked, plane after plane of it: `parts` codes in each lane of a vector."""
    width, several = bits.literal_value, parts.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows, start, to, stride = args[:4]
        planes = 32 // width // several
        words = [read(builder, address, DWORDS) for address in _addresses(builder, rows, start)]
        for word, vector in enumerate(_transposed(builder, words)):
            for plane in range(planes):
                codes = codes_of_words(builder, vector, width, plane, several)
                number = ir.Constant(QWORD, word * planes + plane)
                write(builder, builder.add(to, builder.mul(stride, number)), codes)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp, types.intp, bits, parts), generate


def _addresses(builder: Any, rows: Any, start: Any) -> list[Any]:
    """Where LANES rows, whose addresses lie at `rows`, have the byte `start`."""
    return [builder.add(read(builder, offset(builder, rows, 8 * row), QWORD), start) for row in range(LANES)]


def _transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """LANES vectors of which rows and columns change places: blocks of four lanes first, then lanes within these."""
    fours = [_blocks_transposed(builder, rows[row::4]) for row in range(4)]
    return [column for four in zip(*fours, strict=True) for column in _lanes_transposed(builder, *four)]


def _blocks_transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """The first blocks of two or four vectors that are so many blocks of four lanes, the second ones, and so on."""

    def pick(one: Any, two: Any, places: list[int]) -> Any:
        chosen = [4 * place + lane for place in places for lane in range(4)]
        return builder.shuffle_vector(one, two, constant(chosen))

    if len(rows) == 2:
        a, b = rows
        return [pick(a, b, [0, 2]), pick(a, b, [1, 3])]
    a, b, c, d = rows
    found = []
    for half in ([0, 1, 4, 5], [2, 3, 6, 7]):
        ab, cd = pick(a, b, half), pick(c, d, half)
        found += [pick(ab, cd, [0, 2, 4, 6]), pick(ab, cd, [1, 3, 5, 7])]
    return found


def _lanes_transposed(builder: Any, a: Any, b: Any, c: Any, d: Any) -> list[Any]:
    """Four vectors, within each four lanes of which rows and columns change places."""

    def pick(one: Any, two: Any, places: list[int]) -> Any:
        """Lanes of two vectors, places from 4 on being the second's, the same in each four lanes."""
        chosen = [
            four + place if place < 4 else LANES + four + place - 4 for four in range(0, LANES, 4) for place in places
        ]
        return builder.shuffle_vector(one, two, constant(chosen))

    low, high = pick(a, b, [0, 4, 1, 5]), pick(a, b, [2, 6, 3, 7])
    low2, high2 = pick(c, d, [0, 4, 1, 5]), pick(c, d, [2, 6, 3, 7])
    first, second = [0, 1, 4, 5], [2, 3, 6, 7]
    return [pick(low, low2, first), pick(low, low2, second), pick(high, high2, first), pick(high, high2, second)]


@intrinsic(prefer_literal=True)
def widen(typing: Any, address: Any, to: Any, bits: Any) -> Any:
    """A chunk of codes of 3, 5 or 6 bits, each in a byte of its own."""
    width = bits.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        codes = crossing(builder, args[0], width)
        write(builder, args[1], codes if codes.type == BYTES else builder.trunc(codes, _SHORT_BYTES))
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, bits), generate


@intrinsic(prefer_literal=True)
def floats_of_words(typing: Any, words: Any, scale: Any, bias: Any, to: Any, stride: Any, bits: Any) -> Any:
    """A vector of words, their scales and biases made the weight in float32: vectors `stride` bytes from each other."""
    width = bits.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        words = read(builder, args[0], DWORDS)
        scale, bias = read(builder, args[1], FLOATS), read(builder, args[2], FLOATS)
        for plane in range(32 // width):
            codes = builder.sitofp(codes_of_words(builder, words, width, plane, 1), FLOATS)
            to = builder.add(args[3], builder.mul(args[4], ir.Constant(QWORD, plane)))
            write(builder, to, fused(builder, codes, scale, bias))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5, bits), generate
