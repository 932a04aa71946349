"""What the handlers share: a call's attribute, its operands, checked and set out in a block, and running a body.

Every length is checked against the attribute's and against one another's, so that a module that was put together
wrongly gives an error of XLA's, not a read out of bounds.
"""

from typing import Any, Final

from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from quantcore_backends.cpu_kernels import compiled, kernels
from quantcore_backends.cpu_kernels.disk_cache import CACHED, INLINED, njit
from quantcore_backends.cpu_kernels.raw_memory import clear_bytes, copy_bytes
from quantcore_backends.jax_backend.ffi import bodies, pool
from quantcore_backends.jax_backend.ffi.abi import CONSTANTS, OFFSETS
from quantcore_backends.jax_backend.ffi.block import FIELDS, OPERATIONS, in_block, in_spec
from quantcore_backends.jax_backend.ffi.bodies import doubles, floats
from quantcore_backends.jax_backend.ffi.frame import (
    FIRST_BODY,
    dimension,
    error,
    free,
    is_array,
    load64,
    malloc,
    store64,
    table,
)

__all__ = [
    "BLOCK",
    "DATA",
    "EXHAUSTED",
    "F32",
    "INVALID",
    "S32",
    "bytes_at",
    "no_body",
    "no_memory",
    "no_operands",
    "no_shapes",
    "run",
    "run_few_rows",
    "set_weight",
]

BLOCK: Final = 8 * len(FIELDS)
"""Bytes of a block of operands."""
DATA: Final = OFFSETS["Buffer.data"]
F32, S32 = CONSTANTS["DataType_F32"], CONSTANTS["DataType_S32"]
INVALID, EXHAUSTED = CONSTANTS["Error_Code_INVALID_ARGUMENT"], CONSTANTS["Error_Code_RESOURCE_EXHAUSTED"]

_F16, _BF16, _U32 = CONSTANTS["DataType_F16"], CONSTANTS["DataType_BF16"], CONSTANTS["DataType_U32"]
_KINDS, _WIDTHS_OF_CODES = len(compiled.KINDS), 8
_BODIES = len(OPERATIONS) * _KINDS * _WIDTHS_OF_CODES
_ROW_SPAN, _OVERREAD = compiled.ROW_SPAN, compiled.OVERREAD

_BODY, _KIND, _BITS, _IN_FEATURES, _GROUP = in_spec("body", "kind", "bits", "columns", "group")
_SPAN, _FLUSH = in_spec("span", "flush")
_X, _PACKED, _SCALES, _BIASES, _SUMS, _TAIL = in_block("x", "packed", "scales", "biases", "sums", "tail")
_COUNT, _ROWS, _COLUMNS, _STACK = in_block("count", "rows", "columns", "stack")
_SPAN_OUT, _FLUSH_OUT, _ROW, _SCALE_ROW, _STEP = in_block("span", "flush", "row", "scale_row", "step")
_SAFE, _CHUNKS, _HEIGHT = in_block("safe", "chunks", "height")


def _text(value: str) -> Any:
    """A Numba function that gives the address of a C string."""

    @intrinsic
    def address(typing: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.ptrtoint(context.insert_const_string(builder.module, value), ir.IntType(64))

        return types.int64(), generate

    return address


no_operands = _text("quantcore: the call has other operands or attributes than this version gives it")
no_shapes = _text("quantcore: the shapes of x, packed, scales and biases don't fit")
no_body = _text("quantcore: the kernel isn't loaded; quantcore.jax.load() loads it in a process that didn't trace it")
no_memory = _text("quantcore: out of memory")

bytes_at = bodies.pointer(types.uint8)


@njit(**INLINED)
def _is_known(spec):
    """Whether there is such a scheme, and the body is one for it."""
    bits, group, kind = load64(spec + _BITS), load64(spec + _GROUP), load64(spec + _KIND)
    body = load64(spec + _BODY) - FIRST_BODY
    if not (0 <= kind < _KINDS and 1 <= bits <= _WIDTHS_OF_CODES and 0 <= body < _BODIES):
        return False
    if body % _KINDS != kind or body // _KINDS % _WIDTHS_OF_CODES != bits - 1:
        return False
    if group != 0 and not (16 <= group <= 256 and group & (group - 1) == 0):
        return False
    return load64(spec + _SPAN) == (group if group else _ROW_SPAN) and load64(spec + _FLUSH) > 0


@njit(**CACHED)
def set_weight(block, spec, packed, scales, biases):
    """Write down a stack of weights; False where it isn't one of that scheme."""
    if not _is_known(spec):
        return False
    kind = load64(spec + _KIND)
    dtype = F32 if kind == 0 else (_F16 if kind == 1 else _BF16)
    if not (is_array(packed, _U32, 3) and is_array(scales, dtype, 3) and is_array(biases, dtype, 3)):
        return False
    columns, bits, group = load64(spec + _IN_FEATURES), load64(spec + _BITS), load64(spec + _GROUP)
    stack, rows, words = dimension(packed, 0), dimension(packed, 1), dimension(packed, 2)
    groups = 1 if group == 0 else (columns + group - 1) // group
    if columns < 1 or words != (columns * bits + 31) // 32:
        return False
    for part in (scales, biases):
        if dimension(part, 0) != stack or dimension(part, 1) != rows or dimension(part, 2) != groups:
            return False
    size = 4 if kind == 0 else 2
    store64(block + _PACKED, load64(packed + DATA))
    store64(block + _SCALES, load64(scales + DATA))
    store64(block + _BIASES, load64(biases + DATA))
    store64(block + _STACK, stack)
    store64(block + _ROWS, rows)
    store64(block + _COLUMNS, columns)
    store64(block + _SPAN_OUT, load64(spec + _SPAN))
    store64(block + _FLUSH_OUT, load64(spec + _FLUSH))
    store64(block + _ROW, 4 * words)
    store64(block + _SCALE_ROW, size * groups)
    store64(block + _STEP, size if group else 0)
    past = 0 if 32 % bits == 0 else min(rows, (_OVERREAD + 4 * words - 1) // (4 * words))
    store64(block + _SAFE, rows - past)
    return True


@njit(**INLINED)
def _copy_tail(block):
    """The last rows copied to where there is memory behind them that a vector may read; 0 where there is none."""
    rows, row, safe = load64(block + _ROWS), load64(block + _ROW), load64(block + _SAFE)
    length = (rows - safe) * row
    memory = malloc(length + _OVERREAD)
    if memory != 0:
        start = load64(block + _PACKED) + (load64(block + _STACK) * rows * row - length)
        copy_bytes(memory, start, length)
        clear_bytes(memory + length, _OVERREAD)
    return memory


@njit(**CACHED)
def run(frame, spec, block, chunks):
    """Run the body over all chunks; an error where it isn't there or has no memory."""
    body = load64(table() + 8 * load64(spec + _BODY))
    if body == 0:
        return error(frame, no_body(), INVALID)
    tail = _copy_tail(block)
    if tail == 0:
        return error(frame, no_memory(), EXHAUSTED)
    store64(block + _TAIL, tail)
    done = pool.for_chunks(frame, body, block, chunks)
    free(tail)
    return 0 if done else error(frame, no_memory(), EXHAUSTED)


@njit(**CACHED)
def run_few_rows(frame, spec, block, products):
    """The float kernels for few rows of x over all rows of the weights, `out` being (P, N, M)."""
    count, rows, columns = load64(block + _COUNT), load64(block + _ROWS), load64(block + _COLUMNS)
    span = load64(block + _SPAN_OUT)
    spans = (columns + span - 1) // span
    sums = malloc(8 * products * count * spans + 8)
    if sums == 0:
        return error(frame, no_memory(), EXHAUSTED)
    kernels.span_sums(
        carray(floats(load64(block + _X)), (products * count, columns)),
        products * count,
        columns,
        span,
        carray(doubles(sums), (products * count, spans)),
    )
    store64(block + _SUMS, sums)
    chunks = (rows + bodies.CHUNK_ROWS - 1) // bodies.CHUNK_ROWS
    store64(block + _HEIGHT, bodies.CHUNK_ROWS)
    store64(block + _CHUNKS, chunks)
    failed = run(frame, spec, block, products * chunks)
    free(sums)
    return failed
