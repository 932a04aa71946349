"""The block of a product in registers: some rows of x by some vectors of the weight's rows.

Where there are 32 registers, codes are unpacked beside the multiplications, in code that is written out. Where there
are 16, they are unpacked before, and the loop is kept small: LLVM would otherwise move multiplications so far apart
that most of their operands wait in memory.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from quantcore_backends.cpu_kernels.ahead import Ahead
from quantcore_backends.cpu_kernels.simd_int import add_products, byte_pairs, codes_of_words, form, lane_codes
from quantcore_backends.cpu_kernels.vectors import (
    BYTES,
    DWORD,
    DWORDS,
    FLOAT,
    FLOATS,
    LANES,
    QWORD,
    SHORT,
    SHORTS,
    VECTOR_BYTES,
    called,
    constant,
    fused,
    offset,
    prefetched,
    read,
    repeat,
    write,
)

__all__ = ["block_product", "count_down", "unpacked_product"]

_WRITTEN_OUT: Final = {1: 4, 2: 2, 4: 2}
"""Steps of a loop that is kept small, by parts: those of integers need registers for products."""
_FLOATS_TOGETHER: Final = 16
"""Products of floats that are added one after another: of equal ones, the roundings add up."""


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
    height: Any,
    vectors: Any,
    run: Any,
    width: Any,
    bits: Any,
) -> Any:
    """Add to a block of the result the products of all runs, with packed codes. From `height` on, constants.

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
    ahead : Ahead
        What is brought near meanwhile, a part with each run.
    height, vectors, run : int
        Rows of the block, vectors of outputs, elements of a run.
    width, bits : int
        Of an activation, and of a code.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        block = _Packed(builder, *(n.literal_value for n in (height, vectors, run, width, bits)))
        block.add_runs(*args[:7], *args[6:8])
        return context.get_dummy_value()

    return types.void(*[types.intp] * 7, ahead, height, vectors, run, width, bits), generate


@intrinsic(prefer_literal=True)
def unpacked_product(
    typing: Any,
    x: Any,
    x_scales: Any,
    codes: Any,
    scales: Any,
    out: Any,
    runs: Any,
    left: Any,
    group_runs: Any,
    ahead: Any,
    height: Any,
    vectors: Any,
    run: Any,
    width: Any,
    bits: Any,
) -> Any:
    """As :func:`block_product`, with codes unpacked; or of floats (`FLOAT_WIDTH`) with floats, to float64.

    Parameters
    ----------
    codes : int
        Of each run, vectors of codes of the block's outputs, as many in a lane as of activations; or of floats.
    left : int
        How many runs are left of the first's group.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        block = _Unpacked(builder, *(n.literal_value for n in (height, vectors, run, width, bits)))
        block.add_runs(*args[:9])
        return context.get_dummy_value()

    return types.void(*[types.intp] * 8, ahead, height, vectors, run, width, bits), generate


def count_down(builder: Any, left: Any, runs: Any, scale: Any, size: int) -> None:
    """Go on to the next group's scales after its last run; a division would branch, and LLVM spill across it."""
    fewer = builder.sub(builder.load(left), ir.Constant(QWORD, 1))
    last = builder.icmp_signed("==", fewer, ir.Constant(QWORD, 0))
    builder.store(builder.select(last, runs, fewer), left)
    here = builder.load(scale)
    builder.store(builder.select(last, offset(builder, here, size), here), scale)


@contextmanager
def _rolled(builder: Any, count: int) -> Iterator[Any]:
    """A loop that LLVM leaves as it is, at least once."""
    before, body = builder.block, builder.append_basic_block("rolled")
    after = builder.append_basic_block("rolled.end")
    builder.branch(body)
    builder.position_at_end(body)
    index = builder.phi(QWORD)
    index.add_incoming(ir.Constant(QWORD, 0), before)
    yield index
    following = builder.add(index, ir.Constant(QWORD, 1))
    index.add_incoming(following, builder.block)
    again = builder.cbranch(builder.icmp_unsigned("<", following, ir.Constant(QWORD, count)), body, after)
    module = builder.module
    disabled = module.add_metadata([ir.MetaDataString(module, "llvm.loop.unroll.disable")])
    name = ir.MDValue(module, [], name=str(len(module.metadata)))
    name.operands = (name, disabled)  # a loop's metadata begins with itself, lest it be taken for another loop's
    again.set_metadata("llvm.loop", name)
    builder.position_at_end(after)


class _Block:
    """Code of a block: sums of one run in registers, then scaled into float32 memory."""

    run_bytes: int
    """Bytes of codes from run to run."""

    def __init__(self, builder: Any, height: int, vectors: int, length: int, width: int, bits: int) -> None:
        self.builder, self.height, self.vectors, self.bits = builder, height, vectors, bits
        self.layers, self.parts = form(bits, width)
        self.x_bytes = length * width // 8
        self.sums = self._vectors(FLOATS if self.parts == 1 else DWORDS)

    def _vectors(self, kind: Any) -> list[Any]:
        """Places for a vector of each row and each vector of outputs."""
        return [cgutils.alloca_once(self.builder, kind) for _ in range(self.height * self.vectors)]

    def clear(self, places: list[Any]) -> None:
        """Make vectors 0."""
        for place in places:
            self.builder.store(ir.Constant(place.type.pointee, None), place)

    def raise_sums(self) -> None:
        """Make room for the next layer's bytes below the sums."""
        for place in self.sums:
            self.builder.store(self.builder.shl(self.builder.load(place), constant([8] * LANES)), place)

    def add_runs(
        self,
        x: Any,
        x_scales: Any,
        codes: Any,
        scales: Any,
        out: Any,
        runs: Any,
        left: Any,
        group_runs: Any,
        ahead: Any,
    ) -> None:
        """Add the products of all runs, and bring near what is asked for."""
        builder = self.builder
        scale, left = cgutils.alloca_once_value(builder, scales), cgutils.alloca_once_value(builder, left)
        with cgutils.for_range(builder, runs) as loop:

            def of_run(start: Any, size: int, number: Any = loop.index) -> Any:
                return builder.add(start, builder.mul(number, ir.Constant(QWORD, size)))

            self.bring_near(Ahead(*cgutils.unpack_tuple(builder, ahead)), loop.index)
            self.sum_run(of_run(x, self.x_bytes * self.height), of_run(codes, self.run_bytes))
            self.scale_run(of_run(x_scales, 8 * self.height), builder.load(scale), out)
            count_down(builder, left, group_runs, scale, 2 * VECTOR_BYTES * self.vectors)

    def bring_near(self, ahead: Ahead, run: Any) -> None:
        """Begin to bring near what goes with a run."""
        builder = self.builder
        with builder.if_then(builder.icmp_signed("!=", ahead.codes, ir.Constant(QWORD, 0))):
            steps = ahead.codes_step, ahead.scales_step, ahead.scales_step
            for start, step in zip((ahead.codes, ahead.scales, ahead.biases), steps, strict=True):
                first = builder.add(start, builder.mul(run, step))
                with cgutils.for_range_slice(builder, first, builder.add(first, step), ir.Constant(QWORD, 64)) as line:
                    prefetched(builder, line[0], 2)

    def sum_run(self, x: Any, codes: Any) -> None:
        """Products of one run, summed."""
        raise NotImplementedError

    def scale_run(self, x_scales: Any, scales: Any, out: Any) -> None:
        """``out += sum * x_scale * scale + bias * x_sum``."""
        builder = self.builder
        for v in range(self.vectors):
            scale = read(builder, offset(builder, scales, v * LANES * 4), FLOATS)
            bias = read(builder, offset(builder, scales, (self.vectors + v) * LANES * 4), FLOATS)
            for row in range(self.height):
                x_scale = repeat(builder, read(builder, offset(builder, x_scales, row * 4), FLOAT), LANES)
                x_sum = repeat(builder, read(builder, offset(builder, x_scales, (self.height + row) * 4), FLOAT), LANES)
                at = offset(builder, out, (row * self.vectors + v) * LANES * 4)
                product = builder.fmul(builder.sitofp(builder.load(self.sums[row * self.vectors + v]), FLOATS), x_scale)
                biased = fused(builder, bias, x_sum, read(builder, at, FLOATS))
                write(builder, at, fused(builder, product, scale, biased))


class _Packed(_Block):
    """Sums of codes that are unpacked on the way."""

    def __init__(self, builder: Any, height: int, vectors: int, length: int, width: int, bits: int) -> None:
        super().__init__(builder, height, vectors, length, width, bits)
        self.words = length // lane_codes(bits)
        self.planes = lane_codes(bits) // self.parts
        self.run_bytes = self.words * vectors * VECTOR_BYTES

    def sum_run(self, x: Any, words: Any) -> None:
        """Products of one run, summed."""
        builder = self.builder
        self.clear(self.sums)
        together = min(self.words, max(1, (8 if self.parts == 4 else 4) // self.planes))
        for layer in range(self.layers):
            if layer:
                self.raise_sums()
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


class _Unpacked(_Block):
    """Sums of codes that are unpacked, or of floats."""

    def __init__(self, builder: Any, height: int, vectors: int, length: int, width: int, bits: int) -> None:
        super().__init__(builder, height, vectors, length, width, bits)
        self.floats = self.parts == 1
        self.steps = length // self.parts
        self.run_bytes = self.steps * vectors * VECTOR_BYTES
        self.pairs = byte_pairs(bits) if self.parts == 4 else 0
        self.together = _FLOATS_TOGETHER if self.floats else self.pairs
        while self.together and self.steps % self.together:
            self.together -= 1
        self.partial = self._vectors(FLOATS if self.floats else SHORTS) if self.together else []

    def sum_run(self, x: Any, codes: Any) -> None:
        """Products of one run, summed."""
        self.clear(self.sums)
        for layer in range(self.layers):
            if layer:
                self.raise_sums()
            start = offset(self.builder, x, layer * self.steps * 4)
            if self.together:
                self._sum_parts(start, codes)
            else:
                self._add_steps(start, codes, self.steps, self._add_products)

    def _sum_parts(self, x: Any, codes: Any) -> None:
        """Sums of some steps: of pairs in 16 bits, as many as can't overflow, or of floats, lest errors add up."""
        builder = self.builder
        with _rolled(builder, self.steps // self.together) as part:
            self.clear(self.partial)
            first = builder.mul(part, ir.Constant(QWORD, self.together))
            here, there = self._step(x, codes, first)
            self._add_steps(here, there, self.together, self._add_floats if self.floats else self._add_pairs)
            for place, partial in zip(self.sums, self.partial, strict=True):
                before, more = builder.load(place), builder.load(partial)
                if self.floats:
                    builder.store(builder.fadd(before, more), place)
                else:
                    ones = constant([1] * 2 * LANES, SHORT)
                    whole = called(builder, "llvm.x86.avx2.pmadd.wd", DWORDS, [more, ones])
                    builder.store(builder.add(before, whole), place)

    def _step(self, x: Any, codes: Any, step: Any) -> tuple[Any, Any]:
        """Where a step's activations and codes are."""
        builder, size = self.builder, self.vectors * VECTOR_BYTES
        here = builder.add(x, builder.mul(step, ir.Constant(QWORD, 4)))
        return here, builder.add(codes, builder.mul(step, ir.Constant(QWORD, size)))

    def _add_steps(self, x: Any, codes: Any, steps: int, add: Callable[[int, Any, Any], None]) -> None:
        """Products of some steps, a few of which are written out."""
        few = math.gcd(steps, _WRITTEN_OUT[self.parts])
        with _rolled(self.builder, steps // few) as turn:
            first = self.builder.mul(turn, ir.Constant(QWORD, few))
            for step in range(few):
                self._add_step(*self._step(x, codes, self.builder.add(first, ir.Constant(QWORD, step))), add)

    def _add_step(self, x: Any, codes: Any, add: Callable[[int, Any, Any], None]) -> None:
        """Products of what lies in a lane of codes, of every row and vector."""
        builder = self.builder
        kind = FLOATS if self.floats else SHORTS if self.parts == 2 else BYTES
        of_weight = [read(builder, offset(builder, codes, v * VECTOR_BYTES), kind) for v in range(self.vectors)]
        for row in range(self.height):
            four = repeat(builder, read(builder, offset(builder, x, row * self.x_bytes), DWORD), LANES)
            for v in range(self.vectors):
                add(row * self.vectors + v, of_weight[v], builder.bitcast(four, kind))

    def _add_products(self, number: int, codes: Any, x: Any) -> None:
        builder, place = self.builder, self.sums[number]
        builder.store(add_products(builder, builder.load(place), [(codes, x)], self.bits), place)

    def _add_floats(self, number: int, weight: Any, x: Any) -> None:
        builder, place = self.builder, self.partial[number]
        builder.store(fused(builder, weight, x, builder.load(place)), place)

    def _add_pairs(self, number: int, codes: Any, x: Any) -> None:
        builder, place = self.builder, self.partial[number]
        products = called(builder, "llvm.x86.avx2.pmadd.ub.sw", SHORTS, [codes, x])
        builder.store(builder.add(builder.load(place), products), place)

    def scale_run(self, x_scales: Any, scales: Any, out: Any) -> None:
        """As of integers; of floats ``out += sum``, in float64."""
        if not self.floats:
            super().scale_run(x_scales, scales, out)
            return
        builder, wide = self.builder, ir.VectorType(ir.DoubleType(), LANES)
        for number, place in enumerate(self.sums):
            at = offset(builder, out, number * 2 * VECTOR_BYTES)
            write(builder, at, builder.fadd(read(builder, at, wide), builder.fpext(builder.load(place), wide)))
