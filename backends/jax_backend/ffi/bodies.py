"""What one thread does of a product: a kernel on a chunk of the weight, with operands from a block of integers.

A body is a C function ``(chunk, operands) -> 0``. Its kernel is chosen while it is compiled, by literal numbers: what a
compiled function closes over must be the same in every process, or it can't be cached on disk.
"""

from functools import cache
from typing import Any, Final

import numpy as np
from numba import carray, types
from numba.extending import intrinsic, overload

from quantcore_backends.cpu_kernels import kernels, transposed
from quantcore_backends.cpu_kernels.disk_cache import CACHED, cfunc, njit
from quantcore_backends.cpu_kernels.kernels import code_at
from quantcore_backends.cpu_kernels.simd import float_at, scale_at
from quantcore_backends.cpu_kernels.vectors import pointer_to
from quantcore_backends.jax_backend.ffi.block import OPERATIONS, in_block
from quantcore_backends.jax_backend.ffi.frame import free, load32, load64, malloc

__all__ = [
    "CHUNK_COLUMNS",
    "CHUNK_ROWS",
    "body",
    "chosen_weight",
    "doubles",
    "floats",
    "pointer",
]

CHUNK_ROWS: Final = 64
CHUNK_COLUMNS: Final = 256

_X, _PACKED, _SCALES, _BIASES, _WHICH, _OUT = in_block("x", "packed", "scales", "biases", "which", "out")
_SUMS, _TAIL, _COUNT, _ROWS, _COLUMNS, _STACK = in_block("sums", "tail", "count", "rows", "columns", "stack")
_SPAN, _FLUSH, _ROW, _SCALE_ROW, _STEP = in_block("span", "flush", "row", "scale_row", "step")
_SAFE, _CHUNKS, _START, _HEIGHT = in_block("safe", "chunks", "start", "height")

_SIGNATURE: Final = types.int64(types.int64, types.int64)
_OPTIONS: Final[dict[str, Any]] = {"cache": True, "boundscheck": False, "error_model": "numpy"}


def pointer(kind: Any) -> Any:
    """A Numba function that makes an address a pointer to that type."""
    pointer = types.CPointer(kind)

    @intrinsic
    def cast(typing: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return pointer_to(builder, args[0], context.get_value_type(kind))

        return pointer(types.int64), generate

    return cast


floats, doubles = pointer(types.float32), pointer(types.float64)


def _kernel(operation: int, bits: int, kind: int, *args: Any) -> None:
    """Call a kernel; Numba replaces it by the one that the three literal numbers name."""


@overload(_kernel, prefer_literal=True)
def _kernel_of(operation, bits, kind, *args):
    factories = (kernels.four_by_one, kernels.one_by_four, transposed.rows_by_few, kernels.dense_rows)
    kernel = factories[operation.literal_value](bits.literal_value, kind.literal_value)

    def run(operation, bits, kind, *args):
        kernel(*args)

    return run


@njit(**CACHED)
def chosen_weight(operands, product):
    """The weight that a product is with; in range whatever the index says."""
    which = load64(operands + _WHICH)
    return min(max(load32(which + 4 * product), 0), load64(operands + _STACK) - 1) if which != 0 else 0


@cache
def body(operation: str, bits: int, kind: int) -> Any:
    """The body of an operation on codes of that width, with scales of that kind (`simd.scale_at`)."""
    number = OPERATIONS.index(operation)
    if operation == "along_rows":
        return _along_rows(bits, kind)
    return _decode(bits, kind) if operation == "decode" else _few_rows(number, bits, kind)


def _few_rows(number: int, bits: int, kind: int) -> Any:
    @cfunc(_SIGNATURE, **_OPTIONS)
    def run(chunk, operands):
        count, rows, columns = load64(operands + _COUNT), load64(operands + _ROWS), load64(operands + _COLUMNS)
        span, flush, height = load64(operands + _SPAN), load64(operands + _FLUSH), load64(operands + _HEIGHT)
        row, scale_row, step = load64(operands + _ROW), load64(operands + _SCALE_ROW), load64(operands + _STEP)
        product, part = divmod(chunk, load64(operands + _CHUNKS))
        weight = chosen_weight(operands, product)
        spans = (columns + span - 1) // span
        x = load64(operands + _X) + 4 * product * count * columns
        sums = carray(doubles(load64(operands + _SUMS) + 8 * product * count * spans), (count, spans))
        packed = load64(operands + _PACKED) + weight * rows * row
        scales = load64(operands + _SCALES) + weight * rows * scale_row
        biases = load64(operands + _BIASES) + weight * rows * scale_row
        first = part * height
        last = min(first + height, rows)
        safe = load64(operands + _SAFE) if weight == load64(operands + _STACK) - 1 else rows
        to = load64(operands + _OUT) + 4 * product * rows * count
        middle = min(max(safe, first), last)
        if first < middle:
            out = carray(floats(to + 4 * first * count), (middle - first, count))
            _kernel(
                number,
                bits,
                kind,
                x,
                sums,
                packed,
                scales,
                biases,
                out,
                first,
                middle,
                columns,
                span,
                flush,
                row,
                scale_row,
                step,
            )
        if middle < last:
            out = carray(floats(to + 4 * middle * count), (last - middle, count))
            tail = load64(operands + _TAIL) - safe * row
            _kernel(
                number,
                bits,
                kind,
                x,
                sums,
                tail,
                scales,
                biases,
                out,
                middle,
                last,
                columns,
                span,
                flush,
                row,
                scale_row,
                step,
            )
        for m in range(count):
            row_of_x = carray(floats(x + 4 * m * columns), columns)
            hopeless = -1  # whether that row has a NaN; found out where a sum isn't finite
            for n in range(first, last):
                place = carray(floats(to + 4 * (n * count + m)), (1,))
                if np.isfinite(place[0]):
                    continue
                if hopeless < 0:
                    hopeless = 1 if np.isnan(row_of_x).any() else 0
                if hopeless == 0:
                    value = 0.0
                    for g in range(spans):
                        scale = scale_at(scales + n * scale_row + g * step, kind)
                        bias = scale_at(biases + n * scale_row + g * step, kind)
                        for k in range(g * span, min((g + 1) * span, columns)):
                            scaled = np.float32(np.float32(code_at(packed + n * row, k, bits)) * scale)
                            value += np.float64(np.float32(scaled + bias)) * row_of_x[k]
                    place[0] = value
        return 0

    return run


def _along_rows(bits: int, kind: int) -> Any:
    number = OPERATIONS.index("along_rows")

    @cfunc(_SIGNATURE, **_OPTIONS)
    def run(chunk, operands):
        count, rows, columns = load64(operands + _COUNT), load64(operands + _ROWS), load64(operands + _COLUMNS)
        span, height = load64(operands + _SPAN), load64(operands + _HEIGHT)
        row, scale_row, step = load64(operands + _ROW), load64(operands + _SCALE_ROW), load64(operands + _STEP)
        product, part = divmod(chunk, load64(operands + _CHUNKS))
        weight = chosen_weight(operands, product)
        spans = (columns + span - 1) // span
        first, last = part * height, min((part + 1) * height, spans)
        x = load64(operands + _X) + 4 * product * count * rows
        packed = load64(operands + _PACKED) + weight * rows * row
        scales = load64(operands + _SCALES) + weight * rows * scale_row
        biases = load64(operands + _BIASES) + weight * rows * scale_row
        out = carray(floats(load64(operands + _OUT) + 4 * product * count * columns), (count, columns))
        narrow_size, wide_size = count * (height * span + 4), count * height
        memory = malloc(4 * narrow_size + 8 * wide_size)
        if memory == 0:
            return 1
        wide = carray(doubles(memory), wide_size)
        narrow = carray(floats(memory + 8 * wide_size), narrow_size)
        safe = load64(operands + _SAFE) if weight == load64(operands + _STACK) - 1 else rows
        tail = load64(operands + _TAIL) - safe * row
        _kernel(
            number,
            bits,
            kind,
            x,
            4 * rows,
            count,
            packed,
            tail,
            safe,
            scales,
            biases,
            out,
            narrow,
            wide,
            first,
            last,
            rows,
            columns,
            span,
            row,
            scale_row,
            step,
        )
        free(memory)
        start = first * span
        for m in range(count):
            for k in range(start, min(last * span, columns)):
                if not np.isfinite(out[m, k]):
                    value = 0.0
                    for n in range(rows):
                        at = n * scale_row + k // span * step
                        code = np.float32(code_at(packed + n * row, k, bits))
                        scaled = np.float32(code * scale_at(scales + at, kind))
                        value += np.float64(np.float32(scaled + scale_at(biases + at, kind))) * float_at(
                            x + 4 * (m * rows + n)
                        )
                    out[m, k] = value
        return 0

    return run


def _decode(bits: int, kind: int) -> Any:
    number = OPERATIONS.index("decode")

    @cfunc(_SIGNATURE, **_OPTIONS)
    def run(chunk, operands):
        rows, columns, span = load64(operands + _ROWS), load64(operands + _COLUMNS), load64(operands + _SPAN)
        row, scale_row, step = load64(operands + _ROW), load64(operands + _SCALE_ROW), load64(operands + _STEP)
        height, count = load64(operands + _HEIGHT), load64(operands + _COUNT)
        product, part = divmod(chunk, load64(operands + _CHUNKS))
        weight = chosen_weight(operands, product)
        packed = load64(operands + _PACKED) + weight * rows * row
        scales = load64(operands + _SCALES) + weight * rows * scale_row
        biases = load64(operands + _BIASES) + weight * rows * scale_row
        start = load64(operands + _START)
        first = start + part * height
        last = min(first + height, start + count)
        safe = load64(operands + _SAFE) if weight == load64(operands + _STACK) - 1 else rows
        to = load64(operands + _OUT) + 4 * product * count * columns
        middle = min(max(safe, first), last)
        if first < middle:
            out = carray(floats(to + 4 * (first - start) * columns), (middle - first, columns))
            _kernel(number, bits, kind, packed, scales, biases, out, first, middle, columns, span, row, scale_row, step)
        if middle < last:
            out = carray(floats(to + 4 * (middle - start) * columns), (last - middle, columns))
            tail = load64(operands + _TAIL) - safe * row
            _kernel(number, bits, kind, tail, scales, biases, out, middle, last, columns, span, row, scale_row, step)
        return 0

    return run
