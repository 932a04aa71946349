"""Intrinsics of the products of many rows: words of rows put side by side, and the block of a product in registers."""

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from quantcore_backends.cpu_kernels.simd_int import (
    add_products,
    codes_of_words,
    crossing,
    first_floats,
    form,
    lane_codes,
)
from quantcore_backends.cpu_kernels.vectors import (
    BYTE,
    BYTES,
    DWORD,
    DWORDS,
    FLOAT,
    FLOATS,
    LANES,
    QWORD,
    constant,
    offset,
    prefetched,
    read,
    repeat,
    write,
)

__all__ = ["block_product", "codes_side_by_side", "scales_side_by_side", "side_by_side", "widen"]


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


@intrinsic(prefer_literal=True)
def scales_side_by_side(typing: Any, rows: Any, start: Any, left: Any, to: Any, stride: Any, kind: Any) -> Any:
    """As :func:`side_by_side`, of LANES scales a row, the first `left` of which are read; `kind` as in `scale_at`."""
    chosen = kind.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows, start, left, to, stride = args[:5]
        scales = [first_floats(builder, address, left, chosen, LANES) for address in _addresses(builder, rows, start)]
        for group, vector in enumerate(_transposed(builder, scales)):
            write(builder, builder.add(to, builder.mul(stride, ir.Constant(QWORD, group))), vector)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp, types.intp, types.intp, kind), generate


@intrinsic(prefer_literal=True)
def codes_side_by_side(typing: Any, rows: Any, start: Any, to: Any, bits: Any) -> Any:
    """As :func:`side_by_side`, each word unpacked to bytes: plane after plane of it, vectors one behind another."""
    width = bits.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows, start, to, _ = args
        planes = lane_codes(width) // 4
        words = [read(builder, address, DWORDS) for address in _addresses(builder, rows, start)]
        for word, vector in enumerate(_transposed(builder, words)):
            for plane in range(planes):
                codes = codes_of_words(builder, vector, width, plane, 4)
                write(builder, offset(builder, to, (word * planes + plane) * LANES * 4), codes)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp, bits), generate


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
def block_product(
    typing: Any,
    x: Any,
    x_scales: Any,
    words: Any,
    scales: Any,
    out: Any,
    runs: Any,
    group_runs: Any,
    ahead: Any,
    ahead_step: Any,
    height: Any,
    vectors: Any,
    run: Any,
    width: Any,
    bits: Any,
) -> Any:
    """Add to a block of the result the products of all runs. From `height` on, compile-time constants.

    Parameters
    ----------
    x : int
        Address of the block's activations: run by run, row by row.
    x_scales : int
        Of each run, the rows' scales, then those times the rows' sums.
    words : int
        Packed words of the block's outputs, side by side.
    scales : int
        Of each group, the outputs' scales, then their biases.
    out : int
        float32, a row for each of x's.
    runs, group_runs : int
        All runs, and those that share a scale of the weight.
    ahead, ahead_step : int
        What is prefetched during the first run, a line for each vector of packed words, and bytes to the next run's.
    height, vectors, run : int
        Rows of the block, vectors of outputs, elements of a run.
    width, bits : int
        Of an activation, and of a code.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        block = _Block(builder, *(n.literal_value for n in (height, vectors, run, width, bits)))
        x, x_scales, words, scales, out, runs, group_runs, ahead, ahead_step = args[:9]
        scale, left = cgutils.alloca_once_value(builder, scales), cgutils.alloca_once_value(builder, group_runs)
        with cgutils.for_range(builder, runs) as loop:
            at = loop.index
            block.prefetch(builder.add(ahead, builder.mul(at, ahead_step)))
            block.sum_run(
                builder.add(x, builder.mul(at, ir.Constant(QWORD, block.x_bytes * block.height))),
                builder.add(words, builder.mul(at, ir.Constant(QWORD, block.word_bytes))),
            )
            block.scale_run(
                builder.add(x_scales, builder.mul(at, ir.Constant(QWORD, 8 * block.height))),
                builder.load(scale),
                out,
            )
            _count_down(builder, left, group_runs, scale, 8 * LANES * block.vectors)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 9, height, vectors, run, width, bits), generate


def _count_down(builder: Any, left: Any, runs: Any, scale: Any, size: int) -> None:
    """Go on to the next group's scales after its last run; a division would branch, and LLVM spill across it."""
    fewer = builder.sub(builder.load(left), ir.Constant(QWORD, 1))
    last = builder.icmp_signed("==", fewer, ir.Constant(QWORD, 0))
    builder.store(builder.select(last, runs, fewer), left)
    here = builder.load(scale)
    builder.store(builder.select(last, offset(builder, here, size), here), scale)


class _Block:
    """Code of a block: int32 sums of one run in registers, then scaled into float32 memory."""

    def __init__(self, builder: Any, height: int, vectors: int, length: int, width: int, bits: int) -> None:
        self.builder, self.height, self.vectors, self.bits = builder, height, vectors, bits
        self.layers, self.parts = form(bits, width)
        self.words = length // lane_codes(bits)
        self.planes = lane_codes(bits) // self.parts
        self.x_bytes = length * width // 8
        self.word_bytes = self.words * vectors * LANES * 4
        self.sums = [cgutils.alloca_once(builder, DWORDS) for _ in range(height * vectors)]

    def prefetch(self, address: Any) -> None:
        """Begin to bring as much near as a run has of packed words."""
        for line in range(self.words * self.vectors * LANES * 4 // 64):
            prefetched(self.builder, offset(self.builder, address, line * 64), 2)

    def sum_run(self, x: Any, words: Any) -> None:
        """Products of one run, summed."""
        builder = self.builder
        for place in self.sums:
            builder.store(constant([0] * LANES), place)
        together = min(self.words, max(1, (8 if self.parts == 4 else 4) // self.planes))
        for layer in range(self.layers):
            if layer:
                for place in self.sums:
                    builder.store(builder.shl(builder.load(place), constant([8] * LANES)), place)
            start = offset(builder, x, layer * self.words * self.planes * 4)
            with cgutils.for_range(builder, ir.Constant(QWORD, self.words // together)) as loop:
                here = builder.mul(loop.index, ir.Constant(QWORD, together * self.planes * 4))
                there = builder.mul(loop.index, ir.Constant(QWORD, together * self.vectors * LANES * 4))
                self._add_words(builder.add(start, here), builder.add(words, there), together)

    def _add_words(self, x: Any, words: Any, count: int) -> None:
        builder = self.builder
        pairs: dict[int, list[tuple[Any, Any]]] = {}
        for word in range(count):
            at = [offset(builder, words, (word * self.vectors + v) * LANES * 4) for v in range(self.vectors)]
            packed = [read(builder, address, DWORDS) for address in at]
            for plane in range(self.planes):
                codes = [codes_of_words(builder, vector, self.bits, plane, self.parts) for vector in packed]
                for row in range(self.height):
                    four = offset(builder, x, row * self.x_bytes + (word * self.planes + plane) * 4)
                    several = builder.bitcast(repeat(builder, read(builder, four, DWORD), LANES), codes[0].type)
                    for v in range(self.vectors):
                        pairs.setdefault(row * self.vectors + v, []).append((codes[v], several))
        for place, both in pairs.items():
            at = self.sums[place]
            builder.store(add_products(builder, builder.load(at), both, self.bits), at)

    def scale_run(self, x_scales: Any, scales: Any, out: Any) -> None:
        """``out += sum * x_scale * scale + bias * x_sum``."""
        builder = self.builder
        kind = ir.FunctionType(FLOATS, [FLOATS] * 3)
        fma = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32")
        for v in range(self.vectors):
            scale = read(builder, offset(builder, scales, v * LANES * 4), FLOATS)
            bias = read(builder, offset(builder, scales, (self.vectors + v) * LANES * 4), FLOATS)
            for row in range(self.height):
                x_scale = repeat(builder, read(builder, offset(builder, x_scales, row * 4), FLOAT), LANES)
                x_sum = repeat(builder, read(builder, offset(builder, x_scales, (self.height + row) * 4), FLOAT), LANES)
                at = offset(builder, out, (row * self.vectors + v) * LANES * 4)
                product = builder.fmul(builder.sitofp(builder.load(self.sums[row * self.vectors + v]), FLOATS), x_scale)
                biased = builder.call(fma, [bias, x_sum, read(builder, at, FLOATS)])
                write(builder, at, builder.call(fma, [product, scale, biased]))
